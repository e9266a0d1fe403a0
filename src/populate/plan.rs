//! What a job will do with each piece of guest memory.
//!
//! A plan is made once, when the job is: it cuts the asked ranges by slot and by mapping and gives each piece
//! its host method, its access and its chunk. It asks the kernel about mappings and changes nothing.

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::thp::{self, Policy};
use crate::kvm::{Access, Errno, Kernel, MappedObject, Mapping, Mappings};
use crate::memslot::{Backing, Memslot, SlotId, SlotRecord};
use crate::range::{HUGE, PAGE, Range, RangeSet};
use once_cell::unsync::OnceCell;
use std::os::fd::RawFd;

/// What the guest is to be spared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Every fault, on read or write.
    Write,
    /// Faults on read; copy-on-write stays unbroken.
    Read,
    /// Faults on what is in memory already; nothing is allocated.
    Resident,
}

/// How the host's page tables are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum HostMethod {
    /// Not at all: stage 2 does all there is to do, or only resident memory is wanted.
    Nothing = 0,
    /// `MADV_POPULATE_READ`.
    PopulateRead = 1,
    /// `MADV_POPULATE_WRITE`.
    PopulateWrite = 2,
    /// `fallocate`, then `MADV_POPULATE_WRITE`, chunk by chunk.
    AllocateAndPopulate = 3,
    /// `fallocate` alone: memory that the host has no mapping of.
    Allocate = 4,
}

/// A piece of guest memory that is treated alike: one slot, one mapping.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Guest memory.
    pub range: Range,
    /// Its slot.
    pub slot: SlotId,
    /// Address of its first byte in this process; `None` for memory the host cannot see.
    pub hva: Option<u64>,
    /// Its file, with the offset of its first byte.
    pub file: Option<(RawFd, u64)>,
    /// What lies behind it.
    pub backing: Backing,
    /// Bytes in a page of the backing; 0 where unknown.
    pub page_size: u64,
    /// The host stage's method.
    pub host: HostMethod,
    /// What the guest may do afterwards without a fault.
    pub access: Access,
    /// Whether stage 2 is filled.
    pub stage2: bool,
    /// Only resident pages.
    pub resident_only: bool,
}

impl Segment {
    /// Address in this process of a gpa inside the segment.
    pub fn hva_of(&self, gpa: u64) -> Option<u64> {
        self.hva.map(|hva| hva + (gpa - self.range.start))
    }

    /// File offset of a gpa inside the segment.
    pub fn offset_of(&self, gpa: u64) -> Option<(RawFd, u64)> {
        self.file.map(|(fd, offset)| (fd, offset + (gpa - self.range.start)))
    }

    /// The first chunk of `waiting`, which begins inside the segment. Chunks end at huge-page boundaries of the
    /// host's addresses: where the guest's are congruent those are the guest's too, and where they are not there
    /// are no huge pages in stage 2 to be torn.
    pub fn chunk(&self, waiting: Range) -> Range {
        let size = self.page_size.max(HUGE);
        let place = self.hva_of(waiting.start).unwrap_or(waiting.start);
        let to_boundary = size - place % size;
        let end = waiting.start.saturating_add(to_boundary).min(waiting.end).min(self.range.end);
        Range { start: waiting.start, end }
    }
}

/// What is asked of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The intent.
    pub intent: Intent,
    /// Whether stage 2 is wanted at all.
    pub stage2: bool,
    /// Whether stage 2 of slots with a dirty log is wanted all the same.
    pub dirty_logged_too: bool,
    /// Whether the VM has private memory at all: where not, a guest_memfd that is not mapped serves nobody.
    pub has_private_memory: bool,
}

/// All segments, by place.
#[derive(Debug, Default)]
pub struct Plan {
    /// The segments: sorted, never overlapping.
    pub segments: Vec<Segment>,
    /// Memory that was asked for and is left out, because its intent cannot be met: see [`Wish`].
    pub left_out: RangeSet,
    /// Memory whose stage 2 is left out because its writes are logged.
    pub dirty_logged: u64,
    /// The first of it, with its slot.
    pub first_dirty_logged: Option<(SlotId, Range)>,
}

impl Plan {
    /// Plans `asked`, or, when that is empty, all memory that is not marked sparse or device.
    pub fn new(kernel: &dyn Kernel, slots: &SlotRecord, asked: &[Range], wish: Wish) -> Result<Self> {
        let mappings = Mappings::now(kernel).map_err(looking_up)?;
        let host = &Host {
            kernel,
            mappings,
            has_private_memory: wish.has_private_memory,
            has_huge_shmem: OnceCell::new(),
        };
        let mut plan = Self::default();
        if asked.is_empty() {
            let all =
                slots.of_address_space(0).filter(|(_, slot)| !slot.nature.sparse && !slot.nature.device);
            for (range, slot) in all {
                // A slot that is on its way out, or that only residents may touch, is not "all memory" now.
                let unfit = slots.is_changing(slot.id())
                    || (slot.nature.userfaultfd && wish.intent != Intent::Resident);
                if unfit {
                    plan.left_out.insert(range);
                } else {
                    plan.add_slot_part(host, slot, range, wish)?;
                }
            }
            return Ok(plan);
        }
        let asked: RangeSet = asked.iter().copied().collect();
        for range in asked.iter() {
            plan.add_range(host, slots, range, wish)?;
        }
        Ok(plan)
    }

    fn add_range(&mut self, host: &Host<'_>, slots: &SlotRecord, range: Range, wish: Wish) -> Result<()> {
        let mut at = range.start;
        for (place, slot) in slots.touching(0, range) {
            let Some(part) = place.intersect(&range) else { continue };
            if part.start > at {
                break;
            }
            check_slot_is_fit(slots, slot, part, wish.intent)?;
            self.add_slot_part(host, slot, part, wish)?;
            at = part.end;
        }
        match Range::between(at, range.end) {
            None => Ok(()),
            Some(hole) => Err(Error::new(
                libc::ENOENT,
                Reason::NoMemslot,
                format!("no memslot at guest address {at:#x}"),
            )
            .range(hole)
            .hint("name only memory that has a slot, and tell the handle of every slot")),
        }
    }

    /// Adds a part of one slot, mapping by mapping.
    fn add_slot_part(&mut self, host: &Host<'_>, slot: &Memslot, part: Range, wish: Wish) -> Result<()> {
        if slot.is_dirty_logged() && wish.stage2 && !wish.dirty_logged_too {
            self.dirty_logged += part.size();
            self.first_dirty_logged.get_or_insert((slot.id(), part));
        }
        if host.is_hidden(slot)? {
            return self.add_hidden(slot, part, wish);
        }
        let mut at = part.start;
        while let Some(rest) = Range::between(at, part.end) {
            let hva = slot.hva_of(at);
            let mapping = host
                .mappings
                .at(hva)
                .map_err(|errno| looking_up(errno).slot(slot.id()).range(rest))?
                .filter(|m| m.start <= hva)
                .ok_or_else(|| not_mapped(slot, rest, hva))?;
            let end = part.end.min(at.saturating_add(mapping.end - hva));
            let piece = Range { start: at, end };
            self.segments.push(segment(host, slot, piece, hva, mapping, wish)?);
            at = end;
        }
        Ok(())
    }

    /// Adds guest_memfd memory that the host has no mapping of.
    fn add_hidden(&mut self, slot: &Memslot, part: Range, wish: Wish) -> Result<()> {
        if wish.intent == Intent::Resident {
            // Which pages of a guest_memfd are allocated cannot be asked: leave out what may not be there.
            self.left_out.insert(part);
            return Ok(());
        }
        let offset = slot.region.guest_memfd_offset + (part.start - slot.region.gpa);
        self.segments.push(Segment {
            range: part,
            slot: slot.id(),
            hva: None,
            file: Some((slot.region.guest_memfd, offset)),
            backing: Backing { object: MappedObject::GuestMemfd, shared: false },
            page_size: PAGE,
            host: HostMethod::Allocate,
            access: Access::Write,
            stage2: wish.stage2,
            resident_only: false,
        });
        Ok(())
    }

    /// The segment that holds `gpa`.
    pub fn segment_at(&self, gpa: u64) -> Option<&Segment> {
        let at = self.segments.partition_point(|s| s.range.end <= gpa);
        self.segments.get(at).filter(|s| s.range.start <= gpa)
    }
}

/// What a plan asks the host of.
struct Host<'a> {
    kernel: &'a dyn Kernel,
    mappings: Mappings<'a>,
    has_private_memory: bool,
    has_huge_shmem: OnceCell<bool>,
}

impl Host<'_> {
    /// Whether the slot's memory is a guest_memfd that the host cannot map.
    fn is_hidden(&self, slot: &Memslot) -> Result<bool> {
        slot.is_hidden(self.has_private_memory, || {
            let mapping = self.mappings.at(slot.region.hva).map_err(looking_up)?;
            Ok(mapping.is_some_and(|m| m.start <= slot.region.hva && m.object == MappedObject::GuestMemfd))
        })
    }

    /// The table of host methods, by measurement: `cargo xtask bench`, rows `host_*` and `method_*`.
    fn method(
        &self,
        backing: Backing,
        access: Access,
        intent: Intent,
        has_file: bool,
        stage2: bool,
    ) -> HostMethod {
        match (intent, access, backing.object) {
            (Intent::Resident, ..) => HostMethod::Nothing,
            // The guest reaches a guest_memfd past the host's page tables: filling those as well would be for the VMM
            // alone, and takes a quarter longer.
            (_, _, MappedObject::GuestMemfd) if stage2 && has_file => HostMethod::Allocate,
            (_, Access::Write, MappedObject::Shmem)
                if backing.shared && has_file && !self.has_huge_shmem() =>
            {
                HostMethod::AllocateAndPopulate
            }
            (_, Access::Write, _) => HostMethod::PopulateWrite,
            (_, Access::Read, _) => HostMethod::PopulateRead,
        }
    }

    /// Whether shared memory may have huge pages. What is allocated before it is touched has none, where they depend on
    /// advice or on a policy for their size.
    fn has_huge_shmem(&self) -> bool {
        *self.has_huge_shmem.get_or_init(|| thp::shmem(self.kernel) != Policy::Never)
    }
}

fn looking_up(errno: Errno) -> Error {
    Error::kernel(errno, "looking up the slot's mapping")
}

fn check_slot_is_fit(slots: &SlotRecord, slot: &Memslot, part: Range, intent: Intent) -> Result<()> {
    let unfit = |errno, reason, message: &str| {
        Err(Error::new(errno, reason, format!("memslot {:#x} {message}", slot.id()))
            .slot(slot.id())
            .range(part))
    };
    if slot.nature.device {
        return unfit(libc::EINVAL, Reason::MemslotDevice, "is device memory, which cannot be populated")
            .map_err(|e: Error| e.hint("leave the range out"));
    }
    if slots.is_changing(slot.id()) {
        return unfit(libc::EBUSY, Reason::MemslotChanging, "is about to change")
            .map_err(|e: Error| e.hint("call again after kvmprep_memslot_note"));
    }
    if slot.nature.userfaultfd && intent != Intent::Resident {
        return unfit(
            libc::EBUSY,
            Reason::MemslotUserfaultfd,
            "is registered with userfaultfd, and populating it would wait",
        )
        .map_err(|e: Error| {
            e.hint("use KVMPREP_INTENT_RESIDENT, or populate after userfaultfd has been taken off")
        });
    }
    Ok(())
}

fn not_mapped(slot: &Memslot, rest: Range, hva: u64) -> Error {
    Error::new(
        libc::EFAULT,
        Reason::NoHostMapping,
        format!("nothing is mapped at {hva:#x}, behind guest {rest}"),
    )
    .stage(Stage::Host)
    .slot(slot.id())
    .range(rest)
    .hint("map the slot's memory before it is populated, and announce a slot's change before its munmap")
}

/// How one mapped piece is treated.
fn segment(
    host: &Host<'_>,
    slot: &Memslot,
    range: Range,
    hva: u64,
    mapping: Mapping,
    wish: Wish,
) -> Result<Segment> {
    let into_slot = range.start - slot.region.gpa;
    let file = slot.file.map(|(fd, offset)| (fd, offset + into_slot));
    let kind = file.and_then(|(fd, _)| host.kernel.file_kind(fd).ok());
    // The file system knows its own kind better than a mapping's name tells, and the VMM best of all.
    let object = match (mapping.object, kind) {
        (MappedObject::File | MappedObject::Shmem, Some(kind)) => kind.object,
        (object, _) => object,
    };
    let backing = slot.backing.unwrap_or(Backing { object, shared: mapping.shared });
    let page_size = [mapping.page_size, kind.map_or(0, |k| k.page_size)].into_iter().max().unwrap_or(0);
    let writes = wish.intent == Intent::Write && !slot.is_read_only();
    if writes && !mapping.writable {
        return Err(Error::new(
            libc::EACCES,
            Reason::HostMappingReadOnly,
            format!("guest {range} is writable for the guest, but its mapping at {hva:#x} is not"),
        )
        .stage(Stage::Host)
        .slot(slot.id())
        .range(range)
        .hint(
            "make the slot read-only (KVM_MEM_READONLY), map it writable, use KVMPREP_INTENT_READ, or, for a \
             PROT_NONE guard page, keep it out of slots and ranges",
        ));
    }
    let access = if writes { Access::Write } else { Access::Read };
    let stage2 = wish.stage2 && (!slot.is_dirty_logged() || wish.dirty_logged_too);
    let is_guest_memfd = backing.object == MappedObject::GuestMemfd && slot.has_guest_memfd();
    let file = if is_guest_memfd {
        Some((slot.region.guest_memfd, slot.region.guest_memfd_offset + into_slot))
    } else {
        file
    };
    Ok(Segment {
        range,
        slot: slot.id(),
        hva: Some(hva),
        file,
        backing,
        page_size,
        host: host.method(backing, access, wish.intent, file.is_some(), stage2),
        access,
        stage2,
        resident_only: wish.intent == Intent::Resident,
    })
}
