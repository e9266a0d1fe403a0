//! The program's calls that change its address space or its files: done by the C library, with KVM told before and after.
//!
//! Of the model's own files only those can be mapped, cut or punched that the kernel's can be, and by the kernel's rules. Nothing
//! here knows what is mapped for a guest: that is asked of [`host`].

use crate::host;
use crate::objects::{self, Object};
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::units::Privacy;
use std::ffi::c_int;
use std::ops::Range;

/// Where a private file is mapped instead: as far beyond its end, where nothing is and whoever touches it gets SIGBUS.
const NOWHERE: u64 = 1 << 62;

/// Whether an object can be mapped so, before anything is changed; answers from which offset on.
pub fn check(object: &Object, protection: c_int, flags: c_int, offset: i64) -> Result<i64> {
    // The kernel's files of this kind are on a mount of which nothing is executed.
    if protection & libc::PROT_EXEC != 0 {
        return Err(Errno::EPERM);
    }
    match object {
        Object::Vcpu(_) => Ok(offset),
        Object::GuestMemfd(file, _) => {
            file.check_mmap(flags & libc::MAP_TYPE != libc::MAP_PRIVATE)?;
            Ok(if file.privacy() == Privacy::Private { offset | NOWHERE as i64 } else { offset })
        }
        _ => Err(Errno::ENODEV),
    }
}

/// From where on a range cannot be made executable: the first mapping in it of what [`check`] does not let be mapped so.
pub fn not_executable_from(range: &Range<u64>) -> Option<u64> {
    host::process().first_mapping_of(&objects::mappable(), range)
}

/// Has the C library change mappings in these ranges.
pub fn changing<T>(ranges: &[Range<u64>], call: impl FnOnce() -> T) -> T {
    let answer = host::process().changing(ranges, call);
    objects::unmapped();
    answer
}

/// `MADV_REMOVE`, if it is of a guest_memfd that is mapped there: pages go as by `fallocate`.
pub fn remove(address: u64, length: u64) -> Option<Result<()>> {
    let host = host::process();
    let (offset, file) = objects::guest_memfds()
        .into_iter()
        .find_map(|(fd, file)| Some((host.offset_in(fd, address)? & !NOWHERE, file)))?;
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    Some(file.fallocate(mode, offset as i64, length as i64))
}

/// `fallocate` of an object.
pub fn fallocate(object: &Object, mode: c_int, offset: i64, length: i64) -> Result<()> {
    match object {
        Object::GuestMemfd(file, _) => file.fallocate(mode, offset, length),
        Object::Statistics(_) => Err(Errno::EBADF),
        _ => Err(Errno::ENODEV),
    }
}

/// Whether `fallocate` of any other file takes pages away.
pub fn takes_pages(mode: c_int) -> bool {
    const TAKING: c_int = libc::FALLOC_FL_PUNCH_HOLE
        | libc::FALLOC_FL_COLLAPSE_RANGE
        | libc::FALLOC_FL_INSERT_RANGE
        | libc::FALLOC_FL_ZERO_RANGE;
    mode & TAKING != 0
}

/// What is answered before an object is written, at an offset of the caller's or where it stands: it cannot be.
pub fn before_write(object: &Object, at_offset: bool) -> Result<()> {
    Err(match object {
        Object::System | Object::Firmware => Errno::EINVAL,
        _ if at_offset => Errno::ESPIPE,
        Object::Statistics(_) => Errno::EBADF,
        _ => Errno::EINVAL,
    })
}

/// Whether an object can be sought in, if that does nothing.
pub fn before_seek(object: &Object) -> Result<()> {
    if matches!(object, Object::GuestMemfd(..)) { Err(Errno::ESPIPE) } else { Ok(()) }
}

/// What must be before an object is read, at an offset of the caller's or where it stands.
pub fn before_read(object: &Object, at_offset: bool) -> Result<()> {
    match object {
        Object::Statistics(statistics) => statistics.refresh(),
        Object::Vm(_) | Object::Vcpu(_) | Object::GuestMemfd(..) if at_offset => Err(Errno::ESPIPE),
        _ => Err(Errno::EINVAL),
    }
}
