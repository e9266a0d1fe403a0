//! A second opinion on memslots: KVM's rules, and those for alignment and page sizes, by plain arithmetic.
//!
//! It judges what the library let pass and what it reported. It knows nothing of how the library finds that out, and
//! must share no code with it.

use crate::call::Answer;
use crate::input::{GIANT, HUGE, PAGE};
use crate::oracle::{demand, judge_overlap, overlap, text};
use crate::slots::{GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY};
use kvmprep::abi::*;
use kvmprep::range::{Range, RangeSet};

/// The last of KVMPREP_LIMIT_*.
const LAST_LIMIT: u32 = KVMPREP_LIMIT_FILE_OFFSET;

/// What was asked about, by whichever function.
pub struct Asked<'a> {
    pub name: &'a str,
    pub caps: &'a kvmprep_caps,
    pub existing: &'a [kvmprep_memslot],
    pub slot: &'a kvmprep_memslot,
    pub rule: u32,
    /// Whether all of the slot's memory is known to be mapped.
    pub is_mapped: bool,
    /// What of the guest's memory is private.
    pub private: &'a RangeSet,
}

/// What must hold of an answer about a slot beside others.
pub fn judge_check(asked: &Asked<'_>, answer: &Answer, report: Option<&kvmprep_memslot_report>) {
    let Asked { name, caps, existing, slot, rule, is_mapped, private } = *asked;
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
    let Some(report) = report else { return };
    let change = match old {
        _ if slot.size == 0 => KVMPREP_CHANGE_DELETE,
        None => KVMPREP_CHANGE_CREATE,
        Some(old) if old.gpa != slot.gpa => KVMPREP_CHANGE_MOVE,
        Some(old) if old.flags != slot.flags => KVMPREP_CHANGE_FLAGS,
        Some(_) => KVMPREP_CHANGE_NONE,
    };
    demand(report.change == change, name, "the change that it is");
    judge_report(name, report, slot, slot.size, is_mapped);
    judge_alignment(name, report, slot, rule);
    judge_allowed(name, report, slot, private);
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
pub fn judge_report(
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
    demand(report.limit_2m.max(report.limit_1g) <= LAST_LIMIT, name, "known limits");
    let warnings = KVMPREP_WARNING_GMEM_UNUSED | KVMPREP_WARNING_GMEM_ELSEWHERE;
    let may_warn = if slot.flags & GUEST_MEMFD != 0 { warnings } else { 0 };
    demand(report.warnings & !may_warn == 0, name, "known warnings, of a guest_memfd");
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
pub fn judge_alignment(name: &str, report: &kvmprep_memslot_report, slot: &kvmprep_memslot, rule: u32) {
    if slot.size == 0 {
        return demand(report.alignment == 0 && report.breaches == 0, name, "no alignment of nothing");
    }
    // What is there already may change its flags.
    let is_placed = [KVMPREP_CHANGE_CREATE, KVMPREP_CHANGE_MOVE].contains(&report.change);
    let is_strict = rule & KVMPREP_ALIGN_STRICT != 0 && is_placed;
    let is_right = report.breaches == 0 && report.warnings == 0;
    demand(!is_strict || is_right, name, "no breach and no warning passes where that is an error");
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

/// How many of those pages have something private in them, which such a slot cannot hold.
fn pages_with_private(slot: &kvmprep_memslot, page: u64, private: &RangeSet) -> u64 {
    let whole = Range { start: slot.gpa.next_multiple_of(page), end: (slot.gpa + slot.size) / page * page };
    let mut seen = 0;
    let mut next = whole.start;
    for part in private.within(whole) {
        let (first, end) = ((part.start / page * page).max(next), part.end.next_multiple_of(page));
        seen += end.saturating_sub(first) / page;
        next = next.max(end);
    }
    seen
}

/// KVM's rule for the pages of a plain slot: whole ones, shared throughout, where gpa and hva are congruent.
pub fn judge_allowed(
    name: &str,
    report: &kvmprep_memslot_report,
    slot: &kvmprep_memslot,
    private: &RangeSet,
) {
    if slot.flags & (GUEST_MEMFD | LOG_DIRTY_PAGES) != 0 || slot.size == 0 {
        return;
    }
    let may_have = |page: u64| match whole_pages(slot, page) {
        0 => 0,
        _ if slot.gpa.wrapping_sub(slot.hva) % page != 0 => 0,
        whole => whole - pages_with_private(slot, page, private),
    };
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
