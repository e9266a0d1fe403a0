//! Which guest frames are private (`KVM_SET_MEMORY_ATTRIBUTES`).
//!
//! KVM keeps an entry for each private frame; the model keeps runs, since a test may make a whole terabyte private. Both know
//! each frame exactly. Large frames of both kinds are noted in the slots ([`Lpage`]) from here. Nothing
//! here zaps or takes the MMU lock: between [`Attributes::set`] and [`Attributes::recompute_mixed`] the caller keeps others
//! from mapping.
//!
//! [`Lpage`]: crate::memslot::Lpage

use std::collections::BTreeMap;

use crate::errno::{Errno, Result};
use crate::memslot::Memslot;
use crate::mistake::{Mistake, mistaken};
use crate::sync::sharded::{ShardedLock, ShardedLockReadGuard};
use crate::units::{Gfn, GfnRange, Level, PAGE_SIZE, Privacy};

/// `KVM_MEMORY_ATTRIBUTE_PRIVATE`.
pub const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;

/// What the ioctl refuses, of a VM whose frames may have the attributes `supported`.
pub fn check(supported: u64, address: u64, size: u64, attributes: u64, flags: u64) -> Result<()> {
    let is_known = flags == 0 && attributes & !supported == 0;
    let is_range = size != 0 && address.checked_add(size).is_some();
    let is_whole = size % PAGE_SIZE == 0 || mistaken(Mistake::AttributesMayEndWithinAPage);
    let is_aligned = address % PAGE_SIZE == 0 && is_whole;
    if is_known && is_range && is_aligned { Ok(()) } else { Err(Errno::EINVAL) }
}

/// The levels of large frames, which may be mixed.
const LARGE: [Level; 2] = [Level::HUGE, Level::GIGANTIC];

/// From a key up to its value. They neither touch nor are empty.
type Runs = BTreeMap<u64, u64>;

/// Which guest frames are private.
#[derive(Default)]
pub struct Attributes {
    /// Private frames. Sharded, since each fault reads it.
    private: ShardedLock<Runs>,
}

impl Attributes {
    /// All shared.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a frame is.
    pub fn privacy(&self, gfn: Gfn) -> Privacy {
        privacy(&self.runs(), gfn)
    }

    /// Whether all of a range is of one kind.
    pub fn is_uniform(&self, range: GfnRange, privacy: Privacy) -> bool {
        let runs = self.runs();
        range.is_empty() || self::privacy(&runs, range.start) == privacy && !changes_within(&runs, range)
    }

    /// Makes all of a range of one kind.
    pub fn set(&self, range: GfnRange, privacy: Privacy) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start.0, range.end.0);
        let mut runs = self.private.write();
        let touched = runs.range(..=end).rev().take_while(|(_, run_end)| **run_end >= start);
        let touched: Vec<(u64, u64)> = touched.map(|(start, end)| (*start, *end)).collect();
        for (run_start, run_end) in touched {
            runs.remove(&run_start);
            if privacy == Privacy::Private {
                (start, end) = (start.min(run_start), end.max(run_end));
                continue;
            }
            let left = (run_start, run_end.min(start));
            let right = (run_start.max(end), run_end);
            runs.extend([left, right].into_iter().filter(|(start, end)| start < end));
        }
        if privacy == Privacy::Private {
            runs.insert(start, end);
        }
    }

    /// Notes which large frames in and around a part of a slot, just set, have pages of both kinds
    /// (`kvm_arch_post_set_memory_attributes`).
    pub fn recompute_mixed(&self, slot: &Memslot, part: GfnRange) {
        let runs = self.runs();
        for level in LARGE {
            // What lies within has just been made of one kind.
            slot.lpage.clear_mixed(part, level);
            let head = (part.start, Mistake::AMixedFrameAtTheHeadIsForgotten);
            let tail = (Gfn(part.end.0 - 1), Mistake::AMixedFrameAtTheTailIsForgotten);
            for (gfn, forgetting) in [head, tail] {
                let frame = GfnRange::of_page(gfn, level);
                if slot.range().covers(frame) && !mistaken(forgetting) {
                    slot.lpage.set_mixed(frame.start, level, changes_within(&runs, frame));
                }
            }
        }
    }

    /// The same for all of a slot that is new at its place (`kvm_mmu_init_memslot_memory_attributes`).
    pub fn compute_mixed(&self, slot: &Memslot) {
        let runs = self.runs();
        for level in LARGE {
            for frame in mixed_frames(&runs, slot.range(), level) {
                slot.lpage.set_mixed(frame, level, true);
            }
        }
    }

    /// Whether a slot knows its mixed frames, those and no others.
    pub fn check_mixed(&self, slot: &Memslot) -> std::result::Result<(), String> {
        let runs = self.runs();
        for level in LARGE {
            let (noted, actual) = (slot.lpage.mixed_frames(level), mixed_frames(&runs, slot.range(), level));
            if noted != actual {
                return Err(format!(
                    "{slot:?}: frames of {level:?} noted as mixed {noted:x?}, mixed {actual:x?}"
                ));
            }
        }
        Ok(())
    }

    /// The private frames, in runs that do not touch.
    pub fn private_runs(&self) -> Vec<GfnRange> {
        self.runs().iter().map(|(start, end)| GfnRange { start: Gfn(*start), end: Gfn(*end) }).collect()
    }

    fn runs(&self) -> ShardedLockReadGuard<'_, Runs> {
        self.private.read()
    }
}

fn privacy(runs: &Runs, gfn: Gfn) -> Privacy {
    match runs.range(..=gfn.0).next_back() {
        Some((_, end)) if gfn.0 < *end => Privacy::Private,
        _ => Privacy::Shared,
    }
}

/// The first frame after this one that is of the other kind.
fn next_change(runs: &Runs, gfn: Gfn) -> Option<Gfn> {
    match runs.range(..=gfn.0).next_back() {
        Some((_, end)) if gfn.0 < *end => Some(Gfn(*end)),
        _ => runs.range(gfn.0..).next().map(|(start, _)| Gfn(*start)),
    }
}

/// The first frames of those large ones that lie within `range` and have frames of both kinds.
fn mixed_frames(runs: &Runs, range: GfnRange, level: Level) -> Vec<Gfn> {
    let mut mixed = Vec::new();
    let mut from = range.start;
    while let Some(change) = next_change(runs, from).filter(|change| range.contains(*change)) {
        let frame = GfnRange::of_page(change, level);
        if change == frame.start {
            from = change;
            continue;
        }
        if range.covers(frame) {
            mixed.push(frame.start);
        }
        // Further changes within the frame say nothing new, and one at its end is not within the next.
        from = frame.end;
    }
    mixed
}

/// Whether a range has frames of both kinds.
fn changes_within(runs: &Runs, range: GfnRange) -> bool {
    next_change(runs, range.start).is_some_and(|change| change < range.end)
}

#[cfg(all(test, not(loom)))]
mod tests;
