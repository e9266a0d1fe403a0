//! Walks through tables: to one frame, or over all entries of a range.
//!
//! Here tables are only read. What a visitor is shown may be out of date at once, unless the lock is held exclusively.

use super::lock::Held;
use super::table::{Table, Tables, index_of};
use super::{ENTRIES, Mmu, Root, Spte, TableId};
use crate::units::{Gfn, GfnRange, Level};

/// An entry of a table, and what it was when it was read.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) table: &'a Table,
    pub(super) index: usize,
    pub(super) gfn: Gfn,
    pub(super) level: Level,
    pub(super) old: Spte,
}

impl<'a> Entry<'a> {
    /// The entry for this frame of a table of `level`. Whatever bits of the number are above the root's are lost, as KVM loses
    /// them.
    pub(super) fn read(table: &'a Table, gfn: Gfn, level: Level, bits: u64) -> Self {
        let index = index_of(Gfn(gfn.0 | bits), level);
        Entry { table, index, gfn: gfn.rounded_down(level), level, old: table.load(index) }
    }

    /// The same, read again.
    pub(super) fn reread(&self) -> Self {
        Entry { old: self.table.load(self.index), ..*self }
    }

    /// Whether it maps a page.
    pub(super) fn is_leaf(&self) -> bool {
        self.old.is_leaf(self.level)
    }

    /// The table that it leads to.
    pub(super) fn child(&self) -> Option<TableId> {
        self.old.child(self.level)
    }
}

/// An entry as it is shown to whoever looks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EntryView {
    /// The table that it stands in.
    pub table: TableId,
    /// The first frame that it is for.
    pub gfn: Gfn,
    /// The level of its table.
    pub level: Level,
    /// What it is.
    pub spte: Spte,
}

/// A walk over all entries of a range, a table before what it leads to.
pub(super) struct Visit<'a> {
    tables: &'a Tables,
    range: GfnRange,
    min_level: Level,
    bits: u64,
}

impl Mmu {
    /// Visits all entries of a range, in tables of `min_level` and above. What the visitor puts in is walked into.
    pub(super) fn visit<'a>(
        &'a self,
        root: &Root,
        range: GfnRange,
        min_level: Level,
        mut visitor: impl FnMut(TableId, Entry<'a>),
    ) {
        let bits = root.gfn_bits();
        let span = if bits == 0 { root.level().pages() * ENTRIES as u64 } else { bits };
        let Some(range) = range.intersection(GfnRange::new(Gfn(0), span)) else { return };
        let visit = Visit { tables: &self.tables, range, min_level, bits };
        visit.table(root.table(), Gfn(0), root.level(), &mut visitor);
    }

    /// The last entry on the way to a frame.
    pub(super) fn last_entry(&self, root: &Root, gfn: Gfn) -> Entry<'_> {
        let (mut table, mut level) = (root.table(), root.level());
        loop {
            let entry = Entry::read(self.tables.get(table), gfn, level, root.gfn_bits());
            let Some(child) = entry.child() else { return entry };
            (table, level) = (child, level.below());
        }
    }
}

impl<'a> Visit<'a> {
    fn table(&self, id: TableId, base: Gfn, level: Level, visitor: &mut impl FnMut(TableId, Entry<'a>)) {
        let table = self.tables.get(id);
        let all = GfnRange::new(base, level.pages() * ENTRIES as u64);
        let Some(range) = self.range.intersection(all) else { return };
        let mut gfn = range.start.rounded_down(level);
        while gfn < range.end {
            let entry = Entry::read(table, gfn, level, self.bits);
            visitor(id, entry);
            let child = if level > self.min_level { entry.reread().child() } else { None };
            if let Some(child) = child {
                self.table(child, gfn, level.below(), visitor);
            }
            gfn = gfn.plus(level.pages());
        }
    }
}

/// What can be read under the lock, however it is held.
pub trait Walk: Held {
    /// The last entry on the way to a frame, and the level of its table.
    fn walk(&self, root: &Root, gfn: Gfn) -> (Spte, Level) {
        let entry = self.mmu().last_entry(root, gfn);
        (entry.old, entry.level)
    }

    /// Every entry of the range that is not empty, a table before what it leads to.
    fn entries(&self, root: &Root, range: GfnRange) -> Vec<EntryView> {
        let mut entries = Vec::new();
        self.mmu().visit(root, range, Level::SMALL, |table, entry| {
            if entry.old != Spte::EMPTY {
                entries.push(EntryView { table, gfn: entry.gfn, level: entry.level, spte: entry.old });
            }
        });
        entries
    }
}

impl<T: Held> Walk for T {}
