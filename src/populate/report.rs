//! What a job says of itself: while it works and when it is over.
//!
//! It counts and sums; it decides nothing.

use super::job::{End, Job};
use super::plan::Segment;
use crate::kvm::{Access, Kernel};
use crate::memslot::Backing;
use crate::range::RangeSet;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::time::Duration;

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

/// What has been done, in bytes, nanoseconds and counts.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub host: AtomicU64,
    pub stage2: AtomicU64,
    /// Not in memory, so not mapped (RESIDENT).
    pub absent: AtomicU64,
    /// Mapped, but the first write will fault.
    pub first_writes: AtomicU64,
    pub host_ns: AtomicU64,
    pub stage2_ns: AtomicU64,
    pub retries: AtomicU64,
    pub interruptions: AtomicU64,
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

impl Job {
    /// How far it is. Quiets the event until there is more.
    pub fn progress(&self) -> Progress {
        let ended = self.has_ended();
        // Between a worker's word and its event there is nothing to take yet: the event will say it again.
        if !ended && self.told.load(SeqCst) && self.kernel.event_take(&self.event).is_ok() {
            self.told.store(false, SeqCst);
        }
        Progress {
            host_total: self.host_total,
            stage2_total: self.stage2_total,
            host: self.counters.host.load(Relaxed),
            stage2: self.counters.stage2.load(Relaxed) + self.counters.absent.load(Relaxed),
            elapsed: Duration::from_nanos(self.wall_ns()),
            ended,
        }
    }

    /// Bytes done in stage 2.
    pub fn done_in_stage2(&self) -> u64 {
        self.counters.stage2.load(Relaxed)
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
            wall_ns: self.wall_ns(),
            retries: load(&c.retries),
            interruptions: load(&c.interruptions),
            pages,
            backings: self.backings(),
            advice_refused: self.advice_refused,
        }
    }

    fn wall_ns(&self) -> u64 {
        self.end.get().map_or_else(|| self.started.elapsed().as_nanos() as u64, |end| end.wall_ns)
    }

    fn still_covered(&self) -> u64 {
        let memory = self.vm.memory();
        self.plan.segments.iter().map(|s| memory.coverage.within(s.range).stage2_read).sum()
    }

    fn stage2_state(&self) -> Stage2State {
        if self.options.host_only {
            return Stage2State::NotWanted;
        }
        match self.end.get().map(|end| &end.how) {
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
            let private = segment.private_size(self.vm.told());
            let mut add = |bytes, side: &Segment| {
                let report = &mut reports[side.backing.index()];
                report.bytes += bytes;
                report.host = side.host as u32;
                report.writable = side.access == Access::Write;
            };
            if let Some(side) = segment.private_side(segment.range).filter(|_| private > 0) {
                add(private, &side);
            }
            if private < segment.range.size() {
                add(segment.range.size() - private, segment);
            }
        }
        reports
    }
}

/// The VM's mappings by level: 4K, 2M, 1G.
pub(super) fn pages_by_level(kernel: &dyn Kernel, vm: RawFd) -> Option<[u64; 3]> {
    let stats = kernel.stats(vm).ok()?;
    Some([stats.get("pages_4k")?, stats.get("pages_2m")?, stats.get("pages_1g")?])
}
