//! The record of a guest's slots, by number and by place.
//!
//! It says what is; whether a change is wise is for others. A change is refused whole or made whole.

use super::{Memslot, SlotId, Slots, address_space};
use crate::kvm::{FileId, Kernel};
use crate::range::Range;
use std::collections::BTreeMap;

/// All slots of one guest.
#[derive(Clone, Debug, Default)]
pub struct SlotRecord {
    by_id: BTreeMap<SlotId, Entry>,
    /// (address space, first byte) to slot: no two slots of an address space overlap.
    by_place: BTreeMap<(u32, u64), SlotId>,
    /// (guest_memfd, first byte of it) to slot: no byte is bound to two slots.
    by_binding: BTreeMap<(FileId, u64), SlotId>,
    /// How many slots are changing.
    changing: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    slot: Memslot,
    range: Range,
    /// Its guest_memfd, where that could be told when it was put in.
    file: Option<FileId>,
    changing: bool,
}

impl SlotRecord {
    /// The slot of that number.
    pub fn get(&self, id: SlotId) -> Option<&Memslot> {
        self.by_id.get(&id).map(|entry| &entry.slot)
    }

    /// Whether a change of that slot has been announced and not yet noted.
    pub fn is_changing(&self, id: SlotId) -> bool {
        self.by_id.get(&id).is_some_and(|entry| entry.changing)
    }

    /// Whether a change of any slot has been announced and not yet noted.
    pub fn is_any_changing(&self) -> bool {
        self.changing > 0
    }

    /// Marks a known slot as about to change, or not any more.
    pub fn set_changing(&mut self, id: SlotId, changing: bool) {
        if let Some(entry) = self.by_id.get_mut(&id) {
            self.changing -= usize::from(entry.changing);
            self.changing += usize::from(changing);
            entry.changing = changing;
        }
    }

    /// All slots of one address space, by place.
    pub fn of_address_space(&self, space: u32) -> impl Iterator<Item = (Range, &Memslot)> {
        self.by_place
            .range((space, 0)..=(space, u64::MAX))
            .filter_map(|(_, id)| self.by_id.get(id).map(|entry| (entry.range, &entry.slot)))
    }

    /// The slots that `range` of an address space touches, by place.
    pub fn touching(&self, space: u32, range: Range) -> impl Iterator<Item = (Range, &Memslot)> {
        let first = self
            .by_place
            .range((space, 0)..=(space, range.start))
            .next_back()
            .map_or(range.start, |(k, _)| k.1);
        self.by_place
            .range((space, first)..(space, range.end))
            .filter_map(|(_, id)| self.by_id.get(id))
            .filter(move |entry| entry.range.overlaps(&range))
            .map(|entry| (entry.range, &entry.slot))
    }

    /// Puts `slot` in, in place of the one with its number; one without size takes that one out. `file` is its
    /// guest_memfd. The caller has checked for room. Returns what was there.
    pub fn replace(&mut self, slot: &Memslot, file: Option<FileId>) -> Option<Memslot> {
        let old = self.by_id.remove(&slot.id());
        if let Some(old) = &old {
            self.changing -= usize::from(old.changing);
            self.by_place.remove(&(address_space(slot.id()), old.range.start));
            if let Some(file) = old.file {
                self.by_binding.remove(&(file, old.slot.region.guest_memfd_offset));
            }
        }
        if let Some(range) = slot.range() {
            self.by_id.insert(slot.id(), Entry { slot: *slot, range, file, changing: false });
            self.by_place.insert((address_space(slot.id()), range.start), slot.id());
            if let Some(file) = file {
                self.by_binding.insert((file, slot.region.guest_memfd_offset), slot.id());
            }
        }
        old.map(|entry| entry.slot)
    }

    /// All slots, by number.
    pub fn iter(&self) -> impl Iterator<Item = &Memslot> {
        self.by_id.values().map(|entry| &entry.slot)
    }
}

impl Slots for SlotRecord {
    fn slot(&self, id: SlotId) -> Option<Memslot> {
        self.get(id).copied()
    }

    fn overlapping(&self, range: Range, id: SlotId) -> Option<(SlotId, Range)> {
        let mut others = self.touching(address_space(id), range).filter(|(_, other)| other.id() != id);
        others.next().map(|(place, other)| (other.id(), place))
    }

    fn bound(&self, _: &dyn Kernel, file: FileId, part: Range) -> Option<SlotId> {
        // No two of a file overlap: only the last that begins before the part's end can reach into it.
        let (_, id) = self.by_binding.range((file, 0)..(file, part.end)).next_back()?;
        let region = self.by_id.get(id)?.slot.region;
        Range::new(region.guest_memfd_offset, region.size)?.overlaps(&part).then_some(*id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Region;
    use crate::memslot::Nature;
    use crate::memslot::check::check_overlap;

    fn slot(id: SlotId, gpa: u64, size: u64) -> Memslot {
        Memslot {
            region: Region { slot: id, flags: 0, gpa, size, hva: 0, guest_memfd: -1, guest_memfd_offset: 0 },
            backing: None,
            file: None,
            nature: Nature::default(),
        }
    }

    #[test]
    fn finds_what_a_range_touches() {
        let mut record = SlotRecord::default();
        for s in [
            slot(0, 0, 0x1000),
            slot(1, 0x1000, 0x4000),
            slot(2, 0x8000, 0x1000),
            slot(0x10001, 0x1000, 0x1000),
        ] {
            check_overlap(&record, &s).unwrap();
            record.replace(&s, None);
        }
        let touching =
            |start, end| record.touching(0, Range { start, end }).map(|(_, s)| s.id()).collect::<Vec<_>>();
        assert_eq!(touching(0x2000, 0x3000), [1]);
        assert_eq!(touching(0xfff, 0x8001), [0, 1, 2]);
        assert_eq!(touching(0x5000, 0x8000), Vec::<SlotId>::new());
        assert_eq!(record.of_address_space(1).count(), 1);
    }

    #[test]
    fn an_overlap_names_the_other_slot_and_changes_nothing() {
        let mut record = SlotRecord::default();
        record.replace(&slot(7, 0x1000, 0x2000), None);
        let error = check_overlap(&record, &slot(8, 0x2000, 0x1000)).unwrap_err();
        assert_eq!((error.errno, error.slot, error.other_slot), (libc::EEXIST, Some(8), Some(7)));
        check_overlap(&record, &slot(7, 0x2000, 0x1000)).unwrap();
        check_overlap(&record, &slot(0x10008, 0x2000, 0x1000)).unwrap();
    }

    #[test]
    fn a_slot_without_size_takes_the_old_one_out() {
        let mut record = SlotRecord::default();
        record.replace(&slot(7, 0x1000, 0x2000), None);
        assert_eq!(record.replace(&slot(7, 0, 0), None).unwrap().region.size, 0x2000);
        assert!(record.get(7).is_none());
        assert_eq!(record.of_address_space(0).count(), 0);
    }
}
