//! Private memory: guest_memfds and attributes, at the edges of slots, files and huge frames.

use super::{File, MEM_GUEST_MEMFD, PRIVATE, Picture, WINDOW, WINDOW_FRAMES};
use crate::operation::{AREA_SIZE, FRAME, FileReference, LARGEST_SLOT, Operation, PAGE};

impl Picture {
    pub(super) fn file(&mut self) {
        if !self.abilities.has_guest_memfd && !self.one_in(10) {
            return;
        }
        if self.files.is_empty() || self.one_in(4) {
            return self.create_file();
        }
        if self.rng.bool() && self.take_away_what_is_used() {
            return;
        }
        let file = self.rng.usize(..self.files.len());
        let length = self.files[file].size;
        let offset = if self.one_in(12) { self.rng.u64(..2 * FRAME) } else { self.place(0, length) };
        let size = match self.rng.u8(..8) {
            0 => 0,
            1 => FRAME,
            2 => length,
            3 => self.pages(600),
            _ => PAGE,
        };
        let keep_size = !self.one_in(20);
        match self.rng.u8(..8) {
            0 => self.push(Operation::CloseFile { file }),
            1 | 2 => self.push(Operation::AllocateFile { file, offset, size, keep_size }),
            _ => self.push(Operation::PunchFile { file, offset, size, keep_size }),
        }
    }

    /// The guest writes a page of a guest_memfd, which is punched with a neighbour, or closed; and reads it again.
    fn take_away_what_is_used(&mut self) -> bool {
        let with_file = self.slots.iter().filter(|slot| slot.flags & MEM_GUEST_MEMFD != 0).copied();
        let Some(slot) = self.pick(&with_file.collect::<Vec<_>>()) else { return false };
        let FileReference::GuestMemfd(file) = slot.file else { return false };
        let gpa = self.place(slot.gpa, slot.size) & !(PAGE - 1);
        if self.is_protected {
            self.push(Operation::SetAttributes { address: gpa, size: PAGE, attributes: PRIVATE, flags: 0 });
        }
        let word = self.rng.u32(1..);
        self.push(Operation::GuestWrite { vcpu: 0, gpa, word });
        let at = slot.offset.wrapping_add(gpa.wrapping_sub(slot.gpa));
        let offset = if self.rng.bool() { at } else { at.saturating_sub(PAGE) };
        if self.one_in(3) {
            self.push(Operation::CloseFile { file });
        } else {
            self.push(Operation::PunchFile { file, offset, size: 2 * PAGE, keep_size: true });
        }
        self.push(Operation::GuestRead { vcpu: 0, gpa });
        true
    }

    fn create_file(&mut self) {
        let size = match self.rng.u8(..8) {
            0 => self.pages(16),
            1 => self.pages(AREA_SIZE / PAGE),
            2 if self.one_in(2) => self.pick(&[0, 1, PAGE + 1, 1 << 63]).unwrap_or(0),
            _ => (1 + self.rng.u64(..3)) * FRAME,
        };
        let flags = match self.rng.u8(..6) {
            0 => 3,
            1 => 1,
            2 if self.one_in(2) => self.pick(&[2, 4, 8, 1 << 63]).unwrap_or(0),
            3 if !self.is_protected => 3,
            _ => 0,
        };
        self.push(Operation::CreateFile { size, flags });
        // Also what is refused has a number.
        self.files.push(File { size: size.clamp(PAGE, LARGEST_SLOT) & !(PAGE - 1), flags });
    }

    pub(super) fn attributes(&mut self) {
        if !self.is_protected && !self.one_in(12) {
            return;
        }
        if self.one_in(3) && self.convert_across() {
            return;
        }
        let slots = self.slots.clone();
        let Some(slot) = self.pick(&slots) else { return };
        let (address, size) = match self.rng.u8(..8) {
            0 | 1 => (slot.gpa, slot.size),
            2 => (self.place(slot.gpa, slot.size) & !(FRAME - 1), FRAME),
            3 => (WINDOW, WINDOW_FRAMES * FRAME),
            4 | 5 => (self.place(slot.gpa, slot.size), self.pages(1100)),
            _ => (self.address(), PAGE),
        };
        let mut attributes = if self.one_in(3) { 0 } else { PRIVATE };
        let (mut address, mut size, mut flags) = (address & !(PAGE - 1), size & !(PAGE - 1), 0);
        if self.one_in(10) {
            match self.rng.u8(..6) {
                0 => attributes = self.pick(&[1, 2, 4, 15, 1 << 63]).unwrap_or(0),
                1 => flags = 1,
                2 => size = 0,
                3 => address += 1,
                4 => size += 1,
                _ => address = 0u64.wrapping_sub(PAGE),
            }
        }
        self.push(Operation::SetAttributes { address, size, attributes, flags });
        // An address of the guest's has 32 bits.
        if address < 1 << 31 && size < 1 << 31 && self.rng.bool() {
            self.touch_the_edges(address & !(PAGE - 1), size & !(PAGE - 1));
        }
    }

    /// The guest reads around one end of a range, where huge pages end as well.
    fn touch_the_edges(&mut self, start: u64, size: u64) {
        let edge = if self.rng.bool() { start } else { start.wrapping_add(size) };
        for gpa in [edge, edge.wrapping_sub(PAGE)] {
            self.push(Operation::GuestRead { vcpu: 0, gpa });
        }
    }
}
