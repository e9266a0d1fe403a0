//! What KVM tells a VMM before it makes a guest (KVM_TDX_CAPABILITIES), what it takes of that at KVM_TDX_INIT_VM, and what the
//! guest's CPUID has become of it (KVM_TDX_GET_CPUID).
//!
//! It is KVM's view of the module's table ([`config`]): less in places, and the width of addresses more, which KVM has as an
//! interface of its own. Whether what was chosen is possible the module says, not this.

use super::config::{self, Chosen, Registers};
use super::launch::MAX_CPUID_ENTRIES;
use super::module::Td;
use crate::confidential::User;
use crate::errno::{Errno, Result};

/// The attributes that KVM lets a guest have, where the module has them too.
pub const SUPPORTED_ATTRIBUTES: u64 = config::ATTRIBUTE_SEPT_VE_DISABLE & config::ALLOWED_ATTRIBUTES;
/// The state that a guest may have: KVM knows all of the module's.
pub const SUPPORTED_XFAM: u64 = config::ALLOWED_XFAM;
/// The hypercalls that KVM hands on to the VMM, of those about which a guest asks: `SetupEventNotifyInterrupt`.
const HANDED_ON: u64 = 1 << 1;

/// CPUID's leaf that has the width of a guest's addresses in bits 16 to 23 of EAX.
const ADDRESS_WIDTHS: u32 = 0x8000_0008;
const WIDTH_SHIFT: u32 = 16;
const WIDTH_MASK: u32 = 0xff << WIDTH_SHIFT;
/// The leaf of features with what KVM takes back: HLE and RTM in EBX, and WAITPKG in ECX.
const FEATURES: u32 = 7;
const TSX: u32 = 1 << 4 | 1 << 11;
const WAITPKG: u32 = 1 << 5;
/// The first of the leaves beyond the basic ones.
const EXTENDED: u32 = 0x8000_0000;
/// Of other leaves, and of more subleaves, the module cannot be asked.
const READABLE_LEAVES: u32 = EXTENDED | 0x7f;
const LAST_READABLE_INDEX: u32 = 0x7f;

/// `struct kvm_cpuid_entry2`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CpuidEntry {
    /// The leaf.
    pub function: u32,
    /// The subleaf.
    pub index: u32,
    /// It is of that subleaf alone (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
    pub is_of_index: bool,
    /// What it answers.
    pub registers: Registers,
}

impl CpuidEntry {
    /// The leaf by which a VMM says how wide the guest's addresses are.
    pub const fn of_address_width(bits: u8) -> Self {
        let registers = [(bits as u32) << WIDTH_SHIFT, 0, 0, 0];
        CpuidEntry { function: ADDRESS_WIDTHS, index: 0, is_of_index: false, registers }
    }

    fn has_what_kvm_takes_back(&self) -> bool {
        self.without_what_kvm_takes_back() != *self
    }

    fn without_what_kvm_takes_back(mut self) -> Self {
        if (self.function, self.index) == (FEATURES, 0) {
            self.registers[1] &= !TSX;
            self.registers[2] &= !WAITPKG;
        }
        self
    }
}

/// `struct kvm_tdx_capabilities`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Capabilities {
    /// Attributes that a guest may have.
    pub attributes: u64,
    /// State that may be saved for it.
    pub xfam: u64,
    /// The hypercalls that KVM hands on (`user_tdvmcallinfo_1_r11`).
    pub handed_on: u64,
    /// For how many entries there is room.
    pub room: u32,
    /// Bits of CPUID that the VMM chooses.
    pub cpuid: Vec<CpuidEntry>,
}

/// `struct kvm_cpuid2`, to be filled.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CpuidList {
    /// For how many entries there is room; how many there are.
    pub room: u32,
    /// What was filled in: nothing where the room is too small.
    pub entries: Vec<CpuidEntry>,
}

/// KVM_TDX_CAPABILITIES, at any time. A VMM whose room is too small is not told how much it should be.
pub fn get(flags: u32, argument: &mut User<Capabilities>) -> Result<()> {
    if flags != 0 {
        return Err(Errno::EINVAL);
    }
    let room = argument.copy_in()?.room;
    let cpuid: Vec<_> = supported_cpuid().collect();
    if (room as usize) < cpuid.len() {
        return Err(Errno::E2BIG);
    }
    let (attributes, xfam) = (SUPPORTED_ATTRIBUTES, SUPPORTED_XFAM);
    let room = cpuid.len() as u32;
    argument.copy_out(Capabilities { attributes, xfam, handed_on: HANDED_ON, room, cpuid })
}

/// The bits that the VMM chooses (`td_init_cpuid_entry2`). That of a leaf without subleaves is not said.
pub fn supported_cpuid() -> impl Iterator<Item = CpuidEntry> {
    config::configurable().map(|leaf| {
        let mut registers = leaf.configurable;
        if leaf.function == ADDRESS_WIDTHS {
            registers[0] |= WIDTH_MASK;
        }
        let index = leaf.index.unwrap_or(0);
        CpuidEntry { function: leaf.function, index, is_of_index: false, registers }
            .without_what_kvm_takes_back()
    })
}

/// How wide the guest's addresses are to be; none where that leaf is missing.
pub fn address_width(cpuid: &[CpuidEntry]) -> Option<u8> {
    find(cpuid, ADDRESS_WIDTHS, 0).map(|entry| (entry.registers[0] >> WIDTH_SHIFT) as u8)
}

/// What a VMM has chosen (`setup_tdparams_cpuids`). EINVAL where it names a leaf that cannot be chosen, or any twice, or what
/// KVM takes back.
pub fn chosen(cpuid: &[CpuidEntry]) -> Result<Chosen> {
    let mut chosen = Chosen::default();
    let mut taken = 0;
    for (leaf, values) in supported_cpuid().zip(&mut chosen) {
        let Some(entry) = find(cpuid, leaf.function, leaf.index) else { continue };
        if entry.has_what_kvm_takes_back() {
            return Err(Errno::EINVAL);
        }
        taken += 1;
        *values = entry.registers;
        if leaf.function == ADDRESS_WIDTHS {
            values[0] &= !WIDTH_MASK;
        }
    }
    if taken == cpuid.len() { Ok(chosen) } else { Err(Errno::EINVAL) }
}

/// The first that fits (`kvm_find_cpuid_entry2`).
fn find(cpuid: &[CpuidEntry], function: u32, index: u32) -> Option<&CpuidEntry> {
    cpuid.iter().find(|entry| entry.function == function && (!entry.is_of_index || entry.index == index))
}

/// KVM_TDX_GET_CPUID. How many entries there are is told in any case.
pub fn get_cpuid(td: &Td, argument: &mut User<CpuidList>) -> Result<()> {
    let room = argument.copy_in()?.room;
    let entries = entries_of(td)?;
    let count = entries.len() as u32;
    if room < count {
        argument.copy_out(CpuidList { room: count, entries: Vec::new() })?;
        return Err(Errno::E2BIG);
    }
    argument.copy_out(CpuidList { room: count, entries })
}

/// All that the module tells of a guest's CPUID, leaf after leaf up to those that it says are the last. Only without the first
/// ones it is an error that there is none.
fn entries_of(td: &Td) -> Result<Vec<CpuidEntry>> {
    let mut entries = Vec::new();
    for first in [0, EXTENDED] {
        let leaf = read_leaf(td, first, &mut entries);
        let last = leaf.ok_or(Errno::EIO)?.registers[0];
        for function in first + 1..=last {
            read_leaf(td, function, &mut entries);
        }
    }
    Ok(entries)
}

/// A leaf as a whole, or else its subleaves, up to the first that there is not. Answers the first that was read.
fn read_leaf(td: &Td, function: u32, entries: &mut Vec<CpuidEntry>) -> Option<CpuidEntry> {
    let before = entries.len();
    if function & !READABLE_LEAVES == 0 {
        let subleaves = (0..=LAST_READABLE_INDEX).map_while(|index| read(td, function, Some(index)));
        match read(td, function, None) {
            Some(entry) => entries.push(entry),
            None => entries.extend(subleaves),
        }
        entries.truncate(MAX_CPUID_ENTRIES);
    }
    entries.get(before).copied()
}

fn read(td: &Td, function: u32, index: Option<u32>) -> Option<CpuidEntry> {
    let mut registers = td.mng_rd_cpuid(function, index).ok()?;
    if function == ADDRESS_WIDTHS {
        // As wide as the shared bit, the highest, says.
        let width = td.shared_bit().gpa().trailing_zeros() + 1;
        registers[0] = registers[0] & !WIDTH_MASK | width << WIDTH_SHIFT;
    }
    Some(CpuidEntry { function, index: index.unwrap_or(0), is_of_index: index.is_some(), registers })
}
