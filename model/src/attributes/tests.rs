//! Attributes beside the plainest possible book: one entry for each frame.

use proptest::prelude::*;

use super::*;
use crate::memslot::{Lpage, Memslot};
use crate::units::Hva;

/// More than two of the largest frames.
const FRAMES: u64 = 2 * GIGANTIC + 3 * HUGE;
const HUGE: u64 = Level::HUGE.pages();
const GIGANTIC: u64 = Level::GIGANTIC.pages();

fn slot(base: u64, pages: u64) -> Memslot {
    let lpage = Lpage::new(Gfn(base), pages, Hva(base << 12)).into();
    Memslot {
        as_id: 0,
        id: 0,
        base: Gfn(base),
        pages,
        hva: Hva(base << 12),
        flags: 0,
        gmem: None,
        lpage,
        dirty: None,
        is_invalid: false,
    }
}

fn range(start: u64, end: u64) -> GfnRange {
    GfnRange { start: Gfn(start), end: Gfn(end) }
}

/// Frames at the edges of large ones, and some elsewhere.
fn edge() -> impl Strategy<Value = u64> {
    let near = |level: u64| {
        (0..=FRAMES / level, -2i64..=2)
            .prop_map(move |(nth, by)| (nth * level).saturating_add_signed(by).min(FRAMES))
    };
    prop_oneof![3 => near(HUGE), 3 => near(GIGANTIC), 1 => 0..=FRAMES]
}

fn some_range() -> impl Strategy<Value = GfnRange> {
    (edge(), edge())
        .prop_filter("a range has frames", |(a, b)| a != b)
        .prop_map(|(a, b)| range(a.min(b), a.max(b)))
}

fn privacies() -> impl Strategy<Value = Privacy> {
    prop_oneof![Just(Privacy::Shared), Just(Privacy::Private)]
}

fn part(book: &[Privacy], range: GfnRange) -> &[Privacy] {
    &book[range.start.0 as usize..range.end.0 as usize]
}

fn is_of(book: &[Privacy], range: GfnRange, privacy: Privacy) -> bool {
    part(book, range).iter().all(|of_frame| *of_frame == privacy)
}

/// Each large frame that the slot has all of is mixed if it has frames of both kinds.
fn check_mixed(attributes: &Attributes, book: &[Privacy], slot: &Memslot) {
    assert_eq!(attributes.check_mixed(slot), Ok(()));
    for level in LARGE {
        let first = slot.base.0.next_multiple_of(level.pages());
        for start in (first..).step_by(level.pages() as usize) {
            let frame = GfnRange::new(Gfn(start), level.pages());
            if frame.end > slot.range().end {
                break;
            }
            let is_mixed = !is_of(book, frame, book[start as usize]);
            assert_eq!(slot.lpage.mixed(frame.start, level), is_mixed, "{level:?} at {start:#x} of {slot:?}");
        }
    }
}

/// What is kept is as small as can be: runs in order, none empty, none next to another.
fn check_runs(attributes: &Attributes) {
    let runs = attributes.private_runs();
    assert!(runs.iter().all(|run| !run.is_empty()), "{runs:?}");
    assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "{runs:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn each_frame_is_known_and_each_mixed_one(
        before in prop::collection::vec((some_range(), privacies()), 0..4),
        placed in some_range(),
        after in prop::collection::vec((some_range(), privacies()), 1..6),
        asked in prop::collection::vec((some_range(), privacies()), 8),
    ) {
        let attributes = Attributes::new();
        let mut book = vec![Privacy::Shared; FRAMES as usize];
        let mut set = |range: GfnRange, privacy| {
            attributes.set(range, privacy);
            book[range.start.0 as usize..range.end.0 as usize].fill(privacy);
            check_runs(&attributes);
            book.clone()
        };
        for (range, privacy) in before {
            set(range, privacy);
        }
        let slot = slot(placed.start.0, placed.pages());
        attributes.compute_mixed(&slot);
        let mut book = set(range(0, 0), Privacy::Shared);
        check_mixed(&attributes, &book, &slot);
        for (range, privacy) in after {
            book = set(range, privacy);
            if let Some(part) = slot.range().intersection(range) {
                attributes.recompute_mixed(&slot, part);
            }
            check_mixed(&attributes, &book, &slot);
        }
        for (range, privacy) in asked {
            prop_assert_eq!(attributes.is_uniform(range, privacy), is_of(&book, range, privacy));
            let last = Gfn(range.end.0 - 1);
            prop_assert_eq!(attributes.privacy(range.start), book[range.start.0 as usize]);
            prop_assert_eq!(attributes.privacy(last), book[last.0 as usize]);
        }
    }
}

#[test]
fn a_kind_that_spans_everything_takes_one_run() {
    let attributes = Attributes::new();
    attributes.set(GfnRange::ALL, Privacy::Private);
    assert_eq!(attributes.private_runs(), [GfnRange::ALL]);
    attributes.set(range(7, 8), Privacy::Shared);
    assert_eq!(attributes.privacy(Gfn(7)), Privacy::Shared);
    assert!(!attributes.is_uniform(GfnRange::ALL, Privacy::Private));
    attributes.set(range(7, 8), Privacy::Private);
    assert_eq!(attributes.private_runs(), [GfnRange::ALL]);
}

#[test]
fn a_change_right_behind_a_mixed_frame_is_seen() {
    for level in LARGE {
        let attributes = Attributes::new();
        attributes.set(range(5, 6), Privacy::Private);
        attributes.set(range(level.pages() + 1, 2 * level.pages()), Privacy::Private);
        let slot = slot(0, 3 * level.pages());
        attributes.compute_mixed(&slot);
        let mixed: Vec<bool> = (0..3).map(|nth| slot.lpage.mixed(Gfn(nth * level.pages()), level)).collect();
        assert_eq!(mixed, [true, true, false], "{level:?}");
        assert_eq!(attributes.check_mixed(&slot), Ok(()));
        slot.lpage.set_mixed(slot.base, level, false);
        assert!(attributes.check_mixed(&slot).is_err(), "one too few");
        slot.lpage.set_mixed(slot.base, level, true);
        slot.lpage.set_mixed(slot.base.plus(2 * level.pages()), level, true);
        assert!(attributes.check_mixed(&slot).is_err(), "one too many");
    }
}

#[test]
fn only_known_attributes_of_whole_pages_are_taken() {
    let private = KVM_MEMORY_ATTRIBUTE_PRIVATE;
    let end = u64::MAX - (PAGE_SIZE - 1);
    for (supported, address, size, attributes, flags) in [
        (private, 0, PAGE_SIZE, private, 0),
        (private, 0, PAGE_SIZE, 0, 0),
        // Nothing is an attribute that every VM has.
        (0, PAGE_SIZE, PAGE_SIZE, 0, 0),
        // There is no end to it: neither memslots nor the guest's width matter.
        (private, 0, end, private, 0),
        (private, end - PAGE_SIZE, PAGE_SIZE, private, 0),
    ] {
        let taken = check(supported, address, size, attributes, flags);
        assert_eq!(taken, Ok(()), "{address:#x} {size:#x} {attributes:#x}");
    }
    for (supported, address, size, attributes, flags) in [
        (0, 0, PAGE_SIZE, private, 0),
        (private, 0, PAGE_SIZE, private | 1, 0),
        (private, 0, PAGE_SIZE, private, 1),
        (private, 0, 0, private, 0),
        (private, 1, PAGE_SIZE, private, 0),
        (private, 0, PAGE_SIZE + 1, private, 0),
        // The last page of all ends where 64 bits do.
        (private, end, PAGE_SIZE, private, 0),
    ] {
        let refused = check(supported, address, size, attributes, flags);
        assert_eq!(refused, Err(Errno::EINVAL), "{address:#x} {size:#x} {attributes:#x}");
    }
}
