//! Makes programs of random operations, which mean something to each other and meet the edges of the kernel's rules.
//!
//! A program is made before it is run, from a seed alone: whoever makes it keeps a picture of what should be there by
//! then, so that most operations find something to work on. Whether the picture is right it does not matter: what is
//! refused is an outcome like another. There are few addresses, few slots and few pages, so that operations meet.

mod frames;
mod guest;
mod host;
mod logs;
mod private;
mod slots;

use fastrand::Rng;
use kvmprep_model::personality::VmType;

use crate::operation::{
    AREA_SIZE, AREAS, Backing, FRAME, FileReference, Operation, PAGE, POOL_PAGES, Program, Setting,
    ThpPolicy, VCPUS, area_of, area_start,
};

/// What a kernel has, so that programs are not made of what it refuses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Abilities {
    pub has_sw_protected: bool,
    /// KVM_CAP_MEMORY_ATTRIBUTES.
    pub has_attributes: bool,
    pub has_pre_fault: bool,
    pub has_region2: bool,
    pub has_guest_memfd: bool,
    /// KVM_CAP_GUEST_MEMFD_FLAGS.
    pub guest_memfd_flags: u64,
    pub has_smm: bool,
    /// Guests of guests, on AMD's processors.
    pub has_nested: bool,
    pub has_thp: bool,
    /// `mprotect` opens entries to be written though nobody has written by them. Before Linux 6.2 it opened those with the
    /// dirty bit alone, which the simulated host does not keep; and breaking up a huge page lost it.
    pub opens_clean_entries: bool,
}

#[cfg(test)]
impl Abilities {
    /// Those of a kernel that has everything.
    pub const ALL: Abilities = Abilities {
        has_sw_protected: true,
        has_attributes: true,
        has_pre_fault: true,
        has_region2: true,
        has_guest_memfd: true,
        guest_memfd_flags: 3,
        has_smm: true,
        has_nested: true,
        has_thp: true,
        opens_clean_entries: true,
    };
}

const MEM_LOG_DIRTY: u32 = 1;
const MEM_READONLY: u32 = 2;
const MEM_GUEST_MEMFD: u32 = 4;
const PRIVATE: u64 = 8;
/// Where programs put their slots: six huge frames.
const WINDOW: u64 = 1 << 30;
const WINDOW_FRAMES: u64 = 6;
const SLOTS: u32 = 4;
/// Frames of a page and of a huge page are told apart by these.
const EDGES: [u64; 8] = [0, PAGE, 2 * PAGE, FRAME / 2, FRAME - 2 * PAGE, FRAME - PAGE, 3 * PAGE, 257 * PAGE];

/// The program of this number among those of a seed.
pub fn program(seed: u64, number: u64, length: usize, abilities: &Abilities) -> Program {
    let mut rng = Rng::with_seed(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number);
    // The first numbers of generators that begin alike are alike.
    rng.u64(..);
    let is_protected = abilities.has_sw_protected && rng.u8(..3) != 0;
    let vm_type = if is_protected { VmType::SwProtected } else { VmType::Default };
    let thp = match rng.u8(..4) {
        0 => ThpPolicy::Always,
        1 => ThpPolicy::Never,
        _ => ThpPolicy::Advised,
    };
    let promised_elsewhere = if rng.u8(..12) == 0 { POOL_PAGES - rng.u64(..6) } else { 0 };
    let is_scarce = promised_elsewhere > 0;
    let mut picture = Picture { rng, abilities: *abilities, is_protected, is_scarce, ..Picture::empty() };
    while picture.operations.len() < length {
        picture.step();
    }
    picture.operations.truncate(length);
    Program { setting: Setting { vm_type, thp, promised_elsewhere }, operations: picture.operations }
}

#[derive(Clone, Copy)]
struct Mapping {
    start: u64,
    size: u64,
    backing: Backing,
}

#[derive(Clone, Copy)]
struct Slot {
    number: u32,
    flags: u32,
    gpa: u64,
    size: u64,
    hva: u64,
    file: FileReference,
    offset: u64,
}

impl Slot {
    /// Whether the process could have memory for all of it; one can be set where there can be none.
    fn is_within_an_area(&self) -> bool {
        area_of(self.hva).is_some_and(|area| self.size <= area_start(area) + AREA_SIZE - self.hva)
    }
}

#[derive(Clone, Copy)]
struct File {
    size: u64,
    flags: u64,
}

/// What should be there after the operations so far.
struct Picture {
    rng: Rng,
    abilities: Abilities,
    is_protected: bool,
    /// Whether huge pages are scarce.
    is_scarce: bool,
    operations: Vec<Operation>,
    mappings: [Option<Mapping>; AREAS],
    slots: Vec<Slot>,
    files: Vec<File>,
    /// Guest addresses that were of interest lately.
    recent: Vec<u64>,
    is_in_smm: [bool; VCPUS],
    has_child: bool,
}

impl Picture {
    fn empty() -> Self {
        Picture {
            rng: Rng::with_seed(0),
            abilities: Abilities {
                has_sw_protected: false,
                has_attributes: false,
                has_pre_fault: false,
                has_region2: false,
                has_guest_memfd: false,
                guest_memfd_flags: 0,
                has_smm: false,
                has_nested: false,
                has_thp: false,
                opens_clean_entries: false,
            },
            is_protected: false,
            is_scarce: false,
            operations: Vec::new(),
            mappings: [None; AREAS],
            slots: Vec::new(),
            files: Vec::new(),
            recent: Vec::new(),
            is_in_smm: [false; VCPUS],
            has_child: false,
        }
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.rng.u32(..n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.rng.usize(..from.len())])
    }

    fn push(&mut self, operation: Operation) {
        self.operations.push(operation);
    }

    fn step(&mut self) {
        if self.mappings.iter().all(Option::is_none) {
            return self.map();
        }
        if self.slots.is_empty() || self.one_in(12) {
            return self.create_slot();
        }
        match self.rng.u32(..100) {
            0..25 => self.touch(),
            25..39 => self.pre_fault(),
            39..46 => self.process_access(),
            46..60 => self.advise(),
            60..65 => self.change_slot(),
            65..66 => self.map(),
            66..71 => self.hole(),
            71..74 => self.dirty_log(),
            74..84 => self.attributes(),
            84..92 => self.file(),
            92..94 => self.protect(),
            94..96 => self.child(),
            96..97 => self.smm(),
            97..98 => self.unmap(),
            98..99 => self.quirk(),
            _ => self.capability(),
        }
    }

    fn pages(&mut self, most: u64) -> u64 {
        (1 + self.rng.u64(..most)) * PAGE
    }

    /// An offset below a huge page, most often where something begins or ends.
    fn edge(&mut self) -> u64 {
        match self.rng.u8(..4) {
            0 => self.rng.u64(..FRAME / PAGE) * PAGE,
            1 => EDGES[self.rng.usize(..EDGES.len())],
            _ => 0,
        }
    }

    /// A page of a range; most often the first or last, or one at the edge of a huge frame.
    fn place(&mut self, start: u64, size: u64) -> u64 {
        let last = start + size.saturating_sub(PAGE);
        let frame = (start + self.rng.u64(..size.max(1))) & !(FRAME - 1);
        let at = match self.rng.u8(..8) {
            0 => start,
            1 => last,
            2 | 3 => frame,
            4 => frame.wrapping_sub(PAGE),
            5 => frame + PAGE,
            _ => start + self.rng.u64(..size.max(PAGE) / PAGE) * PAGE,
        };
        at.clamp(start, last)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const ALL: Abilities = Abilities::ALL;

    #[test]
    fn a_seed_makes_the_same_program_each_time() {
        assert_eq!(program(1, 2, 50, &ALL), program(1, 2, 50, &ALL));
        assert_ne!(program(1, 2, 50, &ALL), program(1, 3, 50, &ALL));
        assert_ne!(program(1, 2, 50, &ALL), program(2, 2, 50, &ALL));
    }

    #[test]
    fn every_operation_comes_up() {
        let mut met: BTreeMap<&str, u32> = BTreeMap::new();
        for number in 0..200 {
            for operation in program(1, number, 60, &ALL).operations {
                *met.entry(operation.name()).or_default() += 1;
            }
        }
        // As many as there are kinds, with an advice counted as one.
        assert_eq!(met.len(), 35, "{met:?}");
        assert!(met.values().all(|count| *count >= 10), "{met:?}");
    }

    #[test]
    fn a_program_touches_its_areas_alone() {
        for number in 0..500 {
            for operation in program(3, number, 60, &ALL).operations {
                let (at, size) = match operation {
                    Operation::Map { at, size, .. }
                    | Operation::Unmap { at, size }
                    | Operation::Advise { at, size, .. }
                    | Operation::Protect { at, size, .. } => (at, size),
                    Operation::Store { at, .. } | Operation::Load { at } => (at, 4),
                    _ => continue,
                };
                let area = area_of(at).unwrap_or_else(|| panic!("{operation:x?} of program {number}"));
                assert!(size > 0 && at + size <= area_start(area) + AREA_SIZE, "{operation:?}");
            }
        }
    }
}
