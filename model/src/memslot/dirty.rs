//! Which pages of a slot the guest has written.
//!
//! Bits only, set and taken by many threads at once. That a page must be write-protected again once its bit was taken is
//! for whoever takes it.

use std::sync::atomic::Ordering;

use super::sparse::Sparse;

/// A bit for each page.
pub struct DirtyBitmap {
    words: Sparse,
    pages: u64,
}

impl DirtyBitmap {
    /// Of so many pages, none of them written.
    pub fn new(pages: u64) -> Self {
        DirtyBitmap { words: Sparse::new(pages.div_ceil(64)), pages }
    }

    /// How many pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Notes that a page was written.
    pub fn mark(&self, relative: u64) {
        let (word, bit) = (relative / 64, 1 << (relative % 64));
        // Most pages that are written are written again.
        if self.words.get(word) & bit == 0 {
            self.words.number(word).fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Notes that every page was written.
    pub fn mark_all(&self) {
        for word in 0..self.words.len() {
            self.words.number(word).fetch_or(self.valid_bits(word), Ordering::AcqRel);
        }
    }

    /// Whether a page was written.
    pub fn is_marked(&self, relative: u64) -> bool {
        self.words.get(relative / 64) & 1 << (relative % 64) != 0
    }

    /// The bits, by words of 64 pages.
    pub fn all(&self) -> Vec<u64> {
        self.collect(|number| number.load(Ordering::Acquire))
    }

    /// The bits, all of which are clear afterwards: each is given to one caller only.
    pub fn take_all(&self) -> Vec<u64> {
        self.collect(
            |number| if number.load(Ordering::Acquire) == 0 { 0 } else { number.swap(0, Ordering::AcqRel) },
        )
    }

    /// Clears those of `bits` that are set in a word, and says which.
    pub fn take(&self, word: u64, bits: u64) -> u64 {
        self.words.existing(word).map_or(0, |number| number.fetch_and(!bits, Ordering::AcqRel) & bits)
    }

    fn collect(&self, read: impl Fn(&std::sync::atomic::AtomicU64) -> u64) -> Vec<u64> {
        let mut words = vec![0; self.words.len() as usize];
        for (index, number) in self.words.existing_in(0..self.words.len()) {
            words[index as usize] = read(number);
        }
        words
    }

    fn valid_bits(&self, word: u64) -> u64 {
        match self.pages - word * 64 {
            pages @ 1..64 => (1 << pages) - 1,
            _ => u64::MAX,
        }
    }
}
