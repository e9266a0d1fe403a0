//! Tables that are broken on purpose, one way for each invariant that can be seen from tables: what finds nothing here finds
//! nothing.

use super::super::spte::Leaf;
use super::super::{
    AccessKind, Change, Contents, ExternalError, ExternalTable, MapResult, Mapping, Mirroring, Mmu,
    PlainCopy, Request, Role, Root, Settings, Spte,
};
use super::{Check, Dump};
use crate::units::{Gfn, GfnRange, Level, Pfn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Breaks something, and gives what the check of that number says.
pub(crate) type Break = fn() -> Result<(), String>;

/// By the numbers of the list.
pub(crate) const BREAKS: &[(usize, Break)] = &[
    (1, a_page_is_never_put_into_the_external_table),
    (2, the_external_table_loses_a_table),
    (3, || spoiled(Mirroring::Direct, |_| Spte::FROZEN, super::nothing_stays_frozen)),
    (4, || changed(|old| old.write_protected(), super::nothing_changed)),
    (4, || changed(|old| old.write_protected(), super::leafs_are_the_same)),
    (5, || super::one_mapped_it(&[MapResult::Fixed, MapResult::Spurious, MapResult::Fixed])),
    (5, || super::one_mapped_it(&[MapResult::Retry])),
    (6, a_page_takes_another_ones_place),
    (7, a_page_cannot_be_taken_away),
    (8, || spoiled(Mirroring::Mirror, |old| old.write_protected(), super::mirrored_leafs_are_plain)),
    (8, || spoiled(Mirroring::Mirror, |old| old.clean(), super::mirrored_leafs_are_plain)),
    (12, || unlinked(super::tables_are_kept)),
    (12, || unlinked(super::mirrors_are_kept)),
    (13, a_page_is_counted_twice),
    (14, a_huge_page_begins_anywhere),
    (15, || changed(|old| old.after(AccessKind::Read), super::leafs_are_left_alone)),
    (15, || changed(|old| old.write_protected(), super::leafs_are_left_alone)),
    (18, || respelled(|link| link.write_protected())),
    (18, || respelled(|link| link.not_accessed())),
];

const GFN: Gfn = Gfn(0x205);

/// An MMU in which a page is mapped.
fn mapped(mirroring: Mirroring, external: Option<Arc<dyn ExternalTable>>) -> (Mmu, Root) {
    let mmu = Mmu::new(Settings { keeps_present_leafs: true }, external);
    let root = mmu.root(Role {
        smm: false,
        guest_mode: false,
        accessed_dirty: true,
        levels: 4,
        mirroring,
        gfn_bits: Gfn(0),
    });
    assert_eq!(mmu.lock_shared().map(&root, &mapping(GFN, Level::SMALL)), MapResult::Fixed);
    (mmu, root)
}

fn mapping(gfn: Gfn, goal_level: Level) -> Mapping<'static> {
    Mapping {
        gfn,
        pfn: Pfn(gfn.0 + Level::GIGANTIC.pages()),
        goal_level,
        kind: AccessKind::Read,
        is_prefetch: true,
        is_writable: true,
        dirty_log: None,
    }
}

fn plain() -> PlainCopy {
    PlainCopy::new(Level::FOURTH)
}

/// Stores something over the entry that maps a page, which nobody but the tables learns.
fn spoil(mmu: &Mmu, root: &Root, new: impl Fn(Spte) -> Spte) {
    let entry = mmu.last_entry(root, GFN);
    entry.table.store(entry.index, new(entry.old));
}

fn spoiled(mirroring: Mirroring, new: fn(Spte) -> Spte, check: Check) -> Result<(), String> {
    let (mmu, root) = mapped(mirroring, Some(Arc::new(plain())));
    check(&Dump::of(&mmu)).expect("nothing is broken yet");
    spoil(&mmu, &root, new);
    check(&Dump::of(&mmu))
}

fn changed(new: fn(Spte) -> Spte, check: super::Transition) -> Result<(), String> {
    let (mmu, root) = mapped(Mirroring::Direct, None);
    let before = Dump::of(&mmu);
    check(&before, &Dump::of(&mmu)).expect("nothing is broken yet");
    spoil(&mmu, &root, new);
    check(&before, &Dump::of(&mmu))
}

/// Changes every entry that leads to a table of small pages.
fn respell(mmu: &Mmu, root: &Root, new: impl Fn(Spte) -> Spte) {
    mmu.visit(root, GfnRange::ALL, Level::HUGE, |_, entry| {
        if entry.level == Level::HUGE && entry.old.is_present() {
            entry.table.store(entry.index, new(entry.old));
        }
    });
}

fn respelled(new: fn(Spte) -> Spte) -> Result<(), String> {
    let (mmu, root) = mapped(Mirroring::Direct, None);
    super::tables_hang_together(&Dump::of(&mmu)).expect("nothing is broken yet");
    respell(&mmu, &root, new);
    super::tables_hang_together(&Dump::of(&mmu))
}

fn unlinked(check: super::Transition) -> Result<(), String> {
    let (mmu, root) = mapped(Mirroring::Mirror, Some(Arc::new(plain())));
    let before = Dump::of(&mmu);
    check(&before, &Dump::of(&mmu)).expect("nothing is broken yet");
    respell(&mmu, &root, |_| Spte::EMPTY);
    check(&before, &Dump::of(&mmu))
}

/// What an external table does other than it should.
enum Fault {
    ForgetsPages,
    LosesTables,
    KeepsPages,
}

struct Faulty(PlainCopy, Fault);

impl ExternalTable for Faulty {
    fn set(&self, change: &Change) -> Result<(), ExternalError> {
        match (&self.1, change.request()) {
            (Fault::ForgetsPages, Request::MapPage { .. }) => Ok(()),
            (Fault::KeepsPages, Request::RemovePage { .. }) => Err(ExternalError::Busy),
            _ => self.0.set(change),
        }
    }

    fn free(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        self.0.free(gfn, level)
    }

    fn contents(&self) -> Option<Contents> {
        let mut contents = self.0.contents()?;
        if matches!(self.1, Fault::LosesTables) {
            contents.tables.retain(|(_, level)| *level != Level::SMALL);
        }
        Some(contents)
    }
}

fn faulty(fault: Fault) -> (Mmu, Root) {
    mapped(Mirroring::Mirror, Some(Arc::new(Faulty(plain(), fault))))
}

fn a_page_is_never_put_into_the_external_table() -> Result<(), String> {
    super::mirror_equals_external(&Dump::of(&faulty(Fault::ForgetsPages).0))
}

fn the_external_table_loses_a_table() -> Result<(), String> {
    super::external_tables_have_parents(&Dump::of(&faulty(Fault::LosesTables).0))
}

fn a_page_cannot_be_taken_away() -> Result<(), String> {
    let (mmu, root) = faulty(Fault::KeepsPages);
    let filter = crate::mmu::RootFilter::mirror(root.role().as_id());
    mmu.lock_exclusive().zap_leafs(filter, GfnRange::of_page(GFN, Level::SMALL));
    super::check(&mmu)
}

/// Where entries are changed it is asserted, so that such an entry never comes to stand in a table.
fn a_page_takes_another_ones_place() -> Result<(), String> {
    let (mmu, root) = mapped(Mirroring::Direct, None);
    let entry = mmu.last_entry(&root, GFN);
    let other = Spte::leaf(Leaf {
        pfn: Pfn(7),
        level: Level::SMALL,
        is_writable: true,
        is_accessed: false,
        accessed_dirty: true,
    });
    let change = || mmu.lock_exclusive().change(Mirroring::Direct, &entry, other);
    catch_unwind(AssertUnwindSafe(change))
        .map_err(|payload| payload.downcast_ref::<String>().cloned().unwrap_or_else(|| "it panicked".into()))
}

fn a_page_is_counted_twice() -> Result<(), String> {
    let (mmu, _) = mapped(Mirroring::Direct, None);
    super::counts_are_right(&Dump::of(&mmu)).expect("nothing is broken yet");
    mmu.counts.add(Level::SMALL, 1);
    super::counts_are_right(&Dump::of(&mmu))
}

fn a_huge_page_begins_anywhere() -> Result<(), String> {
    let (mmu, root) = mapped(Mirroring::Direct, None);
    let huge = Gfn(4 * Level::HUGE.pages());
    assert_eq!(mmu.lock_shared().map(&root, &mapping(huge, Level::HUGE)), MapResult::Fixed);
    super::huge_pages_are_aligned(&Dump::of(&mmu)).expect("nothing is broken yet");
    let entry = mmu.last_entry(&root, huge);
    let askew = Spte::leaf(Leaf {
        pfn: entry.old.pfn().plus(1),
        level: Level::HUGE,
        is_writable: true,
        is_accessed: false,
        accessed_dirty: true,
    });
    entry.table.store(entry.index, askew);
    super::huge_pages_are_aligned(&Dump::of(&mmu))
}
