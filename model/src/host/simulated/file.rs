//! Files that the process maps: memfds (anonymous shared memory is one as well) and regular files.
//!
//! A file knows its pages and not who maps them. Of a regular file all pages are in the page cache; a memfd's come when they
//! are first touched.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::frames::Frames;
use super::table::PageCache;
use crate::sync::plain::{Mutex, RwLock};
use crate::units::{Level, Pfn};

#[derive(Clone, Copy)]
enum Content {
    /// What was not written reads as zero and has no page yet.
    Sparse,
    /// Each page holds this word and is in the page cache.
    Filled(u64),
}

/// An open file of small pages.
pub struct File {
    frames: Arc<Frames>,
    pages: AtomicU64,
    content: Content,
    cache: PageCache,
    /// Pages that `fallocate` brought and nobody has used. They are not mapped along with others.
    unused: Mutex<BTreeSet<u64>>,
    /// Taken shared from looking up a page to mapping it, exclusively to take pages away.
    pub(super) invalidate: RwLock<()>,
}

impl File {
    pub(super) fn sparse(frames: Arc<Frames>, pages: u64) -> Self {
        File::new(frames, pages, Content::Sparse)
    }

    pub(super) fn filled(frames: Arc<Frames>, pages: u64, word: u64) -> Self {
        File::new(frames, pages, Content::Filled(word))
    }

    fn new(frames: Arc<Frames>, pages: u64, content: Content) -> Self {
        File {
            frames,
            pages: AtomicU64::new(pages),
            content,
            cache: PageCache::new(pages),
            unused: Mutex::default(),
            invalidate: RwLock::new(()),
        }
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Acquire)
    }

    pub(super) fn is_sparse(&self) -> bool {
        matches!(self.content, Content::Sparse)
    }

    /// How far it can grow.
    pub(super) fn capacity(&self) -> u64 {
        self.cache.capacity()
    }

    pub(super) fn grow(&self, pages: u64) {
        self.pages.fetch_max(pages, Ordering::AcqRel);
    }

    /// The frame of a page that is in the page cache.
    pub(super) fn cached(&self, index: u64) -> Option<Pfn> {
        match self.content {
            Content::Sparse => {
                self.cache.get(index).filter(|_| !self.unused.lock().unwrap().contains(&index))
            }
            Content::Filled(_) if index < self.pages() => self.page(index),
            Content::Filled(_) => None,
        }
    }

    /// The frame of a page that is used now, brought into the page cache if need be. None without memory.
    pub(super) fn page(&self, index: u64) -> Option<Pfn> {
        self.unused.lock().unwrap().remove(&index);
        self.bring(index)
    }

    /// `fallocate` of one page. The second time it is as good as used.
    pub(super) fn allocate(&self, index: u64) -> Option<Pfn> {
        if self.cache.get(index).is_some() {
            return self.page(index);
        }
        self.unused.lock().unwrap().insert(index);
        self.bring(index)
    }

    fn bring(&self, index: u64) -> Option<Pfn> {
        if let Some(pfn) = self.cache.get(index) {
            return Some(pfn);
        }
        let new = self.frames.allocate(Level::SMALL)?;
        if let Content::Filled(word) = self.content {
            self.frames.store(new, word);
        }
        match self.cache.insert(index, new) {
            Ok(()) => Some(new),
            Err(there) => {
                self.frames.free(new);
                Some(there)
            }
        }
    }

    /// Frees pages that nobody maps any more. The caller keeps faults out.
    pub(super) fn remove(&self, start: u64, end: u64) {
        for index in self.cache.present(start, end) {
            self.unused.lock().unwrap().remove(&index);
            if let Some(pfn) = self.cache.remove(index) {
                self.frames.free(pfn);
            }
        }
    }
}

impl Drop for File {
    fn drop(&mut self) {
        self.remove(0, self.cache.capacity());
    }
}
