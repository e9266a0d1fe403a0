//! What must hold of any answer, whatever was asked: the header's word, held against by arithmetic of its own.

use crate::call::Answer;
use crate::heap::Block;
use crate::slots::GUEST_MEMFD;
use kvmprep::abi::{KVMPREP_NO_SLOT, KVMPREP_STAGE_LAUNCH, kvmprep_error, kvmprep_memslot, kvmprep_range};
use kvmprep::error::Reason;
use std::ffi::{c_char, c_int};

/// A finding, where `holds` is false.
#[track_caller]
pub fn demand(holds: bool, call: &str, what: &str) {
    assert!(holds, "{call}: does not hold: {what}");
}

/// What C reads of a text: up to its NUL, behind which all must be zero. `None` where it is none.
pub fn text(field: &[c_char]) -> Option<&str> {
    // SAFETY: a c_char has the size of a byte, and any byte is valid.
    let bytes = unsafe { std::slice::from_raw_parts(field.as_ptr().cast::<u8>(), field.len()) };
    let end = bytes.iter().position(|byte| *byte == 0)?;
    let is_clear = bytes[end..].iter().all(|byte| *byte == 0);
    std::str::from_utf8(&bytes[..end]).ok().filter(|_| is_clear)
}

/// What must hold of `err`, which was not initialised, after a call that returned `code`.
pub fn judge_error(call: &str, code: c_int, error: &kvmprep_error) {
    let is_error = code < 0;
    demand(code > -4096, call, "a negative errno");
    demand(error.code == code.min(0), call, "err->code is what was returned");
    demand(Reason::ALL.get(error.reason as usize).is_some(), call, "a reason that has a name");
    demand((error.reason != Reason::None as u32) == is_error, call, "a reason for each error, and no other");
    demand(error.reason != Reason::Panicked as u32, call, "no panic");
    demand(error.stage <= KVMPREP_STAGE_LAUNCH, call, "a known stage");
    demand(error.firmware_error == 0 && error.reserved0 == 0, call, "nothing in unused fields");
    demand(error.reserved == [0; 10], call, "nothing in reserved space");
    demand(error.gpa.checked_add(error.size).is_some(), call, "a range that does not wrap");
    let (message, hint) = (text(&error.message), text(&error.hint));
    demand(message.is_some(), call, "a message that is text with an end");
    demand(hint.is_some(), call, "a hint that is text with an end");
    demand(message.is_some_and(|m| m.is_empty()) != is_error, call, "a message for each error, and no other");
    let may_lack_hint = !is_error || error.reason == Reason::KernelRefused as u32;
    demand(hint.is_some_and(|h| !h.is_empty()) || may_lack_hint, call, "a hint for each error");
    if !is_error {
        let (slot, other) = (error.slot, error.other_slot);
        demand(slot == KVMPREP_NO_SLOT && other == KVMPREP_NO_SLOT, call, "no slot without an error");
        demand(error.size == 0 && error.stage == 0, call, "no range and no stage without an error");
    }
}

/// What must hold of an output that may grow, of which `whole` bytes are known, with a size of the caller's.
pub fn judge_output(call: &str, output: &Block, whole: usize, is_written: bool) {
    if !output.is_passed() || !is_written {
        return demand(output.is_unwritten(), call, "output is not touched");
    }
    let unknown = output.content().iter().skip(whole);
    demand(unknown.copied().all(|byte| byte == 0), call, "what is not known is zero");
}

/// Whether two ranges, that may wrap or be empty, have a byte in common.
pub fn share(a: (u64, u64), b: (u64, u64)) -> bool {
    let end = |(start, size): (u64, u64)| u128::from(start) + u128::from(size);
    u128::from(a.0) < end(b) && u128::from(b.0) < end(a) && a.1 != 0 && b.1 != 0
}

/// Whether two slots are of one address space and have guest memory in common.
pub fn overlap(a: &kvmprep_memslot, b: &kvmprep_memslot) -> bool {
    a.slot >> 16 == b.slot >> 16 && a.slot != b.slot && share((a.gpa, a.size), (b.gpa, b.size))
}

/// How many bytes of a range are memory of these slots, which do not overlap, in address space 0.
pub fn memory_in<'a>(range: &kvmprep_range, slots: impl IntoIterator<Item = &'a kvmprep_memslot>) -> u64 {
    let end = range.gpa + range.size;
    let part = |slot: &kvmprep_memslot| end.min(slot.gpa + slot.size).saturating_sub(range.gpa.max(slot.gpa));
    slots.into_iter().filter(|slot| slot.slot >> 16 == 0).map(part).sum()
}

/// Whether two slots are bound to a common part of one file.
pub fn are_bound_alike(a: &kvmprep_memslot, b: &kvmprep_memslot) -> bool {
    let has_file = |slot: &kvmprep_memslot| slot.flags & GUEST_MEMFD != 0 && slot.size != 0;
    has_file(a)
        && has_file(b)
        && share((a.guest_memfd_offset, a.size), (b.guest_memfd_offset, b.size))
        && file(a.guest_memfd).is_some_and(|a| Some(a) == file(b.guest_memfd))
}

/// Which file a descriptor is of.
fn file(descriptor: i32) -> Option<(u64, u64)> {
    // SAFETY: fstat fills the structure, or fails and it is not read.
    unsafe {
        let mut status = std::mem::zeroed::<libc::stat>();
        (libc::fstat(descriptor, &mut status) == 0).then_some((status.st_dev, status.st_ino))
    }
}

/// An overlap that is told of must be one: between `slot`, or one of the `slots`, and the other that is named.
pub fn judge_overlap(call: &str, answer: &Answer, slots: &[kvmprep_memslot], slot: Option<&kvmprep_memslot>) {
    let Some(error) = answer.error_of(Reason::MemslotOverlap) else { return };
    demand(error.code == -libc::EEXIST, call, "an overlap is EEXIST");
    let overlaps = |slot: &kvmprep_memslot| {
        slots.iter().any(|other| other.slot == error.other_slot && overlap(slot, other))
    };
    let mut one = slots.iter().chain(slot).filter(|one| one.slot == error.slot);
    demand(one.any(overlaps), call, "the slots that are named overlap");
}

/// A part of a guest_memfd that is told to be bound must be, to the other that is named.
pub fn judge_bound(call: &str, answer: &Answer, slots: &[kvmprep_memslot], slot: &kvmprep_memslot) {
    let Some(error) = answer.error_of(Reason::GmemBound) else { return };
    demand([-libc::EEXIST, -libc::EINVAL].contains(&error.code), call, "EEXIST, or EINVAL before Linux 7.2");
    let is_other = |other: &&kvmprep_memslot| other.slot == error.other_slot;
    demand(
        slots.iter().filter(is_other).any(|other| are_bound_alike(slot, other)),
        call,
        "it is bound to the other",
    );
}
