//! How large the pages will be with which KVM maps a slot, and why they are not larger.
//!
//! What is allowed follows from the slot alone: KVM's lpage rules (kvm_alloc_memslot_metadata and
//! kvm_mmu_hugepage_adjust), dirty logging, memory attributes, guest_memfd. What is to be expected follows from that
//! and from the memory behind the slot. It is arithmetic over stretches of memory that are alike, never page by page.

use super::host::HostMemory;
use super::{Memslot, alignment};
use crate::kvm::Kernel;
use crate::kvm::caps::{KVM_X86_SNP_VM, KVM_X86_TDX_VM, largest_page};
use crate::level::Level;
use crate::range::{PAGE, PrivateMemory, Range};

/// Why a page is not of a larger size. The numbers are C's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Limit {
    /// It is.
    #[default]
    None = 0,
    /// The slot does not hold the larger page as a whole: its head or tail.
    Edges = 1,
    /// The gpa and the hva differ modulo the larger page.
    Congruence = 2,
    /// Writes are logged.
    DirtyLogging = 3,
    /// guest_memfd has pages of 4 KiB.
    GuestMemfd = 4,
    /// Some of the larger page is private, some shared.
    Attributes = 5,
    /// What is mapped has no larger pages.
    Backing = 6,
    /// Huge pages come only where they are advised.
    Advice = 7,
    /// Huge pages are off.
    NoThp = 8,
    /// The mapping does not hold the larger page as a whole.
    MappingEdges = 9,
    /// Smaller pages are there already.
    Resident = 10,
    /// Nothing is mapped.
    NotMapped = 11,
    /// The processor's nested paging has no such size.
    Cpu = 12,
    /// Private memory of VMs of this type has pages of 4 KiB.
    VmType = 13,
    /// The hva and the offset in the file mapped there differ modulo the larger page.
    FileOffset = 14,
}

impl Limit {
    /// Whether something that a VMM does could lift it.
    fn can_be_lifted(self) -> bool {
        !matches!(self, Limit::None | Limit::GuestMemfd | Limit::Cpu | Limit::VmType)
    }
}

/// How many limits there are.
const LIMITS: usize = 15;

/// Mappings by their size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Of 4 KiB.
    pub k4: u64,
    /// Of 2 MiB.
    pub m2: u64,
    /// Of 1 GiB.
    pub g1: u64,
}

impl Counts {
    fn add(&mut self, level: Level, n: u64) {
        *match level {
            Level::K4 => &mut self.k4,
            Level::M2 => &mut self.m2,
            Level::G1 => &mut self.g1,
        } += n;
    }
}

/// The limit that costs most, with how many bytes it concerns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Why.
    pub limit: Limit,
    /// Bytes.
    pub bytes: u64,
}

/// What is predicted of some memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prediction {
    /// What KVM's rules allow.
    pub allowed: Counts,
    /// What will come, by the memory behind it.
    pub expected: Counts,
    /// Why not all of it is in pages of 2 MiB or more.
    pub below_2m: Cost,
    /// Why not all of it is in pages of 1 GiB.
    pub below_1g: Cost,
}

/// What decides on a slot's page sizes, apart from the memory behind it.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// The slot.
    pub slot: &'a Memslot,
    /// What of the guest's memory is private.
    pub private: &'a dyn PrivateMemory,
    /// The largest page of the processor's nested paging.
    pub largest: Level,
    /// A guest_memfd serves shared accesses too.
    pub gmem_serves_all: bool,
    /// Why private memory has no large pages.
    pub private_limit: Limit,
}

/// The largest page that private memory of a VM of that type may be mapped with, where its file has pages of `backing`;
/// as KVM's own hook decides (`gmem_max_mapping_level`). The only place that knows of types.
pub fn largest_private(vm_type: u32, backing: Level) -> Level {
    match vm_type {
        // TDX's pages are added one by one. SNP's are as the RMP has them: 4 KiB, until the guest accepts more.
        KVM_X86_TDX_VM | KVM_X86_SNP_VM => Level::K4,
        _ => backing,
    }
}

/// Why private memory of a VM of that type has no large pages: guest_memfds have none, and, if they had, the type.
fn private_limit(vm_type: u32) -> Limit {
    if largest_private(vm_type, Level::G1) == Level::K4 { Limit::VmType } else { Limit::GuestMemfd }
}

/// Predicts the mappings of `range`, a part of the slot.
pub fn predict(terms: &Terms<'_>, range: Range, memory: &HostMemory) -> Prediction {
    let (allowed, _) = Walk { terms, memory: None, range }.count();
    let (expected, costs) = Walk { terms, memory: Some(memory), range }.count();
    let worst = |level: Level| {
        let costs = &costs[level as usize];
        let concerned = (0..LIMITS).filter(|index| costs[*index] > 0);
        // Of two that cost the same, the one that a change would lift.
        let index = concerned.max_by_key(|index| (costs[*index], ALL[*index].can_be_lifted())).unwrap_or(0);
        Cost { limit: ALL[index], bytes: costs[index] }
    };
    Prediction { allowed, expected, below_2m: worst(Level::M2), below_1g: worst(Level::G1) }
}

const ALL: [Limit; LIMITS] = [
    Limit::None,
    Limit::Edges,
    Limit::Congruence,
    Limit::DirtyLogging,
    Limit::GuestMemfd,
    Limit::Attributes,
    Limit::Backing,
    Limit::Advice,
    Limit::NoThp,
    Limit::MappingEdges,
    Limit::Resident,
    Limit::NotMapped,
    Limit::Cpu,
    Limit::VmType,
    Limit::FileOffset,
];

/// Bytes by limit, for each level that they are below of.
type Costs = [[u64; LIMITS]; 3];

impl<'a> Terms<'a> {
    /// Of `slot` in a VM of that type, on this processor.
    pub fn new(kernel: &dyn Kernel, vm_type: u32, slot: &'a Memslot, private: &'a dyn PrivateMemory) -> Self {
        let gmem_serves_all = slot.has_guest_memfd() && kernel.can_map_guest_memfd(slot.region.guest_memfd);
        let private_limit = private_limit(vm_type);
        Self { slot, private, largest: largest_page(), gmem_serves_all, private_limit }
    }

    /// Why the page at `gpa` cannot be mapped as a part of a larger one, as far as the slot decides.
    fn limit(&self, gpa: u64, level: Level) -> Option<Limit> {
        // What no change lifts comes first, so that a remedy that is told does help.
        let slot = self.slot;
        if self.is_private(gpa) {
            return Some(self.private_limit);
        }
        if self.gmem_serves_all {
            return Some(Limit::GuestMemfd);
        }
        let frame = level.frame(gpa).filter(|frame| slot.range().is_some_and(|range| range.contains(frame)));
        let Some(frame) = frame else { return Some(Limit::Edges) };
        if slot.is_dirty_logged() {
            return Some(Limit::DirtyLogging);
        }
        if alignment::hva_shift(&slot.region, level) != 0 {
            return Some(Limit::Congruence);
        }
        if self.private.first_private(frame).is_some() {
            return Some(Limit::Attributes);
        }
        (level > self.largest).then_some(Limit::Cpu)
    }

    fn is_private(&self, gpa: u64) -> bool {
        self.slot.has_guest_memfd()
            && self.private.first_private(Range { start: gpa, end: gpa + 1 }).is_some()
    }

    /// `range` widened to the edges of the largest pages with which KVM may map it, where `backing` is the largest of
    /// the memory behind: a mapping made for `range` stays within.
    pub fn widened(&self, range: Range, backing: Level) -> Range {
        let frame_at = |gpa: u64| {
            let levels = Level::DOWNWARDS.into_iter().filter(|level| *level <= backing);
            levels.filter(|level| self.limit(gpa, *level).is_none()).find_map(|level| level.frame(gpa))
        };
        let first = frame_at(range.start).map_or(range.start, |frame| frame.start);
        let last = frame_at(range.end - 1).map_or(range.end, |frame| frame.end);
        Range { start: first.min(range.start), end: last.max(range.end) }
    }
}

/// A walk over a part of a slot, mapping by mapping, alike ones together.
struct Walk<'a> {
    terms: &'a Terms<'a>,
    /// The memory behind; `None` when only the slot is to decide.
    memory: Option<&'a HostMemory>,
    range: Range,
}

/// What one step of the walk found: mappings of one level, beginning with the one that holds the step's place.
struct Step {
    level: Level,
    /// Nothing will be mapped where there is nothing behind.
    is_mapped: bool,
    /// For each level above it, why.
    limits: [Limit; 3],
    /// Where what comes may be otherwise.
    end: u64,
}

impl Walk<'_> {
    fn count(&self) -> (Counts, Costs) {
        let (mut counts, mut costs) = (Counts::default(), Costs::default());
        let mut at = self.range.start;
        while at < self.range.end {
            let step = self.step(at);
            let first = at - step.level.remainder(at);
            let end = step.end.min(self.range.end);
            let n = (end - first).div_ceil(step.level.bytes());
            if step.is_mapped {
                counts.add(step.level, n);
            }
            for level in [Level::M2, Level::G1].into_iter().filter(|level| *level > step.level) {
                costs[level as usize][step.limits[level as usize] as usize] += end - at;
            }
            // The last mapping may reach beyond the range, but never beyond the slot, so this does not wrap.
            at = first + n * step.level.bytes();
        }
        (counts, costs)
    }

    fn step(&self, at: u64) -> Step {
        let mut limits = [Limit::None; 3];
        for level in [Level::G1, Level::M2] {
            match self.limit(at, level) {
                None => {
                    let end = self.end_of_like(at, level, &limits);
                    return Step { level, is_mapped: true, limits, end };
                }
                Some(limit) => limits[level as usize] = limit,
            }
        }
        let end = self.end_of_limits(at, &limits).max(at + PAGE);
        Step { level: Level::K4, is_mapped: self.is_mapped(at), limits, end }
    }

    /// Where one of these limits may be another, or nothing be mapped any more.
    fn end_of_limits(&self, at: u64, limits: &[Limit; 3]) -> u64 {
        let is_private = || self.terms.private.first_private(Range { start: at, end: at + 1 }).is_some();
        let slot_end = self.terms.slot.range().map_or(self.range.end, |range| range.end);
        let end = |level: Level| match limits[level as usize] {
            // In private memory that the slot cannot have, it is so for every frame.
            Limit::Attributes if is_private() => u64::MAX,
            // These are about the frame that holds `at`.
            Limit::Edges | Limit::Attributes | Limit::MappingEdges => {
                level.frame(at).map_or(u64::MAX, |frame| frame.end)
            }
            // The slot's tail has another.
            _ => Some(slot_end - level.remainder(slot_end)).filter(|end| at < *end).unwrap_or(u64::MAX),
        };
        self.end_of_alike(at).min(end(Level::M2)).min(end(Level::G1))
    }

    /// Whether there is anything to map at `at`. What a guest_memfd serves needs no mapping in this process.
    fn is_mapped(&self, at: u64) -> bool {
        let is_there = |memory: &HostMemory| memory.at(self.hva(at)).is_some();
        self.terms.gmem_serves_all || self.terms.is_private(at) || self.memory.is_none_or(is_there)
    }

    /// Why the page at `at` is not mapped as a part of a larger one.
    fn limit(&self, at: u64, level: Level) -> Option<Limit> {
        let of_slot = self.terms.limit(at, level);
        let is_gmem = self.terms.gmem_serves_all || self.terms.is_private(at);
        let Some(memory) = self.memory.filter(|_| !is_gmem) else { return of_slot };
        let hva = self.hva(at);
        let Some(run) = memory.at(hva) else { return of_slot.or(Some(Limit::NotMapped)) };
        if run.level < level {
            // Whatever the slot is like: what is mapped has no larger pages.
            // Only a pool has pages of 1 GiB.
            let limit = if level == Level::G1 { Limit::Backing } else { run.limit };
            return if limit == Limit::Backing { Some(limit) } else { of_slot.or(Some(limit)) };
        }
        let is_whole = level.frame(hva).is_some_and(|frame| run.range.contains(&frame));
        of_slot.or((!is_whole).then_some(Limit::MappingEdges))
    }

    fn hva(&self, gpa: u64) -> u64 {
        self.terms.slot.hva_of(gpa)
    }

    /// Where whole mappings of `level` that are like the one at `at` end: at the next edge of whatever decides.
    fn end_of_like(&self, at: u64, level: Level, limits: &[Limit; 3]) -> u64 {
        let Some(frame) = level.frame(at) else { return at + PAGE };
        let end = self.end_of_limits(at, limits);
        let whole = (end.max(frame.end) - frame.start) / level.bytes() * level.bytes();
        frame.start + whole
    }

    /// Where the memory stops to be of one attribute, on one run of the host's and in one slot.
    fn end_of_alike(&self, at: u64) -> u64 {
        let slot_end = self.terms.slot.range().map_or(self.range.end, |range| range.end);
        let rest = Range { start: at, end: slot_end };
        let attributes = match self.terms.private.first_private(rest) {
            Some(run) if run.start > at => run.start,
            Some(run) => run.end,
            None => slot_end,
        };
        let host = self.memory.and_then(|memory| memory.end_at(self.hva(at)));
        let host = host.map_or(slot_end, |end| at + (end - self.hva(at)));
        attributes.min(host).min(slot_end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::{MEM_GUEST_MEMFD, MEM_LOG_DIRTY_PAGES, Region};
    use crate::memslot::Nature;
    use crate::memslot::host::Run;
    use crate::range::RangeSet;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const M2: u64 = 2 << 20;
    const G1: u64 = 1 << 30;
    const HVA: u64 = 0x7f00_0000_0000;

    fn slot(gpa: u64, size: u64, hva: u64, flags: u32) -> Memslot {
        Memslot {
            region: Region { slot: 0, flags, gpa, size, hva, guest_memfd: -1, guest_memfd_offset: 0 },
            backing: None,
            file: None,
            nature: Nature::default(),
        }
    }

    fn run(start: u64, end: u64, level: Level) -> Run {
        Run { range: Range { start, end }, level, limit: Limit::Backing }
    }

    /// Of the whole slot.
    fn prediction(slot: &Memslot, private: &RangeSet, runs: Vec<Run>) -> Prediction {
        let terms = Terms {
            slot,
            private,
            largest: Level::G1,
            gmem_serves_all: false,
            private_limit: Limit::GuestMemfd,
        };
        predict(&terms, slot.range().unwrap(), &HostMemory::of(runs))
    }

    fn counts(k4: u64, m2: u64, g1: u64) -> Counts {
        Counts { k4, m2, g1 }
    }

    #[test]
    fn head_and_tail_are_of_small_pages() {
        let slot = slot(M2 - 0x3000, 3 * M2, HVA + M2 - 0x3000, 0);
        let found = prediction(&slot, &RangeSet::new(), vec![run(HVA, HVA + 4 * M2, Level::M2)]);
        assert_eq!((found.allowed, found.expected), (counts(512, 2, 0), counts(512, 2, 0)));
        assert_eq!(found.below_2m, Cost { limit: Limit::Edges, bytes: M2 });
    }

    #[test]
    fn one_page_off_costs_all_huge_pages() {
        let slot = slot(G1, 4 * M2, HVA + 0x1000, 0);
        let found = prediction(&slot, &RangeSet::new(), vec![run(HVA, HVA + 8 * M2, Level::M2)]);
        assert_eq!(found.expected, counts(2048, 0, 0));
        assert_eq!(found.below_2m, Cost { limit: Limit::Congruence, bytes: 4 * M2 });
    }

    #[test]
    fn a_limit_that_could_be_lifted_spares_head_and_tail() {
        for (hva, flags, limit) in
            [(HVA, 0, Limit::Congruence), (HVA + 0x3000, MEM_LOG_DIRTY_PAGES, Limit::DirtyLogging)]
        {
            let slot = slot(G1 + 0x3000, 3 * M2, hva, flags);
            let found = prediction(&slot, &RangeSet::new(), vec![run(HVA, HVA + 4 * M2, Level::M2)]);
            assert_eq!(found.expected, counts(3 * 512, 0, 0));
            assert_eq!(found.below_2m, Cost { limit, bytes: 2 * M2 });
        }
    }

    #[test]
    fn a_gigabyte_takes_a_pool_and_congruence_with_it() {
        for (hva, level, allowed, expected) in [
            (HVA, Level::G1, counts(0, 0, 3), counts(0, 0, 3)),
            (HVA, Level::M2, counts(0, 0, 3), counts(0, 3 * 512, 0)),
            (HVA + M2, Level::G1, counts(0, 3 * 512, 0), counts(0, 3 * 512, 0)),
        ] {
            let slot = slot(4 * G1, 3 * G1, hva, 0);
            let found = prediction(&slot, &RangeSet::new(), vec![run(HVA, HVA + 5 * G1, level)]);
            assert_eq!((found.allowed, found.expected), (allowed, expected));
        }
    }

    #[test]
    fn no_remedy_is_told_that_would_not_help() {
        let slot = slot(4 * G1, 3 * G1, HVA + M2, 0);
        let found = prediction(&slot, &RangeSet::new(), vec![run(HVA, HVA + 5 * G1, Level::M2)]);
        assert_eq!(found.below_1g, Cost { limit: Limit::Backing, bytes: 3 * G1 });
        let found = prediction(&slot, &RangeSet::new(), vec![run(HVA, HVA + 5 * G1, Level::G1)]);
        assert_eq!(found.below_1g, Cost { limit: Limit::Congruence, bytes: 3 * G1 });
    }

    #[test]
    fn of_terabytes_the_answer_comes_at_once() {
        for hva in [HVA, HVA + M2, HVA + 0x1000] {
            let slot = slot(0, 8 << 40, hva, 0);
            let mut rules = counts(0, 0, 8 << 10);
            if hva != HVA {
                rules = if hva == HVA + M2 { counts(0, 4 << 20, 0) } else { counts(2 << 30, 0, 0) };
            }
            let found = prediction(&slot, &RangeSet::new(), vec![run(hva, hva + (8 << 40), Level::K4)]);
            assert_eq!((found.allowed, found.expected), (rules, counts(2 << 30, 0, 0)));
        }
    }

    #[test]
    fn private_memory_that_a_slot_cannot_have_is_not_walked_frame_by_frame() {
        let size = 8 << 40;
        let all: RangeSet = Range::new(G1, size).into_iter().collect();
        let slot = slot(G1, size, HVA, 0);
        let terms = Terms {
            slot: &slot,
            private: &all,
            largest: Level::G1,
            gmem_serves_all: false,
            private_limit: Limit::GuestMemfd,
        };
        let walk = Walk { terms: &terms, memory: None, range: Range { start: G1, end: G1 + size } };
        assert_eq!(walk.step(G1).end, G1 + size);
    }

    #[test]
    fn where_nothing_is_mapped_nothing_is_expected() {
        let runs = || vec![run(HVA, HVA + M2, Level::M2), run(HVA + M2 + 0x3000, HVA + 3 * M2, Level::M2)];
        for (flags, expected) in [(0, counts(509, 2, 0)), (MEM_LOG_DIRTY_PAGES, counts(3 * 512 - 3, 0, 0))] {
            let found = prediction(&slot(G1, 4 * M2, HVA, flags), &RangeSet::new(), runs());
            assert_eq!(found.expected, expected);
        }
        let all: RangeSet = Range::new(G1, 4 * M2).into_iter().collect();
        let private = prediction(&slot(G1, 4 * M2, HVA, MEM_GUEST_MEMFD), &all, runs());
        assert_eq!(private.expected, counts(4 * 512, 0, 0));
    }

    #[test]
    fn logging_and_a_guest_memfd_leave_small_pages() {
        let all: RangeSet = Range::new(G1, 4 * M2).into_iter().collect();
        for (flags, limit) in
            [(MEM_LOG_DIRTY_PAGES, Limit::DirtyLogging), (MEM_GUEST_MEMFD, Limit::GuestMemfd)]
        {
            let slot = slot(G1, 4 * M2, HVA, flags);
            let found = prediction(&slot, &all, vec![run(HVA, HVA + 4 * M2, Level::M2)]);
            assert_eq!((found.allowed, found.below_2m.limit), (counts(2048, 0, 0), limit));
        }
    }

    #[test]
    fn a_range_is_widened_to_the_page_that_may_be_mapped() {
        let private = RangeSet::new();
        let widened = |slot: &Memslot, start, end, backing| {
            let terms = Terms {
                slot,
                private: &private,
                largest: Level::G1,
                gmem_serves_all: false,
                private_limit: Limit::GuestMemfd,
            };
            let wide = terms.widened(Range { start, end }, backing);
            (wide.start, wide.end)
        };
        let congruent = slot(G1, G1, HVA, 0);
        assert_eq!(widened(&congruent, G1 + 0x1000, G1 + 0x2000, Level::M2), (G1, G1 + M2));
        assert_eq!(widened(&congruent, G1 + 0x1000, G1 + 0x2000, Level::G1), (G1, 2 * G1));
        assert_eq!(widened(&congruent, G1, G1 + M2, Level::M2), (G1, G1 + M2));
        assert_eq!(widened(&congruent, G1 + 0x1000, G1 + 0x2000, Level::K4), (G1 + 0x1000, G1 + 0x2000));
        let logged = slot(G1, G1, HVA, MEM_LOG_DIRTY_PAGES);
        assert_eq!(widened(&logged, G1 + 0x1000, G1 + 0x2000, Level::M2), (G1 + 0x1000, G1 + 0x2000));
        // The slot's own edge is none that a mapping crosses.
        let short = slot(G1 + 0x1000, M2, HVA + 0x1000, 0);
        assert_eq!(widened(&short, G1 + 0x1000, G1 + 0x2000, Level::M2), (G1 + 0x1000, G1 + 0x2000));
    }

    #[test]
    fn the_vm_s_type_has_a_word_on_private_memory() {
        for (vm_type, limit) in
            [(0, Limit::GuestMemfd), (1, Limit::GuestMemfd), (4, Limit::VmType), (5, Limit::VmType)]
        {
            assert_eq!(private_limit(vm_type), limit);
        }
        let slot = slot(G1, 4 * M2, HVA, MEM_GUEST_MEMFD);
        let private: RangeSet = Range::new(G1, M2).into_iter().collect();
        let terms = Terms {
            slot: &slot,
            private: &private,
            largest: Level::G1,
            gmem_serves_all: false,
            private_limit: Limit::VmType,
        };
        let memory = HostMemory::of(vec![run(HVA, HVA + 4 * M2, Level::M2)]);
        let found = predict(&terms, slot.range().unwrap(), &memory);
        assert_eq!(
            (found.expected, found.below_2m),
            (counts(512, 3, 0), Cost { limit: Limit::VmType, bytes: M2 })
        );
    }

    /// The plainest thing that could be right: each page by itself, by the rules as they are written.
    fn page_by_page(slot: &Memslot, private: &RangeSet, runs: Option<&[Run]>, range: Range) -> Counts {
        let place = slot.range().unwrap();
        let is_private = |page: u64| private.size_within(Range { start: page, end: page + PAGE }) > 0;
        let suits = |page: u64, size: u64| {
            let frame = Range { start: page / size * size, end: page / size * size + size };
            let shared = private.size_within(frame) == 0;
            let congruent = (slot.region.gpa ^ slot.region.hva) % size == 0;
            let host = runs.is_none_or(|runs| {
                let hva = slot.region.hva.wrapping_add(frame.start.wrapping_sub(slot.region.gpa));
                let held = |run: &&Run| run.range.start <= hva && hva + size <= run.range.end;
                runs.iter().find(held).is_some_and(|run| run.level.bytes() >= size)
            });
            let logged = slot.is_dirty_logged();
            place.contains(&frame) && shared && congruent && !logged && host && !is_private(page)
        };
        let is_there = |page: u64| {
            let hva = page - slot.region.gpa + slot.region.hva;
            is_private(page)
                || runs
                    .is_none_or(|runs| runs.iter().any(|run| run.range.start <= hva && hva < run.range.end))
        };
        let mut frames = BTreeSet::new();
        for page in (range.start..range.end).step_by(PAGE as usize).filter(|page| is_there(*page)) {
            let size = [G1, M2, PAGE].into_iter().find(|size| *size == PAGE || suits(page, *size)).unwrap();
            frames.insert((size, page / size));
        }
        let of = |size| frames.iter().filter(|(s, _)| *s == size).count() as u64;
        counts(of(PAGE), of(M2), of(G1))
    }

    /// Places are drawn in quarters of a frame, give or take a page, since edges are what it is about.
    fn place() -> impl Strategy<Value = u64> {
        (0u64..24, -1i64..=1)
            .prop_map(|(quarter, pages)| (quarter * M2 / 4).saturating_add_signed(pages * PAGE as i64))
    }

    proptest! {
        #[test]
        fn counts_as_one_would_page_by_page(
            base in prop::sample::select(vec![G1, 2 * G1 - 5 * M2 / 2, G1 + 0x1000]),
            size in place(),
            shift in prop::sample::select(vec![0, 0, 0, 0x1000, M2 / 2, M2]),
            logged in prop::bool::weighted(0.1),
            edges in prop::collection::vec(place(), 0..6),
            private in prop::collection::vec((place(), place()), 0..4),
            part in (place(), place()),
        ) {
            let flags = MEM_GUEST_MEMFD | if logged { MEM_LOG_DIRTY_PAGES } else { 0 };
            let slot = slot(base, size.max(PAGE), HVA + base % G1 + shift, flags);
            let place = slot.range().unwrap();
            let private: RangeSet =
                private.into_iter().filter_map(|(at, size)| Range::new(base + at, size)).collect();
            // Runs of alternating size, with a gap between some.
            let mut edges: Vec<u64> = edges.into_iter().map(|edge| slot.region.hva + edge).collect();
            edges.sort();
            edges.dedup();
            let runs: Vec<Run> = edges.windows(2).enumerate().filter(|(n, _)| n % 3 != 2).map(|(n, w)| {
                run(w[0], w[1], if n % 3 == 0 { Level::M2 } else { Level::K4 })
            }).collect();
            let part = Range::new(base + part.0, part.1).and_then(|part| part.intersect(&place)).unwrap_or(place);
            let terms = Terms { slot: &slot, private: &private, largest: Level::G1, gmem_serves_all: false, private_limit: Limit::GuestMemfd };
            let found = predict(&terms, part, &HostMemory::of(runs.clone()));
            prop_assert_eq!(found.allowed, page_by_page(&slot, &private, None, part));
            prop_assert_eq!(found.expected, page_by_page(&slot, &private, Some(&runs), part));
            let limited: u64 = found.below_2m.bytes;
            prop_assert!(limited <= part.size() && (limited > 0 || found.expected.k4 == 0));
        }
    }
}
