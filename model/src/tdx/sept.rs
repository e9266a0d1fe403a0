//! The secure EPT: the page tables that the processor walks for a TDX guest's private memory.
//!
//! Only the module can reach them. They are a tree of tables of their own, which nothing here keeps equal to KVM's mirror:
//! whether they are is what tests compare. No rule of a SEAMCALL stands here, but what a table is and how it is walked.

use std::sync::{Arc, PoisonError};

use super::status::{Operand, Status};
use crate::mmu::INDEX_BITS;
use crate::sync::plain::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use crate::units::{Gfn, Level, Pfn};

/// The page of memory that a table of the secure EPT is made of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SeptPage(pub u64);

/// What the guest can do with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageState {
    /// Use it.
    Mapped,
    /// Accept it.
    Pending,
}

/// An entry of a table.
#[derive(Clone, Debug, Default)]
pub enum Entry {
    /// Nothing.
    #[default]
    Free,
    /// A table of the level below.
    Table {
        /// The table.
        table: Arc<Table>,
        /// What it is made of.
        page: SeptPage,
        /// The guest cannot get through: since which epoch.
        blocked_at: Option<u64>,
    },
    /// A page.
    Page {
        /// Its frame.
        pfn: Pfn,
        /// What the guest can do with it, once it is not blocked.
        state: PageState,
        /// The guest cannot do it: since which epoch.
        blocked_at: Option<u64>,
    },
}

/// A table.
#[derive(Debug)]
pub struct Table {
    level: Level,
    entries: RwLock<Box<[Entry]>>,
}

/// How a walk ended that did not get to where it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalkFailed;

impl From<WalkFailed> for Status {
    fn from(_: WalkFailed) -> Self {
        Status::EPT_WALK_FAILED.of(Operand::Rcx)
    }
}

impl Table {
    /// A table with nothing in it, whose entries are of this level.
    pub fn new(level: Level) -> Self {
        Table { level, entries: RwLock::new((0..1 << INDEX_BITS).map(|_| Entry::Free).collect()) }
    }

    /// The level of its entries.
    pub const fn level(&self) -> Level {
        self.level
    }

    /// The table below (or this one) whose entries are of `level`, towards a frame.
    pub fn walk(self: &Arc<Self>, gfn: Gfn, level: Level) -> Result<Arc<Table>, WalkFailed> {
        let mut table = Arc::clone(self);
        while table.level > level {
            let Entry::Table { table: below, .. } = table.entry(gfn) else { return Err(WalkFailed) };
            table = below;
        }
        Ok(table)
    }

    /// What the guest finds for a frame: the page's frame and what can be done with it.
    pub fn translate(self: &Arc<Self>, gfn: Gfn) -> Option<(Pfn, PageState)> {
        let mut table = Arc::clone(self);
        loop {
            match table.entry(gfn) {
                Entry::Table { table: below, blocked_at: None, .. } => table = below,
                Entry::Page { pfn, state, blocked_at: None } => return Some((pfn, state)),
                _ => return None,
            }
        }
    }

    /// A copy of the entry for a frame.
    pub fn entry(&self, gfn: Gfn) -> Entry {
        self.read()[self.index(gfn)].clone()
    }

    /// Looks at the entry for a frame and changes it, while nobody else does.
    pub fn with_entry<R>(&self, gfn: Gfn, change: impl FnOnce(&mut Entry) -> R) -> R {
        change(&mut self.write()[self.index(gfn)])
    }

    /// Whether nothing is in it.
    pub fn is_free(&self) -> bool {
        self.read().iter().all(|entry| matches!(entry, Entry::Free))
    }

    /// Calls with every entry in and below this table, whose first frame is `start`, that is not free.
    pub fn visit(&self, start: Gfn, seen: &mut dyn FnMut(Gfn, Level, &Entry)) {
        for (index, entry) in self.read().iter().enumerate() {
            let gfn = start.plus(index as u64 * self.level.pages());
            if !matches!(entry, Entry::Free) {
                seen(gfn, self.level, entry);
            }
            if let Entry::Table { table, .. } = entry {
                table.visit(gfn, seen);
            }
        }
    }

    fn index(&self, gfn: Gfn) -> usize {
        (gfn.0 / self.level.pages()) as usize % (1 << INDEX_BITS)
    }

    fn read(&self) -> RwLockReadGuard<'_, Box<[Entry]>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Box<[Entry]>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }
}
