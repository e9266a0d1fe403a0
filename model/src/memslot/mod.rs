//! Memslots: what the VMM has told KVM of the guest's memory.
//!
//! A [`Memslot`] never changes. Whoever sets one makes a new one, and puts it into a new [`Memslots`], the snapshot that
//! vCPUs look things up in (the kernel's SRCU-protected `struct kvm_memslots`). [`check`] has the rules of the ioctls up to
//! where something is made, [`prepare`] makes the slot and has the rules that come later. Nothing here zaps, takes the MMU
//! lock, or decides when a snapshot becomes the current one.

mod check;
mod dirty;
mod lpage;
mod prepare;
mod snapshot;
mod sparse;

pub use check::{Rules, VmId, check, check_internal};
pub use dirty::DirtyBitmap;
pub use lpage::Lpage;
pub use prepare::{DirtyLogging, Making, prepare};
pub use snapshot::Memslots;

use std::fmt;
use std::sync::{Arc, Weak};

use crate::errno::{Errno, Result};
use crate::gmem::{GuestMemfd, Inode};
use crate::mistake::{Mistake, mistaken};
use crate::units::{Gfn, GfnRange, Hva, PAGE_SHIFT, Pfn, Privacy};

/// `KVM_MEM_LOG_DIRTY_PAGES`.
pub const LOG_DIRTY_PAGES: u32 = 1 << 0;
/// `KVM_MEM_READONLY`.
pub const READONLY: u32 = 1 << 1;
/// `KVM_MEM_GUEST_MEMFD`.
pub const GUEST_MEMFD: u32 = 1 << 2;

/// How many slots of an address space are the VMM's (`KVM_CAP_NR_MEMSLOTS`); KVM's own follow.
pub const USER_SLOTS: u32 = SLOTS - INTERNAL_SLOTS;
/// How many slots of an address space KVM keeps for itself.
pub const INTERNAL_SLOTS: u32 = 3;
const SLOTS: u32 = i16::MAX as u32;

/// `struct kvm_userspace_memory_region2`; the older ioctl has no file.
#[derive(Clone, Debug)]
pub struct Region {
    /// The slot's number, with its address space in the upper half.
    pub slot: u32,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// `guest_phys_addr`.
    pub gpa: u64,
    /// `memory_size`; 0 deletes.
    pub size: u64,
    /// `userspace_addr`.
    pub userspace_addr: u64,
    /// What the descriptor is. Looked at only with [`GUEST_MEMFD`].
    pub guest_memfd: FileArgument,
    /// Where in the file the slot begins.
    pub guest_memfd_offset: u64,
}

/// What lies behind a descriptor that should be a guest_memfd's.
#[derive(Clone)]
pub enum FileArgument {
    /// It is not open.
    BadFd,
    /// Another kind of file.
    NotGuestMemfd,
    /// A guest_memfd.
    File(Arc<GuestMemfd>),
}

impl fmt::Debug for FileArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileArgument::BadFd => f.write_str("BadFd"),
            FileArgument::NotGuestMemfd => f.write_str("NotGuestMemfd"),
            FileArgument::File(file) => write!(f, "File({:#x} bytes)", file.size()),
        }
    }
}

/// What setting a region does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// A new slot.
    Create,
    /// The slot goes.
    Delete,
    /// It comes to lie at another guest physical address; its flags may change too.
    Move,
    /// Dirty logging begins or ends.
    FlagsOnly,
    /// All is so already.
    Nothing,
}

/// The part of a guest_memfd that a slot is bound to.
///
/// Holds no reference to the file, only to what lies behind it: once the file is closed there are no pages to be had.
#[derive(Clone)]
pub struct GmemBinding {
    /// The file.
    pub file: Weak<GuestMemfd>,
    /// The page of the file at which the slot begins.
    pub first_index: u64,
    /// What the file's pages are.
    pub privacy: Privacy,
    /// `KVM_MEMSLOT_GMEM_ONLY`: the file can be mapped, so that shared accesses too go to it.
    pub serves_all: bool,
    pub(crate) inode: Arc<Inode>,
}

/// One slot. Immutable, but for the bits in what it shares with its successors.
pub struct Memslot {
    /// The address space: 1 is that of SMM.
    pub as_id: u16,
    /// The number in the address space.
    pub id: u16,
    /// The first frame.
    pub base: Gfn,
    /// How many frames.
    pub pages: u64,
    /// Where the memory is in the VMM's process.
    pub hva: Hva,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// The guest_memfd it is bound to.
    pub gmem: Option<GmemBinding>,
    /// Which frames may be mapped with large pages.
    pub lpage: Arc<Lpage>,
    /// Which pages the guest has written.
    pub dirty: Option<Arc<DirtyBitmap>>,
    /// `KVM_MEMSLOT_INVALID`: about to be deleted or moved. Nothing new is mapped.
    pub is_invalid: bool,
}

impl Memslot {
    /// Its frames.
    pub fn range(&self) -> GfnRange {
        GfnRange::new(self.base, self.pages)
    }

    /// Where a frame's memory is in the VMM's process.
    pub fn hva_of(&self, gfn: Gfn) -> Hva {
        self.hva.plus_pages(self.relative(gfn))
    }

    /// How far into the slot a frame lies.
    pub fn relative(&self, gfn: Gfn) -> u64 {
        gfn.0 - self.base.0
    }

    /// Whether the guest's writes are emulated and not done.
    pub fn is_read_only(&self) -> bool {
        self.flags & READONLY != 0 && !mistaken(Mistake::AReadOnlySlotIsWritten)
    }

    /// Whether the pages that the guest writes are logged.
    pub fn logs_dirty(&self) -> bool {
        self.flags & LOG_DIRTY_PAGES != 0
    }

    /// Whether private accesses find memory (`kvm_slot_has_gmem`).
    pub fn has_gmem(&self) -> bool {
        self.gmem.is_some()
    }

    /// Whether shared accesses too go to the guest_memfd (`kvm_memslot_is_gmem_only`).
    pub fn is_gmem_only(&self) -> bool {
        self.gmem.as_ref().is_some_and(|gmem| gmem.serves_all)
    }

    /// The page of its guest_memfd at which a frame lies.
    pub fn gmem_index(&self, gfn: Gfn) -> Option<u64> {
        Some(self.gmem.as_ref()?.first_index + self.relative(gfn))
    }

    /// The frame of its guest_memfd behind a frame (`kvm_gmem_get_pfn`): allocated, and zeroed, at the first use.
    ///
    /// EFAULT without a file or when it was closed, EHWPOISON where the memory has failed.
    pub fn gmem_pfn(&self, gfn: Gfn) -> Result<Pfn> {
        let gmem = self.gmem.as_ref().ok_or(Errno::EFAULT)?;
        let first = if mistaken(Mistake::TheOffsetInAFileIsForgotten) { 0 } else { gmem.first_index };
        gmem.inode.pfn(first + self.relative(gfn))
    }

    /// The same where there is one; nothing is allocated.
    pub fn gmem_page_there(&self, gfn: Gfn) -> Option<Pfn> {
        let gmem = self.gmem.as_ref()?;
        let index = gmem.first_index + self.relative(gfn);
        if gmem.inode.is_present(index) { gmem.inode.pfn(index).ok() } else { None }
    }

    /// The same slot about to be deleted or moved.
    pub fn invalid(&self) -> Arc<Memslot> {
        Arc::new(Memslot { is_invalid: true, ..self.copy() })
    }

    /// Gives its part of its guest_memfd back, when the slot has been deleted (`kvm_gmem_unbind`).
    pub fn unbind(&self) {
        let file = self.gmem.as_ref().and_then(|gmem| Some((gmem.file.upgrade()?, gmem.first_index)));
        if let Some((file, first_index)) = file {
            file.unbind(first_index);
        }
    }

    fn copy(&self) -> Memslot {
        Memslot {
            as_id: self.as_id,
            id: self.id,
            base: self.base,
            pages: self.pages,
            hva: self.hva,
            flags: self.flags,
            gmem: self.gmem.clone(),
            lpage: self.lpage.clone(),
            dirty: self.dirty.clone(),
            is_invalid: self.is_invalid,
        }
    }
}

impl fmt::Debug for Memslot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.range().end.gpa();
        let hva = self.hva.0;
        write!(
            f,
            "slot {}:{} {:#x}..{end:#x} at {hva:#x} flags {:#x}",
            self.as_id,
            self.id,
            self.base.gpa(),
            self.flags
        )?;
        if let Some(gmem) = &self.gmem {
            write!(f, " file page {:#x}", gmem.first_index)?;
        }
        if self.is_invalid { f.write_str(" invalid") } else { Ok(()) }
    }
}

const fn is_page_aligned(value: u64) -> bool {
    value & ((1 << PAGE_SHIFT) - 1) == 0
}

#[cfg(all(test, not(loom)))]
mod tests;
