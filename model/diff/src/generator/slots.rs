//! Memslots: most mean something, some are broken on purpose, in one way each.
//!
//! Nothing here asks whether a slot was taken: the picture has it, and what comes of it is an outcome.

use super::{
    MEM_GUEST_MEMFD, MEM_LOG_DIRTY, MEM_READONLY, Mapping, PRIVATE, Picture, SLOTS, Slot, WINDOW,
    WINDOW_FRAMES,
};
use crate::operation::{Backing, FRAME, FileReference, LARGEST_SLOT, Operation, PAGE};

impl Picture {
    pub(super) fn create_slot(&mut self) {
        let Some(slot) = self.plausible_slot() else { return };
        let slot = match self.rng.u8(..16) {
            0 => self.broken(slot),
            // Of two things that are wrong, which is said?
            1 => {
                let broken = self.broken(slot);
                self.broken(broken)
            }
            _ => slot,
        };
        self.set(slot);
    }

    fn plausible_slot(&mut self) -> Option<Slot> {
        let mapping = self.mapping()?;
        let skip = if self.one_in(4) { self.edge().min(mapping.size - PAGE) } else { 0 };
        let hva = mapping.start + skip;
        let size = match self.rng.u8(..4) {
            0 => self.pages((mapping.size - skip) / PAGE),
            1 if mapping.size - skip > FRAME => FRAME,
            _ => mapping.size - skip,
        };
        let within = if self.one_in(4) { self.edge() } else { hva % FRAME };
        let gpa = WINDOW + self.rng.u64(..WINDOW_FRAMES) * FRAME + within;
        let space = u32::from(self.one_in(if self.is_in_smm.contains(&true) { 2 } else { 10 }));
        let flags = match self.rng.u8(..10) {
            0 | 1 => MEM_LOG_DIRTY,
            2 => MEM_READONLY,
            3 if self.one_in(2) => MEM_LOG_DIRTY | MEM_READONLY,
            _ => 0,
        };
        let number = space << 16 | self.rng.u32(..SLOTS);
        let plain = Slot { number, flags, gpa, size, hva, file: FileReference::Bad, offset: 0 };
        Some(self.with_file(plain, mapping))
    }

    /// The same with a guest_memfd, where that makes sense.
    fn with_file(&mut self, slot: Slot, mapping: Mapping) -> Slot {
        let number = match mapping.backing {
            Backing::GuestMemfd { file, .. } => file,
            _ if self.files.is_empty() || !(self.is_protected || self.one_in(6)) || self.one_in(4) => {
                return slot;
            }
            _ => self.rng.usize(..self.files.len()),
        };
        let file = self.files[number];
        let (size, offset) = match mapping.backing {
            Backing::GuestMemfd { .. } => (slot.size, slot.hva - mapping.start),
            _ if file.size <= slot.size => (file.size, 0),
            _ => (slot.size, self.rng.u64(..=(file.size - slot.size) / PAGE) * PAGE),
        };
        let flags = if self.one_in(8) { slot.flags } else { 0 };
        Slot {
            flags: flags | MEM_GUEST_MEMFD,
            size,
            offset,
            file: FileReference::GuestMemfd(number),
            number: slot.number & 0xffff,
            ..slot
        }
    }

    /// The same with one thing wrong, or nearly so.
    fn broken(&mut self, slot: Slot) -> Slot {
        let mut slot = slot;
        match self.rng.u8(..16) {
            0 => slot.gpa = slot.gpa.wrapping_add(1 << self.rng.u32(..12)),
            1 => slot.size = slot.size.wrapping_add(1 << self.rng.u32(..12)),
            2 => slot.hva = slot.hva.wrapping_add(1 << self.rng.u32(..12)),
            3 => slot.offset = slot.offset.wrapping_add(1 << self.rng.u32(..13)),
            4 => slot.flags ^= 1 << self.rng.u32(..32),
            5 => slot.number = self.pick(&[0x7ffb, 0x7ffc, 0x7fff, 0x8000, 0xffff, 0x2_0000]).unwrap_or(0),
            6 => slot.hva = self.pick(&[1 << 47, (1 << 47) - PAGE, 1 << 56, 1 << 63, 0]).unwrap_or(0),
            7 => slot.gpa = self.pick(&[1 << 40, 1 << 52, 0u64.wrapping_sub(FRAME), 1 << 63]).unwrap_or(0),
            8 => slot.size = self.pick(&[1 << 43, 1 << 44, 0, 1 << 63]).unwrap_or(0),
            9 => slot.offset = self.pick(&[1 << 63, 0u64.wrapping_sub(PAGE), slot.size]).unwrap_or(0),
            10 if self.rng.bool() => slot.file = FileReference::Other,
            10 => slot.file = FileReference::OfAnotherVm,
            11 => slot.file = FileReference::Bad,
            12 => slot.gpa = (1u64 << 40).wrapping_sub(slot.size),
            13 => slot.flags |= MEM_GUEST_MEMFD,
            14 => slot.size = slot.size.saturating_add(PAGE),
            _ => slot.number ^= 1 << 16,
        }
        slot
    }

    pub(super) fn set(&mut self, slot: Slot) {
        let Slot { number, flags, gpa, size, hva, file, offset } = slot;
        // Larger ones than that are refused, and tried for that.
        if size > LARGEST_SLOT && size < 1 << 43 {
            return;
        }
        let is_second = self.abilities.has_region2 && (flags & MEM_GUEST_MEMFD != 0 || self.one_in(6));
        self.push(Operation::SetRegion { slot: number, flags, gpa, size, hva, file, offset, is_second });
        self.slots.retain(|other| other.number != number);
        let is_usable = size > 0 && size <= LARGEST_SLOT && gpa < 1 << 32;
        if is_usable {
            self.slots.push(slot);
        }
        if is_usable && self.is_protected && flags & MEM_GUEST_MEMFD != 0 && self.rng.bool() {
            let address = gpa & !(PAGE - 1);
            let size = size & !(PAGE - 1);
            self.push(Operation::SetAttributes { address, size, attributes: PRIVATE, flags: 0 });
        }
    }

    pub(super) fn change_slot(&mut self) {
        let slots = self.slots.clone();
        let Some(mut slot) = self.pick(&slots) else { return };
        match self.rng.u8(..12) {
            8 | 9 => return self.set_again(),
            10 | 11 => return self.log_for_a_while(),
            0..3 => slot.size = 0,
            3 => slot.gpa = WINDOW + self.rng.u64(..WINDOW_FRAMES) * FRAME + slot.gpa % FRAME,
            4 => slot.gpa = WINDOW + self.rng.u64(..WINDOW_FRAMES) * FRAME + self.edge(),
            5 => slot = self.broken(slot),
            _ => slot.flags ^= MEM_LOG_DIRTY,
        }
        self.set(slot);
    }
}
