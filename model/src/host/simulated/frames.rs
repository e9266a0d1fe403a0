//! The machine's frames: their contents, who has them, and which are free.
//!
//! One word a frame is all its content. A freed frame's word is overwritten, so that whoever still reads it is found out.
//! Frame 0 is never given away.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::sync::plain::{Mutex, OnceLock};
use crate::units::{Level, Pfn};

/// What a frame holds that is free.
pub(super) const FREED: u64 = 0xf4ee_f4ee_f4ee_f4ee;

const CHUNK_BITS: u32 = 15;
const CHUNK: u64 = 1 << CHUNK_BITS;

/// What is known of a frame. Of a page of many frames the first one's counts are the page's.
pub(super) struct Frame {
    word: AtomicU64,
    /// How many frames of its page this process maps, and above them how many mappings children hold. One word, so that
    /// only one can be the last who lets go.
    users: AtomicU64,
    /// The level of the page that it is of; 0 while free.
    level: AtomicU32,
    exclusive: AtomicBool,
}

/// What one mapping of a child counts for in [`Frame::users`].
const CHILD: u64 = 1 << 32;

struct Allocator {
    next: u64,
    free: [Vec<u64>; 3],
}

pub(super) struct Frames {
    chunks: Box<[OnceLock<Box<[Frame]>>]>,
    limit: u64,
    allocator: Mutex<Allocator>,
    zero: Pfn,
    huge_zero: Pfn,
}

impl Frames {
    /// A machine with so many frames.
    pub fn new(limit: u64) -> Self {
        let chunks = (0..limit.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        let allocator = Mutex::new(Allocator { next: 1, free: [const { Vec::new() }; 3] });
        let mut frames = Frames { chunks, limit, allocator, zero: Pfn(0), huge_zero: Pfn(0) };
        frames.zero = frames.allocate(Level::SMALL).expect("a machine has room for the zero page");
        frames.huge_zero = frames.allocate(Level::HUGE).expect("a machine has room for the huge zero page");
        frames
    }

    pub fn zero(&self, level: Level) -> Pfn {
        if level == Level::SMALL { self.zero } else { self.huge_zero }
    }

    fn frame(&self, pfn: Pfn) -> &Frame {
        let chunk = self.chunks[(pfn.0 >> CHUNK_BITS) as usize].get_or_init(new_chunk);
        &chunk[(pfn.0 & (CHUNK - 1)) as usize]
    }

    pub fn load(&self, pfn: Pfn) -> u64 {
        self.frame(pfn).word.load(Ordering::Relaxed)
    }

    pub fn store(&self, pfn: Pfn, word: u64) {
        self.frame(pfn).word.store(word, Ordering::Relaxed);
    }

    pub fn change(&self, pfn: Pfn, change: impl Fn(u64) -> u64) {
        let word = &self.frame(pfn).word;
        // It never gives up.
        let _ = word.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |old| Some(change(old)));
    }

    /// A zeroed page of this size at a boundary of this size.
    pub fn allocate(&self, level: Level) -> Option<Pfn> {
        let first = self.allocator.lock().unwrap().take(level, self.limit)?;
        let pfn = Pfn(first);
        for frame in first..first + level.pages() {
            let frame = self.frame(Pfn(frame));
            frame.word.store(0, Ordering::Relaxed);
            frame.users.store(0, Ordering::Relaxed);
            frame.exclusive.store(false, Ordering::Relaxed);
            frame.level.store(u32::from(level.number()), Ordering::Relaxed);
        }
        Some(pfn)
    }

    /// Gives a page back, which nobody maps.
    pub fn free(&self, pfn: Pfn) {
        let level = self.level(pfn);
        assert_eq!(pfn, pfn.rounded_down(level), "a page is freed as a whole");
        for frame in pfn.0..pfn.0 + level.pages() {
            let frame = self.frame(Pfn(frame));
            frame.word.store(FREED, Ordering::Relaxed);
            frame.level.store(0, Ordering::Relaxed);
        }
        self.allocator.lock().unwrap().free[usize::from(level.number()) - 1].push(pfn.0);
    }

    /// The size that a frame's page was allocated with.
    pub fn level(&self, pfn: Pfn) -> Level {
        let level = self.frame(pfn).level.load(Ordering::Relaxed);
        assert_ne!(level, 0, "frame {:#x} is free", pfn.0);
        Level::new(level as u8)
    }

    /// The first frame of the page that a frame is of.
    pub fn head(&self, pfn: Pfn) -> Pfn {
        pfn.rounded_down(self.level(pfn))
    }

    pub fn copy(&self, from: Pfn, to: Pfn, level: Level) {
        for at in 0..level.pages() {
            self.store(to.plus(at), self.load(from.plus(at)));
        }
    }

    pub fn clear(&self, pfn: Pfn, level: Level) {
        for at in 0..level.pages() {
            self.store(pfn.plus(at), 0);
        }
    }

    fn users(&self, pfn: Pfn) -> &AtomicU64 {
        &self.frame(self.head(pfn)).users
    }

    /// Notes that the process maps so many more frames of a page.
    pub fn map(&self, pfn: Pfn, frames: u64) {
        self.users(pfn).fetch_add(frames, Ordering::AcqRel);
    }

    /// Notes that it maps so many fewer. True when nobody has the page any more.
    #[must_use]
    pub fn unmap(&self, pfn: Pfn, frames: u64) -> bool {
        self.users(pfn).fetch_sub(frames, Ordering::AcqRel) == frames
    }

    /// How many of a page's frames the process maps.
    pub fn mapped(&self, pfn: Pfn) -> u64 {
        self.users(pfn).load(Ordering::Acquire) % CHILD
    }

    /// Notes that a child holds a mapping of the page.
    pub fn lend(&self, pfn: Pfn) {
        self.users(pfn).fetch_add(CHILD, Ordering::AcqRel);
    }

    /// Notes that a child let go of one. True when nobody has the page any more.
    #[must_use]
    pub fn take_back(&self, pfn: Pfn) -> bool {
        self.users(pfn).fetch_sub(CHILD, Ordering::AcqRel) == CHILD
    }

    /// Whether children hold mappings of the page.
    pub fn is_lent(&self, pfn: Pfn) -> bool {
        self.users(pfn).load(Ordering::Acquire) >= CHILD
    }

    /// Whether the process is known to have this frame alone. What is mapped by one entry is asked by its first frame.
    pub fn is_exclusive(&self, pfn: Pfn) -> bool {
        self.frame(pfn).exclusive.load(Ordering::Relaxed)
    }

    pub fn set_exclusive(&self, pfn: Pfn, is_exclusive: bool) {
        self.frame(pfn).exclusive.store(is_exclusive, Ordering::Relaxed);
    }

    /// How many frames are in use, the zero pages left out.
    pub fn in_use(&self) -> u64 {
        let allocator = self.allocator.lock().unwrap();
        let free: u64 = Level::OF_PAGES
            .iter()
            .zip(&allocator.free)
            .map(|(level, free)| level.pages() * free.len() as u64)
            .sum();
        allocator.next - 1 - free - Level::SMALL.pages() - Level::HUGE.pages()
    }
}

fn new_chunk() -> Box<[Frame]> {
    let frame = |_| Frame {
        word: AtomicU64::new(FREED),
        users: AtomicU64::new(0),
        level: AtomicU32::new(0),
        exclusive: AtomicBool::new(false),
    };
    (0..CHUNK).map(frame).collect()
}

impl Allocator {
    fn take(&mut self, level: Level, limit: u64) -> Option<u64> {
        let list = usize::from(level.number()) - 1;
        if let Some(first) = self.free[list].pop() {
            return Some(first);
        }
        let first = self.next.next_multiple_of(level.pages());
        if first + level.pages() > limit {
            return self.break_up(level);
        }
        self.give_gap(first);
        self.next = first + level.pages();
        Some(first)
    }

    /// What lies before a boundary is free, in the largest pieces that fit.
    fn give_gap(&mut self, end: u64) {
        while self.next < end {
            let fits = |level: &&Level| self.next % level.pages() == 0 && self.next + level.pages() <= end;
            let level = Level::OF_PAGES.iter().rev().find(fits).expect("a small page fits everywhere");
            self.free[usize::from(level.number()) - 1].push(self.next);
            self.next += level.pages();
        }
    }

    /// The machine is full: a larger page that is free is cut.
    fn break_up(&mut self, level: Level) -> Option<u64> {
        if level == Level::GIGANTIC {
            return None;
        }
        let larger = self.take(level.above(), 0)?;
        let list = usize::from(level.number()) - 1;
        let pieces = level.above().pages() / level.pages();
        self.free[list].extend((1..pieces).rev().map(|piece| larger + piece * level.pages()));
        Some(larger)
    }
}
