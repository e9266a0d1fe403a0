//! The record of a guest's slots, by number and by place.
//!
//! It says what is; whether a change is wise is for others. A change is refused whole or made whole.

use super::{Memslot, SlotId, Slots, address_space, slot_number};
use crate::kvm::FileId;
use crate::range::Range;
use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};

/// All slots of one guest.
#[derive(Clone, Debug, Default)]
pub struct SlotRecord {
    spaces: BTreeMap<u32, Space>,
    /// (guest_memfd, first byte of it) to slot: no byte is bound to two slots.
    by_binding: BTreeMap<(FileId, u64), SlotId>,
    /// The guest_memfds of those that have one, where that could be told when they were put in.
    files: BTreeMap<SlotId, FileId>,
    /// Those whose guest_memfd serves shared memory too.
    one_sided: BTreeSet<SlotId>,
    /// Those that are changing.
    changing: BTreeSet<SlotId>,
}

/// What is known of a slot.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// Where it lies; all of it.
    pub place: Range,
    /// As its VMM describes it.
    pub slot: Memslot,
    /// Whether a change was announced and not yet noted.
    pub is_changing: bool,
    /// Which file its guest_memfd is, where that could be told when the slot was put in.
    pub guest_memfd: Option<FileId>,
    /// Whether that serves all of the slot's memory, shared or private: there is no other side then.
    pub is_one_sided: bool,
}

/// One address space. Its slots are many and small, so most of what a new one costs is fresh memory: it is kept dense.
#[derive(Clone, Debug, Default)]
struct Space {
    /// By number, of which there are 65536 at most.
    shelves: Vec<Option<Box<Shelf>>>,
    /// First byte to one past the last, and to the slot's number. No two overlap.
    by_place: BTreeMap<u64, (u64, SlotId)>,
}

/// Slots of consecutive numbers.
type Shelf = [Option<Memslot>; SHELF];
const SHELF: usize = 64;

impl Space {
    fn get(&self, id: SlotId) -> Option<&Memslot> {
        let number = slot_number(id) as usize;
        self.shelves.get(number / SHELF)?.as_ref()?[number % SHELF].as_ref()
    }

    /// The last slot, but for `id` itself, that begins before `end`.
    fn last_before(&self, end: u64, id: Option<SlotId>) -> Option<(SlotId, Range)> {
        let mut before = self.by_place.range(..end).rev();
        let (start, (end, id)) = before.find(|(_, (_, other))| Some(*other) != id)?;
        Some((*id, Range { start: *start, end: *end }))
    }

    /// The slots that have something of `range`, by place.
    fn touching(&self, range: Range) -> impl Iterator<Item = (Range, &Memslot)> {
        let first = self.last_before(range.start, None).map_or(range.start, |(_, place)| place.start);
        let held = self.by_place.range(first..range.end).filter(move |(_, (end, _))| *end > range.start);
        held.filter_map(|(start, (end, id))| Some((Range { start: *start, end: *end }, self.get(*id)?)))
    }

    fn take(&mut self, id: SlotId) -> Option<Memslot> {
        let number = slot_number(id) as usize;
        let old = self.shelves.get_mut(number / SHELF)?.as_mut()?[number % SHELF].take()?;
        self.by_place.remove(&old.region.gpa);
        Some(old)
    }

    fn put(&mut self, slot: &Memslot, range: Range) {
        let number = slot_number(slot.id()) as usize;
        if self.shelves.len() <= number / SHELF {
            self.shelves.resize_with(number / SHELF + 1, || None);
        }
        let shelf = self.shelves[number / SHELF].get_or_insert_with(|| Box::new([None; SHELF]));
        shelf[number % SHELF] = Some(*slot);
        self.by_place.insert(range.start, (range.end, slot.id()));
    }
}

impl SlotRecord {
    /// The slot of that number.
    pub fn get(&self, id: SlotId) -> Option<&Memslot> {
        self.spaces.get(&address_space(id))?.get(id)
    }

    /// Whether a change of that slot has been announced and not yet noted.
    pub fn is_changing(&self, id: SlotId) -> bool {
        self.changing.contains(&id)
    }

    /// Whether a change of any slot has been announced and not yet noted.
    pub fn is_any_changing(&self) -> bool {
        !self.changing.is_empty()
    }

    /// Marks a known slot as about to change, or not any more.
    pub fn set_changing(&mut self, id: SlotId, changing: bool) {
        if !changing {
            self.changing.remove(&id);
        } else if self.get(id).is_some() {
            self.changing.insert(id);
        }
    }

    /// The guest_memfd of a known slot serves shared memory too.
    pub fn set_one_sided(&mut self, id: SlotId) {
        if self.get(id).is_some() {
            self.one_sided.insert(id);
        }
    }

    /// Where in this process the slots have their memory, by address.
    pub fn host_places(&self) -> Vec<Range> {
        let mut places: Vec<Range> =
            self.iter().filter_map(|slot| Range::new(slot.region.hva, slot.region.size)).collect();
        places.sort_by_key(|place| place.start);
        places
    }

    /// All slots of one address space, by place.
    pub fn of_address_space(&self, space: u32) -> impl Iterator<Item = (Range, &Memslot)> {
        self.touching(space, Range { start: 0, end: u64::MAX })
    }

    /// The slots that `range` of an address space touches, by place.
    pub fn touching(&self, space: u32, range: Range) -> impl Iterator<Item = (Range, &Memslot)> {
        self.spaces.get(&space).into_iter().flat_map(move |space| space.touching(range))
    }

    /// The slots of address space 0 that any of `ranges` touches, or all there are when that is empty.
    pub fn parts(&self, ranges: &[Range]) -> Self {
        if ranges.is_empty() {
            return self.clone();
        }
        let mut parts = Self::default();
        for (_, slot) in ranges.iter().flat_map(|range| self.touching(0, *range)) {
            if parts.get(slot.id()).is_none() {
                parts.replace(slot, self.files.get(&slot.id()).copied());
            }
        }
        parts.changing = self.changing.clone();
        parts
    }

    /// The slots of address space 0 that `range` touches, by place, with all that is known of each.
    pub fn in_range(&self, range: Range) -> Vec<Placed> {
        let of = |(place, slot): (Range, &Memslot)| Placed {
            place,
            slot: *slot,
            is_changing: self.is_changing(slot.id()),
            guest_memfd: self.files.get(&slot.id()).copied(),
            is_one_sided: self.one_sided.contains(&slot.id()),
        };
        self.touching(0, range).map(of).collect()
    }

    /// Puts `slot` in, in place of the one with its number; one without size takes that one out. `file` is its
    /// guest_memfd. The caller has checked for room. Returns what was there.
    pub fn replace(&mut self, slot: &Memslot, file: Option<FileId>) -> Option<Memslot> {
        let id = slot.id();
        let space = self.spaces.entry(address_space(id)).or_default();
        let old = space.take(id);
        if let (Some(old), Some(file)) = (&old, self.files.remove(&id)) {
            // Another slot may have come to that part meanwhile, if changes are noted out of order.
            if let Entry::Occupied(binding) = self.by_binding.entry((file, old.region.guest_memfd_offset)) {
                if *binding.get() == id {
                    binding.remove();
                }
            }
        }
        self.one_sided.remove(&id);
        self.changing.remove(&id);
        if let Some(range) = slot.range() {
            space.put(slot, range);
            if let Some(file) = file {
                self.files.insert(id, file);
                self.by_binding.insert((file, slot.region.guest_memfd_offset), id);
            }
        }
        old
    }

    /// All slots, by number.
    pub fn iter(&self) -> impl Iterator<Item = &Memslot> {
        let shelves = self.spaces.values().flat_map(|space| space.shelves.iter().flatten());
        shelves.flat_map(|shelf| shelf.iter().flatten())
    }
}

impl Slots for SlotRecord {
    fn slot(&self, id: SlotId) -> Option<Memslot> {
        self.get(id).copied()
    }

    fn overlapping(&self, range: Range, id: SlotId) -> Option<(SlotId, Range)> {
        // No two overlap: if any reaches into the range, it is the last that begins before its end.
        let last = self.spaces.get(&address_space(id))?.last_before(range.end, Some(id))?;
        last.1.overlaps(&range).then_some(last)
    }

    fn bound(&self, file: FileId, part: Range) -> Option<SlotId> {
        let (_, id) = self.by_binding.range((file, 0)..(file, part.end)).next_back()?;
        let region = self.get(*id)?.region;
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
    fn no_byte_of_a_guest_memfd_is_bound_twice() {
        let file = |inode| FileId { device: 1, inode };
        let bound = |id, offset, size| {
            let mut slot = slot(id, u64::from(id) << 32, size);
            slot.region.guest_memfd_offset = offset;
            slot
        };
        let mut record = SlotRecord::default();
        record.replace(&bound(1, 0x1000, 0x2000), Some(file(7)));
        record.replace(&bound(2, 0x3000, 0x1000), Some(file(7)));
        record.replace(&bound(3, 0, 0x1000), Some(file(8)));
        let holder = |record: &SlotRecord, inode, start, end| record.bound(file(inode), Range { start, end });
        assert_eq!(holder(&record, 7, 0, 0x1000), None);
        assert_eq!(holder(&record, 7, 0, 0x1001), Some(1));
        assert_eq!(holder(&record, 7, 0x2000, 0x8000), Some(2));
        assert_eq!(holder(&record, 7, 0x4000, 0x8000), None);
        assert_eq!(holder(&record, 8, 0, 0x8000), Some(3));
        assert_eq!(holder(&record, 9, 0, 0x8000), None);
        record.replace(&slot(2, 0, 0), None);
        assert_eq!(holder(&record, 7, 0x3000, 0x4000), None);
        record.replace(&bound(1, 0x5000, 0x1000), Some(file(7)));
        assert_eq!(holder(&record, 7, 0x1000, 0x3000), None);
        record.replace(&bound(4, 0, 0x4000), Some(file(7)));
        assert_eq!(holder(&record, 7, 0x1000, 0x3000), Some(4), "what was bound before does not hide it");
    }

    #[test]
    fn a_late_note_of_a_deletion_leaves_another_s_binding() {
        let file = FileId { device: 1, inode: 7 };
        let mut record = SlotRecord::default();
        record.replace(&slot(1, 0, 0x1000), Some(file));
        record.replace(&slot(2, 0x8000, 0x1000), Some(file));
        record.replace(&slot(1, 0, 0), None);
        assert_eq!(record.bound(file, Range { start: 0, end: 0x1000 }), Some(2));
    }

    #[test]
    fn numbers_may_be_far_apart() {
        let mut record = SlotRecord::default();
        for (id, gpa) in [(0xffff, 0x1000), (0, 0x2000), (0x1_8000, 0x1000), (0x7ffb, 0x3000)] {
            record.replace(&slot(id, gpa, 0x1000), None);
        }
        assert_eq!(record.iter().map(Memslot::id).collect::<Vec<_>>(), [0, 0x7ffb, 0xffff, 0x1_8000]);
        assert_eq!(record.get(0xffff).unwrap().region.gpa, 0x1000);
        assert!(record.get(0xfffe).is_none());
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
