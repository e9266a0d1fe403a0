//! `madvise`, and the same for files: `fallocate`.

use std::sync::Arc;

use super::entry::{Entry, Kind};
use super::fault::Refusal;
use super::file::File;
use super::hugetlb::HugeFile;
use super::process::Process;
use super::vma::{Backing, Protection, ThpAdvice, Vma, Vmas};
use super::zap::{What, pieces};
use crate::errno::{Errno, Result};
use crate::units::Level;

/// What `madvise` is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Advice {
    /// `MADV_DONTNEED`.
    DontNeed,
    /// `MADV_REMOVE`.
    Remove,
    /// `MADV_POPULATE_READ`.
    PopulateRead,
    /// `MADV_POPULATE_WRITE`.
    PopulateWrite,
    /// `MADV_HUGEPAGE`.
    HugePage,
    /// `MADV_NOHUGEPAGE`.
    NoHugePage,
    /// `MADV_COLLAPSE`. ENOSYS where the range has a mapping of a file of small pages: that is not simulated.
    Collapse,
    /// `MADV_DONTFORK`.
    DontFork,
    /// `MADV_DOFORK`.
    DoFork,
}

const HUGE: u64 = Level::HUGE.pages();

impl Process {
    /// Pages from `start` up to `end`.
    pub fn advise(self: &Arc<Self>, start: u64, end: u64, advice: Advice) -> Result<()> {
        match advice {
            Advice::PopulateRead => self.populate(start, end, false),
            Advice::PopulateWrite => self.populate(start, end, true),
            Advice::DontNeed => self.each(start, end, |vma, from, to| self.discard(vma, from, to)),
            Advice::Remove => self.remove(start, end),
            Advice::Collapse => self.collapse(start, end),
            Advice::HugePage => self.mark(start, end, |vma| vma.thp = ThpAdvice::Huge),
            Advice::NoHugePage => self.mark(start, end, |vma| vma.thp = ThpAdvice::Small),
            Advice::DontFork => self.mark(start, end, |vma| vma.is_kept_from_children = true),
            Advice::DoFork => self.give_to_children(start, end),
        }
    }

    /// Does it in every mapping of the range. Where nothing is mapped, the rest is done all the same.
    fn each(&self, start: u64, end: u64, what: impl Fn(&Vma, u64, u64) -> Result<()>) -> Result<()> {
        let vmas = self.mappings();
        for vma in vmas.overlapping(start, end) {
            what(vma, vma.start.max(start), vma.end.min(end))?;
        }
        whole(&vmas, start, end)
    }

    fn populate(&self, start: u64, end: u64, write: bool) -> Result<()> {
        let vmas = self.mappings();
        let mut page = start;
        let mut result = Ok(());
        while page < end {
            let Some(vma) = vmas.at(page) else {
                result = Err(Errno::ENOMEM);
                if !self.settings.populate_passes_over_holes() {
                    break;
                }
                page += 1;
                continue;
            };
            if !vma.allows(write) {
                return Err(Errno::EINVAL);
            }
            let found = self.access_in(vma, page, write).map_err(|refusal| match refusal {
                Refusal::Segv | Refusal::Bus => Errno::EFAULT,
                Refusal::OutOfMemory => Errno::ENOMEM,
                Refusal::Poisoned => Errno::EHWPOISON,
                Refusal::Waits => Errno::EINTR,
            })?;
            page = (page & !(found.level.pages() - 1)) + found.level.pages();
        }
        result
    }

    fn discard(&self, vma: &Vma, start: u64, end: u64) -> Result<()> {
        let size = vma.granularity().pages();
        if start % size != 0 {
            return Err(Errno::EINVAL);
        }
        let end = end & !(size - 1);
        if start < end {
            self.zap(vma, start, end, What::Discarded);
        }
        Ok(())
    }

    /// Changes what is known of the mappings in the range, and no more.
    pub fn mark(&self, start: u64, end: u64, change: impl Fn(&mut Vma)) -> Result<()> {
        let mut vmas = self.mappings_for_change();
        self.change_each(&mut vmas, start, end, change, |_, _, _| ())?;
        whole(&vmas, start, end)
    }

    fn give_to_children(&self, start: u64, end: u64) -> Result<()> {
        let refuses = |vma: &Vma| {
            matches!(vma.backing, Backing::Hugetlb { .. })
                && self.settings.hugetlb_is_always_given_to_children()
        };
        let refused_at =
            self.mappings().overlapping(start, end).find(|vma| refuses(vma)).map(|vma| vma.start);
        let open_end = refused_at.unwrap_or(end).max(start);
        let result = self.mark(start, open_end, |vma| vma.is_kept_from_children = false);
        if refused_at.is_some() { Err(Errno::EINVAL) } else { result }
    }

    /// `mprotect`. It goes as far as something is mapped.
    pub fn set_protection(&self, start: u64, end: u64, protection: Protection) -> Result<()> {
        let mut vmas = self.mappings_for_change();
        let change = |vma: &mut Vma| vma.set_protection(protection);
        let mapped_to = vmas.contiguous_end(start, end);
        self.change_each(&mut vmas, start, mapped_to, change, |vma, from, to| self.protect(vma, from, to))?;
        whole(&vmas, start, end)
    }

    /// Changes the mappings in the range, one after the other, and does with each part that became another what follows.
    fn change_each(
        &self,
        vmas: &mut Vmas,
        start: u64,
        end: u64,
        change: impl Fn(&mut Vma),
        follow: impl Fn(&Vma, u64, u64),
    ) -> Result<()> {
        let parts: Vec<(u64, u64)> =
            vmas.overlapping(start, end).map(|vma| (vma.start.max(start), vma.end.min(end))).collect();
        for (from, to) in parts {
            let vma = vmas.find(from).expect("nobody unmaps it meanwhile");
            let mut changed = vma.clone();
            change(&mut changed);
            if changed.is_used_like(vma) {
                continue;
            }
            self.cut(vmas, from)?;
            self.cut(vmas, to)?;
            vmas.change(from, to, &change);
            follow(vmas.find(from).expect("it was cut there"), from, to);
            vmas.join(from, to);
        }
        Ok(())
    }

    fn remove(&self, start: u64, end: u64) -> Result<()> {
        // The files are asked when the mappings are free again: they may have to be taken down.
        let parts: Vec<(Vma, u64, u64)> = {
            let vmas = self.mappings();
            vmas.overlapping(start, end)
                .map(|vma| (vma.clone(), vma.start.max(start), vma.end.min(end)))
                .collect()
        };
        for (vma, from, to) in parts {
            self.remove_in(&vma, vma.index_of(from), to - from)?;
        }
        whole(&self.mappings(), start, end)
    }

    fn remove_in(&self, vma: &Vma, index: u64, pages: u64) -> Result<()> {
        let is_open = vma.protection.write || self.settings.remove_works_on_read_only_mappings();
        match &vma.backing {
            Backing::Anonymous => Err(Errno::EINVAL),
            _ if !vma.is_shared() || !is_open => Err(Errno(libc::EACCES)),
            Backing::File { file, .. } => self.punch(file, index, pages),
            Backing::Hugetlb { file, .. } => self.punch_huge(file, index, pages),
            Backing::GuestMemfd(file) => file.punch(index, pages),
        }
    }

    /// Punches a hole of so many pages into a memfd.
    pub fn punch(&self, file: &Arc<File>, first: u64, pages: u64) -> Result<()> {
        if !file.is_sparse() {
            return Err(Errno::EOPNOTSUPP);
        }
        let end = checked_end(first, pages)?;
        let vmas = self.mappings();
        let _no_faults = file.invalidate.write().unwrap();
        for vma in vmas.iter() {
            if matches!(&vma.backing, Backing::File { file: mapped, .. } if Arc::ptr_eq(mapped, file)) {
                self.zap_indices(vma, first, end, What::OfFile);
            }
        }
        file.remove(first, end);
        Ok(())
    }

    /// The same of a file of huge pages. Only whole ones go, of private mappings their copies too; of the others the content.
    pub fn punch_huge(&self, file: &Arc<HugeFile>, first: u64, pages: u64) -> Result<()> {
        let end = checked_end(first, pages)?;
        let size = file.level().pages();
        let vmas = self.mappings();
        let _no_faults = file.invalidate.write().unwrap();
        let (from, to) = (first.next_multiple_of(size), end & !(size - 1));
        if from < to {
            for vma in vmas.iter() {
                if matches!(&vma.backing, Backing::Hugetlb { file: mapped, .. } if Arc::ptr_eq(mapped, file))
                {
                    self.zap_indices(vma, from, to, What::Unmapped);
                }
            }
            file.remove(from / size..to / size);
        }
        for index in (first..end).filter(|index| !(from..to).contains(index)) {
            if let Some(pfn) = file.cached(index / size) {
                self.frames.store(pfn.plus(index % size), 0);
            }
        }
        Ok(())
    }

    fn zap_indices(&self, vma: &Vma, first: u64, end: u64, what: What) {
        let index = |page| vma.index_of(page);
        let (from, to) = (first.max(index(vma.start)), end.min(index(vma.end)));
        if from < to {
            let page = |index: u64| vma.start + (index - vma.first);
            self.zap(vma, page(from), page(to), what);
        }
    }

    /// `fallocate` of so many pages. A memfd grows where it must.
    pub fn allocate(&self, file: &Arc<File>, first: u64, pages: u64) -> Result<()> {
        let end = checked_end(first, pages)?;
        if end > file.capacity() {
            return Err(Errno::ENOSPC);
        }
        let _kept = file.invalidate.read().unwrap();
        file.grow(end);
        for index in first..end {
            file.allocate(index).ok_or(Errno::ENOSPC)?;
        }
        Ok(())
    }

    /// The same of a file of huge pages, all that the range touches.
    pub fn allocate_huge(&self, file: &Arc<HugeFile>, first: u64, pages: u64) -> Result<()> {
        let end = checked_end(first, pages)?.div_ceil(file.level().pages());
        if end > file.pages() {
            return Err(Errno::ENOSPC);
        }
        for index in first / file.level().pages()..end {
            file.page(index).ok_or(Errno::ENOSPC)?;
        }
        Ok(())
    }

    /// Makes huge pages of all whole 2 MiB of the range, one after the other; what cannot be made is passed over.
    fn collapse(&self, start: u64, end: u64) -> Result<()> {
        let is_of_file = |vma: &Vma| matches!(vma.backing, Backing::File { .. });
        if self.mappings().overlapping(start, end).any(is_of_file) {
            return Err(Errno(libc::ENOSYS));
        }
        self.each(start, end, |vma, from, to| self.collapse_in(vma, from, to))
    }

    fn collapse_in(&self, vma: &Vma, start: u64, end: u64) -> Result<()> {
        let (from, to) = (start.next_multiple_of(HUGE), end & !(HUGE - 1));
        let is_allowed = vma.is_anonymous()
            && vma.thp != ThpAdvice::Small
            && vma.has_anonymous()
            && vma.start.next_multiple_of(HUGE) < vma.end & !(HUGE - 1);
        if !is_allowed || from > to && !self.settings.collapse_of_a_part_is_nothing() {
            return Err(Errno::EINVAL);
        }
        let to = to.max(from);
        let mut result = Ok(());
        for (base, _) in pieces(from, to, HUGE) {
            let has_entry = |level| self.table.slot(base, level).is_some_and(|slot| !slot.get().is_empty());
            if let Err(error) = self.collapse_one(vma, base) {
                result = Err(error);
                let stops_at_nothing = !self.settings.collapse_passes_over_nothing();
                let is_nothing = has_entry(Level::GIGANTIC) && !has_entry(Level::HUGE);
                if error == Errno::ENOMEM || is_nothing && stops_at_nothing {
                    break;
                }
            }
        }
        result
    }

    fn collapse_one(&self, vma: &Vma, base: u64) -> Result<()> {
        if self.is_huge_leaf(base) {
            return Ok(());
        }
        let has_table = self.table.slot(base, Level::HUGE).is_some_and(|slot| slot.get().is_table());
        if !has_table || !self.may_collapse(base) {
            return Err(Errno::EINVAL);
        }
        let pfn = self.frames.allocate(Level::HUGE).ok_or(Errno::ENOMEM)?;
        self.frames.map(pfn, HUGE);
        self.frames.set_exclusive(pfn, true);
        let old = self.changing(base, base + HUGE, || {
            let _entries = self.lock_entries(base, Level::HUGE);
            let slot = self.table.slot(base, Level::HUGE)?;
            let mut old = Vec::new();
            for (page, small) in self.table.small_entries(base) {
                let entry = small.get();
                if entry.has_frame() {
                    self.frames.store(pfn.plus(page - base), self.frames.load(entry.pfn()));
                }
                small.set(Entry::EMPTY);
                old.push(entry);
            }
            let huge = Entry::page(pfn, Kind::Anonymous, vma.protection.write);
            slot.set(if vma.protection.is_none() { huge.closed() } else { huge });
            Some(old)
        });
        old.into_iter().flatten().for_each(|entry| self.drop_frames(entry, Level::SMALL));
        Ok(())
    }

    fn may_collapse(&self, base: u64) -> bool {
        let entries: Vec<Entry> = self.table.small_entries(base).map(|(_, small)| small.get()).collect();
        let is_sound = !entries.iter().any(|entry| entry.is_failed());
        is_sound
            && (self.settings.collapse_takes_read_only_pages()
                || entries.iter().any(|entry| entry.is_writable()))
    }
}

/// ENOMEM where a part of the range is not mapped.
pub(super) fn whole(vmas: &Vmas, start: u64, end: u64) -> Result<()> {
    let mapped: u64 = vmas.overlapping(start, end).map(|vma| vma.end.min(end) - vma.start.max(start)).sum();
    if mapped == end - start { Ok(()) } else { Err(Errno::ENOMEM) }
}

fn checked_end(first: u64, pages: u64) -> Result<u64> {
    match first.checked_add(pages) {
        Some(end) if pages > 0 && end <= i64::MAX as u64 >> 12 => Ok(end),
        _ => Err(Errno::EINVAL),
    }
}
