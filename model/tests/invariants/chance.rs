//! Numbers that look random, the same for the same seed, and what they choose from: few places and sizes, so that things meet.

use kvmprep_model::units::PAGE_SIZE;

pub const HUGE: u64 = 2 << 20;
pub const MAPPED: u64 = 3 * HUGE;
/// Where slots begin: at huge pages, and a little after.
pub const BASES: [u64; 5] = [0, HUGE, 4 * HUGE, HUGE + 5 * PAGE_SIZE, 1 << 30];

/// Splitmix64.
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A few pages, or about a huge one.
    pub fn size(&mut self) -> u64 {
        let pages = 1 + self.below(8);
        let some = [pages * PAGE_SIZE, HUGE, 2 * HUGE, HUGE - PAGE_SIZE, HUGE + pages * PAGE_SIZE];
        self.of(&some)
    }

    pub fn gpa(&mut self) -> u64 {
        let page = self.of(&[0, 0, 1, 5, 511, 512, 513]) + self.below(3);
        self.of(&BASES) + page * PAGE_SIZE
    }
}
