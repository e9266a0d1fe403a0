//! What the process does to its memory, which is what a guest's memory is made of.
//!
//! Mappings come and go in few places, and what is done is done where huge pages begin and end, or where the guest was lately.
//! Nothing here knows of slots.

use super::{Mapping, Picture};
use crate::operation::{AREA_SIZE, AREAS, Advice, Backing, FRAME, Operation, PAGE, Protection, area_start};

impl Picture {
    pub(super) fn map(&mut self) {
        let area = self.rng.usize(..AREAS);
        let backing = self.backing();
        let is_huge = matches!(backing, Backing::HugetlbPrivate | Backing::HugetlbShared);
        let offset = if is_huge { 0 } else { self.edge() };
        let most = AREA_SIZE - offset;
        let size = match self.rng.u8(..4) {
            0 if !is_huge => self.pages(most / PAGE),
            1 if !is_huge => self.pages(16),
            _ => (1 + self.rng.u64(..3)) * FRAME,
        };
        let start = area_start(area) + offset;
        let size = size.min(most);
        self.mappings[area] = Some(Mapping { start, size, backing });
        self.push(Operation::Map { at: start, size, backing });
        if self.abilities.has_thp && backing == Backing::Anonymous && !self.one_in(3) {
            let advice = if self.one_in(4) { Advice::NoHugePage } else { Advice::HugePage };
            self.push(Operation::Advise { at: start, size, advice });
        }
    }

    fn backing(&mut self) -> Backing {
        let mappable: Vec<usize> =
            (0..self.files.len()).filter(|number| self.files[*number].flags & 1 != 0).collect();
        match self.rng.u8(..16) {
            0..6 => Backing::Anonymous,
            6 => Backing::AnonymousShared,
            7..9 => Backing::MemfdShared,
            9 => Backing::MemfdPrivate,
            10..12 => Backing::HugetlbPrivate,
            12..14 => Backing::HugetlbShared,
            _ => match self.pick(&mappable) {
                Some(file) => Backing::GuestMemfd { file, offset: 0 },
                None => Backing::Anonymous,
            },
        }
    }

    pub(super) fn mapping(&mut self) -> Option<Mapping> {
        let had: Vec<Mapping> = self.mappings.iter().copied().flatten().collect();
        self.pick(&had)
    }

    /// A part of a mapping: a page, a huge frame or more of it.
    fn part(&mut self) -> Option<(u64, u64)> {
        let mapping = self.mapping()?;
        let end = mapping.start + mapping.size;
        let is_huge = matches!(mapping.backing, Backing::HugetlbPrivate | Backing::HugetlbShared);
        let at = match self.recent_hva(mapping).filter(|_| self.rng.bool()) {
            Some(at) => at,
            None => self.place(mapping.start, mapping.size),
        };
        let frame_start = at & !(FRAME - 1);
        let (at, size) = match self.rng.u8(..8) {
            0 => (mapping.start, mapping.size),
            1 | 2 => (frame_start.max(mapping.start), FRAME),
            3 => (at, self.pages(600)),
            _ if is_huge => (frame_start, FRAME),
            _ => (at, PAGE),
        };
        let size = size.min(end.saturating_sub(at));
        (size > 0).then_some((at, size))
    }

    /// Where the process has what the guest touched lately.
    fn recent_hva(&mut self, mapping: Mapping) -> Option<u64> {
        let recent = self.recent.clone();
        let gpa = self.pick(&recent)?;
        let slot = self.slots.iter().find(|slot| slot.gpa <= gpa && gpa < slot.gpa + slot.size)?;
        let hva = (slot.hva + (gpa - slot.gpa)) & !(PAGE - 1);
        (mapping.start <= hva && hva < mapping.start + mapping.size).then_some(hva)
    }

    pub(super) fn process_access(&mut self) {
        let Some((at, _)) = self.part() else { return };
        let word = self.rng.u32(1..);
        let is_store = self.rng.bool();
        self.push(if is_store { Operation::Store { at, word } } else { Operation::Load { at } });
    }

    pub(super) fn advise(&mut self) {
        let Some((at, size)) = self.part() else { return };
        let advice = match self.rng.u8(..34) {
            0..8 => Advice::DontNeed,
            8..10 => Advice::Remove,
            10..14 => Advice::PopulateRead,
            14..22 => Advice::PopulateWrite,
            22..26 => Advice::HugePage,
            26..28 => Advice::NoHugePage,
            28 => Advice::DontFork,
            29 => Advice::DoFork,
            _ => Advice::Collapse,
        };
        let is_of_thp = matches!(advice, Advice::HugePage | Advice::NoHugePage | Advice::Collapse);
        if is_of_thp && !self.abilities.has_thp {
            return;
        }
        // Huge pages of files by MADV_COLLAPSE are not modelled.
        if advice == Advice::Collapse && self.is_of_file(at) {
            return;
        }
        self.push(Operation::Advise { at, size, advice });
    }

    pub(super) fn is_of_file(&self, at: u64) -> bool {
        let mapping = self.mappings.iter().flatten().find(|m| m.start <= at && at < m.start + m.size);
        mapping.is_none_or(|mapping| mapping.backing != Backing::Anonymous)
    }

    pub(super) fn hole(&mut self) {
        let area = self.rng.usize(..AREAS);
        let Some(mapping) = self.mappings[area] else { return };
        let offset = self.place(0, mapping.size);
        // Nothing is allocated beyond a file's end.
        let size = if self.rng.bool() { PAGE } else { FRAME.min(mapping.size - offset) };
        let is_filled = self.one_in(3);
        self.push(if is_filled {
            Operation::Allocate { area, offset, size }
        } else {
            Operation::Punch { area, offset, size }
        });
    }

    pub(super) fn protect(&mut self) {
        if !self.abilities.opens_clean_entries {
            return;
        }
        let Some((at, size)) = self.part() else { return };
        let protection = match self.rng.u8(..6) {
            0 => Protection::None,
            1 | 2 => Protection::Read,
            _ => Protection::ReadWrite,
        };
        self.push(Operation::Protect { at, size, protection });
    }

    pub(super) fn unmap(&mut self) {
        if let Some((at, size)) = self.part() {
            self.push(Operation::Unmap { at, size });
        }
    }

    pub(super) fn child(&mut self) {
        // Who then gets the last huge pages of a pool the model does not know.
        if self.is_scarce {
            return;
        }
        self.push(if self.has_child { Operation::Reap } else { Operation::Fork });
        self.has_child = !self.has_child;
    }
}
