//! hugetlb: pools of huge pages, reservations, and the files that take from them.
//!
//! A mapping reserves its pages when it is made and so cannot fail later; one made without reserving may. Nothing here maps a
//! page or takes a mapping down.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::frames::Frames;
use super::table::PageCache;
use crate::sync::plain::{Mutex, RwLock};
use crate::units::{Level, Pfn};

/// The pages of one size.
pub(super) struct Pool {
    level: Level,
    frames: Arc<Frames>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: Vec<Pfn>,
    /// All of its pages, free or not.
    own: HashSet<u64>,
    reserved: u64,
}

/// How full a pool is, as /sys tells.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PoolState {
    /// `nr_hugepages`.
    pub total: u64,
    /// `free_hugepages`.
    pub free: u64,
    /// `resv_hugepages`: how many of the free ones are promised.
    pub reserved: u64,
}

impl Pool {
    pub fn new(level: Level, frames: Arc<Frames>) -> Self {
        Pool { level, frames, state: Mutex::default() }
    }

    pub fn level(&self) -> Level {
        self.level
    }

    pub fn state(&self) -> PoolState {
        let state = self.state.lock().unwrap();
        PoolState { total: state.own.len() as u64, free: state.free.len() as u64, reserved: state.reserved }
    }

    /// Grows or shrinks as far as memory and use allow.
    pub fn resize(&self, total: u64) {
        let mut state = self.state.lock().unwrap();
        while (state.own.len() as u64) < total {
            let Some(pfn) = self.frames.allocate(self.level) else { break };
            state.free.push(pfn);
            state.own.insert(pfn.0);
        }
        while state.own.len() as u64 > total && (state.free.len() as u64) > state.reserved {
            let pfn = state.free.pop().expect("more are free than are promised");
            state.own.remove(&pfn.0);
            self.frames.free(pfn);
        }
    }

    /// Whether a page is one of its.
    pub fn owns(&self, pfn: Pfn) -> bool {
        self.state.lock().unwrap().own.contains(&pfn.0)
    }

    fn reserve(&self, pages: u64) -> bool {
        let mut state = self.state.lock().unwrap();
        let is_had = state.reserved + pages <= state.free.len() as u64;
        if is_had {
            state.reserved += pages;
        }
        is_had
    }

    fn unreserve(&self, pages: u64) {
        self.state.lock().unwrap().reserved -= pages;
    }

    /// A zeroed page: one that was promised, or one that is promised to nobody.
    pub fn take(&self, was_promised: bool) -> Option<Pfn> {
        let mut state = self.state.lock().unwrap();
        if was_promised {
            state.reserved -= 1;
        } else if state.free.len() as u64 <= state.reserved {
            return None;
        }
        let pfn = state.free.pop().expect("what was promised is there");
        drop(state);
        self.frames.clear(pfn, self.level);
        self.frames.set_exclusive(pfn, false);
        Some(pfn)
    }

    /// Takes a page back, promised anew if so.
    pub fn give(&self, pfn: Pfn, is_promised: bool) {
        let mut state = self.state.lock().unwrap();
        state.free.push(pfn);
        state.reserved += u64::from(is_promised);
    }
}

/// What is still promised to a private mapping, by index in its file.
pub(super) struct Reserve {
    pool: Arc<Pool>,
    left: Mutex<BTreeSet<u64>>,
}

impl Reserve {
    pub fn new(pool: &Arc<Pool>, indices: std::ops::Range<u64>) -> Option<Self> {
        let is_had = pool.reserve(indices.end - indices.start);
        is_had.then(|| Reserve { pool: pool.clone(), left: Mutex::new(indices.collect()) })
    }

    /// Whether a page was promised; it no longer is, since it is about to be taken.
    pub fn use_up(&self, index: u64) -> bool {
        self.left.lock().unwrap().remove(&index)
    }

    /// Notes that the page given back is promised again.
    pub fn restore(&self, index: u64) {
        self.left.lock().unwrap().insert(index);
    }

    /// Nothing is promised any more for these.
    pub fn release(&self, indices: std::ops::Range<u64>) {
        let mut left = self.left.lock().unwrap();
        let released: Vec<u64> = left.range(indices).copied().collect();
        released.iter().for_each(|index| {
            left.remove(index);
        });
        self.pool.unreserve(released.len() as u64);
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        self.release(0..u64::MAX);
    }
}

/// A file of huge pages. Indices are of its own pages.
pub struct HugeFile {
    pub(super) pool: Arc<Pool>,
    pages: AtomicU64,
    cache: PageCache,
    /// What shared mappings and `fallocate` have asked for: promised until the page is there.
    asked: Mutex<BTreeSet<u64>>,
    pub(super) invalidate: RwLock<()>,
}

impl HugeFile {
    pub(super) fn new(pool: Arc<Pool>, pages: u64) -> Self {
        HugeFile {
            pool,
            pages: AtomicU64::new(pages),
            cache: PageCache::new(pages),
            asked: Mutex::default(),
            invalidate: RwLock::new(()),
        }
    }

    /// The size of its pages.
    pub fn level(&self) -> Level {
        self.pool.level()
    }

    /// How many of its own pages it has.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Acquire)
    }

    /// A mapping that can be written makes the file as long as it reaches.
    pub(super) fn grow(&self, pages: u64) {
        self.pages.fetch_max(pages, Ordering::AcqRel);
    }

    pub(super) fn cached(&self, index: u64) -> Option<Pfn> {
        self.cache.get(index)
    }

    /// Promises pages for a shared mapping. False where the pool is too small.
    pub(super) fn reserve(&self, indices: std::ops::Range<u64>) -> bool {
        let mut asked = self.asked.lock().unwrap();
        let new: Vec<u64> = indices.filter(|index| !asked.contains(index)).collect();
        let is_had = self.pool.reserve(new.len() as u64);
        if is_had {
            asked.extend(new);
        }
        is_had
    }

    /// The page's frame, taken from the pool if it has none.
    pub(super) fn page(&self, index: u64) -> Option<Pfn> {
        let mut asked = self.asked.lock().unwrap();
        if let Some(pfn) = self.cache.get(index) {
            return Some(pfn);
        }
        let pfn = self.pool.take(asked.contains(&index))?;
        asked.insert(index);
        self.cache.insert(index, pfn).expect("one thread at a time inserts");
        Some(pfn)
    }

    /// Gives pages back that nobody maps any more, as a hole does. What is promised and not yet there stays promised.
    pub(super) fn remove(&self, indices: std::ops::Range<u64>) {
        let mut asked = self.asked.lock().unwrap();
        let range: Vec<u64> = asked.range(indices).copied().collect();
        for index in range {
            if let Some(pfn) = self.cache.remove(index) {
                asked.remove(&index);
                self.pool.give(pfn, false);
            }
        }
    }
}

impl Drop for HugeFile {
    fn drop(&mut self) {
        self.remove(0..u64::MAX);
        let promised = self.asked.lock().unwrap().len();
        self.pool.unreserve(promised as u64);
    }
}
