//! What page tables hold at one moment, as plain data.
//!
//! Whoever shows tables to someone, in words or drawn, begins here. Nothing is judged, which is what `invariants.rs` is for,
//! and nothing is changed.

use super::walk::Entry;
use super::{EntryView, Mmu, Role, Root, Spte, TableId};
use crate::units::{GfnRange, Level};

/// A root, and everything below it that is not empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RootDump {
    /// Its role, which says whether its tables are mirrors.
    pub role: Role,
    /// Whether it is out of use.
    pub is_invalid: bool,
    /// The level of its table.
    pub level: Level,
    /// Its table.
    pub table: TableId,
    /// By addresses, each table before what is in it.
    pub entries: Vec<EntryView>,
}

impl RootDump {
    /// Under the lock, or while everyone at the tables is stopped.
    pub(super) fn of(mmu: &Mmu, root: &Root) -> Self {
        let mut entries = Vec::new();
        mmu.visit(root, GfnRange::ALL, Level::SMALL, |table, Entry { gfn, level, old, .. }| {
            if old != Spte::EMPTY {
                entries.push(EntryView { table, gfn, level, spte: old });
            }
        });
        RootDump {
            role: root.role(),
            is_invalid: root.is_invalid(),
            level: root.level(),
            table: root.table(),
            entries,
        }
    }
}

impl Mmu {
    /// All roots, in the order in which they were made. Waits for whoever holds the lock exclusively; others may map
    /// meanwhile, and what they do may be in it or not.
    pub fn dump(&self) -> Vec<RootDump> {
        let _lock = self.lock_shared();
        self.dump_of_stopped()
    }

    /// All roots without the lock: what someone who holds it exclusively has done so far. Only while everyone at the tables is
    /// stopped, for a table that is used again under the reader's hands makes no sense to it.
    pub fn dump_of_stopped(&self) -> Vec<RootDump> {
        self.roots().iter().map(|root| RootDump::of(self, root)).collect()
    }
}
