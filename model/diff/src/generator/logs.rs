//! Dirty logs: of slots that are logged, and of some that are not.

use super::{MEM_LOG_DIRTY, Picture, SLOTS};
use crate::operation::{FRAME, Operation, PAGE};

impl Picture {
    pub(super) fn dirty_log(&mut self) {
        let logged: Vec<u32> = self
            .slots
            .iter()
            .filter(|slot| slot.flags & MEM_LOG_DIRTY != 0)
            .map(|slot| slot.number)
            .collect();
        let slot = self.pick(&logged).unwrap_or(self.rng.u32(..SLOTS));
        match self.rng.u8(..8) {
            0 => {
                let how = self.pick(&[0, 1, 1, 3, 3, 2, 4]).unwrap_or(0);
                self.push(Operation::ProtectDirtyLog { how });
            }
            1..4 => self.clear_dirty_log(slot),
            4..6 => self.push(Operation::GetDirtyLog { slot }),
            _ => self.read_log_between_writes(slot),
        }
    }

    /// What was written before the log was read is written again, which the next log has to have.
    fn read_log_between_writes(&mut self, number: u32) {
        let logged = self.slots.iter().find(|slot| slot.number == number).copied();
        let gpa = logged.map(|slot| self.place(slot.gpa, slot.size) & !(PAGE - 1));
        for _ in 0..2 {
            if let Some(gpa) = gpa.filter(|gpa| *gpa < 1 << 31) {
                let word = self.rng.u32(1..);
                self.push(Operation::GuestWrite { vcpu: 0, gpa, word });
            }
            self.push(Operation::GetDirtyLog { slot: number });
        }
    }

    fn clear_dirty_log(&mut self, slot: u32) {
        const WORD: u64 = u64::BITS as u64;
        let had = self.slots.iter().find(|other| other.number == slot).map_or(FRAME, |slot| slot.size);
        let first_page = match self.rng.u8(..8) {
            0 => self.rng.u64(..had / PAGE + 2),
            1..4 => self.rng.u64(..had / PAGE / WORD + 1) * WORD,
            _ => 0,
        };
        let rest = (had / PAGE).saturating_sub(first_page);
        let pages = match self.rng.u8(..8) {
            0 => self.rng.u64(..2 * FRAME / PAGE),
            1..3 => WORD,
            3 => rest + 1,
            _ => rest,
        };
        let bits = match self.rng.u8(..4) {
            0 => self.rng.u64(..),
            1 => 1 << self.rng.u32(..u64::BITS),
            _ => u64::MAX,
        };
        let pages = u32::try_from(pages).unwrap_or(0);
        self.push(Operation::ClearDirtyLog { slot, first_page, pages, bits });
    }
}
