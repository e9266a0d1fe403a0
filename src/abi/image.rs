//! The initial image of a confidential guest: each page is put there once.

use super::boundary::*;
use super::error::kvmprep_error;
use super::vm::{kvmprep_range, kvmprep_vm};
use crate::error::{Error, Result};
use std::ffi::c_int;

/// Claims guest memory for the initial image, before the VMM puts it there: all of the range, or nothing.
///
/// What a confidential guest finds in its memory when it starts, and what is measured of it, is put there page by page
/// (KVM_TDX_INIT_MEM_REGION, KVM_SEV_SNP_LAUNCH_UPDATE), and no page may be put there twice. KVM does not keep that rule for
/// all types of VM and releases, and where it does its error says no more than EIO. The handle keeps it for all: claim, then
/// make the ioctl, then give back with kvmprep_private_unclaim() what the kernel did not take. Of two threads that claim the
/// same page one succeeds. All code that adds pages should claim them with one handle.
///
/// The memory must be in memslots of address space 0 that have a guest_memfd, and be private by the handle's record
/// (kvmprep_convert(), kvmprep_visibility_note()). A claim is kept whatever happens to slots and attributes afterwards, since
/// the measurement is not taken back either. A call's time grows with the number of memslots in the range, and hardly with
/// its size or with the number of claims there are.
///
/// Threads: any. Returns 0, or -EEXIST (CLAIMED: `err->gpa` and `err->size` are the earlier claim that the range meets first,
/// as it was made or as kvmprep_private_unclaim() has left it), -EINVAL (NO_MEMSLOT, NO_GMEM, NOT_PRIVATE: `err->gpa` and
/// `err->size` are the first such part of the range; SHARED_BIT; a pointer NULL or misaligned, a bad range), -EPERM (SEALED:
/// after kvmprep_private_note_sealed()). Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_private_claim(
    vm: *mut kvmprep_vm,
    range: *const kvmprep_range,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            reference(vm, "vm")?.0.claim(reference(range, "range")?.decode()?)?;
            Ok(0)
        })
    }
}

/// Gives claimed memory back that the kernel did not take, so that it can be claimed again: all of the range, or nothing.
/// It may be parts of claims, and several that touch. What the kernel has taken must stay claimed.
///
/// Threads: any. Returns 0, or -ENOENT (NOT_CLAIMED: `err->gpa` and `err->size` are the first part of the range that is not
/// claimed; nothing was given back), -EPERM (SEALED), -EINVAL (a pointer NULL or misaligned, a bad range). Since kvmprep
/// 0.4.
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_private_unclaim(
    vm: *mut kvmprep_vm,
    range: *const kvmprep_range,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            reference(vm, "vm")?.0.unclaim(reference(range, "range")?.decode()?)?;
            Ok(0)
        })
    }
}

/// Notes that the initial image is closed: call it once KVM_SEV_SNP_LAUNCH_FINISH or KVM_TDX_FINALIZE_VM has succeeded, and,
/// where a VM is restored or taken over whose image was made elsewhere, as soon as that is so. From then on nothing is
/// claimed or given back, and stage 2 can be populated: before, KVM pre-faults nothing of a VM of type SNP or TDX
/// (kvmprep_populate() then fails with -EOPNOTSUPP, NOT_SEALED, where the handle was told that type). Again: does nothing.
///
/// Threads: any. Returns 0, or -EINVAL (`vm` NULL or misaligned). Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `err` points to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_private_note_sealed(vm: *mut kvmprep_vm, err: *mut kvmprep_error) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            reference(vm, "vm")?.0.note_sealed();
            Ok(0)
        })
    }
}

/// Asks whether kvmprep_private_claim() of each range of a list, in that order, would succeed, and claims nothing: to look a
/// whole image through before the first page is measured. The ranges are held against the claims there are and against each
/// other.
///
/// Threads: any; what others claim or convert meanwhile may be seen or not. Returns 0, also for no ranges, or what
/// kvmprep_private_claim() would have returned for the first that cannot be claimed; `err->message` begins with its place
/// in the list, as in `ranges[3]: `. Or -EINVAL (a pointer NULL or misaligned, a bad range). Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `ranges` points to `n` elements, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_private_check_claims(
    vm: *const kvmprep_vm,
    ranges: *const kvmprep_range,
    n: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let decode = |(index, range): (usize, &kvmprep_range)| {
                range.decode().map_err(|error| Error {
                    message: format!("ranges[{index}]: {}", error.message),
                    ..error
                })
            };
            let ranges = slice(ranges, n, "ranges")?.iter().enumerate().map(decode);
            vm.0.check_claims(&ranges.collect::<Result<Vec<_>>>()?)?;
            Ok(0)
        })
    }
}
