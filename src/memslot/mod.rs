//! Memslots: what a VMM says of one, the rules for one among others, and what page sizes it can have.
//!
//! [`check`] has KVM's own rules, [`guest_memfd`] what KVM lets pass that nobody means, [`alignment`] the rules beyond
//! them that decide on huge pages, [`prediction`] the page
//! sizes that come of both and of the [`host`]'s memory. The record mirrors what the kernel was told and answers "what
//! lies at this gpa". Nothing here changes anything in the kernel, or knows of populating.

pub mod alignment;
pub mod check;
pub mod guest_memfd;
pub mod host;
pub mod prediction;
mod record;
pub mod report;

pub use record::{Placed, SlotRecord};

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{FileId, MEM_GUEST_MEMFD, MEM_LOG_DIRTY_PAGES, MEM_READONLY, MappedObject, Region};
use crate::range::{Range, is_page_aligned};
use std::os::fd::RawFd;

/// A slot number with its address space in the upper half, as KVM encodes it.
pub type SlotId = u32;

/// The address space a slot belongs to.
pub fn address_space(slot: SlotId) -> u32 {
    slot >> 16
}

/// A slot's number in its address space.
pub fn slot_number(slot: SlotId) -> u32 {
    slot & 0xffff
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

    /// What the VMM says lies at the hva: nothing, where it says that all is in a guest_memfd that is not mapped.
    pub fn said_of_hva(&self) -> Option<Backing> {
        self.backing.filter(|backing| backing.object != MappedObject::GuestMemfd || backing.shared)
    }

    /// Whether all of it is private, in a guest_memfd that the host has no mapping of. Where there is private memory its
    /// VMM may say so, or that none of it is; who says nothing is taken to mean all, unless the guest_memfd is mapped at
    /// its hva. KVM goes by each page's attribute, of which nothing is known here.
    pub fn is_hidden(
        &self,
        has_private_memory: bool,
        is_mapped: impl FnOnce() -> Result<bool>,
    ) -> Result<bool> {
        if !self.has_guest_memfd() || !has_private_memory {
            return Ok(false);
        }
        match self.backing {
            Some(backing) => Ok(backing == Backing { object: MappedObject::GuestMemfd, shared: false }),
            None => Ok(!is_mapped()?),
        }
    }

    /// The guest memory it covers; `None` for the deletion of a slot.
    pub fn range(&self) -> Option<Range> {
        Range::new(self.region.gpa, self.region.size)
    }

    /// The address in this process of a gpa in it.
    pub fn hva_of(&self, gpa: u64) -> u64 {
        self.region.hva + (gpa - self.region.gpa)
    }

    /// The guest_memfd, where it has one, and where in it a gpa of the slot lies.
    pub fn guest_memfd_at(&self, gpa: u64) -> Option<(RawFd, u64)> {
        let offset = self.region.guest_memfd_offset + (gpa - self.region.gpa);
        self.has_guest_memfd().then_some((self.region.guest_memfd, offset))
    }

    /// The file that is mapped at its hva, where the VMM told, and where in it a gpa of the slot lies.
    pub fn file_at(&self, gpa: u64) -> Option<(RawFd, u64)> {
        self.file.map(|(fd, offset)| (fd, offset + (gpa - self.region.gpa)))
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

    /// Looks for plain mistakes, those that need neither another slot nor the kernel to be seen.
    pub fn check(&self, gpa_bits: u32) -> Result<()> {
        let check = || {
            self.check_flags()?;
            self.check_form()?;
            if self.has_guest_memfd() && self.region.size != 0 && self.region.guest_memfd < 0 {
                let fd = self.region.guest_memfd;
                return Err(Error::new(
                    libc::EBADF,
                    Reason::BadFd,
                    format!("guest_memfd is {fd}, which is no descriptor"),
                )
                .hint("pass what KVM_CREATE_GUEST_MEMFD returned"));
            }
            self.range().map_or(Ok(()), |range| check_guest_width(range, gpa_bits))
        };
        check().map_err(|error| error.stage(Stage::Memslot).slot(self.id()))
    }

    /// Refuses flags that nobody knows.
    fn check_flags(&self) -> Result<()> {
        let flags = self.region.flags;
        if flags & !(MEM_READONLY | MEM_LOG_DIRTY_PAGES | MEM_GUEST_MEMFD) == 0 {
            return Ok(());
        }
        Err(Error::invalid(Reason::UnknownFlags, format!("memslot flags {flags:#x} are not all known"))
            .hint("use KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY and KVM_MEM_GUEST_MEMFD only"))
    }

    /// Refuses what is not aligned or wraps.
    pub fn check_form(&self) -> Result<()> {
        let region = &self.region;
        let offset = if self.has_guest_memfd() { region.guest_memfd_offset } else { 0 };
        let places = [("gpa", region.gpa), ("hva", region.hva), ("guest_memfd offset", offset)];
        let unaligned = places.into_iter().chain([("size", region.size)]).find(|(_, v)| !is_page_aligned(*v));
        if let Some((what, value)) = unaligned {
            return Err(Error::invalid(
                Reason::RangeUnaligned,
                format!("memslot {what} {value:#x} is not a multiple of 4096 bytes"),
            )
            .hint("align the slot's gpa, hva, size and guest_memfd offset to 4096 bytes"));
        }
        let wrapping = places.into_iter().find(|(_, start)| start.checked_add(region.size).is_none());
        if let Some((what, start)) = wrapping {
            return Err(Error::invalid(
                Reason::RangeOverflow,
                format!("memslot {what} {start:#x} plus size {:#x} wraps", region.size),
            )
            .hint("check where the slot's start and size come from"));
        }
        Ok(())
    }
}

/// The slots of a VM, as far as a new one is to be held against them.
pub trait Slots {
    /// The slot of that number.
    fn slot(&self, id: SlotId) -> Option<Memslot>;
    /// A slot of the same address space, but for `id` itself, that has something of `range`, and where it lies.
    fn overlapping(&self, range: Range, id: SlotId) -> Option<(SlotId, Range)>;
    /// A slot that is bound to something of that part of a guest_memfd.
    fn bound(&self, file: FileId, part: Range) -> Option<SlotId>;
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
