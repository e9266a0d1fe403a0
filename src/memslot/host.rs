//! What page sizes the memory behind a slot can give: this process's mappings, as the kernel tells of them.
//!
//! It says what a population would find: pages that are there as they are, and for what is not there yet the size that
//! the kernel would choose. It asks and changes nothing. A promise it is not: the kernel may find no huge page free.

use super::Memslot;
use super::prediction::Limit;
use crate::error::{Error, Reason, Result};
use crate::kvm::thp::{self, Policy};
use crate::kvm::{Errno, Kernel, MappedObject, Mapping, Mappings, Smaps, Sys};
use crate::level::Level;
use crate::range::{PAGE, Range};
use std::cell::Cell;

/// A stretch of this process's memory whose pages are of one size at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Addresses of this process.
    pub range: Range,
    /// The largest page. Where it is smaller than a frame, a frame may still not lie in the run as a whole.
    pub level: Level,
    /// Why it is not larger.
    pub limit: Limit,
}

/// The memory behind a slot, or a part of it, by place. What lies between is not mapped.
#[derive(Clone, Debug, Default)]
pub struct HostMemory {
    runs: Vec<Run>,
}

/// What kind of memory lies behind a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// What it is; memory that is not mapped counts as anonymous.
    pub object: MappedObject,
    /// The largest page that memory of this kind has, whatever its state is now.
    pub largest: Level,
    /// Whether a guest_memfd is mapped there.
    pub is_guest_memfd: bool,
}

/// This process's memory on one occasion: what is looked up is looked up once. Not to be kept, since mappings change.
pub struct Occasion<'a> {
    kernel: &'a dyn Kernel,
    mappings: Mappings<'a>,
    smaps: Smaps<'a>,
    /// How many frames of file caches may still be looked at.
    cache_looks: Cell<u64>,
}

/// At most this much of file caches is looked at, in frames of 2 MiB: 64 GiB, since each takes a system call.
const MOST_CACHE_LOOKS: u64 = 1 << 15;

impl<'a> Occasion<'a> {
    /// Now.
    pub fn now(kernel: &'a dyn Kernel) -> Result<Self> {
        let mappings = Mappings::now(kernel).map_err(looking_up)?;
        Ok(Self { kernel, mappings, smaps: Smaps::new(kernel), cache_looks: Cell::new(MOST_CACHE_LOOKS) })
    }

    /// Its mappings.
    pub fn mappings(&self) -> &Mappings<'a> {
        &self.mappings
    }

    /// What lies behind `slot` at `hva`: by the VMM's word, else by the kernel's.
    pub fn kind(&self, slot: &Memslot, hva: u64) -> Result<Kind> {
        let mapping = self.mappings.at(hva).map_err(looking_up)?.filter(|mapping| mapping.start <= hva);
        let found = mapping.map(|mapping| self.object_of(slot, &mapping));
        let object = slot.said_of_hva().map(|said| said.object).or(found).unwrap_or(MappedObject::Anonymous);
        let largest_of = |object| match object {
            MappedObject::Anonymous | MappedObject::Shmem => Level::M2,
            MappedObject::Hugetlb => mapping.map_or(Level::M2, |mapping| self.hugetlb_level(&mapping)),
            MappedObject::File | MappedObject::GuestMemfd => Level::K4,
        };
        // A wrong word must not hide a pool of huge pages.
        let pool = found.filter(|found| *found == MappedObject::Hugetlb).map_or(Level::K4, largest_of);
        let largest = largest_of(object).max(pool);
        Ok(Kind { object, largest, is_guest_memfd: found == Some(MappedObject::GuestMemfd) })
    }

    /// Looks at `part` of this process's memory, which lies behind `slot`.
    pub fn survey(&self, slot: &Memslot, part: Range) -> Result<HostMemory> {
        let mut survey = Survey { occasion: self, slot, runs: Vec::new() };
        let mut at = part.start;
        while at < part.end {
            let Some(mapping) = self.mappings.at(at).map_err(looking_up)? else { break };
            let whole = Range { start: mapping.start, end: mapping.end };
            let Some(found) = whole.intersect(&part) else { break };
            survey.add(&mapping, found).map_err(looking_up)?;
            at = mapping.end;
        }
        Ok(HostMemory { runs: survey.runs })
    }

    /// What is mapped. A file's own system knows better than its name tells. Before Linux 6.11 the kernel does not tell
    /// the page size beside the name, and by its name a file of huge pages may be any other: a memfd, above all.
    fn object_of(&self, slot: &Memslot, mapping: &Mapping) -> MappedObject {
        let is_of_huge_pages = || self.smaps.at(mapping.start).is_some_and(|entry| entry.page_size > PAGE);
        if !matches!(mapping.object, MappedObject::Shmem | MappedObject::File) {
            return mapping.object;
        }
        match slot.file.and_then(|(fd, _)| self.kernel.file_kind(fd).ok()) {
            Some(kind) => kind.object,
            None if mapping.page_size == 0 && is_of_huge_pages() => MappedObject::Hugetlb,
            None => mapping.object,
        }
    }

    fn hugetlb_level(&self, mapping: &Mapping) -> Level {
        let size = match mapping.page_size {
            0 => self.smaps.at(mapping.start).map_or(Level::M2.bytes(), |entry| entry.page_size),
            size => size,
        };
        Level::within(size)
    }
}

fn looking_up(errno: Errno) -> Error {
    let error = Error::system(errno, "looking up the slot's mapping in /proc/self/maps");
    if error.reason == Reason::KernelRefused {
        error.hint("mount /proc, or do without a report and a strict rule")
    } else {
        error
    }
}

/// A look at one slot's memory.
struct Survey<'a> {
    occasion: &'a Occasion<'a>,
    slot: &'a Memslot,
    runs: Vec<Run>,
}

impl HostMemory {
    /// Of runs that are known, by place.
    pub fn of(runs: Vec<Run>) -> Self {
        Self { runs }
    }

    /// The run that holds `hva`.
    pub fn at(&self, hva: u64) -> Option<&Run> {
        self.runs.get(self.index(hva)).filter(|run| run.range.start <= hva)
    }

    /// Where the run that holds `hva`, or the gap, ends; `None` when nothing comes behind.
    pub fn end_at(&self, hva: u64) -> Option<u64> {
        let run = self.runs.get(self.index(hva))?;
        Some(if run.range.start <= hva { run.range.end } else { run.range.start })
    }

    fn index(&self, hva: u64) -> usize {
        self.runs.partition_point(|run| run.range.end <= hva)
    }
}

impl Survey<'_> {
    fn add(&mut self, mapping: &Mapping, found: Range) -> Sys<()> {
        let said = self.slot.said_of_hva();
        let object = said.map_or_else(|| self.occasion.object_of(self.slot, mapping), |said| said.object);
        let shared = said.map_or(mapping.shared, |said| said.shared);
        let whole = |level, limit| Run { range: found, level, limit };
        match object {
            MappedObject::Hugetlb => {
                self.runs.push(whole(self.occasion.hugetlb_level(mapping), Limit::Backing));
                Ok(())
            }
            MappedObject::GuestMemfd => {
                self.runs.push(whole(Level::K4, Limit::GuestMemfd));
                Ok(())
            }
            MappedObject::Anonymous => {
                let limit = self.limit_of(thp::anonymous(self.occasion.kernel), mapping);
                self.add_transparent(found, limit, false)
            }
            MappedObject::Shmem if shared => {
                let limit = self.shmem_limit(mapping);
                self.add_transparent(found, limit, !self.has_empty_file())
            }
            // Private copies are made page by page.
            MappedObject::Shmem | MappedObject::File => {
                self.add_transparent(found, Some(Limit::Backing), false)
            }
        }
    }

    /// Whether nothing of the slot's file is in memory, where that can be told at once.
    fn has_empty_file(&self) -> bool {
        let status = self.slot.file.and_then(|(fd, _)| self.occasion.kernel.file_status(fd).ok());
        status.is_some_and(|status| status.allocated == 0)
    }

    /// Memory that has huge pages where the kernel so decides: what is there is as it is, and the rest will be of 2 MiB
    /// unless there is a limit.
    fn add_transparent(&mut self, found: Range, limit: Option<Limit>, is_cached: bool) -> Sys<()> {
        match limit {
            None => self.add_huge(found, is_cached),
            Some(limit) => self.add_small(found, limit),
        }
    }

    /// Memory in which huge pages come, but where small ones stand in their way.
    fn add_huge(&mut self, found: Range, is_cached: bool) -> Sys<()> {
        let kernel = self.occasion.kernel;
        let mut small = kernel.small_pages(found.start, found.end)?;
        let mut at = found.start;
        while let Some(rest) = Range::between(at, found.end) {
            if small.is_some_and(|(_, end)| end <= at) {
                small = kernel.small_pages(at, found.end)?;
            }
            let before = small.map_or(found.end, |(start, _)| start);
            let cached = if is_cached { self.partly_cached(at, before)? } else { None };
            let frames = cached.or(small).and_then(|(start, end)| around(start, end).intersect(&rest));
            let Some(frames) = frames else {
                self.push(found, rest, None);
                break;
            };
            if let Some(before) = Range::between(at, frames.start) {
                self.push(found, before, None);
            }
            self.push(found, frames, Some(Limit::Resident));
            at = frames.end;
        }
        Ok(())
    }

    /// Memory in which none come, but where they are already.
    fn add_small(&mut self, found: Range, limit: Limit) -> Sys<()> {
        let mut at = found.start;
        while let Some(rest) = Range::between(at, found.end) {
            let huge = self.occasion.kernel.huge_pages(rest.start, rest.end)?;
            let Some(frames) = huge.and_then(|(start, end)| around(start, end).intersect(&rest)) else {
                self.push(found, rest, Some(limit));
                break;
            };
            if let Some(before) = Range::between(at, frames.start) {
                self.push(found, before, Some(limit));
            }
            self.push(found, frames, None);
            at = frames.end;
        }
        Ok(())
    }

    /// The first frame of 2 MiB of which a part is in a file's cache, mapped here or not.
    fn partly_cached(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        let (size, looks) = (Level::M2.bytes(), &self.occasion.cache_looks);
        let mut at = start.next_multiple_of(size);
        while at + size <= end && looks.get() > 0 {
            looks.set(looks.get() - 1);
            if (1..size).contains(&self.occasion.kernel.cached(at, size)?) {
                return Ok(Some((at, at + size)));
            }
            at += size;
        }
        Ok(None)
    }

    /// Adds a part of `mapping` that has pages of 2 MiB, or for that reason not. No page lies in two mappings, so runs of
    /// different ones stay apart.
    fn push(&mut self, mapping: Range, range: Range, limit: Option<Limit>) {
        let (level, limit) = limit.map_or((Level::M2, Limit::Backing), |limit| (Level::K4, limit));
        let last = self.runs.last_mut().filter(|last| mapping.contains(&last.range));
        match last {
            Some(last) if last.range.end == range.start && (last.level, last.limit) == (level, limit) => {
                last.range.end = range.end;
            }
            _ => self.runs.push(Run { range, level, limit }),
        }
    }

    /// Why shared memory that is not there yet will not come in huge pages.
    fn shmem_limit(&self, mapping: &Mapping) -> Option<Limit> {
        // A huge page of the file must be one of the address space too.
        if !Level::M2.is_aligned(mapping.start.wrapping_sub(mapping.offset)) {
            return Some(Limit::FileOffset);
        }
        let kernel = self.occasion.kernel;
        let said = self.occasion.smaps.at(mapping.start).and_then(|entry| entry.may_be_huge);
        if mapping.on_mount {
            return self.limit_of(thp::tmpfs(kernel, said == Some(true)), mapping);
        }
        self.limit_of(thp::shmem(kernel), mapping).or((said == Some(false)).then_some(Limit::NoThp))
    }

    /// Why memory under that policy will not come in huge pages.
    fn limit_of(&self, policy: Policy, mapping: &Mapping) -> Option<Limit> {
        if policy == Policy::Never {
            return Some(Limit::NoThp);
        }
        match (policy, self.occasion.smaps.at(mapping.start).and_then(|entry| entry.huge_advice)) {
            (_, Some(false)) => Some(Limit::NoThp),
            (Policy::Advised, None) => Some(Limit::Advice),
            _ => None,
        }
    }
}

/// The whole frames of 2 MiB that a run of pages touches.
fn around(start: u64, end: u64) -> Range {
    let first = start - Level::M2.remainder(start);
    Range { start: first, end: end.checked_next_multiple_of(Level::M2.bytes()).unwrap_or(end) }
}
