//! Numbers for the pages or frames of a slot, of which most are zero.
//!
//! A slot may have two thousand million pages, of which a test touches three. Memory is taken by chunks, when the first
//! number of one is set, and never given back while the slot lives: readers need no lock, and must not be given one.

use crate::sync::plain::OnceLock;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const CHUNK: u64 = 512;

type Chunk = Box<[AtomicU64]>;

/// Numbers, all zero at first.
pub(super) struct Sparse {
    chunks: Box<[OnceLock<Chunk>]>,
    len: u64,
}

impl Sparse {
    pub(super) fn new(len: u64) -> Self {
        let chunks = (0..len.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        Sparse { chunks, len }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn get(&self, index: u64) -> u64 {
        self.existing(index).map_or(0, |number| number.load(Ordering::Acquire))
    }

    /// The number, if there is memory for it; without, it is zero.
    pub(super) fn existing(&self, index: u64) -> Option<&AtomicU64> {
        let chunk = self.chunks[(index / CHUNK) as usize].get()?;
        Some(&chunk[(index % CHUNK) as usize])
    }

    /// The number, to be set.
    pub(super) fn number(&self, index: u64) -> &AtomicU64 {
        let zeroes = || (0..CHUNK).map(|_| AtomicU64::new(0)).collect();
        let chunk = self.chunks[(index / CHUNK) as usize].get_or_init(zeroes);
        &chunk[(index % CHUNK) as usize]
    }

    /// Those of `range` for which there is memory, with their places.
    pub(super) fn existing_in(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &AtomicU64)> {
        let end = range.end.min(self.len);
        let chunks = range.start / CHUNK..end.div_ceil(CHUNK);
        chunks.filter(|chunk| self.chunks[*chunk as usize].get().is_some()).flat_map(move |chunk| {
            let part = range.start.max(chunk * CHUNK)..end.min((chunk + 1) * CHUNK);
            part.filter_map(|index| Some((index, self.existing(index)?)))
        })
    }
}
