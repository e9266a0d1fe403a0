//! Where slots show memory that another slot shows too: at the same addresses of this process, or by another mapping of the
//! same file. What goes for one slot would go for the other.
//!
//! It looks at mappings once for each slot, and must not be asked more often than slots change.

use crate::kvm::{Mapping, Mappings, Sys};
use crate::range::{Range, RangeSet};

/// A part of a file that is mapped for a slot.
#[derive(Clone, Copy)]
struct Shown {
    inode: u64,
    /// Which part, in bytes.
    part: Range,
    /// Where it is mapped.
    hva: u64,
}

impl Shown {
    /// What a slot shows at `place` by this mapping, where that is of a file that others may map too.
    fn by(mapping: &Mapping, place: Range) -> Option<Self> {
        if !mapping.shared || mapping.inode == 0 {
            return None;
        }
        let part = Range::new(mapping.offset + (place.start - mapping.start), place.size())?;
        Some(Shown { inode: mapping.inode, part, hva: place.start })
    }

    fn hvas_of(&self, part: Range) -> Range {
        let hva = |offset| self.hva + (offset - self.part.start);
        Range { start: hva(part.start), end: hva(part.end) }
    }
}

/// Where, of `places`, at which slots have their memory in this process, by address.
pub fn find(places: &[Range], mappings: &Mappings<'_>) -> Sys<RangeSet> {
    let (mut twice, mut end) = (RangeSet::new(), 0);
    let mut in_files = Vec::new();
    for place in places {
        if let Some(again) = Range::between(place.start, place.end.min(end)) {
            twice.insert(again);
        }
        end = end.max(place.end);
        in_files.extend(files_at(*place, mappings)?);
    }
    find_in_files(in_files, &mut twice);
    Ok(twice)
}

fn files_at(place: Range, mappings: &Mappings<'_>) -> Sys<Vec<Shown>> {
    let (mut found, mut at) = (Vec::new(), place.start);
    while let Some(rest) = Range::between(at, place.end) {
        let Some(mapping) = mappings.at(at)?.filter(|mapping| mapping.start < rest.end) else { break };
        let mapped = Range { start: at.max(mapping.start), end: rest.end.min(mapping.end) };
        found.extend(Shown::by(&mapping, mapped));
        at = mapped.end;
    }
    Ok(found)
}

fn find_in_files(mut all: Vec<Shown>, twice: &mut RangeSet) {
    all.sort_by_key(|shown| (shown.inode, shown.part.start));
    // Of those before, the one that goes farthest: what another has in common with any, it has with that one.
    let mut farthest: Option<Shown> = None;
    for shown in all {
        let other = farthest.filter(|other| other.inode == shown.inode);
        if let Some((other, common)) = other.and_then(|it| Some((it, it.part.intersect(&shown.part)?))) {
            twice.insert(other.hvas_of(common));
            twice.insert(shown.hvas_of(common));
        }
        farthest = other.filter(|other| other.part.end >= shown.part.end).or(Some(shown));
    }
}
