//! A thread at work on a job: it takes chunk after chunk through both stages, until there is a reason to leave.
//!
//! Whatever that reason is, each byte has gone back to where it belongs before the thread is out.

use super::coverage::Table;
use super::host;
use super::job::{End, Job, PROGRESS_PERIOD, no_stage2};
use super::plan::Segment;
use super::queue::{Claim, Skill, Task};
use super::stage2::{self, Outcome, Patience, Pause};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{Access, ExitRequest, Kernel, MappedObject};
use crate::memslot::Backing;
use crate::private::turns::{Try, Turn};
use crate::range::{HUGE, Range, RangeSet};
use crate::vm::Memory;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::time::{Duration, Instant};

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

/// Somebody converts the memory.
enum Busy {
    /// And will be done.
    Now,
    /// And waits for this thread, which does so itself, and runs the job meanwhile.
    ForEver,
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

    pub(super) fn library(vcpu: Option<RawFd>) -> Worker<'static> {
        Worker { vcpu, own: &[], exit_request: None, is_library: true, is_checked: false, refused: false }
    }

    /// Whether it can fill stage 2.
    pub fn has_vcpu(&self) -> bool {
        self.vcpu.is_some()
    }

    /// Whether its owner wants it to come out.
    pub fn is_wanted_elsewhere(&self) -> bool {
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
        // The second is the limit on locked memory, where all that is mapped is locked.
        libc::ENOMEM | libc::EAGAIN => Error::system(errno, "mapping kvm_run"),
        _ => not_a_vcpu(),
    })?;
    // Other things can be mapped too, and reading there may be fatal: a file may be empty.
    if stage2::is_vcpu(kernel, fd) { Ok(watch) } else { Err(not_a_vcpu()) }
}

impl Job {
    /// Works on the calling thread until there is nothing left for it, calling `between` before each chunk.
    pub fn run(&self, mut worker: Worker<'_>, between: &mut dyn FnMut(&Job)) -> Leave {
        self.lend(&mut worker, between)
    }

    /// The same, for a worker that goes on to other jobs.
    pub fn lend(&self, worker: &mut Worker<'_>, between: &mut dyn FnMut(&Job)) -> Leave {
        self.visitors.fetch_add(1, SeqCst);
        let leave = self.work(worker, between);
        self.visitors.fetch_sub(1, SeqCst);
        if leave == Leave::Interrupted {
            // It will come again, if there is anything to come for.
            return if self.count_interruption() { leave } else { Leave::Ended };
        }
        self.end_if_deserted();
        leave
    }

    pub(super) fn work(&self, worker: &mut Worker<'_>, between: &mut dyn FnMut(&Job)) -> Leave {
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
        let _turn = match self.turn(segment, range) {
            Ok(turn) => turn,
            Err(Busy::Now) => {
                // With nothing in hand: who converts may be waiting for what is.
                drop(task);
                // Whoever converts may be long in its VMM's function.
                let goes_on = || !self.has_ended() && !worker.is_wanted_elsewhere();
                if self.vm.turns.wait_while(range, goes_on).is_err() {
                    // A part of it is this thread's own; the other's end can only be looked for.
                    let _ = self.queue.sleep(self.queue.now(), PROGRESS_PERIOD);
                }
                return None;
            }
            Err(Busy::ForEver) => {
                drop(task);
                return self.fail(
                    Error::new(
                        libc::EDEADLK,
                        Reason::WouldDeadlock,
                        format!("guest {range} is being converted by a thread that waits for this one"),
                    )
                    .range(range)
                    .hint("let the function that kvmprep_convert() tells of changes return first"),
                );
            }
        };
        let private = segment.private_parts(range, self.vm.told());
        let mut began = Instant::now();
        if task.needs_host {
            if let Err(error) = host::populate(&*self.kernel, segment, range, &private) {
                task.finish(Some(range), None);
                return self.after_host_error(worker, error);
            }
            self.note_gain(&mut self.vm.memory(), Table::Host, segment.access, range);
            self.counters.host.fetch_add(range.size(), Relaxed);
            began = lap(&self.counters.host_ns, began);
        }
        self.tell(began);
        if segment.stage2 && self.has_ended() {
            task.finish(None, Some(range));
            return Some(Leave::Ended);
        }
        if !segment.stage2 {
            task.finish(None, None);
            return None;
        }
        let Some(vcpu) = worker.vcpu.filter(|_| skill == Skill::Both) else {
            task.finish(None, Some(range));
            return None;
        };
        // KVM may not refuse: it fills those tables then, of which nobody has any use afterwards.
        if !std::mem::replace(&mut worker.is_checked, true) && self.kernel.uses_other_tables(vcpu) {
            task.finish(None, Some(range));
            return self.after_stage2(worker, Outcome::VcpuRefused(range));
        }
        let zaps = self.vm.memory().coverage.zaps();
        let patience = InJob { job: self, yields: !worker.is_library, range };
        let (outcome, absent) = if segment.resident_only {
            self.map_resident(vcpu, segment, range, &private, &patience)
        } else {
            (stage2::pre_fault(&*self.kernel, vcpu, range, &patience), 0)
        };
        lap(&self.counters.stage2_ns, began);
        let rest = rest_of(&outcome);
        if let Some(done) = Range::between(range.start, rest.map_or(range.end, |r| r.start)) {
            self.count_stage2(segment, done, absent, &private, zaps);
        }
        let leave = self.after_stage2(worker, outcome);
        task.finish(None, rest);
        leave
    }

    fn after_host_error(&self, worker: &Worker<'_>, error: Error) -> Option<Leave> {
        match error.reason {
            Reason::Interrupted if worker.is_library => None,
            Reason::Interrupted => Some(Leave::Interrupted),
            _ => self.fail(error),
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
            // What has worked before is not unknown to the kernel.
            Outcome::Unavailable(rest) if self.counters.stage2.load(Relaxed) > 0 => {
                let error = Error::new(
                    libc::EINVAL,
                    Reason::KernelRefused,
                    format!("KVM will not pre-fault guest {rest}, though it did other memory"),
                );
                self.fail(
                    error
                        .stage(Stage::Stage2)
                        .range(rest)
                        .hint("run the guest, which faults on it; no vCPU may be in another mode"),
                )
            }
            Outcome::Unavailable(_) if self.options.require_stage2 => {
                self.end_with(End::Failed(Box::new(no_stage2())));
                Some(Leave::Ended)
            }
            Outcome::Unavailable(_) => {
                self.unavailable.store(true, SeqCst);
                None
            }
            Outcome::Failed(_, error) => self.fail(error),
        }
    }

    /// Ends the job with an error, which is told its slot.
    fn fail(&self, error: Error) -> Option<Leave> {
        let slot = error.range.and_then(|range| self.plan.segment_at(range.start)).map(|s| s.slot);
        self.end_with(End::Failed(Box::new(Error { slot: error.slot.or(slot), ..error })));
        Some(Leave::Ended)
    }

    /// Maps what of `range` is in memory and shared: which private memory there is cannot be asked. Says how many bytes, up
    /// to where it came, are not.
    fn map_resident(
        &self,
        vcpu: RawFd,
        segment: &Segment,
        range: Range,
        private: &[Range],
        patience: &InJob<'_>,
    ) -> (Outcome, u64) {
        let private: RangeSet = private.iter().copied().collect();
        let (mut absent, mut at) = (0, range.start);
        for shared in private.missing(range) {
            let (outcome, lacking) = self.map_resident_part(vcpu, segment, shared, patience);
            absent += shared.start - at + lacking;
            at = shared.end;
            if let Some(rest) = rest_of(&outcome) {
                return (widen(outcome, Range { start: rest.start, end: range.end }), absent);
            }
        }
        (Outcome::Done, absent + (range.end - at))
    }

    /// The same of shared memory, run by run.
    fn map_resident_part(
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
                    let error = Error::system(errno, "asking which pages are in memory (/proc/self/pagemap)");
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

    /// Keeps conversions away from memory that has a private side. Who converts has that turn already.
    fn turn(&self, segment: &Segment, range: Range) -> std::result::Result<Option<Turn<'_>>, Busy> {
        if segment.private.is_none() {
            return Ok(None);
        }
        match self.vm.turns.try_take(range) {
            Try::Taken(turn) => Ok(Some(turn)),
            Try::Own => Ok(None),
            Try::Busy => Err(Busy::Now),
            Try::Circle => Err(Busy::ForEver),
        }
    }

    /// `range` is populated. A guest that converts could cut the record into as many pieces as it has pages: of what a
    /// conversion populates only whole frames count.
    fn note_gain(&self, memory: &mut Memory, table: Table, access: Access, range: Range) {
        let counted = if self.options.for_conversion {
            range
                .start
                .checked_next_multiple_of(HUGE)
                .and_then(|start| Range::between(start, range.end - range.end % HUGE))
        } else {
            Some(range)
        };
        if let Some(range) = counted {
            memory.coverage.gained(table, access, range);
        }
    }

    /// Counts `done`, of which `absent` bytes are not in memory.
    fn count_stage2(&self, segment: &Segment, done: Range, absent: u64, private: &[Range], zaps: u64) {
        let mapped = done.size() - absent;
        self.counters.absent.fetch_add(absent, Relaxed);
        self.counters.stage2.fetch_add(mapped, Relaxed);
        // Of resident memory the kernel maps for writing what the host has writable, page by page.
        if segment.access == Access::Read && !segment.resident_only && first_write_faults(segment.backing) {
            // What is private KVM maps for writing.
            let private: u64 =
                private.iter().filter_map(|part| part.intersect(&done)).map(|part| part.size()).sum();
            self.counters.first_writes.fetch_add(mapped - private, Relaxed);
        }
        // A slot change may have dropped what was being mapped: claim nothing.
        let mut memory = self.vm.memory();
        if memory.coverage.zaps() == zaps && !segment.resident_only {
            self.note_gain(&mut memory, Table::Stage2, segment.access, done);
        }
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

/// What a vCPU that refuses has to say.
pub fn vcpu_refused_message() -> &'static str {
    "the vCPU cannot pre-fault now: it is in SMM, runs a nested guest, or its confidential VM is not finalised"
}

/// What to do about a vCPU that refuses.
pub const VCPU_REFUSED_HINT: &str = "use another vCPU, or the same one later";
