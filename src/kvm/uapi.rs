//! Numbers and layouts of the kernel's interface that neither `libc` nor `kvm-bindings` carries yet.
//!
//! Each is named as in the kernel's headers, with the version that brought it.

#![allow(missing_docs, reason = "the kernel's own names")]

use libc::c_ulong;

/// Linux 6.11, `<linux/kvm.h>`: `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)`.
#[cfg(target_arch = "x86_64")]
pub const KVM_PRE_FAULT_MEMORY: c_ulong = 0xc040_aed5;
/// Linux 6.19 at the latest, `<linux/kvm.h>`.
pub const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// Linux 6.11, `<linux/fs.h>`: `_IOWR('f', 17, struct procmap_query)`.
pub const PROCMAP_QUERY: c_ulong = 0xc068_6611;
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
pub const PAGE_IS_PFNZERO: u64 = 1 << 5;

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
