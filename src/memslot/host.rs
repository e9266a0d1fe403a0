//! What page sizes the memory behind a slot can give: this process's mappings, as the kernel tells of them.
//!
//! It says what a population would find: pages that are there as they are, and for what is not there yet the size that
//! the kernel would choose. It asks and changes nothing. A promise it is not: the kernel may find no huge page free.

use super::prediction::Limit;
use super::{Backing, Memslot};
use crate::error::{Error, Result};
use crate::kvm::thp::{self, Policy};
use crate::kvm::{Errno, Kernel, MappedObject, Mapping, Mappings, Smaps, Sys};
use crate::level::Level;
use crate::range::{PAGE, Range};

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

/// Whoever asks about one slot's memory, on one occasion.
struct Survey<'a> {
    kernel: &'a dyn Kernel,
    smaps: Smaps<'a>,
    backing: Option<Backing>,
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

/// What lies behind `slot` at `hva`: by the VMM's word, else by the kernel's.
pub fn kind(kernel: &dyn Kernel, slot: &Memslot, hva: u64) -> Result<Kind> {
    let mappings = Mappings::now(kernel).map_err(looking_up)?;
    let mapping = mappings.at(hva).map_err(looking_up)?.filter(|mapping| mapping.start <= hva);
    let smaps = Smaps::new(kernel);
    let found = mapping.map(|mapping| object_of(&smaps, &mapping));
    let object = slot.backing.map(|backing| backing.object).or(found).unwrap_or(MappedObject::Anonymous);
    let largest = match object {
        MappedObject::Anonymous | MappedObject::Shmem => Level::M2,
        MappedObject::Hugetlb => mapping.map_or(Level::M2, |mapping| hugetlb_level(&smaps, &mapping)),
        MappedObject::File | MappedObject::GuestMemfd => Level::K4,
    };
    Ok(Kind { object, largest, is_guest_memfd: found == Some(MappedObject::GuestMemfd) })
}

/// What is mapped. Before Linux 6.11 the kernel does not tell the page size beside the name, and by its name a file of
/// huge pages may be any other: a memfd, above all.
fn object_of(smaps: &Smaps<'_>, mapping: &Mapping) -> MappedObject {
    let is_of_huge_pages = || smaps.at(mapping.start).is_some_and(|entry| entry.page_size > PAGE);
    match mapping.object {
        MappedObject::Shmem | MappedObject::File if mapping.page_size == 0 && is_of_huge_pages() => {
            MappedObject::Hugetlb
        }
        object => object,
    }
}

fn hugetlb_level(smaps: &Smaps<'_>, mapping: &Mapping) -> Level {
    let size = match mapping.page_size {
        0 => smaps.at(mapping.start).map_or(Level::M2.bytes(), |entry| entry.page_size),
        size => size,
    };
    Level::within(size)
}

fn looking_up(errno: Errno) -> Error {
    Error::kernel(errno, "looking up the slot's mapping")
}

impl HostMemory {
    /// Looks at `part` of this process's memory, which lies behind `slot`.
    pub fn survey(kernel: &dyn Kernel, slot: &Memslot, part: Range) -> Result<Self> {
        let mappings = Mappings::now(kernel).map_err(looking_up)?;
        let mut survey =
            Survey { kernel, smaps: Smaps::new(kernel), backing: slot.backing, runs: Vec::new() };
        let mut at = part.start;
        while at < part.end {
            let Some(mapping) = mappings.at(at).map_err(looking_up)? else { break };
            let whole = Range { start: mapping.start, end: mapping.end };
            let Some(found) = whole.intersect(&part) else { break };
            survey.add(&mapping, found).map_err(looking_up)?;
            at = mapping.end;
        }
        Ok(Self { runs: survey.runs })
    }

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
        let object = self.backing.map_or_else(|| object_of(&self.smaps, mapping), |backing| backing.object);
        let shared = self.backing.map_or(mapping.shared, |backing| backing.shared);
        let whole = |level, limit| Run { range: found, level, limit };
        match object {
            MappedObject::Hugetlb => {
                let level = hugetlb_level(&self.smaps, mapping);
                self.runs.push(whole(level, Limit::Backing));
            }
            MappedObject::GuestMemfd => {
                self.runs.push(whole(Level::K4, Limit::GuestMemfd));
            }
            MappedObject::Anonymous => {
                let limit = self.limit_of(thp::anonymous(self.kernel), mapping);
                self.add_transparent(found, limit, object)?;
            }
            MappedObject::Shmem if shared => {
                let limit = self.shmem_limit(mapping);
                self.add_transparent(found, limit, object)?;
            }
            // Private copies are made page by page.
            MappedObject::Shmem | MappedObject::File => {
                self.add_transparent(found, Some(Limit::Backing), object)?;
            }
        }
        Ok(())
    }

    /// Memory that has huge pages where the kernel so decides: what is there is as it is, and the rest will be of 2 MiB
    /// unless there is a limit.
    fn add_transparent(&mut self, found: Range, limit: Option<Limit>, object: MappedObject) -> Sys<()> {
        let mut at = found.start;
        while let Some(rest) = Range::between(at, found.end) {
            // Where huge pages will come, look for small ones that stand in their way; else for huge ones that are there.
            let exception = match limit {
                None => self.small_pages(rest, object)?,
                Some(_) => self.kernel.huge_pages(rest.start, rest.end)?,
            };
            let Some(exception) = exception.and_then(|(start, end)| around(start, end).intersect(&rest))
            else {
                self.push(found, rest, limit);
                break;
            };
            if let Some(before) = Range::between(at, exception.start) {
                self.push(found, before, limit);
            }
            self.push(found, exception, if limit.is_none() { Some(Limit::Resident) } else { None });
            at = exception.end;
        }
        Ok(())
    }

    /// The first run of pages in `part` that no huge page will take the place of.
    fn small_pages(&self, part: Range, object: MappedObject) -> Sys<Option<(u64, u64)>> {
        let small = self.kernel.small_pages(part.start, part.end)?;
        if object != MappedObject::Shmem {
            return Ok(small);
        }
        let end = small.map_or(part.end, |(start, _)| start);
        Ok(self.partly_cached(part.start, end)?.or(small))
    }

    /// The first frame of 2 MiB of which a part is in a file's cache, mapped here or not.
    fn partly_cached(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        let size = Level::M2.bytes();
        let mut at = start.next_multiple_of(size);
        while at + size <= end {
            if (1..size).contains(&self.kernel.cached(at, size)?) {
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
            return Some(Limit::Backing);
        }
        // A file on a tmpfs mount has that mount's policy, which only this tells.
        let is_not_eligible = || self.smaps.at(mapping.start).is_some_and(|e| e.may_be_huge == Some(false));
        let limit = self.limit_of(thp::shmem(self.kernel), mapping);
        limit.or_else(|| is_not_eligible().then_some(Limit::NoThp))
    }

    /// Why memory under that policy will not come in huge pages.
    fn limit_of(&self, policy: Policy, mapping: &Mapping) -> Option<Limit> {
        if policy == Policy::Never {
            return Some(Limit::NoThp);
        }
        match (policy, self.smaps.at(mapping.start).and_then(|entry| entry.huge_advice)) {
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
