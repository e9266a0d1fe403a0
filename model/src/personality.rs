//! Which kernel is modelled, and what it can.
//!
//! Whatever differs between kernels is a question asked here, by a name that says what differs. Nothing else in the model
//! compares versions.

use crate::errno::Errno;
use crate::units::{Gfn, Level, PAGE_SHIFT, PAGE_SIZE};

/// What kind of virtual machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmType {
    /// An ordinary one.
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: private memory without hardware that protects it.
    SwProtected,
    /// AMD's SEV-SNP.
    Snp,
    /// Intel's TDX.
    Tdx,
}

impl VmType {
    /// Every type that is modelled.
    pub const ALL: [VmType; 4] = [VmType::Default, VmType::SwProtected, VmType::Snp, VmType::Tdx];

    /// The number that KVM_CREATE_VM takes.
    pub const fn number(self) -> u64 {
        match self {
            VmType::Default => 0,
            VmType::SwProtected => 1,
            VmType::Snp => 4,
            VmType::Tdx => 5,
        }
    }

    /// Whether its guest frames can be private.
    pub const fn has_private_memory(self) -> bool {
        !matches!(self, VmType::Default)
    }

    /// Whether the guest's state is kept from the host, which then cannot emulate an instruction for it.
    pub const fn has_protected_state(self) -> bool {
        matches!(self, VmType::Snp | VmType::Tdx)
    }
}

/// A kernel's version.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Version(pub u16, pub u16);

/// A kernel and the machine it runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Personality {
    /// The kernel's version.
    pub version: Version,
    /// `CONFIG_KVM_SW_PROTECTED_VM`.
    pub has_sw_protected: bool,
    /// Whether the memory attributes' ioctl was compiled in: where SW_PROTECTED, TDX or SEV is configured.
    pub has_attributes: bool,
    /// The processor keeps accessed and dirty bits in stage-2 tables.
    pub has_accessed_dirty: bool,
    /// Bits of a guest physical address that memslots may use (the host's MAXPHYADDR).
    pub address_bits: u32,
    /// Bits of a user's address, 47 or 56.
    pub user_address_bits: u32,
    /// The largest page the processor can map in stage 2.
    pub largest_page: Level,
}

impl Personality {
    /// A kernel with everything compiled in, on a processor of 46 bits that has everything.
    pub const fn with_everything(version: Version) -> Self {
        Personality {
            version,
            has_sw_protected: true,
            has_attributes: true,
            has_accessed_dirty: true,
            address_bits: 46,
            user_address_bits: 47,
            largest_page: Level::GIGANTIC,
        }
    }
}

/// What differs between kernels in slots, guest_memfd and attributes.
impl Personality {
    /// Whether there are memory attributes: where they are compiled in, since Linux 6.8.
    pub fn has_memory_attributes(&self) -> bool {
        self.version >= Version(6, 8) && self.has_attributes
    }

    /// `KVM_CAP_MEMORY_ATTRIBUTES`: the attributes that a VM's frames can have.
    pub fn memory_attributes(&self, vm_type: VmType) -> u64 {
        if self.has_memory_attributes() && vm_type.has_private_memory() {
            crate::attributes::KVM_MEMORY_ATTRIBUTE_PRIVATE
        } else {
            0
        }
    }

    /// Whether there is `KVM_SET_USER_MEMORY_REGION2`.
    pub fn has_memory_region2(&self) -> bool {
        self.version >= Version(6, 8)
    }

    /// Whether there is `KVM_CREATE_GUEST_MEMFD`, for VMs of every type: at first only where there are attributes.
    pub fn has_guest_memfd(&self) -> bool {
        self.has_memory_attributes() || self.guest_memfd_is_for_all()
    }

    /// Whether a VM's slots may have a guest_memfd (`KVM_CAP_GUEST_MEMFD` of the VM).
    pub fn takes_guest_memfd_slots(&self, vm_type: VmType) -> bool {
        self.has_guest_memfd() && (vm_type.has_private_memory() || self.guest_memfd_is_for_all())
    }

    /// `KVM_CAP_GUEST_MEMFD_FLAGS`: what a VM's files may be made with.
    pub fn guest_memfd_flags(&self, vm_type: VmType) -> u64 {
        match (self.guest_memfd_is_for_all(), vm_type.has_private_memory()) {
            (false, _) => 0,
            (true, true) => crate::gmem::FLAG_MMAP,
            (true, false) => crate::gmem::FLAG_MMAP | crate::gmem::FLAG_INIT_SHARED,
        }
    }

    fn guest_memfd_is_for_all(&self) -> bool {
        self.version >= Version(6, 18)
    }

    /// What it is to bind a part of a guest_memfd that is bound.
    pub fn part_is_bound(&self) -> Errno {
        if self.version >= Version(7, 2) { Errno::EEXIST } else { Errno::EINVAL }
    }

    /// Whether that is found after all else that is wrong with a slot, and not with the file.
    pub fn finds_bound_parts_last(&self) -> bool {
        self.version >= Version(7, 3)
    }

    /// Whether a slot's part of a file is added up with a sign: a sum of 2^63 or more is then less than any size, and such a
    /// part is taken.
    pub fn adds_file_parts_with_sign(&self) -> bool {
        self.version < Version(7, 2)
    }

    /// Whether a page of a guest_memfd that the guest could have used may still be filled with an initial image.
    pub fn populates_used_pages(&self) -> bool {
        self.version >= Version(7, 0)
    }

    /// How many address spaces a VM has: SMM has its own, but not beside private memory.
    pub fn address_spaces(&self, vm_type: VmType) -> usize {
        if vm_type.has_private_memory() { 1 } else { 2 }
    }

    /// `KVM_CAP_READONLY_MEM` of a VM.
    pub fn has_read_only_slots(&self, vm_type: VmType) -> bool {
        !vm_type.has_protected_state()
    }

    /// Where a process's addresses end (`TASK_SIZE_MAX`).
    pub fn user_address_end(&self) -> u64 {
        (1 << self.user_address_bits) - PAGE_SIZE
    }

    /// The last frame that a slot may have (`kvm_mmu_max_gfn`).
    pub fn last_gfn(&self) -> Gfn {
        Gfn((1 << (self.address_bits - PAGE_SHIFT)) - 1)
    }
}

/// What differs between kernels in virtual machines and pre-faults.
impl Personality {
    /// Whether a VM of this type can be made.
    pub fn has_vm_type(&self, vm_type: VmType) -> bool {
        match vm_type {
            VmType::Default => true,
            VmType::SwProtected => self.version >= Version(6, 8) && self.has_sw_protected,
            VmType::Snp => self.version >= Version(6, 11),
            VmType::Tdx => self.version >= Version(6, 16),
        }
    }

    /// Whether there is `KVM_PRE_FAULT_MEMORY`.
    pub fn has_pre_fault(&self) -> bool {
        self.version >= Version(6, 11)
    }

    /// Whether a pre-fault of a slot that is being deleted or moved ends with EAGAIN. Before, it waits for what waits for it,
    /// until a signal comes.
    pub fn pre_fault_gives_up_on_changing_slot(&self) -> bool {
        self.version >= Version(6, 18)
    }

    /// Whether the end of a dirty log puts huge pages together again. Before, it takes small ones out, for the next access to
    /// map a huge one.
    pub fn puts_huge_pages_together(&self) -> bool {
        self.version >= Version(6, 13)
    }

    /// Whether a pre-fault begins a page with another root than the one that was in use when the mappings were undone. Before, it
    /// tries again and again with that one, until a signal comes; only a run of the guest lets go of it.
    pub fn pre_fault_lets_go_of_obsolete_roots(&self) -> bool {
        self.version >= Version(6, 17)
    }

    /// Whether a vCPU that remembers where it last found no memory forgets that when slots of the address space change that it
    /// is in. Before, only changes of the first address space count, and a vCPU in SMM takes memory that came for none.
    pub fn remembered_mmio_is_of_address_space(&self) -> bool {
        self.version >= Version(7, 0)
    }

    /// What of KVM's ways with memory is a quirk, which can be disabled (`KVM_CAP_DISABLE_QUIRKS2`): that deleting a slot
    /// undoes all mappings.
    pub fn memory_quirks(&self) -> u64 {
        if self.version >= Version(6, 12) { 1 << 7 } else { 0 }
    }
}

/// What differs between kernels in launching guests. (6.12 and 7.3 were read; what lies between is by the history.)
impl Personality {
    /// Whether an SNP guest's policy may forbid hyperthreading, and more than one socket.
    pub fn snp_leaves_topology_to_policy(&self) -> bool {
        self.version >= Version(6, 14)
    }

    /// Whether KVM_SEV_SNP_LAUNCH_UPDATE wants a length, and whole pages of the VMM's, which it takes hold of before it does
    /// anything with them.
    pub fn snp_launch_update_is_strict(&self) -> bool {
        self.version >= Version(7, 0)
    }

    /// Whether a vCPU has `KVM_MEMORY_ENCRYPT_OP`, which came with TDX.
    pub fn has_commands_of_vcpus(&self) -> bool {
        self.version >= Version(6, 16)
    }

    /// Whether KVM_SEV_INIT2 refuses the first version of the GHCB protocol to an SNP guest. By its source 6.12 does not; that
    /// 6.18 is the first that does, no source at hand confirms.
    pub fn snp_wants_second_ghcb_version(&self) -> bool {
        self.version >= Version(6, 18)
    }

    /// Whether there is KVM_SEV_SNP_ENABLE_REQ_CERTS.
    pub fn snp_asks_for_certificates(&self) -> bool {
        self.version >= Version(7, 0)
    }
}
