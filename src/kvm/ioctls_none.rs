//! KVM's ioctls where the library does not know them: no capability is there, and the host stage remains.

use super::{ExitRequest, ImagePages, Launched, Region, Sys, UNKNOWN};
use crate::level::Level;
use crate::range::Range;
use std::os::fd::{OwnedFd, RawFd};

/// No such quirk.
pub const QUIRK_SLOT_ZAP_ALL: u64 = 0;

/// Unknown; nothing here maps for a guest.
pub fn largest_page() -> Level {
    Level::G1
}

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

pub fn has_nested_guest(_: RawFd) -> bool {
    false
}

pub fn create_guest_memfd(_: RawFd, _: u64, _: u64) -> Sys<OwnedFd> {
    Err(UNKNOWN)
}

pub fn set_attributes(_: RawFd, _: Range, _: u64) -> Sys<()> {
    Err(UNKNOWN)
}

pub fn pre_fault(_: RawFd, _: Range) -> Sys<Option<Range>> {
    Err(UNKNOWN)
}

pub fn tdx_init_mem_region(_: RawFd, pages: &ImagePages, _: u32) -> Launched {
    Launched::refused(pages, UNKNOWN)
}

pub fn snp_launch_update(_: RawFd, _: RawFd, pages: &ImagePages, _: u8) -> Launched {
    Launched::refused(pages, UNKNOWN)
}

pub fn stats_fd(_: RawFd) -> Sys<OwnedFd> {
    Err(UNKNOWN)
}

/// A vCPU that is accepted and never used: nobody needs it back.
struct NeverAsked;

impl ExitRequest for NeverAsked {
    fn is_set(&self) -> bool {
        false
    }
}

pub fn exit_request(vcpu: RawFd) -> Sys<Box<dyn ExitRequest>> {
    // SAFETY: no memory is passed; a closed descriptor is refused.
    if unsafe { libc::fcntl(vcpu, libc::F_GETFD) } < 0 {
        return Err(super::linux::last_errno());
    }
    Ok(Box::new(NeverAsked))
}

/// Bounded by the page tables' own limit, as the CPU's is not asked here.
pub fn physical_address_bits() -> u32 {
    52
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_is_accepted_and_nothing_is_offered() {
        assert_eq!(check_extension(0, 236), Ok(0));
        assert!(!exit_request(0).unwrap().is_set());
        assert_eq!(exit_request(-1).err(), Some(super::super::Errno(libc::EBADF)));
    }
}
