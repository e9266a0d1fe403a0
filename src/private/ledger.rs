//! The add-once ledger: which guest pages have been claimed for the initial image.
//!
//! Whoever puts a page into the image claims it first, so that no page is put there twice: the measurement would be of
//! both, the guest would see the last. A claim is remembered as it was made, so that a second one can be told of the
//! first. It knows neither slots nor which memory is private, and never asks the kernel.

use crate::range::Range;
use std::collections::BTreeMap;

/// All claims of one guest.
#[derive(Debug, Default)]
pub struct Ledger {
    /// First byte to one past the last. They do not overlap, and those that touch stay apart.
    claims: BTreeMap<u64, u64>,
    is_sealed: bool,
}

/// Why nothing was claimed or given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The image is closed.
    Sealed,
    /// Something of the range was claimed before; this is what is left of that claim, the lowest that the range meets.
    Claimed(Range),
    /// This part of the range, the first such, is not claimed.
    NotClaimed(Range),
}

/// Of a list, the range that could not be claimed, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclaimable {
    /// Its place in the list.
    pub index: usize,
    /// Why.
    pub why: Refusal,
}

impl Ledger {
    /// Claims all of `range`, or nothing.
    pub fn claim(&mut self, range: Range) -> Result<(), Refusal> {
        self.check_open()?;
        match self.first_met(range) {
            Some(earlier) => Err(Refusal::Claimed(earlier)),
            None => {
                self.claims.insert(range.start, range.end);
                Ok(())
            }
        }
    }

    /// Gives all of `range` back, or nothing. It need not be what was claimed at once: what is left of a claim on either
    /// side stays one.
    pub fn unclaim(&mut self, range: Range) -> Result<(), Refusal> {
        self.check_open()?;
        if let Some(gap) = self.first_gap(range) {
            return Err(Refusal::NotClaimed(gap));
        }
        let mut at = range.start;
        while let Some(claim) = Range::between(at, range.end).and_then(|rest| self.first_met(rest)) {
            self.claims.remove(&claim.start);
            let left = [Range::between(claim.start, range.start), Range::between(range.end, claim.end)];
            self.claims.extend(left.into_iter().flatten().map(|part| (part.start, part.end)));
            at = claim.end;
        }
        Ok(())
    }

    /// Whether [`Ledger::claim`] of each, in that order, would succeed. Claims nothing.
    pub fn check_list(&self, ranges: &[Range]) -> Result<(), Unclaimable> {
        let mut listed = Ledger::default();
        for (index, range) in ranges.iter().enumerate() {
            self.check_open().map_err(|why| Unclaimable { index, why })?;
            let met = [self.first_met(*range), listed.first_met(*range)].into_iter().flatten();
            if let Some(earlier) = met.min_by_key(|claim| claim.start) {
                return Err(Unclaimable { index, why: Refusal::Claimed(earlier) });
            }
            listed.claims.insert(range.start, range.end);
        }
        Ok(())
    }

    /// Closes the image: nothing is claimed or given back any more.
    pub fn seal(&mut self) {
        self.is_sealed = true;
    }

    /// Whether it is closed.
    pub fn is_sealed(&self) -> bool {
        self.is_sealed
    }

    /// What is claimed, by place, each claim for itself.
    pub fn claims(&self) -> impl Iterator<Item = Range> + '_ {
        self.claims.iter().map(|(start, end)| Range { start: *start, end: *end })
    }

    fn check_open(&self) -> Result<(), Refusal> {
        if self.is_sealed { Err(Refusal::Sealed) } else { Ok(()) }
    }

    /// The lowest claim that has something of `range`.
    fn first_met(&self, range: Range) -> Option<Range> {
        let before = self.claims.range(..=range.start).next_back().filter(|(_, end)| **end > range.start);
        let met = before.or_else(|| self.claims.range(range.start..range.end).next());
        met.map(|(start, end)| Range { start: *start, end: *end })
    }

    /// The first part of `range` that is not claimed.
    fn first_gap(&self, range: Range) -> Option<Range> {
        let mut at = range.start;
        while let Some(rest) = Range::between(at, range.end) {
            match self.first_met(rest) {
                Some(claim) if claim.start <= at => at = claim.end,
                met => return Range::between(at, met.map_or(range.end, |claim| claim.start)),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range::PAGE;
    use proptest::prelude::*;

    fn r(first: u64, end: u64) -> Range {
        Range { start: first * PAGE, end: end * PAGE }
    }

    #[test]
    fn an_earlier_claim_is_named_as_it_was_made() {
        let mut ledger = Ledger::default();
        ledger.claim(r(4, 8)).unwrap();
        ledger.claim(r(8, 9)).unwrap();
        assert_eq!(ledger.claim(r(6, 20)), Err(Refusal::Claimed(r(4, 8))));
        assert_eq!(ledger.claim(r(8, 20)), Err(Refusal::Claimed(r(8, 9))));
        assert_eq!(ledger.claim(r(0, 5)), Err(Refusal::Claimed(r(4, 8))));
        ledger.unclaim(r(5, 6)).unwrap();
        assert_eq!(ledger.claim(r(5, 7)), Err(Refusal::Claimed(r(6, 8))));
        assert_eq!(ledger.claims().collect::<Vec<_>>(), [r(4, 5), r(6, 8), r(8, 9)]);
        ledger.claim(r(0, 4)).unwrap();
        ledger.claim(r(5, 6)).unwrap();
    }

    #[test]
    fn only_what_is_claimed_all_of_it_is_given_back() {
        let mut ledger = Ledger::default();
        ledger.claim(r(0, 4)).unwrap();
        ledger.claim(r(4, 6)).unwrap();
        ledger.claim(r(8, 9)).unwrap();
        assert_eq!(ledger.unclaim(r(2, 9)), Err(Refusal::NotClaimed(r(6, 8))));
        assert_eq!(ledger.unclaim(r(10, 12)), Err(Refusal::NotClaimed(r(10, 12))));
        assert_eq!(ledger.claims().count(), 3, "a refusal gives nothing back");
        ledger.unclaim(r(1, 6)).unwrap();
        assert_eq!(ledger.claims().collect::<Vec<_>>(), [r(0, 1), r(8, 9)]);
    }

    #[test]
    fn a_closed_image_stays_as_it_is() {
        let mut ledger = Ledger::default();
        ledger.claim(r(0, 4)).unwrap();
        ledger.seal();
        ledger.seal();
        assert!(ledger.is_sealed());
        assert_eq!(ledger.claim(r(8, 9)), Err(Refusal::Sealed));
        assert_eq!(ledger.unclaim(r(0, 4)), Err(Refusal::Sealed));
        assert_eq!(ledger.check_list(&[r(8, 9)]), Err(Unclaimable { index: 0, why: Refusal::Sealed }));
        assert_eq!(ledger.check_list(&[]), Ok(()));
        assert_eq!(ledger.claims().collect::<Vec<_>>(), [r(0, 4)]);
    }

    #[test]
    fn a_list_is_held_against_itself_too_and_changes_nothing() {
        let mut ledger = Ledger::default();
        ledger.claim(r(10, 12)).unwrap();
        assert_eq!(ledger.check_list(&[r(0, 4), r(4, 10)]), Ok(()));
        let refused = |index, earlier| Err(Unclaimable { index, why: Refusal::Claimed(earlier) });
        assert_eq!(ledger.check_list(&[r(0, 4), r(5, 6), r(3, 6)]), refused(2, r(0, 4)));
        assert_eq!(ledger.check_list(&[r(0, 4), r(11, 13), r(3, 4)]), refused(1, r(10, 12)));
        assert_eq!(ledger.check_list(&[r(8, 9), r(8, 11)]), refused(1, r(8, 9)));
        assert_eq!(ledger.check_list(&[r(13, 14), r(11, 14)]), refused(1, r(10, 12)));
        assert_eq!(ledger.claims().collect::<Vec<_>>(), [r(10, 12)]);
    }

    /// The other opinion: for each page the number of its claim, 0 for none.
    struct Naive {
        pages: Vec<u32>,
        made: u32,
    }

    impl Naive {
        fn new(pages: u64) -> Self {
            Self { pages: vec![0; pages as usize], made: 0 }
        }

        fn of(&mut self, range: Range) -> &mut [u32] {
            &mut self.pages[(range.start / PAGE) as usize..(range.end / PAGE) as usize]
        }

        fn claim(&mut self, range: Range) -> Result<(), Refusal> {
            if let Some(met) = self.of(range).iter().position(|claim| *claim != 0) {
                let page = (range.start / PAGE) as usize + met;
                let own = |claim: &&u32| **claim == self.pages[page];
                let (before, after) = self.pages.split_at(page);
                let start = page - before.iter().rev().take_while(own).count();
                let end = page + after.iter().take_while(own).count();
                return Err(Refusal::Claimed(r(start as u64, end as u64)));
            }
            self.made += 1;
            let number = self.made;
            self.of(range).fill(number);
            Ok(())
        }

        fn unclaim(&mut self, range: Range) -> Result<(), Refusal> {
            let first = range.start / PAGE;
            let pages = self.of(range);
            if let Some(gap) = pages.iter().position(|claim| *claim == 0) {
                let size = pages[gap..].iter().take_while(|claim| **claim == 0).count();
                return Err(Refusal::NotClaimed(r(first + gap as u64, first + (gap + size) as u64)));
            }
            pages.fill(0);
            Ok(())
        }
    }

    /// A million of them, of a page to a few dozen, in a guest that they fill by half: as many are refused as not.
    #[test]
    fn a_million_claims_are_judged_as_a_naive_set_judges_them() {
        const CLAIMS: u32 = 1_000_000;
        const PAGES: u64 = 1 << 19;
        let (mut ledger, mut naive) = (Ledger::default(), Naive::new(PAGES));
        let (mut refused, mut most) = ([0; 2], 0);
        // SplitMix64, from a fixed seed.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        };
        for _ in 0..CLAIMS {
            let first = random() % PAGES;
            // Mostly single pages, so that there are many claims at once.
            let size = if random() % 8 == 0 { 1 + random() % 40 } else { 1 };
            let range = r(first, (first + size).min(PAGES));
            let is_claim = random() % 4 != 0;
            let verdicts = if is_claim {
                (ledger.claim(range), naive.claim(range))
            } else {
                (ledger.unclaim(range), naive.unclaim(range))
            };
            assert_eq!(verdicts.0, verdicts.1, "{range}");
            refused[usize::from(is_claim)] += u32::from(verdicts.0.is_err());
            most = most.max(ledger.claims.len());
        }
        println!("{CLAIMS} claims and unclaims, {refused:?} refused, up to {most} claims at once");
        assert!(refused.iter().all(|n| (50_000..700_000).contains(n)), "{refused:?} refused: a poor test");
        assert!(most > 100_000, "{most} claims at once: a poor test");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn is_as_a_naive_set_is(steps in prop::collection::vec((0u64..48, 1u64..12, any::<bool>()), 1..80)) {
            const PAGES: u64 = 60;
            let (mut ledger, mut naive) = (Ledger::default(), Naive::new(PAGES));
            for (first, size, is_claim) in steps {
                let range = r(first, first + size);
                let checked = ledger.check_list(&[range]).map_err(|unclaimable| unclaimable.why);
                if is_claim {
                    let verdict = naive.claim(range);
                    prop_assert_eq!(checked, verdict);
                    prop_assert_eq!(ledger.claim(range), verdict);
                } else {
                    prop_assert_eq!(ledger.unclaim(range), naive.unclaim(range));
                }
                let mut pages = vec![false; PAGES as usize];
                for claim in ledger.claims() {
                    pages[(claim.start / PAGE) as usize..(claim.end / PAGE) as usize].fill(true);
                }
                let theirs: Vec<bool> = naive.pages.iter().map(|claim| *claim != 0).collect();
                prop_assert_eq!(pages, theirs);
            }
        }

        #[test]
        fn a_list_is_judged_as_claiming_it_would_be(
            before in prop::collection::vec((0u64..40, 1u64..6), 0..6),
            list in prop::collection::vec((0u64..40, 1u64..6), 0..8),
        ) {
            let mut ledger = Ledger::default();
            for (first, size) in before {
                let _ = ledger.claim(r(first, first + size));
            }
            let list: Vec<Range> = list.into_iter().map(|(first, size)| r(first, first + size)).collect();
            let verdict = ledger.check_list(&list);
            let claimed = list.iter().enumerate().try_for_each(|(index, range)| {
                ledger.claim(*range).map_err(|why| Unclaimable { index, why })
            });
            prop_assert_eq!(verdict, claimed);
        }
    }
}
