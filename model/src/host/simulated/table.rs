//! A tree of tables with 512 entries each: the process's page table, and the page cache of a file.
//!
//! Anyone may read at any time without a lock. A table that was once made stays until the whole tree goes, so that a reader
//! never follows a pointer to nothing; who finds an entry that has just become empty takes the slow path. Whoever changes
//! entries keeps others who change them out (see [`Process`](super::process::Process)); the tree does not.

use std::sync::atomic::{AtomicU64, Ordering};

use super::entry::Entry;
use crate::sync::plain::OnceLock;
use crate::units::{Level, Pfn};

const BITS: u32 = 9;
const ENTRIES: usize = 1 << BITS;

/// Pages that one entry of level `number` stands for.
const fn pages_at(number: u32) -> u64 {
    1 << ((number - 1) * BITS)
}

type Children = [OnceLock<Box<Table>>; ENTRIES];

struct Table {
    entries: [AtomicU64; ENTRIES],
    children: OnceLock<Box<Children>>,
}

impl Table {
    fn new() -> Self {
        Table { entries: [const { AtomicU64::new(0) }; ENTRIES], children: OnceLock::new() }
    }

    fn child(&self, index: usize) -> Option<&Table> {
        self.children.get()?[index].get().map(|table| &**table)
    }

    fn child_or_new(&self, index: usize) -> &Table {
        let children = self.children.get_or_init(|| Box::new([const { OnceLock::new() }; ENTRIES]));
        children[index].get_or_init(|| Box::new(Table::new()))
    }
}

const fn index(page: u64, level: u32) -> usize {
    (page >> ((level - 1) * BITS)) as usize & (ENTRIES - 1)
}

/// What a walk of the process's page table ends at.
#[derive(Clone, Copy)]
pub(super) struct Found {
    /// A leaf, or nothing.
    pub entry: Entry,
    /// The level that the walk ended at.
    pub level: Level,
}

impl Found {
    /// The frame of a page that a leaf maps, perhaps with others.
    pub fn pfn_of(self, page: u64) -> Pfn {
        self.entry.pfn().plus(page & (self.level.pages() - 1))
    }

    /// Whether there is not even a table of small entries.
    pub fn is_without_table(self) -> bool {
        self.entry.is_empty() && self.level > Level::SMALL
    }
}

/// The process's page table: four levels.
pub(super) struct PageTable {
    root: Table,
}

const ROOT_LEVEL: u32 = 4;
/// Pages that the process can have addresses for: half of what the tables reach.
pub(super) const USER_PAGES: u64 = 1 << (ROOT_LEVEL * BITS - 1);

impl PageTable {
    pub fn new() -> Self {
        PageTable { root: Table::new() }
    }

    /// Where the walk for a page ends.
    pub fn find(&self, page: u64) -> Found {
        let mut table = &self.root;
        let mut level = ROOT_LEVEL;
        loop {
            let entry = Entry::of_bits(table.entries[index(page, level)].load(Ordering::Acquire));
            let next = if entry.is_table() { table.child(index(page, level)) } else { None };
            match next {
                Some(child) => table = child,
                None => return Found { entry, level: Level::new(level as u8) },
            }
            level -= 1;
        }
    }

    /// The entry of a page at a level, if the tables lead so far.
    pub fn slot(&self, page: u64, level: Level) -> Option<Slot<'_>> {
        let mut table = &self.root;
        for above in (u32::from(level.number()) + 1..=ROOT_LEVEL).rev() {
            let at = index(page, above);
            if !Entry::of_bits(table.entries[at].load(Ordering::Acquire)).is_table() {
                return None;
            }
            table = table.child(at)?;
        }
        Some(Slot(&table.entries[index(page, u32::from(level.number()))]))
    }

    /// The same, with the tables made that lead there. None where a larger page is in the way.
    pub fn slot_or_new(&self, page: u64, level: Level) -> Option<Slot<'_>> {
        let mut table = &self.root;
        for above in (u32::from(level.number()) + 1..=ROOT_LEVEL).rev() {
            let at = index(page, above);
            let child = table.child_or_new(at);
            let linked = table.entries[at].compare_exchange(
                Entry::EMPTY.bits(),
                Entry::TO_TABLE.bits(),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            if linked.is_err_and(|there| !Entry::of_bits(there).is_table()) {
                return None;
            }
            table = child;
        }
        Some(Slot(&table.entries[index(page, u32::from(level.number()))]))
    }

    /// The small entries of the table around a page, linked or not yet. They are empty where it is not linked.
    pub fn small_entries(&self, page: u64) -> impl Iterator<Item = (u64, Slot<'_>)> {
        let mut table = &self.root;
        for above in (2..=ROOT_LEVEL).rev() {
            table = table.child_or_new(index(page, above));
        }
        let first = page & !(ENTRIES as u64 - 1);
        table.entries.iter().enumerate().map(move |(at, entry)| (first + at as u64, Slot(entry)))
    }
}

/// A place for an entry.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a>(&'a AtomicU64);

impl Slot<'_> {
    pub fn get(self) -> Entry {
        Entry::of_bits(self.0.load(Ordering::Acquire))
    }

    pub fn set(self, entry: Entry) {
        self.0.store(entry.bits(), Ordering::Release);
    }
}

/// The frames of a file's pages, by index.
pub(super) struct PageCache {
    root: Table,
    levels: u32,
}

impl PageCache {
    /// For a file of so many pages, with room to grow.
    pub fn new(pages: u64) -> Self {
        let mut levels = 3;
        while pages > pages_at(levels + 1) {
            levels += 1;
        }
        PageCache { root: Table::new(), levels }
    }

    /// How many pages it can hold.
    pub fn capacity(&self) -> u64 {
        pages_at(self.levels + 1)
    }

    fn place(&self, at: u64) -> Option<&AtomicU64> {
        if at >= self.capacity() {
            return None;
        }
        let mut table = &self.root;
        for level in (2..=self.levels).rev() {
            table = table.child(index(at, level))?;
        }
        Some(&table.entries[index(at, 1)])
    }

    /// The frame of a page. Frame 0 is nobody's, so that it can stand for none.
    pub fn get(&self, at: u64) -> Option<Pfn> {
        let pfn = self.place(at)?.load(Ordering::Acquire);
        (pfn != 0).then_some(Pfn(pfn))
    }

    /// Gives a page its frame, unless it has one: that is told then.
    pub fn insert(&self, at: u64, pfn: Pfn) -> Result<(), Pfn> {
        debug_assert!(at < self.capacity());
        let mut table = &self.root;
        for level in (2..=self.levels).rev() {
            table = table.child_or_new(index(at, level));
        }
        table.entries[index(at, 1)]
            .compare_exchange(0, pfn.0, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
            .map_err(Pfn)
    }

    /// Takes a page's frame away.
    pub fn remove(&self, at: u64) -> Option<Pfn> {
        let pfn = self.place(at)?.swap(0, Ordering::AcqRel);
        (pfn != 0).then_some(Pfn(pfn))
    }

    /// The pages from `start` up to `end` that have frames, tables that were never made skipped.
    pub fn present(&self, start: u64, end: u64) -> Vec<u64> {
        let mut found = Vec::new();
        collect(&self.root, self.levels, 0, start, end.min(self.capacity()), &mut found);
        found
    }
}

fn collect(table: &Table, level: u32, base: u64, start: u64, end: u64, found: &mut Vec<u64>) {
    for at in 0..ENTRIES {
        let first = base + at as u64 * pages_at(level);
        if first >= end || first + pages_at(level) <= start {
            continue;
        }
        if level > 1 {
            if let Some(child) = table.child(at) {
                collect(child, level - 1, first, start, end, found);
            }
        } else if table.entries[at].load(Ordering::Acquire) != 0 {
            found.push(first);
        }
    }
}
