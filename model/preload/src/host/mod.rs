//! The host that is the process itself: its memory as the kernel has it now, in place of a simulated one.
//!
//! A frame is known by the address at which the process has it. What KVM would learn from the kernel's page tables is read from
//! /proc, page by page, when it is asked for; what KVM would be told by the kernel is told here: before and after calls that are
//! interposed, around those that the model makes itself, and, for what the process or the kernel did by themselves, as soon as
//! somebody looks ([`settle`](HostMemory::settle)). The program's memory is never touched but through the kernel, and never
//! populated beyond what KVM itself would fault in.
//!
//! What /proc does not say is concluded. Whether an entry can be written is: a page of the process's own can, unless a fork
//! or KVM's own read has made it; one that it shares with a file or a child cannot. Pages that the process writes for the first
//! time after a child has gone are taken for unwritten, since nobody can see that they were.

mod calls;
mod frames;
mod mappings;
mod noted;
mod pagemap;
pub mod signals;
mod smaps;
mod waiting;

use std::ffi::c_int;
use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::say;
use frames::{Blocks, Frames};
use kvmprep_model::errno::Errno;
use kvmprep_model::host::{FileFrames, FollowError, HostMemory, HostPage, Notifier};
use kvmprep_model::units::{Hva, Level, PAGE_SHIFT, PAGE_SIZE, Pfn};
use mappings::{Mapping, Mappings};
use noted::Noted;
use pagemap::{Entry, Pagemap};
use waiting::Waiting;

pub(crate) use calls::{read_memory, write_memory};

/// The process's memory.
pub struct ProcessHost {
    itself: Weak<ProcessHost>,
    pagemap: Pagemap,
    mappings: Mappings,
    /// What was there when KVM asked.
    seen: Noted,
    /// Pages of the process's own that nobody has written since they could be.
    write_protected: Noted,
    waiting: Waiting,
    notifiers: Mutex<Vec<Weak<dyn Notifier>>>,
    blocks: Blocks,
    /// From before a fork until after it.
    fork: Mutex<Option<Invalidation>>,
}

/// The host. Its files are opened at the first call.
pub fn process() -> &'static Arc<ProcessHost> {
    static HOST: OnceLock<Arc<ProcessHost>> = OnceLock::new();
    HOST.get_or_init(|| match ProcessHost::new() {
        Ok(host) => host,
        Err(error) => say::end(format_args!("the process's memory cannot be looked at: {error}")),
    })
}

/// How many bits the addresses of a process have, the kernel's half left out: 47, or 56 with page tables of five levels.
pub fn user_address_bits() -> u32 {
    const FIVE_LEVELS: u32 = 56;
    if calls::is_user_range((1 << FIVE_LEVELS) - PAGE_SIZE) { FIVE_LEVELS } else { 47 }
}

/// Whose a page is that is mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Belonging {
    /// The process's alone.
    Own,
    /// Another's, until the process writes: the zero page, a file's page mapped privately, a page that a child has too.
    Borrowed,
    /// A file's, mapped shared.
    Shared,
}

/// Notifiers that were told that something is about to change; they are told that it has when this is dropped.
struct Invalidation {
    ranges: Vec<Range<u64>>,
    notifiers: Vec<Arc<dyn Notifier>>,
}

impl Drop for Invalidation {
    fn drop(&mut self) {
        for range in &self.ranges {
            self.notifiers
                .iter()
                .for_each(|notifier| notifier.invalidate_end(Hva(range.start), Hva(range.end)));
        }
    }
}

impl ProcessHost {
    fn new() -> io::Result<Arc<Self>> {
        Self::of(Pagemap::open()?, Mappings::open()?)
    }

    fn of(pagemap: Pagemap, mappings: Mappings) -> io::Result<Arc<Self>> {
        let word = 5u64;
        let mut copied = [0; 8];
        calls::read_memory(&raw const word as u64, &mut copied)
            .and_then(|()| calls::populate(&raw const word as u64 & !(PAGE_SIZE - 1), true))
            .map_err(|error| io::Error::new(error.kind(), format!("{error} (Linux 5.14 is needed)")))?;
        Ok(Arc::new_cyclic(|itself| ProcessHost {
            itself: itself.clone(),
            pagemap,
            mappings,
            seen: Noted::default(),
            write_protected: Noted::default(),
            waiting: Waiting::default(),
            notifiers: Mutex::default(),
            blocks: Blocks::default(),
            fork: Mutex::default(),
        }))
    }

    /// The model's descriptor of the guest_memfd that this thread has made last, once. It stays the host's.
    pub fn take_new_file(&self) -> Option<RawFd> {
        frames::take_newest()
    }

    /// What lies behind an address now. Nothing is faulted in.
    pub fn behind(&self, hva: Hva) -> Option<Pfn> {
        self.pagemap.entry(hva.page()).is_present().then(|| Pfn(hva.page()))
    }

    /// Makes a call that changes what is mapped at these addresses.
    pub fn changing<T>(&self, ranges: &[Range<u64>], call: impl FnOnce() -> T) -> T {
        let told = self.has_notifiers().then(|| {
            let ranges = ranges.iter().filter(|range| range.start < range.end);
            self.invalidate(ranges.map(|range| self.widened_to_frames(range)).collect())
        });
        let answer = call();
        drop(told);
        self.mappings.changed();
        ranges.iter().for_each(|range| self.forget_what_has_gone(&pages_of(range)));
        answer
    }

    /// Makes a call to `madvise`.
    pub fn advising<T>(&self, start: u64, length: u64, advice: c_int, call: impl FnOnce() -> T) -> T {
        // MADV_DONTNEED_LOCKED, MADV_COLLAPSE, MADV_GUARD_INSTALL, which are younger than some C libraries.
        const CHANGING: [c_int; 8] =
            [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_PAGEOUT, 24, 25, 102, libc::MADV_HWPOISON, 101];
        let range = start & !(PAGE_SIZE - 1)..start.saturating_add(length).next_multiple_of(PAGE_SIZE);
        match advice {
            libc::MADV_REMOVE => self.changing(&self.aliases(&range), call),
            25 => self.changing(&[frames_around(&range)], call),
            _ if CHANGING.contains(&advice) => self.changing(&[range], call),
            _ => {
                let answer = call();
                self.mappings.changed();
                answer
            }
        }
    }

    /// Makes a call that takes a part of a file away, wherever the process has mapped it.
    pub fn file_changing<T>(&self, fd: RawFd, offset: u64, length: u64, call: impl FnOnce() -> T) -> T {
        let ranges = match self.has_notifiers() {
            true => self.mapped_parts(fd, offset..offset.saturating_add(length)),
            false => Vec::new(),
        };
        self.changing(&ranges, call)
    }

    /// Where in a file an address lies, if the file is mapped there.
    pub fn offset_in(&self, fd: RawFd, address: u64) -> Option<u64> {
        let file = calls::device_and_inode(fd).ok()?;
        let mapping = self.mappings.at(address).filter(|mapping| mapping.file == file)?;
        Some(mapping.offset + (address - mapping.range.start))
    }

    /// Where the first mapping of one of these files begins in a range.
    pub fn first_mapping_of(&self, files: &[RawFd], range: &Range<u64>) -> Option<u64> {
        let files: Vec<_> = files.iter().filter_map(|fd| calls::device_and_inode(*fd).ok()).collect();
        let is_one = |found: &Mapping| {
            found.range.start < range.end && range.start < found.range.end && files.contains(&found.file)
        };
        self.mappings.all().into_iter().find(is_one).map(|found| found.range.start.max(range.start))
    }

    /// Something was mapped where nothing was.
    pub fn mapped(&self) {
        self.mappings.changed();
    }

    /// A fork is about to be made: pages that parent and child both have are nobody's to write.
    pub fn forking(&self) {
        if !self.has_notifiers() {
            return;
        }
        let copied = self.pagemap.smaps().copied_by_fork();
        for part in copied.iter().flat_map(|range| self.parts_with_pages(range)) {
            self.note_write_protected(&part);
        }
        *lock(&self.fork) = Some(self.invalidate(copied));
    }

    /// It was made, or not.
    pub fn forked(&self) {
        let told = lock(&self.fork).take();
        drop(told);
    }

    /// Whether faults at these addresses wait for somebody to bring the pages (userfaultfd).
    pub fn waiting(&self, range: Range<u64>, is_waiting: bool) {
        self.waiting.set(range, is_waiting);
    }

    fn has_notifiers(&self) -> bool {
        lock(&self.notifiers).iter().any(|notifier| notifier.strong_count() > 0)
    }

    /// Tells that these addresses are about to change. What was noted of them goes.
    fn invalidate(&self, ranges: Vec<Range<u64>>) -> Invalidation {
        let notifiers: Vec<_> = lock(&self.notifiers).iter().filter_map(Weak::upgrade).collect();
        for range in &ranges {
            notifiers.iter().for_each(|notifier| notifier.invalidate_start(Hva(range.start), Hva(range.end)));
            self.seen.forget(&pages_of(range));
        }
        Invalidation { ranges, notifiers }
    }

    /// A huge page of which a part goes is taken apart first, and KVM told of all of it.
    fn widened_to_frames(&self, range: &Range<u64>) -> Range<u64> {
        let frame = |address: u64| {
            let page = address >> PAGE_SHIFT;
            let is_huge = self.pagemap.entry(page).is_present() && self.pagemap.level(page) == Level::HUGE;
            if is_huge { frames_around(&(address..address + 1)) } else { address..address + 1 }
        };
        frame(range.start).start..frame(range.end - 1).end
    }

    /// Where the process has mapped these bytes of a file.
    fn mapped_parts(&self, fd: RawFd, bytes: Range<u64>) -> Vec<Range<u64>> {
        let Ok(file) = calls::device_and_inode(fd) else { return Vec::new() };
        self.parts_of(&file, &bytes)
    }

    fn parts_of(&self, file: &((u32, u32), u64), bytes: &Range<u64>) -> Vec<Range<u64>> {
        let all = self.mappings.all();
        let of_file = all.iter().filter(|mapping| mapping.file == *file);
        let part = |mapping: &Mapping| {
            let size = self.mappings.level(mapping).pages() * PAGE_SIZE;
            // Of a page that goes in part, the rest stays, and so does the page.
            let whole = bytes.start.checked_next_multiple_of(size)?..bytes.end & !(size - 1);
            mapping.addresses_of(&whole)
        };
        of_file.filter_map(part).collect()
    }

    /// Where else the process has mapped what it has mapped here of files.
    fn aliases(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        if !self.has_notifiers() {
            return Vec::new();
        }
        let mut aliases = Vec::new();
        for mapping in self.mappings.all() {
            let part = range.start.max(mapping.range.start)..range.end.min(mapping.range.end);
            if part.start < part.end && mapping.is_shared && mapping.file.1 != 0 {
                let offset = |address| mapping.offset + (address - mapping.range.start);
                aliases.extend(self.parts_of(&mapping.file, &(offset(part.start)..offset(part.end))));
            }
        }
        aliases
    }

    /// The parts of a range in which pages may be that are no file's. Where the kernel does not say which, all of it is looked at,
    /// unless that took for ever: then those parts that KVM has seen.
    fn parts_with_pages(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        const MOST_LOOKED_AT: u64 = 64 << 30;
        let seen = |notes: &Vec<(u64, Entry)>| {
            notes[0].0 << PAGE_SHIFT..(notes[notes.len() - 1].0 + 1) << PAGE_SHIFT
        };
        match self.pagemap.parts_with_pages(range) {
            Some(parts) => parts,
            None if range.end - range.start <= MOST_LOOKED_AT => vec![range.clone()],
            None => self.seen.of(&pages_of(range)).iter().map(seen).collect(),
        }
    }

    fn note_write_protected(&self, range: &Range<u64>) {
        let mut entries = [Entry::default(); 512];
        let pages = pages_of(range);
        for first in pages.clone().step_by(entries.len()) {
            let entries = &mut entries[..(pages.end - first).min(512) as usize];
            self.pagemap.entries(first, entries);
            for (page, entry) in (first..).zip(entries.iter()) {
                if entry.is_present() && entry.is_alone() && !entry.is_of_file() {
                    self.write_protected.note(page, *entry);
                }
            }
        }
    }

    /// What comes to an address anew is not what was there before.
    fn forget_what_has_gone(&self, pages: &Range<u64>) {
        for (page, then) in self.write_protected.of(pages).into_iter().flatten() {
            let now = self.pagemap.entry(page);
            if !now.is_present() || now.frame() != then.frame() {
                self.write_protected.forget(&(page..page + 1));
            }
        }
    }

    fn belonging(entry: Entry, mapping: &Mapping) -> Belonging {
        match (mapping.is_shared, entry.is_alone() && !entry.is_of_file()) {
            (true, _) => Belonging::Shared,
            (false, true) => Belonging::Own,
            (false, false) => Belonging::Borrowed,
        }
    }

    /// Has the kernel fault a page in. Where that breaks copy-on-write, KVM is told.
    fn fault_in(&self, page: u64, write: bool, mapping: &Mapping, before: Entry) -> Result<(), FollowError> {
        let is_copied =
            write && before.is_present() && Self::belonging(before, mapping) == Belonging::Borrowed;
        let _told = is_copied.then(|| {
            let address = page << PAGE_SHIFT;
            let frame = around(address, self.mappings.level(mapping));
            self.invalidate(vec![self.widened_to_frames(&frame)])
        });
        let fault_in = move || calls::populate(page << PAGE_SHIFT, write);
        let may_wait = if before.is_present() {
            write && before.is_watched()
        } else {
            self.waiting.is_waiting(page << PAGE_SHIFT)
        };
        let answer = match may_wait {
            true => waiting::until_signal((page, write), fault_in).ok_or(FollowError::Interrupted)?,
            false => fault_in(),
        };
        answer.map_err(|error| match error.raw_os_error() {
            Some(libc::EHWPOISON) => {
                signals::note_failed_memory(page << PAGE_SHIFT);
                FollowError::Poisoned
            }
            Some(libc::EINTR) => FollowError::Interrupted,
            _ => FollowError::NoMapping,
        })
    }

    /// Whether the entry that was found can be written, when only reading was asked for.
    fn can_be_written(&self, page: u64, entry: Entry, mapping: &Mapping) -> bool {
        mapping.is_writable
            && !entry.is_watched()
            && match Self::belonging(entry, mapping) {
                Belonging::Own => !self.is_write_protected(page, entry, mapping),
                Belonging::Borrowed => false,
                Belonging::Shared => self.mappings.is_memory(mapping),
            }
    }

    fn is_write_protected(&self, page: u64, entry: Entry, mapping: &Mapping) -> bool {
        let first = page & !(self.mappings.level(mapping).pages() - 1);
        let noted = self.write_protected.get(page).map(|noted| (noted, entry));
        let noted = noted.or_else(|| Some((self.write_protected.get(first)?, self.pagemap.entry(first))));
        noted.is_some_and(|(then, now)| then.frame() == now.frame())
    }

    /// After a page was faulted in: what is to be known of it later.
    fn note(&self, page: u64, write: bool, mapping: &Mapping, before: Entry, after: Entry) {
        let level = self.mappings.level(mapping);
        let first = page & !(level.pages() - 1);
        if write {
            self.write_protected.forget(&(first..first + level.pages()));
        } else if level > Level::SMALL && !mapping.is_shared && !before.is_present() {
            // A huge page that is read first is the process's own, and yet not to be written before another fault.
            self.write_protected.note(first, self.pagemap.entry(first));
        }
        self.seen.note(page, after);
    }

    /// Whether a page is another one than was seen.
    fn has_changed(&self, page: u64, then: Entry, now: Entry) -> bool {
        let seen_at_once = |entry: Entry| (entry.is_present(), entry.is_of_file(), entry.is_watched());
        if seen_at_once(then) != seen_at_once(now) {
            return true;
        }
        match (then.frame(), now.frame()) {
            (None, None) => {
                // Merged with others (KSM), or copied from them; but what a child has left is what it was.
                let is_left_by_child = now.is_alone() && self.write_protected.get(page).is_some();
                !then.is_of_file() && then.is_alone() != now.is_alone() && !is_left_by_child
            }
            (then, now) => then != now,
        }
    }

    /// Of pages that were seen, those that have changed since, as addresses.
    fn changed_since(&self, pages: &Range<u64>) -> Vec<Range<u64>> {
        let mut changed: Vec<Range<u64>> = Vec::new();
        for seen in self.seen.of(pages) {
            let (first, last) = (seen[0].0, seen[seen.len() - 1].0);
            let mut entries = [Entry::default(); 512];
            let entries = &mut entries[..=(last - first) as usize];
            self.pagemap.entries(first, entries);
            for (page, then) in seen {
                let now = entries[(page - first) as usize];
                if !self.has_changed(page, then, now) {
                    continue;
                }
                let address = page << PAGE_SHIFT;
                match changed.last_mut() {
                    Some(range) if range.end >= address => range.end = range.end.max(address + PAGE_SIZE),
                    _ => changed.push(self.widened_to_frames(&(address..address + PAGE_SIZE))),
                }
            }
        }
        changed
    }
}

impl HostMemory for ProcessHost {
    fn follow(&self, hva: Hva, write: bool) -> Result<HostPage, FollowError> {
        let page = hva.page();
        loop {
            let mapping = self.mappings.at(page << PAGE_SHIFT).ok_or(FollowError::NoMapping)?;
            if !(if write { mapping.is_writable } else { mapping.is_readable }) {
                return Err(FollowError::NoMapping);
            }
            let before = self.pagemap.entry(page);
            if write || !before.is_present() {
                self.fault_in(page, write, &mapping, before)?;
            }
            let after = self.pagemap.entry(page);
            if write && Self::belonging(after, &mapping) == Belonging::Borrowed {
                // It is no longer what it was taken for, or somebody has forked.
                self.mappings.changed();
                continue;
            }
            // It may have gone again meanwhile.
            if after.is_present() {
                self.note(page, write, &mapping, before, after);
                let writable = write || self.can_be_written(page, after, &mapping);
                return Ok(HostPage { pfn: Pfn(page), writable });
            }
        }
    }

    fn level(&self, hva: Hva) -> Level {
        let page = hva.page();
        if self.pagemap.is_surely_small(page) {
            return Level::SMALL;
        }
        match self.mappings.at(page << PAGE_SHIFT).map(|mapping| self.mappings.level(&mapping)) {
            None => Level::SMALL,
            Some(Level::SMALL) => self.pagemap.level(page),
            Some(level) => level,
        }
    }

    fn read_frame(&self, pfn: Pfn, offset: usize, bytes: &mut [u8]) {
        let read = match self.blocks.place(pfn) {
            Some((file, at)) => calls::read_file(file.fd(), at + offset as u64, bytes),
            None if frames::is_of_file(pfn) => Err(io::ErrorKind::NotFound.into()),
            None => calls::read_memory((pfn.0 << PAGE_SHIFT) + offset as u64, bytes),
        };
        if read.is_err() {
            // It has gone meanwhile, as under a processor that has not heard of it yet.
            bytes.fill(0);
        }
    }

    fn write_frame(&self, pfn: Pfn, offset: usize, bytes: &[u8]) {
        // What has gone meanwhile keeps nothing that is written.
        let _ = match self.blocks.place(pfn) {
            Some((file, at)) => calls::write_file(file.fd(), at + offset as u64, bytes),
            None if frames::is_of_file(pfn) => Ok(()),
            None => calls::write_memory((pfn.0 << PAGE_SHIFT) + offset as u64, bytes),
        };
    }

    fn settle(&self, start: Hva, end: Hva) {
        let changed = self.changed_since(&pages_of(&(start.0..end.0)));
        if !changed.is_empty() {
            drop(self.invalidate(changed));
        }
    }

    fn is_signal_pending(&self) -> bool {
        signals::is_pending()
    }

    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>, Errno> {
        let frames = Frames::new(&self.itself, pages)?;
        frames::note_newest(frames.fd());
        Ok(Box::new(frames))
    }

    fn register(&self, notifier: Weak<dyn Notifier>) {
        let mut notifiers = lock(&self.notifiers);
        notifiers.retain(|notifier| notifier.strong_count() > 0);
        notifiers.push(notifier);
    }
}

fn pages_of(range: &Range<u64>) -> Range<u64> {
    range.start >> PAGE_SHIFT..range.end.div_ceil(PAGE_SIZE)
}

/// The page of this level around an address.
fn around(address: u64, level: Level) -> Range<u64> {
    let size = level.pages() * PAGE_SIZE;
    let start = address & !(size - 1);
    start..start + size
}

/// The frames of 2 MiB that some of a range is in.
fn frames_around(range: &Range<u64>) -> Range<u64> {
    around(range.start, Level::HUGE).start..around(range.end - 1, Level::HUGE).end
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
