//! Errors, reasons, stages, version.

use crate::error::{Error, Reason};
use std::ffi::c_char;

/// Major, minor and patch version of this header, as kvmprep_version() encodes them.
pub const KVMPREP_VERSION: u32 = 0x0000_0400;

/// In `slot` and `other_slot`: no slot is concerned.
pub const KVMPREP_NO_SLOT: u32 = 0xffff_ffff;

/// The error has no stage: an argument, a handle, a thread.
pub const KVMPREP_STAGE_NONE: u32 = 0;
/// A memslot was being checked, set or noted.
pub const KVMPREP_STAGE_MEMSLOT: u32 = 1;
/// The host's own page tables were being filled.
pub const KVMPREP_STAGE_HOST: u32 = 2;
/// The guest's stage-2 page tables were being filled.
pub const KVMPREP_STAGE_STAGE2: u32 = 3;
/// Memory was being made private or shared. Since kvmprep 0.4, as all that follow.
pub const KVMPREP_STAGE_ATTRIBUTES: u32 = 4;
/// Memory that has gone out of sight was being given up.
pub const KVMPREP_STAGE_DROP: u32 = 5;
/// The initial image of a confidential guest was being made.
pub const KVMPREP_STAGE_LAUNCH: u32 = 6;

/// No error.
pub const KVMPREP_REASON_NONE: u32 = 0;
/// A pointer that is needed is NULL (-EINVAL).
pub const KVMPREP_REASON_NULL_POINTER: u32 = 1;
/// A pointer is not aligned for its type (-EINVAL).
pub const KVMPREP_REASON_MISALIGNED_POINTER: u32 = 2;
/// A struct's size is none that any version has (-EINVAL), or a newer caller's struct uses fields that this
/// version does not know (-E2BIG).
pub const KVMPREP_REASON_STRUCT_SIZE: u32 = 3;
/// A flag is not known (-EINVAL).
pub const KVMPREP_REASON_UNKNOWN_FLAGS: u32 = 4;
/// A value is outside its range (-EINVAL).
pub const KVMPREP_REASON_BAD_VALUE: u32 = 5;
/// Reserved space is not zero (-EINVAL).
pub const KVMPREP_REASON_RESERVED_NOT_ZERO: u32 = 6;
/// A file descriptor is negative, closed or of another kind (-EBADF, or what the kernel answered).
pub const KVMPREP_REASON_BAD_FD: u32 = 7;
/// A range has size 0 (-EINVAL).
pub const KVMPREP_REASON_RANGE_EMPTY: u32 = 8;
/// A range is not a multiple of 4096 bytes (-EINVAL).
pub const KVMPREP_REASON_RANGE_UNALIGNED: u32 = 9;
/// A range wraps (-EINVAL).
pub const KVMPREP_REASON_RANGE_OVERFLOW: u32 = 10;
/// A range ends beyond the guest's address width (-EINVAL); or there are no more addresses to tell of (-ENOENT from
/// kvmprep_visibility_next()).
pub const KVMPREP_REASON_RANGE_BEYOND_GUEST: u32 = 11;
/// No memslot lies there (-ENOENT; -EINVAL where the memory was to be private, or part of the initial image).
pub const KVMPREP_REASON_NO_MEMSLOT: u32 = 12;
/// Two memslots of one address space overlap; `other_slot` names the other (-EEXIST).
pub const KVMPREP_REASON_MEMSLOT_OVERLAP: u32 = 13;
/// The memslot's change was announced and has not been noted yet (-EBUSY).
pub const KVMPREP_REASON_MEMSLOT_CHANGING: u32 = 14;
/// The memslot is registered with userfaultfd, and populating it would wait for its handler (-EBUSY).
pub const KVMPREP_REASON_MEMSLOT_USERFAULTFD: u32 = 15;
/// Stage 2 was required, the memslot's writes are logged, and pre-faulting would mark every page dirty; it need not
/// have been named (-EBUSY).
pub const KVMPREP_REASON_MEMSLOT_DIRTY_LOGGED: u32 = 16;
/// The memslot is device memory, which cannot be populated (-EINVAL).
pub const KVMPREP_REASON_MEMSLOT_DEVICE: u32 = 17;
/// Nothing is mapped behind the guest's memory, or its file is too short, or the content of a page of the initial image
/// cannot be read (-EFAULT).
pub const KVMPREP_REASON_NO_HOST_MAPPING: u32 = 18;
/// The guest may write the memory, but its mapping cannot be written (-EACCES).
pub const KVMPREP_REASON_HOST_MAPPING_READ_ONLY: u32 = 19;
/// A pool of huge pages is empty; the message names it (-ENOMEM).
pub const KVMPREP_REASON_HUGETLB_SHORTAGE: u32 = 20;
/// There is not enough memory (-ENOMEM).
pub const KVMPREP_REASON_MEMORY_SHORTAGE: u32 = 21;
/// A page is broken hardware (-EHWPOISON).
pub const KVMPREP_REASON_POISONED: u32 = 22;
/// The kernel refused for another reason; the code is its errno.
pub const KVMPREP_REASON_KERNEL_REFUSED: u32 = 23;
/// Stage 2 was required, and this kernel, host or VM has no pre-fault, or no vCPU was given; or
/// kvmprep_vcpu_pre_fault() found that this kernel has none (-EOPNOTSUPP).
pub const KVMPREP_REASON_NO_STAGE2: u32 = 24;
/// The vCPU cannot pre-fault now: its confidential VM is not finalised; or it is in SMM or runs a nested guest, where
/// KVM would fill page tables that are of no use afterwards. The library looks for both once for each thread that
/// comes with a vCPU, before its first pre-fault (-EOPNOTSUPP). From kvmprep_vcpu_pre_fault() it may also be that the
/// host has no nested paging, for which the kernel answers the same: ask kvmprep_probe() before trying again.
pub const KVMPREP_REASON_VCPU_REFUSED: u32 = 25;
/// A signal came, or kvm_run.immediate_exit is set (-EINTR).
pub const KVMPREP_REASON_INTERRUPTED: u32 = 26;
/// The kernel asked to try again, for two seconds (-EAGAIN).
pub const KVMPREP_REASON_RETRIES_EXHAUSTED: u32 = 27;
/// The population's own time limit has passed (-ETIMEDOUT).
pub const KVMPREP_REASON_TIMED_OUT: u32 = 28;
/// The population was cancelled (-ECANCELED).
pub const KVMPREP_REASON_CANCELLED: u32 = 29;
/// The handle is in use (-EBUSY).
pub const KVMPREP_REASON_BUSY: u32 = 30;
/// The library has found an error of its own; nothing more is known of the handle (-ENOTRECOVERABLE).
pub const KVMPREP_REASON_PANICKED: u32 = 31;
/// The VM is dead, or belongs to another process (-EIO).
pub const KVMPREP_REASON_VM_DEAD: u32 = 32;
/// A library thread could not be started (-EAGAIN, usually).
pub const KVMPREP_REASON_THREAD_FAILED: u32 = 33;
/// The job is still at work (-ETIMEDOUT from a wait).
pub const KVMPREP_REASON_NOT_FINISHED: u32 = 34;
/// A memslot's number, or its address space, is more than the kernel or VM has (-EINVAL).
pub const KVMPREP_REASON_MEMSLOT_NUMBER: u32 = 35;
/// A memslot that is not there is to be deleted (-EINVAL).
pub const KVMPREP_REASON_MEMSLOT_ABSENT: u32 = 36;
/// Size, hva, KVM_MEM_READONLY and guest_memfd of a memslot cannot change (-EINVAL).
pub const KVMPREP_REASON_MEMSLOT_FIXED: u32 = 37;
/// A memslot has more than 2^31 - 1 pages (-EINVAL).
pub const KVMPREP_REASON_MEMSLOT_TOO_LARGE: u32 = 38;
/// A memslot's memory is not where user memory can be (-EINVAL).
pub const KVMPREP_REASON_HVA_NOT_USER: u32 = 39;
/// A memslot ends beyond what this host's physical addresses reach (-EINVAL).
pub const KVMPREP_REASON_MEMSLOT_BEYOND_HOST: u32 = 40;
/// A memslot's addresses, or a range's, have TDX's shared bit (-EINVAL).
pub const KVMPREP_REASON_SHARED_BIT: u32 = 41;
/// A memslot's guest_memfd is another kind of file (-EINVAL).
pub const KVMPREP_REASON_GMEM_NOT_ONE: u32 = 42;
/// A memslot's guest_memfd ends before the slot does (-EINVAL).
pub const KVMPREP_REASON_GMEM_TOO_SHORT: u32 = 43;
/// KVM refused a memslot that is right by all that the handle knows: its guest_memfd was made for another VM (or,
/// where /proc cannot be read, is none), or the handle was not told of a slot (-EINVAL).
pub const KVMPREP_REASON_GMEM_OTHER_VM: u32 = 44;
/// Some of a memslot's part of its guest_memfd is bound to another slot, which `other_slot` names (-EEXIST; before Linux
/// 7.2 -EINVAL).
pub const KVMPREP_REASON_GMEM_BOUND: u32 = 45;
/// This VM does not take these memslot flags, or not together (-EINVAL); or the kernel has no guest_memfd (-ENOTTY).
pub const KVMPREP_REASON_FLAGS_UNSUPPORTED: u32 = 46;
/// A memslot breaks the alignment rule, which was to be kept strictly (-EINVAL).
pub const KVMPREP_REASON_MEMSLOT_MISALIGNED: u32 = 47;
/// KVM may map more than a range that was to be populated exactly (-EINVAL); the range told is wide enough.
pub const KVMPREP_REASON_RANGE_INEXACT: u32 = 48;
/// Memory was to be private, or is to be put into the initial image, whose memslot has no guest_memfd (-EINVAL).
pub const KVMPREP_REASON_NO_GMEM: u32 = 49;
/// This VM has no private memory, or no guest_memfd (-EOPNOTSUPP).
pub const KVMPREP_REASON_NO_PRIVATE_MEMORY: u32 = 50;
/// A conversion is of more than the caller allows in one call (-EINVAL).
pub const KVMPREP_REASON_CONVERT_TOO_LARGE: u32 = 51;
/// The caller's own function, told of a conversion, has failed (what it returned).
pub const KVMPREP_REASON_CALLBACK_FAILED: u32 = 52;
/// Memory was claimed for the initial image before (-EEXIST); the range told is the earlier claim.
pub const KVMPREP_REASON_CLAIMED: u32 = 53;
/// Memory is to be given back that was not claimed (-ENOENT).
pub const KVMPREP_REASON_NOT_CLAIMED: u32 = 54;
/// Memory of the initial image is shared (-EINVAL).
pub const KVMPREP_REASON_NOT_PRIVATE: u32 = 55;
/// The initial image is closed (-EPERM).
pub const KVMPREP_REASON_SEALED: u32 = 56;
/// KVM pre-faults nothing of such a VM before its initial image is closed (-EOPNOTSUPP).
pub const KVMPREP_REASON_NOT_SEALED: u32 = 57;
/// KVM would take a guest_memfd and never use it: it cannot be mapped, and the VM has no private memory (-EINVAL).
pub const KVMPREP_REASON_GMEM_UNUSED: u32 = 58;
/// A guest_memfd serves all of a memslot's memory, and the memory at the memslot's hva is another (-EINVAL).
pub const KVMPREP_REASON_GMEM_ELSEWHERE: u32 = 59;
/// A call from inside the caller's own function would wait for that function's end (-EDEADLK).
pub const KVMPREP_REASON_WOULD_DEADLOCK: u32 = 60;
/// The firmware or TDX module refused (-EIO; its own code is in `firmware_error`).
pub const KVMPREP_REASON_FIRMWARE_REFUSED: u32 = 61;

/// What was wrong, where, and what to do.
///
/// Every function that takes one as its last parameter accepts NULL, needs no initialisation, and writes the
/// whole of it on every call, success included. Its layout is fixed for ever. It holds no pointer; copy it
/// freely.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kvmprep_error {
    /// What the function returned when that is negative: a negative errno. Else 0.
    pub code: i32,
    /// KVMPREP_REASON_*: stable, for programs.
    pub reason: u32,
    /// KVMPREP_STAGE_*.
    pub stage: u32,
    /// The memslot concerned, its address space in the upper 16 bits; or KVMPREP_NO_SLOT.
    pub slot: u32,
    /// The other memslot concerned, as in an overlap; or KVMPREP_NO_SLOT.
    pub other_slot: u32,
    /// Zero.
    pub reserved0: u32,
    /// Start of the guest range concerned, in bytes; meaningful when `size` is not 0.
    pub gpa: u64,
    /// Its size in bytes; 0: no range is concerned.
    pub size: u64,
    /// The firmware's own error code, for confidential VMs; else 0.
    pub firmware_error: u64,
    /// Zero.
    pub reserved: [u64; 10],
    /// One sentence that says what was wrong; NUL-terminated UTF-8, empty on success.
    pub message: [c_char; 256],
    /// One sentence that says what to do; NUL-terminated UTF-8, may be empty.
    pub hint: [c_char; 256],
}

const _: () = assert!(size_of::<kvmprep_error>() == 640);

impl kvmprep_error {
    pub(super) fn none() -> Self {
        Self {
            code: 0,
            reason: Reason::None as u32,
            stage: KVMPREP_STAGE_NONE,
            slot: KVMPREP_NO_SLOT,
            other_slot: KVMPREP_NO_SLOT,
            reserved0: 0,
            gpa: 0,
            size: 0,
            firmware_error: 0,
            reserved: [0; 10],
            message: [0; 256],
            hint: [0; 256],
        }
    }
}

impl From<&Error> for kvmprep_error {
    fn from(error: &Error) -> Self {
        Self {
            code: -error.errno,
            reason: error.reason as u32,
            stage: error.stage as u32,
            slot: error.slot.unwrap_or(KVMPREP_NO_SLOT),
            other_slot: error.other_slot.unwrap_or(KVMPREP_NO_SLOT),
            gpa: error.range.map_or(0, |range| range.start),
            size: error.range.map_or(0, |range| range.size()),
            firmware_error: error.firmware,
            message: c_text(&error.message),
            hint: c_text(&error.hint),
            ..Self::none()
        }
    }
}

/// Text cut to fit, between characters, with its NUL.
pub(super) fn c_text<const N: usize>(text: &str) -> [c_char; N] {
    let mut end = text.len().min(N - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut buffer = [0; N];
    for (to, from) in buffer.iter_mut().zip(text[..end].bytes()) {
        *to = from as c_char;
    }
    buffer
}

/// The version of the library at run time: major << 16 | minor << 8 | patch. The header's own is KVMPREP_VERSION.
///
/// Threads: any. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kvmprep_version() -> u32 {
    KVMPREP_VERSION
}

/// The stable name of a reason, such as "no-memslot"; "unknown" for a number that this version does not know.
/// The text belongs to the library and lives as long as the process.
///
/// Threads: any. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kvmprep_reason_name(reason: u32) -> *const c_char {
    Reason::ALL.get(reason as usize).map_or(c"unknown", |reason| reason.name()).as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_s_numbers_are_the_library_s() {
        let source = include_str!("error.rs");
        for reason in Reason::ALL {
            let name = reason.name().to_str().unwrap().to_uppercase().replace('-', "_");
            let line = format!("pub const KVMPREP_REASON_{name}: u32 = {};", *reason as u32);
            assert!(source.contains(&line), "{line}");
        }
    }

    #[test]
    fn the_version_is_the_crate_s() {
        let part = |text: &str| text.parse::<u32>().unwrap();
        let version = part(env!("CARGO_PKG_VERSION_MAJOR")) << 16
            | part(env!("CARGO_PKG_VERSION_MINOR")) << 8
            | part(env!("CARGO_PKG_VERSION_PATCH"));
        assert_eq!(kvmprep_version(), version);
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        let text: [c_char; 4] = c_text("ab\u{e9}\u{e9}");
        assert_eq!(text.map(|c| c as u8), [b'a', b'b', 0, 0]);
    }
}
