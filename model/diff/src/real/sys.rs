//! The system calls of this program, which answer as the kernel does: 0 or more, or a negative error number.
//!
//! Nothing here knows what a call is for.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// What a call answered, by libc's convention, as the kernel gave it.
pub fn answer(result: i64) -> i64 {
    if result >= 0 {
        return result;
    }
    -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
}

/// A file descriptor that a call answered with.
pub fn owned(result: i64) -> Result<OwnedFd, i64> {
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just given it to this caller, who asks nobody else to close it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(result),
    }
}

/// An ioctl whose argument is a number.
pub fn ioctl(fd: &impl AsRawFd, request: u64, argument: u64) -> i64 {
    // SAFETY: the requests given here take a number, and write nothing.
    answer(i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) }))
}

/// An ioctl whose argument is a structure, which the kernel may change.
pub fn ioctl_with<T>(fd: &impl AsRawFd, request: u64, argument: &mut T) -> i64 {
    debug_assert_eq!((request >> 16 & 0x3fff) as usize, size_of::<T>());
    // SAFETY: the request says how large the structure is that the kernel reads and writes (checked above).
    answer(i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) }))
}

/// The same with more behind the structure, which says how much.
pub fn ioctl_with_more<Header, T>(fd: &impl AsRawFd, request: u64, argument: &mut T) -> i64 {
    debug_assert_eq!((request >> 16 & 0x3fff) as usize, size_of::<Header>());
    debug_assert!(size_of::<T>() >= size_of::<Header>());
    // SAFETY: the request says how large the structure is, and that how much is behind it: the rest of the argument, which
    // its makers see to.
    answer(i64::from(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) }))
}

/// The number of an ioctl of KVM's without a structure.
pub const fn io(number: u64) -> u64 {
    0xae << 8 | number
}

/// The number of an ioctl of KVM's that takes a structure.
pub const fn iow<T>(number: u64) -> u64 {
    1 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}

/// The number of an ioctl of KVM's that gives a structure.
pub const fn ior<T>(number: u64) -> u64 {
    2 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}

/// The number of an ioctl of KVM's that takes a structure and gives it back.
pub const fn iowr<T>(number: u64) -> u64 {
    3 << 30 | (size_of::<T>() as u64) << 16 | io(number)
}

/// fallocate.
pub fn fallocate(fd: &impl AsRawFd, mode: i32, offset: u64, size: u64) -> i64 {
    // SAFETY: no memory is given.
    answer(i64::from(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset as i64, size as i64) }))
}

/// A new memfd of that size.
pub fn memfd(flags: u32, size: u64) -> Result<OwnedFd, i64> {
    // SAFETY: the name is a string of C's.
    let fd = owned(answer(i64::from(unsafe {
        libc::memfd_create(c"diff_model".as_ptr(), libc::MFD_CLOEXEC | flags)
    })))?;
    // SAFETY: no memory is given.
    let done = answer(i64::from(unsafe { libc::ftruncate(fd.as_raw_fd(), size as i64) }));
    if done < 0 { Err(done) } else { Ok(fd) }
}

/// Reads from a file at an offset, into what can take any bytes.
pub fn read_words(fd: &impl AsRawFd, words: &mut [u64], offset: u64) -> i64 {
    let size = size_of_val(words);
    // SAFETY: the slice has so many bytes, and any are good for it.
    answer(unsafe { libc::pread(fd.as_raw_fd(), words.as_mut_ptr().cast(), size, offset as i64) as i64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_ioctls_are_the_kernels() {
        assert_eq!(io(0x80), 0xae80);
        assert_eq!(iow::<kvm_bindings::kvm_userspace_memory_region>(0x46), 0x4020_ae46);
        assert_eq!(iow::<kvm_bindings::kvm_userspace_memory_region2>(0x49), 0x40a0_ae49);
        assert_eq!(iowr::<kvm_bindings::kvm_create_guest_memfd>(0xd4), 0xc040_aed4);
        assert_eq!(iowr::<kvm_bindings::kvm_pre_fault_memory>(0xd5), 0xc040_aed5);
        assert_eq!(ior::<kvm_bindings::kvm_sregs>(0x83), 0x8138_ae83);
    }

    #[test]
    fn an_error_is_a_negative_number() {
        assert_eq!(owned(-9).unwrap_err(), -9);
        assert_eq!(fallocate(&-1, 0, 0, 4096), -i64::from(libc::EBADF));
    }
}
