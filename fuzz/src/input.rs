//! Makes values of the fuzzer's bytes, with a liking for edges.
//!
//! Where the bytes have run out all are zero, so what zero makes is the plain case.

use crate::heap::Passed;
use arbitrary::Unstructured;

/// Sizes that matter to page tables.
pub const PAGE: u64 = 1 << 12;
/// The next.
pub const HUGE: u64 = 2 << 20;
/// And the next.
pub const GIANT: u64 = 1 << 30;

/// The most bytes of a slot: 2^31 - 1 pages.
const MOST: u64 = ((1 << 31) - 1) * PAGE;

/// Where guest memory begins or ends in real machines, and where address widths do.
const PLACES: [u64; 20] = [
    0,
    0,
    HUGE,
    GIANT,
    4 * GIANT,
    1 << 20,
    0xe_0000,
    0xc_3000,
    3 * GIANT,
    0xfee0_0000,
    0xfeff_c000,
    0xfffe_0000,
    1 << 36,
    1 << 39,
    1 << 46,
    1 << 47,
    1 << 48,
    1 << 51,
    1 << 52,
    1 << 63,
];

/// The bytes that are left.
pub struct Input<'a>(Unstructured<'a>);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(Unstructured::new(bytes))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0.arbitrary().unwrap_or_default()
    }

    /// A number below `n`, which is not 0 and at most 256.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.0.arbitrary::<u8>().unwrap_or_default()) % n
    }

    /// One time in `n`.
    pub fn rarely(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A number of 32 bits: one of the choices, or, rarely, any.
    pub fn code(&mut self, choices: &[u32]) -> u32 {
        if self.rarely(24) { self.number() as u32 } else { self.pick(choices) }
    }

    /// How a pointer is passed: rightly, but for a few.
    pub fn passed(&mut self) -> Passed {
        match self.below(128) {
            127 => Passed::Null,
            126 => Passed::Misaligned,
            _ => Passed::Right,
        }
    }

    /// A little more or less, or nothing.
    fn around(&mut self, value: u64) -> u64 {
        let shift = self.pick(&[
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            PAGE,
            HUGE,
            PAGE.wrapping_neg(),
            HUGE.wrapping_neg(),
            1,
            !0,
        ]);
        value.wrapping_add(shift)
    }

    /// Bytes in a slot or a range.
    pub fn size(&mut self) -> u64 {
        let unit = self.pick(&[PAGE, HUGE, PAGE, HUGE, GIANT]);
        let size = match self.below(16) {
            0..=12 => unit * (1 + self.below(16) as u64),
            13 => self.pick(&[0, MOST, MOST + PAGE, 0xc_3000, 1 << 40, 1 << 52, !0 - PAGE + 1]),
            14 => 1 << self.below(64),
            _ => self.number(),
        };
        self.around(size)
    }

    /// An address in a guest, or an offset in a file.
    pub fn place(&mut self) -> u64 {
        let unit = self.pick(&[PAGE, HUGE, GIANT]);
        let place = match self.below(16) {
            0..=13 => self.pick(&PLACES).wrapping_add(unit * self.below(16) as u64),
            14 => 0u64.wrapping_sub(unit * self.below(16) as u64),
            _ => self.number(),
        };
        self.around(place)
    }

    /// The size that a caller gives for a struct that has `whole` bytes: that, one of an older or a newer version, or
    /// anything.
    pub fn struct_size(&mut self, whole: usize) -> usize {
        match self.below(48) {
            0..=39 => whole,
            40..=42 => self.below(256),
            43 => whole.saturating_sub(1 + self.below(16)),
            44 => whole + 1 + self.below(128),
            45 => 4096 - self.below(3),
            46 => 4097 + self.below(16),
            _ => self.pick(&[0, usize::MAX, isize::MAX as usize, 1 << 32, 65536]),
        }
    }
}
