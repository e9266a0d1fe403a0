//! What dirty logging asks of the tables: that writes are noticed, page by page.
//!
//! Huge pages are split before they are logged, and put together again when the log ends. None of this maps anything or
//! takes anything away that the guest could read. Mirrored tables are not logged, since the host could not read what was
//! written.

use super::lock::{Exclusive, Held, Shared};
use super::walk::Entry;
use super::{Mirroring, Mmu, Root, RootFilter, Spte};
use crate::units::{Gfn, GfnRange, Level};

/// Frames that one word of a dirty bitmap is for.
const WORD: u64 = u64::BITS as u64;

impl Shared<'_> {
    /// Withholds writing from the leafs of a range that are of `min_level` or larger. Says whether there were any.
    pub fn write_protect(&self, as_id: usize, range: GfnRange, min_level: Level) -> bool {
        let protect = |entry: &Entry<'_>| {
            (entry.is_leaf() && entry.old.is_writable()).then(|| entry.old.write_protected())
        };
        self.mmu().change_all(as_id, range, min_level, |_, entry| protect(entry))
    }

    /// Makes the leafs of a range clean, so that the processor notes the next write, or else we do.
    pub fn clear_dirty(&self, as_id: usize, range: GfnRange) -> bool {
        self.mmu().change_all(as_id, range, Level::SMALL, |_, entry| {
            let clean = noticing_writes(entry.old, false);
            (entry.is_leaf() && clean != entry.old).then_some(clean)
        })
    }

    /// Splits all huge pages in a range that are larger than `target`.
    pub fn split_huge_pages(&self, as_id: usize, range: GfnRange, target: Level) {
        self.mmu().split_all(as_id, range, target);
    }

    /// Puts huge leafs in the place of tables wherever `max_level` allows it, which is asked of the first frame of each
    /// table's range. Since 6.13 this is how a log ends.
    pub fn recover_huge_pages(
        &self,
        as_id: usize,
        range: GfnRange,
        max_level: impl Fn(Gfn) -> Level,
    ) -> bool {
        self.mmu().change_collapsible(as_id, range, max_level, |root, entry| {
            Some(self.mmu().first_leaf_below(root, entry)?.made_huge(entry.level))
        })
    }

    /// Takes out the tables that a huge leaf could be in place of, so that the next fault maps one. Up to 6.12 this is how
    /// a log ends.
    pub fn zap_collapsible(&self, as_id: usize, range: GfnRange, max_level: impl Fn(Gfn) -> Level) -> bool {
        self.mmu().change_collapsible(as_id, range, max_level, |_, _| Some(Spte::EMPTY))
    }
}

impl Exclusive<'_> {
    /// Makes 4K leafs clean again: those of the frames from `gfn` on whose bits are set in `mask`. Whoever has no dirty bits,
    /// or asks for it by `write_protect`, withholds writing.
    pub fn clear_dirty_masked(&mut self, as_id: usize, gfn: Gfn, mask: u64, write_protect: bool) {
        let range = GfnRange::new(gfn, WORD);
        self.mmu().change_all(as_id, range, Level::SMALL, |_, entry| {
            let is_meant = entry.level == Level::SMALL && mask >> (entry.gfn.0 - gfn.0) & 1 != 0;
            let clean = noticing_writes(entry.old, write_protect);
            (is_meant && entry.is_leaf() && clean != entry.old).then_some(clean)
        });
    }

    /// Withholds writing from the leaf of a frame, if it is of `min_level` or larger, until a fault has been looked into:
    /// it will not be given back on the fast path.
    pub fn write_protect_gfn(&mut self, as_id: usize, gfn: Gfn, min_level: Level) -> bool {
        self.mmu().change_all(as_id, GfnRange::new(gfn, 1), min_level, |_, entry| {
            let tracked = entry.old.write_tracked();
            (entry.is_leaf() && tracked != entry.old).then_some(tracked)
        })
    }

    /// Splits all huge pages in a range that are larger than `target`.
    pub fn split_huge_pages(&mut self, as_id: usize, range: GfnRange, target: Level) {
        self.mmu().split_all(as_id, range, target);
    }
}

/// The same leaf, so that the next write is noticed: by the processor if it can, else by a fault.
fn noticing_writes(leaf: Spte, write_protect: bool) -> Spte {
    if write_protect || !leaf.has_accessed_dirty() { leaf.write_protected() } else { leaf.clean() }
}

impl Mmu {
    /// Roots that logs are kept of.
    fn logged_roots(&self, as_id: usize) -> impl Iterator<Item = Root> + use<> {
        let filter = RootFilter { invalid: false, ..RootFilter::direct(as_id) };
        self.roots().into_iter().filter(move |root| filter.is_for(root))
    }

    /// Changes all entries of a range, in tables of `min_level` and above, to what `to` makes of them, however often
    /// another changes them meanwhile. Says whether any was.
    fn change_all(
        &self,
        as_id: usize,
        range: GfnRange,
        min_level: Level,
        to: impl Fn(&Root, &Entry<'_>) -> Option<Spte>,
    ) -> bool {
        let mut any = false;
        for root in self.logged_roots(as_id) {
            self.visit(&root, range, min_level, |_, mut entry| {
                while let Some(new) = to(&root, &entry) {
                    if self.change_atomic(Mirroring::Direct, &entry, new).is_ok() {
                        any = true;
                        break;
                    }
                    entry = entry.reread();
                }
            });
        }
        any
    }

    fn split_all(&self, as_id: usize, range: GfnRange, target: Level) {
        for root in self.logged_roots(as_id) {
            self.visit(&root, range, target.above(), |_, mut entry| {
                while entry.is_leaf() && self.split(&root, &entry).is_err() {
                    entry = entry.reread();
                }
            });
        }
    }

    /// Changes entries that lead to tables which a huge leaf could be in place of.
    fn change_collapsible(
        &self,
        as_id: usize,
        range: GfnRange,
        max_level: impl Fn(Gfn) -> Level,
        to: impl Fn(&Root, &Entry<'_>) -> Option<Spte>,
    ) -> bool {
        self.change_all(as_id, range, Level::HUGE, |root, entry| {
            let could_be_huge = entry.child().is_some()
                && entry.level <= Level::GIGANTIC
                && range.contains(entry.gfn)
                && max_level(entry.gfn) >= entry.level;
            if could_be_huge { to(root, entry) } else { None }
        })
    }

    fn first_leaf_below(&self, root: &Root, entry: &Entry<'_>) -> Option<Spte> {
        let mut first = None;
        self.visit(root, GfnRange::of_page(entry.gfn, entry.level), Level::SMALL, |_, below| {
            if first.is_none() && below.level < entry.level && below.is_leaf() {
                first = Some(below.old);
            }
        });
        first
    }
}
