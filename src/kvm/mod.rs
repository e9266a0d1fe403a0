//! What the kernel offers, behind one trait.
//!
//! All that the library ever asks of Linux and KVM is a method of [`Kernel`]; [`Linux`] is the real one. A test
//! or a benchmark puts its own beneath the library and so can fail any system call, or answer none of them.
//! Nothing in here decides what to do about an answer.

mod linux;
mod maps;
mod smaps;
mod stats;
mod uapi;

#[cfg(target_arch = "x86_64")]
#[path = "ioctls_x86_64.rs"]
mod ioctls;
#[cfg(not(target_arch = "x86_64"))]
#[path = "ioctls_none.rs"]
mod ioctls;
/// For its tests.
#[cfg(all(test, target_arch = "x86_64"))]
#[allow(dead_code, reason = "what other machines use")]
mod ioctls_none;

pub mod caps;
pub mod thp;

pub use linux::{Linux, block_asynchronous_signals};
pub use maps::Mappings;
pub use smaps::Smaps;
pub use stats::Stats;

use crate::range::Range;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// An errno as the kernel gave it, positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", std::io::Error::from_raw_os_error(self.0))
    }
}

impl std::error::Error for Errno {}

/// What a system call answers.
pub type Sys<T> = Result<T, Errno>;

/// `KVM_MEM_LOG_DIRTY_PAGES`.
pub const MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;
/// `KVM_MEM_READONLY`.
pub const MEM_READONLY: u32 = 1 << 1;
/// `KVM_MEM_GUEST_MEMFD`.
pub const MEM_GUEST_MEMFD: u32 = 1 << 2;

/// Where user addresses end on x86-64 with four levels of page tables, less a guard page.
pub const USER_ADDRESSES_END: u64 = (1 << 47) - crate::range::PAGE;

/// A memory region as KVM takes it, in KVM's own encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Slot number, its address space in the upper half.
    pub slot: u32,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// Guest physical address, bytes.
    pub gpa: u64,
    /// Bytes; 0 deletes the slot.
    pub size: u64,
    /// Address in this process, bytes.
    pub hva: u64,
    /// The guest_memfd, where the flags say there is one.
    pub guest_memfd: RawFd,
    /// Offset into it, bytes.
    pub guest_memfd_offset: u64,
}

/// How memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// As by a read: never breaks copy-on-write.
    Read,
    /// As by a write, content unchanged.
    Write,
}

/// What lies behind a mapping of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappedObject {
    /// Anonymous memory.
    Anonymous,
    /// Shared memory without a file system of its own: memfd, tmpfs, shared anonymous.
    Shmem,
    /// Huge pages from a pool.
    Hugetlb,
    /// A guest_memfd.
    GuestMemfd,
    /// A file on any other file system.
    File,
}

/// One mapping of this process, as the kernel tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Where in its file it begins, in bytes.
    pub offset: u64,
    /// The file's inode; 0 where there is no file.
    pub inode: u64,
    /// `PROT_READ`.
    pub readable: bool,
    /// `PROT_WRITE`.
    pub writable: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
    /// A file on a mount, whose huge pages are that mount's affair; memfds and their like are on none.
    pub on_mount: bool,
    /// Bytes in a page of it; 0 where the kernel does not say.
    pub page_size: u64,
    /// What lies behind.
    pub object: MappedObject,
}

/// The kind of file behind a descriptor, as far as populating cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileKind {
    /// What a mapping of it is.
    pub object: MappedObject,
    /// Bytes in a page of it.
    pub page_size: u64,
}

/// Which file it is, under however many descriptors: device and inode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileId {
    /// The device.
    pub device: u64,
    /// The inode.
    pub inode: u64,
}

/// Which file a descriptor is of, and how large it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStatus {
    /// Which.
    pub id: FileId,
    /// Bytes to its end.
    pub length: u64,
    /// Bytes that it has been given, holes apart.
    pub allocated: u64,
}

/// What a process has given up of transparent huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePagesDisabled {
    /// Nothing.
    No,
    /// Those that are not advised (Linux 6.18).
    ExceptAdvised,
    /// All.
    Yes,
}

/// A place in this process where a vCPU's owner can say "come out": the `immediate_exit` byte of `kvm_run`.
pub trait ExitRequest: Send {
    /// Whether the owner has asked.
    fn is_set(&self) -> bool;
}

/// Guest pages that are to be put into the initial image, and where this process has their content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImagePages {
    /// Where in the guest.
    pub range: Range,
    /// Address of the content, bytes; `None` for zeroes.
    pub source: Option<u64>,
}

impl ImagePages {
    /// Those of them that are in `part`, which lies in the range.
    pub fn part(&self, part: Range) -> Self {
        Self { range: part, source: self.source.map(|source| source + (part.start - self.range.start)) }
    }
}

/// What a call that puts pages into the initial image came to: it may have put some there and have failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launched {
    /// What is left of the pages, `None` when nothing is.
    pub left: Option<Range>,
    /// Its answer. `EPROTO`: what it said of its progress cannot be, so nobody knows.
    pub answer: Sys<()>,
    /// The code of the firmware, or of the TDX module; 0 where there is none.
    pub firmware: u64,
}

impl Launched {
    /// Nothing was done.
    pub fn refused(pages: &ImagePages, errno: Errno) -> Self {
        Self { left: Some(pages.range), answer: Err(errno), firmware: 0 }
    }
}

/// What a kernel answers that does not know a call.
pub const UNKNOWN: Errno = Errno(libc::ENOTTY);

/// Every system call of the library. Those that need private memory, or serve it alone, are not known to a kernel that
/// does not say so.
pub trait Kernel: Send + Sync {
    /// `KVM_CHECK_EXTENSION` on `/dev/kvm` or a VM.
    fn check_extension(&self, fd: RawFd, capability: u32) -> Sys<u32>;
    /// Disables quirks of a VM for good (`KVM_CAP_DISABLE_QUIRKS2`).
    fn disable_quirks(&self, vm: RawFd, mask: u64) -> Sys<()>;
    /// `KVM_SET_USER_MEMORY_REGION2`, or the first version where the region needs no more than that.
    fn set_region(&self, vm: RawFd, region: &Region) -> Sys<()>;
    /// `KVM_CREATE_GUEST_MEMFD`: a new descriptor, not yet close-on-exec.
    fn create_guest_memfd(&self, _vm: RawFd, _size: u64, _flags: u64) -> Sys<OwnedFd> {
        Err(UNKNOWN)
    }
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    fn set_attributes(&self, _vm: RawFd, _range: Range, _attributes: u64) -> Sys<()> {
        Err(UNKNOWN)
    }
    /// `KVM_PRE_FAULT_MEMORY`: returns what is left of `range`, `None` when nothing is.
    fn pre_fault(&self, vcpu: RawFd, range: Range) -> Sys<Option<Range>>;
    /// `KVM_TDX_INIT_MEM_REGION` through a vCPU: puts pages into a TDX guest's initial image.
    fn tdx_init_mem_region(&self, _vcpu: RawFd, pages: &ImagePages, _flags: u32) -> Launched {
        Launched::refused(pages, UNKNOWN)
    }
    /// `KVM_SEV_SNP_LAUNCH_UPDATE`: puts pages of that type into an SNP guest's initial image; `sev` is the firmware's device.
    fn snp_launch_update(&self, _vm: RawFd, _sev: RawFd, pages: &ImagePages, _page_type: u8) -> Launched {
        Launched::refused(pages, UNKNOWN)
    }
    /// Whether the vCPU now uses other page tables than at most times: it is in system management mode, or its guest
    /// runs a nested one. No, where that cannot be known.
    fn uses_other_tables(&self, _vcpu: RawFd) -> bool {
        false
    }
    /// The binary statistics of a vCPU or VM.
    fn stats(&self, fd: RawFd) -> Sys<Stats>;
    /// Watches a vCPU's `immediate_exit`.
    fn exit_request(&self, vcpu: RawFd) -> Sys<Box<dyn ExitRequest>>;

    /// `MADV_POPULATE_READ` or `_WRITE`.
    fn populate(&self, hva: u64, size: u64, access: Access) -> Sys<()>;
    /// `MADV_HUGEPAGE`.
    fn advise_huge(&self, hva: u64, size: u64) -> Sys<()>;
    /// Gives up this process's own pages of a mapping (`MADV_DONTNEED`, locked ones too): what is read there next is what
    /// the mapping's object has, or zeroes. Part of a huge page of a pool: `EINVAL`.
    fn discard(&self, _hva: u64, _size: u64) -> Sys<()> {
        Err(UNKNOWN)
    }
    /// Gives up the pages of a shared mapping's object (`MADV_REMOVE`).
    fn remove(&self, _hva: u64, _size: u64) -> Sys<()> {
        Err(UNKNOWN)
    }
    /// Gives up the pages of a file (a hole punch that keeps its size).
    fn punch(&self, _fd: RawFd, _offset: u64, _size: u64) -> Sys<()> {
        Err(UNKNOWN)
    }
    /// Has a descriptor closed on exec.
    fn close_on_exec(&self, _fd: RawFd) -> Sys<()> {
        Err(UNKNOWN)
    }
    /// `fallocate`, keeping the size.
    fn allocate(&self, fd: RawFd, offset: u64, size: u64) -> Sys<()>;
    /// What kind of file this is.
    fn file_kind(&self, fd: RawFd) -> Sys<FileKind>;
    /// Which file it is and how large.
    fn file_status(&self, fd: RawFd) -> Sys<FileStatus>;
    /// Whether a descriptor is a guest_memfd; `None` where that cannot be seen, or it is not open. Allocates nothing, and
    /// waits for no file system.
    fn is_guest_memfd(&self, _fd: RawFd) -> Option<bool> {
        None
    }
    /// The mapping at `hva`, or the next above it; `None` when there is none.
    fn mapping(&self, hva: u64) -> Sys<Option<Mapping>>;
    /// All mappings of this moment, in order, where that costs no more than one of them; `None` where
    /// [`Kernel::mapping`] is cheap.
    fn mappings(&self) -> Sys<Option<Vec<Mapping>>> {
        Ok(None)
    }
    /// The first run of pages in `[start, end)` that this process's page tables hold, zero page apart.
    fn resident(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>>;
    /// The first run of pages in `[start, end)` that are in memory or swapped out, and of which no huge page will become
    /// by writing to them: those that are not mapped as huge pages. `None` where there are none, or where the kernel cannot tell (before
    /// Linux 6.7).
    fn small_pages(&self, _start: u64, _end: u64) -> Sys<Option<(u64, u64)>> {
        Ok(None)
    }
    /// The first run of pages in `[start, end)` that are mapped as huge pages; `None` likewise.
    fn huge_pages(&self, _start: u64, _end: u64) -> Sys<Option<(u64, u64)>> {
        Ok(None)
    }
    /// `PR_GET_THP_DISABLE`: whether this process has transparent huge pages, all of them or those not advised, off.
    fn huge_pages_disabled(&self) -> HugePagesDisabled {
        HugePagesDisabled::No
    }
    /// Whether a guest_memfd can be mapped (`GUEST_MEMFD_FLAG_MMAP`), and so serves all of a slot's memory; so it is taken
    /// where that cannot be tried.
    fn can_map_guest_memfd(&self, _fd: RawFd) -> bool {
        false
    }
    /// One past the last address of this process that the kernel takes for user memory (its `access_ok`).
    fn user_addresses_end(&self) -> u64 {
        USER_ADDRESSES_END
    }
    /// How many bytes of a mapping's object are in memory, mapped here or not (`mincore`); at most 2 MiB.
    fn cached(&self, hva: u64, size: u64) -> Sys<u64>;
    /// What the kernel calls an open descriptor; `None` when that cannot be read.
    fn file_name(&self, fd: RawFd) -> Option<String>;
    /// The content of a small file of `/proc` or `/sys`.
    fn read_file(&self, path: &str) -> Sys<String>;

    /// Sleeps while `*word == seen`; returns on a wake, a change, the time out, or with `EINTR`.
    fn wait(&self, word: &AtomicU32, seen: u32, timeout: Duration) -> Sys<()>;
    /// Wakes all who sleep on `word`.
    fn wake(&self, word: &AtomicU32);
    /// A fresh eventfd, semaphore-like, non-blocking, close-on-exec.
    fn event(&self) -> Sys<OwnedFd>;
    /// Adds `count` to an eventfd.
    fn event_add(&self, event: &OwnedFd, count: u64) -> Sys<()>;
    /// Takes one from an eventfd.
    fn event_take(&self, event: &OwnedFd) -> Sys<()>;
}
