//! Whether a population keeps to the ranges that were named (`EXACT`).
//!
//! KVM maps a whole huge page for one small one asked for, where its rules allow that. Then memory beyond the range is
//! mapped too, which matters to who counts pages or keeps some from the guest. Only the rules decide here, not whether
//! the memory happens to have huge pages at this moment.

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{Kernel, MappedObject};
use crate::level::Level;
use crate::memslot::prediction::Terms;
use crate::memslot::{SlotRecord, host, report::private_of};
use crate::range::{PAGE, Range, RangeSet};

/// Refuses ranges at whose edges KVM may map beyond them.
pub fn check(kernel: &dyn Kernel, caps: &Caps, slots: &SlotRecord, asked: &[Range]) -> Result<()> {
    let asked: RangeSet = asked.iter().copied().collect();
    for range in asked.iter() {
        let start = widened_at(kernel, caps, slots, range.start)?.map_or(range.start, |frame| frame.start);
        let end = widened_at(kernel, caps, slots, range.end - PAGE)?.map_or(range.end, |frame| frame.end);
        let wide = Range { start: start.min(range.start), end: end.max(range.end) };
        if wide != range {
            return Err(inexact(range, wide));
        }
    }
    Ok(())
}

/// The largest page with which KVM may map the small one at `gpa`; `None` where there is no slot.
fn widened_at(kernel: &dyn Kernel, caps: &Caps, slots: &SlotRecord, gpa: u64) -> Result<Option<Range>> {
    let Some(page) = Range::new(gpa, PAGE) else { return Ok(None) };
    let Some((_, slot)) = slots.touching(0, page).next() else { return Ok(None) };
    let kind = host::kind(kernel, slot, slot.hva_of(gpa))?;
    let private = private_of(caps, slot, &kind);
    // A file system may have huge pages in its cache.
    let largest = if kind.object == MappedObject::File { Level::M2 } else { kind.largest };
    Ok(Some(Terms::new(kernel, caps.vm_type, slot, &private).widened(page, largest)))
}

fn inexact(range: Range, wide: Range) -> Error {
    let mut message = format!("KVM may map more than guest {range}: ");
    let beyond = [(wide.start < range.start, "from", wide.start), (wide.end > range.end, "to", wide.end)];
    let words: Vec<String> =
        beyond.iter().filter(|(is, ..)| *is).map(|(_, word, gpa)| format!("{word} {gpa:#x}")).collect();
    message.push_str(&words.join(" and "));
    Error::invalid(Reason::RangeInexact, message)
        .stage(Stage::Stage2)
        .range(wide)
        .hint("name the wider range (gpa and size of the error), or do without KVMPREP_POPULATE_EXACT")
}
