//! Taking pages out of the page table: discarding, punching holes, unmapping; and protecting them.
//!
//! A huge page of which a part goes is mapped by small entries first, and that is told of by itself, for all of the huge
//! page. What a range is told with is the kernel's choice and is seen by KVM, which zaps what it is told of.

use super::entry::{Entry, Kind};
use super::hugetlb::HugeFile;
use super::process::Process;
use super::table::Slot;
use super::vma::{Backing, Vma, Vmas};
use crate::errno::{Errno, Result};
use crate::units::Level;

/// What goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// All, by `MADV_DONTNEED`: perhaps tables as well.
    Discarded,
    /// All.
    Unmapped,
    /// A file's pages, not what was copied of them.
    OfFile,
}

const HUGE: u64 = Level::HUGE.pages();
const GIGANTIC: u64 = Level::GIGANTIC.pages();

impl Process {
    /// Takes a part of a mapping out of the table and tells of it.
    pub fn zap(&self, vma: &Vma, start: u64, end: u64, what: What) {
        let (from, to) = widened_for_shared_tables(vma, start, end);
        self.changing(from, to, || self.zap_entries(vma, start, end, what));
    }

    /// Takes a part of a mapping out of the table.
    pub fn zap_entries(&self, vma: &Vma, start: u64, end: u64, what: What) {
        if let Backing::Hugetlb { file, .. } = &vma.backing {
            return self.zap_huge_file(vma, file, start, end, what);
        }
        for (from, to) in pieces(start, end, HUGE) {
            if to - from < HUGE {
                self.split(from);
            }
            self.zap_region(from, to, what);
        }
    }

    /// A part of one 2 MiB region; all of it where a huge entry is.
    fn zap_region(&self, start: u64, end: u64, what: What) {
        let _entries = self.lock_entries(start, Level::HUGE);
        let Some(slot) = self.table.slot(start, Level::HUGE) else { return };
        let huge = slot.get();
        if huge.has_frame() {
            if end - start == HUGE {
                slot.set(Entry::EMPTY);
                self.drop_frames(huge, Level::HUGE);
            }
            return;
        }
        if !huge.is_table() {
            return;
        }
        for (page, small) in self.table.small_entries(start) {
            if (start..end).contains(&page) {
                self.zap_small(small, what);
            }
        }
        if end - start == HUGE && what == What::Discarded && self.settings.discard_frees_tables() {
            slot.set(Entry::EMPTY);
        }
    }

    fn zap_small(&self, slot: Slot<'_>, what: What) {
        let entry = slot.get();
        if what == What::OfFile && !(entry.has_frame() && entry.kind() == Kind::File) {
            return;
        }
        slot.set(Entry::EMPTY);
        self.drop_frames(entry, Level::SMALL);
    }

    fn zap_huge_file(&self, vma: &Vma, file: &HugeFile, start: u64, end: u64, what: What) {
        let level = file.level();
        for (base, _) in pieces(start, end, level.pages()) {
            let old = {
                let _entries = self.lock_entries(base, level);
                let Some(slot) = self.table.slot(base, level) else { continue };
                let old = slot.get();
                if !old.has_frame() || what == What::OfFile && old.kind() != Kind::File {
                    continue;
                }
                slot.set(Entry::EMPTY);
                old
            };
            self.give_back(vma, file, vma.index_of(base) / level.pages(), old);
        }
    }

    /// Cuts the mappings at a page, and with them a transparent huge page's entry. A page of hugetlb cannot be cut.
    pub fn cut(&self, vmas: &mut Vmas, page: u64) -> Result<()> {
        let Some(vma) = vmas.find(page).filter(|vma| vma.start < page) else { return Ok(()) };
        if page % vma.granularity().pages() != 0 {
            return Err(Errno::EINVAL);
        }
        let base = page & !(HUGE - 1);
        if page != base && vma.contains(base, base + HUGE) {
            self.cut_entry(base);
        }
        vmas.cut(page);
        Ok(())
    }

    /// Whether there is a huge page at a cut is found out after all of its frame was told of.
    fn cut_entry(&self, base: u64) {
        if self.is_huge_leaf(base) {
            self.split(base);
        } else if self.table.slot(base, Level::HUGE).is_some() {
            self.changing(base, base + HUGE, || {});
        }
    }

    /// Unmaps whatever is mapped from `start` up to `end`. What is returned is dropped when the mappings are free again.
    pub fn unmap(&self, vmas: &mut Vmas, start: u64, end: u64) -> Result<Vec<Vma>> {
        if vmas.is_free(start, end) {
            return Ok(Vec::new());
        }
        self.cut(vmas, start)?;
        self.cut(vmas, end)?;
        let gone = vmas.remove(start, end);
        self.changing(start, end, || {
            gone.iter().for_each(|vma| self.zap_entries(vma, vma.start, vma.end, What::Unmapped));
        });
        for vma in &gone {
            self.release_promises(vma);
        }
        self.free_tables(vmas, start, end);
        self.note_guest_memfd_mappings(vmas);
        Ok(gone)
    }

    fn release_promises(&self, vma: &Vma) {
        if let Backing::Hugetlb { file, reserve: Some(reserve), .. } = &vma.backing {
            let level = file.level().pages();
            reserve.release(vma.first / level..(vma.index_of(vma.end)) / level);
        }
    }

    /// Unlinks the tables around what was unmapped that serve no mapping any more.
    fn free_tables(&self, vmas: &Vmas, start: u64, end: u64) {
        for (level, pages) in [(Level::HUGE, HUGE), (Level::GIGANTIC, GIGANTIC)] {
            let first = start & !(pages - 1);
            for (base, next) in pieces(first, end.next_multiple_of(pages), pages) {
                if !vmas.is_free(base, next) {
                    continue;
                }
                let _entries = self.lock_entries(base, level);
                if let Some(slot) = self.table.slot(base, level).filter(|slot| slot.get().is_table()) {
                    slot.set(Entry::EMPTY);
                }
            }
        }
    }

    /// Makes the entries of a part of a mapping follow its protection, which has just changed.
    pub fn protect(&self, vma: &Vma, start: u64, end: u64) {
        if let Backing::Hugetlb { .. } = &vma.backing {
            let (from, to) = widened_for_shared_tables(vma, start, end);
            return self.changing(from, to, || self.protect_entries(vma, start, end));
        }
        let linked = |at: u64, level| self.table.slot(at, level).is_some_and(|slot| !slot.get().is_empty());
        if self.settings.protection_is_told_at_once() {
            if let Some((from, _)) = pieces(start, end, GIGANTIC).find(|(at, _)| linked(*at, Level::GIGANTIC))
            {
                self.changing(from, end, || self.protect_entries(vma, from, end));
            }
            return;
        }
        for (from, to) in pieces(start, end, GIGANTIC) {
            if let Some((first, _)) = pieces(from, to, HUGE).find(|(at, _)| linked(*at, Level::HUGE)) {
                self.changing(first, to, || self.protect_entries(vma, first, to));
            }
        }
    }

    fn protect_entries(&self, vma: &Vma, start: u64, end: u64) {
        let level = vma.granularity();
        let step = level.pages().max(HUGE);
        for (from, to) in pieces(start, end, step) {
            let large = if step > HUGE { Level::GIGANTIC } else { Level::HUGE };
            let _entries = self.lock_entries(from, large);
            let Some(slot) = self.table.slot(from, large) else { continue };
            if !slot.get().is_table() {
                self.protect_entry(vma, slot, large);
                continue;
            }
            for (page, small) in self.table.small_entries(from) {
                if (from..to).contains(&page) {
                    self.protect_entry(vma, small, Level::SMALL);
                }
            }
        }
    }

    fn protect_entry(&self, vma: &Vma, slot: Slot<'_>, level: Level) {
        let entry = slot.get();
        if !entry.has_frame() {
            return;
        }
        if vma.protection.is_none() {
            slot.set(entry.closed());
            return;
        }
        let opens = vma.granularity() == Level::SMALL
            && (level == Level::SMALL || self.settings.protection_opens_huge_pages());
        let may_be_written = match entry.kind() {
            Kind::Zero => false,
            Kind::File => vma.is_shared(),
            Kind::Anonymous => opens && self.frames.is_exclusive(entry.pfn()),
        };
        slot.set(entry.opened(vma.protection.write && may_be_written));
    }
}

/// The kernel tells of whole gigabytes where a shared mapping of hugetlb could share page tables with another process.
fn widened_for_shared_tables(vma: &Vma, start: u64, end: u64) -> (u64, u64) {
    let (first, last) = (vma.start.next_multiple_of(GIGANTIC), vma.end & !(GIGANTIC - 1));
    let is_sharable = matches!(vma.backing, Backing::Hugetlb { is_shared: true, .. });
    if !is_sharable || last <= first || end <= first || last <= start {
        return (start, end);
    }
    let from = if start > first { start & !(GIGANTIC - 1) } else { start };
    let to = if end < last { end.next_multiple_of(GIGANTIC) } else { end };
    (from, to)
}

/// A range, cut at each multiple of `size`.
pub(super) fn pieces(start: u64, end: u64, size: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = start;
    std::iter::from_fn(move || {
        let from = at;
        at = ((from & !(size - 1)) + size).min(end);
        (from < end).then_some((from, at))
    })
}
