//! What has been populated, and what of it has been lost since, as far as the library can know.
//!
//! An upper bound: the kernel drops mappings for reasons of its own (KSM, fork, balancing, swap) that no
//! bookkeeping in user space sees. It covers address space 0.

use crate::kvm::Access;
use crate::range::{HUGE, Range, RangeSet};

/// The two page tables between a guest and its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The VMM's own.
    Host,
    /// KVM's for the guest.
    Stage2,
}

/// Why mappings were lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Loss {
    /// Nothing was.
    #[default]
    Nothing = 0,
    /// The slot itself was deleted, moved or replaced.
    SlotChanged = 1,
    /// Some slot was deleted or moved, and the slot-zap-all quirk is on.
    ZapAll = 2,
    /// The VMM discarded the memory.
    Discarded = 3,
    /// Dirty logging was turned on: first writes fault again.
    DirtyLogging = 4,
    /// The memory was made private or shared.
    Converted = 5,
}

/// What is populated.
#[derive(Debug, Default)]
pub struct Coverage {
    host: Prepared,
    stage2: Prepared,
    lost: RangeSet,
    last_loss: Loss,
    /// Counts events that may have dropped stage-2 mappings anywhere.
    zaps: u64,
}

/// Memory prepared for reading, and the part of it prepared for writing too.
#[derive(Debug, Default)]
struct Prepared {
    read: RangeSet,
    write: RangeSet,
}

/// How much of a range is populated, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Covered {
    /// In the host's page tables, prepared for at least reading.
    pub host: u64,
    /// In stage 2, prepared for at least reading.
    pub stage2_read: u64,
    /// In stage 2, prepared for writing.
    pub stage2_write: u64,
    /// Was in stage 2 and has been lost since.
    pub lost: u64,
    /// Why, the last time that anything was.
    pub last_loss: Loss,
}

impl Coverage {
    fn table(&mut self, table: Table) -> &mut Prepared {
        match table {
            Table::Host => &mut self.host,
            Table::Stage2 => &mut self.stage2,
        }
    }

    /// How many times mappings anywhere may have been dropped.
    pub fn zaps(&self) -> u64 {
        self.zaps
    }

    /// Something is about to happen that may drop mappings anywhere: what is in hand now cannot be counted on.
    pub fn zap_may_come(&mut self) {
        self.zaps += 1;
    }

    /// `range` has been populated.
    pub fn gained(&mut self, table: Table, access: Access, range: Range) {
        if table == Table::Stage2 && !self.lost.is_empty() {
            self.lost.remove(range);
        }
        let prepared = self.table(table);
        prepared.read.insert(range);
        if access == Access::Write {
            prepared.write.insert(range);
        }
    }

    /// `range` has been discarded or converted. Stage 2 loses the whole of a huge page that a part of was discarded. So does the
    /// record of the host side, though there the rest stays: else a guest's balloon could cut it into as many pieces
    /// as it has pages.
    pub fn discarded(&mut self, range: Range, why: Loss) {
        let start = range.start - range.start % HUGE;
        let end = range.end.checked_next_multiple_of(HUGE).unwrap_or(range.end);
        self.lost(Range { start, end }, why);
    }

    /// `range` has been lost from both tables.
    fn lost(&mut self, range: Range, why: Loss) {
        self.lost_stage2(range, why);
        self.host.read.remove(range);
        self.host.write.remove(range);
    }

    /// `range` is not guest memory any more: there is nothing left that could be lost.
    pub fn forget(&mut self, range: Range) {
        self.lost(range, Loss::SlotChanged);
        self.lost.remove(range);
    }

    /// Every stage-2 mapping is gone.
    pub fn lost_all_stage2(&mut self) {
        let all = Range { start: 0, end: u64::MAX };
        self.lost_stage2(all, Loss::ZapAll);
    }

    /// The stage-2 mappings of `range` are gone.
    pub fn lost_stage2(&mut self, range: Range, why: Loss) {
        let gone: Vec<Range> = self.stage2.read.within(range).collect();
        if gone.is_empty() {
            return;
        }
        gone.into_iter().for_each(|part| self.lost.insert(part));
        self.last_loss = why;
        self.stage2.read.remove(range);
        self.stage2.write.remove(range);
    }

    /// Dirty logging of `range` was turned on: KVM has write-protected it.
    pub fn write_protected(&mut self, range: Range) {
        if self.stage2.write.remove(range) > 0 {
            self.last_loss = Loss::DirtyLogging;
        }
    }

    /// The parts of `range` that `table` lacks for `access`.
    pub fn missing(&self, table: Table, access: Access, range: Range) -> Vec<Range> {
        let prepared = match table {
            Table::Host => &self.host,
            Table::Stage2 => &self.stage2,
        };
        match access {
            Access::Read => prepared.read.missing(range),
            Access::Write => prepared.write.missing(range),
        }
    }

    /// How much of `range` is populated.
    pub fn within(&self, range: Range) -> Covered {
        Covered {
            host: self.host.read.size_within(range),
            stage2_read: self.stage2.read.size_within(range),
            stage2_write: self.stage2.write.size_within(range),
            lost: self.lost.size_within(range),
            last_loss: self.last_loss,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Range = Range { start: 0, end: 0x4000 };
    const B: Range = Range { start: 0x8000, end: 0xa000 };
    const ALL: Range = Range { start: 0, end: 0x10000 };

    fn populated() -> Coverage {
        let mut coverage = Coverage::default();
        for (range, access) in [(A, Access::Write), (B, Access::Read)] {
            coverage.gained(Table::Host, access, range);
            coverage.gained(Table::Stage2, access, range);
        }
        coverage
    }

    #[test]
    fn reading_is_less_than_writing() {
        let coverage = populated();
        let covered = coverage.within(ALL);
        assert_eq!(
            (covered.host, covered.stage2_read, covered.stage2_write, covered.lost),
            (0x6000, 0x6000, 0x4000, 0)
        );
        assert_eq!(coverage.missing(Table::Stage2, Access::Write, B), [B]);
        assert!(coverage.missing(Table::Stage2, Access::Read, B).is_empty());
    }

    #[test]
    fn a_zap_leaves_the_host_side_and_populating_again_mends_the_loss() {
        let mut coverage = populated();
        coverage.lost_all_stage2();
        let covered = coverage.within(ALL);
        assert_eq!((covered.host, covered.stage2_read, covered.lost), (0x6000, 0, 0x6000));
        assert_eq!(covered.last_loss, Loss::ZapAll);
        coverage.gained(Table::Stage2, Access::Write, A);
        assert_eq!(coverage.within(ALL).lost, 0x2000);
    }

    #[test]
    fn dirty_logging_takes_writes_only() {
        let mut coverage = populated();
        coverage.write_protected(A);
        let covered = coverage.within(ALL);
        assert_eq!((covered.stage2_read, covered.stage2_write, covered.lost), (0x6000, 0, 0));
        assert_eq!(covered.last_loss, Loss::DirtyLogging);
    }

    #[test]
    fn a_balloon_cannot_cut_the_record_to_pieces() {
        let mut coverage = Coverage::default();
        let memory = Range { start: 0, end: 8 * HUGE };
        coverage.gained(Table::Host, Access::Write, memory);
        coverage.gained(Table::Stage2, Access::Write, memory);
        // Every other page of every other frame.
        for page in (0..8 * HUGE).step_by(8192).filter(|page| page / HUGE % 2 == 0) {
            coverage.discarded(Range { start: page, end: page + 4096 }, Loss::Discarded);
        }
        for pieces in [coverage.host.read.iter().count(), coverage.stage2.write.iter().count()] {
            assert_eq!(pieces, 4);
        }
        assert_eq!(coverage.within(memory).host, 4 * HUGE);
    }

    #[test]
    fn what_is_no_memory_any_more_is_not_lost() {
        let mut coverage = populated();
        coverage.forget(A);
        assert_eq!(coverage.within(A).lost, 0);
        assert_eq!(coverage.within(A).host, 0);
    }
}
