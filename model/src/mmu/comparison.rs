//! The design that was not chosen, and where it goes wrong.
//!
//! An earlier proposal for guests whose private memory is mapped by an external table had no mirrored tables. Whoever
//! changed an entry looked at the *access* that led to it: if that was private, the external table was told too. It reads
//! well where a fault maps a page, for there an access is at hand. But most changes come with no access at all:
//!
//! - A hole is punched in a guest_memfd, a slot goes, attributes change: pages are zapped by range. What is the access of a
//!   zap? If it counts as not private, the external table keeps pages whose frames are given away. If it counts as private,
//!   the host's own notifiers, which mean shared pages, take pages from the external table that it does not have.
//! - Private accesses are not only made by guests with external tables. Those of an SNP guest go through ordinary tables;
//!   a test of the access alone calls an external table that is not there.
//! - A table holds no trace of what kind it is, so nothing can check that it agrees with anything.
//!
//! Made a property of the *table*, all three answer themselves: the root of the walk says it, and whatever is below it
//! inherits it. This is [`Mirroring`](super::Mirroring); the access only chooses the root. Here is the other design, as
//! small as it can be, for its tests to show the cases that it gets wrong beside ours, which gets them right, and for these
//! to be drawn. No virtual machine uses it.

use super::{
    AccessKind, Change, ExternalTable, MapResult, Mapping, Mirroring, Mmu, PlainCopy, Role, Root, RootDump,
    RootFilter, Settings, Spte, Walk,
};
use crate::units::{Gfn, GfnRange, Level, Pfn, Privacy};
use std::sync::Arc;

const LEVELS: u8 = 4;

fn role(smm: bool, mirroring: Mirroring) -> Role {
    Role { smm, guest_mode: false, accessed_dirty: true, levels: LEVELS, mirroring, gfn_bits: Gfn(0) }
}

fn mapping(gfn: Gfn, pfn: Pfn) -> Mapping<'static> {
    Mapping {
        gfn,
        pfn,
        goal_level: Level::SMALL,
        kind: AccessKind::Write,
        is_prefetch: false,
        is_writable: true,
        dirty_log: None,
    }
}

/// What zapped a range, and what each design may know of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Zap {
    /// A hole in a guest_memfd: private pages.
    GuestMemfd,
    /// The host's notifier: shared pages.
    Notifier,
}

/// A design: who is told when a page is mapped, and when a range is zapped.
pub trait Design {
    /// An access finds nothing mapped, and gets this frame. Says what the external table refused.
    fn fault(&self, privacy: Privacy, gfn: Gfn, pfn: Pfn) -> Result<(), String>;

    /// What was mapped goes. Says what the external table refused.
    fn zap(&self, why: Zap, range: GfnRange) -> Result<(), String>;

    /// The external table.
    fn external(&self) -> &PlainCopy;

    /// Everything in KVM's own tables: those of shared accesses, and those of private ones.
    fn tables(&self) -> [RootDump; 2];

    /// What is mapped for private accesses, as KVM sees it.
    fn private_page(&self, gfn: Gfn) -> Option<Pfn> {
        let [_, private] = self.tables();
        let is_it = |gfn_of: Gfn, level: Level| level == Level::SMALL && gfn_of == gfn;
        private.entries.iter().find(|entry| is_it(entry.gfn, entry.level)).map(|entry| entry.spte.pfn())
    }
}

/// Ours: the table says whether it is mirrored.
pub struct ByTable {
    mmu: Mmu,
    shared: Root,
    private: Root,
    external: Arc<PlainCopy>,
}

/// The other: the access says whether the external table is told. Of a zap it knows only what it was made to assume.
pub struct ByAccess {
    mmu: Mmu,
    shared: Root,
    private: Root,
    external: Arc<PlainCopy>,
    assumed_of_zaps: Privacy,
}

fn new_external() -> Arc<PlainCopy> {
    Arc::new(PlainCopy::new(Level::new(LEVELS)))
}

const SETTINGS: Settings = Settings { keeps_present_leafs: true };

impl Default for ByTable {
    fn default() -> Self {
        ByTable::new()
    }
}

impl ByTable {
    /// One with nothing mapped.
    pub fn new() -> Self {
        let external = new_external();
        let mmu = Mmu::new(SETTINGS, Some(external.clone()));
        let (shared, private) =
            (mmu.root(role(false, Mirroring::Direct)), mmu.root(role(false, Mirroring::Mirror)));
        Self { mmu, shared, private, external }
    }
}

impl ByAccess {
    /// One with nothing mapped, which takes every zap for one of such pages.
    pub fn new(assumed_of_zaps: Privacy) -> Self {
        let mmu = Mmu::new(SETTINGS, None);
        // Two roots, of which nothing says that they are of two kinds.
        let (shared, private) =
            (mmu.root(role(false, Mirroring::Direct)), mmu.root(role(true, Mirroring::Direct)));
        Self { mmu, shared, private, external: new_external(), assumed_of_zaps }
    }

    /// Tells the external table of a page's table, as far as it was not told yet, and of the page.
    fn tell(&self, gfn: Gfn, old: Spte, new: Spte) -> Result<(), String> {
        let lock = self.mmu.lock_shared();
        let way = lock.entries(&self.private, GfnRange::new(gfn, 1));
        let known = self.external.contents().unwrap_or_default().tables;
        for entry in way.iter().filter(|entry| entry.level > Level::SMALL) {
            if !known.contains(&(entry.gfn, entry.level.below())) {
                let change = Change { gfn: entry.gfn, level: entry.level, old: Spte::EMPTY, new: entry.spte };
                self.external.set(&change).map_err(|error| format!("{change:?}: {error:?}"))?;
            }
        }
        let change = Change { gfn, level: Level::SMALL, old, new };
        self.external.set(&change).map_err(|error| format!("{change:?}: {error:?}"))
    }
}

fn fixed(result: MapResult) -> Result<(), String> {
    if result == MapResult::Fixed { Ok(()) } else { Err(format!("{result:?}")) }
}

fn dumps(mmu: &Mmu, roots: [&Root; 2]) -> [RootDump; 2] {
    let _lock = mmu.lock_shared();
    roots.map(|root| RootDump::of(mmu, root))
}

impl Design for ByTable {
    fn fault(&self, privacy: Privacy, gfn: Gfn, pfn: Pfn) -> Result<(), String> {
        let root = if privacy == Privacy::Private { &self.private } else { &self.shared };
        fixed(self.mmu.lock_shared().map(root, &mapping(gfn, pfn)))
    }

    fn zap(&self, why: Zap, range: GfnRange) -> Result<(), String> {
        let filter = match why {
            Zap::GuestMemfd => RootFilter::mirror(0),
            Zap::Notifier => RootFilter::direct(0),
        };
        self.mmu.lock_exclusive().zap_leafs(filter, range);
        self.mmu.bug().map_or(Ok(()), |bug| Err(bug.into()))
    }

    fn external(&self) -> &PlainCopy {
        &self.external
    }

    fn tables(&self) -> [RootDump; 2] {
        dumps(&self.mmu, [&self.shared, &self.private])
    }
}

impl Design for ByAccess {
    fn fault(&self, privacy: Privacy, gfn: Gfn, pfn: Pfn) -> Result<(), String> {
        let root = if privacy == Privacy::Private { &self.private } else { &self.shared };
        fixed(self.mmu.lock_shared().map(root, &mapping(gfn, pfn)))?;
        if privacy == Privacy::Private {
            let (new, _) = self.mmu.lock_shared().walk(root, gfn);
            self.tell(gfn, Spte::EMPTY, new)?;
        }
        Ok(())
    }

    fn zap(&self, _: Zap, range: GfnRange) -> Result<(), String> {
        let before: Vec<_> = [&self.shared, &self.private]
            .into_iter()
            .flat_map(|root| self.mmu.lock_shared().entries(root, range))
            .filter(|entry| entry.spte.is_leaf(entry.level))
            .collect();
        self.mmu.lock_exclusive().zap_leafs(RootFilter::EVERYTHING, range);
        if self.assumed_of_zaps == Privacy::Private {
            for entry in before {
                self.tell(entry.gfn, entry.spte, Spte::EMPTY)?;
            }
        }
        Ok(())
    }

    fn external(&self) -> &PlainCopy {
        &self.external
    }

    fn tables(&self) -> [RootDump; 2] {
        dumps(&self.mmu, [&self.shared, &self.private])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: GfnRange = GfnRange::new(Gfn(7), 1);

    fn agree(design: &dyn Design) -> bool {
        design.private_page(PAGE.start) == design.external().page(PAGE.start)
    }

    fn designs() -> [(&'static str, Box<dyn Design>); 3] {
        [
            ("by table", Box::new(ByTable::new())),
            ("by access, zaps not private", Box::new(ByAccess::new(Privacy::Shared))),
            ("by access, zaps private", Box::new(ByAccess::new(Privacy::Private))),
        ]
    }

    #[test]
    fn all_designs_map_a_private_page_on_both_sides() {
        for (name, design) in designs() {
            design.fault(Privacy::Private, PAGE.start, Pfn(42)).unwrap();
            assert_eq!(design.external().page(PAGE.start), Some(Pfn(42)), "{name}");
            assert!(agree(&*design), "{name}");
        }
    }

    #[test]
    fn a_hole_in_a_guest_memfd_comes_with_no_access() {
        let stale: Vec<_> = designs()
            .iter()
            .filter(|(_, design)| {
                design.fault(Privacy::Private, PAGE.start, Pfn(42)).unwrap();
                design.zap(Zap::GuestMemfd, PAGE).unwrap();
                !agree(&**design)
            })
            .map(|(name, _)| *name)
            .collect();
        // There the guest still has a frame that is someone else's by now.
        assert_eq!(stale, ["by access, zaps not private"]);
    }

    #[test]
    fn a_notifier_comes_with_no_access_either() {
        let failed: Vec<_> = designs()
            .iter()
            .filter(|(_, design)| {
                design.fault(Privacy::Shared, PAGE.start, Pfn(42)).unwrap();
                design.zap(Zap::Notifier, PAGE).is_err()
            })
            .map(|(name, _)| *name)
            .collect();
        // There a page is taken from the external table that was never in it.
        assert_eq!(failed, ["by access, zaps private"]);
    }

    #[test]
    fn a_notifier_leaves_private_pages_alone() {
        let lost: Vec<_> = designs()
            .iter()
            .filter(|(_, design)| {
                design.fault(Privacy::Private, PAGE.start, Pfn(42)).unwrap();
                _ = design.zap(Zap::Notifier, PAGE);
                design.private_page(PAGE.start).is_none()
            })
            .map(|(name, _)| *name)
            .collect();
        // A table does not say that it is none of a notifier's business.
        assert_eq!(lost, ["by access, zaps not private", "by access, zaps private"]);
    }
}
