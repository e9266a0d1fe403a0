//! A set of guest pages, exact and small whatever a guest makes of it.
//!
//! A radix tree over page numbers whose leaves are bitmaps. What is uniform, or uniform but for one run, has no node of its
//! own: it is two words in the node above. So a guest that is all of one kind costs nothing, one with a run here and there
//! a few words for each, one whose every other page differs a bit a page and a few hundredths more; and a change touches
//! one path. It knows nothing of what its pages have in common, nor of locks.

use crate::range::{PAGE, Range};

/// Page numbers have this many bits, since no processor's addresses have more than 52.
const PAGE_BITS: u32 = 40;
/// One past the last address that a set can hold.
pub const END: u64 = PAGE << PAGE_BITS;
/// A leaf is a bitmap of this many pages, in powers of two: 512 bytes of bits for 16 MiB of memory. Were it half of that, what
/// comes with a leaf would be a fifth of its bits.
const LEAF_SHIFT: u32 = 12;
const LEAF_WORDS: usize = 1 << (LEAF_SHIFT - 6);
/// A node has this many children, in powers of two.
const NODE_SHIFT: u32 = 4;
const CHILDREN: usize = 1 << NODE_SHIFT;
const _: () = assert!((PAGE_BITS - LEAF_SHIFT) % NODE_SHIFT == 0);

/// A run of its own is written in numbers of 32 bits.
const RUN_SHIFT: u32 = 32;
const _: () = assert!(size_of::<Tree>() == 16);

/// The set. Ranges end at [`END`] at most; a part of a page counts as the page.
#[derive(Clone, Debug)]
pub struct PageSet {
    root: Tree,
    /// How many pages the tree is for, in powers of two: as many as were ever needed. What is beyond is not in the set.
    shift: u32,
}

impl Default for PageSet {
    fn default() -> Self {
        Self { root: Tree::default(), shift: LEAF_SHIFT }
    }
}

/// Neighbouring pages that are all in the set, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The pages.
    pub range: Range,
    /// Whether they are in the set.
    pub is_in: bool,
}

/// What is known of an aligned stretch of pages.
#[derive(Clone, Debug)]
enum Tree {
    Uniform(bool),
    But(Run32),
    Node(Box<[Tree; CHILDREN]>),
    Leaf(Box<Leaf>),
}

impl Default for Tree {
    fn default() -> Self {
        Tree::Uniform(false)
    }
}

/// The one run of a stretch that is otherwise of the other kind. There are pages on both sides of the difference.
#[derive(Clone, Copy, Debug)]
struct Run32 {
    first: u32,
    last: u32,
    is_in: bool,
}

#[derive(Clone, Debug)]
struct Leaf {
    /// A bit a page, set where it is in the set.
    words: [u64; LEAF_WORDS],
    /// How many are set.
    held: u32,
}

/// Pages `[from, to)`, of the stretch that begins at 0; none where both are the same.
#[derive(Clone, Copy)]
struct Pages {
    from: u64,
    to: u64,
}

impl PageSet {
    /// Puts `range` in, or takes it out; returns how many bytes of it were not so before.
    pub fn set(&mut self, range: Range, is_in: bool) -> u64 {
        let pages = pages(range);
        if is_in {
            self.grow(pages.to);
        }
        let inside = Pages { to: pages.to.min(1 << self.shift), ..pages };
        if inside.is_empty() { 0 } else { self.root.set(self.shift, inside, is_in) * PAGE }
    }

    /// Makes the tree large enough for pages below `end`.
    fn grow(&mut self, end: u64) {
        while 1 << self.shift < end {
            self.shift += NODE_SHIFT;
            if !self.is_empty() {
                let mut children: Box<[Tree; CHILDREN]> = Box::default();
                children[0] = std::mem::take(&mut self.root);
                self.root = Tree::Node(children);
            }
        }
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        matches!(self.root, Tree::Uniform(false))
    }

    /// Whether it holds the page at `gpa`.
    pub fn holds(&self, gpa: u64) -> bool {
        let page = gpa / PAGE;
        page >> self.shift == 0 && self.root.at(self.shift, page)
    }

    /// The run that begins at `range`'s start, as far as `range` goes.
    pub fn run(&self, range: Range) -> Run {
        let (pages, size) = (pages(range), 1 << self.shift);
        let inside = Pages { to: pages.to.min(size), ..pages };
        if inside.is_empty() {
            return Run { range, is_in: false };
        }
        let is_in = self.root.at(self.shift, inside.from);
        let beyond = (is_in && pages.to > size).then_some(size);
        let other = self.root.first_other(self.shift, inside, is_in).or(beyond);
        Run { range: Range { start: range.start, end: other.map_or(range.end, |page| page * PAGE) }, is_in }
    }

    /// All runs of `range`, in order.
    pub fn runs(&self, range: Range) -> impl Iterator<Item = Run> + '_ {
        let next = move |run: &Run| Some(self.run(Range::between(run.range.end, range.end)?));
        std::iter::successors(Some(self.run(range)), next)
    }

    /// The first part of `range` that is in the set, or that is not.
    pub fn first(&self, range: Range, is_in: bool) -> Option<Range> {
        self.runs(range).take(2).find(|run| run.is_in == is_in).map(|run| run.range)
    }

    /// Bytes that it takes.
    pub fn footprint(&self) -> usize {
        size_of::<Self>() + self.root.footprint()
    }
}

fn pages(range: Range) -> Pages {
    let last = 1 << PAGE_BITS;
    let to = range.end.div_ceil(PAGE).min(last);
    Pages { from: (range.start / PAGE).min(to - 1), to }
}

impl Pages {
    const NONE: Self = Self { from: 0, to: 0 };

    fn is_empty(&self) -> bool {
        self.from >= self.to
    }

    fn size(&self) -> u64 {
        self.to - self.from
    }

    /// With `more`, unless that makes two runs.
    fn with(self, more: Self) -> Option<Self> {
        if self.is_empty() {
            return Some(more);
        }
        let touch = self.from <= more.to && more.from <= self.to;
        touch.then_some(Self { from: self.from.min(more.from), to: self.to.max(more.to) })
    }

    /// Without what it has of `less`, unless that makes two runs.
    fn without(self, less: Self) -> Option<Self> {
        if less.to <= self.from || self.to <= less.from {
            return Some(self);
        }
        match (less.from <= self.from, self.to <= less.to) {
            (true, true) => Some(Self::NONE),
            (true, false) => Some(Self { from: less.to, ..self }),
            (false, true) => Some(Self { to: less.from, ..self }),
            (false, false) => None,
        }
    }
}

impl Run32 {
    fn pages(&self) -> Pages {
        Pages { from: self.first.into(), to: u64::from(self.last) + 1 }
    }

    fn at(&self, page: u64) -> bool {
        let pages = self.pages();
        (pages.from <= page && page < pages.to) == self.is_in
    }

    /// The first of `pages` that is not of that kind.
    fn first_other(&self, pages: Pages, is_in: bool) -> Option<u64> {
        let run = self.pages();
        let next = if self.at(pages.from) != is_in {
            pages.from
        } else if pages.from < run.from {
            run.from
        } else {
            // Behind the run nothing changes any more.
            (pages.from < run.to).then_some(run.to)?
        };
        (next < pages.to).then_some(next)
    }
}

/// Which children, of `1 << below` pages each, have a part of `pages`, and which part.
fn parts(below: u32, pages: Pages) -> impl Iterator<Item = (usize, Pages)> {
    let size = 1u64 << below;
    (pages.from >> below..=(pages.to - 1) >> below).map(move |index| {
        let base = index * size;
        (index as usize, Pages { from: pages.from.max(base) - base, to: pages.to.min(base + size) - base })
    })
}

impl Tree {
    fn at(&self, shift: u32, page: u64) -> bool {
        match self {
            Tree::Uniform(is_in) => *is_in,
            Tree::But(run) => run.at(page),
            Tree::Leaf(leaf) => leaf.at(page),
            Tree::Node(children) => {
                let below = shift - NODE_SHIFT;
                children[(page >> below) as usize].at(below, page & ((1 << below) - 1))
            }
        }
    }

    /// Sets pages of a stretch of `1 << shift`; returns how many have changed.
    fn set(&mut self, shift: u32, pages: Pages, is_in: bool) -> u64 {
        let size = 1u64 << shift;
        if matches!(self, Tree::Uniform(already) if *already == is_in) {
            return 0;
        }
        if pages.from == 0 && pages.to == size {
            let changed = size - self.count(shift, is_in);
            *self = Tree::Uniform(is_in);
            return changed;
        }
        if let Some(changed) = self.set_run(shift, pages, is_in) {
            return changed;
        }
        let changed = match self.open(shift) {
            Tree::Leaf(leaf) => leaf.set(pages, is_in),
            Tree::Node(children) => {
                let below = shift - NODE_SHIFT;
                parts(below, pages).map(|(index, part)| children[index].set(below, part, is_in)).sum()
            }
            Tree::Uniform(_) | Tree::But(_) => 0,
        };
        self.close();
        changed
    }

    /// The pages that differ from all others of the stretch, which kind they are of; where it has neither node nor leaf.
    fn one_run(&self) -> Option<(Pages, bool)> {
        match self {
            Tree::Uniform(is_in) => Some((Pages::NONE, !is_in)),
            Tree::But(run) => Some((run.pages(), run.is_in)),
            Tree::Node(_) | Tree::Leaf(_) => None,
        }
    }

    /// Sets pages of a stretch in which no more than one run differs before and after; returns how many have changed.
    fn set_run(&mut self, shift: u32, pages: Pages, is_in: bool) -> Option<u64> {
        let (before, kind) = self.one_run().filter(|_| shift <= RUN_SHIFT)?;
        let after = if is_in == kind { before.with(pages) } else { before.without(pages) }?;
        *self = match after.size() {
            0 => Tree::Uniform(!kind),
            all if all == 1 << shift => Tree::Uniform(kind),
            _ => Tree::But(Run32 { first: after.from as u32, last: (after.to - 1) as u32, is_in: kind }),
        };
        Some(after.size().abs_diff(before.size()))
    }

    /// Gives a stretch a node or leaf of its own, so that any part of it can differ.
    fn open(&mut self, shift: u32) -> &mut Self {
        if let Some((run, kind)) = self.one_run() {
            *self = if shift == LEAF_SHIFT {
                Tree::Leaf(Box::new(Leaf::uniform(!kind)))
            } else {
                Tree::Node(Box::new(std::array::from_fn(|_| Tree::Uniform(!kind))))
            };
            if !run.is_empty() {
                self.set(shift, run, kind);
            }
        }
        self
    }

    /// Gives the node or leaf up where it is uniform again.
    fn close(&mut self) {
        let uniform = match self {
            Tree::Uniform(_) | Tree::But(_) => None,
            Tree::Leaf(leaf) => leaf.uniformity(),
            Tree::Node(children) => match children[0] {
                Tree::Uniform(first) => children
                    .iter()
                    .all(|child| matches!(child, Tree::Uniform(other) if *other == first))
                    .then_some(first),
                _ => None,
            },
        };
        if let Some(is_in) = uniform {
            *self = Tree::Uniform(is_in);
        }
    }

    /// How many pages are of that kind.
    fn count(&self, shift: u32, is_in: bool) -> u64 {
        match self {
            Tree::Uniform(of) => u64::from(*of == is_in) << shift,
            Tree::But(run) if run.is_in == is_in => run.pages().size(),
            Tree::But(run) => (1 << shift) - run.pages().size(),
            Tree::Node(children) => children.iter().map(|child| child.count(shift - NODE_SHIFT, is_in)).sum(),
            Tree::Leaf(leaf) => match is_in {
                true => leaf.held.into(),
                false => (1 << LEAF_SHIFT) - u64::from(leaf.held),
            },
        }
    }

    /// The first of `pages` that is not of that kind. What has a node or leaf holds both kinds, so where all of one is
    /// looked through, it is found there: this goes down twice at most.
    fn first_other(&self, shift: u32, pages: Pages, is_in: bool) -> Option<u64> {
        match self {
            Tree::Uniform(of) => (*of != is_in).then_some(pages.from),
            Tree::But(run) => run.first_other(pages, is_in),
            Tree::Leaf(leaf) => leaf.first_other(pages, is_in),
            Tree::Node(children) => {
                let below = shift - NODE_SHIFT;
                parts(below, pages).find_map(|(index, part)| {
                    let found = children[index].first_other(below, part, is_in)?;
                    Some(((index as u64) << below) + found)
                })
            }
        }
    }

    fn footprint(&self) -> usize {
        match self {
            Tree::Uniform(_) | Tree::But(_) => 0,
            Tree::Leaf(_) => size_of::<Leaf>(),
            Tree::Node(children) => {
                size_of_val(&**children) + children.iter().map(Tree::footprint).sum::<usize>()
            }
        }
    }
}

impl Leaf {
    fn uniform(is_in: bool) -> Self {
        if is_in {
            Self { words: [u64::MAX; LEAF_WORDS], held: 1 << LEAF_SHIFT }
        } else {
            Self { words: [0; LEAF_WORDS], held: 0 }
        }
    }

    fn uniformity(&self) -> Option<bool> {
        match self.held {
            0 => Some(false),
            n if n == 1 << LEAF_SHIFT => Some(true),
            _ => None,
        }
    }

    fn at(&self, page: u64) -> bool {
        self.words[page as usize / 64] >> (page % 64) & 1 != 0
    }

    fn set(&mut self, pages: Pages, is_in: bool) -> u64 {
        let mut changed = 0;
        for (index, mask) in masks(pages) {
            let word = &mut self.words[index];
            let before = *word;
            match is_in {
                true => *word |= mask,
                false => *word &= !mask,
            }
            changed += (before ^ *word).count_ones();
        }
        match is_in {
            true => self.held += changed,
            false => self.held -= changed,
        }
        changed.into()
    }

    fn first_other(&self, pages: Pages, is_in: bool) -> Option<u64> {
        let flip = if is_in { u64::MAX } else { 0 };
        masks(pages).find_map(|(index, mask)| {
            let others = (self.words[index] ^ flip) & mask;
            (others != 0).then(|| index as u64 * 64 + u64::from(others.trailing_zeros()))
        })
    }
}

/// Which words of a leaf hold bits of `pages`, and which bits.
fn masks(pages: Pages) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (pages.from / 64, (pages.to - 1) / 64);
    (first..=last).map(move |index| {
        let low = if index == first { u64::MAX << (pages.from % 64) } else { u64::MAX };
        let high = if index == last { u64::MAX >> (63 - (pages.to - 1) % 64) } else { u64::MAX };
        (index as usize, low & high)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TIB: u64 = 1 << 40;

    fn r(start: u64, end: u64) -> Range {
        Range::between(start, end).unwrap()
    }

    #[test]
    fn a_new_one_holds_nothing() {
        let set = PageSet::default();
        let all = r(0, 1 << 52);
        assert_eq!(set.runs(all).collect::<Vec<_>>(), [Run { range: all, is_in: false }]);
    }

    #[test]
    fn what_is_uniform_costs_next_to_nothing() {
        let mut set = PageSet::default();
        // As a machine has it: a hole below 4 GiB.
        set.set(r(0, 3 << 30), true);
        set.set(r(4 << 30, 4 * TIB + (1 << 30)), true);
        assert!(set.footprint() < 4096, "{} bytes", set.footprint());
    }

    #[test]
    fn the_worst_case_is_a_bit_a_page_and_a_tenth() {
        let mut set = PageSet::default();
        let guest = r(0, 16 << 30);
        for page in (0..guest.end / PAGE).step_by(2) {
            set.set(r(page * PAGE, (page + 1) * PAGE), true);
        }
        let bits = (guest.size() / PAGE / 8) as usize;
        assert!(set.footprint() <= bits + bits / 10, "{} for {bits}", set.footprint());
        set.set(guest, true);
        set.set(guest, false);
        assert_eq!(set.footprint(), PageSet::default().footprint(), "what is uniform again is given up");
    }

    #[test]
    fn a_run_that_grows_page_by_page_costs_no_more_than_one_that_was_set_at_once() {
        let (mut up, mut down) = (PageSet::default(), PageSet::default());
        for page in 0..2 << LEAF_SHIFT {
            up.set(r(page * PAGE, (page + 1) * PAGE), true);
            let page = (3 << LEAF_SHIFT) - 1 - page;
            down.set(r(page * PAGE, (page + 1) * PAGE), true);
            let at_most = size_of::<PageSet>() + size_of::<[Tree; CHILDREN]>();
            assert!(up.footprint().max(down.footprint()) <= at_most, "a leaf of its own");
        }
    }

    #[test]
    fn the_last_page_of_all_is_one_too() {
        let mut set = PageSet::default();
        let last = r((1 << 52) - PAGE, 1 << 52);
        assert_eq!(set.set(last, true), PAGE);
        assert!(set.holds(last.start) && set.run(last).is_in);
        assert_eq!(set.run(r(0, END)).range, r(0, last.start));
    }

    /// What is of one kind must not take more than its word: no question could go past it quickly.
    fn is_canonical(tree: &Tree, shift: u32) -> bool {
        let has_both = || [true, false].into_iter().all(|is_in| tree.count(shift, is_in) > 0);
        match tree {
            Tree::Uniform(_) => true,
            Tree::But(_) | Tree::Leaf(_) => has_both(),
            Tree::Node(children) => {
                has_both() && children.iter().all(|child| is_canonical(child, shift - NODE_SHIFT))
            }
        }
    }

    /// Pages that are looked at beside a plain array, from one of the places on.
    const PAGES: u64 = (1 << (LEAF_SHIFT + NODE_SHIFT)) + 256;
    /// The beginning; where a run of its own would need a 33rd bit, from either side; and the end.
    const PLACES: [u64; 3] = [0, (1 << RUN_SHIFT) - PAGES / 2, (1 << PAGE_BITS) - PAGES];

    /// Edges near those of words, leaves and nodes.
    fn page() -> impl Strategy<Value = u64> {
        let edges = prop::sample::select(vec![
            0,
            64,
            1 << LEAF_SHIFT,
            3 << LEAF_SHIFT,
            1 << (LEAF_SHIFT + NODE_SHIFT),
        ]);
        (edges, 0u64..140).prop_map(|(edge, more)| (edge + more).saturating_sub(70))
    }

    /// From one page to another, both included.
    fn part() -> impl Strategy<Value = (u64, u64)> {
        (page(), page()).prop_map(|(a, b)| (a.min(b), a.max(b) + 1))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn is_as_a_plain_array_is(
            place in prop::sample::select(PLACES.to_vec()),
            is_full in any::<bool>(),
            // Each change, and what is asked then.
            changes in prop::collection::vec((part(), any::<bool>(), part()), 1..40),
        ) {
            let (mut set, mut plain) = (PageSet::default(), vec![is_full; PAGES as usize]);
            if is_full {
                set.set(r(0, END), true);
            }
            let range = |(from, to)| r((place + from) * PAGE, (place + to) * PAGE);
            for ((from, to), is_in, (asked, end)) in changes {
                let part = &mut plain[from as usize..to as usize];
                let differing = part.iter().filter(|page| **page != is_in).count() as u64;
                prop_assert_eq!(set.set(range((from, to)), is_in), differing * PAGE);
                part.fill(is_in);
                prop_assert!(is_canonical(&set.root, set.shift));
                prop_assert_eq!(set.is_empty(), !is_full && !plain.contains(&true));
                let is_in = plain[asked as usize];
                let other = (asked..end).find(|page| plain[*page as usize] != is_in);
                let run = Run { range: range((asked, other.unwrap_or(end))), is_in };
                prop_assert_eq!(set.run(range((asked, end))), run);
                prop_assert_eq!(set.holds(run.range.start), is_in);
            }
            // Read in one go.
            let mut runs: Vec<Run> = Vec::new();
            for (page, is_in) in plain.iter().enumerate().map(|(page, is_in)| (page as u64, *is_in)) {
                match runs.last_mut().filter(|run| run.is_in == is_in) {
                    Some(run) => run.range.end += PAGE,
                    None => runs.push(Run { range: range((page, page + 1)), is_in }),
                }
            }
            prop_assert_eq!(set.runs(range((0, PAGES))).collect::<Vec<_>>(), runs);
            let beside = if is_full { (1 << set.shift) - PAGES } else { 0 };
            let count = plain.iter().filter(|page| **page).count() as u64 + beside;
            prop_assert_eq!(set.root.count(set.shift, true), count);
            prop_assert_eq!(set.root.count(set.shift, false), (1 << set.shift) - count);
        }
    }
}
