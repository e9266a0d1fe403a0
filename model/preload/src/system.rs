//! `/dev/kvm`: the machine that virtual machines are made on, and what it can.
//!
//! There is one machine in a process, made when `/dev/kvm` is first opened. Of capabilities only those are said to be there that
//! the model has, or that a program needs to hear of before it sets memory up and that hang on nothing that is missing.

use crate::cpuid;
use crate::fork;
use crate::host;
use crate::ioctls::*;
use crate::memfd::Memfd;
use crate::nested;
use crate::objects::{self, Object};
use crate::refuse;
use crate::registers;
use crate::run_page;
use crate::settings;
use crate::user;
use crate::vm::VmObject;
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::personality::VmType;
use kvmprep_model::snp::{Firmware, Rmp, RmpHost};
use kvmprep_model::tdx::Module;
use kvmprep_model::vm::{MOST_VCPUS, Machine, Vm};
use std::ffi::c_int;
use std::os::fd::RawFd;
use std::sync::{Arc, OnceLock};

/// `KVM_API_VERSION`.
const API_VERSION: i64 = 12;
/// How many TDX guests there can be at a time, and how many of SNP.
const GUESTS: u32 = 64;
/// The firmware finds every CPUID page good but those whose first word has its highest bit set, so that there are some which it
/// corrects.
const GOOD_CPUID: u64 = u64::MAX >> 1;
/// `KVM_MAX_VCPU_IDS`: how many numbers they can have.
pub const MOST_VCPU_NUMBERS: u64 = 4096;
/// `KVM_MAX_IRQ_ROUTES`.
const MOST_IRQ_ROUTES: i64 = 4096;
/// `KVM_MAX_MCE_BANKS`, and what is said of them: that they can be controlled, and that some errors can be recovered from.
const MACHINE_CHECK_BANKS: i64 = 32;
const MACHINE_CHECKS: u64 = 1 << 8 | 1 << 24;
/// `1 << KVM_HC_MAP_GPA_RANGE`.
const HYPERCALLS: i64 = 1 << 12;

/// The machine.
pub fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| {
        let settings = settings::current();
        let host = host::process();
        let mut machine = Machine::new(settings.personality, host.clone());
        if settings.has_vm_type(VmType::Tdx) {
            machine.module = Some(Module::new(host.clone(), GUESTS));
        }
        if settings.has_vm_type(VmType::Snp) {
            let rmp = Arc::new(Rmp::default());
            machine.firmware = Some(Firmware::new(host.clone(), rmp.clone(), GUESTS, GOOD_CPUID));
            machine.host = RmpHost::new(host.clone(), rmp);
        }
        settings.arm(&machine);
        machine
    })
}

/// A descriptor of `/dev/kvm`.
pub fn open(flags: c_int) -> Result<RawFd> {
    machine();
    fork::watch();
    let file = Arc::new(Memfd::new(c"kvm", 0)?);
    objects::add(file, libc::O_RDWR | flags & libc::O_CLOEXEC, Object::System)
}

/// A descriptor of `/dev/sev`: ENOENT on a machine without SNP.
pub fn open_firmware(flags: c_int) -> Result<RawFd> {
    if machine().firmware.is_none() {
        return Err(Errno::ENOENT);
    }
    let file = Arc::new(Memfd::new(c"sev", 0)?);
    objects::add(file, libc::O_RDWR | flags & libc::O_CLOEXEC, Object::Firmware)
}

/// A virtual machine of a type by its number: EINVAL where there is no such type.
pub fn create_vm(number: u64) -> Result<Arc<Vm>> {
    let vm_type = VmType::ALL.into_iter().find(|vm_type| vm_type.number() == number).ok_or(Errno::EINVAL)?;
    if !has_vm_type(vm_type) {
        return Err(Errno::EINVAL);
    }
    Vm::new(machine(), vm_type)
}

fn has_vm_type(vm_type: VmType) -> bool {
    settings::current().has_vm_type(vm_type) && machine().has_vm_type(vm_type)
}

/// Answers a request.
pub fn ioctl(request: u32, argument: u64) -> Result<i64> {
    match request {
        KVM_GET_API_VERSION | KVM_GET_VCPU_MMAP_SIZE if argument != 0 => Err(Errno::EINVAL),
        KVM_GET_API_VERSION => Ok(API_VERSION),
        KVM_GET_VCPU_MMAP_SIZE => Ok(run_page::SIZE as i64),
        KVM_CREATE_VM => VmObject::create(argument).map(i64::from),
        KVM_CHECK_EXTENSION => Ok(check_extension(None, argument)),
        KVM_GET_SUPPORTED_CPUID => registers::write_cpuid(argument, &cpuid::supported()).map(|()| 0),
        KVM_X86_GET_MCE_CAP_SUPPORTED => user::write(argument, &MACHINE_CHECKS).map(|()| 0),
        KVM_GET_MSR_INDEX_LIST => registers::write_msr_list(argument).map(|()| 0),
        _ => Err(refuse::request(ObjectKind::System, request)),
    }
}

/// KVM_CHECK_EXTENSION, of a VM or of the machine.
pub fn check_extension(vm: Option<&Vm>, capability: u64) -> i64 {
    match u32::try_from(capability).unwrap_or(u32::MAX) {
        KVM_CAP_VM_TYPES if !machine().personality.has_memory_region2() => 0,
        KVM_CAP_VM_TYPES => {
            VmType::ALL.into_iter().filter(|vm_type| has_vm_type(*vm_type)).map(|t| 1 << t.number()).sum()
        }
        KVM_CAP_USER_MEMORY
        | KVM_CAP_DESTROY_MEMORY_REGION_WORKS
        | KVM_CAP_JOIN_MEMORY_REGIONS_WORKS
        | KVM_CAP_SYNC_MMU
        | KVM_CAP_SET_TSS_ADDR
        | KVM_CAP_SET_IDENTITY_MAP_ADDR
        | KVM_CAP_EXT_CPUID
        | KVM_CAP_MP_STATE
        | KVM_CAP_VCPU_EVENTS
        | KVM_CAP_DEBUGREGS
        | KVM_CAP_XSAVE
        | KVM_CAP_XCRS
        | KVM_CAP_IMMEDIATE_EXIT
        | KVM_CAP_CHECK_EXTENSION_VM
        | KVM_CAP_ENABLE_CAP_VM
        | KVM_CAP_BINARY_STATS_FD => 1,
        KVM_CAP_NR_VCPUS => std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as i64),
        KVM_CAP_MAX_VCPUS => MOST_VCPUS as i64,
        KVM_CAP_MAX_VCPU_ID => MOST_VCPU_NUMBERS as i64,
        // QEMU does not begin without these, and can be told to do without what they are for (kernel-irqchip=off): where that is
        // asked for all the same, it is refused by name.
        KVM_CAP_IRQ_ROUTING => MOST_IRQ_ROUTES,
        KVM_CAP_MCE => MACHINE_CHECK_BANKS,
        KVM_CAP_INTERNAL_ERROR_DATA
        | KVM_CAP_IOEVENTFD
        | KVM_CAP_IOEVENTFD_ANY_LENGTH
        | KVM_CAP_SIGNAL_MSI
        | KVM_CAP_X86_ROBUST_SINGLESTEP => 1,
        KVM_CAP_NESTED_STATE => nested::MOST as i64,
        KVM_CAP_EXIT_HYPERCALL => HYPERCALLS,
        KVM_CAP_ADJUST_CLOCK => KVM_CLOCK_TSC_STABLE.into(),
        KVM_CAP_X86_SMM => vm.is_none_or(|vm| !vm.vm_type().has_protected_state()).into(),
        _ => match vm {
            Some(vm) => vm.check_extension(capability),
            None => machine().check_extension(capability),
        },
    }
}

/// Whether enabling a capability is the model's business.
pub fn is_enabled_by_model(capability: u32) -> bool {
    matches!(capability, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 | KVM_CAP_DISABLE_QUIRKS2)
}
