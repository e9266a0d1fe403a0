//! Changing an entry: the only code that does, but for the bits that the processor and the fast path set.
//!
//! A change is more than a store. Pages are counted, a table that goes takes everything below it along, and of a mirrored
//! table the external one must follow. Under the shared lock others change entries at the same time, so a mirrored entry is
//! frozen first: compared and exchanged for a value that nobody overwrites. Then the external table is asked, and only then
//! is the new value visible, or the old one again. So no one can put something below a table that the external side does not
//! have yet. Under the exclusive lock there is nobody to freeze an entry for: it is cleared first, so that no walk finds what
//! is being taken away, and the external table must then comply.
//!
//! An entry that maps a page is never made to map another page here: it must have been cleared in between.

use super::external::Change;
use super::lock::Exclusive;
use super::lock::{Held, Shared};
use super::walk::Entry;
use super::{ENTRIES, ExternalError, Mirroring, Mmu, Spte, TableId};
use crate::sync::spin;
use crate::units::{Gfn, Level};

/// Why an entry was not changed. It is what it was, or what another has made of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NotChanged {
    /// Another was faster.
    Raced,
    /// The external table did not take the change.
    External(ExternalError),
}

impl Shared<'_> {
    /// Changes an entry that others may want to change too.
    pub(super) fn change(
        &self,
        mirroring: Mirroring,
        entry: &Entry<'_>,
        new: Spte,
    ) -> Result<(), NotChanged> {
        self.mmu().change_atomic(mirroring, entry, new)
    }
}

impl Exclusive<'_> {
    /// Changes an entry that nobody else can change now.
    pub(super) fn change(&mut self, mirroring: Mirroring, entry: &Entry<'_>, new: Spte) {
        let old = entry.table.swap(entry.index, new);
        let change = Change { gfn: entry.gfn, level: entry.level, old, new };
        self.mmu().follow_up_or_die(mirroring, &change, Lock::Exclusive);
    }
}

impl Mmu {
    pub(super) fn change_atomic(
        &self,
        mirroring: Mirroring,
        entry: &Entry<'_>,
        new: Spte,
    ) -> Result<(), NotChanged> {
        let Entry { table, index, gfn, level, old } = *entry;
        assert!(!old.is_frozen() && !new.is_frozen(), "frozen is not for what lasts");
        let change = Change { gfn, level, old, new };
        match mirroring {
            Mirroring::Direct => {
                table.replace(index, old, new).map_err(|_| NotChanged::Raced)?;
                self.follow_up_or_die(mirroring, &change, Lock::Shared);
                Ok(())
            }
            Mirroring::Mirror => {
                table.replace(index, old, Spte::FROZEN).map_err(|_| NotChanged::Raced)?;
                let result = self.follow_up(mirroring, &change, Lock::Shared);
                table.store(index, if result.is_ok() { new } else { old });
                result.map_err(NotChanged::External)
            }
        }
    }

    /// Does what cannot fail.
    fn follow_up_or_die(&self, mirroring: Mirroring, change: &Change, lock: Lock) {
        if let Err(error) = self.follow_up(mirroring, change, lock) {
            self.report_bug(|| format!("the external table failed to follow ({error:?}): {change:?}"));
        }
    }

    /// What a change brings with it.
    fn follow_up(&self, mirroring: Mirroring, change: &Change, lock: Lock) -> Result<(), ExternalError> {
        let Change { gfn, level, old, new } = *change;
        if old == new {
            return Ok(());
        }
        let (was_leaf, is_leaf) = (old.is_leaf(level), new.is_leaf(level));
        assert!(
            !(was_leaf && is_leaf && old.pfn() != new.pfn()),
            "a page is mapped in another's place: {change:?}"
        );
        if !old.is_present() && !new.is_present() {
            return Ok(());
        }
        match old.child(level) {
            Some(child) if is_leaf || !new.is_present() => {
                self.remove_table(mirroring, child, gfn, level.below(), lock);
            }
            _ if mirroring == Mirroring::Mirror => self.external().set(change)?,
            _ => {}
        }
        if is_leaf != was_leaf {
            self.counts.add(level, if is_leaf { 1 } else { -1 });
        }
        Ok(())
    }

    /// Takes a table out of use that no entry leads to any more, with everything below it.
    ///
    /// Others who hold the lock shared may have come to it before: each entry is frozen, so that they put in nothing new.
    fn remove_table(&self, mirroring: Mirroring, id: TableId, base: Gfn, level: Level, lock: Lock) {
        let table = self.tables.get(id);
        for index in 0..ENTRIES {
            let old = match lock {
                Lock::Shared => loop {
                    let old = table.swap(index, Spte::FROZEN);
                    if !old.is_frozen() {
                        break old;
                    }
                    // Whoever froze it will unfreeze it, over what was stored here.
                    spin();
                },
                Lock::Exclusive => table.swap(index, Spte::FROZEN),
            };
            if old.is_present() {
                let gfn = base.plus(index as u64 * level.pages());
                let change = Change { gfn, level, old, new: Spte::FROZEN };
                self.follow_up_or_die(mirroring, &change, lock);
            }
        }
        if mirroring == Mirroring::Mirror {
            if let Err(error) = self.external().free(base, level) {
                self.report_bug(|| format!("the external table did not free {base:?}, {level:?}: {error:?}"));
            }
        }
        self.tables.retire(id);
    }
}

/// How the lock is held.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lock {
    Shared,
    Exclusive,
}
