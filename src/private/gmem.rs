//! Making a guest_memfd: memory of a guest's own, as a file.
//!
//! It checks what the kernel would take without a word and never use. It keeps nothing; the descriptor is the caller's.

use crate::error::{Error, Reason, Result};
use crate::kvm::Kernel;
use crate::kvm::caps::Caps;
use crate::range::is_page_aligned;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// `GUEST_MEMFD_FLAG_MMAP`: the file can be mapped, and serves all of a guest's accesses.
pub const MMAP: u64 = 1 << 0;
/// `GUEST_MEMFD_FLAG_INIT_SHARED`: its memory begins as shared, and this process may touch its mapping.
pub const INIT_SHARED: u64 = 1 << 1;

/// A guest_memfd of `size` bytes for a VM with these capabilities, close-on-exec.
pub fn create(kernel: &dyn Kernel, caps: &Caps, vm: RawFd, size: u64, flags: u64) -> Result<OwnedFd> {
    check_size(size)?;
    check_flags(caps, flags)?;
    let fd = kernel
        .create_guest_memfd(vm, size, flags)
        .map_err(|errno| Error::kernel(errno, "KVM_CREATE_GUEST_MEMFD"))?;
    kernel
        .close_on_exec(fd.as_raw_fd())
        .map_err(|errno| Error::system(errno, "having the guest_memfd closed on exec"))?;
    Ok(fd)
}

fn check_size(size: u64) -> Result<()> {
    let wrong = |reason, what: &str| {
        Err(Error::invalid(reason, format!("a guest_memfd of {size:#x} bytes: the size {what}")).hint(
            "pass a multiple of 4096 bytes, at least the sum of the memslots that are to have a part of it",
        ))
    };
    match size {
        0 => wrong(Reason::RangeEmpty, "is zero"),
        _ if !is_page_aligned(size) => wrong(Reason::RangeUnaligned, "is not a multiple of 4096"),
        _ if i64::try_from(size).is_err() => wrong(Reason::RangeOverflow, "is more than a file can have"),
        _ => Ok(()),
    }
}

fn check_flags(caps: &Caps, flags: u64) -> Result<()> {
    if !caps.guest_memfd {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            Reason::NoPrivateMemory,
            "this kernel makes no guest_memfd for this VM",
        )
        .hint("needs Linux 6.8 and a VM with private memory, or Linux 6.18 and any VM"));
    }
    if flags & !(MMAP | INIT_SHARED) != 0 {
        return Err(Error::invalid(
            Reason::UnknownFlags,
            format!("guest_memfd flags {flags:#x} are not all known"),
        )
        .hint("use KVMPREP_GMEM_MMAP and KVMPREP_GMEM_INIT_SHARED only"));
    }
    let unsupported = flags & !caps.guest_memfd_flags;
    if unsupported != 0 {
        return Err(Error::invalid(
            Reason::FlagsUnsupported,
            format!("this VM takes no guest_memfd flags {unsupported:#x}"),
        )
        .hint("use those in kvmprep_caps.guest_memfd_flags, as kvmprep_probe() tells of this VM"));
    }
    if flags & MMAP == 0 && !caps.has_private_memory() {
        return Err(unused());
    }
    Ok(())
}

/// KVM takes such a file for a slot, and serves nothing from it.
pub fn unused() -> Error {
    Error::invalid(
        Reason::GmemUnused,
        "KVM would never use this guest_memfd: the VM has no private memory, and the file cannot be mapped",
    )
    .hint("make it with KVMPREP_GMEM_MMAP (Linux 6.18), or make a VM of a type with private memory")
}
