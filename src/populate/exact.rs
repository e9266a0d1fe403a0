//! Whether a population keeps to the ranges that were named (`EXACT`).
//!
//! KVM maps a whole huge page for one small one asked for, where its rules allow that. Then memory beyond the range is
//! mapped too, which matters to who counts pages or keeps some from the guest. Only the rules decide here, not whether
//! the memory happens to have huge pages at this moment.

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{Kernel, MappedObject};
use crate::level::Level;
use crate::memslot::host::Occasion;
use crate::memslot::prediction::Terms;
use crate::memslot::{Memslot, SlotRecord};
use crate::range::{PAGE, PrivateMemory, Range, RangeSet};

/// Refuses ranges at whose edges KVM may map beyond them.
pub fn check(
    kernel: &dyn Kernel,
    caps: &Caps,
    slots: &SlotRecord,
    asked: &[Range],
    told: Option<&dyn PrivateMemory>,
) -> Result<()> {
    let asked: RangeSet = asked.iter().copied().collect();
    let edges = Edges { kernel, occasion: Occasion::now(kernel)?, caps, told };
    for range in asked.iter() {
        let (mut wide, mut culprit) = (range, None);
        for gpa in [range.start, range.end - PAGE] {
            let Some(page) = Range::new(gpa, PAGE) else { continue };
            let Some((_, slot)) = slots.touching(0, page).next() else { continue };
            let frame = edges.widened(slot, page)?;
            if !range.contains(&frame) {
                wide = Range { start: wide.start.min(frame.start), end: wide.end.max(frame.end) };
                culprit = culprit.or(Some(slot));
            }
        }
        if let Some(slot) = culprit {
            return Err(inexact(range, wide).slot(slot.id()));
        }
    }
    Ok(())
}

/// Whoever looks at the edges of ranges.
struct Edges<'a> {
    kernel: &'a dyn Kernel,
    occasion: Occasion<'a>,
    caps: &'a Caps,
    told: Option<&'a dyn PrivateMemory>,
}

impl Edges<'_> {
    /// The largest page with which KVM may map the small one.
    fn widened(&self, slot: &Memslot, page: Range) -> Result<Range> {
        let kind = self.occasion.kind(slot, slot.hva_of(page.start))?;
        // KVM goes by each page's attribute: until these are told, only who says that all is private is believed.
        let is_hidden =
            slot.backing.is_some() && slot.is_hidden(self.caps.has_private_memory(), || Ok(false))?;
        let private: RangeSet = slot.range().filter(|_| is_hidden).into_iter().collect();
        let private = self.told.unwrap_or(&private);
        // A file system may have huge pages in its cache.
        let largest = if kind.object == MappedObject::File { Level::M2 } else { kind.largest };
        Ok(Terms::new(self.kernel, self.caps.vm_type, slot, private).widened(page, largest))
    }
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
