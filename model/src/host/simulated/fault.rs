//! Page faults: what comes of an access that the page table does not allow.
//!
//! As the kernel does it: a fault makes one entry better and the access is tried again. Copy-on-write changes an entry that
//! KVM may have used and calls the notifiers; a fault on nothing does not.

use std::sync::atomic::Ordering;

use super::entry::{Entry, Kind};
use super::file::File;
use super::hugetlb::HugeFile;
use super::process::Process;
use super::settings::ThpPolicy;
use super::table::Found;
use super::vma::{Backing, InUse, ThpAdvice, Vma};
use crate::host::MappableFile;
use crate::mistake::{Mistake, mistaken};
use crate::units::{Level, Pfn};

/// Why an access cannot be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// Nothing is mapped, or not for this access: SIGSEGV.
    Segv,
    /// The file has no page there, or none can be had: SIGBUS.
    Bus,
    /// There is no memory.
    OutOfMemory,
    /// The memory has failed: SIGBUS.
    Poisoned,
    /// It would wait for userfaultfd, where nobody answers.
    Waits,
}

/// A read of a file's page maps up to so many that are in the page cache.
const AROUND: u64 = 16;

impl Process {
    /// `get_user_pages`, or the processor with the fault handler: the leaf that allows the access.
    pub fn access(&self, page: u64, write: bool) -> Result<Found, Refusal> {
        if let Some(found) = self.reach(page, write) {
            return Ok(found);
        }
        let vmas = self.mappings();
        let vma = vmas.at(page).filter(|vma| vma.allows(write)).ok_or(Refusal::Segv)?;
        self.access_in(vma, page, write)
    }

    /// The same, in a mapping that allows it.
    pub fn access_in(&self, vma: InUse<'_>, page: u64, write: bool) -> Result<Found, Refusal> {
        loop {
            if let Some(found) = self.reach(page, write) {
                return Ok(found);
            }
            self.fault(vma, page, write)?;
            self.faults.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// One page fault.
    fn fault(&self, vma: InUse<'_>, page: u64, write: bool) -> Result<(), Refusal> {
        if let Backing::Hugetlb { file, .. } = &vma.backing {
            return self.huge_file_fault(vma, file, page, write);
        }
        // The tables are there first, whatever comes of the fault.
        self.table.slot_or_new(page, Level::HUGE);
        let found = self.table.find(page);
        if found.entry.is_failed() {
            return Err(Refusal::Poisoned);
        }
        if vma.waits && !found.entry.has_frame() {
            return Err(Refusal::Waits);
        }
        if found.is_without_table() && self.may_be_huge(&vma, page) && self.huge_anonymous(vma, page, write) {
            return Ok(());
        }
        match (found.entry.has_frame(), found.level == Level::HUGE) {
            (false, _) => self.missing(vma, page, write),
            (true, true) => self.write_to_huge(vma, page, found.entry),
            (true, false) => self.write_to_small(vma, page, found.entry),
        }
    }

    fn may_be_huge(&self, vma: &Vma, page: u64) -> bool {
        let is_wanted = match self.thp() {
            ThpPolicy::Always => vma.thp != ThpAdvice::Small,
            ThpPolicy::Madvise => vma.thp == ThpAdvice::Huge,
            ThpPolicy::Never => false,
        };
        let base = page & !(Level::HUGE.pages() - 1);
        is_wanted && vma.is_anonymous() && vma.contains(base, base + Level::HUGE.pages())
    }

    /// A transparent huge page where there is not even a table. False where none is free.
    fn huge_anonymous(&self, vma: InUse<'_>, page: u64, write: bool) -> bool {
        let base = page & !(Level::HUGE.pages() - 1);
        vma.note_anonymous();
        let entry = if write {
            let Some(pfn) = self.frames.allocate(Level::HUGE) else { return false };
            self.own(pfn, Level::HUGE.pages());
            Entry::page(pfn, Kind::Anonymous, true)
        } else {
            Entry::page(self.frames.zero(Level::HUGE), Kind::Zero, false)
        };
        self.install_or_drop(base, Level::HUGE, entry);
        true
    }

    /// A new anonymous page is the process's alone.
    fn own(&self, pfn: Pfn, frames: u64) {
        self.frames.map(pfn, frames);
        self.frames.set_exclusive(pfn, true);
    }

    /// Puts an entry where there is none. Another thread may have been first.
    fn install(&self, page: u64, level: Level, entry: Entry) -> bool {
        let _entries = self.lock_entries(page, level);
        match self.table.slot_or_new(page, level) {
            Some(slot) if slot.get().is_empty() => {
                slot.set(entry);
                true
            }
            _ => false,
        }
    }

    fn install_or_drop(&self, page: u64, level: Level, entry: Entry) {
        if !self.install(page, level, entry) {
            self.drop_frames(entry, level);
        }
    }

    /// A fault on nothing, by small entries.
    fn missing(&self, vma: InUse<'_>, page: u64, write: bool) -> Result<(), Refusal> {
        match &vma.backing {
            Backing::Anonymous if !write && !mistaken(Mistake::ThereIsNoZeroPage) => {
                self.install(
                    page,
                    Level::SMALL,
                    Entry::page(self.frames.zero(Level::SMALL), Kind::Zero, false),
                );
                Ok(())
            }
            Backing::Anonymous => {
                vma.note_anonymous();
                let entry = self.new_small(None)?;
                self.install_or_drop(page, Level::SMALL, entry);
                Ok(())
            }
            Backing::File { file, is_shared } => self.file_fault(vma, file, *is_shared, page, write),
            Backing::GuestMemfd(file) => self.guest_memfd_fault(&vma, file.as_ref(), page),
            Backing::Hugetlb { .. } => unreachable!("hugetlb has its own way"),
        }
    }

    /// A page of the process's own: zeroed, or a copy.
    fn new_small(&self, copy_of: Option<Pfn>) -> Result<Entry, Refusal> {
        let pfn = self.frames.allocate(Level::SMALL).ok_or(Refusal::OutOfMemory)?;
        if let Some(from) = copy_of {
            self.frames.copy(from, pfn, Level::SMALL);
        }
        self.own(pfn, 1);
        Ok(Entry::page(pfn, Kind::Anonymous, true))
    }

    fn file_fault(
        &self,
        vma: InUse<'_>,
        file: &File,
        is_shared: bool,
        page: u64,
        write: bool,
    ) -> Result<(), Refusal> {
        let _kept = file.invalidate.read().unwrap();
        let index = vma.index_of(page);
        // Before the file's end is looked at: what is around may be in the file.
        if !write && self.map_around(&vma, file, is_shared, page) {
            return Ok(());
        }
        if index >= file.pages() {
            return Err(Refusal::Bus);
        }
        let pfn = file.page(index).ok_or(Refusal::OutOfMemory)?;
        if write && !is_shared {
            vma.note_anonymous();
            let entry = self.new_small(Some(pfn))?;
            self.install_or_drop(page, Level::SMALL, entry);
        } else {
            self.install(page, Level::SMALL, Entry::page(pfn, Kind::File, is_shared && vma.protection.write));
        }
        Ok(())
    }

    /// Maps what is in the page cache around a page that is read. Whether the page itself was.
    fn map_around(&self, vma: &Vma, file: &File, is_shared: bool, page: u64) -> bool {
        let table = page & !(Level::HUGE.pages() - 1);
        let start = (page & !(AROUND - 1)).max(vma.start);
        let end = (start + AROUND).min(table + Level::HUGE.pages()).min(vma.end);
        let mut is_mapped = false;
        for near in start..end {
            let index = vma.index_of(near);
            if index >= file.pages() {
                break;
            }
            if let Some(pfn) = file.cached(index) {
                let entry = Entry::page(pfn, Kind::File, is_shared && vma.protection.write);
                self.install(near, Level::SMALL, entry);
                is_mapped |= near == page;
            }
        }
        is_mapped
    }

    fn guest_memfd_fault(&self, vma: &Vma, file: &dyn MappableFile, page: u64) -> Result<(), Refusal> {
        let index = vma.index_of(page);
        let pfn = file.host_fault(index).map_err(|_| Refusal::Bus)?;
        self.map_guest_memfd_page(index, pfn, |pfn| {
            self.install(page, Level::SMALL, Entry::page(pfn, Kind::File, vma.protection.write));
        });
        Ok(())
    }

    /// A write to a small page that may only be read.
    fn write_to_small(&self, vma: InUse<'_>, page: u64, old: Entry) -> Result<(), Refusal> {
        if old.kind() == Kind::File && vma.is_shared() {
            self.replace(page, Level::SMALL, old, old.opened(true));
            return Ok(());
        }
        if old.kind() == Kind::Anonymous && self.is_reusable(old.pfn()) {
            self.frames.set_exclusive(old.pfn(), true);
            self.replace(page, Level::SMALL, old, old.opened(true));
            return Ok(());
        }
        vma.note_anonymous();
        let new = self.new_small(Some(old.pfn()))?;
        let is_replaced = self.changing(page, page + 1, || self.replace(page, Level::SMALL, old, new));
        self.drop_frames(if is_replaced { old } else { new }, Level::SMALL);
        Ok(())
    }

    /// Whether the process is the only one who has a small page, or a part of a huge one, as far as the kernel can tell.
    fn is_reusable(&self, pfn: Pfn) -> bool {
        let is_part = self.frames.level(pfn) != Level::SMALL;
        let is_last = || self.settings.last_parts_of_huge_pages_are_reused() && self.frames.mapped(pfn) == 1;
        let is_known = !is_part || self.settings.parts_of_huge_pages_are_reused() || is_last();
        self.frames.is_exclusive(pfn) || !self.frames.is_lent(pfn) && is_known
    }

    /// Puts an entry in another's place, unless that has changed.
    fn replace(&self, page: u64, level: Level, old: Entry, new: Entry) -> bool {
        let _entries = self.lock_entries(page, level);
        match self.table.slot(page, level) {
            Some(slot) if slot.get() == old => {
                slot.set(new);
                true
            }
            _ => false,
        }
    }

    /// A write to a transparent huge page, or the huge zero page, that may only be read.
    fn write_to_huge(&self, vma: InUse<'_>, page: u64, old: Entry) -> Result<(), Refusal> {
        let base = page & !(Level::HUGE.pages() - 1);
        if old.kind() == Kind::Zero {
            if self.settings.huge_zero_page_is_copied_whole() && self.copy_huge_zero_page(vma, base, old) {
                return Ok(());
            }
        } else if self.frames.is_exclusive(old.pfn()) || !self.frames.is_lent(old.pfn()) {
            self.frames.set_exclusive(old.pfn(), true);
            self.replace(base, Level::HUGE, old, old.opened(true));
            return Ok(());
        }
        self.split(base);
        // The fault goes on with the small entry, unless that has changed already.
        let part = self.table.find(page);
        if part.level == Level::SMALL && part.entry.has_frame() && !part.entry.is_writable() {
            self.write_to_small(vma, page, part.entry)?;
        }
        Ok(())
    }

    fn copy_huge_zero_page(&self, vma: InUse<'_>, base: u64, old: Entry) -> bool {
        let Some(pfn) = self.frames.allocate(Level::HUGE) else { return false };
        vma.note_anonymous();
        self.own(pfn, Level::HUGE.pages());
        let new = Entry::page(pfn, Kind::Anonymous, true);
        let is_replaced =
            self.changing(base, base + Level::HUGE.pages(), || self.replace(base, Level::HUGE, old, new));
        if !is_replaced {
            self.drop_frames(new, Level::HUGE);
        }
        true
    }

    fn huge_file_fault(
        &self,
        vma: InUse<'_>,
        file: &HugeFile,
        page: u64,
        write: bool,
    ) -> Result<(), Refusal> {
        let level = file.level();
        let base = page & !(level.pages() - 1);
        let index = vma.index_of(base) / level.pages();
        if index >= file.pages() {
            return Err(Refusal::Bus);
        }
        let _kept = file.invalidate.read().unwrap();
        let old = self.table.find(base);
        if old.level == level && old.entry.has_frame() {
            return self.write_to_huge_file(vma, file, base, index, old.entry);
        }
        let entry = match (vma.is_shared(), file.cached(index)) {
            (true, _) => Entry::page(file.page(index).ok_or(Refusal::Bus)?, Kind::File, vma.protection.write),
            (false, Some(pfn)) => Entry::page(pfn, Kind::File, false),
            (false, None) => {
                let promised = self.use_up_promise(&vma, index);
                let pfn = file.pool.take(promised).ok_or(Refusal::Bus)?;
                vma.note_anonymous();
                self.own(pfn, 1);
                Entry::page(pfn, Kind::Anonymous, write)
            }
        };
        if !self.install(base, level, entry) {
            self.give_back(&vma, file, index, entry);
        } else if write && !entry.is_writable() {
            return self.write_to_huge_file(vma, file, base, index, entry);
        }
        Ok(())
    }

    fn use_up_promise(&self, vma: &Vma, index: u64) -> bool {
        matches!(&vma.backing, Backing::Hugetlb { reserve: Some(reserve), .. } if reserve.use_up(index))
    }

    /// Lets go of a page of hugetlb that is taken out of the page table. The file's own stay the file's.
    pub fn give_back(&self, vma: &Vma, file: &HugeFile, index: u64, entry: Entry) {
        if !entry.is_anonymous() || !self.frames.unmap(entry.pfn(), 1) {
            return;
        }
        let reserve = match &vma.backing {
            Backing::Hugetlb { reserve: Some(reserve), .. }
                if self.settings.discarded_huge_pages_stay_reserved() =>
            {
                Some(reserve)
            }
            _ => None,
        };
        file.pool.give(entry.pfn(), reserve.is_some());
        if let Some(reserve) = reserve {
            reserve.restore(index);
        }
    }

    /// A write to a page of hugetlb that may only be read.
    fn write_to_huge_file(
        &self,
        vma: InUse<'_>,
        file: &HugeFile,
        base: u64,
        index: u64,
        old: Entry,
    ) -> Result<(), Refusal> {
        let level = file.level();
        let is_own = old.kind() == Kind::Anonymous;
        if vma.is_shared() || is_own && !self.frames.is_lent(old.pfn()) {
            self.frames.set_exclusive(old.pfn(), is_own);
            self.replace(base, level, old, old.opened(true));
            return Ok(());
        }
        // A copy of the process's own page is not what was promised to it; the first copy of a file's page is.
        let promised = !is_own && self.use_up_promise(&vma, index);
        let Some(pfn) = file.pool.take(promised) else {
            // Rather the child loses the page than its owner.
            return if is_own && self.take_from_children(old.pfn()) { Ok(()) } else { Err(Refusal::Bus) };
        };
        vma.note_anonymous();
        self.frames.copy(old.pfn(), pfn, level);
        self.own(pfn, 1);
        let new = Entry::page(pfn, Kind::Anonymous, true);
        let is_replaced = self.changing(base, base + level.pages(), || self.replace(base, level, old, new));
        self.give_back_copied(file, if is_replaced { old } else { new });
        Ok(())
    }

    fn give_back_copied(&self, file: &HugeFile, entry: Entry) {
        if entry.is_anonymous() && self.frames.unmap(entry.pfn(), 1) {
            file.pool.give(entry.pfn(), false);
        }
    }
}
