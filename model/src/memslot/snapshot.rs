//! The slots of one address space at one time.
//!
//! A snapshot never changes, so that a vCPU can look things up while the VMM sets slots. A new one shares nearly all memory
//! with the one that it is made from: there may be 32764 slots, and each is set on its own. That two slots do not overlap is
//! checked before, not here.

use std::sync::Arc;

use super::Memslot;
use crate::units::{Gfn, GfnRange};

/// How many slots are kept together. A new snapshot copies one such group and the list of groups.
const GROUP: usize = 128;

/// The slots of one address space.
#[derive(Clone, Default)]
pub struct Memslots {
    /// By their first frames; no group is empty.
    by_base: Vec<Group>,
    /// By number.
    by_id: Vec<Arc<Vec<Option<Arc<Memslot>>>>>,
}

#[derive(Clone)]
struct Group {
    /// The first frame of the first slot.
    first: Gfn,
    slots: Arc<Vec<(Gfn, Arc<Memslot>)>>,
}

impl Group {
    fn new(slots: Vec<(Gfn, Arc<Memslot>)>) -> Self {
        Group { first: slots[0].0, slots: Arc::new(slots) }
    }
}

impl Memslots {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.by_base.iter().map(|group| group.slots.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_base.is_empty()
    }

    /// The slot that has a frame.
    pub fn find(&self, gfn: Gfn) -> Option<&Arc<Memslot>> {
        let group = &self.by_base[..self.groups_up_to(gfn)].last()?;
        let place = group.slots.partition_point(|(base, _)| *base <= gfn);
        let (_, slot) = &group.slots[place - 1];
        slot.range().contains(gfn).then_some(slot)
    }

    /// The slot of a number.
    pub fn by_id(&self, id: u16) -> Option<&Arc<Memslot>> {
        let id = usize::from(id);
        self.by_id.get(id / GROUP)?[id % GROUP].as_ref()
    }

    /// The slots that have something of a range, in their order.
    pub fn overlapping(&self, range: GfnRange) -> impl Iterator<Item = &Arc<Memslot>> {
        // One that begins before the range can be in no group before the last that does.
        let first = self.groups_up_to(range.start).saturating_sub(1);
        self.by_base[first..]
            .iter()
            .flat_map(|group| group.slots.iter())
            .map(|(_, slot)| slot)
            .take_while(move |slot| slot.base < range.end)
            .filter(move |slot| slot.range().intersection(range).is_some())
    }

    /// All slots, by their first frames.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Memslot>> {
        self.by_base.iter().flat_map(|group| group.slots.iter()).map(|(_, slot)| slot)
    }

    /// With a slot, in place of the one that has its number.
    pub fn with(&self, slot: Arc<Memslot>) -> Memslots {
        let mut new = self.without(slot.id);
        new.number(slot.id, Some(slot.clone()));
        let place = new.groups_up_to(slot.base).saturating_sub(1);
        let mut slots = new.by_base.get(place).map_or_else(Vec::new, |group| group.slots.to_vec());
        slots.insert(slots.partition_point(|(base, _)| *base < slot.base), (slot.base, slot));
        new.replace(place, slots);
        new
    }

    /// Without the slot of a number.
    pub fn without(&self, id: u16) -> Memslots {
        let mut new = self.clone();
        let Some(slot) = self.by_id(id) else { return new };
        new.number(id, None);
        let place = new.groups_up_to(slot.base) - 1;
        let mut slots = new.by_base[place].slots.to_vec();
        slots.retain(|(_, other)| other.id != id);
        new.replace(place, slots);
        new
    }

    /// Whether slots lie apart, in order, and are found by their numbers.
    pub fn check(&self) -> Result<(), String> {
        let slots: Vec<&Arc<Memslot>> = self.iter().collect();
        if let Some(pair) = slots.windows(2).find(|pair| pair[0].range().end > pair[1].base) {
            return Err(format!("{:?} and {:?} overlap", pair[0], pair[1]));
        }
        let is_lost =
            |slot: &&&Arc<Memslot>| self.by_id(slot.id).is_none_or(|found| !Arc::ptr_eq(found, slot));
        if let Some(lost) = slots.iter().find(is_lost) {
            return Err(format!("{lost:?} is not what its number stands for"));
        }
        let numbered = self.by_id.iter().flat_map(|group| group.iter().flatten()).count();
        if numbered == slots.len() {
            Ok(())
        } else {
            Err(format!("{numbered} numbers for {} slots", slots.len()))
        }
    }

    /// How many groups begin at or before a frame.
    fn groups_up_to(&self, gfn: Gfn) -> usize {
        self.by_base.partition_point(|group| group.first <= gfn)
    }

    fn number(&mut self, id: u16, slot: Option<Arc<Memslot>>) {
        let id = usize::from(id);
        while self.by_id.len() <= id / GROUP {
            self.by_id.push(Arc::new(vec![None; GROUP]));
        }
        Arc::make_mut(&mut self.by_id[id / GROUP])[id % GROUP] = slot;
    }

    /// Puts these slots in place of a group: two groups if they are many, one with the next if they are few.
    fn replace(&mut self, place: usize, mut slots: Vec<(Gfn, Arc<Memslot>)>) {
        let mut replaced = place..(place + 1).min(self.by_base.len());
        let next = self.by_base.get(replaced.end);
        if let Some(next) = next.filter(|next| slots.len() + next.slots.len() <= GROUP / 2) {
            slots.extend_from_slice(&next.slots);
            replaced.end += 1;
        }
        let upper = slots.split_off(if slots.len() > GROUP { GROUP / 2 } else { slots.len() });
        let groups = [slots, upper].into_iter().filter(|slots| !slots.is_empty()).map(Group::new);
        self.by_base.splice(replaced, groups);
    }
}
