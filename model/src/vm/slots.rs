//! The memslots of a VM: which snapshot is the current one, and who may still be looking at the last.
//!
//! A snapshot is replaced by one thread at a time, and then waits for every reader of the old one, as the kernel waits for
//! SRCU. So a slot that was made invalid is not being mapped any more once [`Slots::install`] has returned. The notifiers look
//! at the slots too, but from inside a reader's call to the host: they take the snapshot without being a reader, and the
//! replacement waits for them by their own count. Nothing here knows the rules of slots.

use super::lock;
use crate::memslot::Memslots;
use crate::sync::plain::{Condvar, Mutex, MutexGuard, RwLock};
use crate::sync::sharded::{ShardedLock, ShardedLockReadGuard};
use std::cell::{Ref, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A vCPU in SMM is in the second, also where that one is always empty.
const ADDRESS_SPACES: usize = 2;

pub(super) struct Slots {
    changing: Mutex<()>,
    readers: ShardedLock<()>,
    /// How many address spaces slots can be set in.
    usable: usize,
    current: [RwLock<Arc<Memslots>>; ADDRESS_SPACES],
    /// Changes with `current`, for readers to see whether theirs still is: so they need not fight for it.
    versions: [AtomicU64; ADDRESS_SPACES],
    /// Of each address space.
    generations: [AtomicU64; ADDRESS_SPACES],
    invalidations: Mutex<u64>,
    invalidations_ended: Condvar,
}

/// Whoever looks at slots and acts on what it saw.
pub(super) struct Reader<'a> {
    slots: &'a Slots,
    /// What it saw last of each address space.
    seen: RefCell<[Option<Seen>; ADDRESS_SPACES]>,
    _guard: ShardedLockReadGuard<'a, ()>,
}

/// A snapshot, and the version that it has or is newer than.
type Seen = (u64, Arc<Memslots>);

/// Whoever changes slots or what hangs on them (`slots_lock`).
pub(super) struct Changing<'a>(#[allow(dead_code)] MutexGuard<'a, ()>);

impl Slots {
    pub(super) fn new(usable: usize) -> Self {
        Slots {
            changing: Mutex::new(()),
            readers: ShardedLock::new(()),
            usable,
            current: std::array::from_fn(|_| RwLock::new(Arc::new(Memslots::new()))),
            versions: std::array::from_fn(|_| AtomicU64::new(0)),
            generations: std::array::from_fn(|as_id| AtomicU64::new(as_id as u64)),
            invalidations: Mutex::new(0),
            invalidations_ended: Condvar::new(),
        }
    }

    pub(super) fn change(&self) -> Changing<'_> {
        Changing(lock(&self.changing))
    }

    /// Not for a thread that is a reader already.
    pub(super) fn read(&self) -> Reader<'_> {
        let guard = self.readers.read();
        Reader { slots: self, seen: RefCell::default(), _guard: guard }
    }

    /// The current snapshot of an address space.
    pub(super) fn of(&self, as_id: usize) -> Arc<Memslots> {
        self.current[as_id].read().expect("no thread has failed").clone()
    }

    /// Those of every address space that slots can be set in.
    pub(super) fn all(&self) -> Vec<Arc<Memslots>> {
        (0..self.usable).map(|as_id| self.of(as_id)).collect()
    }

    /// Tells the snapshots apart, those of one address space from another's as well: where there is no memory is remembered
    /// of one of them only.
    pub(super) fn generation(&self, as_id: usize) -> u64 {
        self.generations[as_id].load(Ordering::Acquire)
    }

    /// Makes a snapshot the current one, and waits until nobody acts on the one before.
    pub(super) fn install(&self, _changing: &Changing<'_>, as_id: usize, slots: Memslots) {
        // An invalidation that has begun must end with the slots that it began with.
        let mut begun = lock(&self.invalidations);
        while *begun > 0 {
            begun = self.invalidations_ended.wait(begun).expect("no thread has failed");
        }
        let mut current = self.current[as_id].write().expect("no thread has failed");
        *current = Arc::new(slots);
        self.versions[as_id].fetch_add(1, Ordering::Release);
        drop(current);
        drop(begun);
        drop(self.readers.write());
        self.generations[as_id].fetch_add(ADDRESS_SPACES as u64, Ordering::AcqRel);
    }

    pub(super) fn begin_invalidation(&self) {
        *lock(&self.invalidations) += 1;
    }

    pub(super) fn end_invalidation(&self) {
        let mut begun = lock(&self.invalidations);
        *begun -= 1;
        self.invalidations_ended.notify_all();
    }
}

impl Reader<'_> {
    /// The current snapshot of an address space. What is done by it is over before the reader goes.
    pub(super) fn of(&self, as_id: usize) -> Ref<'_, Memslots> {
        let version = self.slots.versions[as_id].load(Ordering::Acquire);
        let is_current = matches!(&self.seen.borrow()[as_id], Some((seen, _)) if *seen == version);
        if !is_current {
            self.seen.borrow_mut()[as_id] = Some((version, self.slots.of(as_id)));
        }
        Ref::map(self.seen.borrow(), |seen| match &seen[as_id] {
            Some((_, slots)) => &**slots,
            None => unreachable!("it was just seen"),
        })
    }
}
