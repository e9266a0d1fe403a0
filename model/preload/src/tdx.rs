//! KVM_MEMORY_ENCRYPT_OP of a TDX guest, as the program writes it.
//!
//! The structures are read and written here; what the commands do, and in which order they are checked, is the model's. What the
//! program's structure cannot be read of is left to the model to refuse where the kernel does.

use crate::user::{self, Plain};
use crate::vcpu::VcpuObject;
use crate::vm::VmObject;
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvmprep_model::confidential::User;
use kvmprep_model::errno::Result;
use kvmprep_model::tdx::launch::MAX_CPUID_ENTRIES;
use kvmprep_model::tdx::{Call, Capabilities, Command, CpuidEntry, CpuidList, InitMemRegion, InitVm};
use std::mem::{offset_of, size_of};

/// `struct kvm_tdx_cmd`.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawCommand {
    id: u32,
    flags: u32,
    data: u64,
    hw_error: u64,
}

/// `struct kvm_tdx_capabilities`, up to its entries of CPUID.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawCapabilities {
    attributes: u64,
    xfam: u64,
    kernel_calls_r11: u64,
    user_calls_r11: u64,
    kernel_calls_r12: u64,
    user_calls_r12: u64,
    reserved: [u64; 250],
    cpuid: RawCpuid,
}

/// `struct kvm_cpuid2`, up to its entries.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawCpuid {
    entries: u32,
    padding: u32,
}

/// `struct kvm_tdx_init_vm`, up to its entries of CPUID.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawInitVm {
    attributes: u64,
    xfam: u64,
    owner: [[u64; 6]; 3],
    reserved: [u64; 12],
    cpuid: RawCpuid,
}

/// `struct kvm_tdx_init_mem_region`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
struct RawRegion {
    source_addr: u64,
    gpa: u64,
    nr_pages: u64,
}

// SAFETY: numbers alone, without padding.
unsafe impl Plain for RawCommand {}
// SAFETY: numbers alone, without padding.
unsafe impl Plain for RawCapabilities {}
// SAFETY: numbers alone, without padding.
unsafe impl Plain for RawCpuid {}
// SAFETY: numbers alone, without padding.
unsafe impl Plain for RawInitVm {}
// SAFETY: numbers alone, without padding.
unsafe impl Plain for RawRegion {}

const CAPABILITIES: u32 = 0;
const INIT_VM: u32 = 1;
const INIT_VCPU: u32 = 2;
const INIT_MEM_REGION: u32 = 3;
const FINALIZE_VM: u32 = 4;
const GET_CPUID: u32 = 5;

/// A command of the VM.
pub fn vm_command(vm: &VmObject, argument: u64) -> Result<()> {
    command(argument, |command| vm.model().tdx_command(command))
}

/// A command of a vCPU.
pub fn vcpu_command(vcpu: &VcpuObject, argument: u64) -> Result<i64> {
    command(argument, |command| vcpu.model().tdx_command(command)).map(|()| 0)
}

fn command(argument: u64, act: impl FnOnce(&mut User<Command>) -> Result<()>) -> Result<()> {
    let raw: RawCommand = user::read(argument)?;
    let content = Command { call: call(&raw), flags: raw.flags, hw_error: raw.hw_error };
    let mut command = User { content, is_readable: true, is_writable: user::is_writable(argument, &raw) };
    let answer = act(&mut command);
    let Command { call, hw_error, .. } = command.content;
    if hw_error != raw.hw_error {
        user::write(argument, &RawCommand { hw_error, ..raw })?;
    }
    match call {
        Call::InitMemRegion(User { content, is_readable: true, .. }) => write_region(raw.data, content)?,
        Call::Capabilities(told) if answer.is_ok() => write_capabilities(raw.data, &told.content)?,
        Call::GetCpuid(User { content, is_readable: true, .. }) => write_cpuid(raw.data, &content)?,
        _ => {}
    }
    answer
}

fn write_region(data: u64, region: InitMemRegion) -> Result<()> {
    let InitMemRegion { source_addr, gpa, nr_pages } = region;
    let after = RawRegion { source_addr, gpa, nr_pages };
    if user::read::<RawRegion>(data)? != after {
        user::write(data, &after)?;
    }
    Ok(())
}

fn write_capabilities(data: u64, told: &Capabilities) -> Result<()> {
    let raw = RawCapabilities {
        attributes: told.attributes,
        xfam: told.xfam,
        kernel_calls_r11: 0,
        user_calls_r11: told.handed_on,
        kernel_calls_r12: 0,
        user_calls_r12: 0,
        reserved: [0; 250],
        cpuid: RawCpuid { entries: told.cpuid.len() as u32, padding: 0 },
    };
    user::write(data, &raw)?;
    write_entries(data + size_of::<RawCapabilities>() as u64, &told.cpuid)
}

/// What there is of entries is written only where there is room for all; how many there are is in any case.
fn write_cpuid(data: u64, list: &CpuidList) -> Result<()> {
    let before: RawCpuid = user::read(data)?;
    if before.entries != list.room {
        user::write(data, &RawCpuid { entries: list.room, ..before })?;
    }
    write_entries(data + size_of::<RawCpuid>() as u64, &list.entries)
}

fn write_entries(at: u64, entries: &[CpuidEntry]) -> Result<()> {
    let raw: Vec<_> = entries.iter().map(raw_entry).collect();
    user::write_all(at, &raw)
}

fn raw_entry(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    let CpuidEntry { function, index, is_of_index, registers: [eax, ebx, ecx, edx] } = *entry;
    let flags = if is_of_index { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

fn entry(raw: &kvm_cpuid_entry2) -> CpuidEntry {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *raw;
    let is_of_index = flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    CpuidEntry { function, index, is_of_index, registers: [eax, ebx, ecx, edx] }
}

fn call(raw: &RawCommand) -> Call {
    match raw.id {
        CAPABILITIES => {
            let read = |data| {
                let room = user::read(data + offset_of!(RawCapabilities, cpuid) as u64)?;
                Ok(Capabilities { room, ..Capabilities::default() })
            };
            Call::Capabilities(at(raw.data, read, Capabilities::default()))
        }
        INIT_VM => Call::InitVm(at(raw.data, init_vm, InitVm::default())),
        INIT_VCPU => Call::InitVcpu,
        INIT_MEM_REGION => {
            let read = |data| {
                let RawRegion { source_addr, gpa, nr_pages } = user::read(data)?;
                Ok(InitMemRegion { source_addr, gpa, nr_pages })
            };
            let region = at(raw.data, read, InitMemRegion { source_addr: 0, gpa: 0, nr_pages: 0 });
            let is_writable =
                user::read::<RawRegion>(raw.data).is_ok_and(|region| user::is_writable(raw.data, &region));
            Call::InitMemRegion(User { is_writable, ..region })
        }
        FINALIZE_VM => Call::FinalizeVm,
        GET_CPUID => {
            let read = |data| {
                let RawCpuid { entries: room, .. } = user::read(data)?;
                Ok(CpuidList { room, entries: Vec::new() })
            };
            Call::GetCpuid(at(raw.data, read, CpuidList::default()))
        }
        other => Call::Other(other),
    }
}

/// What stands at an address, or that nothing can be read there.
fn at<T>(data: u64, read: impl FnOnce(u64) -> Result<T>, nothing: T) -> User<T> {
    read(data).map_or(User::nowhere(nothing), User::new)
}

fn init_vm(data: u64) -> Result<InitVm> {
    let raw: RawInitVm = user::read(data)?;
    // More than KVM takes are not read: that they are too many is all that it finds.
    let is_read = raw.cpuid.entries as usize <= MAX_CPUID_ENTRIES;
    let count = (raw.cpuid.entries as usize).min(MAX_CPUID_ENTRIES + 1);
    let mut entries = vec![kvm_cpuid_entry2::default(); count];
    if is_read {
        user::read_all(data + size_of::<RawInitVm>() as u64, &mut entries)?;
    }
    Ok(InitVm {
        attributes: raw.attributes,
        xfam: raw.xfam,
        is_reserved_zero: raw.reserved == [0; 12] && raw.cpuid.padding == 0,
        cpuid: entries.iter().map(entry).collect(),
    })
}

const _: () = assert!(size_of::<RawInitVm>() == 264 && size_of::<RawCommand>() == 24);
const _: () = assert!(size_of::<RawCapabilities>() == 2048 + 8);
