//! The initial image: claims held against a record of this file's own, which knows each page that was claimed.

use crate::call::{Answer, call};
use crate::conversion;
use crate::guest::Guest;
use crate::heap::{Block, bytes_of, bytes_of_all};
use crate::input::{Input, PAGE};
use crate::oracle::demand;
use crate::slots::{self, GUEST_MEMFD};
use kvmprep::abi::*;
use kvmprep::error::Reason;
use kvmprep::range::{Range, RangeSet};

/// What was put into the image, and whether it is closed.
#[derive(Default)]
pub struct Image {
    claimed: RangeSet,
    is_sealed: bool,
}

/// Any call about it.
pub fn any(input: &mut Input, guest: &mut Guest) {
    guest.furnish(input);
    conversion::begin(input, guest);
    match input.below(16) {
        0..=6 => claim(input, guest),
        7..=9 => unclaim(input, guest),
        10..=12 => check_claims(input, guest),
        13 | 14 => launch(input, guest),
        _ => seal(input, guest),
    }
}

/// A few pages, so that claims meet.
fn some_pages(input: &mut Input, guest: &Guest) -> kvmprep_range {
    let mut range = slots::range(input, &guest.slots());
    if let Some(first) = guest.private.first().filter(|_| !input.rarely(3)) {
        range = kvmprep_range { gpa: first.start, ..range };
    }
    if !input.rarely(4) {
        range.gpa = range.gpa.wrapping_add(PAGE * input.below(16) as u64);
        range.size = PAGE * (1 + input.below(8) as u64);
    }
    range
}

/// Memory that can be part of an image.
fn is_fit(guest: &Guest, range: Range) -> bool {
    let slots = guest.record.values().filter(|slot| slot.slot >> 16 == 0 && slot.flags & GUEST_MEMFD != 0);
    let places: RangeSet = slots.filter_map(|slot| Range::new(slot.gpa, slot.size)).collect();
    places.size_within(range) == range.size() && guest.private.size_within(range) == range.size()
}

/// Whether the answer says that the range is none, or the pointers are wrong, which no record tells.
fn is_about_arguments(answer: &Answer) -> bool {
    const OF_ARGUMENTS: [Reason; 9] = [
        Reason::NullPointer,
        Reason::MisalignedPointer,
        Reason::ReservedNotZero,
        Reason::RangeEmpty,
        Reason::RangeUnaligned,
        Reason::RangeOverflow,
        Reason::RangeBeyondGuest,
        Reason::SharedBit,
        Reason::BadValue,
    ];
    answer.error.is_none() || OF_ARGUMENTS.iter().any(|reason| answer.error_of(*reason).is_some())
}

fn claim(input: &mut Input, guest: &mut Guest) {
    const NAME: &str = "kvmprep_private_claim";
    let asked = some_pages(input, guest);
    let block = Block::new(&bytes_of(&asked), input.passed());
    let answer = call(input, NAME, &asked, |err| {
        // SAFETY: the handle lives; the block is a range.
        unsafe { kvmprep_private_claim(guest.vm, block.pointer(), err) }
    });
    judge_claim(NAME, guest, &asked, &answer);
    if let Some(range) = Range::new(asked.gpa, asked.size).filter(|_| answer.is_success()) {
        guest.image.claimed.insert(range);
    }
}

/// A claim is refused where the record says so, and nowhere else.
fn judge_claim(name: &str, guest: &Guest, asked: &kvmprep_range, answer: &Answer) {
    let Image { claimed, is_sealed } = &guest.image;
    let Some(range) = Range::new(asked.gpa, asked.size) else {
        return demand(!answer.is_success(), name, "no claim of what is no range");
    };
    let is_fresh = claimed.size_within(range) == 0;
    let is_possible = is_fresh && !is_sealed && is_fit(guest, range);
    let is_excused = !answer.is_success() && is_about_arguments(answer);
    demand(is_excused || answer.is_success() == is_possible, name, "what can be claimed, and nothing else");
    if let Some(error) = answer.error_of(Reason::Claimed) {
        let part = Range { start: error.gpa, end: error.gpa + error.size };
        let is_true = part.overlaps(&range) && claimed.size_within(part) == part.size();
        demand(is_true && error.code == -libc::EEXIST, name, "an earlier claim that there is");
    }
    if let Some(error) = answer.error_of(Reason::NotPrivate) {
        let part = Range { start: error.gpa, end: error.gpa + error.size };
        demand(guest.private.size_within(part) == 0, name, "memory that is shared");
    }
}

fn unclaim(input: &mut Input, guest: &mut Guest) {
    const NAME: &str = "kvmprep_private_unclaim";
    let mut asked = some_pages(input, guest);
    let first = guest.image.claimed.first().filter(|_| !input.rarely(3));
    if let Some(first) = first {
        // Of what was claimed, all or the beginning.
        let size = first.size().min(PAGE * (1 + input.below(8) as u64));
        (asked.gpa, asked.size) = (first.start, size);
    }
    let block = Block::new(&bytes_of(&asked), input.passed());
    let answer = call(input, NAME, &asked, |err| {
        // SAFETY: the handle lives; the block is a range.
        unsafe { kvmprep_private_unclaim(guest.vm, block.pointer(), err) }
    });
    let Image { claimed, is_sealed } = &mut guest.image;
    let range = Range::new(asked.gpa, asked.size);
    let is_possible = !*is_sealed && range.is_some_and(|range| claimed.size_within(range) == range.size());
    let is_excused = !answer.is_success() && is_about_arguments(&answer);
    demand(is_excused || answer.is_success() == is_possible, NAME, "what is claimed, and nothing else");
    if let Some(range) = range.filter(|_| answer.is_success()) {
        claimed.remove(range);
    }
}

fn check_claims(input: &mut Input, guest: &Guest) {
    const NAME: &str = "kvmprep_private_check_claims";
    let list: Vec<kvmprep_range> = (0..input.below(5)).map(|_| some_pages(input, guest)).collect();
    let block = Block::new(&bytes_of_all(&list), input.passed());
    let answer = call(input, NAME, &list, |err| {
        // SAFETY: the handle lives; the block has that many ranges.
        unsafe { kvmprep_private_check_claims(guest.vm, block.pointer(), list.len(), err) }
    });
    let mut claimed = guest.image.claimed.clone();
    let is_possible = list.iter().all(|asked| {
        let range = Range::new(asked.gpa, asked.size);
        let is_free = range.is_some_and(|range| claimed.size_within(range) == 0 && is_fit(guest, range));
        range.into_iter().for_each(|range| claimed.insert(range));
        is_free && !guest.image.is_sealed
    });
    let is_excused = !answer.is_success() && is_about_arguments(&answer);
    demand(is_excused || answer.is_success() == is_possible, NAME, "what claiming them would say");
}

/// A kernel that does not know these calls takes nothing, so nothing stays claimed.
fn launch(input: &mut Input, guest: &Guest) {
    if guest.is_real {
        return;
    }
    let asked = some_pages(input, guest);
    let block = Block::new(&bytes_of(&asked), input.passed());
    let source = Block::new(&[0; 4096], input.passed());
    let rest = Block::output(size_of::<kvmprep_range>(), input.passed());
    let (is_tdx, fd, kind) = (input.rarely(2), input.pick(&[100, 100, -1]), input.code(&[1, 3, 4, 5, 6, 0]));
    let name = if is_tdx { "kvmprep_tdx_init_mem_region" } else { "kvmprep_snp_launch_update" };
    let answer = call(input, name, &(asked, fd, kind), |err| {
        // SAFETY: the handle lives; the blocks are ranges and bytes, which no kernel reads.
        unsafe {
            if is_tdx {
                let source = source.pointer::<std::ffi::c_void>().cast_const();
                kvmprep_tdx_init_mem_region(guest.vm, fd, block.pointer(), source, kind, rest.pointer(), err)
            } else {
                kvmprep_snp_launch_update(
                    guest.vm,
                    fd,
                    block.pointer(),
                    source.pointer(),
                    kind,
                    rest.pointer(),
                    err,
                )
            }
        }
    });
    demand(!answer.is_success(), name, "no kernel has taken it");
}

fn seal(input: &mut Input, guest: &mut Guest) {
    let answer = call(input, "kvmprep_private_note_sealed", &(), |err| {
        // SAFETY: the handle lives.
        unsafe { kvmprep_private_note_sealed(guest.vm, err) }
    });
    guest.image.is_sealed |= answer.is_success();
}
