//! What the VM is told and asked, and what vCPUs do: accesses of the guest's, and pre-faults.

use super::{Picture, WINDOW, WINDOW_FRAMES};
use crate::operation::{FRAME, Operation, PAGE};

const SLOT_ZAP_ALL: u64 = 1 << 7;
/// Capabilities whose answer is of the model's concern.
const CAPABILITIES: [u32; 9] = [10, 81, 118, 231, 232, 233, 234, 236, 244];

impl Picture {
    pub(super) fn quirk(&mut self) {
        self.push(Operation::DisableQuirks { quirks: SLOT_ZAP_ALL });
    }

    pub(super) fn capability(&mut self) {
        let cap = CAPABILITIES[self.rng.usize(..CAPABILITIES.len())];
        self.push(Operation::CheckExtension { cap });
    }

    pub(super) fn smm(&mut self) {
        if self.abilities.has_smm && !self.is_protected {
            let vcpu = self.vcpu();
            self.is_in_smm[vcpu] = !self.is_in_smm[vcpu];
            self.push(Operation::SetSmm { vcpu, is_in_smm: self.is_in_smm[vcpu] });
        }
    }

    /// Mostly the first.
    fn vcpu(&mut self) -> usize {
        usize::from(self.one_in(4))
    }

    /// An address of interest to the guest.
    pub(super) fn address(&mut self) -> u64 {
        let recent = self.recent.clone();
        let slots = self.slots.clone();
        let gpa = match self.rng.u8(..8) {
            0..3 if !recent.is_empty() => self.pick(&recent).unwrap_or(WINDOW),
            7 if self.one_in(4) => WINDOW + self.rng.u64(..(WINDOW_FRAMES + 1) * FRAME / PAGE) * PAGE,
            _ => match self.pick(&slots) {
                Some(slot) => self.place(slot.gpa, slot.size),
                None => WINDOW,
            },
        };
        let gpa = gpa & !(PAGE - 1);
        if self.recent.len() == 6 {
            self.recent.remove(0);
        }
        self.recent.push(gpa);
        gpa
    }

    pub(super) fn touch(&mut self) {
        let vcpu = self.vcpu();
        let gpa = self.address();
        let word = self.rng.u32(1..);
        let operation = match self.rng.u8(..64) {
            0 => Operation::GuestInterrupted { vcpu, gpa },
            1..32 => Operation::GuestRead { vcpu, gpa },
            _ => Operation::GuestWrite { vcpu, gpa, word },
        };
        self.push(operation);
    }

    pub(super) fn pre_fault(&mut self) {
        if !self.abilities.has_pre_fault && !self.one_in(10) {
            return;
        }
        let vcpu = self.vcpu();
        let mut gpa = self.address();
        let slots = self.slots.clone();
        let mut size = match self.rng.u8(..8) {
            0 => FRAME,
            1 => self.pages(1100),
            2 => self.pages(4),
            3 => FRAME - gpa % FRAME,
            4 => match self.pick(&slots) {
                Some(slot) => {
                    gpa = slot.gpa & !(PAGE - 1);
                    slot.size & !(PAGE - 1)
                }
                None => FRAME,
            },
            _ => PAGE,
        };
        if self.abilities.has_nested && self.one_in(12) {
            let has_tables = self.one_in(4);
            return self.push(Operation::PreFaultNested { vcpu, has_tables, gpa, size });
        }
        let mut flags = 0;
        if self.one_in(24) {
            match self.rng.u8(..5) {
                0 => flags = 1 << self.rng.u32(..64),
                1 => gpa += 1 << self.rng.u32(..12),
                2 => size += 1 << self.rng.u32(..12),
                3 => size = 0,
                _ => size = 0u64.wrapping_sub(gpa),
            }
        }
        self.push(Operation::PreFault { vcpu, gpa, size, flags });
    }
}
