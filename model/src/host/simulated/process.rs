//! The process itself: its page table and mappings, and who is told of their changes.
//!
//! The locks, outermost first: the mappings (shared by whoever faults or discards, exclusively by whoever maps), then what
//! keeps a file's pages in place, then the entries of one 2 MiB region. Notifiers are called with the first two perhaps
//! held, never with the last: who holds KVM's MMU lock may look entries up, and waits for nobody here.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, Weak};

use super::entry::{Entry, Kind};
use super::fork::Children;
use super::frames::Frames;
use super::gmem::FileCore;
use super::hugetlb::Pool;
use super::settings::{Settings, ThpPolicy};
use super::table::{Found, PageTable};
use super::vma::Vmas;
use crate::errno::{Errno, Result};
use crate::host::Notifier;
use crate::mistake::{Mistake, mistaken};
use crate::sync::plain::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::{Hva, Level, PAGE_SHIFT};

/// How many regions' entries can be changed at a time. More than threads, so that two seldom meet.
const REGION_LOCKS: usize = 64;

/// Where a page of a guest_memfd may be mapped.
#[derive(Clone, Copy)]
pub(super) struct GmemMapping {
    pub start: u64,
    pub end: u64,
    pub first: u64,
}

pub(super) struct Process {
    pub settings: Settings,
    thp: AtomicU8,
    pub frames: Arc<Frames>,
    pub table: PageTable,
    vmas: RwLock<Vmas>,
    regions: [Mutex<()>; REGION_LOCKS],
    notifiers: RwLock<Vec<Weak<dyn Notifier>>>,
    pub pools: [Arc<Pool>; 2],
    pub gmem_files: Mutex<Vec<Weak<FileCore>>>,
    /// As the mappings say, for those who may not wait for them.
    pub gmem_mappings: RwLock<Vec<GmemMapping>>,
    pub children: Children,
    /// Page faults that came to something, of whatever access.
    pub faults: AtomicU64,
}

impl Process {
    pub fn new(settings: Settings) -> Self {
        let frames = Arc::new(Frames::new(settings.frames));
        let pool = |level| Arc::new(Pool::new(level, frames.clone()));
        Process {
            thp: AtomicU8::new(settings.thp as u8),
            table: PageTable::new(),
            vmas: RwLock::new(Vmas::new(settings.own_pages_are_shared_with_neighbours())),
            regions: [const { Mutex::new(()) }; REGION_LOCKS],
            notifiers: RwLock::default(),
            pools: [pool(Level::HUGE), pool(Level::GIGANTIC)],
            gmem_files: Mutex::default(),
            gmem_mappings: RwLock::default(),
            children: Children::default(),
            faults: AtomicU64::new(0),
            frames,
            settings,
        }
    }

    pub fn set_thp(&self, policy: ThpPolicy) {
        self.thp.store(policy as u8, Ordering::Relaxed);
    }

    pub fn thp(&self) -> ThpPolicy {
        [ThpPolicy::Always, ThpPolicy::Madvise, ThpPolicy::Never]
            [usize::from(self.thp.load(Ordering::Relaxed))]
    }

    pub fn pool(&self, level: Level) -> Option<&Arc<Pool>> {
        self.pools.iter().find(|pool| pool.level() == level)
    }

    pub fn mappings(&self) -> RwLockReadGuard<'_, Vmas> {
        self.vmas.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn mappings_for_change(&self) -> RwLockWriteGuard<'_, Vmas> {
        self.vmas.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps others from changing entries of the 2 MiB that a page lies in; of the whole gigabyte for an entry of that size.
    pub fn lock_entries(&self, page: u64, level: Level) -> MutexGuard<'_, ()> {
        let region = page >> if level == Level::GIGANTIC { 18 } else { 9 };
        self.regions[region as usize % REGION_LOCKS].lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn register(&self, notifier: Weak<dyn Notifier>) {
        let mut notifiers = self.notifiers.write().unwrap();
        notifiers.retain(|notifier| notifier.strong_count() > 0);
        notifiers.push(notifier);
    }

    /// Makes a change of entries for the pages from `start` up to `end`, with notifiers told before and after.
    pub fn changing<R>(&self, start: u64, end: u64, change: impl FnOnce() -> R) -> R {
        // The same ones hear of the end as of the start.
        let told: Vec<Arc<dyn Notifier>> =
            self.notifiers.read().unwrap().iter().filter_map(Weak::upgrade).collect();
        let (from, to) = (Hva(start << PAGE_SHIFT), Hva(end << PAGE_SHIFT));
        told.iter().for_each(|notifier| notifier.invalidate_start(from, to));
        let result = change();
        told.iter().for_each(|notifier| notifier.invalidate_end(from, to));
        result
    }

    /// What an access without a fault would find.
    pub fn reach(&self, page: u64, write: bool) -> Option<Found> {
        let found = self.table.find(page);
        found.entry.allows(write).then_some(found)
    }

    /// Lets go of what an entry mapped that is out of the table. Not for hugetlb, whose pages go back to a pool.
    pub fn drop_frames(&self, entry: Entry, level: Level) {
        if entry.is_anonymous() && self.frames.unmap(entry.pfn(), level.pages()) {
            self.frames.free(self.frames.head(entry.pfn()));
        }
    }

    /// Breaks a transparent huge page's one entry into small ones, if there is one.
    ///
    /// The page stays one page; only its mapping is in parts. The notifiers hear of all of it.
    pub fn split(&self, page: u64) {
        let base = page & !(Level::HUGE.pages() - 1);
        if !self.is_huge_leaf(base) {
            return;
        }
        let told = if mistaken(Mistake::ABrokenUpHugePageIsToldOfAsOnePage) {
            page..page + 1
        } else {
            base..base + Level::HUGE.pages()
        };
        self.changing(told.start, told.end, || {
            let _entries = self.lock_entries(base, Level::HUGE);
            let Some(slot) = self.table.slot(base, Level::HUGE).filter(|slot| slot.get().has_frame()) else {
                return;
            };
            let huge = slot.get();
            for (at, small) in self.table.small_entries(base) {
                small.set(self.part_of(huge, at - base));
            }
            slot.set(Entry::TO_TABLE);
        });
    }

    fn part_of(&self, huge: Entry, at: u64) -> Entry {
        if huge.kind() == Kind::Zero {
            return huge.with_frame(self.frames.zero(Level::SMALL));
        }
        let pfn = huge.pfn().plus(at);
        self.frames.set_exclusive(pfn, self.frames.is_exclusive(huge.pfn()));
        huge.with_frame(pfn)
    }

    pub fn is_huge_leaf(&self, page: u64) -> bool {
        let found = self.table.find(page);
        found.level == Level::HUGE && found.entry.has_frame()
    }

    /// Lets the memory of an anonymous page fail.
    pub fn poison(&self, page: u64) -> Result<()> {
        let _vmas = self.mappings();
        let found = self.table.find(page);
        if !found.entry.is_anonymous() || self.frames.level(found.entry.pfn()) != Level::SMALL {
            return Err(Errno::EBUSY);
        }
        self.changing(page, page + 1, || {
            let _entries = self.lock_entries(page, Level::SMALL);
            if let Some(slot) = self.table.slot(page, Level::SMALL).filter(|slot| slot.get() == found.entry) {
                // The frame is not used again: it stays with the entry that stands for it.
                slot.set(Entry::FAILED);
            }
        });
        Ok(())
    }
}
