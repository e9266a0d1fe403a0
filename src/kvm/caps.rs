//! What one kernel and one VM offer, asked once.

use super::uapi::KVM_CAP_GUEST_MEMFD_FLAGS;
use super::{Errno, Kernel, Sys, ioctls};
use crate::error::{Error, Reason, Result};
use std::os::fd::RawFd;

pub use ioctls::{QUIRK_SLOT_ZAP_ALL, largest_page, physical_address_bits};

const KVM_CAP_NR_MEMSLOTS: u32 = 10;
const KVM_CAP_READONLY_MEM: u32 = 81;
const KVM_CAP_MULTI_ADDRESS_SPACE: u32 = 118;
const KVM_CAP_DISABLE_QUIRKS2: u32 = 213;
const KVM_CAP_USER_MEMORY2: u32 = 231;
const KVM_CAP_MEMORY_ATTRIBUTES: u32 = 233;
const KVM_CAP_GUEST_MEMFD: u32 = 234;
const KVM_CAP_VM_TYPES: u32 = 235;
const KVM_CAP_PRE_FAULT_MEMORY: u32 = 236;

/// What the kernel offers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caps {
    /// The kernel's release: major, minor, patch.
    pub release: [u32; 3],
    /// It claims `KVM_PRE_FAULT_MEMORY` (only the ioctl's own answer proves it).
    pub pre_fault: bool,
    /// The slot-zap-all quirk exists and can be disabled.
    pub can_keep_mappings: bool,
    /// Read-only memslots.
    pub read_only: bool,
    /// guest_memfd.
    pub guest_memfd: bool,
    /// `GUEST_MEMFD_FLAG_*` that may be used.
    pub guest_memfd_flags: u64,
    /// `KVM_MEMORY_ATTRIBUTE_*` that may be set.
    pub memory_attributes: u64,
    /// Bitmap of VM types.
    pub vm_types: u64,
    /// Memslots an address space may have.
    pub memslots: u32,
    /// Address spaces.
    pub address_spaces: u32,
    /// Bits of a physical address of this host.
    pub gpa_bits: u32,
    /// Nested paging is in use; else shadow paging.
    pub nested_paging: bool,
    /// `KVM_SET_USER_MEMORY_REGION2`.
    pub user_memory2: bool,
    /// One past the last address of this process that a memslot may have.
    pub hva_end: u64,
    /// `KVM_X86_*`: the VM's type, where the caller has told it; 0 else.
    pub vm_type: u32,
    /// TDX: the bit of a gpa that says "shared", as a mask; told by the caller.
    pub gpa_shared_bit: u64,
}

/// Types of VMs with private memory.
pub const KVM_X86_SW_PROTECTED_VM: u32 = 1;
/// AMD's.
pub const KVM_X86_SNP_VM: u32 = 4;
/// Intel's.
pub const KVM_X86_TDX_VM: u32 = 5;

/// The most bits that a gpa of a memslot has where KVM does not use nested paging.
const SHADOWED_GPA_BITS: u32 = 52;

impl Caps {
    /// Asks the VM where there is one, `/dev/kvm` else: their answers differ, and the VM's is the one that holds.
    pub fn probe(kernel: &dyn Kernel, kvm: Option<RawFd>, vm: Option<RawFd>) -> Sys<Self> {
        let fd = vm.or(kvm).ok_or(Errno(libc::EBADF))?;
        let ask = |capability| kernel.check_extension(fd, capability);
        let release = release(kernel);
        let pre_fault = ask(KVM_CAP_PRE_FAULT_MEMORY)? != 0;
        // The VM answers VM_TYPES as well; all but the newest kernels ignore the fd for it.
        Ok(Self {
            release,
            pre_fault,
            can_keep_mappings: QUIRK_SLOT_ZAP_ALL != 0
                && u64::from(ask(KVM_CAP_DISABLE_QUIRKS2)?) & QUIRK_SLOT_ZAP_ALL != 0,
            read_only: ask(KVM_CAP_READONLY_MEM)? != 0,
            guest_memfd: ask(KVM_CAP_GUEST_MEMFD)? != 0,
            guest_memfd_flags: ask(KVM_CAP_GUEST_MEMFD_FLAGS)?.into(),
            memory_attributes: ask(KVM_CAP_MEMORY_ATTRIBUTES)?.into(),
            vm_types: ask(KVM_CAP_VM_TYPES)?.into(),
            memslots: ask(KVM_CAP_NR_MEMSLOTS)?,
            address_spaces: ask(KVM_CAP_MULTI_ADDRESS_SPACE)?.max(1),
            gpa_bits: physical_address_bits(),
            // Before that release the number means something else, where it means anything.
            nested_paging: if release < PRE_FAULT { has_nested_paging(kernel) } else { pre_fault },
            user_memory2: ask(KVM_CAP_USER_MEMORY2)? != 0,
            hva_end: kernel.user_addresses_end(),
            vm_type: 0,
            gpa_shared_bit: 0,
        })
    }

    /// Whether the VM has private memory: of type SW_PROTECTED, SNP or TDX.
    pub fn has_private_memory(&self) -> bool {
        self.memory_attributes & MEMORY_ATTRIBUTE_PRIVATE != 0
    }

    /// Refuses a type that these capabilities cannot be of.
    pub fn check_type(&self, vm_type: u32) -> Result<()> {
        let is_made = vm_type == 0 || self.vm_types.checked_shr(vm_type).unwrap_or(0) & 1 != 0;
        let has_private = matches!(vm_type, KVM_X86_SW_PROTECTED_VM | KVM_X86_SNP_VM | KVM_X86_TDX_VM);
        // Who says nothing says 0.
        if is_made && (vm_type == 0 || has_private == self.has_private_memory()) {
            return Ok(());
        }
        Err(Error::invalid(Reason::BadValue, format!("this VM is not of type {vm_type}"))
            .hint("pass the type that KVM_CREATE_VM was given (KVM_X86_*), or 0"))
    }

    /// The most bits of a gpa that KVM takes for a memslot.
    pub fn memslot_gpa_bits(&self) -> u32 {
        if self.nested_paging { self.gpa_bits } else { SHADOWED_GPA_BITS }
    }
}

/// The release that brought the pre-fault, whose capability says whether nested paging is in use.
const PRE_FAULT: [u32; 3] = [6, 11, 0];
/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
pub const MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;

/// Whether KVM uses nested paging, by its modules' own word; yes, where that cannot be read.
fn has_nested_paging(kernel: &dyn Kernel) -> bool {
    let parameters = ["kvm_intel/parameters/ept", "kvm_amd/parameters/npt"];
    let read = |name| kernel.read_file(&format!("/sys/module/{name}")).ok();
    !parameters.into_iter().filter_map(read).any(|value| matches!(value.trim(), "N" | "0"))
}

/// Whether a pre-fault hangs on this kernel when a slot's deletion has made the vCPU's page-table root obsolete:
/// all before Linux 6.15. Older ones than 6.11 have a pre-fault where a distribution brought it there.
pub fn roots_go_stale(release: [u32; 3]) -> bool {
    (release[0], release[1]) < (6, 15)
}

/// The running kernel's release.
pub fn release(kernel: &dyn Kernel) -> [u32; 3] {
    let text = kernel.read_file("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map_while(|n| n.parse().ok());
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}
