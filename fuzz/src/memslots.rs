//! The checks and predictions of memslots: asked, asked again, and asked of the two functions that must say the same.

use crate::call::{Answer, call};
use crate::guest::Guest;
use crate::heap::{Block, Passed, bytes_of, bytes_of_all, sized};
use crate::input::{Input, PAGE};
use crate::oracle::{demand, judge_bound, judge_output};
use crate::rules::{Asked, judge_alignment, judge_allowed, judge_check, judge_report};
use crate::slots::GUEST_MEMFD;
use crate::world::World;
use crate::{oracle, slots};
use kvmprep::abi::*;
use kvmprep::range::{Range, RangeSet};
use std::mem::offset_of;

/// Any of the three.
pub fn any(input: &mut Input, world: &World) {
    if input.rarely(6) {
        predict(input, world);
    } else {
        check(input, world);
    }
}

/// What a VM on Linux 7.3 offers, with all there is.
const CAPS: kvmprep_caps = kvmprep_caps {
    pre_fault: 1,
    keep_mappings: 1,
    read_only_memslots: 1,
    guest_memfd: 1,
    guest_memfd_flags: 3,
    memory_attributes: 8,
    vm_types: 0x3f,
    memslots: 32764,
    address_spaces: 2,
    gpa_bits: 46,
    kernel_release: 7 << 16 | 3 << 8,
    nested_paging: 1,
    user_memory2: 1,
    hva_end: (1 << 47) - PAGE,
    vm_type: 0,
    gpa_shared_bit: 0,
};

/// Capabilities: those, or with a few that differ.
fn caps(input: &mut Input) -> kvmprep_caps {
    let mut caps = CAPS;
    caps.gpa_bits = input.pick(&[52, 46]);
    for _ in 0..input.pick(&[0, 0, 0, 1, 2, 3]) {
        match input.below(12) {
            0 => caps.memslots = input.code(&[0, 1, 2, 32, 509, 32764, u32::MAX]),
            1 => caps.address_spaces = input.code(&[0, 1, 2, u32::MAX]),
            2 => caps.gpa_bits = input.code(&[0, 12, 36, 39, 47, 48, 51, 52, 63, 64, 65, u32::MAX]),
            3 => {
                caps.kernel_release =
                    input.code(&[0, 6 << 16 | 1 << 8, 6 << 16 | 12 << 8, 7 << 16 | 1 << 8, !0])
            }
            4 => caps.nested_paging = 0,
            5 => caps.user_memory2 = 0,
            6 => caps.hva_end = input.place(),
            7 => caps.vm_type = input.code(&[0, 1, 2, 3, 4, 5]),
            8 => caps.gpa_shared_bit = input.code(&[47, 51, 47, 51, 47, 51, 31, 64]),
            9 => caps.guest_memfd = 0,
            10 => caps.read_only_memslots = 0,
            _ => caps.memory_attributes = 0,
        }
    }
    caps
}

fn rule(input: &mut Input) -> u32 {
    const STRICT: u32 = KVMPREP_ALIGN_STRICT;
    input.code(&[0, 0, 0, 1, 2, 3, STRICT, STRICT, STRICT | 1, STRICT | 2, STRICT | 3, 4, 0x200])
}

/// A place for a report, with the size that is told.
struct Place {
    block: Block,
    size: usize,
}

impl Place {
    fn new(input: &mut Input) -> Self {
        let size = input.struct_size(size_of::<kvmprep_memslot_report>());
        // Mostly without, since a report takes a hundred times as long as a verdict.
        let passed = if input.rarely(6) { input.passed() } else { Passed::Null };
        Self { block: Block::output(size, passed), size }
    }

    /// One without which there is no answer.
    fn needed(input: &mut Input) -> Self {
        let size = input.struct_size(size_of::<kvmprep_memslot_report>());
        Self { block: Block::output(size, input.passed()), size }
    }

    /// The report, where there is a whole one.
    fn report(&self, answer: &Answer) -> Option<kvmprep_memslot_report> {
        let is_whole =
            answer.is_success() && self.block.is_passed() && self.size >= size_of::<kvmprep_memslot_report>();
        is_whole.then(|| self.block.read())
    }

    fn judge(&self, name: &str, answer: &Answer) {
        judge_output(name, &self.block, size_of::<kvmprep_memslot_report>(), answer.is_success());
    }
}

/// A question to kvmprep_memslot_check().
struct Question {
    caps: kvmprep_caps,
    caps_block: Block,
    caps_size: usize,
    existing: Vec<kvmprep_memslot>,
    existing_block: Block,
    slot: kvmprep_memslot,
    slot_block: Block,
    rule: u32,
}

impl Question {
    const NAME: &str = "kvmprep_memslot_check";

    fn ask(&self, input: &mut Input, place: &Place) -> Answer {
        let answer = call(input, Self::NAME, self, |err| {
            // SAFETY: each block has what is said of it.
            unsafe {
                kvmprep_memslot_check(
                    self.caps_block.pointer(),
                    self.caps_size,
                    self.existing_block.pointer(),
                    self.existing.len(),
                    self.slot_block.pointer(),
                    self.rule,
                    place.block.pointer(),
                    place.size,
                    err,
                )
            }
        });
        place.judge(Self::NAME, &answer);
        answer
    }
}

impl std::fmt::Debug for Question {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { caps, caps_size, existing, slot, rule, .. } = self;
        write!(
            f,
            "caps {caps:x?} ({caps_size} bytes), rule {rule:#x}, slot {slot:x?}, existing {existing:x?}"
        )
    }
}

fn check(input: &mut Input, world: &World) {
    let caps = caps(input);
    let (caps_bytes, caps_size) = sized(input, &caps);
    let existing = slots::slots(input, world);
    let slot = slots::slot(input, world, &existing);
    let question = Question {
        caps,
        caps_block: Block::new(&caps_bytes, input.passed()),
        caps_size,
        existing_block: Block::new(&bytes_of_all(&existing), input.passed()),
        existing,
        slot,
        slot_block: Block::new(&bytes_of(&slot), input.passed()),
        rule: rule(input),
    };
    let place = Place::new(input);
    let answer = question.ask(input, &place);
    judge_bound(Question::NAME, &answer, &question.existing, &slot);
    let asked = Asked {
        name: Question::NAME,
        caps: &question.caps,
        existing: &question.existing,
        slot: &slot,
        rule: question.rule,
        is_mapped: world.is_ours(slot.hva, slot.size),
        private: &RangeSet::new(),
    };
    judge_check(&asked, &answer, place.report(&answer).as_ref());
    if input.rarely(2) {
        let again = Place { block: Block::output_over(&place.block, 0x5a), size: place.size };
        judge_same(Question::NAME, world, &slot, (&answer, &place), (&question.ask(input, &again), &again));
    }
}

/// The same question has the same answer, each byte of which is written.
fn judge_same(
    name: &str,
    world: &World,
    slot: &kvmprep_memslot,
    one: (&Answer, &Place),
    two: (&Answer, &Place),
) {
    let (Some(a), Some(b)) = (one.0.error, two.0.error) else { return };
    demand(bytes_of(&a) == bytes_of(&b), name, "the same question has the same answer");
    if !one.0.is_success() || !one.1.block.is_passed() {
        return;
    }
    // What is behind other memory than ours may change meanwhile.
    let stable = if world.is_harmless(slot.hva, slot.size) {
        usize::MAX
    } else {
        offset_of!(kvmprep_memslot_report, expected)
    };
    let content = |place: &Place| place.block.content().iter().take(stable).copied().collect::<Vec<u8>>();
    demand(
        content(one.1) == content(two.1),
        name,
        "the same question has the same report, all of it written",
    );
}

fn predict(input: &mut Input, world: &World) {
    const NAME: &str = "kvmprep_memslot_predict";
    let caps = caps(input);
    let (caps_bytes, caps_size) = sized(input, &caps);
    let caps_block = Block::new(&caps_bytes, input.passed());
    let slot = slots::slot(input, world, &[]);
    let slot_block = Block::new(&bytes_of(&slot), input.passed());
    let is_whole = input.rarely(2);
    let range = slots::range(input, &[slot]);
    let range_block = Block::new(&bytes_of(&range), if is_whole { Passed::Null } else { input.passed() });
    let is_whole = range_block.pointer::<u8>().is_null();
    let private = slots::ranges(input, &[slot]);
    let private_block =
        Block::new(&bytes_of_all(&private), if input.rarely(2) { Passed::Null } else { input.passed() });
    let place = Place::needed(input);
    let arguments =
        (caps, caps_size, slot, (!is_whole).then_some(range), private_block.is_passed().then_some(&private));
    let ask = |input: &mut Input, place: &Place| {
        let answer = call(input, NAME, &arguments, |err| {
            // SAFETY: each block has what is said of it.
            unsafe {
                kvmprep_memslot_predict(
                    caps_block.pointer(),
                    caps_size,
                    slot_block.pointer(),
                    range_block.pointer(),
                    private_block.pointer(),
                    private.len(),
                    place.block.pointer(),
                    place.size,
                    err,
                )
            }
        });
        place.judge(NAME, &answer);
        answer
    };
    let answer = ask(input, &place);
    if let Some(report) = place.report(&answer) {
        let (start, size) = if is_whole { (slot.gpa, slot.size) } else { (range.gpa, range.size) };
        let end = start.checked_add(size);
        let lies_within = start >= slot.gpa && end.is_some_and(|end| end <= slot.gpa + slot.size);
        demand(lies_within && size > 0, NAME, "a range in the slot");
        demand(report.change == 0 && report.unknown == 0, NAME, "no verdict");
        judge_report(NAME, &report, &slot, size, world.is_ours(slot.hva, slot.size));
        judge_alignment(NAME, &report, &slot, KVMPREP_ALIGN_CONGRUENT);
        if is_whole && private_block.pointer::<u8>().is_null() {
            judge_allowed(NAME, &report, &slot, &RangeSet::new());
        }
    }
    if input.rarely(2) {
        let again = Place { block: Block::output_over(&place.block, 0x5a), size: place.size };
        judge_same(NAME, world, &slot, (&answer, &place), (&ask(input, &again), &again));
    }
}

/// kvmprep_vm_check_memslot(), and whether kvmprep_memslot_check() says the same of the same.
pub fn with_guest(input: &mut Input, world: &World, guest: &Guest) {
    const NAME: &str = "kvmprep_vm_check_memslot";
    let existing = guest.slots();
    let slot = slots::slot(input, world, &existing);
    let slot_block = Block::new(&bytes_of(&slot), input.passed());
    let rule = rule(input);
    let place = if guest.is_real { Place::new(input) } else { Place::needed(input) };
    let answer = call(input, NAME, &(slot, rule, place.size), |err| {
        // SAFETY: the handle lives; each block has what is said of it.
        unsafe {
            kvmprep_vm_check_memslot(
                guest.vm,
                slot_block.pointer(),
                rule,
                place.block.pointer(),
                place.size,
                err,
            )
        }
    });
    place.judge(NAME, &answer);
    if guest.is_real {
        // To the other kernel, all descriptors are of one file.
        judge_bound(NAME, &answer, &existing, &slot);
    }
    let is_mapped = guest.is_real && world.is_ours(slot.hva, slot.size);
    let asked = Asked {
        name: NAME,
        caps: &guest.caps,
        existing: &existing,
        slot: &slot,
        rule,
        is_mapped,
        private: &guest.private,
    };
    judge_check(&asked, &answer, place.report(&answer).as_ref());
    if !can_be_compared(guest, &slot, rule) {
        return;
    }
    let question = Question {
        caps: guest.caps,
        caps_block: Block::new(&bytes_of(&guest.caps), Passed::Right),
        caps_size: size_of::<kvmprep_caps>(),
        existing_block: Block::new(&bytes_of_all(&existing), Passed::Right),
        existing,
        slot,
        slot_block,
        rule,
    };
    let other_place = Place { block: Block::output_over(&place.block, 0x5a), size: place.size };
    let other = question.ask(input, &other_place);
    if let (Some(a), Some(b)) = (answer.error, other.error) {
        demand(a.code == b.code && a.reason == b.reason, NAME, "what kvmprep_memslot_check() says");
    }
    let is_stable = guest.is_real && world.is_harmless(slot.hva, slot.size);
    if let (true, Some(a), Some(b)) = (is_stable, place.report(&answer), other_place.report(&other)) {
        demand(bytes_of(&a) == bytes_of(&b), NAME, "the same report");
    }
}

/// Whether both must say the same: they look at the same memory and files, or at none. Slots that are bound to the same
/// part of a file, which KVM never has, may be told of in any order.
fn can_be_compared(guest: &Guest, slot: &kvmprep_memslot, rule: u32) -> bool {
    let looks_at_none = slot.flags & GUEST_MEMFD == 0 && rule & KVMPREP_ALIGN_STRICT == 0;
    let has_double_binding = guest
        .record
        .values()
        .any(|a| guest.record.values().any(|b| a.slot != b.slot && oracle::are_bound_alike(a, b)));
    // Without a handle nothing is private.
    let is_shared =
        Range::new(slot.gpa, slot.size).is_none_or(|place| guest.private.within(place).next().is_none());
    !guest.has_own_width && is_shared && (guest.is_real || looks_at_none) && !has_double_binding
}
