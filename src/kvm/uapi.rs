//! Numbers and layouts of the kernel's interface that `libc` does not carry.
//!
//! Each is named as in the kernel's headers; the younger ones with the version that brought them. They are stated
//! here and not taken from the kvm-bindings crate, which is under the Apache licence alone: a VMM under version 2 of
//! the GPL, QEMU for one, could not be distributed with it. The tests hold the two against each other.

#![allow(missing_docs, reason = "the kernel's own names")]

use libc::c_ulong;

#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

/// What KVM's ioctls take on x86-64, from `<linux/kvm.h>` and `<asm/kvm.h>`.
#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use libc::c_ulong;

    pub const KVM_CHECK_EXTENSION: c_ulong = 0xae03;
    pub const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
    /// Linux 6.8.
    pub const KVM_SET_USER_MEMORY_REGION2: c_ulong = 0x40a0_ae49;
    pub const KVM_ENABLE_CAP: c_ulong = 0x4068_aea3;
    /// Linux 5.14.
    pub const KVM_GET_STATS_FD: c_ulong = 0xaece;
    pub const KVM_GET_MSRS: c_ulong = 0xc008_ae88;
    pub const KVM_SET_MSRS: c_ulong = 0x4008_ae89;
    pub const KVM_GET_VCPU_EVENTS: c_ulong = 0x8040_ae9f;
    /// Linux 4.20.
    pub const KVM_GET_NESTED_STATE: c_ulong = 0xc080_aebe;
    /// Linux 6.8.
    pub const KVM_SET_MEMORY_ATTRIBUTES: c_ulong = 0x4020_aed2;
    /// Linux 6.8.
    pub const KVM_CREATE_GUEST_MEMFD: c_ulong = 0xc040_aed4;
    /// Linux 6.11.
    pub const KVM_PRE_FAULT_MEMORY: c_ulong = 0xc040_aed5;
    /// SNP: of a VM, Linux 6.11. TDX: of a vCPU, Linux 6.16. The size in its number is a pointer's, the structure is larger.
    pub const KVM_MEMORY_ENCRYPT_OP: c_ulong = 0xc008_aeba;
    pub const KVM_SEV_SNP_LAUNCH_UPDATE: u32 = 101;
    pub const KVM_TDX_INIT_MEM_REGION: u32 = 3;

    pub const KVM_CAP_DISABLE_QUIRKS2: u32 = 213;
    /// Linux 6.12.
    pub const KVM_X86_QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;

    #[repr(C)]
    pub struct kvm_enable_cap {
        pub cap: u32,
        pub flags: u32,
        pub args: [u64; 4],
        pub pad: [u8; 64],
    }

    #[repr(C)]
    pub struct kvm_userspace_memory_region {
        pub slot: u32,
        pub flags: u32,
        pub guest_phys_addr: u64,
        pub memory_size: u64,
        pub userspace_addr: u64,
    }

    #[repr(C)]
    pub struct kvm_userspace_memory_region2 {
        pub slot: u32,
        pub flags: u32,
        pub guest_phys_addr: u64,
        pub memory_size: u64,
        pub userspace_addr: u64,
        pub guest_memfd_offset: u64,
        pub guest_memfd: u32,
        pub pad1: u32,
        pub pad2: [u64; 14],
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_pre_fault_memory {
        pub gpa: u64,
        pub size: u64,
        pub flags: u64,
        pub padding: [u64; 5],
    }

    #[repr(C)]
    pub struct kvm_memory_attributes {
        pub address: u64,
        pub size: u64,
        pub attributes: u64,
        pub flags: u64,
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_create_guest_memfd {
        pub size: u64,
        pub flags: u64,
        pub reserved: [u64; 6],
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_sev_cmd {
        pub id: u32,
        pub pad0: u32,
        pub data: u64,
        pub error: u32,
        pub sev_fd: u32,
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_sev_snp_launch_update {
        pub gfn_start: u64,
        pub uaddr: u64,
        pub len: u64,
        pub type_: u8,
        pub pad0: u8,
        pub flags: u16,
        pub pad1: u32,
        pub pad2: [u64; 4],
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_tdx_cmd {
        pub id: u32,
        pub flags: u32,
        pub data: u64,
        pub hw_error: u64,
    }
    const _: () = assert!(size_of::<kvm_tdx_cmd>() == 24);

    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_tdx_init_mem_region {
        pub source_addr: u64,
        pub gpa: u64,
        pub nr_pages: u64,
    }
    const _: () = assert!(size_of::<kvm_tdx_init_mem_region>() == 24);

    /// `struct kvm_msrs` with one entry.
    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_msrs_of_one {
        pub nmsrs: u32,
        pub pad: u32,
        pub entry: kvm_msr_entry,
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct kvm_msr_entry {
        pub index: u32,
        pub reserved: u32,
        pub data: u64,
    }

    /// The one field of it that is read.
    #[repr(C)]
    pub struct kvm_vcpu_events {
        pub before_smi: [u32; 6],
        pub smi_smm: u8,
        pub after: [u8; 39],
    }

    /// With room for all that KVM has to say after it; its size is asked for and told in `size`.
    #[repr(C)]
    pub struct kvm_nested_state {
        pub flags: u16,
        pub format: u16,
        pub size: u32,
        pub rest: [u64; 15 + 2 * 512],
    }

    impl Default for kvm_nested_state {
        fn default() -> Self {
            Self { flags: 0, format: 0, size: size_of::<Self>() as u32, rest: [0; 15 + 2 * 512] }
        }
    }

    pub const KVM_STATE_NESTED_GUEST_MODE: u16 = 1;

    /// Of `struct kvm_run`, in bytes.
    pub const KVM_RUN_IMMEDIATE_EXIT: usize = 1;

    #[cfg(test)]
    mod tests {
        use super::*;
        use std::mem::offset_of;

        /// Holds a type of ours and its fields against kvm-bindings'.
        macro_rules! assert_same {
            ($name:ident: $($field:ident),*) => {
                assert_eq!(size_of::<$name>(), size_of::<kvm_bindings::$name>(), stringify!($name));
                $(assert_eq!(
                    offset_of!($name, $field),
                    offset_of!(kvm_bindings::$name, $field),
                    concat!(stringify!($name), ".", stringify!($field))
                );)*
            };
        }

        #[test]
        fn layouts_and_numbers_are_the_kernel_s() {
            assert_same!(kvm_enable_cap: cap, flags, args);
            assert_same!(kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr);
            assert_same!(kvm_userspace_memory_region2: slot, flags, guest_phys_addr, memory_size, userspace_addr,
                guest_memfd_offset, guest_memfd);
            assert_same!(kvm_pre_fault_memory: gpa, size, flags);
            assert_same!(kvm_memory_attributes: address, size, attributes, flags);
            assert_same!(kvm_create_guest_memfd: size, flags);
            assert_same!(kvm_sev_cmd: id, data, error, sev_fd);
            assert_same!(kvm_sev_snp_launch_update: gfn_start, uaddr, len, type_, flags);
            assert_eq!(KVM_SEV_SNP_LAUNCH_UPDATE, kvm_bindings::sev_cmd_id_KVM_SEV_SNP_LAUNCH_UPDATE);
            assert_same!(kvm_msr_entry: index, data);
            assert_eq!(offset_of!(kvm_msrs_of_one, entry), size_of::<kvm_bindings::kvm_msrs>());
            assert_eq!(offset_of!(kvm_msrs_of_one, nmsrs), offset_of!(kvm_bindings::kvm_msrs, nmsrs));
            assert_eq!(size_of::<kvm_vcpu_events>(), size_of::<kvm_bindings::kvm_vcpu_events>());
            assert_eq!(
                offset_of!(kvm_vcpu_events, smi_smm),
                offset_of!(kvm_bindings::kvm_vcpu_events, smi.smm)
            );
            assert_eq!(offset_of!(kvm_nested_state, size), offset_of!(kvm_bindings::kvm_nested_state, size));
            let most = size_of::<kvm_bindings::kvm_vmx_nested_state_data>()
                .max(size_of::<kvm_bindings::kvm_svm_nested_state_data>());
            assert_eq!(size_of::<kvm_nested_state>(), size_of::<kvm_bindings::kvm_nested_state>() + most);
            assert_eq!(u32::from(KVM_STATE_NESTED_GUEST_MODE), kvm_bindings::KVM_STATE_NESTED_GUEST_MODE);
            assert_eq!(KVM_RUN_IMMEDIATE_EXIT, offset_of!(kvm_bindings::kvm_run, immediate_exit));
            assert_eq!(KVM_CAP_DISABLE_QUIRKS2, kvm_bindings::KVM_CAP_DISABLE_QUIRKS2);
            assert_eq!(KVM_X86_QUIRK_SLOT_ZAP_ALL, u64::from(kvm_bindings::KVM_X86_QUIRK_SLOT_ZAP_ALL));
        }
    }
}

/// Linux 6.19 at the latest, `<linux/kvm.h>`.
pub const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// Linux 6.11, `<linux/fs.h>`: `_IOWR('f', 17, struct procmap_query)`.
pub const PROCMAP_QUERY: c_ulong = 0xc068_6611;
pub const PROCMAP_QUERY_VMA_READABLE: u64 = 0x01;
pub const PROCMAP_QUERY_VMA_WRITABLE: u64 = 0x02;
pub const PROCMAP_QUERY_VMA_SHARED: u64 = 0x08;
pub const PROCMAP_QUERY_COVERING_OR_NEXT_VMA: u64 = 0x10;

#[repr(C)]
#[derive(Default)]
pub struct procmap_query {
    pub size: u64,
    pub query_flags: u64,
    pub query_addr: u64,
    pub vma_start: u64,
    pub vma_end: u64,
    pub vma_flags: u64,
    pub vma_page_size: u64,
    pub vma_offset: u64,
    pub inode: u64,
    pub dev_major: u32,
    pub dev_minor: u32,
    pub vma_name_size: u32,
    pub build_id_size: u32,
    pub vma_name_addr: u64,
    pub build_id_addr: u64,
}
const _: () = assert!(size_of::<procmap_query>() == 104);

/// Linux 6.7, `<linux/fs.h>`: `_IOWR('f', 16, struct pm_scan_arg)`.
pub const PAGEMAP_SCAN: c_ulong = 0xc060_6610;
pub const PAGE_IS_PRESENT: u64 = 1 << 3;
pub const PAGE_IS_SWAPPED: u64 = 1 << 4;
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;
pub const PAGE_IS_HUGE: u64 = 1 << 6;

#[repr(C)]
#[derive(Default)]
pub struct pm_scan_arg {
    pub size: u64,
    pub flags: u64,
    pub start: u64,
    pub end: u64,
    pub walk_end: u64,
    pub vec: u64,
    pub vec_len: u64,
    pub max_pages: u64,
    pub category_inverted: u64,
    pub category_mask: u64,
    pub category_anyof_mask: u64,
    pub return_mask: u64,
}
const _: () = assert!(size_of::<pm_scan_arg>() == 96);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct page_region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// `/proc/PID/pagemap`, one 64-bit word a page: the page is in memory.
pub const PAGEMAP_PRESENT: u64 = 1 << 63;
