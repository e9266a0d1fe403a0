//! A job: one population, done by any number of threads.
//!
//! It joins plan, queue and stages, counts what is done, and knows when it is over. Threads come to it, the
//! caller's own or those the caller asks for; it never takes one by itself.

use super::coverage::Table;
use super::exact;
use super::plan::{HostMethod, Intent, Plan, Segment, Wish};
use super::queue::Queue;
use super::report::{Counters, pages_by_level};
use super::supply;
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{Kernel, MappedObject, block_asynchronous_signals};
use crate::memslot::SlotId;
use crate::panics::{catch, panicked};
use crate::range::{Range, RangeSet};
use crate::vm::Vm;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use super::report::{BackingReport, Progress, Report, Stage2State};
pub use super::worker::{Leave, VCPU_REFUSED_HINT, Worker, vcpu_refused_message, watch_vcpu};

/// Stack of a library thread, in bytes: several times what its deepest call uses.
const STACK: usize = 256 << 10;
/// The shortest time between two signs of progress.
pub(super) const PROGRESS_PERIOD: Duration = Duration::from_millis(50);

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
    /// Refuse ranges at whose edges KVM may map beyond them.
    pub exact: bool,
    /// It is a part of a conversion, and told of as such: no pages are counted.
    pub for_conversion: bool,
    /// How long it may take.
    pub timeout: Option<Duration>,
}

/// How a job ended.
#[derive(Clone, Debug)]
pub(super) enum End {
    /// All that can be done is done.
    Complete,
    /// No thread is left that could do the rest.
    OutOfVcpus,
    /// The caller said so.
    Cancelled,
    /// Its time was up.
    TimedOut,
    /// Something could not be done.
    Failed(Box<Error>),
}

/// A job's end.
#[derive(Debug)]
pub(super) struct Ended {
    pub how: End,
    /// Nanoseconds from its making.
    pub wall_ns: u64,
}

/// Threads of the library's own.
#[derive(Default)]
struct Library {
    threads: Vec<JoinHandle<()>>,
    /// Those with a vCPU that are at work, and whether there ever was one.
    vcpus: usize,
    had_vcpus: bool,
}

/// One population.
pub struct Job {
    pub(super) vm: Arc<Vm>,
    pub(super) kernel: Arc<dyn Kernel>,
    pub(super) options: Options,
    pub(super) plan: Plan,
    pub(super) queue: Arc<Queue>,
    pub(super) counters: Counters,
    pub(super) host_total: u64,
    pub(super) stage2_total: u64,
    pub(super) skipped: u64,
    pub(super) advice_refused: bool,
    pub(super) pages_before: Option<[u64; 3]>,
    pub(super) zaps_before: u64,
    pub(super) started: Instant,
    pub(super) end: OnceLock<Ended>,
    /// Held by who sets `end`, and by who goes before it: what has ended is not counted on.
    ending: Mutex<()>,
    /// Found missing while working, although the capability was claimed.
    pub(super) unavailable: AtomicBool,
    pub(super) refused: AtomicU32,
    pub(super) had_vcpu: AtomicBool,
    pub(super) visitors: AtomicUsize,
    library: Mutex<Library>,
    pub(super) event: OwnedFd,
    pub(super) told: AtomicBool,
    pub(super) last_told_ns: AtomicU64,
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
            has_private_memory: vm.caps()?.has_private_memory(),
            told: vm.told(),
        };
        if wish.stage2 {
            vm.check_pre_fault_is_allowed()?;
        }
        let (slots, plan) = loop {
            let (slots, changes) = {
                let memory = vm.memory();
                (memory.slots.parts(asked), memory.changes)
            };
            let plan = Plan::new(&*kernel, &slots, asked, wish).and_then(|plan| {
                if options.exact && wish.stage2 {
                    exact::check(&*kernel, vm.caps()?, &slots, asked, vm.told())?;
                }
                Ok(plan)
            });
            match plan {
                Ok(plan) => break (slots, plan),
                // What was announced meanwhile may be gone already, and is not what is to be planned.
                Err(_) if vm.memory().changes != changes => {}
                Err(error) => return Err(error),
            }
        };
        if let (true, Some((slot, part))) = (options.require_stage2, plan.first_dirty_logged) {
            return Err(dirty_logged(slot, part));
        }
        if options.check_free {
            supply::check(&*kernel, &plan, vm.told())?;
        }
        let advice_refused = options.huge_advice && !advise_huge(&*kernel, &plan);
        let event = kernel.event().map_err(|errno| Error::system(errno, "making the job's eventfd"))?;
        let Filled { queue, to_do, skipped } = fill_queue(vm, &kernel, &plan, options.skip_covered);
        let job = Arc::new(Self {
            host_total: to_do.host,
            stage2_total: to_do.stage2,
            pages_before: if options.for_conversion { None } else { pages_by_level(&*kernel, vm.fd()) },
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
            end: OnceLock::new(),
            ending: Mutex::default(),
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

    /// Starts library threads: one for each vCPU, and `hosts` for the host stage only.
    pub fn spawn(self: &Arc<Self>, vcpus: &[RawFd], hosts: u32) -> Result<()> {
        let mut library = self.library();
        library.vcpus += vcpus.len();
        library.had_vcpus |= !vcpus.is_empty();
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
        if catch(work).is_none() {
            self.end_with(End::Failed(Box::new(panicked())));
        }
        if vcpu.is_some() {
            self.library().vcpus -= 1;
            self.end_if_deserted();
        }
        self.queue.changed();
    }

    /// Ends the job when the vCPUs that were given to it are gone and nobody else is there. Without library
    /// vCPUs it waits for the caller's.
    pub(super) fn end_if_deserted(&self) {
        let is_deserted = {
            let library = self.library();
            library.had_vcpus && library.vcpus == 0 && !self.has_visitors()
        };
        if is_deserted {
            self.give_up();
        }
    }

    /// Says over the event, not too often, that there is progress.
    pub(super) fn tell(&self, now: Instant) {
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

    pub(super) fn end_if_done(&self) {
        if self.queue.is_done(self.unavailable.load(SeqCst)) {
            self.end_with(End::Complete);
        }
    }

    pub(super) fn end_with(&self, end: End) {
        let wall_ns = self.started.elapsed().as_nanos() as u64;
        let is_first = {
            let _ending = self.ending();
            self.end.set(Ended { how: end, wall_ns }).is_ok()
        };
        if !is_first {
            return;
        }
        self.queue.close();
        // Semaphore-like: so many reads that it stays readable for good.
        let _ = self.kernel.event_add(&self.event, u64::MAX / 2);
    }

    /// Counts an interruption, unless the job is over: its result may have been read. Answers whether it was counted.
    pub(super) fn count_interruption(&self) -> bool {
        let _ending = self.ending();
        let goes_on = self.end.get().is_none();
        self.counters.interruptions.fetch_add(goes_on.into(), Relaxed);
        goes_on
    }

    fn ending(&self) -> MutexGuard<'_, ()> {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner)
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
                .map_err(|errno| Error::system(errno, "waiting"))?;
        }
    }

    /// The descriptor that becomes readable on progress, and stays so at the end.
    pub fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
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
                .hint("what is done stays done; to go on, populate what the result says remains"))
        };
        match self.end.get().map(|end| &end.how) {
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
}

/// A queue that was filled from a plan.
struct Filled {
    queue: Queue,
    to_do: ToDo,
    /// Bytes left out because they are covered.
    skipped: u64,
}

/// Bytes that each stage has before it.
#[derive(Default)]
struct ToDo {
    host: u64,
    stage2: u64,
}

fn fill_queue(vm: &Vm, kernel: &Arc<dyn Kernel>, plan: &Plan, skip_covered: bool) -> Filled {
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
    let (mut skipped, mut to_do) = (0, ToDo::default());
    for segment in &plan.segments {
        if segment.stage2 {
            let gaps: RangeSet = for_stage2.within(segment.range).collect();
            gaps.missing(segment.range).into_iter().for_each(|covered| {
                for_host.remove(covered);
            });
        }
        let either: RangeSet =
            for_host.within(segment.range).chain(for_stage2.within(segment.range)).collect();
        to_do.host += for_host.size_within(segment.range);
        to_do.stage2 += if segment.stage2 { either.size() } else { 0 };
        skipped += segment.range.size() - either.size();
    }
    let waiting: Vec<Range> = for_host.iter().collect();
    waiting.into_iter().for_each(|range| {
        for_stage2.remove(range);
    });
    let queue = Queue::new(Arc::clone(kernel), for_host, for_stage2);
    Filled { queue, to_do, skipped: if skip_covered { skipped } else { 0 } }
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

pub(super) fn no_stage2() -> Error {
    Error::new(libc::EOPNOTSUPP, Reason::NoStage2, "this kernel cannot pre-fault this VM's stage-2 page tables")
        .stage(Stage::Stage2)
        .hint("needs Linux 6.11 with nested paging (EPT or NPT); without KVMPREP_POPULATE_REQUIRE_STAGE2 the host stage is done")
}

fn dirty_logged(slot: SlotId, part: Range) -> Error {
    Error::new(
        libc::EBUSY,
        Reason::MemslotDirtyLogged,
        format!("the writes of memslot {slot:#x} are logged, and pre-faulting it would mark every page dirty"),
    )
    .stage(Stage::Stage2)
    .slot(slot)
    .range(part)
    .hint("populate before dirty logging is turned on, or pass KVMPREP_POPULATE_DIRTY_LOGGED for a slot with a bitmap")
}
