//! What a vCPU's registers were set to: kept and given back, and not used.
//!
//! A program that sets memory up sets registers too, and reads them first. No guest is executed, so nothing hangs on what they
//! are, with few exceptions that have functions here: the answer of a hypercall, the mode in which it was made, and whether the
//! vCPU is in SMM. Values are those of a vCPU after reset, as KVM makes it.

use crate::ioctls::*;
use crate::user;
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use std::collections::BTreeMap;
use std::mem::{offset_of, size_of};

/// A set of registers: how it is got and set, how large it is, and what it is at first.
struct Set {
    get: u32,
    set: u32,
    size: usize,
    reset: fn(&mut [u8]),
}

const SETS: [Set; 8] = [
    Set { get: KVM_GET_REGS, set: KVM_SET_REGS, size: size_of::<kvm_regs>(), reset: reset_regs },
    Set { get: KVM_GET_SREGS, set: KVM_SET_SREGS, size: size_of::<kvm_sregs>(), reset: reset_sregs },
    Set { get: KVM_GET_FPU, set: KVM_SET_FPU, size: size_of::<kvm_fpu>(), reset: reset_fpu },
    Set { get: KVM_GET_XSAVE, set: KVM_SET_XSAVE, size: 4096, reset: reset_xsave },
    Set { get: KVM_GET_XCRS, set: KVM_SET_XCRS, size: size_of::<kvm_xcrs>(), reset: reset_xcrs },
    Set {
        get: KVM_GET_DEBUGREGS,
        set: KVM_SET_DEBUGREGS,
        size: size_of::<kvm_debugregs>(),
        reset: reset_debugregs,
    },
    Set { get: KVM_GET_MP_STATE, set: KVM_SET_MP_STATE, size: size_of::<kvm_mp_state>(), reset: |_| () },
    Set {
        get: KVM_GET_VCPU_EVENTS,
        set: KVM_SET_VCPU_EVENTS,
        size: size_of::<kvm_vcpu_events>(),
        reset: reset_events,
    },
];

/// `MSR_EFER`.
const EFER: u32 = 0xc000_0080;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// `KVM_MMU_EFER_ROLE_BITS`: long mode, and that pages can be kept from being executed.
const EFER_OF_ROLE: u64 = 1 << 8 | 1 << 11;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// The registers that a program is to save and restore: those that every processor of x86-64 has, of KVM's list.
#[rustfmt::skip]
const SAVED_MSRS: [u32; 14] = [
    0x10,        // TSC
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0x277,       // PAT
    0x1d9,       // DEBUGCTL
    EFER,
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0100, // FS_BASE
    0xc000_0101, // GS_BASE
    0xc000_0102, // KERNEL_GS_BASE
];
/// The most entries that KVM takes of one request.
const MOST_MSRS: u32 = 256;
const MOST_CPUID_ENTRIES: u32 = 256;
const CR0_AT_RESET: u64 = 0x6000_0010;

/// A vCPU's registers.
#[derive(Default)]
pub struct Registers {
    sets: BTreeMap<u32, Vec<u8>>,
    msrs: BTreeMap<u32, u64>,
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// What setting registers may have changed of how the guest's memory is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Changed {
    /// Nothing.
    Nothing,
    /// The vCPU is in SMM from now on, or is not.
    Smm(bool),
    /// What the tables' entries mean: KVM takes its root anew.
    Root,
}

impl Registers {
    /// Answers a request that gets or sets registers; none if it is another one. Of a guest whose state is kept from the host,
    /// KVM gives and takes none.
    pub fn ioctl(&mut self, request: u32, argument: u64, is_kept: bool) -> Option<Result<Changed>> {
        let set = SETS.iter().find(|set| set.get == request || set.set == request)?;
        if is_kept && set.get != KVM_GET_MP_STATE {
            return Some(Err(Errno::EINVAL));
        }
        if set.get == request {
            return Some(user::write_all(argument, self.of(set)).map(|()| Changed::Nothing));
        }
        let mut bytes = vec![0u8; set.size];
        if let Err(error) = user::read_all(argument, &mut bytes) {
            return Some(Err(error));
        }
        let paging = self.paging();
        let smm = if request == KVM_SET_VCPU_EVENTS { self.smm_of(&mut bytes) } else { Changed::Nothing };
        *self.of(set) = bytes;
        let is_root_renewed = request == KVM_SET_SREGS && (self.paging() != paging || self.has_pae_paging());
        let changed = if is_root_renewed { Changed::Root } else { smm };
        Some(Ok(changed))
    }

    /// EFER.
    pub fn efer(&mut self) -> u64 {
        self.system_register(offset_of!(kvm_sregs, efer))
    }

    fn system_register(&mut self, at: usize) -> u64 {
        u64::from_le_bytes(self.of(&SETS[1])[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Of what the guest's paging hangs on: KVM takes its root anew where any of it changes (`__set_sregs`).
    fn paging(&mut self) -> [u64; 4] {
        [
            offset_of!(kvm_sregs, cr0),
            offset_of!(kvm_sregs, cr3),
            offset_of!(kvm_sregs, cr4),
            offset_of!(kvm_sregs, efer),
        ]
        .map(|at| self.system_register(at))
    }

    /// Paging by tables of three levels, whose highest entries KVM reads when it is set.
    fn has_pae_paging(&mut self) -> bool {
        let [cr0, _, cr4, efer] = self.paging();
        cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LONG_MODE_ACTIVE == 0
    }

    /// RAX, which has the answer of a call.
    pub fn set_rax(&mut self, value: u64) {
        let at = offset_of!(kvm_regs, rax);
        self.of(&SETS[0])[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Whether the guest executes code of 64 bits.
    pub fn is_in_long_mode(&mut self) -> bool {
        let efer = self.efer();
        let sregs = self.of(&SETS[1]);
        efer & EFER_LONG_MODE_ACTIVE != 0
            && sregs[offset_of!(kvm_sregs, cs) + offset_of!(kvm_segment, l)] != 0
    }

    /// KVM_SET_MSRS: answers how many were set, which is all of them.
    pub fn set_msrs(&mut self, argument: u64) -> Result<(i64, Changed)> {
        let mut changed = Changed::Nothing;
        let entries = msrs(argument)?;
        for entry in &entries {
            if entry.index != EFER {
                self.msrs.insert(entry.index, entry.data);
                continue;
            }
            if (self.efer() ^ entry.data) & EFER_OF_ROLE != 0 {
                changed = Changed::Root;
            }
            // Whether long mode is active is none of this register's to set here.
            let active = EFER_LONG_MODE_ACTIVE;
            let efer = entry.data & !active | self.efer() & active;
            let at = offset_of!(kvm_sregs, efer);
            self.of(&SETS[1])[at..at + 8].copy_from_slice(&efer.to_le_bytes());
        }
        Ok((entries.len() as i64, changed))
    }

    /// KVM_GET_MSRS: those that were not set are zero.
    pub fn get_msrs(&mut self, argument: u64) -> Result<i64> {
        let mut entries = msrs(argument)?;
        for entry in &mut entries {
            entry.data = match entry.index {
                EFER => self.efer(),
                index => self.msrs.get(&index).copied().unwrap_or(0),
            };
        }
        user::write_all(argument + size_of::<kvm_msrs>() as u64, &entries)?;
        Ok(entries.len() as i64)
    }

    /// KVM_SET_CPUID2.
    pub fn set_cpuid(&mut self, argument: u64) -> Result<()> {
        let entries = user::read::<u32>(argument)?;
        if entries > MOST_CPUID_ENTRIES {
            return Err(Errno::E2BIG);
        }
        let mut cpuid = vec![kvm_cpuid_entry2::default(); entries as usize];
        user::read_all(argument + CPUID_ENTRIES_AT, &mut cpuid)?;
        self.cpuid = cpuid;
        Ok(())
    }

    /// KVM_GET_CPUID2.
    pub fn get_cpuid(&self, argument: u64) -> Result<()> {
        write_cpuid(argument, &self.cpuid)
    }

    fn of(&mut self, set: &Set) -> &mut Vec<u8> {
        self.sets.entry(set.get).or_insert_with(|| {
            let mut bytes = vec![0; set.size];
            (set.reset)(&mut bytes);
            bytes
        })
    }

    /// Whether the events put the vCPU into SMM, or out of it. What says only that is not kept.
    fn smm_of(&mut self, events: &mut [u8]) -> Changed {
        let at = offset_of!(kvm_vcpu_events, flags);
        let flags = u32::from_le_bytes(events[at..at + 4].try_into().expect("four bytes"));
        if flags & KVM_VCPUEVENT_VALID_SMM == 0 {
            return Changed::Nothing;
        }
        let smi = offset_of!(kvm_vcpu_events, smi);
        Changed::Smm(events[smi] != 0)
    }
}

const CPUID_ENTRIES_AT: u64 = size_of::<kvm_cpuid2>() as u64;

/// Writes entries of CPUID, and how many; E2BIG where there is no room for them.
pub fn write_cpuid(argument: u64, entries: &[kvm_cpuid_entry2]) -> Result<()> {
    let room = user::read::<u32>(argument)?;
    if (room as usize) < entries.len() {
        return Err(Errno::E2BIG);
    }
    user::write_all(argument + CPUID_ENTRIES_AT, entries)?;
    user::write(argument, &(entries.len() as u32))
}

/// KVM_GET_MSR_INDEX_LIST: how many, and which of them where there is room.
pub fn write_msr_list(argument: u64) -> Result<()> {
    let room = user::read::<u32>(argument)?;
    user::write(argument, &(SAVED_MSRS.len() as u32))?;
    if (room as usize) < SAVED_MSRS.len() {
        return Err(Errno::E2BIG);
    }
    user::write_all(argument + size_of::<u32>() as u64, &SAVED_MSRS)
}

fn msrs(argument: u64) -> Result<Vec<kvm_msr_entry>> {
    let entries = user::read::<u32>(argument)?;
    if entries >= MOST_MSRS {
        return Err(Errno::E2BIG);
    }
    let mut msrs = vec![kvm_msr_entry::default(); entries as usize];
    user::read_all(argument + size_of::<kvm_msrs>() as u64, &mut msrs)?;
    Ok(msrs)
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    bytes[at..at + N].copy_from_slice(&value);
}

fn reset_regs(bytes: &mut [u8]) {
    put(bytes, offset_of!(kvm_regs, rip), 0xfff0u64.to_le_bytes());
    put(bytes, offset_of!(kvm_regs, rflags), 2u64.to_le_bytes());
}

fn reset_sregs(bytes: &mut [u8]) {
    let data = [
        offset_of!(kvm_sregs, ds),
        offset_of!(kvm_sregs, es),
        offset_of!(kvm_sregs, fs),
        offset_of!(kvm_sregs, gs),
        offset_of!(kvm_sregs, ss),
    ];
    for at in data {
        reset_segment(&mut bytes[at..], 0, 0, 3);
    }
    reset_segment(&mut bytes[offset_of!(kvm_sregs, cs)..], 0xffff_0000, 0xf000, 11);
    for at in [offset_of!(kvm_sregs, gdt), offset_of!(kvm_sregs, idt)] {
        put(bytes, at + offset_of!(kvm_dtable, limit), 0xffffu16.to_le_bytes());
    }
    put(bytes, offset_of!(kvm_sregs, cr0), CR0_AT_RESET.to_le_bytes());
    put(bytes, offset_of!(kvm_sregs, apic_base), 0xfee0_0900u64.to_le_bytes());
}

fn reset_segment(bytes: &mut [u8], base: u64, selector: u16, kind: u8) {
    put(bytes, offset_of!(kvm_segment, base), base.to_le_bytes());
    put(bytes, offset_of!(kvm_segment, limit), 0xffffu32.to_le_bytes());
    put(bytes, offset_of!(kvm_segment, selector), selector.to_le_bytes());
    put(bytes, offset_of!(kvm_segment, type_), [kind]);
    put(bytes, offset_of!(kvm_segment, present), [1]);
    put(bytes, offset_of!(kvm_segment, s), [1]);
}

fn reset_fpu(bytes: &mut [u8]) {
    put(bytes, offset_of!(kvm_fpu, fcw), 0x37fu16.to_le_bytes());
    put(bytes, offset_of!(kvm_fpu, mxcsr), 0x1f80u32.to_le_bytes());
}

fn reset_xsave(bytes: &mut [u8]) {
    put(bytes, 0, 0x37fu16.to_le_bytes());
    put(bytes, 24, 0x1f80u32.to_le_bytes());
}

fn reset_xcrs(bytes: &mut [u8]) {
    put(bytes, offset_of!(kvm_xcrs, nr_xcrs), 1u32.to_le_bytes());
    put(bytes, offset_of!(kvm_xcrs, xcrs) + offset_of!(kvm_xcr, value), 1u64.to_le_bytes());
}

fn reset_debugregs(bytes: &mut [u8]) {
    put(bytes, offset_of!(kvm_debugregs, dr6), 0xffff_0ff0u64.to_le_bytes());
    put(bytes, offset_of!(kvm_debugregs, dr7), 0x400u64.to_le_bytes());
}

fn reset_events(bytes: &mut [u8]) {
    let flags = KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
    put(bytes, offset_of!(kvm_vcpu_events, flags), flags.to_le_bytes());
}
