//! The files that the model's objects are in the program: memfds, each opened twice.
//!
//! One description is the program's, the other one the model's own. The program's has a lock (`flock`), which the kernel lets go
//! of when the last descriptor and the last mapping of it are gone, wherever they were: duplicated, inherited, sent. So the
//! model's own says whether the program's is still there, and nothing need be counted.
//!
//! Nothing here knows what the files are for.

use crate::own::OwnFd;
use kvmprep_model::errno::{Errno, Result};
use std::ffi::{CStr, CString, c_int};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// The device that all memfds are on, once there is one.
static DEVICE: AtomicU64 = AtomicU64::new(0);

/// The model's own description of a file.
#[derive(Debug)]
pub struct Memfd {
    fd: RawFd,
    /// Empty where somebody else of the model closes it.
    _owned: Option<OwnFd>,
}

impl Memfd {
    /// A new file of that many bytes, which stay that many.
    pub fn new(name: &CStr, size: u64) -> Result<Self> {
        // SAFETY: the name ends with a zero.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        let fd = owned(fd)?;
        // SAFETY: it is a file of ours.
        answer(unsafe { libc::ftruncate(fd.as_raw_fd(), size as i64) })?;
        let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
        // SAFETY: it is a file of ours.
        answer(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
        let fd = OwnFd::new(fd)?;
        Ok(Self { fd: fd.as_raw_fd(), _owned: Some(fd) }.known())
    }

    /// One that somebody else of the model has made, and closes after this is dropped.
    pub fn of(fd: RawFd) -> Self {
        Self { fd, _owned: None }.known()
    }

    fn known(self) -> Self {
        if let Some((device, _)) = identity(self.fd) {
            DEVICE.store(device, Ordering::Relaxed);
        }
        self
    }

    /// The model's descriptor.
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// The number by which the file is known.
    pub fn inode(&self) -> u64 {
        identity(self.fd).map_or(0, |(_, inode)| inode)
    }

    /// The program's description, with the lowest number there is.
    pub fn open_for_program(&self, flags: c_int) -> Result<RawFd> {
        let path = CString::new(format!("/proc/self/fd/{}", self.fd)).expect("a number has no zero in it");
        // SAFETY: the path ends with a zero.
        let fd = unsafe { crate::real::open(path.as_ptr(), flags, 0) };
        let fd = owned(fd)?;
        // SAFETY: it was just opened.
        answer(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })?;
        let number = fd.as_raw_fd();
        std::mem::forget(fd);
        Ok(number)
    }

    /// Whether the program's description is open, here or anywhere.
    pub fn is_open_in_program(&self) -> bool {
        // SAFETY: it is a file of ours.
        if unsafe { libc::flock(self.fd, libc::LOCK_SH | libc::LOCK_NB) } != 0 {
            return true;
        }
        // SAFETY: it is a file of ours.
        unsafe { libc::flock(self.fd, libc::LOCK_UN) };
        false
    }

    /// Writes all of it anew.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        // SAFETY: as many bytes are there.
        let written = unsafe { libc::pwrite(self.fd, bytes.as_ptr().cast(), bytes.len(), 0) };
        if written == bytes.len() as isize { Ok(()) } else { Err(Errno::EIO) }
    }
}

/// Device and number of what a descriptor is open to. Leaves `errno` alone where there is nothing.
pub fn identity(fd: RawFd) -> Option<(u64, u64)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: there is room for what is written.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: it was just written.
    let stat = unsafe { stat.assume_init() };
    Some((stat.st_dev, stat.st_ino))
}

/// The number of the file that a descriptor is open to, if that is a memfd and so may be one of the model's.
pub fn inode_of_memfd(fd: RawFd) -> Option<u64> {
    identity(fd).filter(|(device, _)| *device == DEVICE.load(Ordering::Relaxed)).map(|(_, inode)| inode)
}

/// What the last call of the C library ended with.
pub fn last_error() -> Errno {
    Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

fn answer(result: c_int) -> Result<()> {
    if result < 0 { Err(last_error()) } else { Ok(()) }
}

/// A descriptor that was just opened, or why it was not.
pub fn owned(fd: c_int) -> Result<OwnedFd> {
    answer(fd)?;
    // SAFETY: it was just opened, by us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
