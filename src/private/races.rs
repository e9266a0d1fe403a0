//! Conversions that race, in every order in which their threads could run: loom tries them.
//!
//! What runs is the library's own order of a conversion, its map and its turns; only KVM and the caller are played here.
//! Each thread is watched at each step: that nobody else is at work on its pages, that nothing is given up that is in sight
//! or that the caller does not know of; and at the end map, KVM and caller must agree. What is played needs no locks: loom
//! runs one thread at a time, and changes threads only at the library's own locks, which are what is tried.
//!
//! `cargo xtask test` builds this with `--cfg loom`; of the library's tests only these can run then.

use super::convert::{Converted, Given, Guest, Steps, convert};
use super::turns::{OwnTurn, Try, Turn, Turns};
use super::visibility::{Visibility, VisibilityMap};
use crate::error::{Error, Reason, Result};
use crate::range::{PAGE, Range};
use Visibility::{Private, Shared};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// All memory of the guest, in pages.
const PAGES: usize = 4;
const STEPS: Steps = Steps { attributes: true, drop: true };

/// What a thread does, with which pages.
#[derive(Clone, Copy)]
struct Deed {
    pages: (u64, u64),
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    Convert(Visibility, Trouble),
    /// Converts these too, when the caller is told of the first.
    ConvertWithin(Visibility, (u64, u64)),
    /// Takes its turn and reads the map.
    Read,
    /// Does so if nobody is at work there, as who populates does.
    TryRead,
    /// Waits until those are done who are at work, as who changes a slot does.
    Await,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// The caller's function fails.
    Callback,
    /// And then KVM does not take the piece back.
    CallbackAndPutBack,
}

impl Deed {
    fn fails(&self) -> bool {
        matches!(self.what, What::Convert(_, trouble) if trouble != Trouble::None)
    }
}

const fn convert_to(to: Visibility, from: u64, end: u64) -> Deed {
    failing(to, from, end, Trouble::None)
}

const fn failing(to: Visibility, from: u64, end: u64, trouble: Trouble) -> Deed {
    Deed { pages: (from, end), what: What::Convert(to, trouble) }
}

fn range((from, end): (u64, u64)) -> Range {
    Range { start: from * PAGE, end: end * PAGE }
}

/// One page, as KVM, the guest's memory and the caller have it.
struct Page {
    /// What KVM says. loom finds who touches it without a lock since another did.
    attribute: loom::cell::Cell<Visibility>,
    /// Whether there is memory as shared, and as private.
    present: [Cell<bool>; 2],
    /// What the caller was told last.
    told: Cell<Visibility>,
    /// Who works on it.
    worker: Cell<Option<usize>>,
}

/// Everything that the threads have in common.
struct Stage {
    map: VisibilityMap,
    turns: Turns,
    pages: [Page; PAGES],
    /// Turns that are taken now: whose, of which number.
    at_work: RefCell<Vec<(usize, Range)>>,
    seen: Arc<Seen>,
}

impl Stage {
    fn new(seen: &Arc<Seen>) -> Self {
        Self {
            map: VisibilityMap::default(),
            turns: Turns::default(),
            pages: std::array::from_fn(|_| Page {
                attribute: loom::cell::Cell::new(Shared),
                present: [Cell::new(true), Cell::new(false)],
                told: Cell::new(Shared),
                worker: Cell::new(None),
            }),
            at_work: RefCell::default(),
            seen: Arc::clone(seen),
        }
    }

    fn pages(&self, range: Range) -> &[Page] {
        &self.pages[(range.start / PAGE) as usize..(range.end / PAGE) as usize]
    }

    /// Takes the turn for as long as `work` takes.
    fn in_turn<T>(
        &self,
        who: usize,
        range: Range,
        work: impl FnOnce() -> T,
    ) -> std::result::Result<T, OwnTurn> {
        self.turns.take(range).map(|turn| self.work(turn, who, range, work))
    }

    /// Does `work` with it, and gives it back.
    fn work<T>(&self, turn: Turn<'_>, who: usize, range: Range, work: impl FnOnce() -> T) -> T {
        for page in self.pages(range) {
            assert_eq!(page.worker.replace(Some(who)), None, "two at work on one page");
        }
        self.at_work.borrow_mut().push((who, range));
        let mut threads: Vec<usize> = self.at_work.borrow().iter().map(|(who, _)| *who).collect();
        threads.dedup();
        self.seen.together.fetch_max(threads.len(), Relaxed);
        let result = work();
        self.at_work.borrow_mut().retain(|mine| *mine != (who, range));
        self.pages(range).iter().for_each(|page| page.worker.set(None));
        drop(turn);
        result
    }

    fn act(self: &Rc<Self>, who: usize, deed: Deed) {
        let range = range(deed.pages);
        match deed.what {
            What::Convert(to, trouble) => {
                let result = self.convert(who, range, to, trouble, None).expect("no other turn");
                assert!(result.is_ok() || trouble != Trouble::None, "{result:?}");
            }
            What::ConvertWithin(to, also) => {
                self.convert(who, range, to, Trouble::None, Some(also))
                    .expect("no other turn")
                    .expect("no trouble");
            }
            What::Read => self.in_turn(who, range, || self.read(range)).expect("no other turn"),
            What::TryRead => {
                if let Try::Taken(turn) = self.turns.try_take(range) {
                    self.work(turn, who, range, || self.read(range));
                }
            }
            What::Await => {
                let before = self.at_work.borrow().clone();
                self.turns.wait(range).expect("no other turn");
                let now = self.at_work.borrow();
                let mut theirs = before.iter().filter(|(_, theirs)| theirs.overlaps(&range));
                assert!(theirs.all(|one| !now.contains(one)), "still at work");
            }
        }
    }

    /// As the library converts, but without slots.
    fn convert(
        &self,
        who: usize,
        range: Range,
        to: Visibility,
        trouble: Trouble,
        also: Option<(u64, u64)>,
    ) -> std::result::Result<Result<()>, OwnTurn> {
        self.in_turn(who, range, || {
            let guest = Player { stage: self, who, trouble, has_failed: Cell::new(false), also };
            convert(&self.map, &guest, range, to, STEPS, &mut Converted::default())
        })
    }

    fn read(&self, range: Range) {
        for number in range.start / PAGE..range.end / PAGE {
            let page = self::range((number, number + 1));
            assert!(self.map.is_all(page, self.pages(page)[0].attribute.get()), "the map is wrong");
        }
    }

    /// The map says what KVM says; and once what was left is finished, so does everything else.
    fn check(&self) {
        let all = range((0, PAGES as u64));
        self.read(all);
        for number in 0..PAGES as u64 {
            let one = range((number, number + 1));
            let page = &self.pages(one)[0];
            let is = page.attribute.get();
            let finished = self.convert(PAGES, one, is, Trouble::None, None);
            finished.expect("no other turn").expect("no trouble any more");
            assert_eq!(page.attribute.get(), is, "it was that already");
            assert_eq!(page.told.get(), is, "the caller believes something else");
            assert_eq!(self.map.first_to_convert(one, is), None, "something is left unfinished");
            assert!(page.present[is as usize].get(), "memory in sight was given up");
        }
    }

    /// Where nothing went wrong, nothing is left of what is out of sight.
    fn check_given_up(&self) {
        for page in &self.pages {
            assert!(
                !page.present[page.attribute.get().other() as usize].get(),
                "memory out of sight is kept"
            );
        }
    }
}

/// KVM, the guest's memory and the caller, for one conversion.
struct Player<'a> {
    stage: &'a Stage,
    who: usize,
    trouble: Trouble,
    has_failed: Cell<bool>,
    also: Option<(u64, u64)>,
}

impl Player<'_> {
    fn own(&self, piece: Range) -> &[Page] {
        let pages = self.stage.pages(piece);
        assert!(pages.iter().all(|page| page.worker.get() == Some(self.who)), "at work where it has no turn");
        pages
    }

    fn failure(&self) -> Result<()> {
        self.has_failed.set(true);
        Err(Error::new(libc::EIO, Reason::CallbackFailed, "as was asked for"))
    }
}

impl Guest for Player<'_> {
    fn set(&self, piece: Range, to: Visibility) -> Result<()> {
        let pages = self.own(piece);
        if self.has_failed.get() && self.trouble == Trouble::CallbackAndPutBack {
            return self.failure();
        }
        for page in pages {
            page.attribute.set(to);
            // As if the guest touched it at once.
            page.present[to as usize].set(true);
        }
        Ok(())
    }

    fn changed(&self, piece: Range, to: Visibility) -> Result<()> {
        let pages = self.own(piece);
        if let Some(also) = self.also {
            match self.stage.convert(self.who, range(also), to, Trouble::None, None) {
                Ok(result) => result?,
                Err(OwnTurn) => _ = self.stage.seen.circles.fetch_add(1, Relaxed),
            }
        }
        if self.trouble != Trouble::None {
            return self.failure();
        }
        for page in pages {
            assert_eq!(page.attribute.get(), to, "the caller is told what is not so");
            page.told.set(to);
        }
        Ok(())
    }

    fn drop_side(&self, piece: Range, out_of_sight: Visibility, given: &mut Given) -> Result<()> {
        for page in self.own(piece) {
            assert_ne!(page.attribute.get(), out_of_sight, "memory in sight is given up");
            assert_ne!(page.told.get(), out_of_sight, "it is given up before the caller knows");
            page.present[out_of_sight as usize].set(false);
        }
        given.up += piece.size();
        Ok(())
    }
}

/// What all orders together have shown.
#[derive(Debug, Default)]
struct Seen {
    /// The most threads that were at work at once.
    together: AtomicUsize,
    /// How often a thread was told that it would wait for itself.
    circles: AtomicUsize,
}

impl Seen {
    fn together(&self) -> usize {
        self.together.load(Relaxed)
    }

    fn circles(&self) -> usize {
        self.circles.load(Relaxed)
    }
}

/// Does the deeds, each on a thread of its own, in every order; of more than two threads' orders, in those that
/// interrupt threads no more than twice.
fn explore(deeds: &[Deed]) -> Arc<Seen> {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = (deeds.len() > 2).then_some(2);
    let seen = Arc::new(Seen::default());
    let (all, deeds) = (Arc::clone(&seen), deeds.to_vec());
    model.check(move || {
        let stage = Rc::new(Stage::new(&all));
        let act = |(who, deed): (usize, &Deed)| {
            let (stage, deed) = (Rc::clone(&stage), *deed);
            loom::thread::spawn(move || stage.act(who, deed))
        };
        let threads: Vec<_> = deeds.iter().enumerate().map(act).collect();
        threads.into_iter().for_each(|thread| thread.join().expect("a thread that ends"));
        stage.check();
        if !deeds.iter().any(Deed::fails) {
            stage.check_given_up();
        }
    });
    seen
}
const BOTH: [Visibility; 2] = [Private, Shared];
/// Pages that the second of two has in common with the first's `[0, 3)`: some, all, its own.
const OVERLAPPING: [(u64, u64); 3] = [(1, 4), (0, 3), (1, 2)];

#[test]
fn two_that_overlap_take_turns() {
    for (to, other, (from, end)) in with_each(BOTH, BOTH, OVERLAPPING) {
        let seen = explore(&[convert_to(to, 0, 3), convert_to(other, from, end)]);
        assert_eq!(seen.together(), 1);
    }
}

#[test]
fn two_that_are_apart_work_at_the_same_time() {
    for (to, other, end) in with_each(BOTH, BOTH, [3, 4]) {
        let seen = explore(&[convert_to(to, 0, 2), convert_to(other, 2, end)]);
        assert_eq!(seen.together(), 2);
    }
}

#[test]
fn what_a_caller_refuses_is_put_back_or_finished_by_another() {
    let troubles = [Trouble::Callback, Trouble::CallbackAndPutBack];
    for (trouble, other, (from, end)) in with_each(troubles, BOTH, OVERLAPPING) {
        explore(&[failing(Private, 0, 3, trouble), convert_to(other, from, end)]);
        explore(&[failing(Private, 0, 3, trouble), failing(other, from, end, Trouble::Callback)]);
    }
}

#[test]
fn three_take_turns_where_they_must() {
    for (to, other, third) in with_each([Private], BOTH, BOTH) {
        explore(&[convert_to(to, 0, 4), convert_to(other, 0, 4), convert_to(third, 1, 3)]);
        // The ends are apart, and the middle meets both.
        let seen = explore(&[convert_to(to, 0, 2), convert_to(other, 1, 3), convert_to(third, 2, 4)]);
        assert_eq!(seen.together(), 2);
        explore(&[failing(to, 0, 2, Trouble::Callback), convert_to(other, 1, 3), convert_to(third, 2, 4)]);
        let seen = explore(&[convert_to(to, 0, 1), convert_to(other, 1, 2), convert_to(third, 2, 4)]);
        assert_eq!(seen.together(), 3);
    }
}

#[test]
fn who_reads_in_its_turn_and_who_waits_see_nothing_half_done() {
    for (what, other) in [(What::Read, What::Await), (What::Await, What::Await), (What::TryRead, What::Read)]
    {
        let others = [what, other].map(|what| Deed { pages: (1, 3), what });
        explore(&[convert_to(Private, 0, 2), others[0]]);
        explore(&[convert_to(Private, 0, 2), convert_to(Private, 2, 3), others[0]]);
        explore(&[convert_to(Private, 0, 2), others[0], others[1]]);
    }
}

#[test]
fn those_who_would_wait_in_a_circle_are_told() {
    let within = |own, also| Deed { pages: own, what: What::ConvertWithin(Private, also) };
    let seen = explore(&[within((0, 1), (2, 3)), within((2, 3), (0, 1))]);
    assert!(seen.circles() > 0);
    let seen = explore(&[within((0, 1), (1, 2)), within((1, 2), (2, 3)), within((2, 3), (0, 1))]);
    assert!(seen.circles() > 0);
    // Who only waits closes none.
    let seen = explore(&[within((0, 1), (2, 3)), convert_to(Shared, 0, 3), convert_to(Private, 1, 4)]);
    assert_eq!(seen.circles(), 0);
}

fn with_each<A: Copy, B: Copy, C: Copy, const L: usize, const M: usize, const N: usize>(
    a: [A; L],
    b: [B; M],
    c: [C; N],
) -> impl Iterator<Item = (A, B, C)> {
    a.into_iter().flat_map(move |a| b.into_iter().flat_map(move |b| c.into_iter().map(move |c| (a, b, c))))
}
