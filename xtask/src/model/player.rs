//! Plays a scenario: does one line after the other, and takes pictures on the way.
//!
//! While something is to stop, or has stopped, each operation has a thread of its own, as it would in a VMM; and since only one
//! of them moves at a time, a scenario always comes out the same. Whether an operation waits for another that has stopped
//! cannot be asked, so it is given two seconds. An answer that the scenario does not expect ends it, and so does a virtual machine
//! in which something does not hold that must.

use super::calls::Call;
use super::deeds::Answer;
use super::language::{Action, Design as Which, Line, Operation};
use super::stage::Stage;
use anyhow::{Context, Result, anyhow, bail, ensure};
use kvmprep_model::confidential::Stop;
use kvmprep_model::dump::{ExternalEntry, ExternalTarget, VmDump};
use kvmprep_model::mmu::RootDump;
use kvmprep_model::mmu::comparison::{ByAccess, ByTable, Design};
use kvmprep_model::personality::Version;
use kvmprep_model::units::{Gfn, GfnRange, PAGE_SIZE, Pfn, Privacy};
use std::collections::BTreeMap;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a scenario comes to.
pub struct Film {
    pub title: String,
    pub pictures: Vec<Picture>,
}

/// One moment.
pub struct Picture {
    pub caption: String,
    /// What was done since the last one.
    pub steps: Vec<Step>,
    pub under_way: Vec<UnderWay>,
    pub scene: Scene,
}

/// An operation and its answer.
pub struct Step {
    pub text: String,
    pub answer: String,
}

/// An operation that is not over.
pub struct UnderWay {
    pub text: String,
    pub progress: Progress,
    /// The guest's frames that it is about.
    pub ranges: Vec<GfnRange>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Progress {
    /// It has made this call, which has no answer yet.
    Stopped(Call),
    /// It waits, or tries again and again, for another that has stopped.
    Waits,
}

/// What there is to see.
pub enum Scene {
    Vm {
        version: Version,
        dump: Box<VmDump>,
        /// What to call the frames that are mapped.
        names: BTreeMap<(Gfn, Pfn), String>,
    },
    Design {
        which: Which,
        /// Of shared accesses, and of private ones.
        tables: [RootDump; 2],
        external: Vec<ExternalEntry>,
    },
}

/// The newest kernel that is modelled.
const NEWEST: Version = Version(7, 3);
/// How long something may take that waits for nobody.
const LONG: Duration = Duration::from_secs(60);
/// How long something is given that may wait for another that has stopped.
const SHORT: Duration = Duration::from_secs(2);

/// Plays a whole scenario.
pub fn play(lines: &[Line]) -> Result<Film> {
    let mut player = Player::default();
    for line in lines {
        player.line(line).with_context(|| format!("line {}: {}", line.number, line.text))?;
    }
    player.end()
}

#[derive(Default)]
struct Player {
    title: String,
    version: Option<Version>,
    stage: Option<Stage>,
    design: Option<Compared>,
    armed: Vec<Armed>,
    going: Vec<Going>,
    steps: Vec<Step>,
    pictures: Vec<Picture>,
    /// Something was done since the last picture.
    has_news: bool,
}

/// A call that is to stop, or has.
struct Armed {
    line: usize,
    call: Call,
    stop: Stop,
}

/// An operation with a thread of its own.
struct Going {
    line: Line,
    thread: JoinHandle<Answer>,
    progress: Progress,
    ranges: Vec<GfnRange>,
}

/// One of the designs that are compared, which has no virtual machine around it.
struct Compared {
    which: Which,
    design: Box<dyn Design>,
    next_pfn: u64,
}

impl Player {
    fn line(&mut self, line: &Line) -> Result<()> {
        self.has_news |= !matches!(line.operation, Operation::Title(_) | Operation::Picture(_));
        if matches!(line.operation, Operation::Vm(_)) {
            self.design = None;
        }
        match &line.operation {
            Operation::Title(title) => self.title = title.clone(),
            Operation::Picture(caption) => self.take_picture(caption)?,
            Operation::Kernel(version) => {
                ensure!(self.stage.is_none(), "the kernel is that of the machine: it is to be said first");
                self.version = Some(*version);
            }
            Operation::Design(which) => {
                ensure!(self.going.is_empty(), "something of the virtual machine is still under way");
                self.design = Some(Compared::new(*which));
                self.told(line, &Answer::ok())?;
            }
            Operation::Fail { call, nth, how } => {
                self.stage().fail(*call, *nth, *how);
                self.told(line, &Answer::ok())?;
            }
            Operation::Stop { call, nth } => {
                ensure!(!call.is_of_making(), "at that call there is nothing to see yet");
                let stop = self.stage().stop(*call, *nth);
                self.armed.push(Armed { line: line.number, call: *call, stop });
            }
            Operation::GoOn => self.go_on(line)?,
            operation => match &mut self.design {
                Some(compared) => {
                    let answer = compared.act(operation)?;
                    self.told(line, &answer)?;
                }
                None => self.act(line)?,
            },
        }
        Ok(())
    }

    fn stage(&mut self) -> &mut Stage {
        let version = self.version.unwrap_or(NEWEST);
        self.stage.get_or_insert_with(|| Stage::new(version))
    }

    fn act(&mut self, line: &Line) -> Result<()> {
        let is_quiet = self.going.is_empty();
        if let Some(made) = self.stage().make(&line.operation, is_quiet)? {
            return self.told(line, &made);
        }
        let stage = self.stage();
        let ranges = stage.ranges_of(&line.operation);
        let deed = stage.deed(&line.operation)?;
        if self.armed.is_empty() && self.going.is_empty() {
            let answer = deed();
            return self.told(line, &answer);
        }
        let thread = std::thread::spawn(deed);
        self.going.push(Going { line: line.clone(), thread, progress: Progress::Waits, ranges });
        self.settle(self.going.len() - 1)
    }

    /// Waits until one of those under way is over, has stopped, or turns out to wait for another.
    fn settle(&mut self, index: usize) -> Result<()> {
        let others = self.going.iter().enumerate().filter(|(other, _)| *other != index);
        let has_stopped = others.into_iter().any(|(_, other)| other.progress != Progress::Waits);
        let time = if has_stopped { SHORT } else { LONG };
        let started = Instant::now();
        loop {
            let thread = &self.going[index].thread;
            if thread.is_finished() {
                return self.finish(index);
            }
            let id = thread.thread().id();
            if let Some(armed) = self.armed.iter().find(|armed| armed.stop.reached_by() == Some(id)) {
                self.going[index].progress = Progress::Stopped(armed.call);
                return Ok(());
            }
            if started.elapsed() > time {
                self.going[index].progress = Progress::Waits;
                ensure!(
                    has_stopped,
                    "it has not ended in {} seconds, though nobody is in its way",
                    time.as_secs()
                );
                return Ok(());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn finish(&mut self, index: usize) -> Result<()> {
        let Going { line, thread, .. } = self.going.remove(index);
        let answer = thread.join().map_err(|_| anyhow!("the model has failed, see above"))?;
        self.told(&line, &answer).with_context(|| format!("line {}: {}", line.number, line.text))
    }

    /// Has everything that has stopped go on, in the order in which it began, to its end or its next stop; then whatever
    /// waited for that.
    fn go_on(&mut self, line: &Line) -> Result<()> {
        let is_stopped = |going: &Going| going.progress != Progress::Waits;
        let stopped: Vec<_> = self.going.iter().filter(|going| is_stopped(going)).map(Going::id).collect();
        ensure!(!stopped.is_empty(), "nothing has stopped");
        self.steps.push(Step { text: line.text.clone(), answer: String::new() });
        for id in stopped {
            // Only this one: the thread may come to its next stop at once.
            let stop = self.armed.iter().position(|armed| armed.stop.reached_by() == Some(id));
            stop.map(|stop| self.armed.remove(stop));
            let index = self.going.iter().position(|going| going.id() == id);
            let index = index.context("what has stopped is not over")?;
            self.going[index].progress = Progress::Waits;
            self.settle(index)?;
        }
        let waiting: Vec<_> = self.going.iter().filter(|going| !is_stopped(going)).map(Going::id).collect();
        for id in waiting {
            if let Some(index) = self.going.iter().position(|going| going.id() == id) {
                self.settle(index)?;
            }
        }
        Ok(())
    }

    /// An operation is over.
    fn told(&mut self, line: &Line, answer: &Answer) -> Result<()> {
        self.steps.push(Step { text: line.text.clone(), answer: answer.text.clone() });
        match &line.expected {
            Some(expected) => {
                let rest = answer.text.strip_prefix(expected.as_str());
                let is_it = rest.is_some_and(|rest| !rest.starts_with(|next: char| next.is_alphanumeric()));
                ensure!(is_it, "it answers {:?}, where {expected:?} is expected", answer.text);
            }
            None => ensure!(
                answer.is_success,
                "it answers {:?}; if that is expected, the line is to say so: `{} => {}`",
                answer.text,
                line.text,
                answer.text.split(',').next().unwrap_or_default()
            ),
        }
        if self.going.is_empty() {
            self.stage.iter().try_for_each(Stage::check)?;
        }
        Ok(())
    }

    fn take_picture(&mut self, caption: &str) -> Result<()> {
        let scene = match (&self.design, &self.stage) {
            (Some(compared), _) => compared.scene(),
            (None, Some(stage)) => scene_of(stage, self.going.is_empty())?,
            (None, None) => bail!("there is nothing to see yet: it begins with `vm TYPE`"),
        };
        let under_way = |going: &Going| UnderWay {
            text: going.line.text.clone(),
            progress: going.progress,
            ranges: going.ranges.clone(),
        };
        self.has_news = false;
        self.pictures.push(Picture {
            caption: caption.into(),
            steps: std::mem::take(&mut self.steps),
            under_way: self.going.iter().map(under_way).collect(),
            scene,
        });
        Ok(())
    }

    /// What was not yet seen is seen at the end, and nothing is left standing.
    fn end(mut self) -> Result<Film> {
        if self.has_news || self.pictures.is_empty() {
            self.take_picture("")?;
        }
        let last = Line { number: 0, text: "go-on".into(), operation: Operation::GoOn, expected: None };
        while self.going.iter().any(|going| going.progress != Progress::Waits) {
            self.go_on(&last)?;
        }
        if let Some(armed) = self.armed.first() {
            bail!("line {}: {} was not called so often", armed.line, armed.call.name());
        }
        Ok(Film { title: self.title, pictures: self.pictures })
    }
}

impl Going {
    fn id(&self) -> std::thread::ThreadId {
        self.thread.thread().id()
    }
}

fn scene_of(stage: &Stage, is_quiet: bool) -> Result<Scene> {
    let vm = stage.vm()?;
    let dump = if is_quiet { VmDump::of(vm) } else { VmDump::of_stopped(vm) };
    let entries = dump.roots.iter().flat_map(|root| &root.entries);
    let leafs = entries.filter(|entry| entry.spte.is_leaf(entry.level)).map(|e| (e.gfn, e.spte.pfn()));
    let pages = dump.external.iter().flatten().filter_map(|entry| match entry.target {
        ExternalTarget::Page { pfn, .. } => Some((entry.gfn, pfn)),
        ExternalTarget::Table => None,
    });
    let name = |(gfn, pfn)| ((gfn, pfn), stage.name_of_frame(&dump, gfn, pfn));
    let names = leafs.chain(pages).map(name).collect();
    Ok(Scene::Vm { version: stage.version(), dump: Box::new(dump), names })
}

impl Compared {
    fn new(which: Which) -> Self {
        let design: Box<dyn Design> = match which {
            Which::ByTable => Box::new(ByTable::new()),
            Which::ByAccess(assumed) => Box::new(ByAccess::new(assumed)),
        };
        Compared { which, design, next_pfn: 0x100 }
    }

    fn act(&mut self, operation: &Operation) -> Result<Answer> {
        let result = match operation {
            Operation::Guest { action: Action::Read | Action::Write, gpa, privacy, .. } => {
                self.next_pfn += 1;
                let privacy = privacy.unwrap_or(Privacy::Shared);
                self.design.fault(privacy, Gfn::of_gpa(*gpa), Pfn(self.next_pfn))
            }
            Operation::Zap { why, range } => {
                let pages = range.size.div_ceil(PAGE_SIZE);
                self.design.zap(*why, GfnRange::new(Gfn::of_gpa(range.gpa), pages))
            }
            _ => bail!("of a design only accesses of the guest and `zap` are compared"),
        };
        Ok(match result {
            Ok(()) => Answer::ok(),
            Err(_) => Answer::told("the external table refuses", false),
        })
    }

    fn scene(&self) -> Scene {
        let contents = kvmprep_model::mmu::ExternalTable::contents(self.design.external());
        Scene::Design {
            which: self.which,
            tables: self.design.tables(),
            external: ExternalEntry::of_contents(&contents.unwrap_or_default()),
        }
    }
}
