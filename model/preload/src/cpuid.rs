//! KVM_GET_SUPPORTED_CPUID: what this processor says of itself.
//!
//! A program hands it on to its vCPUs, and may look at its own in it; no guest ever sees it. Of what KVM leaves out, only the tiles
//! of AMX are left out here: their state makes the area of XSAVE larger than programs expect that have not asked for it.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use std::arch::x86_64::{__cpuid_count, CpuidResult};

/// The leaf of features that has AMX, with its bits in EDX.
const FEATURES: u32 = 7;
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// The leaf of what XSAVE saves, which AMX has two parts of.
const SAVED: u32 = 0xd;
const AMX_PARTS: std::ops::RangeInclusive<u32> = 17..=18;
/// What XSAVE saves in any case: the parts of old, and a header.
const LEAST_SAVED: u32 = 576;

/// The most subleafs of a leaf that are asked for.
const MOST_SUBLEAFS: u32 = 64;

/// An entry for each leaf that there is.
pub fn supported() -> Vec<kvm_cpuid_entry2> {
    [0, 0x8000_0000]
        .into_iter()
        .flat_map(|first| (first..=leaf(first, 0).eax.min(first + 0x40)).flat_map(entries))
        .collect()
}

fn entries(function: u32) -> Vec<kvm_cpuid_entry2> {
    let more = match function {
        4 | 0x8000_001d => |result: &CpuidResult| result.eax & 0x1f != 0,
        0xb | 0x1f => |result: &CpuidResult| result.ecx & 0xff00 != 0,
        FEATURES | SAVED | 0x14 => |_: &CpuidResult| true,
        _ => return vec![entry(function, 0, 0)],
    };
    let last = if matches!(function, FEATURES | 0x14) {
        leaf(function, 0).eax.min(MOST_SUBLEAFS)
    } else {
        MOST_SUBLEAFS - 1
    };
    (0..=last)
        .take_while(|index| more(&leaf(function, *index)))
        .map(|index| entry(function, index, KVM_CPUID_FLAG_SIGNIFCANT_INDEX))
        .filter(|entry| function != SAVED || entry.eax | entry.ebx | entry.ecx | entry.edx != 0)
        .filter(|entry| function != SAVED || !AMX_PARTS.contains(&entry.index))
        .map(without_amx)
        .collect()
}

fn without_amx(entry: kvm_cpuid_entry2) -> kvm_cpuid_entry2 {
    match (entry.function, entry.index) {
        (FEATURES, 0) => kvm_cpuid_entry2 { edx: entry.edx & !AMX, ..entry },
        (SAVED, 0) => {
            let parts = entry.eax & !AMX_PARTS.fold(0, |bits, part| bits | 1 << part);
            let size = size_of_area(parts);
            kvm_cpuid_entry2 { eax: parts, ebx: size, ecx: size, ..entry }
        }
        _ => entry,
    }
}

/// How large XSAVE's area is that has these parts.
fn size_of_area(parts: u32) -> u32 {
    let end_of = |part: u32| {
        let CpuidResult { eax: size, ebx: offset, .. } = leaf(SAVED, part);
        offset + size
    };
    (2..u32::BITS).filter(|part| parts & 1 << part != 0).map(end_of).fold(LEAST_SAVED, u32::max)
}

fn entry(function: u32, index: u32, flags: u32) -> kvm_cpuid_entry2 {
    let CpuidResult { eax, ebx, ecx, edx } = leaf(function, index);
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

/// A leaf of CPUID.
// Newer compilers know that it is safe.
#[allow(unused_unsafe)]
pub fn leaf(function: u32, index: u32) -> CpuidResult {
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { __cpuid_count(function, index) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_width_of_addresses_is_among_it_and_all_fits_what_programs_make_room_for() {
        let supported = supported();
        assert!(supported.iter().any(|entry| entry.function == 0x8000_0008 && entry.eax & 0xff >= 32));
        assert!(supported.len() <= 256, "{}", supported.len());
    }
}
