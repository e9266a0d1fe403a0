//! The processor's side: a guest's access walks the tables, and sets accessed and dirty bits.
//!
//! And what KVM does for the processor outside the lock proper ("fast page fault"): an access that was withheld only so
//! that it is noticed is given back by one exchange. Neither maps anything. Mirrored tables are not walked by a processor
//! at all; their external side is.

use super::lock::{Held, Shared};
use super::map::{DirtyLog, MapResult};
use super::{AccessKind, ENTRIES, Mirroring, Root, Spte};
use crate::units::{Gfn, Level, Pfn};

/// Where an access went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The frame of that very page.
    pub pfn: Pfn,
    /// The size of the page.
    pub level: Level,
    /// The leaf, after the access.
    pub spte: Spte,
    /// Whether the page was clean until now. A processor that logs dirty pages itself ("PML") logs it.
    pub is_newly_dirty: bool,
}

/// Why an access went nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Violation {
    /// Nothing is there.
    NotPresent,
    /// Something is there, but not for this.
    Protected,
    /// An entry says that there is no memory, as of this generation of memslots.
    Mmio {
        /// The generation, cut to 18 bits.
        generation: u64,
    },
}

/// A fault that might be mended by giving back what was withheld.
#[derive(Clone, Copy)]
pub struct FastFault<'a> {
    /// Where.
    pub gfn: Gfn,
    /// What the guest wants.
    pub kind: AccessKind,
    /// Whether something was there, but not for this ([`Violation::Protected`]). A pre-fault says no.
    pub is_present: bool,
    /// The log of the memslot, if one is kept.
    pub dirty_log: Option<&'a dyn DirtyLog>,
}

/// How often the fast path tries, before it leaves it to the slow one.
const FAST_ATTEMPTS: usize = 5;

impl Shared<'_> {
    /// What the processor does for an access of the guest's. The translation's cache is not modelled: no access goes by
    /// an entry that is gone.
    pub fn hardware_access(&self, root: &Root, gfn: Gfn, kind: AccessKind) -> Result<Translation, Violation> {
        assert_eq!(root.mirroring(), Mirroring::Direct, "the processor walks the external table");
        // KVM loses the bits above the root's, the processor looks at them.
        if gfn.0 >= root.level().pages() * ENTRIES as u64 {
            return Err(Violation::NotPresent);
        }
        loop {
            let entry = self.mmu().last_entry(root, gfn);
            let (old, level) = (entry.old, entry.level);
            if let Some(generation) = old.mmio_generation() {
                return Err(Violation::Mmio { generation });
            }
            if old.is_not_present_for_hardware() {
                return Err(Violation::NotPresent);
            }
            if !old.allows(kind) {
                return Err(Violation::Protected);
            }
            let new = old.after(kind);
            if new == old || entry.table.replace(entry.index, old, new).is_ok() {
                let pfn = new.pfn().plus(gfn.0 & (level.pages() - 1));
                let is_newly_dirty = new.is_dirty() && !old.is_dirty();
                return Ok(Translation { pfn, level, spte: new, is_newly_dirty });
            }
        }
    }

    /// Tries to mend a fault without looking at memslots or the host. Says whether it was mended by this, or by itself;
    /// `None` is for the slow path.
    pub fn fix_fast(&self, root: &Root, fault: &FastFault<'_>) -> Option<MapResult> {
        let accessed_dirty = root.role().accessed_dirty;
        let can_be_fast = if fault.is_present { fault.kind == AccessKind::Write } else { !accessed_dirty };
        if !can_be_fast || root.mirroring() == Mirroring::Mirror {
            return None;
        }
        for _ in 0..FAST_ATTEMPTS {
            let entry = self.mmu().last_entry(root, fault.gfn);
            if !entry.is_leaf() {
                return None;
            }
            if entry.old.allows(fault.kind) {
                return Some(MapResult::Spurious);
            }
            let new = given_back(entry.old, entry.level, fault)?;
            if entry.table.replace(entry.index, entry.old, new).is_ok() {
                if new.is_writable() && !entry.old.is_writable() {
                    if let Some(log) = fault.dirty_log {
                        log.mark(fault.gfn);
                    }
                }
                return Some(MapResult::Fixed);
            }
        }
        None
    }
}

/// The entry with what was withheld, if that is enough.
fn given_back(old: Spte, level: Level, fault: &FastFault<'_>) -> Option<Spte> {
    let mut new = if old.is_access_tracked() { old.restored() } else { old };
    if fault.kind == AccessKind::Write && old.is_mmu_writable() {
        // Of a huge page the log would get one page only: it has to be split first.
        if level > Level::SMALL && fault.dirty_log.is_some() {
            return None;
        }
        new = new.made_writable();
    }
    (new != old && new.allows(fault.kind)).then_some(new)
}
