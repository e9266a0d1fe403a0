//! What was noted of pages of the process: an entry each, for as many pages as there are notes.
//!
//! Guests have many pages side by side, so they are kept by the frame of 2 MiB. Nothing here says what a note means.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::pagemap::Entry;

const CHUNK: u64 = 512;

type Chunk = [AtomicU64; CHUNK as usize];

/// Entries by page.
#[derive(Default)]
pub struct Noted {
    chunks: RwLock<HashMap<u64, Arc<Chunk>>>,
}

impl Noted {
    /// Notes an entry, in place of one that was noted before. Nothing is noted by an empty one.
    pub fn note(&self, page: u64, entry: Entry) {
        self.chunk(page / CHUNK)[(page % CHUNK) as usize].store(entry.bits(), Ordering::Release);
    }

    /// What is noted of a page.
    pub fn get(&self, page: u64) -> Option<Entry> {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        let bits = chunks.get(&(page / CHUNK))?[(page % CHUNK) as usize].load(Ordering::Acquire);
        (bits != 0).then(|| Entry::of_bits(bits))
    }

    /// Forgets pages.
    pub fn forget(&self, pages: &Range<u64>) {
        for (first, chunk) in self.touched(pages) {
            for (page, note) in (first..).zip(chunk.iter()) {
                if pages.contains(&page) {
                    note.store(0, Ordering::Release);
                }
            }
        }
    }

    /// What is noted of pages, in order, by the frame.
    pub fn of(&self, pages: &Range<u64>) -> Vec<Vec<(u64, Entry)>> {
        let noted = |(first, chunk): (u64, Arc<Chunk>)| {
            let all = (first..).zip(chunk.iter().map(|note| note.load(Ordering::Acquire)));
            let some = all.filter(|(page, bits)| *bits != 0 && pages.contains(page));
            some.map(|(page, bits)| (page, Entry::of_bits(bits))).collect::<Vec<_>>()
        };
        self.touched(pages).into_iter().map(noted).filter(|notes| !notes.is_empty()).collect()
    }

    fn touched(&self, pages: &Range<u64>) -> Vec<(u64, Arc<Chunk>)> {
        let keys = pages.start / CHUNK..pages.end.div_ceil(CHUNK);
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        let mut touched: Vec<_> = if keys.end.saturating_sub(keys.start) < chunks.len() as u64 {
            keys.filter_map(|key| Some((key * CHUNK, chunks.get(&key)?.clone()))).collect()
        } else {
            let all = chunks.iter().filter(|(key, _)| keys.contains(key));
            all.map(|(key, chunk)| (key * CHUNK, chunk.clone())).collect()
        };
        touched.sort_unstable_by_key(|(first, _)| *first);
        touched
    }

    fn chunk(&self, key: u64) -> Arc<Chunk> {
        if let Some(chunk) = self.chunks.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return chunk.clone();
        }
        let mut chunks = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        chunks.entry(key).or_insert_with(|| Arc::new([const { AtomicU64::new(0) }; CHUNK as usize])).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_noted_found_and_forgotten() {
        let noted = Noted::default();
        let entry = |bits| Entry::of_bits(bits);
        for page in [5, 511, 512, 5000] {
            noted.note(page, entry(page));
        }
        assert_eq!(noted.get(511), Some(entry(511)));
        assert_eq!(noted.get(6), None);
        let all =
            vec![vec![(5, entry(5)), (511, entry(511))], vec![(512, entry(512))], vec![(5000, entry(5000))]];
        assert_eq!(noted.of(&(0..u64::MAX)), all);
        assert_eq!(noted.of(&(6..5000)), [vec![(511, entry(511))], vec![(512, entry(512))]]);
        noted.forget(&(511..5000));
        assert_eq!(noted.of(&(0..1 << 40)), [vec![(5, entry(5))], vec![(5000, entry(5000))]]);
    }
}
