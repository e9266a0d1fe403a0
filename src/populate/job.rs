//! A job: one population, done by any number of threads.
//!
//! It joins plan, queue and stages, counts what is done, and knows when it is over. Threads come to it, the
//! caller's own or those the caller asks for; it never takes one by itself.

use super::coverage::Table;
use super::plan::{HostMethod, Intent, Plan, Segment, Wish};
use super::queue::{Claim, Queue, Skill, Task};
use super::stage2::{self, Outcome, Patience, Pause};
use super::{host, supply};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{Access, ExitRequest, Kernel, MappedObject, block_asynchronous_signals};
use crate::memslot::Backing;
use crate::range::{Range, RangeSet};
use crate::vm::Vm;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Stack of a library thread, in bytes: several times what its deepest call uses.
const STACK: usize = 256 << 10;
/// The shortest time between two signs of progress.
const PROGRESS_PERIOD: Duration = Duration::from_millis(50);

/// What is asked of a job.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What the guest is to be spared.
    pub intent: Intent,
    /// Only the host's page tables.
    pub host_only: bool,
    /// Advise huge pages first.
    pub huge_advice: bool,
    /// A missing stage 2 is an error.
    pub require_stage2: bool,
    /// Refuse what cannot fit.
    pub check_free: bool,
    /// Leave out what is known to be populated.
    pub skip_covered: bool,
    /// Fill stage 2 of dirty-logged slots too.
    pub dirty_logged_too: bool,
    /// How long it may take.
    pub timeout: Option<Duration>,
}

/// What became of stage 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage2State {
    /// It was done, for all that was not left out.
    Done = 0,
    /// It was not wanted.
    NotWanted = 1,
    /// There was no vCPU to do it with.
    NoVcpu = 2,
    /// This kernel, or this VM, has no such thing.
    Unavailable = 3,
    /// Every vCPU refused.
    VcpusRefused = 4,
    /// It was stopped before its end.
    Unfinished = 5,
}

/// How a job ended.
#[derive(Clone, Debug)]
enum End {
    /// All that can be done is done.
    Complete,
    /// No thread is left that could do the rest.
    OutOfVcpus,
    Cancelled,
    TimedOut,
    Failed(Box<Error>),
}

/// Why a thread came out of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leave {
    /// There is nothing left for it to do.
    NoWork,
    /// A signal came, or its owner asked for the vCPU.
    Interrupted,
    /// Its vCPU cannot pre-fault now; what it can do is done.
    VcpuRefused,
    /// The job is over.
    Ended,
}

/// What has been done, in bytes, nanoseconds and counts.
#[derive(Debug, Default)]
struct Counters {
    host: AtomicU64,
    stage2: AtomicU64,
    /// Not in memory, so not mapped (RESIDENT).
    absent: AtomicU64,
    /// Mapped, but the first write will fault.
    first_writes: AtomicU64,
    host_ns: AtomicU64,
    stage2_ns: AtomicU64,
    retries: AtomicU64,
    interruptions: AtomicU64,
}

/// What was done with one kind of backing.
#[derive(Clone, Copy, Debug, Default)]
pub struct BackingReport {
    /// Bytes of it in the plan.
    pub bytes: u64,
    /// How its host stage was done.
    pub host: u32,
    /// Whether it was prepared for writing.
    pub writable: bool,
}

/// What was done.
#[derive(Clone, Debug)]
pub struct Report {
    /// Bytes in the plan, left-out ones included.
    pub asked: u64,
    /// Bytes found covered and skipped.
    pub skipped: u64,
    /// Bytes through the host stage.
    pub host: u64,
    /// Bytes mapped in stage 2.
    pub stage2: u64,
    /// Bytes not in memory (RESIDENT).
    pub absent: u64,
    /// Bytes whose first write will still fault.
    pub first_writes: u64,
    /// Bytes of dirty-logged slots, kept out of stage 2.
    pub dirty_logged: u64,
    /// Bytes whose stage-2 mapping may have been lost while the job ran.
    pub lost: u64,
    /// What is not done.
    pub remaining: RangeSet,
    /// What became of stage 2.
    pub stage2_state: Stage2State,
    /// Time in each stage, summed over threads, and by the clock.
    pub host_ns: u64,
    #[allow(missing_docs, reason = "see host_ns")]
    pub stage2_ns: u64,
    #[allow(missing_docs, reason = "see host_ns")]
    pub wall_ns: u64,
    /// Tries repeated.
    pub retries: u64,
    /// Interruptions by signals.
    pub interruptions: u64,
    /// Change of the VM's mappings by level, 4K, 2M, 1G; `None` where the kernel does not tell.
    pub pages: Option<[i64; 3]>,
    /// By backing, in the order of [`Backing::ALL`].
    pub backings: [BackingReport; Backing::ALL.len()],
    /// Whether huge-page advice was refused somewhere.
    pub advice_refused: bool,
}

/// How far a job is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Bytes to be done in each stage.
    pub host_total: u64,
    #[allow(missing_docs, reason = "see host_total")]
    pub stage2_total: u64,
    /// Bytes done in each stage.
    pub host: u64,
    #[allow(missing_docs, reason = "see host")]
    pub stage2: u64,
    /// Since the job was made.
    pub elapsed: Duration,
    /// Whether it is over.
    pub ended: bool,
}

/// Threads of the library's own.
#[derive(Default)]
struct Library {
    threads: Vec<JoinHandle<()>>,
    vcpus: usize,
}

/// One population.
pub struct Job {
    vm: Arc<Vm>,
    kernel: Arc<dyn Kernel>,
    options: Options,
    plan: Plan,
    queue: Arc<Queue>,
    counters: Counters,
    host_total: u64,
    stage2_total: u64,
    skipped: u64,
    advice_refused: bool,
    pages_before: Option<[u64; 3]>,
    zaps_before: u64,
    started: Instant,
    wall_ns: AtomicU64,
    end: OnceLock<End>,
    /// Found missing while working, although the capability was claimed.
    unavailable: AtomicBool,
    refused: AtomicU32,
    had_vcpu: AtomicBool,
    visitors: AtomicUsize,
    library: Mutex<Library>,
    event: OwnedFd,
    told: AtomicBool,
    last_told_ns: AtomicU64,
}

/// A thread at work.
pub struct Worker<'a> {
    vcpu: Option<RawFd>,
    own: &'a [Range],
    exit_request: Option<Box<dyn ExitRequest>>,
    is_library: bool,
    /// Whether its vCPU has been looked at.
    is_checked: bool,
    refused: bool,
}

impl<'a> Worker<'a> {
    /// The caller's thread, with the vCPU that it owns, if any. `own` is memory that it should take first.
    pub fn visitor(kernel: &dyn Kernel, vcpu: Option<RawFd>, own: &'a [Range]) -> Result<Self> {
        let exit_request = vcpu.map(|fd| watch_vcpu(kernel, fd)).transpose()?;
        Ok(Self { vcpu, own, exit_request, is_library: false, is_checked: false, refused: false })
    }

    fn library(vcpu: Option<RawFd>) -> Worker<'static> {
        Worker { vcpu, own: &[], exit_request: None, is_library: true, is_checked: false, refused: false }
    }

    fn is_wanted_elsewhere(&self) -> bool {
        self.exit_request.as_ref().is_some_and(|request| request.is_set())
    }
}

/// Watches a vCPU's wish to leave; refuses what is no vCPU. Asks by mapping it, which waits for nobody.
pub fn watch_vcpu(kernel: &dyn Kernel, fd: RawFd) -> Result<Box<dyn ExitRequest>> {
    let not_a_vcpu = || {
        Error::new(libc::EBADF, Reason::BadFd, format!("descriptor {fd} is not a vCPU"))
            .hint("pass what KVM_CREATE_VCPU returned, or -1 for the host stage only")
    };
    let watch = kernel.exit_request(fd).map_err(|errno| match errno.0 {
        libc::ENOMEM => Error::kernel(errno, "mapping kvm_run"),
        _ => not_a_vcpu(),
    })?;
    // Other things can be mapped too, and reading there may be fatal: a file may be empty.
    if stage2::is_vcpu(kernel, fd) { Ok(watch) } else { Err(not_a_vcpu()) }
}

impl Job {
    /// Plans a population of `asked`, or of all memory when that is empty.
    pub fn new(vm: &Arc<Vm>, asked: &[Range], options: Options) -> Result<Arc<Self>> {
        let kernel = Arc::clone(&vm.kernel);
        let has_stage2 = vm.caps()?.pre_fault;
        if options.require_stage2 && !has_stage2 {
            return Err(no_stage2());
        }
        let wish = Wish {
            intent: options.intent,
            stage2: has_stage2 && !options.host_only,
            dirty_logged_too: options.dirty_logged_too,
        };
        let (slots, plan) = loop {
            let (slots, changes) = {
                let memory = vm.memory();
                (memory.slots.clone(), memory.changes)
            };
            match Plan::new(&*kernel, &slots, asked, wish) {
                Ok(plan) => break (slots, plan),
                // What was announced meanwhile may be gone already, and is not what is to be planned.
                Err(_) if vm.memory().changes != changes => {}
                Err(error) => return Err(error),
            }
        };
        if options.require_stage2 && plan.dirty_logged > 0 {
            return Err(dirty_logged());
        }
        if options.check_free {
            supply::check(&*kernel, &plan)?;
        }
        let advice_refused = options.huge_advice && !advise_huge(&*kernel, &plan);
        let event = kernel.event().map_err(|errno| Error::kernel(errno, "making the job's eventfd"))?;
        let (queue, skipped) = fill_queue(vm, &kernel, &plan, options.skip_covered);
        let planned = |f: &dyn Fn(&Segment) -> bool| {
            plan.segments.iter().filter(|s| f(s)).map(|s| s.range.size()).sum::<u64>()
        };
        let job = Arc::new(Self {
            host_total: planned(&|s| s.host != HostMethod::Nothing).saturating_sub(skipped),
            stage2_total: planned(&|s| s.stage2).saturating_sub(skipped),
            pages_before: pages_by_level(&*kernel, vm.fd()),
            zaps_before: vm.memory().coverage.zaps(),
            vm: Arc::clone(vm),
            kernel,
            options,
            plan,
            queue: Arc::new(queue),
            counters: Counters::default(),
            skipped,
            advice_refused,
            started: Instant::now(),
            wall_ns: AtomicU64::new(0),
            end: OnceLock::new(),
            unavailable: AtomicBool::new(!has_stage2),
            refused: AtomicU32::new(0),
            had_vcpu: AtomicBool::new(false),
            visitors: AtomicUsize::new(0),
            library: Mutex::default(),
            event,
            told: AtomicBool::new(false),
            last_told_ns: AtomicU64::new(0),
        });
        job.vm.register(&job.queue);
        // A slot whose change was announced since the record was read is not in the queue's ears yet.
        let changed: Vec<Range> = {
            let memory = job.vm.memory();
            let is_stale = |s: &&Segment| {
                memory.slots.is_changing(s.slot) || memory.slots.get(s.slot) != slots.get(s.slot)
            };
            job.plan.segments.iter().filter(is_stale).map(|s| s.range).collect()
        };
        changed.into_iter().for_each(|range| job.queue.withdraw(range));
        job.end_if_done();
        Ok(job)
    }

    /// The kernel beneath.
    pub fn kernel(&self) -> &dyn Kernel {
        &*self.kernel
    }

    /// Works on the calling thread until there is nothing left for it, calling `between` before each chunk.
    pub fn run(&self, mut worker: Worker<'_>, between: &mut dyn FnMut(&Job)) -> Leave {
        self.visitors.fetch_add(1, SeqCst);
        let leave = self.work(&mut worker, between);
        self.visitors.fetch_sub(1, SeqCst);
        if leave == Leave::Interrupted {
            self.counters.interruptions.fetch_add(1, Relaxed);
        }
        leave
    }

    /// Starts library threads: one for each vCPU, and `hosts` for the host stage only.
    pub fn spawn(self: &Arc<Self>, vcpus: &[RawFd], hosts: u32) -> Result<()> {
        let mut library = self.library();
        library.vcpus += vcpus.len();
        let workers = vcpus.iter().map(|fd| Some(*fd)).chain((0..hosts).map(|_| None));
        let _signals = block_asynchronous_signals();
        for vcpu in workers {
            let job = Arc::clone(self);
            let thread = std::thread::Builder::new().name("kvmprep".into()).stack_size(STACK);
            match thread.spawn(move || job.library_thread(vcpu)) {
                Ok(thread) => library.threads.push(thread),
                Err(error) => {
                    let error = Error::new(
                        error.raw_os_error().unwrap_or(libc::EAGAIN),
                        Reason::ThreadFailed,
                        format!("a library thread could not be started: {error}"),
                    )
                    .hint("ask for fewer threads, or raise the limit on them");
                    self.end_with(End::Failed(Box::new(error.clone())));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn library(&self) -> MutexGuard<'_, Library> {
        self.library.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn library_thread(&self, vcpu: Option<RawFd>) {
        let work = std::panic::AssertUnwindSafe(|| self.work(&mut Worker::library(vcpu), &mut |_| {}));
        let leave = crate::abi::boundary::catch(work);
        if leave.is_none() {
            self.end_with(End::Failed(Box::new(crate::abi::boundary::panicked())));
        }
        if vcpu.is_some() {
            let mut library = self.library();
            library.vcpus -= 1;
            let is_last = library.vcpus == 0;
            drop(library);
            if leave == Some(Leave::VcpuRefused) && is_last && self.visitors.load(SeqCst) == 0 {
                self.end_with(End::OutOfVcpus);
            }
        }
        self.queue.changed();
    }

    fn work(&self, worker: &mut Worker<'_>, between: &mut dyn FnMut(&Job)) -> Leave {
        self.had_vcpu.fetch_or(worker.vcpu.is_some(), Relaxed);
        loop {
            between(self);
            if self.has_ended() {
                return Leave::Ended;
            }
            if worker.is_wanted_elsewhere() {
                return Leave::Interrupted;
            }
            let knows_stage2 = worker.vcpu.is_some() && !worker.refused && !self.unavailable.load(Relaxed);
            let skill = if knows_stage2 { Skill::Both } else { Skill::Host };
            let leave = match self.queue.claim(skill, worker.own, |waiting| self.cut(waiting)) {
                Claim::Task(task) => self.do_task(worker, skill, task),
                Claim::Later(now) => {
                    let slept = self.queue.sleep(now, PROGRESS_PERIOD);
                    (slept.is_err() && !worker.is_library).then_some(Leave::Interrupted)
                }
                Claim::Nothing => {
                    self.end_if_done();
                    Some(if worker.refused { Leave::VcpuRefused } else { Leave::NoWork })
                }
            };
            if let Some(leave) = leave {
                return leave;
            }
        }
    }

    fn cut(&self, waiting: Range) -> Range {
        self.plan.segment_at(waiting.start).map_or(waiting, |segment| segment.chunk(waiting))
    }

    /// Does one chunk. A reason to leave is returned; every byte has gone back to where it belongs.
    fn do_task(&self, worker: &mut Worker<'_>, skill: Skill, task: Task<'_>) -> Option<Leave> {
        let range = task.range;
        let Some(segment) = self.plan.segment_at(range.start) else {
            task.finish(None, None);
            return None;
        };
        let mut began = Instant::now();
        if task.needs_host {
            if let Err(error) = host::populate(&*self.kernel, segment, range) {
                task.finish(Some(range), None);
                return self.after_host_error(worker, error);
            }
            self.vm.memory().coverage.gained(Table::Host, segment.access, range);
            self.counters.host.fetch_add(range.size(), Relaxed);
            began = lap(&self.counters.host_ns, began);
        }
        self.tell(began);
        if !segment.stage2 {
            task.finish(None, None);
            return None;
        }
        let Some(vcpu) = worker.vcpu.filter(|_| skill == Skill::Both) else {
            task.finish(None, Some(range));
            return None;
        };
        // KVM would not refuse: it would fill the page tables of that mode, which no other uses.
        if !std::mem::replace(&mut worker.is_checked, true) && self.kernel.is_in_smm(vcpu) {
            task.finish(None, Some(range));
            return self.after_stage2(worker, Outcome::VcpuRefused(range));
        }
        let zaps = self.vm.memory().coverage.zaps();
        let patience = InJob { job: self, yields: !worker.is_library, range };
        let (outcome, absent) = if segment.resident_only {
            self.map_resident(vcpu, segment, range, &patience)
        } else {
            (stage2::pre_fault(&*self.kernel, vcpu, range, &patience), 0)
        };
        lap(&self.counters.stage2_ns, began);
        let rest = rest_of(&outcome);
        if let Some(done) = Range::between(range.start, rest.map_or(range.end, |r| r.start)) {
            self.count_stage2(segment, done, absent, zaps);
        }
        let leave = self.after_stage2(worker, outcome);
        task.finish(None, rest);
        leave
    }

    fn after_host_error(&self, worker: &Worker<'_>, error: Error) -> Option<Leave> {
        match error.reason {
            Reason::Interrupted if worker.is_library => None,
            Reason::Interrupted => Some(Leave::Interrupted),
            _ => {
                self.end_with(End::Failed(Box::new(error)));
                Some(Leave::Ended)
            }
        }
    }

    fn after_stage2(&self, worker: &mut Worker<'_>, outcome: Outcome) -> Option<Leave> {
        match outcome {
            Outcome::Done | Outcome::Stopped(_) => None,
            Outcome::Interrupted(_) => Some(Leave::Interrupted),
            Outcome::VcpuRefused(_) => {
                worker.refused = true;
                self.refused.fetch_add(1, Relaxed);
                None
            }
            Outcome::Unavailable(_) if self.options.require_stage2 => {
                self.end_with(End::Failed(Box::new(no_stage2())));
                Some(Leave::Ended)
            }
            Outcome::Unavailable(_) => {
                self.unavailable.store(true, SeqCst);
                None
            }
            Outcome::Failed(rest, error) => {
                let slot = self.plan.segment_at(rest.start).map(|s| s.slot);
                self.end_with(End::Failed(Box::new(Error { slot, ..error })));
                Some(Leave::Ended)
            }
        }
    }

    /// Maps what of `range` is in memory, run by run; says how many bytes, up to where it came, are not.
    fn map_resident(
        &self,
        vcpu: RawFd,
        segment: &Segment,
        range: Range,
        patience: &InJob<'_>,
    ) -> (Outcome, u64) {
        let Some(base) = segment.hva_of(range.start) else { return (Outcome::Done, 0) };
        let to_gpa = |hva: u64| range.start + (hva - base);
        let end = base + range.size();
        let mut at = base;
        let mut absent = 0;
        let outcome = loop {
            let run = match self.kernel.resident(at, end) {
                Ok(Some((first, last))) => first..last,
                Ok(None) => {
                    absent += end - at;
                    break Outcome::Done;
                }
                Err(errno) => {
                    let rest = Range { start: to_gpa(at), end: range.end };
                    let error = Error::kernel(errno, "asking which pages are in memory (/proc/self/pagemap)");
                    break Outcome::Failed(rest, error.stage(Stage::Host).range(rest));
                }
            };
            absent += run.start - at;
            let part = Range { start: to_gpa(run.start), end: to_gpa(run.end) };
            let outcome = stage2::pre_fault(&*self.kernel, vcpu, part, patience);
            if let Some(rest) = rest_of(&outcome) {
                break widen(outcome, Range { start: rest.start, end: range.end });
            }
            at = run.end;
            if at == end {
                break Outcome::Done;
            }
        };
        (outcome, absent)
    }

    /// Counts `done`, of which `absent` bytes are not in memory.
    fn count_stage2(&self, segment: &Segment, done: Range, absent: u64, zaps: u64) {
        let mapped = done.size() - absent;
        self.counters.absent.fetch_add(absent, Relaxed);
        self.counters.stage2.fetch_add(mapped, Relaxed);
        // Of resident memory the kernel maps for writing what the host has writable, page by page.
        if segment.access == Access::Read && !segment.resident_only && first_write_faults(segment.backing) {
            self.counters.first_writes.fetch_add(mapped, Relaxed);
        }
        let mut memory = self.vm.memory();
        // A slot change may have dropped what was being mapped: claim nothing.
        if memory.coverage.zaps() == zaps && !segment.resident_only {
            memory.coverage.gained(Table::Stage2, segment.access, done);
        }
    }

    /// Says over the event, not too often, that there is progress.
    fn tell(&self, now: Instant) {
        let now = now.duration_since(self.started).as_nanos() as u64;
        if now.saturating_sub(self.last_told_ns.load(Relaxed)) < PROGRESS_PERIOD.as_nanos() as u64 {
            return;
        }
        self.last_told_ns.store(now, Relaxed);
        if !self.told.swap(true, SeqCst) {
            // Fails only when the counter is full, and then it is readable already.
            let _ = self.kernel.event_add(&self.event, 1);
        }
    }

    /// Whether the job is over; ends it when its time is up.
    pub fn has_ended(&self) -> bool {
        if self.end.get().is_none() && self.options.timeout.is_some_and(|most| self.started.elapsed() >= most)
        {
            self.end_if_done();
            self.end_with(End::TimedOut);
        }
        self.end.get().is_some()
    }

    fn end_if_done(&self) {
        if self.queue.is_done(self.unavailable.load(SeqCst)) {
            self.end_with(End::Complete);
        }
    }

    fn end_with(&self, end: End) {
        if self.end.set(end).is_err() {
            return;
        }
        self.wall_ns.store(self.started.elapsed().as_nanos() as u64, SeqCst);
        // Semaphore-like: so many reads that it stays readable for good.
        let _ = self.kernel.event_add(&self.event, u64::MAX / 2);
        self.queue.changed();
    }

    /// Stops the job.
    pub fn cancel(&self) {
        self.end_with(End::Cancelled);
    }

    /// Nobody will come any more: what is not done by now stays undone.
    pub fn give_up(&self) {
        self.end_if_done();
        self.end_with(End::OutOfVcpus);
    }

    /// Whether a caller's thread is inside.
    pub fn has_visitors(&self) -> bool {
        self.visitors.load(SeqCst) > 0
    }

    /// Waits for the library's threads to be gone, calling `tick` now and then.
    pub fn join_library(&self, tick: &mut dyn FnMut(&Job)) {
        let threads = std::mem::take(&mut self.library().threads);
        while threads.iter().any(|thread| !thread.is_finished()) {
            tick(self);
            let now = self.queue.now();
            if threads.iter().any(|thread| !thread.is_finished()) {
                // A signal is no reason not to wait: the threads are still at work.
                let _ = self.queue.sleep(now, PROGRESS_PERIOD);
            }
        }
        for thread in threads {
            // Its panic, if any, has become the job's error.
            let _ = thread.join();
        }
    }

    /// Waits for the end of the job; `None` for as long as it takes.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<()> {
        let until = timeout.map(|t| Instant::now() + t);
        loop {
            let now = self.queue.now();
            // A thread that has not left yet may be adding to what is done.
            if self.has_ended() && !self.queue.is_in_hand() {
                return Ok(());
            }
            let left = until.map_or(PROGRESS_PERIOD, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(Error::new(libc::ETIMEDOUT, Reason::NotFinished, "the job is still at work")
                    .hint("wait again, or cancel it"));
            }
            self.queue
                .sleep(now, left.min(PROGRESS_PERIOD))
                .map_err(|errno| Error::kernel(errno, "waiting"))?;
        }
    }

    /// The descriptor that becomes readable on progress, and stays so at the end.
    pub fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// How far it is. Quiets the event until there is more.
    pub fn progress(&self) -> Progress {
        let ended = self.has_ended();
        if !ended && self.told.load(SeqCst) {
            let _ = self.kernel.event_take(&self.event);
            self.told.store(false, SeqCst);
        }
        Progress {
            host_total: self.host_total,
            stage2_total: self.stage2_total,
            host: self.counters.host.load(Relaxed),
            stage2: self.counters.stage2.load(Relaxed) + self.counters.absent.load(Relaxed),
            elapsed: if ended {
                Duration::from_nanos(self.wall_ns.load(SeqCst))
            } else {
                self.started.elapsed()
            },
            ended,
        }
    }

    /// What is not done.
    pub fn remaining(&self) -> RangeSet {
        let mut all = self.queue.remaining();
        self.plan.left_out.iter().for_each(|r| all.insert(r));
        all
    }

    /// How the job ended, as the error that the caller should see.
    pub fn verdict(&self) -> Result<()> {
        let stopped = |errno, reason, message: &str| {
            Err(Error::new(errno, reason, message)
                .hint("what is not done is in the result: populate it again"))
        };
        match self.end.get() {
            None => Err(Error::new(libc::EBUSY, Reason::NotFinished, "the job is still at work")),
            Some(End::Complete) => Ok(()),
            Some(End::OutOfVcpus) if !self.options.require_stage2 => Ok(()),
            Some(End::OutOfVcpus) => Err(self.out_of_vcpus()),
            Some(End::Cancelled) => {
                stopped(libc::ECANCELED, Reason::Cancelled, "the population was cancelled")
            }
            Some(End::TimedOut) => {
                stopped(libc::ETIMEDOUT, Reason::TimedOut, "the population ran out of time")
            }
            Some(End::Failed(error)) => Err((**error).clone()),
        }
    }

    fn out_of_vcpus(&self) -> Error {
        let error = Error::new(libc::EOPNOTSUPP, Reason::VcpuRefused, vcpu_refused_message());
        if self.refused.load(Relaxed) > 0 {
            return error.stage(Stage::Stage2).hint(VCPU_REFUSED_HINT);
        }
        Error::new(libc::EOPNOTSUPP, Reason::NoStage2, "there was no vCPU to fill stage 2 with")
            .stage(Stage::Stage2)
            .hint("pass vCPU descriptors, or do not require stage 2")
    }

    /// What was done.
    pub fn report(&self) -> Report {
        let load = |counter: &AtomicU64| counter.load(Relaxed);
        let c = &self.counters;
        let pages_now = pages_by_level(&*self.kernel, self.vm.fd());
        let pages = pages_now
            .zip(self.pages_before)
            .map(|(now, before)| std::array::from_fn(|i| now[i].wrapping_sub(before[i]) as i64));
        let zapped = self.vm.memory().coverage.zaps() != self.zaps_before;
        Report {
            asked: self.plan.segments.iter().map(|s| s.range.size()).sum::<u64>() + self.plan.left_out.size(),
            skipped: self.skipped,
            host: load(&c.host),
            stage2: load(&c.stage2),
            absent: load(&c.absent),
            first_writes: load(&c.first_writes),
            dirty_logged: self.plan.dirty_logged,
            lost: if zapped { load(&c.stage2).saturating_sub(self.still_covered()) } else { 0 },
            remaining: self.remaining(),
            stage2_state: self.stage2_state(),
            host_ns: load(&c.host_ns),
            stage2_ns: load(&c.stage2_ns),
            wall_ns: if self.end.get().is_some() {
                load(&self.wall_ns)
            } else {
                self.started.elapsed().as_nanos() as u64
            },
            retries: load(&c.retries),
            interruptions: load(&c.interruptions),
            pages,
            backings: self.backings(),
            advice_refused: self.advice_refused,
        }
    }

    fn still_covered(&self) -> u64 {
        let memory = self.vm.memory();
        self.plan.segments.iter().map(|s| memory.coverage.within(s.range).stage2_read).sum()
    }

    fn stage2_state(&self) -> Stage2State {
        if self.options.host_only {
            return Stage2State::NotWanted;
        }
        match self.end.get() {
            _ if self.unavailable.load(SeqCst) => Stage2State::Unavailable,
            Some(End::Complete) => Stage2State::Done,
            _ if self.refused.load(Relaxed) > 0 => Stage2State::VcpusRefused,
            _ if !self.had_vcpu.load(Relaxed) => Stage2State::NoVcpu,
            _ => Stage2State::Unfinished,
        }
    }

    fn backings(&self) -> [BackingReport; Backing::ALL.len()] {
        let mut reports = [BackingReport::default(); Backing::ALL.len()];
        for segment in &self.plan.segments {
            let report = &mut reports[segment.backing.index()];
            report.bytes += segment.range.size();
            report.host = segment.host as u32;
            report.writable = segment.access == Access::Write;
        }
        reports
    }
}

/// A worker's patience: it ends with the job, or when its chunk is taken away.
struct InJob<'a> {
    job: &'a Job,
    yields: bool,
    range: Range,
}

impl Patience for InJob<'_> {
    fn yields_to_signals(&self) -> bool {
        self.yields
    }

    fn pause(&self, length: Duration) -> Pause {
        self.job.counters.retries.fetch_add(1, Relaxed);
        let now = self.job.queue.now();
        if self.job.has_ended() || self.job.queue.is_withdrawn(self.range) {
            return Pause::Stop;
        }
        // Changes of the queue end the pause early.
        match self.job.queue.sleep(now, length) {
            Err(_) if self.yields => Pause::Signal,
            _ => Pause::Over,
        }
    }

    fn may_begin(&self) -> bool {
        self.job.vm.begin_pre_fault()
    }

    fn end(&self) {
        self.job.vm.end_pre_fault();
    }
}

/// Adds the time since `began` to `counter`, and returns the present moment.
fn lap(counter: &AtomicU64, began: Instant) -> Instant {
    let now = Instant::now();
    counter.fetch_add(now.duration_since(began).as_nanos() as u64, Relaxed);
    now
}

fn rest_of(outcome: &Outcome) -> Option<Range> {
    match outcome {
        Outcome::Done => None,
        Outcome::Interrupted(rest)
        | Outcome::VcpuRefused(rest)
        | Outcome::Unavailable(rest)
        | Outcome::Stopped(rest)
        | Outcome::Failed(rest, _) => Some(*rest),
    }
}

/// The same outcome with more left.
fn widen(outcome: Outcome, rest: Range) -> Outcome {
    match outcome {
        Outcome::Done => Outcome::Done,
        Outcome::Interrupted(_) => Outcome::Interrupted(rest),
        Outcome::VcpuRefused(_) => Outcome::VcpuRefused(rest),
        Outcome::Unavailable(_) => Outcome::Unavailable(rest),
        Outcome::Stopped(_) => Outcome::Stopped(rest),
        Outcome::Failed(_, error) => Outcome::Failed(rest, error),
    }
}

/// Whether memory prepared for reading faults on its first write: copy-on-write, or a file that wants to know.
fn first_write_faults(backing: Backing) -> bool {
    !backing.shared || backing.object == MappedObject::File
}

fn fill_queue(vm: &Vm, kernel: &Arc<dyn Kernel>, plan: &Plan, skip_covered: bool) -> (Queue, u64) {
    let (mut for_host, mut for_stage2) = (RangeSet::with_capacity(64), RangeSet::with_capacity(64));
    let memory = vm.memory();
    let missing = |table, segment: &Segment| {
        if skip_covered && !segment.resident_only {
            memory.coverage.missing(table, segment.access, segment.range)
        } else {
            vec![segment.range]
        }
    };
    for segment in &plan.segments {
        if segment.stage2 {
            missing(Table::Stage2, segment).into_iter().for_each(|r| for_stage2.insert(r));
        }
        if segment.host != HostMethod::Nothing {
            missing(Table::Host, segment).into_iter().for_each(|r| for_host.insert(r));
        }
    }
    // What is mapped in stage 2 has its host side; what waits for the host comes to stage 2 by itself.
    let mut skipped = 0;
    for segment in &plan.segments {
        if segment.stage2 {
            let gaps: RangeSet = for_stage2.within(segment.range).collect();
            gaps.missing(segment.range).into_iter().for_each(|covered| {
                for_host.remove(covered);
            });
        }
        let to_do: RangeSet =
            for_host.within(segment.range).chain(for_stage2.within(segment.range)).collect();
        skipped += segment.range.size() - to_do.size();
    }
    let waiting: Vec<Range> = for_host.iter().collect();
    waiting.into_iter().for_each(|range| {
        for_stage2.remove(range);
    });
    (Queue::new(Arc::clone(kernel), for_host, for_stage2), if skip_covered { skipped } else { 0 })
}

fn advise_huge(kernel: &dyn Kernel, plan: &Plan) -> bool {
    let mut accepted = true;
    for segment in &plan.segments {
        let takes_advice = matches!(segment.backing.object, MappedObject::Anonymous | MappedObject::Shmem);
        if let (Some(hva), true) = (segment.hva, takes_advice && segment.host != HostMethod::Nothing) {
            accepted &= kernel.advise_huge(hva, segment.range.size()).is_ok();
        }
    }
    accepted
}

fn pages_by_level(kernel: &dyn Kernel, vm: RawFd) -> Option<[u64; 3]> {
    let stats = kernel.stats(vm).ok()?;
    Some([stats.get("pages_4k")?, stats.get("pages_2m")?, stats.get("pages_1g")?])
}

fn no_stage2() -> Error {
    Error::new(libc::EOPNOTSUPP, Reason::NoStage2, "this kernel cannot pre-fault this VM's stage-2 page tables")
        .stage(Stage::Stage2)
        .hint("needs Linux 6.11 with nested paging (EPT or NPT); without KVMPREP_POPULATE_REQUIRE_STAGE2 the host stage is done")
}

fn dirty_logged() -> Error {
    Error::new(
        libc::EBUSY,
        Reason::MemslotDirtyLogged,
        "a slot's writes are logged, and pre-faulting it would mark every page dirty",
    )
    .stage(Stage::Stage2)
    .hint("populate before dirty logging is turned on, or pass KVMPREP_POPULATE_DIRTY_LOGGED for a slot with a bitmap")
}

/// What a vCPU that refuses has to say.
pub fn vcpu_refused_message() -> &'static str {
    "the vCPU cannot pre-fault now: it is in SMM, runs a nested guest, or its confidential VM is not finalised"
}

/// What to do about a vCPU that refuses.
pub const VCPU_REFUSED_HINT: &str = "use another vCPU, or the same one later";
