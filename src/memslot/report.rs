//! What there is to say of a slot that KVM would take: how it is aligned, what pages it will have, and what to change.
//!
//! It joins what the rules, the alignment and the prediction found, and puts the worst of it into words.

use super::alignment::{self, Alignment, Demand};
use super::host::{self, HostMemory, Kind};
use super::prediction::{Cost, Limit, Prediction, Terms, predict};
use super::{Backing, Memslot};
use crate::error::Result;
use crate::kvm::caps::Caps;
use crate::kvm::{Kernel, MappedObject};
use crate::level::Level;
use crate::range::{Range, RangeSet};

/// The report.
#[derive(Clone, Debug)]
pub struct Report {
    /// How the slot stands to the rule that was asked about.
    pub alignment: Alignment,
    /// Its pages.
    pub prediction: Prediction,
    /// What costs most, in words; empty when nothing does that could be otherwise.
    pub message: String,
    /// The smallest change that lifts it; empty when there is none.
    pub hint: String,
}

/// Reports on `range`, a part of `slot`. `private` is what of the guest's memory is private; `None`: what the slot's
/// backing says.
pub fn report(
    kernel: &dyn Kernel,
    caps: &Caps,
    slot: &Memslot,
    range: Range,
    private: Option<RangeSet>,
    demand: Demand,
) -> Result<Report> {
    let memory = HostMemory::survey(kernel, slot, behind(slot, range))?;
    let kind = host::kind(kernel, slot, slot.region.hva)?;
    let private = private.unwrap_or_else(|| private_of(caps, slot, &kind));
    let terms = Terms::new(kernel, caps.vm_type, slot, &private);
    let prediction = predict(&terms, range, &memory);
    let (message, hint) = in_words(slot, range, &prediction);
    Ok(Report { alignment: demand.measure(kernel, slot)?, prediction, message, hint })
}

/// What of a slot is private, by what its VMM says of its backing: nothing, or, with a guest_memfd, all of it. Who says
/// nothing is taken to mean all of it, in a VM that has private memory, unless that guest_memfd is mapped at the hva.
pub fn private_of(caps: &Caps, slot: &Memslot, kind: &Kind) -> RangeSet {
    let is_hidden = match slot.backing {
        Some(backing) => backing == Backing { object: MappedObject::GuestMemfd, shared: false },
        None => caps.has_private_memory() && !kind.is_guest_memfd,
    };
    slot.range().filter(|_| slot.has_guest_memfd() && is_hidden).into_iter().collect()
}

/// The memory of this process behind the largest pages that could hold `range` and still lie in the slot.
fn behind(slot: &Memslot, range: Range) -> Range {
    let level = Level::G1;
    let start = range.start - level.remainder(range.start);
    let end = range.end.checked_next_multiple_of(level.bytes()).unwrap_or(range.end);
    let place = slot.range().unwrap_or(range);
    let part = Range { start: start.max(place.start), end: end.min(place.end) };
    let start = slot.hva_of(part.start);
    Range { start, end: start + part.size() }
}

/// The worst limit, and what lifts it. That nothing but a pool has pages of 1 GiB is no news.
fn in_words(slot: &Memslot, range: Range, prediction: &Prediction) -> (String, String) {
    let is_news =
        |cost: &Cost| !matches!(cost.limit, Limit::None | Limit::Backing | Limit::Edges | Limit::Cpu);
    let (level, cost) = match (prediction.below_2m, prediction.below_1g) {
        (cost, _) if cost.bytes > 0 => (Level::M2, cost),
        (_, cost) if is_news(&cost) => (Level::G1, cost),
        _ => return Default::default(),
    };
    let message = format!(
        "{:#x} of {:#x} bytes will be in pages smaller than {level}: {}",
        cost.bytes,
        range.size(),
        why(cost.limit, level)
    );
    (message, remedy(slot, cost.limit, level))
}

fn why(limit: Limit, level: Level) -> String {
    match limit {
        Limit::None => return String::new(),
        Limit::Edges => "the slot does not hold the whole of them",
        Limit::Congruence => return format!("gpa and hva differ modulo {level}"),
        Limit::DirtyLogging => "writes are logged page by page",
        Limit::GuestMemfd => "a guest_memfd has pages of 4 KiB",
        Limit::Attributes => "private and shared memory share them",
        Limit::Backing => "what is mapped there has none",
        Limit::Advice => "transparent huge pages come only where they are advised",
        Limit::NoThp => "transparent huge pages are off, or advised against",
        Limit::MappingEdges => "the mapping does not hold the whole of them",
        Limit::Resident => "smaller pages are there already",
        Limit::NotMapped => "nothing is mapped there",
        Limit::Cpu => "the processor's nested paging has none",
        Limit::VmType => "private memory of this type of VM has pages of 4 KiB",
    }
    .into()
}

fn remedy(slot: &Memslot, limit: Limit, level: Level) -> String {
    match limit {
        Limit::None | Limit::GuestMemfd | Limit::Backing | Limit::Cpu | Limit::VmType => {
            return String::new();
        }
        Limit::Congruence => return alignment::hva_hint(&slot.region, level),
        Limit::Edges => return edges_remedy(slot, level),
        Limit::Attributes => return format!("convert whole pages of {level}"),
        Limit::DirtyLogging => "turn dirty logging off (KVM_MEM_LOG_DIRTY_PAGES) while it is not needed",
        Limit::Advice => "advise them: madvise(MADV_HUGEPAGE), or KVMPREP_POPULATE_HUGE_ADVICE",
        Limit::NoThp => {
            "allow them in /sys/kernel/mm/transparent_hugepage, or take the memory from a pool of huge pages"
        }
        Limit::MappingEdges => return format!("map whole pages of {level} behind the slot, in one mapping"),
        Limit::Resident => {
            "advise huge pages before the memory is first touched, or collapse it (MADV_COLLAPSE)"
        }
        Limit::NotMapped => "map the slot's memory first",
    }
    .into()
}

fn edges_remedy(slot: &Memslot, level: Level) -> String {
    let Some(place) = slot.range() else { return String::new() };
    let down = |gpa: u64| gpa - level.remainder(gpa);
    format!(
        "let the slot begin at gpa {:#x} and end at {:#x}, or leave it: it is its head and tail only",
        down(place.start),
        place.end.checked_next_multiple_of(level.bytes()).unwrap_or(place.end)
    )
}
