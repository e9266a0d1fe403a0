//! What a guest of this module can be: the one table of attributes, of state that is saved (XFAM), and of CPUID.
//!
//! It has as little as a VMM can be tried with, since no guest executes anything that it could see of this: what KVM lets a
//! guest have, what every guest has, and one step beyond (AVX); of CPUID, what depends on the virtual machine (its topology, its
//! caches, the width of its addresses), the features that every guest has, and the three that KVM takes back (TSX and
//! WAITPKG). So each answer of the kernel's has something that makes it. Nothing here knows of KVM.

/// `SEPT_VE_DISABLE`, the attribute by which accesses to pending pages exit to KVM.
pub const ATTRIBUTE_SEPT_VE_DISABLE: u64 = 1 << 28;
/// `DEBUG` and `PKS`, which a module has as well and KVM does not let a guest have.
const ATTRIBUTES_NOT_OF_KVM: u64 = 1 | 1 << 30;
/// The attributes that a guest may have (`attributes_fixed0`).
pub const ALLOWED_ATTRIBUTES: u64 = ATTRIBUTE_SEPT_VE_DISABLE | ATTRIBUTES_NOT_OF_KVM;

/// The state of the x87 and of SSE, which every guest has (`xfam_fixed1`).
pub const REQUIRED_XFAM: u64 = 1 | 1 << 1;
/// The state of AVX.
pub const XFAM_AVX: u64 = 1 << 2;
/// The state that a guest may have (`xfam_fixed0`).
pub const ALLOWED_XFAM: u64 = REQUIRED_XFAM | XFAM_AVX;

/// What CPUID answers: EAX, EBX, ECX and EDX.
pub type Registers = [u32; 4];

/// A leaf of a guest's CPUID.
#[derive(Debug)]
pub struct Leaf {
    /// Its number.
    pub function: u32,
    /// The number of the subleaf, where there are any.
    pub index: Option<u32>,
    /// What is set in every guest.
    given: Registers,
    /// What is set as well where there is AVX.
    with_avx: Registers,
    /// What the VMM chooses.
    pub configurable: Registers,
}

const NOTHING: Registers = [0; 4];

const fn given(function: u32, given: Registers) -> Leaf {
    Leaf { function, index: None, given, with_avx: NOTHING, configurable: NOTHING }
}

const fn chosen(function: u32, index: u32, configurable: Registers) -> Leaf {
    Leaf { function, index: Some(index), given: NOTHING, with_avx: NOTHING, configurable }
}

/// All leaves that there are.
pub static LEAVES: [Leaf; 15] = [
    // The last leaf, and "GenuineIntel".
    given(0, [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
    Leaf {
        function: 1,
        index: None,
        // x2APIC, XSAVE, and that there is a hypervisor; what every 64-bit processor has.
        given: [0, 0, 1 | 1 << 13 | 1 << 21 | 1 << 26 | 1 << 31, 0x0789_bbff],
        // AVX, FMA and F16C.
        with_avx: [0, 0, 1 << 12 | 1 << 28 | 1 << 29, 0],
        // Family, model and stepping; how many numbers of processors there are; the deadline timer; hyperthreading.
        configurable: [0x0fff_3fff, 0x00ff_0000, 1 << 24, 1 << 28],
    },
    // Caches.
    chosen(4, 0, [u32::MAX; 4]),
    chosen(4, 1, [u32::MAX; 4]),
    chosen(4, 2, [u32::MAX; 4]),
    chosen(4, 3, [u32::MAX; 4]),
    Leaf {
        function: 7,
        index: Some(0),
        // FSGSBASE, SMEP and SMAP.
        given: [0, 1 | 1 << 7 | 1 << 20, 0, 0],
        // AVX2.
        with_avx: [0, 1 << 5, 0, 0],
        // BMI1 and BMI2, and TSX (HLE and RTM); WAITPKG.
        configurable: [0, 1 << 3 | 1 << 8 | 1 << 4 | 1 << 11, 1 << 5, 0],
    },
    Leaf {
        function: 0xd,
        index: Some(0),
        // What is saved, and how large that is: 576 bytes.
        given: [REQUIRED_XFAM as u32, 0x240, 0x240, 0],
        // 832 bytes.
        with_avx: [XFAM_AVX as u32, 0x100, 0x100, 0],
        configurable: NOTHING,
    },
    // Topology: threads and cores.
    chosen(0x1f, 0, [0x1f, 0xffff, 0xffff, 0]),
    chosen(0x1f, 1, [0x1f, 0xffff, 0xffff, 0]),
    // The last leaf of these.
    given(0x8000_0000, [0x8000_0008, 0, 0, 0]),
    // LAHF; SYSCALL, NX, and 64 bits.
    given(0x8000_0001, [0, 0, 1, 1 << 11 | 1 << 20 | 1 << 29]),
    // Lines of the second cache.
    given(0x8000_0006, [0, 0, 0x40, 0]),
    // A clock that does not stop.
    given(0x8000_0007, [0, 0, 0, 1 << 8]),
    Leaf {
        function: 0x8000_0008,
        index: None,
        // Addresses of 52 and 48 bits.
        given: [0x3034, 0, 0, 0],
        with_avx: NOTHING,
        // WBNOINVD.
        configurable: [0, 1 << 9, 0, 0],
    },
];

/// How many of them the VMM chooses something of.
pub const CONFIGURABLE: usize = 9;

/// What the VMM chose, of each leaf of [`configurable`], in that order.
pub type Chosen = [Registers; CONFIGURABLE];

/// The leaves of which the VMM chooses something (`cpuid_config_leaves`).
pub fn configurable() -> impl Iterator<Item = &'static Leaf> {
    LEAVES.iter().filter(|leaf| leaf.configurable != NOTHING)
}

/// Nothing was chosen that cannot be.
pub fn is_choice_allowed(chosen: &Chosen) -> bool {
    configurable().zip(chosen).all(|(leaf, registers)| {
        registers.iter().zip(leaf.configurable).all(|(value, mask)| value & !mask == 0)
    })
}

/// What CPUID answers to a guest; none where there is no such leaf.
pub fn answer(function: u32, index: Option<u32>, xfam: u64, chosen: &Chosen) -> Option<Registers> {
    let is_wanted = |leaf: &Leaf| leaf.function == function && leaf.index == index;
    let leaf = LEAVES.iter().find(|leaf| is_wanted(leaf))?;
    let chosen = configurable().position(is_wanted).map_or(NOTHING, |nth| chosen[nth]);
    let has_avx = xfam & XFAM_AVX != 0;
    Some(std::array::from_fn(|nth| {
        leaf.given[nth] | if has_avx { leaf.with_avx[nth] } else { 0 } | chosen[nth]
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bit_is_both_given_and_chosen() {
        assert_eq!(configurable().count(), CONFIGURABLE);
        for leaf in &LEAVES {
            for nth in 0..4 {
                let fixed = leaf.given[nth] | leaf.with_avx[nth];
                assert_eq!(fixed & leaf.configurable[nth], 0, "{leaf:x?}");
            }
        }
    }

    #[test]
    fn each_leaf_is_below_the_last_that_is_told() {
        let last = |first| answer(first, None, 0, &[NOTHING; CONFIGURABLE]).unwrap()[0];
        for leaf in &LEAVES {
            assert!(leaf.function <= last(leaf.function & 0x8000_0000), "{leaf:x?}");
        }
    }

    #[test]
    fn a_guest_has_what_was_chosen_and_avx_only_if_its_state_is_saved() {
        let mut chosen = [NOTHING; CONFIGURABLE];
        chosen[0] = [0x806f8, 0, 0, 0];
        assert!(is_choice_allowed(&chosen));
        let features = |xfam| answer(1, None, xfam, &chosen).unwrap();
        assert_eq!(features(REQUIRED_XFAM)[0], 0x806f8);
        assert_eq!(features(REQUIRED_XFAM)[2] & 1 << 28, 0);
        assert_ne!(features(ALLOWED_XFAM)[2] & 1 << 28, 0);
        assert_eq!(answer(0xd, Some(0), ALLOWED_XFAM, &chosen).unwrap()[..2], [7, 832]);
        assert_eq!(answer(4, None, REQUIRED_XFAM, &chosen), None, "it has subleaves");
        chosen[0][0] |= 1 << 31;
        assert!(!is_choice_allowed(&chosen));
    }
}
