//! KVM's ioctls where the library does not know them: every answer is ENOTTY, and the host stage remains.

use super::{Errno, ExitRequest, Region, Sys};
use crate::range::Range;
use std::os::fd::{OwnedFd, RawFd};

const UNKNOWN: Errno = Errno(libc::ENOTTY);

/// No such quirk.
pub const QUIRK_SLOT_ZAP_ALL: u64 = 0;

pub fn check_extension(_: RawFd, _: u32) -> Sys<u32> {
    Ok(0)
}

pub fn disable_quirks(_: RawFd, _: u64) -> Sys<()> {
    Err(UNKNOWN)
}

pub fn set_region(_: RawFd, _: &Region) -> Sys<()> {
    Err(UNKNOWN)
}

pub fn renew_root(_: RawFd) {}

pub fn is_in_smm(_: RawFd) -> bool {
    false
}

pub fn pre_fault(_: RawFd, _: Range) -> Sys<Option<Range>> {
    Err(UNKNOWN)
}

pub fn stats_fd(_: RawFd) -> Sys<OwnedFd> {
    Err(UNKNOWN)
}

pub fn exit_request(_: RawFd) -> Sys<Box<dyn ExitRequest>> {
    Err(UNKNOWN)
}

/// Bounded by the page tables' own limit, as the CPU's is not asked here.
pub fn physical_address_bits() -> u32 {
    52
}
