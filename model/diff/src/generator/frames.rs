//! Sequences about one huge frame, in each of which a rule of the kernel's would be missed if it were not there.
//!
//! Random operations alone hardly ever come to these: a frame has to be huge for the process, lie right in its slot, be touched
//! and changed, in this order.

use super::{MEM_LOG_DIRTY, MEM_READONLY, PRIVATE, Picture, Slot};
use crate::operation::{Advice, FRAME, Operation, PAGE};

impl Picture {
    /// A frame that a slot could map with a huge page, and the process does. Most often there is none.
    fn huge_frame(&mut self) -> Option<(Slot, u64)> {
        let whole = |slot: &Slot| (slot.gpa.next_multiple_of(FRAME), (slot.gpa + slot.size) & !(FRAME - 1));
        let is_meant = |slot: &&Slot| {
            let (first, end) = whole(slot);
            let is_memory = slot.is_within_an_area();
            is_memory && slot.gpa % FRAME == slot.hva % FRAME && first < end && slot.flags & MEM_READONLY == 0
        };
        let slots: Vec<Slot> = self.slots.iter().filter(is_meant).copied().collect();
        let slot = self.pick(&slots)?;
        let (first, end) = whole(&slot);
        let frame = first + self.rng.u64(..(end - first) / FRAME) * FRAME;
        let at = slot.hva + (frame - slot.gpa);
        let word = self.rng.u32(1..);
        self.push(Operation::Store { at, word });
        if self.abilities.has_thp && !self.is_of_file(at) {
            self.push(Operation::Advise { at, size: FRAME, advice: Advice::Collapse });
        }
        Some((slot, frame))
    }

    /// A slot goes and comes back, with what it had of attributes.
    pub(super) fn set_again(&mut self) {
        let Some((slot, frame)) = self.huge_frame() else { return };
        if self.is_protected {
            let address = self.place(frame, FRAME);
            self.push(Operation::SetAttributes { address, size: PAGE, attributes: PRIVATE, flags: 0 });
        }
        self.set(Slot { size: 0, ..slot });
        self.set(slot);
        let gpa = self.place(frame, FRAME);
        self.push(Operation::GuestRead { vcpu: 0, gpa });
    }

    /// A slot is logged from one write to the next.
    pub(super) fn log_for_a_while(&mut self) {
        let Some((slot, frame)) = self.huge_frame() else { return };
        let gpa = self.place(frame, FRAME);
        let word = self.rng.u32(1..);
        for flags in [slot.flags & !MEM_LOG_DIRTY, slot.flags | MEM_LOG_DIRTY, slot.flags & !MEM_LOG_DIRTY] {
            self.set(Slot { flags, ..slot });
            self.push(Operation::GuestWrite { vcpu: 0, gpa, word });
        }
    }

    /// A page and its neighbour in another huge frame become private, and the rest of the one frame, all shared, is read.
    pub(super) fn convert_across(&mut self) -> bool {
        let Some((_, frame)) = self.huge_frame() else { return false };
        let edge = if self.rng.bool() { frame } else { frame + FRAME };
        let around = (frame - PAGE, FRAME + 2 * PAGE, 0);
        for (address, size, attributes) in [around, (edge - PAGE, 2 * PAGE, PRIVATE)] {
            self.push(Operation::SetAttributes { address, size, attributes, flags: 0 });
        }
        self.push(Operation::GuestRead { vcpu: 0, gpa: frame + FRAME / 2 });
        true
    }
}
