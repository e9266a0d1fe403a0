//! What a job will do with each piece of guest memory.
//!
//! A plan is made once, when the job is: it cuts the asked ranges by slot and by mapping and gives each piece
//! its host method, its access and its chunk. It asks the kernel about mappings and changes nothing.

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::thp::{self, Policy};
use crate::kvm::{Access, Errno, Kernel, MappedObject, Mapping, Mappings};
use crate::memslot::{Backing, Memslot, SlotId, SlotRecord};
use crate::range::{HUGE, PAGE, PrivateMemory, Range, RangeSet};
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

/// The guest_memfd behind a piece of memory, which serves what of it is private.
#[derive(Clone, Copy, Debug)]
pub struct PrivateSide {
    /// The file, with the offset of the piece's first byte.
    pub file: (RawFd, u64),
    /// Whether all is taken to be private while nobody has said what is.
    pub until_told: bool,
}

/// A piece of guest memory that is treated alike: one slot, one mapping. Of its parts some may be private; which, is asked
/// when they are populated.
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
    /// Where its private parts are; `None` where there can be none.
    pub private: Option<PrivateSide>,
}

impl Segment {
    /// What of `range`, which lies in the segment, is private: by `told`, or, while nobody has said, by the slot's nature.
    pub fn private_parts(&self, range: Range, told: Option<&dyn PrivateMemory>) -> Vec<Range> {
        match (self.private, told) {
            (None, _) => Vec::new(),
            (Some(_), Some(told)) => told.private_parts(range),
            (Some(side), None) => Some(range).filter(|_| side.until_told).into_iter().collect(),
        }
    }

    /// How many bytes of it are private.
    pub fn private_size(&self, told: Option<&dyn PrivateMemory>) -> u64 {
        match (self.private, told) {
            (None, _) => 0,
            (Some(_), Some(told)) => told.private_size(self.range),
            (Some(side), None) => {
                if side.until_told {
                    self.range.size()
                } else {
                    0
                }
            }
        }
    }

    /// How a private part is treated: memory that the host has no mapping of.
    pub fn private_side(&self, part: Range) -> Option<Segment> {
        let (fd, offset) = self.private?.file;
        Some(Segment {
            range: part,
            hva: None,
            file: Some((fd, offset + (part.start - self.range.start))),
            backing: HIDDEN,
            page_size: PAGE,
            host: HostMethod::Allocate,
            access: Access::Write,
            ..*self
        })
    }

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

/// What lies behind private memory.
pub const HIDDEN: Backing = Backing { object: MappedObject::GuestMemfd, shared: false };

/// What is asked of a plan.
#[derive(Clone, Copy)]
pub struct Wish<'a> {
    /// The intent.
    pub intent: Intent,
    /// Whether stage 2 is wanted at all.
    pub stage2: bool,
    /// Whether stage 2 of slots with a dirty log is wanted all the same.
    pub dirty_logged_too: bool,
    /// Whether the VM has private memory at all: where not, a guest_memfd that is not mapped serves nobody.
    pub has_private_memory: bool,
    /// What of the guest's memory is private, once anybody has said.
    pub told: Option<&'a dyn PrivateMemory>,
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
    pub fn new(kernel: &dyn Kernel, slots: &SlotRecord, asked: &[Range], wish: Wish<'_>) -> Result<Self> {
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

    fn add_range(&mut self, host: &Host<'_>, slots: &SlotRecord, range: Range, wish: Wish<'_>) -> Result<()> {
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
    fn add_slot_part(&mut self, host: &Host<'_>, slot: &Memslot, part: Range, wish: Wish<'_>) -> Result<()> {
        if slot.is_dirty_logged() && wish.stage2 && !wish.dirty_logged_too {
            self.dirty_logged += part.size();
            self.first_dirty_logged.get_or_insert((slot.id(), part));
        }
        let private = host.private_side(slot)?;
        if wish.intent == Intent::Resident
            && wish.told.is_none()
            && private.is_some_and(|side| side.until_told)
        {
            // Which pages of a guest_memfd are allocated cannot be asked: leave out what may not be there.
            self.left_out.insert(part);
            return Ok(());
        }
        let mut at = part.start;
        while let Some(rest) = Range::between(at, part.end) {
            let hva = slot.hva_of(at);
            let found =
                host.mappings.at(hva).map_err(|errno| looking_up(errno).slot(slot.id()).range(rest))?;
            let end = |hva_end: u64| part.end.min(at.saturating_add(hva_end - hva));
            let piece = match (found.filter(|mapping| mapping.start <= hva), private) {
                (Some(mapping), _) => {
                    let piece = Range { start: at, end: end(mapping.end) };
                    segment(host, slot, piece, hva, mapping, private, wish)?
                }
                // What is private needs no mapping.
                (None, Some(side)) => {
                    let piece = Range { start: at, end: found.map_or(part.end, |next| end(next.start)) };
                    unmapped(slot, piece, side, wish)
                }
                (None, None) => return Err(not_mapped(slot, rest, hva)),
            };
            at = piece.range.end;
            self.segments.push(piece);
        }
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
    /// The slot's guest_memfd, where it serves private memory.
    fn private_side(&self, slot: &Memslot) -> Result<Option<PrivateSide>> {
        let Some(file) = slot.guest_memfd_at(slot.region.gpa).filter(|_| self.has_private_memory) else {
            return Ok(None);
        };
        let until_told = slot.is_hidden(true, || {
            let mapping = self.mappings.at(slot.region.hva).map_err(looking_up)?;
            Ok(mapping.is_some_and(|m| m.start <= slot.region.hva && m.object == MappedObject::GuestMemfd))
        })?;
        Ok(Some(PrivateSide { file, until_told }))
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
            // alone, and takes a quarter longer; and where the VM has private memory, the VMM may not touch it.
            (_, _, MappedObject::GuestMemfd) if has_file && (stage2 || self.has_private_memory) => {
                HostMethod::Allocate
            }
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
    Error::system(errno, "looking up the slot's mapping")
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

/// The side of a piece of the slot's.
fn side_at(slot: &Memslot, gpa: u64, side: PrivateSide) -> PrivateSide {
    PrivateSide { file: (side.file.0, side.file.1 + (gpa - slot.region.gpa)), ..side }
}

/// How a piece is treated that nothing is mapped behind: only what of it is private can be populated.
fn unmapped(slot: &Memslot, range: Range, side: PrivateSide, wish: Wish<'_>) -> Segment {
    let is_resident_only = wish.intent == Intent::Resident;
    Segment {
        range,
        slot: slot.id(),
        hva: None,
        file: None,
        backing: HIDDEN,
        page_size: PAGE,
        host: if is_resident_only { HostMethod::Nothing } else { HostMethod::PopulateWrite },
        access: Access::Write,
        stage2: wish.stage2,
        resident_only: is_resident_only,
        private: Some(side_at(slot, range.start, side)),
    }
}

/// How one mapped piece is treated.
fn segment(
    host: &Host<'_>,
    slot: &Memslot,
    range: Range,
    hva: u64,
    mapping: Mapping,
    private: Option<PrivateSide>,
    wish: Wish<'_>,
) -> Result<Segment> {
    let into_slot = range.start - slot.region.gpa;
    let file = slot.file.map(|(fd, offset)| (fd, offset + into_slot));
    let kind = file.and_then(|(fd, _)| host.kernel.file_kind(fd).ok());
    // The file system knows its own kind better than a mapping's name tells, and the VMM best of all.
    let object = match (mapping.object, kind) {
        (MappedObject::File | MappedObject::Shmem, Some(kind)) => kind.object,
        (object, _) => object,
    };
    // What the VMM says of private memory is not about what is mapped here.
    let backing = slot.backing.filter(|said| private.is_none() || *said != HIDDEN);
    let backing = backing.unwrap_or(Backing { object, shared: mapping.shared });
    let page_size = [mapping.page_size, kind.map_or(0, |k| k.page_size)].into_iter().max().unwrap_or(0);
    let writes = wish.intent == Intent::Write && !slot.is_read_only();
    if writes && !mapping.writable {
        if let Some(side) = private {
            return Ok(unmapped(slot, range, side, wish));
        }
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
        private: private.map(|side| side_at(slot, range.start, side)),
    })
}
