//! What benchmarks stand on: a kernel that answers every call with success and does nothing.

#![allow(dead_code, reason = "each benchmark needs a part")]

use kvmprep::kvm::{
    Access, Errno, ExitRequest, FileKind, FileStatus, Kernel, MappedObject, Mapping, Region, Stats, Sys,
};
use kvmprep::range::Range;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

const KVM_CAP_NR_MEMSLOTS: u32 = 10;

/// Where its one mapping begins; it has no end.
pub const HVA: u64 = 1 << 40;

/// A kernel whose every call succeeds at once. It offers pre-fault and a shared memfd of any size, the backing
/// with the most system calls for each chunk.
#[derive(Default)]
pub struct Willing {
    /// Calls that a population makes.
    pub calls: AtomicU64,
}

struct NeverWanted;

impl ExitRequest for NeverWanted {
    fn is_set(&self) -> bool {
        false
    }
}

impl Willing {
    fn count(&self) {
        self.calls.fetch_add(1, Relaxed);
    }
}

impl Kernel for Willing {
    fn check_extension(&self, _: RawFd, capability: u32) -> Sys<u32> {
        Ok(if capability == KVM_CAP_NR_MEMSLOTS { 32764 } else { 1 })
    }
    fn disable_quirks(&self, _: RawFd, _: u64) -> Sys<()> {
        Ok(())
    }
    fn set_region(&self, _: RawFd, _: &Region) -> Sys<()> {
        Ok(())
    }
    fn pre_fault(&self, _: RawFd, _: Range) -> Sys<Option<Range>> {
        self.count();
        Ok(None)
    }
    fn stats(&self, _: RawFd) -> Sys<Stats> {
        Err(Errno(libc::ENOTTY))
    }
    fn exit_request(&self, _: RawFd) -> Sys<Box<dyn ExitRequest>> {
        Ok(Box::new(NeverWanted))
    }
    fn populate(&self, _: u64, _: u64, _: Access) -> Sys<()> {
        self.count();
        Ok(())
    }
    fn advise_huge(&self, _: u64, _: u64) -> Sys<()> {
        Ok(())
    }
    fn allocate(&self, _: RawFd, _: u64, _: u64) -> Sys<()> {
        self.count();
        Ok(())
    }
    fn file_status(&self, _: RawFd) -> Sys<FileStatus> {
        Err(Errno(libc::ENOTTY))
    }

    fn file_kind(&self, _: RawFd) -> Sys<FileKind> {
        Ok(FileKind { object: MappedObject::Shmem, page_size: 4096 })
    }
    fn mapping(&self, _: u64) -> Sys<Option<Mapping>> {
        let object = MappedObject::Shmem;
        Ok(Some(Mapping {
            start: HVA,
            end: u64::MAX,
            offset: 0,
            inode: 0,
            on_mount: false,
            readable: true,
            writable: true,
            shared: true,
            page_size: 4096,
            object,
        }))
    }
    fn resident(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        Ok(Some((start, end)))
    }
    fn cached(&self, _: u64, size: u64) -> Sys<u64> {
        Ok(size)
    }
    fn file_name(&self, _: RawFd) -> Option<String> {
        None
    }
    fn read_file(&self, _: &str) -> Sys<String> {
        Err(Errno(libc::ENOENT))
    }
    fn wait(&self, _: &AtomicU32, _: u32, _: Duration) -> Sys<()> {
        Ok(())
    }
    fn wake(&self, _: &AtomicU32) {}
    fn event(&self) -> Sys<OwnedFd> {
        Ok(std::fs::File::open("/dev/null").map_err(|_| Errno(libc::EMFILE))?.into())
    }
    fn event_add(&self, _: &OwnedFd, _: u64) -> Sys<()> {
        Ok(())
    }
    fn event_take(&self, _: &OwnedFd) -> Sys<()> {
        Ok(())
    }
}
