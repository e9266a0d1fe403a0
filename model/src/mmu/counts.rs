//! How many pages are mapped, by size.
//!
//! Every mapping counts, on every core, so that the counts are kept in stripes, one for each thread as far as they go.
//! A single stripe means nothing; it may well be below zero.

use crate::sync::sharded::{STRIPES, stripe};
use crate::units::Level;
use crossbeam_utils::CachePadded;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};

/// Counts of the pages of each size.
#[derive(Default)]
pub(super) struct PageCounts {
    stripes: [CachePadded<[AtomicI64; 3]>; STRIPES],
}

impl PageCounts {
    /// So many more pages of this level, or fewer.
    pub(super) fn add(&self, level: Level, pages: i64) {
        self.stripes[stripe()][usize::from(level.number()) - 1].fetch_add(pages, Relaxed);
    }

    /// Pages of 4 KiB, 2 MiB and 1 GiB. While others map, one stripe is read before and another after, and a sum may well
    /// be below zero.
    pub(super) fn sum(&self) -> [i64; 3] {
        std::array::from_fn(|size| self.stripes.iter().map(|stripe| stripe[size].load(Relaxed)).sum())
    }
}
