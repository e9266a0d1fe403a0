//! What of a guest's memory is private and what is shared, and where a conversion was left unfinished.
//!
//! It is a record: that it says what is true in KVM is the care of whoever changes it, one at a time ([`super::turns`]).

use super::page_set::PageSet;
use crate::range::{PrivateMemory, Range, RangeSet};
use std::sync::PoisonError;

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard};

/// Whether memory is the guest's alone. The numbers are C's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Visibility {
    /// The host sees it.
    #[default]
    Shared = 0,
    /// It does not.
    Private = 1,
}

impl Visibility {
    fn of(is_private: bool) -> Self {
        if is_private { Visibility::Private } else { Visibility::Shared }
    }

    /// The other.
    pub fn other(self) -> Self {
        Self::of(self == Visibility::Shared)
    }
}

impl std::fmt::Display for Visibility {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Visibility::Private { "private" } else { "shared" })
    }
}

/// Guest memory that is of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The memory.
    pub range: Range,
    /// Of which kind.
    pub visibility: Visibility,
}

/// The record; may be used by many threads at once.
#[derive(Debug, Default)]
pub struct VisibilityMap {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    private: PageSet,
    /// What has been converted, but not told of, or not given up on its other side.
    unfinished: PageSet,
    /// Shared memory that is out of sight and was not to be given up.
    kept: PageSet,
    /// What lost its huge page to a conversion beside it, and is to be mapped again.
    torn: PageSet,
    is_told: bool,
}

impl VisibilityMap {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anybody ever said of any memory what it is. Before, all counts as shared, as it does for KVM.
    pub fn is_told(&self) -> bool {
        self.state().is_told
    }

    /// `range` is `visibility` from now on, and finished or not; says how many bytes were not so before.
    pub fn set(&self, range: Range, visibility: Visibility, is_finished: bool) -> u64 {
        let mut state = self.state();
        state.is_told = true;
        state.unfinished.set(range, !is_finished);
        // Not before it is finished: what is put back is kept again.
        if visibility == Visibility::Shared && is_finished {
            state.kept.set(range, false);
        }
        state.private.set(range, visibility == Visibility::Private)
    }

    /// The conversion of `range`, which is of one kind, is finished.
    pub fn finish(&self, range: Range) {
        let mut state = self.state();
        state.unfinished.set(range, false);
        if !state.private.holds(range.start) {
            state.kept.set(range, false);
        }
    }

    /// Whether a conversion of any of `range` was left unfinished.
    pub fn is_unfinished(&self, range: Range) -> bool {
        self.state().unfinished.first(range, true).is_some()
    }

    /// The shared side of `range`, which is private now, is kept as its VMM wishes, or is not.
    pub fn set_kept(&self, range: Range, is_kept: bool) {
        self.state().kept.set(range, is_kept);
    }

    /// Whether all of `page` is out of sight as shared memory, and nothing of it beside `piece` is to stay: because its
    /// VMM wished it so, or does not know yet that it is private.
    pub fn may_be_dropped(&self, page: Range, piece: Range) -> bool {
        let is_held = |part: Option<Range>| {
            let state = self.state();
            part.is_some_and(|part| {
                state.unfinished.first(part, true).is_some() || state.kept.first(part, true).is_some()
            })
        };
        self.is_all(page, Visibility::Private)
            && !is_held(Range::between(page.start, piece.start))
            && !is_held(Range::between(piece.end, page.end))
    }

    /// `range` has lost its huge page to a conversion beside it, or is mapped again.
    pub fn set_torn(&self, range: Range, is_torn: bool) {
        self.state().torn.set(range, is_torn);
    }

    /// Other memory lies behind `range`, or none: nothing of it was kept, nor is anything to be mapped again.
    pub fn forget_memory(&self, range: Range) {
        let mut state = self.state();
        state.torn.set(range, false);
        state.kept.set(range, false);
    }

    /// What of `range` has lost its huge page and was not mapped again.
    pub fn torn(&self, range: Range) -> RangeSet {
        self.state().torn.runs(range).filter(|run| run.is_in).map(|run| run.range).collect()
    }

    /// What the memory at `range`'s start is, and how far that goes on in `range`.
    pub fn run(&self, range: Range) -> Run {
        let run = self.state().private.run(range);
        Run { range: run.range, visibility: Visibility::of(run.is_in) }
    }

    /// The first part of `range` that a conversion has work in: what is not `to`, or is and was left unfinished.
    pub fn first_to_convert(&self, range: Range, to: Visibility) -> Option<(Range, Task)> {
        let state = self.state();
        let differing = state.private.first(range, to == Visibility::Shared);
        let before = Range::between(range.start, differing.map_or(range.end, |part| part.start));
        match before.and_then(|before| state.unfinished.first(before, true)) {
            Some(part) => Some((part, Task::Finish)),
            None => differing.map(|part| (part, Task::Convert)),
        }
    }

    /// Whether all of `range` is `visibility`.
    pub fn is_all(&self, range: Range, visibility: Visibility) -> bool {
        self.run(range) == Run { range, visibility }
    }

    /// Bytes that it takes.
    pub fn footprint(&self) -> usize {
        let state = self.state();
        state.private.footprint()
            + state.unfinished.footprint()
            + state.torn.footprint()
            + state.kept.footprint()
    }
}

impl PrivateMemory for VisibilityMap {
    fn first_private(&self, range: Range) -> Option<Range> {
        self.state().private.first(range, true)
    }
}

/// What there is to do with memory that is to be converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// All of it.
    Convert,
    /// What an earlier conversion has left.
    Finish,
}

/// The widest range of guest memory there can be.
pub const ALL: Range = Range { start: 0, end: super::page_set::END };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::PAGE;
    use proptest::prelude::*;

    fn r(first: u64, end: u64) -> Range {
        Range { start: first * PAGE, end: end * PAGE }
    }

    #[test]
    fn only_what_differs_or_is_unfinished_is_to_be_converted() {
        let map = VisibilityMap::default();
        assert!(!map.is_told());
        assert_eq!(map.set(r(2, 4), Visibility::Private, true), 2 * PAGE);
        assert_eq!(map.set(r(4, 6), Visibility::Private, false), 2 * PAGE);
        assert!(map.is_told());
        let first = |from, end, to| map.first_to_convert(r(from, end), to);
        assert_eq!(first(0, 8, Visibility::Private), Some((r(0, 2), Task::Convert)));
        assert_eq!(first(2, 8, Visibility::Private), Some((r(4, 6), Task::Finish)));
        assert_eq!(first(6, 8, Visibility::Private), Some((r(6, 8), Task::Convert)));
        assert_eq!(first(2, 4, Visibility::Private), None);
        assert_eq!(first(0, 8, Visibility::Shared), Some((r(2, 6), Task::Convert)));
        map.finish(r(0, 8));
        assert_eq!(first(2, 6, Visibility::Private), None);
        assert_eq!(map.private_parts(r(0, 8)), [r(2, 6)]);
        assert_eq!(map.private_size(r(3, 8)), 3 * PAGE);
    }

    /// Enough for two leaves and the edges between words.
    const PAGES: u64 = 8300;

    fn part() -> impl Strategy<Value = (u64, u64)> {
        let page = || (prop::sample::select(vec![0u64, 64, 4096, 8192]), 0u64..100).prop_map(|(a, b)| a + b);
        (page(), page()).prop_map(|(a, b)| (a.min(b), a.max(b) + 1))
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Set(Visibility, bool),
        Finish,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (any::<bool>(), any::<bool>()).prop_map(|(to, done)| Step::Set(Visibility::of(to), done)),
            Just(Step::Finish),
        ]
    }

    /// A page in the plainest way: what it is, and whether that is finished.
    type Plain = (Visibility, bool);

    /// The pages of `range` from the first such on, as long as they are such.
    fn first_in(plain: &[Plain], (from, end): (u64, u64), is_such: impl Fn(Plain) -> bool) -> Option<Range> {
        let such = |page: &u64| is_such(plain[*page as usize]);
        let first = (from..end).find(such)?;
        Some(r(first, (first..end).find(|page| !such(page)).unwrap_or(end)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn is_as_a_plain_array_is(
            steps in prop::collection::vec((step(), part(), part()), 1..40),
        ) {
            let (map, mut plain) = (VisibilityMap::default(), vec![(Visibility::Shared, true); PAGES as usize]);
            for (step, (from, end), asked) in steps {
                let pages = &mut plain[from as usize..end as usize];
                match step {
                    Step::Set(to, is_finished) => {
                        let differing = pages.iter().filter(|page| page.0 != to).count() as u64;
                        prop_assert_eq!(map.set(r(from, end), to, is_finished), differing * PAGE);
                        pages.fill((to, is_finished));
                    }
                    Step::Finish => {
                        map.finish(r(from, end));
                        pages.iter_mut().for_each(|page| page.1 = true);
                    }
                }
                let range = r(asked.0, asked.1);
                for to in [Visibility::Shared, Visibility::Private] {
                    let differing = first_in(&plain, asked, |page| page.0 != to).map(|it| (it, Task::Convert));
                    let is_left = |page: Plain| page.0 == to && !page.1;
                    let left = first_in(&plain, asked, is_left).map(|it| (it, Task::Finish));
                    let first = differing.into_iter().chain(left).min_by_key(|(it, _)| it.start);
                    prop_assert_eq!(map.first_to_convert(range, to), first);
                    prop_assert_eq!(map.is_all(range, to), differing.is_none());
                }
                let left = first_in(&plain, asked, |page| !page.1).is_some();
                prop_assert_eq!(map.is_unfinished(range), left);
                let private = |page: Plain| page.0 == Visibility::Private;
                prop_assert_eq!(map.first_private(range), first_in(&plain, asked, private));
                let pages = &plain[asked.0 as usize..asked.1 as usize];
                let size = pages.iter().filter(|page| private(**page)).count() as u64 * PAGE;
                prop_assert_eq!(map.private_size(range), size);
                let visibility = pages[0].0;
                let run = first_in(&plain, asked, |page| page.0 == visibility);
                prop_assert_eq!(Some(map.run(range)), run.map(|range| Run { range, visibility }));
            }
        }
    }
}
