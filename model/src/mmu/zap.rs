//! Taking mappings away.
//!
//! While a virtual machine lives its tables stay: only leafs are zapped, so that what is mapped again finds its tables, and
//! an external table need not be built up anew. A huge page that lies across the edge of a range goes as a whole. Tables go
//! only with their root: when it was invalidated, or when all of it ends.

use super::lock::Exclusive;
use super::{Mirroring, Mmu, Root, RootFilter, Spte};
use crate::units::{GfnRange, Level};

impl Exclusive<'_> {
    /// Zaps the leafs of a range. Says whether there were any in roots that are in use, for the processors would then
    /// have to be told.
    pub fn zap_leafs(&mut self, filter: RootFilter, range: GfnRange) -> bool {
        let mut any = false;
        for root in self.matching_roots(filter) {
            any |= self.zap_leafs_of(&root, range) && !root.is_invalid();
        }
        any
    }

    fn zap_leafs_of(&mut self, root: &Root, range: GfnRange) -> bool {
        let mut any = false;
        let mmu = self.mmu_of();
        mmu.visit(root, range, Level::SMALL, |_, entry| {
            if entry.is_leaf() {
                self.change(root.mirroring(), &entry, Spte::EMPTY);
                any = true;
            }
        });
        any
    }

    /// Zaps everything in direct roots, tables too, also where a fast zap is under way: what a notifier asks for that is
    /// told of the end of all memory. Mirrored tables are not for notifiers.
    pub fn zap_all(&mut self) {
        for root in self.matching_roots(RootFilter::EVERYTHING_DIRECT) {
            self.zap_root(&root);
        }
    }

    /// Makes all direct roots invalid: nothing is mapped in them any more, and vCPUs get new ones. The first half of a fast
    /// zap; [`zap_invalidated_roots`](Mmu::zap_invalidated_roots) is the other.
    pub fn invalidate_all_direct_roots(&mut self) {
        self.invalidate(RootFilter::EVERYTHING_DIRECT);
    }

    fn invalidate(&mut self, filter: RootFilter) {
        self.matching_roots(filter).iter().for_each(Root::invalidate);
    }

    /// Leafs first, then tables from the lowest up, as the kernel does it.
    fn zap_root(&mut self, root: &Root) {
        let mmu = self.mmu_of();
        for level in zap_levels(root) {
            mmu.visit(root, GfnRange::ALL, level, |_, entry| {
                if entry.level == level && entry.old.is_present() {
                    self.change(root.mirroring(), &entry, Spte::EMPTY);
                }
            });
        }
    }
}

/// 4 KiB, 2 MiB, 1 GiB, and the root.
fn zap_levels(root: &Root) -> impl Iterator<Item = Level> + use<> {
    let below = Level::OF_PAGES.into_iter();
    let root = root.level();
    below.filter(move |level| *level < root).chain([root])
}

impl Mmu {
    /// Zaps what is left of roots that were invalidated, and forgets them: the second half of a fast zap. Others may map in
    /// other roots meanwhile.
    pub fn zap_invalidated_roots(&self) {
        let shared = self.lock_shared();
        for root in self.roots().iter().filter(|root| root.is_invalid()) {
            assert_eq!(
                root.mirroring(),
                Mirroring::Direct,
                "mirrored tables are not zapped under a shared lock"
            );
            for level in zap_levels(root) {
                self.visit(root, GfnRange::ALL, level, |_, mut entry| {
                    while entry.level == level && entry.old.is_present() {
                        match shared.change(root.mirroring(), &entry, Spte::EMPTY) {
                            Ok(()) => return,
                            Err(_) => entry = entry.reread(),
                        }
                    }
                });
            }
            self.forget(root);
        }
    }

    /// Ends everything: zaps all roots and frees all tables, the external ones too.
    pub fn destroy(&self) {
        let mut exclusive = self.lock_exclusive();
        exclusive.invalidate(RootFilter::EVERYTHING);
        for root in self.roots() {
            exclusive.zap_root(&root);
            self.forget(&root);
        }
    }
}
