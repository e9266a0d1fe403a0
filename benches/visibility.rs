//! What the visibility map costs for a guest of 4 TiB, in time and in memory, beside what it could have been: a map of
//! intervals, roaring bitmaps, and the plain bitmap that QEMU has and scans to its end.
//!
//! A conversion is that of one page, by the library's own order with everything but the map left out; and then the
//! question how far the memory behind it is of one kind, which a VMM has for its listeners. Intervals and roaring bitmaps
//! stand where the tree stands, beneath the same lock and the same marks of what is unfinished; the plain bitmap has
//! neither, as in QEMU. `cargo xtask bench` runs it for its times and sizes, and under callgrind for its instructions.
//!
//! What it has shown, and why it is the tree: a guest decides what its map looks like, and each alternative has a guest that
//! it is bad for. Where every other page differs, intervals take some 140 times the tree's memory; where nothing does, roaring
//! bitmaps some 1500 times as much. And both take three to four times the tree's time where conversions stay.
//!
//! usage: visibility tree|intervals|roaring|scan stay|undo CONVERSIONS
//!        visibility tree|intervals|roaring|scan uniform|alternating

mod heap;

use heap::{ALLOCATIONS, HELD};
use kvmprep::error::Result;
use kvmprep::private::convert::{self, Converted, Given, Guest, Steps};
use kvmprep::private::visibility::{Visibility, VisibilityMap};
use kvmprep::range::{PAGE, Range};
use roaring::RoaringBitmap;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

/// 4 TiB.
const PAGES: u64 = 1 << 30;
/// 4 GiB of them, for what is the same everywhere.
const SOME: u64 = 1 << 20;

type Pages = std::ops::Range<u64>;

/// What a VMM needs a map for.
trait Map {
    /// Converts pages; says where what follows them ends.
    fn convert(&mut self, pages: Pages, is_private: bool) -> u64;
}

struct Ours(VisibilityMap);

/// What a conversion is done to: does nothing, and never fails.
struct Willing;

impl Guest for Willing {
    fn set(&self, _: Range, _: Visibility) -> Result<()> {
        Ok(())
    }

    fn changed(&self, _: Range, _: Visibility) -> Result<()> {
        Ok(())
    }

    fn drop_side(&self, _: Range, _: Visibility, _: &mut Given) -> Result<()> {
        Ok(())
    }
}

impl Map for Ours {
    fn convert(&mut self, pages: Pages, is_private: bool) -> u64 {
        let bytes = |pages: Pages| Range { start: pages.start * PAGE, end: pages.end * PAGE };
        let to = if is_private { Visibility::Private } else { Visibility::Shared };
        let (steps, mut done) = (Steps { attributes: true, drop: true }, Converted::default());
        convert::convert(&self.0, &Willing, bytes(pages.clone()), to, steps, &mut done).expect("willing");
        self.0.run(bytes(pages.end..PAGES + 1)).range.end / PAGE
    }
}

/// What could stand where the tree stands.
trait Set: Default {
    fn set(&mut self, pages: Pages, is_in: bool);
    /// Whether the first is in the set, and where that ends.
    fn run(&self, pages: Pages) -> (bool, u64);
}

/// The visibility map, made of another set.
#[derive(Default)]
struct Other<S>(Mutex<State<S>>);

#[derive(Default)]
struct State<S> {
    private: S,
    unfinished: S,
}

impl<S: Set> Other<S> {
    fn state(&self) -> MutexGuard<'_, State<S>> {
        self.0.lock().expect("nobody panics")
    }

    fn first_to_convert(&self, pages: Pages, is_private: bool) -> Option<Pages> {
        let state = self.state();
        let (is_so, end) = state.private.run(pages.clone());
        let wanted = if is_so == is_private { state.unfinished.run(pages.start..end).0 } else { true };
        wanted.then_some(pages.start..end)
    }
}

impl<S: Set> Map for Other<S> {
    fn convert(&mut self, pages: Pages, is_private: bool) -> u64 {
        // Pages are of one kind each time, here.
        if let Some(part) = self.first_to_convert(pages.clone(), is_private) {
            black_box(self.state().unfinished.run(part.clone()));
            let mut state = self.state();
            state.unfinished.set(part.clone(), true);
            state.private.set(part.clone(), is_private);
            drop(state);
            self.state().unfinished.set(part, false);
        }
        self.state().private.run(pages.end..PAGES + 1).1
    }
}

/// The first page of each run that is in, to its end.
#[derive(Default)]
struct Intervals(BTreeMap<u64, u64>);

impl Intervals {
    fn before(&self, page: u64) -> Option<(u64, u64)> {
        self.0.range(..=page).next_back().map(|(from, to)| (*from, *to))
    }

    /// Makes `page` a place where no run goes on.
    fn cut(&mut self, page: u64) {
        if let Some((from, to)) = self.before(page).filter(|(from, to)| *from < page && page < *to) {
            self.0.insert(from, page);
            self.0.insert(page, to);
        }
    }
}

impl Set for Intervals {
    fn set(&mut self, pages: Pages, is_in: bool) {
        self.cut(pages.start);
        self.cut(pages.end);
        while let Some((from, _)) = self.0.range(pages.clone()).next().map(|(from, to)| (*from, *to)) {
            self.0.remove(&from);
        }
        if is_in {
            let end = self.0.remove(&pages.end).unwrap_or(pages.end);
            match self.before(pages.start).filter(|(_, to)| *to == pages.start) {
                Some((from, _)) => self.0.insert(from, end),
                None => self.0.insert(pages.start, end),
            };
        }
    }

    fn run(&self, pages: Pages) -> (bool, u64) {
        match self.before(pages.start).filter(|(_, to)| *to > pages.start) {
            Some((_, to)) => (true, to.min(pages.end)),
            None => {
                let next = self.0.range(pages.clone()).next();
                (false, next.map_or(pages.end, |(from, _)| *from))
            }
        }
    }
}

/// Has numbers of 32 bits, which are enough for the pages of 4 TiB: those of 64 would cost it more.
#[derive(Default)]
struct Roaring(RoaringBitmap);

impl Set for Roaring {
    fn set(&mut self, pages: Pages, is_in: bool) {
        let numbers = pages.start as u32..pages.end as u32;
        match (is_in, numbers.len()) {
            (true, 1) => black_box(self.0.insert(numbers.start)).into(),
            (false, 1) => black_box(self.0.remove(numbers.start)).into(),
            (true, _) => self.0.insert_range(numbers),
            (false, _) => self.0.remove_range(numbers),
        };
    }

    fn run(&self, pages: Pages) -> (bool, u64) {
        let first = pages.start as u32;
        let run = self.0.range(first..pages.end as u32).next_range();
        match run {
            Some(run) if *run.start() == first => (true, u64::from(*run.end()) + 1),
            Some(run) => (false, u64::from(*run.start())),
            None => (false, pages.end),
        }
    }
}

/// A bit a page, and no more.
struct Scan(Vec<u64>);

impl Default for Scan {
    fn default() -> Self {
        // Not zeroed memory as the kernel gives it, which would be one page for all.
        Self(vec![black_box(u64::MAX); PAGES as usize / 64].into_iter().map(|word| !word).collect())
    }
}

impl Map for Scan {
    fn convert(&mut self, pages: Pages, is_private: bool) -> u64 {
        for page in pages.clone() {
            let (word, bit) = (&mut self.0[page as usize / 64], 1 << (page % 64));
            if is_private { *word |= bit } else { *word &= !bit }
        }
        let mut at = pages.end as usize / 64 + 1;
        while at < self.0.len() && self.0[at] == 0 {
            at += 1;
        }
        at as u64 * 64
    }
}

/// Pages that lie nowhere near each other, one after the other.
fn places(conversions: u64) -> impl Iterator<Item = u64> {
    (1..=conversions).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 34)
}

/// Conversions one after the other, of a guest that was all shared; each stays, or is undone before the next.
fn convert(map: &mut dyn Map, conversions: u64, is_undone: bool) {
    let before = ALLOCATIONS.load(Relaxed);
    let started = Instant::now();
    for page in places(conversions) {
        black_box(map.convert(page..page + 1, true));
        if is_undone {
            black_box(map.convert(page..page + 1, false));
        }
    }
    let ns = started.elapsed().as_nanos();
    println!("conversions {conversions} ns {ns} allocations {}", ALLOCATIONS.load(Relaxed) - before);
}

/// What the heap holds of a map of a guest whose memory is private.
fn fill<M: Map>(make: impl Fn() -> M, what: &str) {
    let before = HELD.load(Relaxed);
    let mut map = make();
    if what == "alternating" {
        for page in (0..SOME).step_by(2) {
            map.convert(page..page + 1, true);
        }
    } else {
        // As a PC has it: a hole below 4 GiB, and the rest above.
        map.convert(0..3 << 18, true);
        map.convert(1 << 20..PAGES, true);
    }
    println!("pages {SOME} bytes {} allocations 0", HELD.load(Relaxed) - before + size_of::<M>() as u64);
}

fn run<M: Map>(make: impl Fn() -> M, what: &str, conversions: u64) {
    match what {
        "uniform" | "alternating" => fill(make, what),
        _ => convert(&mut make(), conversions, what == "undo"),
    }
}

fn main() {
    // `cargo test --benches` and its like ask for nothing, and want to know only that it runs.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |at: usize| arguments.get(at).map_or("", String::as_str);
    let (what, conversions) = (argument(1), argument(2).parse().unwrap_or(8));
    match argument(0) {
        "intervals" => run(Other::<Intervals>::default, what, conversions),
        "roaring" => run(Other::<Roaring>::default, what, conversions),
        "scan" => run(Scan::default, what, conversions),
        _ => run(|| Ours(VisibilityMap::default()), what, conversions),
    }
}
