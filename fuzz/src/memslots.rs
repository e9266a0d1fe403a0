//! The checks and predictions of memslots, held against a second opinion: the same rules, by plain arithmetic.

use crate::call::{Answer, call};
use crate::guest::Guest;
use crate::heap::{Block, Passed, bytes_of, bytes_of_all, sized};
use crate::input::{GIANT, HUGE, Input, PAGE};
use crate::oracle::{demand, judge_bound, judge_output, judge_overlap, overlap, text};
use crate::slots::{GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY};
use crate::world::World;
use crate::{oracle, slots};
use kvmprep::abi::*;
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
    vm_types: 3,
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
            8 => caps.gpa_shared_bit = input.code(&[47, 51, 31, 32, 30, 21, 63, 64]),
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
    };
    judge_check(&asked, &answer, &place);
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

/// What was asked about, by whichever function.
struct Asked<'a> {
    name: &'a str,
    caps: &'a kvmprep_caps,
    existing: &'a [kvmprep_memslot],
    slot: &'a kvmprep_memslot,
    rule: u32,
    /// Whether all of the slot's memory is known to be mapped.
    is_mapped: bool,
}

/// What must hold of an answer about a slot beside others.
fn judge_check(asked: &Asked<'_>, answer: &Answer, place: &Place) {
    let Asked { name, caps, existing, slot, rule, is_mapped } = *asked;
    judge_overlap(name, answer, existing, Some(slot));
    if !answer.is_success() {
        return;
    }
    let old = existing.iter().find(|old| old.slot == slot.slot);
    demand(old.is_some() || slot.size != 0, name, "no deletion of what is not there");
    let lies_as_before = slot.size == 0 || old.is_some_and(|old| old.gpa == slot.gpa);
    let overlaps = existing.iter().any(|other| overlap(other, slot));
    demand(lies_as_before || !overlaps, name, "no slot passes that overlaps another");
    judge_rules(name, caps, slot, lies_as_before);
    if let Some(old) = old.filter(|_| slot.size != 0) {
        let same_memory = (old.hva, old.size) == (slot.hva, slot.size);
        let same_kind =
            (old.flags ^ slot.flags) & READONLY == 0 && (old.flags | slot.flags) & GUEST_MEMFD == 0;
        demand(same_memory && same_kind, name, "no slot changes in what cannot change");
    }
    let Some(report) = place.report(answer) else { return };
    let change = match old {
        _ if slot.size == 0 => KVMPREP_CHANGE_DELETE,
        None => KVMPREP_CHANGE_CREATE,
        Some(old) if old.gpa != slot.gpa => KVMPREP_CHANGE_MOVE,
        Some(old) if old.flags != slot.flags => KVMPREP_CHANGE_FLAGS,
        Some(_) => KVMPREP_CHANGE_NONE,
    };
    demand(report.change == change, name, "the change that it is");
    judge_report(name, &report, slot, slot.size, is_mapped);
    judge_alignment(name, &report, slot, rule);
    judge_allowed(name, &report, slot);
}

/// What KVM looks at of a slot by itself, of one that has passed.
fn judge_rules(name: &str, caps: &kvmprep_caps, slot: &kvmprep_memslot, lies_as_before: bool) {
    let has_gmem = slot.flags & GUEST_MEMFD != 0;
    let is_numbered = slot.slot & 0xffff < caps.memslots && slot.slot >> 16 < caps.address_spaces;
    demand(is_numbered, name, "a number and an address space that there are");
    demand(slot.flags & !(LOG_DIRTY_PAGES | READONLY | GUEST_MEMFD) == 0, name, "known flags");
    demand(
        slot.flags & READONLY == 0 || caps.read_only_memslots != 0,
        name,
        "read-only slots where there are any",
    );
    let takes_gmem = caps.guest_memfd != 0 && caps.user_memory2 != 0 && slot.flags == GUEST_MEMFD;
    demand(!has_gmem || takes_gmem, name, "a guest_memfd where there are any, and no other flag");
    demand((slot.gpa | slot.size | slot.hva) % PAGE == 0, name, "whole pages");
    demand(!has_gmem || slot.guest_memfd_offset % PAGE == 0, name, "whole pages of the file");
    let end = |start: u64| u128::from(start) + u128::from(slot.size);
    demand(end(slot.hva) <= u128::from(caps.hva_end), name, "user memory");
    demand(end(slot.gpa) < 1 << 64 && slot.size / PAGE < 1 << 31, name, "as many pages as KVM counts");
    if lies_as_before {
        return;
    }
    let bits = if caps.nested_paging != 0 { caps.gpa_bits } else { 52 };
    let last_page = slot.gpa + (slot.size - PAGE);
    demand(last_page.checked_shr(bits).unwrap_or(0) == 0, name, "no memory beyond the host's width");
    let shared = 1u64.checked_shl(caps.gpa_shared_bit).filter(|bit| *bit > 1).unwrap_or(0);
    demand(last_page & shared == 0, name, "no shared bit");
}

/// What must hold of any report on `size` bytes of `slot`.
fn judge_report(
    name: &str,
    report: &kvmprep_memslot_report,
    slot: &kvmprep_memslot,
    size: u64,
    is_mapped: bool,
) {
    let (message, hint) = (text(&report.message), text(&report.hint));
    demand(message.is_some() && hint.is_some(), name, "texts with an end");
    demand(message != Some("") || hint == Some(""), name, "no hint about nothing");
    demand(
        report.change <= KVMPREP_CHANGE_FLAGS && report.breaches <= 3 && report.unknown <= 3,
        name,
        "known values",
    );
    demand(
        report.limit_2m <= KVMPREP_LIMIT_VM_TYPE && report.limit_1g <= KVMPREP_LIMIT_VM_TYPE,
        name,
        "known limits",
    );
    demand(report.reserved == 0, name, "nothing in reserved space");
    judge_counts(name, &report.allowed, size, true);
    // What is not mapped is not expected.
    judge_counts(name, &report.expected, size, is_mapped);
    let (allowed, expected) = (&report.allowed, &report.expected);
    let is_larger = |c: &kvmprep_page_counts| c.pages_2m + 512 * c.pages_1g;
    demand(expected.pages_1g <= allowed.pages_1g, name, "no more pages of 1 GiB than allowed");
    demand(is_larger(expected) <= is_larger(allowed), name, "no more large pages than allowed");
    demand(
        (report.limit_2m == 0) == (report.limited_2m == 0),
        name,
        "a limit of 2 MiB where something is limited",
    );
    demand(
        (report.limit_1g == 0) == (report.limited_1g == 0),
        name,
        "a limit of 1 GiB where something is limited",
    );
    demand(report.limited_2m.max(report.limited_1g) <= size, name, "no more is limited than there is");
    demand(expected.pages_4k == 0 || report.limited_2m > 0, name, "a reason for small pages");
    if slot.flags & LOG_DIRTY_PAGES != 0 {
        demand(allowed.pages_4k * PAGE == size, name, "small pages where writes are logged");
    }
}

/// The mappings cover the range, and no more than to the edges of the largest.
fn judge_counts(name: &str, counts: &kvmprep_page_counts, size: u64, covers_all: bool) {
    let bytes = |n: u64, page: u64| u128::from(n) * u128::from(page);
    let covered = bytes(counts.pages_4k, PAGE) + bytes(counts.pages_2m, HUGE) + bytes(counts.pages_1g, GIANT);
    demand(covered >= u128::from(size) || !covers_all, name, "mappings that cover the range");
    demand(
        covered < u128::from(size) + 2 * u128::from(GIANT),
        name,
        "mappings that end where the range ends",
    );
    demand(counts.reserved == 0, name, "nothing in reserved space");
    demand(size != 0 || covered == 0, name, "no mappings of nothing");
}

/// The alignment that the rules speak of, by their words.
fn judge_alignment(name: &str, report: &kvmprep_memslot_report, slot: &kvmprep_memslot, rule: u32) {
    if slot.size == 0 {
        return demand(report.alignment == 0 && report.breaches == 0, name, "no alignment of nothing");
    }
    let is_strict = rule & KVMPREP_ALIGN_STRICT != 0;
    demand(!is_strict || report.breaches == 0, name, "no breach passes where that is an error");
    demand(
        slot.hva.wrapping_add(report.hva_shift).wrapping_sub(slot.gpa) % PAGE == 0,
        name,
        "a shift of pages",
    );
    let allowed_by_size = [GIANT, HUGE].into_iter().find(|page| *page <= slot.size).unwrap_or(PAGE);
    let allowed_by_slot =
        [GIANT, HUGE].into_iter().find(|page| *page <= slot.size && slot.gpa % *page == 0).unwrap_or(PAGE);
    let alignment = match rule & !KVMPREP_ALIGN_STRICT {
        KVMPREP_ALIGN_KERNEL => PAGE,
        KVMPREP_ALIGN_SIZE => allowed_by_size,
        KVMPREP_ALIGN_SLOT => allowed_by_slot,
        _ => return judge_congruence(name, report, slot),
    };
    demand(report.alignment == alignment, name, "the alignment of the rule");
    let has_offset = slot.flags & GUEST_MEMFD != 0;
    let is_breach = has_offset && slot.guest_memfd_offset % alignment != 0;
    let breaches = if is_breach { KVMPREP_BREACH_OFFSET } else { 0 };
    demand(report.breaches == breaches, name, "a breach where the offset is one");
    let mended = slot.guest_memfd_offset.wrapping_add(report.offset_shift);
    demand(!has_offset || mended % alignment == 0, name, "an offset that the shift mends");
    demand(report.offset_shift < alignment, name, "the smallest shift");
}

fn judge_congruence(name: &str, report: &kvmprep_memslot_report, slot: &kvmprep_memslot) {
    let alignment = report.alignment;
    demand([PAGE, HUGE, GIANT].contains(&alignment), name, "the alignment is a page");
    demand(report.hva_shift < alignment, name, "the smallest shift");
    let mended = slot.hva.wrapping_add(report.hva_shift);
    demand(mended.wrapping_sub(slot.gpa) % alignment == 0, name, "an hva that the shift mends");
    let breaches = if report.hva_shift == 0 { 0 } else { KVMPREP_BREACH_HVA };
    demand(report.breaches == breaches && report.offset_shift == 0, name, "a breach where a shift mends one");
    demand(alignment == PAGE || whole_pages(slot, alignment) > 0, name, "a page of which the slot holds one");
    if (KVMPREP_BACKING_ANONYMOUS..=KVMPREP_BACKING_SHMEM_PRIVATE).contains(&slot.backing) {
        let largest = if whole_pages(slot, HUGE) > 0 { HUGE } else { PAGE };
        demand(alignment == largest, name, "the largest page that the slot and its backing have");
    }
}

/// How many aligned pages of that size a slot holds as a whole.
fn whole_pages(slot: &kvmprep_memslot, page: u64) -> u64 {
    let (start, end) = (u128::from(slot.gpa), u128::from(slot.gpa) + u128::from(slot.size));
    (end / u128::from(page)).saturating_sub(start.div_ceil(page.into())) as u64
}

/// KVM's rule for the pages of a plain slot: whole ones, where gpa and hva are congruent.
fn judge_allowed(name: &str, report: &kvmprep_memslot_report, slot: &kvmprep_memslot) {
    if slot.flags & (GUEST_MEMFD | LOG_DIRTY_PAGES) != 0 || slot.size == 0 {
        return;
    }
    let may_have =
        |page: u64| if slot.gpa.wrapping_sub(slot.hva) % page == 0 { whole_pages(slot, page) } else { 0 };
    let allowed = &report.allowed;
    // The processor may have none of 1 GiB.
    demand([0, may_have(GIANT)].contains(&allowed.pages_1g), name, "the pages of 1 GiB that KVM allows");
    demand(
        allowed.pages_2m + 512 * allowed.pages_1g == may_have(HUGE),
        name,
        "the pages of 2 MiB that KVM allows",
    );
    demand(allowed.pages_4k == slot.size / PAGE - 512 * may_have(HUGE), name, "small pages for the rest");
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
            judge_allowed(NAME, &report, &slot);
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
    let asked = Asked { name: NAME, caps: &guest.caps, existing: &existing, slot: &slot, rule, is_mapped };
    judge_check(&asked, &answer, &place);
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
    !guest.has_own_width && (guest.is_real || looks_at_none) && !has_double_binding
}
