//! Which of a slot's frames may be mapped with large pages (`kvm_lpage_info`).
//!
//! What the slot's place forbids never changes and is worked out, not stored. What comes and goes is stored: frames in which
//! something is write-protected by small pages, counted, and frames of mixed attributes. Nothing here knows the attributes,
//! or what the host has mapped.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::sparse::Sparse;
use crate::mistake::{Mistake, mistaken};
use crate::units::{Gfn, GfnRange, Hva, Level};

/// `KVM_LPAGE_MIXED_FLAG`; below it is the count.
const MIXED: u64 = 1 << 31;

/// What forbids large pages in one slot.
pub struct Lpage {
    huge: Frames,
    gigantic: Frames,
}

/// The frames of one level that the slot has something of.
struct Frames {
    level: Level,
    /// The number of the first.
    first: u64,
    /// The slot begins within the first.
    begins_within: bool,
    /// It ends within the last.
    ends_within: bool,
    /// Guest and host addresses do not lie alike in their frames.
    is_askew: bool,
    marks: Sparse,
}

impl Lpage {
    /// Of a slot of so many pages at `base`, whose memory is at `hva`.
    pub fn new(base: Gfn, pages: u64, hva: Hva) -> Self {
        let of = |level| Frames::new(level, GfnRange::new(base, pages), hva);
        Lpage { huge: of(Level::HUGE), gigantic: of(Level::GIGANTIC) }
    }

    /// Whether a frame may be mapped with a page of this level, as far as the slot goes.
    pub fn is_allowed(&self, gfn: Gfn, level: Level) -> bool {
        self.frames(level).is_none_or(|frames| frames.is_allowed(gfn))
    }

    /// Forbids the page of this level around a frame; counted (`kvm_mmu_gfn_disallow_lpage`).
    pub fn disallow(&self, gfn: Gfn, level: Level) {
        if let Some(frames) = self.frames(level) {
            frames.marks.number(frames.index(gfn)).fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Takes one [`disallow`](Lpage::disallow) back.
    pub fn allow(&self, gfn: Gfn, level: Level) {
        if let Some(frames) = self.frames(level) {
            let before = frames.marks.number(frames.index(gfn)).fetch_sub(1, Ordering::AcqRel);
            assert_ne!(before & !MIXED, 0, "allowed {gfn:?} at {level:?} once too often");
        }
    }

    /// Whether some pages of the frame are private and some shared.
    pub fn mixed(&self, gfn: Gfn, level: Level) -> bool {
        self.frames(level).is_some_and(|frames| frames.marks.get(frames.index(gfn)) & MIXED != 0)
    }

    /// Notes whether some pages of the frame are private and some shared.
    pub fn set_mixed(&self, gfn: Gfn, level: Level, is_mixed: bool) {
        let Some(frames) = self.frames(level) else { return };
        let index = frames.index(gfn);
        if is_mixed {
            frames.marks.number(index).fetch_or(MIXED, Ordering::AcqRel);
        } else if let Some(marks) = frames.marks.existing(index) {
            marks.fetch_and(!MIXED, Ordering::AcqRel);
        }
    }

    /// Notes that no frame of this level that has something of `range` is mixed.
    pub fn clear_mixed(&self, range: GfnRange, level: Level) {
        let Some(frames) = self.frames(level).filter(|_| !range.is_empty()) else { return };
        let indices = frames.index(range.start)..frames.index(Gfn(range.end.0 - 1)) + 1;
        for marks in frames.marked(indices) {
            marks.fetch_and(!MIXED, Ordering::AcqRel);
        }
    }

    /// The first frames of those large ones that are noted as mixed.
    pub fn mixed_frames(&self, level: Level) -> Vec<Gfn> {
        let Some(frames) = self.frames(level) else { return Vec::new() };
        let all = frames.marks.existing_in(0..frames.marks.len());
        let mixed = all.filter(|(_, marks)| marks.load(Ordering::Acquire) & MIXED != 0);
        mixed.map(|(index, _)| Gfn((frames.first + index) * level.pages())).collect()
    }

    fn frames(&self, level: Level) -> Option<&Frames> {
        match level {
            Level::SMALL => None,
            Level::HUGE => Some(&self.huge),
            _ => Some(&self.gigantic),
        }
    }
}

impl Frames {
    fn new(level: Level, range: GfnRange, hva: Hva) -> Self {
        let within = level.pages() - 1;
        let first = range.start.0 / level.pages();
        let last = (range.end.0 - 1) / level.pages();
        Frames {
            level,
            first,
            begins_within: range.start.0 & within != 0 && !mistaken(Mistake::ASlotMayBeginWithinAHugePage),
            ends_within: range.end.0 & within != 0,
            is_askew: (range.start.0 ^ hva.page()) & within != 0
                && !mistaken(Mistake::AddressesNeedNotLieAlike),
            marks: Sparse::new(last - first + 1),
        }
    }

    fn index(&self, gfn: Gfn) -> u64 {
        gfn.0 / self.level.pages() - self.first
    }

    fn is_allowed(&self, gfn: Gfn) -> bool {
        let index = self.index(gfn);
        let is_cut = index == 0 && self.begins_within || index + 1 == self.marks.len() && self.ends_within;
        !self.is_askew && !is_cut && self.marks.get(index) == 0
    }

    fn marked(&self, indices: Range<u64>) -> impl Iterator<Item = &std::sync::atomic::AtomicU64> {
        self.marks.existing_in(indices).map(|(_, marks)| marks)
    }
}
