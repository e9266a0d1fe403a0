//! A guest of the guest's, on AMD's processors: KVM is told of it as of one that was running where the VM came from.
//!
//! It is stopped before it has run, so nothing of it is there but what KVM's page tables depend on.

use std::os::fd::{OwnedFd, RawFd};

use anyhow::{Result, ensure};
use kvm_bindings::{
    KVM_STATE_NESTED_FORMAT_SVM, KVM_STATE_NESTED_GIF_SET, KVM_STATE_NESTED_GUEST_MODE, kvm_cpuid_entry2,
    kvm_cpuid2, kvm_nested_state, kvm_sregs,
};

use super::guest::{KVM_GET_SREGS, KVM_SET_SREGS};
use super::sys;

const KVM_GET_SUPPORTED_CPUID: u64 = sys::iowr::<kvm_cpuid2>(0x05);
const KVM_SET_CPUID2: u64 = sys::iow::<kvm_cpuid2>(0x90);
const KVM_SET_NESTED_STATE: u64 = sys::iow::<kvm_nested_state>(0xbf);

/// CPUID's leaf of AMD's features, with this one in ECX.
const FEATURES: u32 = 0x8000_0001;
const SVM: u32 = 1 << 2;
/// The leaf of that feature, with this of its own in EDX.
const SVM_FEATURES: u32 = 0x8000_000a;
const NESTED_PAGES: u32 = 1 << 0;
const EFER_SVME: u64 = 1 << 12;

/// `struct kvm_cpuid2` with entries.
#[repr(C)]
struct Cpuid<const N: usize> {
    header: kvm_cpuid2,
    entries: [kvm_cpuid_entry2; N],
}

impl<const N: usize> Cpuid<N> {
    fn new() -> Self {
        let header = kvm_cpuid2 { nent: N as u32, ..Default::default() };
        Cpuid { header, entries: [kvm_cpuid_entry2::default(); N] }
    }
}

/// What a guest has to have of it.
const NEEDED: [kvm_cpuid_entry2; 2] = [
    kvm_cpuid_entry2 { function: FEATURES, ecx: SVM, ..NO_FEATURE },
    kvm_cpuid_entry2 { function: SVM_FEATURES, edx: NESTED_PAGES, ..NO_FEATURE },
];
const NO_FEATURE: kvm_cpuid_entry2 =
    kvm_cpuid_entry2 { function: 0, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 0, edx: 0, padding: [0; 3] };

/// Whether KVM has such guests here.
pub fn is_had(kvm: &OwnedFd) -> bool {
    let mut cpuid = Cpuid::<256>::new();
    let got = sys::ioctl_with_more::<kvm_cpuid2, _>(kvm, KVM_GET_SUPPORTED_CPUID, &mut cpuid);
    let has = |needed: &kvm_cpuid_entry2| {
        cpuid.entries.iter().any(|entry| {
            entry.function == needed.function
                && entry.ecx & needed.ecx == needed.ecx
                && entry.edx & needed.edx == needed.edx
        })
    };
    got == 0 && NEEDED.iter().all(has)
}

/// Lets the vCPU's guest have guests.
pub fn allow(vcpu: &OwnedFd) -> Result<()> {
    let mut cpuid = Cpuid { entries: NEEDED, ..Cpuid::new() };
    let set = sys::ioctl_with_more::<kvm_cpuid2, _>(vcpu, KVM_SET_CPUID2, &mut cpuid);
    ensure!(set == 0, "KVM_SET_CPUID2: {set}");
    Ok(())
}

/// AMD's block that describes a guest, by its words of 8 bytes (AMD64 manual, volume 2, appendix B).
const VMCB_WORDS: usize = 512;
const INTERCEPTS: usize = 0x10 / 8;
const INTERCEPT_VMRUN: u64 = 1;
const ASID: usize = 0x58 / 8;
const PAGING: usize = 0x90 / 8;
const NESTED_PAGING: u64 = 1;
const NESTED_CR3: usize = 0xb0 / 8;
const EFER: usize = 0x4d0 / 8;
const CR0: usize = 0x558 / 8;
const CR0_PE_PG: u64 = 1 << 31 | 1;

/// Where a nested guest's tables begin: where no program has memory. KVM would protect it from being written.
const NO_MEMORY: u64 = 1 << 35;

#[repr(C)]
struct State {
    header: kvm_nested_state,
    vmcb: [u64; VMCB_WORDS],
}

impl State {
    fn new(flags: u32, has_tables: bool) -> Self {
        let mut vmcb = [0; VMCB_WORDS];
        vmcb[INTERCEPTS] = INTERCEPT_VMRUN;
        vmcb[ASID] = 1;
        vmcb[PAGING] = if has_tables { NESTED_PAGING } else { 0 };
        vmcb[NESTED_CR3] = NO_MEMORY;
        vmcb[EFER] = EFER_SVME;
        vmcb[CR0] = CR0_PE_PG;
        let header = kvm_nested_state {
            flags: flags as u16,
            format: KVM_STATE_NESTED_FORMAT_SVM as u16,
            size: size_of::<State>() as u32,
            ..Default::default()
        };
        State { header, vmcb }
    }

    fn set(mut self, vcpu: RawFd) -> i64 {
        sys::ioctl_with_more::<kvm_nested_state, _>(&vcpu, KVM_SET_NESTED_STATE, &mut self)
    }
}

/// Does this while the vCPU's guest runs a guest; the error is KVM's that there is none.
pub fn within<T>(vcpu: RawFd, has_tables: bool, act: impl FnOnce() -> T) -> Result<T, i64> {
    let mut before = kvm_sregs::default();
    failed(sys::ioctl_with(&vcpu, KVM_GET_SREGS, &mut before))?;
    let mut allowed = kvm_sregs { efer: before.efer | EFER_SVME, ..before };
    failed(sys::ioctl_with(&vcpu, KVM_SET_SREGS, &mut allowed))?;
    let entered = State::new(KVM_STATE_NESTED_GUEST_MODE | KVM_STATE_NESTED_GIF_SET, has_tables).set(vcpu);
    let done = if entered == 0 { Ok(act()) } else { Err(entered) };
    failed(State::new(KVM_STATE_NESTED_GIF_SET, false).set(vcpu))?;
    failed(sys::ioctl_with(&vcpu, KVM_SET_SREGS, &mut before))?;
    done
}

fn failed(answer: i64) -> Result<(), i64> {
    if answer < 0 { Err(answer) } else { Ok(()) }
}
