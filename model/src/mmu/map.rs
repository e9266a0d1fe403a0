//! Mapping: what a fault, or a pre-fault, does with the frame that it found.
//!
//! Runs under the shared lock, beside others that do the same. Whoever finds an entry frozen, or changed under its hands,
//! gives up and is retried from the start, where it sees what the other has done. Whether the frame is still the right one
//! is for the caller to have asked, under this same lock.

use super::change::NotChanged;
use super::lock::{Held, Shared};
use super::spte::Leaf;
use super::walk::Entry;
use super::{AccessKind, ENTRIES, ExternalError, Mirroring, Mmu, Root, Spte};
use crate::units::{Gfn, Level, Pfn};

/// Where it is noted that a page can be written from now on, while the memslot's log is kept.
pub trait DirtyLog {
    /// This one.
    fn mark(&self, gfn: Gfn);
}

/// A page to be mapped.
#[derive(Clone, Copy)]
pub struct Mapping<'a> {
    /// Where.
    pub gfn: Gfn,
    /// The frame of that very page, also if it is to be mapped as a part of a huge one.
    pub pfn: Pfn,
    /// The size of the page.
    pub goal_level: Level,
    /// What the guest wants to do. A pre-fault reads.
    pub kind: AccessKind,
    /// Whether nobody accesses it yet: it will not count as accessed, and what is mapped already is left alone.
    pub is_prefetch: bool,
    /// Whether it can be written: the host's own entry allows it, and so does the memslot.
    pub is_writable: bool,
    /// The log of its memslot, if one is kept.
    pub dirty_log: Option<&'a dyn DirtyLog>,
}

/// A page where a fault has found no memslot.
#[derive(Clone, Copy)]
pub struct NoMemory {
    /// Where.
    pub gfn: Gfn,
    /// Of the memslots that were looked at.
    pub generation: u64,
    /// What the guest wants to do. A pre-fault reads.
    pub kind: AccessKind,
    /// Whether nobody accesses it yet.
    pub is_prefetch: bool,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MapResult {
    /// It is mapped.
    Fixed,
    /// It was already.
    Spurious,
    /// Another got in the way, or the external table was busy: to be tried again, from looking up the frame on.
    Retry,
    /// What cannot be. The virtual machine is dead.
    Bug,
}

impl Shared<'_> {
    /// Maps a page.
    pub fn map(&self, root: &Root, mapping: &Mapping<'_>) -> MapResult {
        let target = match self.descend(root, mapping.gfn, mapping.goal_level) {
            Ok(target) => target,
            Err(result) => return result,
        };
        let frame = mapping.pfn.rounded_down(mapping.goal_level);
        if target.is_leaf() && target.old.pfn() != frame {
            return self.bug(|| format!("{:?} is mapped to {:?}, not to {frame:?}", target.gfn, target.old));
        }
        if self.keeps(&target, mapping.kind, mapping.is_prefetch) {
            return MapResult::Spurious;
        }
        let new = self.make_leaf(root, &target, mapping);
        if new.is_writable() {
            if let Some(log) = mapping.dirty_log {
                log.mark(target.gfn);
            }
        }
        if new == target.old {
            return MapResult::Spurious;
        }
        self.install(root, &target, new)
    }

    /// Notes that there is no memory at a frame, as of some memslots. It is spurious where the frame is mapped nevertheless.
    ///
    /// For it can be: another vCPU has seen the next memslots already, and nobody asks here whether these are outdated. (Kernels
    /// that keep the page then warn, as it is not the frame of theirs.)
    pub fn map_mmio(&self, root: &Root, page: &NoMemory) -> MapResult {
        let target = match self.descend(root, page.gfn, Level::SMALL) {
            Ok(target) => target,
            Err(result) => return result,
        };
        if self.keeps(&target, page.kind, page.is_prefetch) {
            return MapResult::Spurious;
        }
        let new = Spte::mmio(page.gfn, page.generation);
        if new == target.old { MapResult::Fixed } else { self.install(root, &target, new) }
    }

    /// Whether what is mapped is all that is wanted, and is left alone.
    fn keeps(&self, target: &Entry<'_>, kind: AccessKind, is_prefetch: bool) -> bool {
        self.mmu().settings.keeps_present_leafs
            && target.is_leaf()
            && (is_prefetch || target.old.allows(kind))
    }

    /// The leaf that a mapping asks for.
    fn make_leaf(&self, root: &Root, target: &Entry<'_>, mapping: &Mapping<'_>) -> Spte {
        let new = Spte::leaf(Leaf {
            pfn: mapping.pfn.rounded_down(target.level),
            level: target.level,
            is_writable: mapping.is_writable,
            is_accessed: !mapping.is_prefetch,
            accessed_dirty: root.role().accessed_dirty,
        });
        // Kernels that make a leaf anew leave the dirty bit of one that could be written already to the processor.
        if target.is_leaf() && target.old.is_writable() { new.clean() } else { new }
    }

    /// The entry of `goal` for a frame. Tables are put in where there are none, and huge pages on the way are split.
    fn descend(&self, root: &Root, gfn: Gfn, goal: Level) -> Result<Entry<'_>, MapResult> {
        if root.is_invalid() {
            return Err(MapResult::Retry);
        }
        if root.mirroring() == Mirroring::Mirror && goal > Level::SMALL {
            return Err(self.bug(|| format!("a huge page for a mirrored table, at {gfn:?}")));
        }
        let (mut id, mut level) = (root.table(), root.level());
        loop {
            let entry = Entry::read(self.mmu().tables.get(id), gfn, level, root.gfn_bits());
            if entry.old.is_frozen() {
                return Err(MapResult::Retry);
            }
            if level == goal {
                return Ok(entry);
            }
            match entry.child() {
                Some(child) => (id, level) = (child, level.below()),
                // And looks again at what is there then.
                None => self.put_table_in(root, &entry)?,
            }
        }
    }

    fn put_table_in(&self, root: &Root, entry: &Entry<'_>) -> Result<(), MapResult> {
        if entry.is_leaf() {
            return match self.mmu().split(root, entry) {
                Ok(()) => Ok(()),
                Err(not_changed) => Err(self.result_of(not_changed)),
            };
        }
        let tables = &self.mmu().tables;
        let child = tables.allocate(entry.gfn, entry.level.below());
        let new = Spte::table(child, root.role().accessed_dirty);
        self.change(root.mirroring(), entry, new).map_err(|not_changed| {
            tables.give_back(child);
            self.result_of(not_changed)
        })
    }

    fn install(&self, root: &Root, target: &Entry<'_>, new: Spte) -> MapResult {
        match self.change(root.mirroring(), target, new) {
            Ok(()) => MapResult::Fixed,
            Err(not_changed) => self.result_of(not_changed),
        }
    }

    fn result_of(&self, not_changed: NotChanged) -> MapResult {
        match not_changed {
            NotChanged::Raced | NotChanged::External(ExternalError::Busy) => MapResult::Retry,
            NotChanged::External(ExternalError::Fatal) => {
                self.bug(|| "the external table refused what it must take".into())
            }
        }
    }

    fn bug(&self, what: impl FnOnce() -> String) -> MapResult {
        self.mmu().report_bug(what);
        MapResult::Bug
    }
}

impl Mmu {
    /// Puts a table of the parts in place of a huge leaf.
    pub(super) fn split(&self, root: &Root, entry: &Entry<'_>) -> Result<(), NotChanged> {
        assert_eq!(root.mirroring(), Mirroring::Direct, "mirrored tables have no huge pages");
        let (tables, level) = (&self.tables, entry.level.below());
        let child = tables.allocate(entry.gfn, level);
        let table = tables.get(child);
        for index in 0..ENTRIES {
            table.store(index, entry.old.small_part(level, index as u64));
        }
        let new = Spte::table(child, root.role().accessed_dirty);
        let result = self.change_atomic(root.mirroring(), entry, new);
        match result {
            Ok(()) => self.counts.add(level, ENTRIES as i64),
            Err(_) => tables.give_back(child),
        }
        result
    }
}
