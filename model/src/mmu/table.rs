//! Page tables and where they come from.
//!
//! Tables are kept in chunks that never move, so that an entry can lead to another table by number, as the kernel's leads
//! by frame number, and a walk needs no lock of its own. A table that is taken out of use may still be walked by whoever
//! holds the MMU lock shared: it is used again only once the lock was held exclusively. Nothing here knows what entries
//! mean.

use super::spte::Spte;
use super::{ENTRIES, INDEX_BITS};
use crate::sync::plain::OnceLock;
use crate::sync::{AtomicU64, Mutex, MutexGuard, Ordering};
use crate::units::{Gfn, Level};
use std::sync::atomic::AtomicU64 as Plain;
use std::sync::{Arc, PoisonError};

/// Chunks begin small, for there are many small machines, and double up to this many tables.
const LARGEST_CHUNK: u64 = 1 << 12;
const SMALLEST_CHUNK: u64 = 16;
/// So many that the tables map 4 TiB by pages of 4 KiB.
const CHUNKS: usize = 512;

/// The number of a table: what the frame of its memory is in the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TableId(u64);

impl TableId {
    pub(super) const fn of_frame(frame: u64) -> Self {
        TableId(frame)
    }

    pub(super) const fn frame(self) -> u64 {
        self.0
    }

    /// Which chunk, and which table of it.
    const fn place(self) -> (usize, usize) {
        ((self.0 / LARGEST_CHUNK) as usize, (self.0 % LARGEST_CHUNK) as usize)
    }

    /// The one after it.
    fn next(self) -> Self {
        let (chunk, index) = self.place();
        if index as u64 + 1 < chunk_size(chunk) {
            TableId(self.0 + 1)
        } else {
            TableId((chunk as u64 + 1) * LARGEST_CHUNK)
        }
    }
}

fn chunk_size(chunk: usize) -> u64 {
    LARGEST_CHUNK.min(SMALLEST_CHUNK << chunk.min(32))
}

/// A page table, and what it is of.
pub(super) struct Table {
    entries: [AtomicU64; ENTRIES],
    /// The first frame that it is for, and its level. Set before the table can be reached.
    gfn: Plain,
    level: Plain,
}

impl Table {
    fn new() -> Self {
        Self {
            entries: std::array::from_fn(|_| AtomicU64::new(Spte::EMPTY.bits())),
            gfn: Plain::new(0),
            level: Plain::new(1),
        }
    }

    /// The first frame that it is for.
    pub(super) fn gfn(&self) -> Gfn {
        Gfn(self.gfn.load(Ordering::Relaxed))
    }

    /// Its level.
    pub(super) fn level(&self) -> Level {
        Level::new(self.level.load(Ordering::Relaxed) as u8)
    }

    /// The entry's value now.
    pub(super) fn load(&self, index: usize) -> Spte {
        Spte::of_bits(self.entries[index].load(Ordering::Acquire))
    }

    /// Sets an entry that nobody else can change now.
    pub(super) fn store(&self, index: usize, new: Spte) {
        self.entries[index].store(new.bits(), Ordering::Release);
    }

    /// Sets an entry and gives what it was.
    pub(super) fn swap(&self, index: usize, new: Spte) -> Spte {
        Spte::of_bits(self.entries[index].swap(new.bits(), Ordering::AcqRel))
    }

    /// Sets an entry if it is `old`, else gives what it is.
    pub(super) fn replace(&self, index: usize, old: Spte, new: Spte) -> Result<(), Spte> {
        self.entries[index]
            .compare_exchange(old.bits(), new.bits(), Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(Spte::of_bits)
    }

    fn clear(&self) {
        self.entries.iter().for_each(|entry| entry.store(Spte::EMPTY.bits(), Ordering::Relaxed));
    }
}

/// The entry of a table of `level` that is for this frame.
pub(super) const fn index_of(gfn: Gfn, level: Level) -> usize {
    (gfn.0 >> ((level.number() as u32 - 1) * INDEX_BITS)) as usize & (ENTRIES - 1)
}

/// Tables out of use that someone may still walk.
pub(super) type Retired = Arc<Mutex<Vec<TableId>>>;

/// All tables of one MMU.
pub(super) struct Tables {
    chunks: Box<[OnceLock<Box<[Table]>>]>,
    unused: Mutex<Unused>,
    retired: Retired,
}

/// Tables that can be had.
struct Unused {
    again: Vec<TableId>,
    /// This one and all after it were never used.
    first_new: TableId,
}

impl Tables {
    pub(super) fn new() -> Self {
        Self {
            chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
            unused: Mutex::new(Unused { again: Vec::new(), first_new: TableId(0) }),
            retired: Arc::new(Mutex::new(Vec::new())),
        }
    }

    /// A table that is in use.
    pub(super) fn get(&self, id: TableId) -> &Table {
        let (chunk, index) = id.place();
        &self.chunks[chunk].get().expect("a table that is in use")[index]
    }

    /// An empty table, not to be reached yet.
    pub(super) fn allocate(&self, gfn: Gfn, level: Level) -> TableId {
        let id = self.take();
        let table = self.get(id);
        table.gfn.store(gfn.0, Ordering::Relaxed);
        table.level.store(level.number().into(), Ordering::Relaxed);
        id
    }

    fn take(&self) -> TableId {
        let mut unused = lock(&self.unused);
        if let Some(id) = unused.again.pop() {
            return id;
        }
        let id = unused.first_new;
        let chunk = id.place().0;
        assert!(chunk < CHUNKS, "more page tables than the model has room for");
        self.chunks[chunk].get_or_init(|| (0..chunk_size(chunk)).map(|_| Table::new()).collect());
        unused.first_new = id.next();
        id
    }

    /// Gives back a table that was never reached.
    pub(super) fn give_back(&self, id: TableId) {
        self.get(id).clear();
        lock(&self.unused).again.push(id);
    }

    /// Takes a table out of use. Who holds the lock shared may still walk it.
    pub(super) fn retire(&self, id: TableId) {
        lock(&self.retired).push(id);
    }

    /// Where a root puts its table when it goes.
    pub(super) fn retired(&self) -> &Retired {
        &self.retired
    }

    /// Makes retired tables usable again. The caller holds the MMU lock exclusively: nobody walks them any more.
    pub(super) fn reuse_retired(&self) {
        let retired = std::mem::take(&mut *lock(&self.retired));
        for id in retired {
            self.give_back(id);
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
