//! Frame numbers, levels and ranges.
//!
//! A guest frame number, a host frame number and a host address are types of their own, since a mistake between them is
//! the mistake that such code makes. Nothing here knows what a frame is used for.

use std::fmt;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// The power of two that a page is.
pub const PAGE_SHIFT: u32 = 12;

/// A guest frame number: a guest physical address without its offset in the page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Gfn(pub u64);

/// A host frame number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Pfn(pub u64);

/// A virtual address of the process that the VMM is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Hva(pub u64);

impl Gfn {
    /// The frame of an address.
    pub const fn of_gpa(gpa: u64) -> Self {
        Gfn(gpa >> PAGE_SHIFT)
    }

    /// The address at which it begins.
    pub const fn gpa(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The first frame of the page of this level that it lies in.
    pub const fn rounded_down(self, level: Level) -> Self {
        Gfn(self.0 & !(level.pages() - 1))
    }

    /// The frame so many pages further.
    pub const fn plus(self, pages: u64) -> Self {
        Gfn(self.0 + pages)
    }
}

impl Pfn {
    /// The frame so many pages further.
    pub const fn plus(self, pages: u64) -> Self {
        Pfn(self.0 + pages)
    }

    /// The first frame of the page of this level that it lies in.
    pub const fn rounded_down(self, level: Level) -> Self {
        Pfn(self.0 & !(level.pages() - 1))
    }
}

impl Hva {
    /// The address so many pages further.
    pub const fn plus_pages(self, pages: u64) -> Self {
        Hva(self.0.wrapping_add(pages << PAGE_SHIFT))
    }

    /// The number of its page.
    pub const fn page(self) -> u64 {
        self.0 >> PAGE_SHIFT
    }
}

/// How many bytes an access of the processor has. It lies at a multiple of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Width {
    /// A byte.
    One = 1,
    /// Two bytes.
    Two = 2,
    /// Four bytes.
    Four = 4,
    /// Eight bytes.
    #[default]
    Eight = 8,
}

impl Width {
    /// That of so many bytes, if there is one.
    pub const fn of_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            1 => Some(Width::One),
            2 => Some(Width::Two),
            4 => Some(Width::Four),
            8 => Some(Width::Eight),
            _ => None,
        }
    }

    /// How many bytes.
    pub const fn bytes(self) -> usize {
        self as usize
    }
}

/// The level of a page table, or of a page: 1 is 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// Pages of 4 KiB.
    pub const SMALL: Level = Level(1);
    /// Pages of 2 MiB.
    pub const HUGE: Level = Level(2);
    /// Pages of 1 GiB.
    pub const GIGANTIC: Level = Level(3);
    /// Root tables of four levels.
    pub const FOURTH: Level = Level(4);
    /// Root tables of five levels.
    pub const FIFTH: Level = Level(5);
    /// The levels that a page can have, the smallest first.
    pub const OF_PAGES: [Level; 3] = [Level::SMALL, Level::HUGE, Level::GIGANTIC];

    /// Level `number`, from 1 to 5.
    pub const fn new(number: u8) -> Self {
        assert!(1 <= number && number <= 5);
        Level(number)
    }

    /// Its number: 1 for pages of 4 KiB.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// How many pages of 4 KiB one of this level has.
    pub const fn pages(self) -> u64 {
        1 << ((self.0 as u32 - 1) * crate::mmu::INDEX_BITS)
    }

    /// The level below; there is none below pages of 4 KiB.
    pub const fn below(self) -> Self {
        Level::new(self.0 - 1)
    }

    /// The level above; there is none above the fifth.
    pub const fn above(self) -> Self {
        Level::new(self.0 + 1)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("4K"),
            2 => f.write_str("2M"),
            3 => f.write_str("1G"),
            _ => write!(f, "level {}", self.0),
        }
    }
}

/// Guest frames from `start` up to `end`, which is not of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GfnRange {
    /// The first.
    pub start: Gfn,
    /// The one after the last.
    pub end: Gfn,
}

impl GfnRange {
    /// Every frame that there can be.
    pub const ALL: GfnRange = GfnRange { start: Gfn(0), end: Gfn(1 << (64 - PAGE_SHIFT)) };

    /// `pages` frames from `start`.
    pub const fn new(start: Gfn, pages: u64) -> Self {
        GfnRange { start, end: Gfn(start.0 + pages) }
    }

    /// How many frames.
    pub const fn pages(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether it has none.
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }

    /// Whether a frame is of it.
    pub const fn contains(self, gfn: Gfn) -> bool {
        self.start.0 <= gfn.0 && gfn.0 < self.end.0
    }

    /// Whether all of another range is of it.
    pub const fn covers(self, other: GfnRange) -> bool {
        self.start.0 <= other.start.0 && other.end.0 <= self.end.0
    }

    /// The frames of both, if any.
    pub fn intersection(self, other: GfnRange) -> Option<GfnRange> {
        let both = GfnRange { start: self.start.max(other.start), end: self.end.min(other.end) };
        (!both.is_empty()).then_some(both)
    }

    /// The page of this level around a frame.
    pub const fn of_page(gfn: Gfn, level: Level) -> Self {
        GfnRange::new(gfn.rounded_down(level), level.pages())
    }
}

/// What an access, or a guest frame, is: seen by the host or not.
///
/// Never to be confused with [`Mirroring`](crate::mmu::Mirroring), which is a property of page tables. A private access of
/// an SNP guest goes through a table that mirrors nothing, and a zap has no access at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privacy {
    /// Seen by the host.
    Shared,
    /// Not seen by the host.
    Private,
}
