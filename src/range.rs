//! Ranges of guest memory, and sets of them.
//!
//! Everything here is plain arithmetic that cannot overflow: a [`Range`] is made only through checks, so no
//! later code has to ask again. It must never know what a range is for.

use std::collections::VecDeque;

/// The unit of every range: KVM's smallest page, in bytes.
pub const PAGE: u64 = 4096;
/// The stage-2 and transparent huge page of x86-64, in bytes.
pub const HUGE: u64 = 2 << 20;

/// Whether an address or size is a multiple of [`PAGE`].
pub fn is_page_aligned(value: u64) -> bool {
    value % PAGE == 0
}

/// A non-empty range `[start, end)` of guest physical memory, in bytes. It never wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// One past the last byte; above `start`.
    pub end: u64,
}

impl Range {
    /// The range of `size` bytes at `start`, or `None` when that is empty or wraps.
    pub fn new(start: u64, size: u64) -> Option<Self> {
        let end = start.checked_add(size)?;
        (end > start).then_some(Self { start, end })
    }

    /// The range from `start` to `end`, or `None` when that is empty.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        (end > start).then_some(Self { start, end })
    }

    /// Its length in bytes, never 0.
    pub fn size(&self) -> u64 {
        self.end - self.start
    }

    /// What it has in common with `other`.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end.min(other.end))
    }

    /// Whether it has anything in common with `other`.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether all of `other` lies in it.
    pub fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.start, self.end)
    }
}

/// Guest memory of which parts are private.
pub trait PrivateMemory {
    /// The first part of `range` that is private.
    fn first_private(&self, range: Range) -> Option<Range>;

    /// All parts of `range` that are private, in order. So many that `range` should be a chunk, not a guest.
    fn private_parts(&self, range: Range) -> Vec<Range> {
        let next = |part: &Range| self.first_private(Range::between(part.end, range.end)?);
        std::iter::successors(self.first_private(range), next).collect()
    }

    /// How many bytes of `range` are private.
    fn private_size(&self, range: Range) -> u64 {
        let next = |part: &Range| self.first_private(Range::between(part.end, range.end)?);
        std::iter::successors(self.first_private(range), next).map(|part| part.size()).sum()
    }
}

impl PrivateMemory for RangeSet {
    fn first_private(&self, range: Range) -> Option<Range> {
        self.within(range).next()
    }
}

/// A set of addresses, kept as sorted ranges that neither overlap nor touch.
///
/// A queue of work is taken from its front and grows at its back, so the ranges live in a ring: both are
/// O(1), and shrinking a range in place allocates nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: VecDeque<Range>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The empty set, with room for `n` ranges before it has to allocate.
    pub fn with_capacity(n: usize) -> Self {
        Self { ranges: VecDeque::with_capacity(n) }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many separate ranges it holds.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// How many bytes it holds.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(Range::size).sum()
    }

    /// Its ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        self.ranges.iter().copied()
    }

    /// Its lowest range.
    pub fn first(&self) -> Option<Range> {
        self.ranges.front().copied()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Adds `range`, joining it with what it overlaps or touches.
    pub fn insert(&mut self, range: Range) {
        // Work is done mostly in order: what is added then lengthens the last range.
        if let Some(last) = self.ranges.back_mut().filter(|r| r.start <= range.start && range.start <= r.end)
        {
            last.end = last.end.max(range.end);
            return;
        }
        let from = self.ranges.partition_point(|r| r.end < range.start);
        let to = from + self.ranges.iter().skip(from).take_while(|r| r.start <= range.end).count();
        if from == to {
            self.ranges.insert(from, range);
            return;
        }
        self.ranges[from] = Range {
            start: range.start.min(self.ranges[from].start),
            end: range.end.max(self.ranges[to - 1].end),
        };
        self.ranges.drain(from + 1..to);
    }

    /// Takes `range` out and returns how many bytes of it were in the set.
    pub fn remove(&mut self, range: Range) -> u64 {
        // And it is taken from the front: the first range gets shorter.
        let is_front = |r: &&mut Range| range.start <= r.start && r.start < range.end && range.end < r.end;
        if let Some(first) = self.ranges.front_mut().filter(is_front) {
            let removed = range.end - first.start;
            first.start = range.end;
            return removed;
        }
        let mut removed = 0;
        let mut at = self.ranges.partition_point(|r| r.end <= range.start);
        while let Some(found) = self.ranges.get(at).copied() {
            let Some(common) = found.intersect(&range) else { break };
            removed += common.size();
            let before = Range::between(found.start, common.start);
            let after = Range::between(common.end, found.end);
            match (before, after) {
                (Some(before), Some(after)) => {
                    self.ranges[at] = before;
                    self.ranges.insert(at + 1, after);
                    break;
                }
                (Some(rest), None) => {
                    self.ranges[at] = rest;
                    at += 1;
                }
                (None, Some(rest)) => {
                    self.ranges[at] = rest;
                    break;
                }
                (None, None) => {
                    self.ranges.remove(at);
                }
            }
        }
        removed
    }

    /// The parts of `range` that are in the set, in order.
    pub fn within(&self, range: Range) -> impl Iterator<Item = Range> + '_ {
        let from = self.ranges.partition_point(|r| r.end <= range.start);
        self.ranges.iter().skip(from).map_while(move |r| r.intersect(&range))
    }

    /// The parts of `range` that are not in the set, in order.
    pub fn missing(&self, range: Range) -> Vec<Range> {
        let mut gaps = Vec::new();
        let mut at = range.start;
        for held in self.within(range) {
            gaps.extend(Range::between(at, held.start));
            at = held.end;
        }
        gaps.extend(Range::between(at, range.end));
        gaps
    }

    /// How many bytes of `range` are in the set.
    pub fn size_within(&self, range: Range) -> u64 {
        self.within(range).map(|r| r.size()).sum()
    }
}

impl FromIterator<Range> for RangeSet {
    fn from_iter<I: IntoIterator<Item = Range>>(ranges: I) -> Self {
        let mut set = Self::new();
        ranges.into_iter().for_each(|r| set.insert(r));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn r(start: u64, end: u64) -> Range {
        Range::between(start, end).unwrap()
    }

    #[test]
    fn a_range_is_never_empty_and_never_wraps() {
        assert_eq!(Range::new(0, 0), None);
        assert_eq!(Range::new(u64::MAX, 1), None);
        assert_eq!(Range::new(u64::MAX - 1, 1), Range::between(u64::MAX - 1, u64::MAX));
        assert_eq!(Range::between(5, 5), None);
    }

    #[test]
    fn touching_ranges_become_one() {
        let set: RangeSet = [r(0, 2), r(4, 6), r(2, 4)].into_iter().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), [r(0, 6)]);
    }

    /// The set beside the plainest thing that could be right: one flag an address.
    fn naive(set: &RangeSet) -> Vec<bool> {
        let mut flags = vec![false; 64];
        for range in set.iter() {
            flags[range.start as usize..range.end as usize].fill(true);
        }
        flags
    }

    proptest! {
        #[test]
        fn behaves_like_an_array_of_flags(ops in prop::collection::vec((any::<bool>(), 0u64..63, 1u64..16), 1..80)) {
            let mut set = RangeSet::new();
            let mut flags = vec![false; 64];
            for (add, start, size) in ops {
                let range = r(start, (start + size).min(64));
                let held = flags[range.start as usize..range.end as usize].iter().filter(|f| **f).count() as u64;
                prop_assert_eq!(set.size_within(range), held);
                prop_assert_eq!(set.missing(range).iter().map(Range::size).sum::<u64>(), range.size() - held);
                if add {
                    set.insert(range);
                } else {
                    prop_assert_eq!(set.remove(range), held);
                }
                flags[range.start as usize..range.end as usize].fill(add);
                prop_assert_eq!(&naive(&set), &flags);
                let ranges: Vec<_> = set.iter().collect();
                prop_assert!(ranges.windows(2).all(|w| w[0].end < w[1].start), "touching or unsorted: {:?}", ranges);
            }
        }
    }
}
