//! What a guest may ask for, by an access or by a hypercall, and what it is told.
//!
//! All that comes from a guest is hostile until it was looked at here. Nothing is converted here.

use super::visibility::Visibility;
use crate::error::{Error, Reason, Result, Stage};
use crate::range::PAGE;

/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`.
const EXIT_PRIVATE: u64 = 1 << 3;
/// `KVM_MAP_GPA_RANGE_*`: the size of page the guest would like, and whether it is to be private.
const MAP_PAGE_SIZES: u64 = 0xf;
const MAP_LARGEST_PAGE: u64 = 2;
const MAP_PRIVATE: u64 = 1 << 4;

/// What an access was, that KVM did not let through.
pub fn of_memory_fault(flags: u64) -> Result<Visibility> {
    match flags {
        0 => Ok(Visibility::Shared),
        EXIT_PRIVATE => Ok(Visibility::Private),
        _ => Err(Error::invalid(
            Reason::UnknownFlags,
            format!("the memory fault's flags {flags:#x} are not all known"),
        )
        .hint("pass kvm_run.memory_fault.flags; a newer kernel may need a newer kvmprep")),
    }
}

/// What a hypercall asks for: bytes, and what they are to be.
pub fn of_map_gpa_range(pages: u64, attributes: u64) -> Result<(u64, Visibility)> {
    let page_size = attributes & MAP_PAGE_SIZES;
    if attributes & !(MAP_PAGE_SIZES | MAP_PRIVATE) != 0 || page_size > MAP_LARGEST_PAGE {
        return Err(Error::invalid(
            Reason::UnknownFlags,
            format!("the guest's attributes {attributes:#x} are not all known"),
        )
        .hint("answer the guest with *hypercall_ret"));
    }
    let size = pages.checked_mul(PAGE).ok_or_else(|| {
        Error::invalid(
            Reason::RangeOverflow,
            format!("the guest asks for {pages:#x} pages, which is too many"),
        )
        .hint("answer the guest with *hypercall_ret")
    })?;
    let is_private = attributes & MAP_PRIVATE != 0;
    Ok((size, if is_private { Visibility::Private } else { Visibility::Shared }))
}

/// What the guest is told: one of the three answers that KVM takes.
pub fn hypercall_ret(outcome: &Result<()>) -> u64 {
    match outcome {
        Ok(()) => 0,
        // It is converted all the same.
        Err(Error { stage: Stage::Host | Stage::Stage2, .. }) => 0,
        // So is some of it. Asking again ends the work.
        Err(Error { stage: Stage::Drop, .. }) => libc::EAGAIN as u64,
        Err(error) => match error.errno {
            libc::EAGAIN | libc::EBUSY | libc::EINTR | libc::ENOMEM => libc::EAGAIN as u64,
            _ => libc::EINVAL as u64,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_fault_is_private_or_shared_or_not_known() {
        assert_eq!(of_memory_fault(0).unwrap(), Visibility::Shared);
        assert_eq!(of_memory_fault(8).unwrap(), Visibility::Private);
        for flags in [1, 2, 4, 9, 16, u64::MAX] {
            assert_eq!(of_memory_fault(flags).unwrap_err().reason, Reason::UnknownFlags, "{flags:#x}");
        }
    }

    #[test]
    fn a_hypercall_s_page_size_is_a_hint() {
        for hint in 0..=2 {
            assert_eq!(of_map_gpa_range(3, 16 | hint).unwrap(), (3 * PAGE, Visibility::Private));
            assert_eq!(of_map_gpa_range(3, hint).unwrap(), (3 * PAGE, Visibility::Shared));
        }
        for attributes in [3, 15, 19, 32, 1 << 63] {
            assert_eq!(
                of_map_gpa_range(1, attributes).unwrap_err().reason,
                Reason::UnknownFlags,
                "{attributes:#x}"
            );
        }
        assert_eq!(of_map_gpa_range(1 << 52, 0).unwrap_err().reason, Reason::RangeOverflow);
        assert_eq!(of_map_gpa_range((1 << 52) - 1, 0).unwrap().0, u64::MAX - 4095);
    }

    #[test]
    fn the_guest_hears_one_of_three_answers() {
        let failed = |errno, stage| hypercall_ret(&Err(Error::new(errno, Reason::BadValue, "").stage(stage)));
        assert_eq!(hypercall_ret(&Ok(())), 0);
        assert_eq!(failed(libc::EINTR, Stage::Stage2), 0);
        assert_eq!(failed(libc::ENOMEM, Stage::Host), 0);
        assert_eq!(failed(libc::ENOMEM, Stage::Attributes), 11);
        assert_eq!(failed(libc::EBUSY, Stage::Memslot), 11);
        assert_eq!(failed(libc::EIO, Stage::Attributes), 22);
        assert_eq!(failed(libc::EPERM, Stage::Memslot), 22);
        assert_eq!(failed(libc::EIO, Stage::Drop), 11);
    }
}
