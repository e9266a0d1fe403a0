//! Rules for a slot's alignment, beyond what KVM insists on: without them memory is taken and huge pages never come.
//!
//! Where each comes from:
//! - congruent: KVM gives a slot no page of a size modulo which its gpa and its hva differ (kvm_alloc_memslot_metadata,
//!   arch/x86/kvm/x86.c). Larger sizes than the backing has do not matter.
//! - size: what KVM's maintainer proposed for restricted memory (linux-arch, 2023-04-25): the offset into the guest_memfd
//!   is aligned to the largest page that the slot's size allows.
//! - slot: the looser form that he allowed: the largest page that the slot as a whole allows, its gpa included.
//! - kernel: the offset is aligned to 4 KiB; that is KVM's own rule today, and `check`'s to enforce.
//!
//! The first proposal of all, that the offset be aligned no less than the gpa, is not here: it refuses what is harmless,
//! a slot at 4 GiB with its memory at offset 2 GiB. A breach is told, and whether it is an error is for the caller.

use super::check::Change;
use super::host::Occasion;
use super::{Memslot, guest_memfd};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{Kernel, Region};
use crate::level::Level;
use crate::range::Range;

/// A rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rule {
    /// The hva, and what backs the slot, allow the pages that its gpa allows.
    #[default]
    Congruent,
    /// Only what KVM enforces.
    Kernel,
    /// The offset, by the slot's size.
    Size,
    /// The offset, by the slot's size and gpa.
    Slot,
}

/// A rule, and whether a breach is an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    /// The rule.
    pub rule: Rule,
    /// A breach is an error.
    pub strict: bool,
}

impl Demand {
    /// Refuses a breach, or a guest_memfd that does not do what is meant, if that is demanded, of a slot that is made or moved: what is there already may change its flags
    /// and go. The kernel is asked about the slot's memory only where the rule is about it.
    pub fn check(&self, kernel: &dyn Kernel, caps: &Caps, slot: &Memslot, change: Change) -> Result<()> {
        if !self.strict || !matches!(change, Change::Create | Change::Move) {
            return Ok(());
        }
        guest_memfd::check(kernel, caps, slot)?;
        let backing = match self.rule {
            Rule::Congruent => Occasion::now(kernel)?.kind(slot, slot.region.hva)?.largest,
            Rule::Kernel | Rule::Size | Rule::Slot => Level::K4,
        };
        let alignment = measure(self.rule, &slot.region, slot.has_guest_memfd(), backing);
        alignment.breach(&slot.region).map_or(Ok(()), |breach| Err(breach.into_error(&slot.region)))
    }
}

/// How a slot stands to a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// What the rule holds hva (congruent) or offset (size, slot) to.
    pub level: Level,
    /// The hva is in breach.
    pub hva_breach: bool,
    /// The offset is in breach.
    pub offset_breach: bool,
    /// The hva would be congruent with the gpa this many bytes higher, modulo the largest page that matters.
    pub hva_shift: u64,
    /// The offset would keep the rule this many bytes higher.
    pub offset_shift: u64,
}

/// The largest page of which an aligned one lies in the slot, and that its backing can give.
pub fn largest_useful(region: &Region, backing: Level) -> Level {
    let Some(range) = Range::new(region.gpa, region.size) else { return Level::K4 };
    Level::DOWNWARDS.into_iter().find(|level| *level <= backing && level.fits(range)).unwrap_or(Level::K4)
}

/// By how many bytes the hva would have to lie higher to be congruent modulo that page.
pub fn hva_shift(region: &Region, level: Level) -> u64 {
    level.remainder(region.gpa.wrapping_sub(region.hva))
}

/// Measures `region` by `rule`. `backing` is the largest page that what is mapped at its hva can give.
pub fn measure(rule: Rule, region: &Region, has_guest_memfd: bool, backing: Level) -> Alignment {
    let useful = largest_useful(region, backing);
    let shift = hva_shift(region, useful);
    let of_offset = |level: Level| {
        let shift = level.remainder(region.guest_memfd_offset.wrapping_neg());
        Alignment {
            level,
            hva_breach: false,
            offset_breach: has_guest_memfd && shift != 0,
            hva_shift: hva_shift(region, useful),
            offset_shift: if has_guest_memfd { shift } else { 0 },
        }
    };
    match rule {
        // A guest_memfd has 4 KiB pages: modulo these offset and gpa are always congruent.
        Rule::Congruent => Alignment {
            level: useful,
            hva_breach: shift != 0,
            offset_breach: false,
            hva_shift: shift,
            offset_shift: 0,
        },
        Rule::Kernel => of_offset(Level::K4),
        Rule::Size => of_offset(Level::within(region.size)),
        Rule::Slot => of_offset(slot_level(region)),
    }
}

/// The largest page that the slot's size and gpa allow.
fn slot_level(region: &Region) -> Level {
    let allows = |level: &Level| level.bytes() <= region.size && level.is_aligned(region.gpa);
    Level::DOWNWARDS.into_iter().find(allows).unwrap_or(Level::K4)
}

/// What breaks a rule, and what would keep it, in words.
#[derive(Clone, Debug)]
pub struct Breach {
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: String,
}

impl Alignment {
    /// What breaks the rule; `None` where nothing does.
    pub fn breach(&self, region: &Region) -> Option<Breach> {
        let level = self.level;
        if self.hva_breach {
            let (gpa, hva) = (region.gpa, region.hva);
            return Some(Breach {
                message: format!(
                    "gpa {gpa:#x} and hva {hva:#x} differ modulo {level}, so the memslot cannot have pages of that size"
                ),
                hint: hva_hint(region, level),
            });
        }
        self.offset_breach.then(|| Breach {
            message: format!(
                "guest_memfd offset {:#x} is not a multiple of {level}, which the rule holds it to",
                region.guest_memfd_offset
            ),
            hint: format!("use an offset {:#x} higher, or a smaller slot", self.offset_shift),
        })
    }
}

impl Breach {
    fn into_error(self, region: &Region) -> Error {
        let error = Error::invalid(Reason::MemslotMisaligned, self.message).hint(self.hint);
        let range = Range::new(region.gpa, region.size);
        Error { range, ..error.stage(Stage::Memslot).slot(region.slot) }
    }
}

/// What makes gpa and hva congruent, in words.
pub fn hva_hint(region: &Region, level: Level) -> String {
    let shift = hva_shift(region, level);
    format!(
        "map the memory {shift:#x} bytes higher, or {:#x} lower: hva % {:#x} must be {:#x}",
        level.bytes() - shift,
        level.bytes(),
        level.remainder(region.gpa)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 4 << 10;
    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;
    /// Where blocks of memory are mapped: QEMU aligns them to 2 MiB.
    const BLOCK: u64 = 0x7f00_0020_0000;

    fn region(gpa: u64, size: u64, hva: u64, offset: u64) -> Region {
        Region { slot: 0, flags: 4, gpa, size, hva, guest_memfd: 3, guest_memfd_offset: offset }
    }

    /// Whether each rule takes it: kernel, congruent, size, slot.
    fn verdicts(region: &Region, backing: Level) -> [bool; 4] {
        [Rule::Kernel, Rule::Congruent, Rule::Size, Rule::Slot]
            .map(|rule| measure(rule, region, true, backing).breach(region).is_none())
    }

    #[test]
    fn which_rule_takes_which_slot() {
        // gpa, size, hva, guest_memfd offset: kernel, congruent, size, slot
        for (gpa, size, hva, offset, expected) in [
            // QEMU's shapes, of a block at BLOCK with its offset in the file the same as in the block.
            (0, 2 * G, BLOCK, 0, [true, true, true, true]),
            (M, 2 * G - M, BLOCK + M, M, [true, true, false, true]),
            (4 * G, 2 * G, BLOCK + 2 * G, 2 * G, [true, true, true, true]),
            (4 * G, G, BLOCK + 3 * G, 3 * G, [true, true, true, true]),
            (4 * G, 512 * M, BLOCK + 3 * G, 3 * G, [true, true, true, true]),
            (0xe_0000, 0x2_0000, BLOCK + 0x10_0000, 0, [true, true, true, true]),
            (0xfffe_0000, 0x2_0000, BLOCK + 0x10_0000, 0, [true, true, true, true]),
            (0xc_0000, 0xc_3000, BLOCK + 0xc_0000, 0xc_0000, [true, true, true, true]),
            // An hva one page off.
            (4 * G, G, BLOCK + K, 0, [true, false, true, true]),
            // A slot without one whole aligned 2 MiB page has nothing to lose.
            (0x1f_f000, 2 * M, BLOCK, 0, [true, true, true, true]),
            // Offsets.
            (0, G, BLOCK, K, [true, true, false, false]),
            (0, G, BLOCK, 2 * M, [true, true, false, false]),
            (2 * M, G, BLOCK, 2 * M, [true, true, false, true]),
            (2 * M, G, BLOCK, K, [true, true, false, false]),
            (K, G, BLOCK + K, K, [true, true, false, true]),
            (K, 4 * K, BLOCK, 7 * K, [true, true, true, true]),
            (2 * M, 2 * M - K, BLOCK, K, [true, true, true, true]),
            (2 * M, 2 * M, BLOCK, K, [true, true, false, false]),
        ] {
            let region = region(gpa, size, hva, offset);
            assert_eq!(verdicts(&region, Level::M2), expected, "{region:x?}");
        }
    }

    #[test]
    fn the_backing_decides_how_congruent_is_congruent() {
        let odd_2m = region(4 * G, 2 * G, BLOCK, 0);
        for (backing, congruent) in [(Level::K4, true), (Level::M2, true), (Level::G1, false)] {
            assert_eq!(verdicts(&odd_2m, backing)[1], congruent, "{backing}");
        }
        let odd_4k = region(4 * G, 2 * G, BLOCK + K, 0);
        for (backing, congruent) in [(Level::K4, true), (Level::M2, false), (Level::G1, false)] {
            assert_eq!(verdicts(&odd_4k, backing)[1], congruent, "{backing}");
        }
    }

    /// What the first proposal was to say: the offset is aligned no less than the gpa.
    fn first_proposal(offset: u64, gpa: u64) -> bool {
        offset == 0 || (gpa != 0 && offset.trailing_zeros() >= gpa.trailing_zeros())
    }

    /// Its first coding: find-last-set, the highest bit, for alignment.
    fn first_coding(offset: u64, gpa: u64) -> bool {
        offset == 0 || (gpa != 0 && offset.leading_zeros() <= gpa.leading_zeros())
    }

    /// Its second: find-first-set, and the comparison turned round.
    fn second_coding(offset: u64, gpa: u64) -> bool {
        offset == 0 || (gpa != 0 && offset.trailing_zeros() <= gpa.trailing_zeros())
    }

    #[test]
    fn the_rules_tell_the_first_proposal_and_its_codings_apart() {
        // gpa, size, offset: proposal, first coding, second coding; size, slot
        for (gpa, size, offset, history, rules) in [
            // QEMU's memory above 4 GiB: the proposal and its first coding refuse what is harmless.
            (4 * G, 2 * G, 2 * G, [false, false, true], [true, true]),
            (4 * G, 2 * G, 3 * G, [false, false, true], [true, true]),
            // The second coding lets a page's offset pass for 4 GiB of huge pages, the first a larger odd one.
            (4 * G, G, K, [false, false, true], [false, false]),
            (4 * G, G, 4 * G + K, [false, true, true], [false, false]),
            // The proposal has it right; the second coding turns it round.
            (2 * M, 2 * M, 4 * M, [true, true, false], [true, true]),
            (K, G, G, [true, true, false], [true, true]),
            // gpa 0 with an offset, always refused; offset 0, always taken.
            (0, G, G, [false, false, false], [true, true]),
            (0, 2 * M, 2 * M, [false, false, false], [true, true]),
            (0, G, K, [false, false, false], [false, false]),
            (4 * G, G, 0, [true, true, true], [true, true]),
            (K, G, 0, [true, true, true], [true, true]),
        ] {
            let shape = region(gpa, size, BLOCK, offset);
            let [_, _, by_size, by_slot] = verdicts(&shape, Level::M2);
            assert_eq!([by_size, by_slot], rules, "{shape:x?}");
            let codings = [first_proposal, first_coding, second_coding].map(|rule| rule(offset, gpa));
            assert_eq!(codings, history, "gpa {gpa:#x} offset {offset:#x}");
        }
    }

    #[test]
    fn shifting_by_what_is_said_mends_the_breach() {
        for (gpa, hva) in [(4 * G, BLOCK + K), (4 * G + M, BLOCK), (5 * K + 4 * G, BLOCK + 9 * K)] {
            let mut region = region(gpa, 64 * M, hva, 0);
            let alignment = measure(Rule::Congruent, &region, true, Level::M2);
            assert!(alignment.hva_breach);
            region.hva += alignment.hva_shift;
            assert!(!measure(Rule::Congruent, &region, true, Level::M2).hva_breach);
        }
        let mut region = region(4 * G, G, BLOCK, 5 * K);
        region.guest_memfd_offset += measure(Rule::Size, &region, true, Level::M2).offset_shift;
        assert_eq!(region.guest_memfd_offset, G);
    }

    #[test]
    fn the_error_says_where_the_memory_would_have_to_be() {
        let region = region(4 * G + M, 64 * M, BLOCK + K, 0);
        let breach = measure(Rule::Congruent, &region, true, Level::M2).breach(&region).unwrap();
        let error = breach.into_error(&region);
        assert_eq!((error.errno, error.reason), (libc::EINVAL, Reason::MemslotMisaligned));
        assert_eq!(
            error.hint,
            "map the memory 0xff000 bytes higher, or 0x101000 lower: hva % 0x200000 must be 0x100000"
        );
    }
}
