//! Page levels: the sizes of page that x86-64's page tables have, of a host and of a guest alike.
//!
//! Plain arithmetic. Which level some memory may have, and why not a larger one, is for others.

use crate::range::{PAGE, Range};

/// A size of page. The order is that of their sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// 4 KiB.
    K4 = 0,
    /// 2 MiB.
    M2 = 1,
    /// 1 GiB.
    G1 = 2,
}

impl Level {
    /// From the largest down.
    pub const DOWNWARDS: [Level; 3] = [Level::G1, Level::M2, Level::K4];

    /// Bytes in a page.
    pub fn bytes(self) -> u64 {
        match self {
            Level::K4 => PAGE,
            Level::M2 => 2 << 20,
            Level::G1 => 1 << 30,
        }
    }

    /// The largest that is no larger than `bytes`, at least 4 KiB.
    pub fn within(bytes: u64) -> Self {
        Self::DOWNWARDS.into_iter().find(|level| level.bytes() <= bytes).unwrap_or(Level::K4)
    }

    /// Whether an address or size is a multiple of it.
    pub fn is_aligned(self, value: u64) -> bool {
        value & (self.bytes() - 1) == 0
    }

    /// What of `value` is beyond a multiple of it.
    pub fn remainder(self, value: u64) -> u64 {
        value & (self.bytes() - 1)
    }

    /// The aligned page that holds `at`; `None` for the very last one of all, whose end no number tells.
    pub fn frame(self, at: u64) -> Option<Range> {
        Range::new(at - self.remainder(at), self.bytes())
    }

    /// Whether an aligned page of it lies in `range`.
    pub fn fits(self, range: Range) -> bool {
        let first = range.start.checked_next_multiple_of(self.bytes());
        first.and_then(|first| first.checked_add(self.bytes())).is_some_and(|end| end <= range.end)
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Level::K4 => "4 KiB",
            Level::M2 => "2 MiB",
            Level::G1 => "1 GiB",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_fits_where_an_aligned_one_lies_in_the_range() {
        let fits = |level: Level, start, end| level.fits(Range { start, end });
        assert!(fits(Level::M2, 0x20_0000, 0x40_0000));
        assert!(!fits(Level::M2, 0x1f_f000, 0x3f_f000));
        assert!(fits(Level::M2, 0x1f_f000, 0x40_0000));
        assert!(!fits(Level::M2, u64::MAX - 0x1000, u64::MAX));
        assert!(fits(Level::K4, 0x1000, 0x2000));
    }

    #[test]
    fn the_level_within_a_size_is_the_largest() {
        for (bytes, level) in [
            (0, Level::K4),
            (0x1f_ffff, Level::K4),
            (0x20_0000, Level::M2),
            (0x3fff_ffff, Level::M2),
            (1 << 30, Level::G1),
            (u64::MAX, Level::G1),
        ] {
            assert_eq!(Level::within(bytes), level);
        }
    }

    #[test]
    fn the_last_frame_of_all_has_no_end() {
        assert_eq!(Level::M2.frame(u64::MAX), None);
        assert_eq!(Level::M2.frame(0x20_1000), Range::new(0x20_0000, 0x20_0000));
    }
}
