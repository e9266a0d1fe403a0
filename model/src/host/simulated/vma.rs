//! The process's mappings: which addresses are mapped, to what, and how they may be used.
//!
//! No page is looked at here. Cutting a mapping has consequences for a huge page at the cut, which are
//! [`process`](super::process)'s.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::file::File;
use super::hugetlb::{HugeFile, Reserve};
use crate::host::MappableFile;
use crate::units::Level;

/// What an access may do with a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Protection {
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
}

impl Protection {
    /// Reading and writing.
    pub const READ_WRITE: Protection = Protection { read: true, write: true };
    /// Reading only.
    pub const READ: Protection = Protection { read: true, write: false };
    /// Nothing.
    pub const NONE: Protection = Protection { read: false, write: false };

    pub(super) fn is_none(self) -> bool {
        !self.read && !self.write
    }
}

/// What was advised about transparent huge pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ThpAdvice {
    Nothing,
    Huge,
    Small,
}

/// What a mapping maps.
#[derive(Clone)]
pub(super) enum Backing {
    Anonymous,
    File { file: Arc<File>, is_shared: bool },
    Hugetlb { file: Arc<HugeFile>, is_shared: bool, reserve: Option<Arc<Reserve>> },
    GuestMemfd(Arc<dyn MappableFile>),
}

impl Backing {
    fn is_same(&self, other: &Backing) -> bool {
        match (self, other) {
            (Backing::Anonymous, Backing::Anonymous) => true,
            (Backing::File { file, is_shared }, Backing::File { file: of, is_shared: shared }) => {
                Arc::ptr_eq(file, of) && is_shared == shared
            }
            // Of hugetlb they are never joined.
            (Backing::GuestMemfd(file), Backing::GuestMemfd(of)) => {
                std::ptr::addr_eq(Arc::as_ptr(file), Arc::as_ptr(of))
            }
            _ => false,
        }
    }
}

/// Which mappings' own pages count as one (the kernel's `anon_vma`): none until there is the first such page.
///
/// Two mappings that got pages apart are never joined, even when they differ in nothing else.
#[derive(Default)]
pub(super) struct Lineage(AtomicU64);

impl Lineage {
    fn get(&self) -> Option<u64> {
        let number = self.0.load(Ordering::Acquire);
        (number != 0).then_some(number)
    }

    /// The first to say decides.
    fn set(&self, number: u64) {
        let _ = self.0.compare_exchange(0, number, Ordering::AcqRel, Ordering::Acquire);
    }
}

impl Clone for Lineage {
    fn clone(&self) -> Self {
        Lineage(AtomicU64::new(self.0.load(Ordering::Acquire)))
    }
}

/// A mapping among its neighbours.
#[derive(Clone, Copy)]
pub(super) struct InUse<'a> {
    vmas: &'a Vmas,
    vma: &'a Vma,
}

impl Deref for InUse<'_> {
    type Target = Vma;

    fn deref(&self) -> &Vma {
        self.vma
    }
}

impl InUse<'_> {
    /// A page of its own is about to come.
    pub fn note_anonymous(&self) {
        if !self.has_anonymous() {
            let lineage = self.lineage_of_neighbours().unwrap_or_else(|| self.vmas.new_lineage());
            self.vma.anonymous.set(lineage);
        }
    }

    fn lineage_of_neighbours(&self) -> Option<u64> {
        let next = self.vmas.find(self.vma.end).filter(|next| next.is_kin(self.vma));
        let before = self.vma.start.checked_sub(1).and_then(|page| self.vmas.find(page));
        let before = before.filter(|before| self.vma.is_kin(before));
        next.and_then(|vma| vma.anonymous.get()).or_else(|| before?.anonymous.get())
    }
}

/// A mapping. Addresses are page numbers.
#[derive(Clone)]
pub(super) struct Vma {
    pub start: u64,
    pub end: u64,
    pub backing: Backing,
    /// The index in the file of the first page.
    pub first: u64,
    pub protection: Protection,
    pub thp: ThpAdvice,
    /// `MADV_DONTFORK`.
    pub is_kept_from_children: bool,
    /// Registered with userfaultfd, and nobody answers.
    pub waits: bool,
    /// Memory was set aside for it when it could first be written (`VM_ACCOUNT`). Neighbours that differ in it stay apart.
    pub is_accounted: bool,
    /// Whether it has, or had, pages of its own, and with which others they count as one.
    pub anonymous: Lineage,
}

impl Vma {
    /// `mprotect`: what becomes of a private mapping's memory that was set aside is decided here as well.
    pub fn set_protection(&mut self, protection: Protection) {
        let may_be_accounted = !self.is_shared() && self.granularity() == Level::SMALL;
        if protection == self.protection {
            return;
        }
        if protection.write {
            self.is_accounted |= may_be_accounted && !self.protection.write;
        } else if self.is_anonymous() && !self.has_anonymous() {
            self.is_accounted = false;
        }
        self.protection = protection;
    }

    pub fn is_shared(&self) -> bool {
        match &self.backing {
            Backing::Anonymous => false,
            Backing::File { is_shared, .. } | Backing::Hugetlb { is_shared, .. } => *is_shared,
            Backing::GuestMemfd(_) => true,
        }
    }

    pub fn is_anonymous(&self) -> bool {
        matches!(self.backing, Backing::Anonymous)
    }

    /// The size of the pages that it must be cut at.
    pub fn granularity(&self) -> Level {
        match &self.backing {
            Backing::Hugetlb { file, .. } => file.level(),
            _ => Level::SMALL,
        }
    }

    pub fn allows(&self, write: bool) -> bool {
        if write { self.protection.write } else { self.protection.read }
    }

    /// The index in the file of a page.
    pub fn index_of(&self, page: u64) -> u64 {
        self.first + (page - self.start)
    }

    pub fn contains(&self, start: u64, end: u64) -> bool {
        self.start <= start && end <= self.end
    }

    pub fn has_anonymous(&self) -> bool {
        self.anonymous.get().is_some()
    }

    /// Whether this mapping, which follows, could share the other's lineage.
    fn is_kin(&self, before: &Vma) -> bool {
        self.is_next_to(before)
            && before.thp == self.thp
            && before.is_kept_from_children == self.is_kept_from_children
            && before.waits == self.waits
            && before.is_accounted == self.is_accounted
    }

    fn is_next_to(&self, before: &Vma) -> bool {
        before.end == self.start
            && before.backing.is_same(&self.backing)
            && (self.is_anonymous()
                || before.index_of(before.start) + (before.end - before.start) == self.first)
    }

    fn continues(&self, before: &Vma) -> bool {
        let are_related = match (before.anonymous.get(), self.anonymous.get()) {
            (Some(one), Some(other)) => one == other,
            _ => true,
        };
        self.is_next_to(before) && before.is_used_like(self) && are_related
    }

    /// Whether two are the same in all but what they map.
    pub fn is_used_like(&self, other: &Vma) -> bool {
        self.protection == other.protection
            && self.thp == other.thp
            && self.is_kept_from_children == other.is_kept_from_children
            && self.waits == other.waits
            && self.is_accounted == other.is_accounted
    }
}

/// All of them, by their first page.
pub(super) struct Vmas {
    by_start: BTreeMap<u64, Vma>,
    lineages: AtomicU64,
    /// Whether one that has pages of its own is joined to a neighbour without.
    shares_own_pages: bool,
}

impl Vmas {
    pub fn new(shares_own_pages: bool) -> Self {
        Vmas { by_start: BTreeMap::new(), lineages: AtomicU64::new(0), shares_own_pages }
    }

    pub fn iter(&self) -> impl Iterator<Item = &Vma> {
        self.by_start.values()
    }

    fn new_lineage(&self) -> u64 {
        self.lineages.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The mapping that a page is of, to fault in.
    pub fn at(&self, page: u64) -> Option<InUse<'_>> {
        self.find(page).map(|vma| InUse { vmas: self, vma })
    }

    /// The mapping that a page is of.
    pub fn find(&self, page: u64) -> Option<&Vma> {
        self.by_start.range(..=page).next_back().map(|(_, vma)| vma).filter(|vma| page < vma.end)
    }

    /// Those that have pages from `start` up to `end`, in order.
    pub fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = &Vma> {
        let first = self.find(start).map_or(start, |vma| vma.start);
        self.by_start.range(first..end.max(first)).map(|(_, vma)| vma)
    }

    /// How far from `start`, and at most to `end`, every page is mapped.
    pub fn contiguous_end(&self, start: u64, end: u64) -> u64 {
        let mut reached = start;
        for vma in self.overlapping(start, end) {
            if vma.start > reached {
                break;
            }
            reached = vma.end.min(end);
        }
        reached
    }

    pub fn is_free(&self, start: u64, end: u64) -> bool {
        self.overlapping(start, end).next().is_none()
    }

    pub fn insert(&mut self, vma: Vma) {
        let start = vma.start;
        let before = self.by_start.insert(start, vma);
        assert!(before.is_none(), "a mapping takes the place of another");
    }

    /// Makes a mapping begin at `page`, if one goes across it.
    pub fn cut(&mut self, page: u64) {
        let Some(vma) = self.find(page).filter(|vma| vma.start < page) else { return };
        let upper = Vma { start: page, first: vma.index_of(page), ..vma.clone() };
        let start = vma.start;
        self.by_start.get_mut(&start).expect("it was found").end = page;
        self.insert(upper);
    }

    /// Takes out those from `start` up to `end`, where they have been cut.
    pub fn remove(&mut self, start: u64, end: u64) -> Vec<Vma> {
        let starts: Vec<u64> = self.overlapping(start, end).map(|vma| vma.start).collect();
        starts.iter().filter_map(|start| self.by_start.remove(start)).collect()
    }

    /// Changes those from `start` up to `end`, where they have been cut.
    pub fn change(&mut self, start: u64, end: u64, change: impl Fn(&mut Vma)) {
        self.by_start.range_mut(start..end).for_each(|(_, vma)| change(vma));
    }

    /// Joins the mapping from `start` to `end`, which was changed, to neighbours that differ in nothing.
    pub fn join(&mut self, start: u64, end: u64) {
        let needs_own_pages =
            !self.shares_own_pages && self.find(start).is_some_and(|changed| changed.has_anonymous());
        let from = self.find(start.saturating_sub(1)).map_or(start, |vma| vma.start);
        let starts: Vec<u64> = self.by_start.range(from..=end).map(|(start, _)| *start).collect();
        let mut last = None;
        for start in starts {
            let vma = &self.by_start[&start];
            let is_continued = last.map(|last| &self.by_start[&last]).is_some_and(|last| {
                vma.continues(last) && (!needs_own_pages || last.has_anonymous() && vma.has_anonymous())
            });
            if !is_continued {
                last = Some(start);
                continue;
            }
            let joined = self.by_start.remove(&start).expect("it was listed");
            let into = self.by_start.get_mut(&last.expect("it is continued")).expect("it was listed");
            into.end = joined.end;
            if let Some(lineage) = joined.anonymous.get() {
                into.anonymous.set(lineage);
            }
        }
    }
}
