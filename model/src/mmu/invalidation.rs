//! What tells a fault that the frame it found may no longer be the right one.
//!
//! Who handles a fault looks up the frame with no lock held, takes the lock, and may then use the frame only if nothing was
//! invalidated since it began, and nothing is being invalidated around it. This is the only thing that keeps a freed frame
//! from being mapped. Nothing here zaps.

use super::lock::{Exclusive, Held};
use crate::sync::{AtomicU64, Ordering};
use crate::units::{Gfn, GfnRange};
use std::sync::atomic::AtomicU64 as Plain;

/// What is being invalidated, and how often something was.
///
/// Only the sequence number is read without the lock.
pub(super) struct Invalidation {
    sequence: AtomicU64,
    in_progress: Plain,
    start: Plain,
    end: Plain,
}

/// The sequence number before a frame was looked up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InvalidationSnapshot(u64);

impl Invalidation {
    pub(super) fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            in_progress: Plain::new(0),
            start: Plain::new(u64::MAX),
            end: Plain::new(0),
        }
    }

    /// To be taken before the frame is looked up.
    pub(super) fn snapshot(&self) -> InvalidationSnapshot {
        InvalidationSnapshot(self.sequence.load(Ordering::Acquire))
    }

    fn is_in_progress(&self, gfn: Gfn) -> bool {
        self.in_progress.load(Ordering::Relaxed) > 0
            && (self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed)).contains(&gfn.0)
    }

    /// Whether a frame that was looked up after `snapshot` may be wrong.
    pub(super) fn is_stale(&self, snapshot: InvalidationSnapshot, gfn: Gfn) -> bool {
        self.is_in_progress(gfn) || self.snapshot() != snapshot
    }
}

impl Exclusive<'_> {
    /// Begins to invalidate a range. Faults in it wait, until [`end_invalidation`](Self::end_invalidation), by being
    /// retried. Of invalidations at the same time only the range around all of them is known, until the last has ended.
    pub fn begin_invalidation(&mut self, range: GfnRange) {
        let invalidation = &self.mmu().invalidation;
        if invalidation.in_progress.fetch_add(1, Ordering::Relaxed) == 0 {
            invalidation.start.store(u64::MAX, Ordering::Relaxed);
            invalidation.end.store(0, Ordering::Relaxed);
        }
        self.widen_invalidation(range);
    }

    /// Adds a range to what is being invalidated.
    pub fn widen_invalidation(&mut self, range: GfnRange) {
        let invalidation = &self.mmu().invalidation;
        invalidation.start.fetch_min(range.start.0, Ordering::Relaxed);
        invalidation.end.fetch_max(range.end.0, Ordering::Relaxed);
    }

    /// Ends what [`begin_invalidation`](Self::begin_invalidation) began: no frame that was found before may be used.
    pub fn end_invalidation(&mut self) {
        let invalidation = &self.mmu().invalidation;
        invalidation.sequence.fetch_add(1, Ordering::Release);
        let before = invalidation.in_progress.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "an invalidation that did not begin has ended");
    }
}
