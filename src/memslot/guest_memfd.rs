//! Whether a slot's guest_memfd does what its VMM means by it. KVM takes both of these without a word.
//!
//! It asks the kernel about the file and the mapping and changes nothing. That KVM would refuse the file is [`super::check`]'s.

use super::Memslot;
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{Kernel, MappedObject, Mappings};

/// What is wrong with a slot's guest_memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pitfall {
    /// It is never used: the file cannot be mapped, and the VM has no private memory (kvm_mmu_faultin_pfn).
    Unused,
    /// It serves all of the guest's accesses, and at the hva there is other memory, to which KVM's own accesses and the
    /// VMM's go (kvm_gmem_prepare_memory_region).
    Elsewhere,
}

impl Pitfall {
    /// What a slot has walked into; nothing, where the kernel will not say.
    pub fn of(kernel: &dyn Kernel, caps: &Caps, slot: &Memslot, mappings: &Mappings<'_>) -> Option<Self> {
        let fd = slot.region.guest_memfd;
        if !slot.has_guest_memfd() || kernel.is_guest_memfd(fd) != Some(true) {
            return None;
        }
        if kernel.can_map_guest_memfd(fd) {
            return (!is_mapped_at_hva(kernel, slot, mappings)).then_some(Pitfall::Elsewhere);
        }
        (!caps.has_private_memory()).then_some(Pitfall::Unused)
    }

    /// What is wrong, in words, and what to do.
    pub fn in_words(self) -> (&'static str, &'static str) {
        match self {
            Pitfall::Unused => (
                "KVM never uses the memslot's guest_memfd: the VM has no private memory, and the file cannot be mapped",
                "make the file with KVMPREP_GMEM_MMAP (Linux 6.18), make a VM of a type with private memory, or leave it out",
            ),
            Pitfall::Elsewhere => (
                "the memslot's guest_memfd serves the guest, and its hva is no mapping of the same part of that file: KVM's own \
                 accesses and yours reach other memory",
                "map the file at guest_memfd_offset, MAP_SHARED, and give that address as hva",
            ),
        }
    }

    /// The same as an error.
    pub fn into_error(self, slot: &Memslot) -> Error {
        let reason = match self {
            Pitfall::Unused => Reason::GmemUnused,
            Pitfall::Elsewhere => Reason::GmemElsewhere,
        };
        let (message, hint) = self.in_words();
        let error = Error::invalid(reason, message).hint(hint).stage(Stage::Memslot).slot(slot.id());
        Error { range: slot.range(), ..error }
    }
}

/// Refuses a slot with such a guest_memfd.
pub fn check(kernel: &dyn Kernel, caps: &Caps, slot: &Memslot) -> Result<()> {
    if !slot.has_guest_memfd() {
        return Ok(());
    }
    let mappings =
        Mappings::now(kernel).map_err(|errno| Error::system(errno, "looking up the slot's mapping"))?;
    Pitfall::of(kernel, caps, slot, &mappings).map_or(Ok(()), |pitfall| Err(pitfall.into_error(slot)))
}

/// Whether the slot's hva is a mapping of its part of the file.
fn is_mapped_at_hva(kernel: &dyn Kernel, slot: &Memslot, mappings: &Mappings<'_>) -> bool {
    let region = &slot.region;
    let file = kernel.file_status(region.guest_memfd).ok();
    let mut at = region.hva;
    let end = region.hva + region.size;
    while at < end {
        let Ok(Some(mapping)) = mappings.at(at) else { return false };
        let is_of_it = mapping.start <= at
            && mapping.object == MappedObject::GuestMemfd
            && mapping.offset + (at - mapping.start) == region.guest_memfd_offset + (at - region.hva)
            && file.is_none_or(|file| file.id.inode == mapping.inode);
        if !is_of_it {
            return false;
        }
        at = mapping.end;
    }
    true
}
