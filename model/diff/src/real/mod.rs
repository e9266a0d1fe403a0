//! The machine that is the kernel's own KVM, with this process as its VMM.
//!
//! Every program has a VM and mappings of its own, which go with it. Nothing is judged here, and nothing repaired: what
//! the kernel answers is the outcome.

mod guest;
mod memory;
mod nested;
mod statistics;
mod sys;

use std::cell::OnceCell;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_GUEST_MEMFD, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_MULTI_ADDRESS_SPACE, KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_USER_MEMORY2,
    KVM_CAP_VM_TYPES, KVM_CAP_X86_SMM, kvm_clear_dirty_log, kvm_create_guest_memfd, kvm_dirty_log,
    kvm_enable_cap, kvm_memory_attributes, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvmprep_model::personality::{Version, VmType};

use crate::generator::Abilities;
use crate::machine::{Machine, Maker, Outcome};
use crate::operation::{
    AREA_SIZE, Backing, CODE_GPA, CODE_HVA, CODE_SLOT, FileReference, LARGEST_SLOT, Operation, PAGE, Setting,
    VCPUS,
};
use crate::simulated::this_version;
use guest::Vcpu;
use memory::Memory;
use statistics::Statistics;

const KVM_CREATE_VM: u64 = sys::io(0x01);
const KVM_CHECK_EXTENSION: u64 = sys::io(0x03);
const KVM_GET_VCPU_MMAP_SIZE: u64 = sys::io(0x04);
const KVM_GET_DIRTY_LOG: u64 = sys::iow::<kvm_dirty_log>(0x42);
const KVM_SET_USER_MEMORY_REGION: u64 = sys::iow::<kvm_userspace_memory_region>(0x46);
const KVM_SET_USER_MEMORY_REGION2: u64 = sys::iow::<kvm_userspace_memory_region2>(0x49);
const KVM_ENABLE_CAP: u64 = sys::iow::<kvm_enable_cap>(0xa3);
const KVM_CLEAR_DIRTY_LOG: u64 = sys::iowr::<kvm_clear_dirty_log>(0xc0);
const KVM_SET_MEMORY_ATTRIBUTES: u64 = sys::iow::<kvm_memory_attributes>(0xd2);
const KVM_CREATE_GUEST_MEMFD: u64 = sys::iowr::<kvm_create_guest_memfd>(0xd4);

/// Counters of a VM.
const PAGES: [&str; 3] = ["pages_4k", "pages_2m", "pages_1g"];
const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;

/// This kernel's KVM.
pub struct RealKvm {
    kvm: OwnedFd,
    run_size: usize,
    has_nested: bool,
}

impl RealKvm {
    /// Opens /dev/kvm, and has the machine hold still.
    pub fn open() -> Result<Self> {
        let kvm: OwnedFd = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .context("/dev/kvm cannot be opened")?
            .into();
        memory::quieten()?;
        guest::prepare_signals()?;
        stay_on_one_cpu()?;
        let run_size = usize::try_from(sys::ioctl(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0)).unwrap_or(0);
        let has_nested = nested::is_had(&kvm);
        Ok(RealKvm { kvm, run_size, has_nested })
    }

    fn new_vm(&self, vm_type: VmType) -> Result<OwnedFd, i64> {
        sys::owned(sys::ioctl(&self.kvm, KVM_CREATE_VM, vm_type.number()))
    }

    /// What programs can use here.
    pub fn abilities(&self) -> Result<Abilities> {
        let has = |cap: u32| sys::ioctl(&self.kvm, KVM_CHECK_EXTENSION, cap.into());
        let positive = |cap: u32| has(cap) > 0;
        Ok(Abilities {
            has_sw_protected: has(KVM_CAP_VM_TYPES) & 1 << VmType::SwProtected.number() != 0,
            has_attributes: positive(KVM_CAP_MEMORY_ATTRIBUTES),
            has_pre_fault: positive(KVM_CAP_PRE_FAULT_MEMORY),
            has_region2: positive(KVM_CAP_USER_MEMORY2),
            has_guest_memfd: positive(KVM_CAP_GUEST_MEMFD),
            guest_memfd_flags: u64::try_from(has(KVM_CAP_GUEST_MEMFD_FLAGS)).unwrap_or(0),
            has_smm: positive(KVM_CAP_X86_SMM),
            has_nested: self.has_nested,
            has_thp: memory::has_thp(),
            opens_clean_entries: this_version()? >= Version(6, 2),
        })
    }
}

impl Maker for RealKvm {
    fn make(&self, setting: &Setting) -> Result<Box<dyn Machine + '_>> {
        memory::set_policy(setting.thp)?;
        Ok(Box::new(RealMachine::new(self, setting)?))
    }
}

/// Counters that are kept for each CPU, lists that are, and what runs beside the program all show less so.
fn stay_on_one_cpu() -> Result<()> {
    // SAFETY: a set of bits, all zero to begin with.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    ensure!(done == 0, "sched_setaffinity: {}", std::io::Error::last_os_error());
    Ok(())
}

struct RealMachine<'a> {
    // Dropped in this order: nothing that has memory mapped is to outlive it.
    vcpus: Vec<Vcpu>,
    statistics: Statistics,
    /// As they were created; None where that failed, or where it was closed.
    files: Vec<Option<OwnedFd>>,
    /// A guest_memfd of another VM's, once it was asked for.
    file_of_another_vm: OnceCell<Option<OwnedFd>>,
    vm: OwnedFd,
    memory: Memory,
    _code: Code,
    kvm: &'a RealKvm,
    vm_type: VmType,
}

/// The guest's code page.
struct Code;

impl Code {
    fn new() -> Result<Self> {
        memory::map_own(CODE_HVA, &guest::CODE)?;
        Ok(Code)
    }
}

impl Drop for Code {
    fn drop(&mut self) {
        memory::unmap(CODE_HVA, PAGE);
    }
}

impl<'a> RealMachine<'a> {
    fn new(kvm: &'a RealKvm, setting: &Setting) -> Result<Self> {
        let code = Code::new()?;
        let memory = Memory::new(setting.promised_elsewhere)?;
        let vm = kvm.new_vm(setting.vm_type).map_err(|error| anyhow::anyhow!("KVM_CREATE_VM: {error}"))?;
        let spaces = sys::ioctl(&vm, KVM_CHECK_EXTENSION, KVM_CAP_MULTI_ADDRESS_SPACE.into()).max(1);
        for space in 0..u32::try_from(spaces)? {
            let mut region = kvm_userspace_memory_region {
                slot: CODE_SLOT | space << 16,
                flags: 0,
                guest_phys_addr: CODE_GPA,
                memory_size: PAGE,
                userspace_addr: CODE_HVA,
            };
            let set = sys::ioctl_with(&vm, KVM_SET_USER_MEMORY_REGION, &mut region);
            ensure!(set == 0, "the code's slot is refused: {set}");
        }
        let statistics =
            Statistics::of(&vm, &PAGES).map_err(|error| anyhow::anyhow!("KVM_GET_STATS_FD: {error}"))?;
        let vcpus = (0..VCPUS as u64)
            .map(|id| Vcpu::new(&vm, id, kvm.run_size, kvm.has_nested))
            .collect::<Result<_>>()?;
        Ok(RealMachine {
            vcpus,
            statistics,
            files: Vec::new(),
            file_of_another_vm: OnceCell::new(),
            vm,
            memory,
            _code: code,
            kvm,
            vm_type: setting.vm_type,
        })
    }

    fn file_of_another_vm(&self) -> Option<&OwnedFd> {
        let make = || {
            let vm = self.kvm.new_vm(self.vm_type).ok()?;
            new_file(&vm, AREA_SIZE, 0).ok()
        };
        self.file_of_another_vm.get_or_init(make).as_ref()
    }

    fn file(&self, number: usize) -> Option<&OwnedFd> {
        self.files.get(number).and_then(Option::as_ref)
    }

    fn done(&mut self, operation: &Operation) -> Outcome {
        match *operation {
            Operation::Map { at, size, backing } => {
                let file = match backing {
                    Backing::GuestMemfd { file, .. } => self.files.get(file).and_then(Option::as_ref),
                    _ => None,
                };
                Outcome::of(self.memory.map(at, size, backing, file))
            }
            Operation::Unmap { at, size } => Outcome::of(memory::unmap(at, size)),
            Operation::Advise { at, size, advice } => Outcome::of(memory::advise(at, size, advice)),
            Operation::Protect { at, size, protection } => Outcome::of(memory::protect(at, size, protection)),
            Operation::Store { at, word } => Outcome::of(self.memory.store(at, word)),
            Operation::Load { at } => match self.memory.load(at) {
                Ok(word) => {
                    let mut outcome = Outcome::of(0);
                    outcome.add("word", word.into());
                    outcome
                }
                Err(error) => Outcome::of(error),
            },
            Operation::Punch { area, offset, size } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                Outcome::of(self.memory.fallocate(area, mode, offset, size))
            }
            Operation::Allocate { area, offset, size } => {
                Outcome::of(self.memory.fallocate(area, libc::FALLOC_FL_KEEP_SIZE, offset, size))
            }
            Operation::Fork => Outcome::of(self.memory.fork()),
            Operation::Reap => Outcome::of(self.memory.reap()),
            Operation::SetRegion { .. } => Outcome::of(self.set_region(operation)),
            Operation::GetDirtyLog { slot } => self.dirty_log(slot),
            Operation::ClearDirtyLog { slot, first_page, pages, bits } => {
                Outcome::of(self.clear_dirty_log(slot, first_page, pages, bits))
            }
            Operation::CreateFile { size, flags } => Outcome::of(self.create_file(size, flags)),
            Operation::CloseFile { file } => Outcome::of(self.close_file(file)),
            Operation::PunchFile { file, offset, size, keep_size } => {
                Outcome::of(self.fallocate(file, libc::FALLOC_FL_PUNCH_HOLE, keep_size, offset, size))
            }
            Operation::AllocateFile { file, offset, size, keep_size } => {
                Outcome::of(self.fallocate(file, 0, keep_size, offset, size))
            }
            Operation::SetAttributes { address, size, attributes, flags } => {
                let mut argument = kvm_memory_attributes { address, size, attributes, flags };
                Outcome::of(sys::ioctl_with(&self.vm, KVM_SET_MEMORY_ATTRIBUTES, &mut argument))
            }
            Operation::DisableQuirks { quirks } => {
                Outcome::of(self.enable_cap(KVM_CAP_DISABLE_QUIRKS2, quirks))
            }
            Operation::ProtectDirtyLog { how } => {
                Outcome::of(self.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, how))
            }
            Operation::CheckExtension { cap } => {
                Outcome::of(sys::ioctl(&self.vm, KVM_CHECK_EXTENSION, cap.into()))
            }
            Operation::PreFault { vcpu, gpa, size, flags } => self.vcpus[vcpu].pre_fault(gpa, size, flags),
            Operation::PreFaultNested { vcpu, has_tables, gpa, size } => {
                self.vcpus[vcpu].pre_fault_nested(has_tables, gpa, size)
            }
            Operation::SetSmm { vcpu, is_in_smm } => Outcome::of(self.vcpus[vcpu].set_smm(is_in_smm)),
            Operation::GuestRead { vcpu, gpa } => self.vcpus[vcpu].touch(gpa, None),
            Operation::GuestWrite { vcpu, gpa, word } => self.vcpus[vcpu].touch(gpa, Some(word)),
            Operation::GuestInterrupted { vcpu, gpa } => self.vcpus[vcpu].touch_with_signal(gpa),
        }
    }

    fn set_region(&self, operation: &Operation) -> i64 {
        let Operation::SetRegion { slot, flags, gpa, size, hva, file, offset, is_second } = *operation else {
            return -i64::from(libc::EINVAL);
        };
        if is_second {
            let fd = match file {
                FileReference::Bad => None,
                FileReference::Other => Some(&self.vm),
                FileReference::OfAnotherVm => self.file_of_another_vm(),
                FileReference::GuestMemfd(number) => self.file(number),
            };
            let mut region = kvm_userspace_memory_region2 {
                slot,
                flags,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: hva,
                guest_memfd_offset: offset,
                guest_memfd: fd.map_or(u32::MAX, number_of),
                ..Default::default()
            };
            sys::ioctl_with(&self.vm, KVM_SET_USER_MEMORY_REGION2, &mut region)
        } else {
            let mut region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: hva,
            };
            sys::ioctl_with(&self.vm, KVM_SET_USER_MEMORY_REGION, &mut region)
        }
    }

    fn create_file(&mut self, size: u64, flags: u64) -> i64 {
        let file = new_file(&self.vm, size, flags);
        let answer = file.as_ref().map_or_else(|error| *error, |_| 0);
        self.files.push(file.ok());
        answer
    }

    fn close_file(&mut self, number: usize) -> i64 {
        match self.files.get_mut(number).and_then(Option::take) {
            Some(_) => 0,
            None => -i64::from(libc::EBADF),
        }
    }

    fn fallocate(&self, number: usize, mode: i32, keep_size: bool, offset: u64, size: u64) -> i64 {
        let keep = if keep_size { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
        self.file(number)
            .map_or(-i64::from(libc::EBADF), |file| sys::fallocate(file, mode | keep, offset, size))
    }

    fn enable_cap(&self, cap: u32, argument: u64) -> i64 {
        let mut enable = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
        sys::ioctl_with(&self.vm, KVM_ENABLE_CAP, &mut enable)
    }

    fn clear_dirty_log(&self, slot: u32, first_page: u64, pages: u32, bits: u64) -> i64 {
        let mut words = vec![bits; pages as usize / 64 + 1];
        let mut argument = kvm_clear_dirty_log { slot, num_pages: pages, first_page, ..Default::default() };
        argument.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        sys::ioctl_with(&self.vm, KVM_CLEAR_DIRTY_LOG, &mut argument)
    }

    fn dirty_log(&self, slot: u32) -> Outcome {
        let mut words = vec![0u64; usize::try_from(LARGEST_SLOT / PAGE / 64).unwrap_or(0)];
        let mut argument = kvm_dirty_log { slot, ..Default::default() };
        argument.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        let mut outcome = Outcome::of(sys::ioctl_with(&self.vm, KVM_GET_DIRTY_LOG, &mut argument));
        outcome.add_dirty(&words);
        outcome
    }
}

fn new_file(vm: &OwnedFd, size: u64, flags: u64) -> Result<OwnedFd, i64> {
    let mut argument = kvm_create_guest_memfd { size, flags, ..Default::default() };
    sys::owned(sys::ioctl_with(vm, KVM_CREATE_GUEST_MEMFD, &mut argument))
}

fn number_of(fd: &OwnedFd) -> u32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd() as u32
}

impl Machine for RealMachine<'_> {
    fn apply(&mut self, operation: &Operation) -> Outcome {
        self.memory.settle();
        let mut outcome = self.done(operation);
        self.statistics.add(&mut outcome);
        for vcpu in &self.vcpus {
            vcpu.add_statistics(&mut outcome);
        }
        outcome
    }
}
