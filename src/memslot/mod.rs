//! Memslots: what a VMM says of one, and the record of all of a guest's.
//!
//! The record mirrors what the kernel was told and answers "what lies at this gpa". It makes no system call and
//! knows nothing of populating.

mod record;

pub use record::SlotRecord;

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{MEM_GUEST_MEMFD, MEM_LOG_DIRTY_PAGES, MEM_READONLY, MappedObject, Region};
use crate::range::{Range, is_page_aligned};
use std::os::fd::RawFd;

/// A slot number with its address space in the upper half, as KVM encodes it.
pub type SlotId = u32;

/// The address space a slot belongs to.
pub fn address_space(slot: SlotId) -> u32 {
    slot >> 16
}

/// What lies behind a slot's memory, and whether writes to it reach that or a private copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// What lies behind.
    pub object: MappedObject,
    /// `MAP_SHARED`; for a guest_memfd: that the VMM has it mapped and the guest's shared accesses reach it.
    pub shared: bool,
}

impl Backing {
    /// Every backing, in the order of the C constants, of which the first is 1.
    pub const ALL: [Backing; 9] = [
        Backing { object: MappedObject::Anonymous, shared: false },
        Backing { object: MappedObject::Shmem, shared: true },
        Backing { object: MappedObject::Shmem, shared: false },
        Backing { object: MappedObject::File, shared: true },
        Backing { object: MappedObject::File, shared: false },
        Backing { object: MappedObject::Hugetlb, shared: true },
        Backing { object: MappedObject::Hugetlb, shared: false },
        Backing { object: MappedObject::GuestMemfd, shared: true },
        Backing { object: MappedObject::GuestMemfd, shared: false },
    ];

    /// Its place in [`Backing::ALL`].
    pub fn index(self) -> usize {
        Self::ALL.iter().position(|b| *b == self).unwrap_or(0)
    }
}

/// What the VMM says of a slot beyond what KVM wants to know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nature {
    /// Memory of which only parts are in use (virtio-mem): populated only when named.
    pub sparse: bool,
    /// Not memory at all (a device's BAR): never populated.
    pub device: bool,
    /// Registered with userfaultfd, or may be: only resident pages may be touched.
    pub userfaultfd: bool,
}

/// A memslot as the VMM describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memslot {
    /// What KVM is told.
    pub region: Region,
    /// What lies behind it; `None`: ask the kernel.
    pub backing: Option<Backing>,
    /// The file mapped at the slot's hva, with the offset in bytes that is mapped there.
    pub file: Option<(RawFd, u64)>,
    /// What else the VMM says.
    pub nature: Nature,
}

impl Memslot {
    /// Its number.
    pub fn id(&self) -> SlotId {
        self.region.slot
    }

    /// The guest memory it covers; `None` for the deletion of a slot.
    pub fn range(&self) -> Option<Range> {
        Range::new(self.region.gpa, self.region.size)
    }

    /// The guest memory that it has in `host`, a range of this process's.
    pub fn gpas_of(&self, host: Range) -> Option<Range> {
        let part = Range::new(self.region.hva, self.region.size)?.intersect(&host)?;
        Range::new(self.region.gpa + (part.start - self.region.hva), part.size())
    }

    /// Whether the guest may not write it.
    pub fn is_read_only(&self) -> bool {
        self.region.flags & MEM_READONLY != 0
    }

    /// Whether KVM logs the guest's writes to it.
    pub fn is_dirty_logged(&self) -> bool {
        self.region.flags & MEM_LOG_DIRTY_PAGES != 0
    }

    /// Whether it has a guest_memfd.
    pub fn has_guest_memfd(&self) -> bool {
        self.region.flags & MEM_GUEST_MEMFD != 0
    }

    /// Looks for plain mistakes, those that need no other slot to be seen.
    pub fn check(&self, gpa_bits: u32) -> Result<()> {
        let region = &self.region;
        let wrong =
            |reason, message: String| Error::invalid(reason, message).stage(Stage::Memslot).slot(region.slot);
        if region.flags & !(MEM_READONLY | MEM_LOG_DIRTY_PAGES | MEM_GUEST_MEMFD) != 0 {
            return Err(wrong(
                Reason::UnknownFlags,
                format!("memslot flags {:#x} are not all known", region.flags),
            )
            .hint("use KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY and KVM_MEM_GUEST_MEMFD only"));
        }
        let unaligned = |what: &str, value: u64| {
            wrong(
                Reason::RangeUnaligned,
                format!("memslot {what} {value:#x} is not a multiple of 4096 bytes"),
            )
            .hint("align the slot's gpa, hva, size and guest_memfd offset to 4096 bytes")
        };
        for (what, value) in [("size", region.size), ("gpa", region.gpa), ("hva", region.hva)] {
            if !is_page_aligned(value) {
                return Err(unaligned(what, value));
            }
        }
        if self.has_guest_memfd() && !is_page_aligned(region.guest_memfd_offset) {
            return Err(unaligned("guest_memfd offset", region.guest_memfd_offset));
        }
        if region.size == 0 {
            return Ok(());
        }
        let overflows = |what: &str, start: u64| {
            wrong(
                Reason::RangeOverflow,
                format!("memslot {what} {start:#x} plus size {:#x} wraps", region.size),
            )
            .hint("check where the slot's start and size come from")
        };
        let Some(range) = self.range() else { return Err(overflows("gpa", region.gpa)) };
        if region.hva.checked_add(region.size).is_none() {
            return Err(overflows("hva", region.hva));
        }
        if self.has_guest_memfd() && region.guest_memfd_offset.checked_add(region.size).is_none() {
            return Err(overflows("guest_memfd offset", region.guest_memfd_offset));
        }
        check_guest_width(range, gpa_bits).map_err(|error| error.stage(Stage::Memslot).slot(region.slot))
    }
}

/// Checks that `range` lies below the guest's address width.
pub fn check_guest_width(range: Range, gpa_bits: u32) -> Result<()> {
    if gpa_bits < 64 && range.end > 1 << gpa_bits {
        return Err(Error::invalid(
            Reason::RangeBeyondGuest,
            format!("guest range {range} ends beyond the guest's {gpa_bits} address bits"),
        )
        .range(range)
        .hint("keep guest memory below the address width (kvmprep_vm_config.gpa_bits)"));
    }
    Ok(())
}
