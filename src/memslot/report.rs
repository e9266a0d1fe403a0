//! What there is to say of a slot that KVM would take: how it is aligned, what pages it will have, and what to change.
//!
//! It joins what the rules, the alignment and the prediction found, and puts the worst of it into words.

use super::Memslot;
use super::alignment::{self, Alignment, Breach, Demand};
use super::guest_memfd::Pitfall;
use super::host::{Kind, Occasion};
use super::prediction::{Cost, Limit, Prediction, Terms, predict};
use crate::error::Result;
use crate::kvm::Kernel;
use crate::kvm::caps::Caps;
use crate::level::Level;
use crate::range::{PrivateMemory, Range, RangeSet};

/// The report.
#[derive(Clone, Debug)]
pub struct Report {
    /// How the slot stands to the rule that was asked about.
    pub alignment: Alignment,
    /// Its pages.
    pub prediction: Prediction,
    /// What is wrong with its guest_memfd.
    pub pitfall: Option<Pitfall>,
    /// What costs most, in words; empty when nothing does that could be otherwise.
    pub message: String,
    /// The smallest change that lifts it; empty when there is none.
    pub hint: String,
}

/// Reports on `range`, a part of `slot`. `private` is what of the guest's memory is private; `None`: what the slot's
/// backing says. A strict demand turns what is wrong with its guest_memfd into an error.
pub fn report(
    kernel: &dyn Kernel,
    caps: &Caps,
    slot: &Memslot,
    range: Range,
    private: Option<&dyn PrivateMemory>,
    demand: Demand,
) -> Result<Report> {
    let occasion = Occasion::now(kernel)?;
    let kind = occasion.kind(slot, slot.region.hva)?;
    let said = private_of(caps, slot, &kind)?;
    let private = private.filter(|_| caps.has_private_memory()).unwrap_or(&said);
    let terms = Terms::new(kernel, caps.vm_type, slot, private);
    let prediction = predict(&terms, range, &occasion.survey(slot, behind(slot, range))?);
    let alignment = alignment::measure(demand.rule, &slot.region, slot.has_guest_memfd(), kind.largest);
    let pitfall = Pitfall::of(kernel, caps, slot, occasion.mappings());
    let (message, hint) = match (pitfall, alignment.breach(&slot.region)) {
        // First things first: what follows of them is told by the numbers.
        (Some(pitfall), _) => {
            let (message, hint) = pitfall.in_words();
            (message.into(), hint.into())
        }
        (None, Some(Breach { message, hint })) => (message, hint),
        (None, None) => in_words(slot, range, &prediction),
    };
    Ok(Report { alignment, prediction, pitfall, message, hint })
}

/// What of a slot is private, by its VMM's word.
fn private_of(caps: &Caps, slot: &Memslot, kind: &Kind) -> Result<RangeSet> {
    let is_hidden = slot.is_hidden(caps.has_private_memory(), || Ok(kind.is_guest_memfd))?;
    Ok(slot.range().filter(|_| is_hidden).into_iter().collect())
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

/// The worst limit, and what lifts it; nothing where nothing does. That only a pool has pages of 1 GiB is no news.
fn in_words(slot: &Memslot, range: Range, prediction: &Prediction) -> (String, String) {
    let (level, cost) = if prediction.below_2m.bytes > 0 {
        (Level::M2, prediction.below_2m)
    } else {
        (Level::G1, prediction.below_1g)
    };
    let is_news = level == Level::M2 || !matches!(cost.limit, Limit::Backing | Limit::Edges);
    let remedy = remedy(slot, cost.limit, level).filter(|_| is_news);
    remedy.map(|remedy| (told(cost, range, level), remedy)).unwrap_or_default()
}

fn told(cost: Cost, range: Range, level: Level) -> String {
    let (bytes, all) = (cost.bytes, range.size());
    let why = match cost.limit {
        Limit::NotMapped => return format!("nothing is mapped behind {bytes:#x} of {all:#x} bytes"),
        Limit::Congruence => {
            return format!("{} gpa and hva differ modulo {level}", smaller(bytes, all, level));
        }
        Limit::None => "",
        Limit::Edges => "they are the slot's head and tail",
        Limit::DirtyLogging => "writes are logged page by page",
        Limit::GuestMemfd => "a guest_memfd has pages of 4 KiB",
        Limit::Attributes => "private and shared memory lie in one page of that size",
        Limit::Backing => "what is mapped there has none that large",
        Limit::Advice => "transparent huge pages come only where they are advised",
        Limit::NoThp => "transparent huge pages are off there, or advised against",
        Limit::MappingEdges => "the mapping does not hold a whole one",
        Limit::Resident => "smaller pages are there already",
        Limit::Cpu => "the processor's nested paging has none that large",
        Limit::VmType => "private memory of this type of VM has pages of 4 KiB",
        Limit::FileOffset => "the hva and the offset in the file mapped there differ modulo that",
    };
    format!("{} {why}", smaller(bytes, all, level))
}

fn smaller(bytes: u64, all: u64, level: Level) -> String {
    format!("{bytes:#x} of {all:#x} bytes will be in pages smaller than {level}:")
}

/// What lifts a limit; `None` where nothing does that is worth a word.
fn remedy(slot: &Memslot, limit: Limit, level: Level) -> Option<String> {
    let text = match limit {
        Limit::None | Limit::GuestMemfd | Limit::Cpu | Limit::VmType => return None,
        Limit::Congruence => return Some(alignment::hva_hint(&slot.region, level)),
        Limit::Edges => return edges_remedy(slot, level),
        Limit::Attributes => return Some(format!("convert whole pages of {level}")),
        Limit::DirtyLogging => "turn dirty logging off (KVM_MEM_LOG_DIRTY_PAGES) while it is not needed",
        Limit::Backing => {
            "use anonymous or shared memory with transparent huge pages, or a pool of huge pages (hugetlb)"
        }
        Limit::Advice => {
            "advise them before the memory is touched (MADV_HUGEPAGE, or KVMPREP_POPULATE_HUGE_ADVICE), and collapse what \
             is there (MADV_COLLAPSE)"
        }
        Limit::NoThp => {
            "see madvise(MADV_NOHUGEPAGE), prctl(PR_SET_THP_DISABLE), and enabled, for shared memory shmem_enabled, in \
             /sys/kernel/mm/transparent_hugepage; or use a pool (hugetlb)"
        }
        Limit::MappingEdges => {
            return Some(format!("map whole pages of {level} behind the slot, in one mapping"));
        }
        Limit::Resident => {
            "advise huge pages before the memory is first touched, or collapse what is there (MADV_COLLAPSE)"
        }
        Limit::FileOffset => {
            return Some(format!("map the file so that hva and file offset are equal modulo {level}"));
        }
        Limit::NotMapped => "map the slot's memory first",
    };
    Some(text.into())
}

/// Of a slot without a single page of that size nothing is to be said: it is small.
fn edges_remedy(slot: &Memslot, level: Level) -> Option<String> {
    let place = slot.range().filter(|place| level.fits(*place))?;
    Some(format!(
        "begin and end the slot and its memory at multiples of {level} (gpa {:#x} to {:#x}), if the rest matters",
        place.start - level.remainder(place.start),
        place.end.checked_next_multiple_of(level.bytes()).unwrap_or(place.end)
    ))
}
