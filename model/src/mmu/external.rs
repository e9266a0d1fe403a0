//! What a mirrored table is kept equal to.
//!
//! A guest of some kinds is run on page tables that KVM can neither read nor write but by asking: every change of an entry
//! is a request. KVM keeps a copy that it can walk, the mirror, and each change of the mirror becomes one request. What is
//! on the other side is behind this trait, and what it is for is none of the MMU's business.

use super::{Spte, TableId};
use crate::units::{Gfn, Level, Pfn};
use std::collections::{BTreeMap, BTreeSet};

/// A change of an entry in a mirrored table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The first frame that the entry is for.
    pub gfn: Gfn,
    /// The level of the table that the entry stands in.
    pub level: Level,
    /// What it was.
    pub old: Spte,
    /// What it becomes. An entry of a table that goes as a whole stays frozen.
    pub new: Spte,
}

/// What a change asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    /// A page is mapped.
    MapPage {
        /// The frame of the page.
        pfn: Pfn,
    },
    /// A table of the level below is put in.
    AddTable {
        /// The mirror's own table that it is the external side of.
        table: TableId,
    },
    /// A page is taken away.
    RemovePage {
        /// The frame of the page.
        pfn: Pfn,
    },
    /// Another leaf of the same page.
    ChangePage,
}

impl Change {
    /// What it asks for.
    pub fn request(&self) -> Request {
        let (was_leaf, is_leaf) = (self.old.is_leaf(self.level), self.new.is_leaf(self.level));
        match (was_leaf, is_leaf, self.new.child(self.level)) {
            (true, true, _) => Request::ChangePage,
            (true, false, _) => Request::RemovePage { pfn: self.old.pfn() },
            (false, true, _) => Request::MapPage { pfn: self.new.pfn() },
            (false, false, Some(table)) => Request::AddTable { table },
            (false, false, None) => unreachable!("tables that go are not changes: {self:?}"),
        }
    }
}

/// Why a change was not made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExternalError {
    /// Someone else is at it. Trying again may help.
    Busy,
    /// It will never be made: the virtual machine is dead.
    Fatal,
}

/// What mirrored tables are kept equal to.
pub trait ExternalTable: Send + Sync {
    /// A mirrored entry changes.
    ///
    /// When something is put in, the MMU lock is held shared and the mirror's entry is frozen: no other call comes for the
    /// same entry, nor for anything below it, until this one has returned. When something is taken away, the lock is held
    /// exclusively, the mirror's entry is already cleared, and this must not fail.
    fn set(&self, change: &Change) -> Result<(), ExternalError>;

    /// A table below the root is no longer used: the one of `level` whose first frame is `gfn`. Everything below it was
    /// taken away. Must not fail.
    fn free(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError>;

    /// What it has, for checks. Nothing for one that cannot be looked into.
    fn contents(&self) -> Option<Contents> {
        None
    }
}

/// What an external table has.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Contents {
    /// Pages that are mapped, by guest frame.
    pub pages: BTreeMap<Gfn, Pfn>,
    /// Tables below the root: the first frame of each, and its level.
    pub tables: BTreeSet<(Gfn, Level)>,
}
