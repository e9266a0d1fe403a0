//! A vCPU as its descriptor has it: which request is which of the model's calls, and what of a vCPU is only kept.
//!
//! One request at a time, as in the kernel: another one waits, even for a guest that runs on for ever, and no signal ends that
//! wait. Nothing here decides about memory.

use crate::host::signals::{self, Blocked};
use crate::ioctls::*;
use crate::memfd::Memfd;
use crate::nested;
use crate::objects::{self, Object};
use crate::refuse;
use crate::registers::{Changed, Registers};
use crate::run::Owed;
use crate::run_page::{self, RunPage};
use crate::snp;
use crate::stats::{Of, StatisticsObject};
use crate::steps::{Kind, Step};
use crate::tdx;
use crate::user;
use crate::vm::VmObject;
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::personality::VmType;
use kvmprep_model::vm::{PreFault, Vcpu};
use std::collections::VecDeque;
use std::ffi::CString;
use std::mem::size_of;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A vCPU.
pub struct VcpuObject {
    // Dropped before the VM, which it keeps.
    model: Arc<Vcpu>,
    page: RunPage,
    number: u32,
    /// The lock that each request takes (`vcpu->mutex`).
    guest: Mutex<Guest>,
    vm: Arc<VmObject>,
}

/// What only the request that uses the vCPU touches.
#[derive(Default)]
pub struct Guest {
    /// What the guest has yet to do.
    pub steps: VecDeque<Step>,
    /// How much of the first step is done.
    pub nth: u64,
    /// Of a step that copies: the word that was read, and is to be written.
    pub word: Option<u64>,
    /// What the program answers before the guest goes on.
    pub owed: Option<Owed>,
    /// What its last hypercall was answered.
    pub answer: u64,
    /// Its registers.
    pub registers: Registers,
    /// What was set of a guest that it runs.
    pub nested: nested::Kept,
    /// `KVM_SET_SIGNAL_MASK`: the signals that wait while the guest runs.
    pub signal_mask: Option<u64>,
}

impl Guest {
    /// So much more of the first step is done.
    pub fn advance(&mut self, done: u64) {
        self.nth += done;
        if self.steps.front().is_some_and(|step| self.nth >= step.count) {
            self.next();
        }
    }

    /// The first step is done.
    pub fn next(&mut self) {
        self.steps.pop_front();
        self.nth = 0;
        self.word = None;
    }

    /// The hypercall that is the first step was answered.
    pub fn answered(&mut self, answer: u64) {
        let is_long = self.registers.is_in_long_mode();
        self.answer = if is_long { answer } else { answer & u64::from(u32::MAX) };
        self.registers.set_rax(self.answer);
        let is_repeated =
            matches!(self.steps.front(), Some(Step { kind: Kind::Hypercall { is_repeated: true, .. }, .. }));
        if !is_repeated || self.answer != GUEST_EAGAIN {
            self.next();
        }
    }
}

impl VcpuObject {
    /// KVM_CREATE_VCPU: a descriptor of a new one.
    pub fn create(vm: &Arc<VmObject>, number: u64) -> Result<RawFd> {
        if !vm.takes_vcpu(number) {
            return Err(Errno::EINVAL);
        }
        let number = number as u32;
        let name = CString::new(format!("kvm-vcpu:{number}")).expect("it has no zero in it");
        let file = Arc::new(Memfd::new(&name, run_page::SIZE as u64)?);
        let page = RunPage::map(&file)?;
        let model = vm.model().create_vcpu(number)?;
        let vcpu = Arc::new(VcpuObject { vm: vm.clone(), model, page, number, guest: Mutex::default() });
        objects::add(file, libc::O_RDWR | libc::O_CLOEXEC, Object::Vcpu(vcpu))
    }

    /// The model's.
    pub fn model(&self) -> &Arc<Vcpu> {
        &self.model
    }

    /// The VM it is of.
    pub fn vm(&self) -> &Arc<VmObject> {
        &self.vm
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// What it shares with the program.
    pub fn page(&self) -> &RunPage {
        &self.page
    }

    /// Has its guest do this, and no longer what it had to do. Waits while it runs.
    pub fn set_steps(&self, steps: impl IntoIterator<Item = Step>) -> Result<()> {
        let steps: VecDeque<Step> = steps.into_iter().collect();
        steps.iter().try_for_each(Step::check)?;
        let mut guest = self.use_alone();
        guest.next();
        guest.owed = None;
        guest.steps = steps;
        Ok(())
    }

    /// Answers a request.
    pub fn ioctl(self: &Arc<Self>, request: u32, argument: u64) -> Result<i64> {
        if self.model.vm().is_dead() {
            return Err(Errno::EIO);
        }
        let personality = self.model.vm().personality();
        let is_unknown = match request {
            KVM_MEMORY_ENCRYPT_OP => !personality.has_commands_of_vcpus(),
            KVM_PRE_FAULT_MEMORY => !personality.has_pre_fault(),
            _ => false,
        };
        if is_unknown {
            return Err(Errno::EINVAL);
        }
        // What is asked of a confidential guest takes its own locks.
        if request == KVM_MEMORY_ENCRYPT_OP {
            return match self.model.vm().vm_type() {
                VmType::Tdx => tdx::vcpu_command(self, argument),
                VmType::Snp => snp::vcpu_command(),
                _ => Err(Errno::ENOTTY),
            };
        }
        let mut guest = self.use_alone();
        match request {
            KVM_RUN if argument != 0 => Err(Errno::EINVAL),
            KVM_RUN => self.run_with_mask(&mut guest),
            KVM_PRE_FAULT_MEMORY => self.pre_fault(argument),
            KVM_GET_STATS_FD => StatisticsObject::open(Of::Vcpu(self.clone())).map(i64::from),
            KVM_SET_SIGNAL_MASK => set_signal_mask(&mut guest, argument),
            KVM_GET_MSRS => guest.registers.get_msrs(argument),
            KVM_SET_MSRS => {
                let (done, changed) = guest.registers.set_msrs(argument)?;
                self.changed(changed);
                Ok(done)
            }
            // There is no machine check that could be told of.
            KVM_X86_SETUP_MCE => user::read::<u64>(argument).map(|_| 0),
            KVM_SET_CPUID2 => guest.registers.set_cpuid(argument).map(|()| 0),
            KVM_GET_CPUID2 => guest.registers.get_cpuid(argument).map(|()| 0),
            _ => match self.registers(&mut guest, request, argument) {
                Some(answer) => answer.map(|()| 0),
                None => Err(refuse::request(ObjectKind::Vcpu, request)),
            },
        }
    }

    fn run_with_mask(&self, guest: &mut Guest) -> Result<i64> {
        let _mask = guest.signal_mask.map(Blocked::with_mask);
        self.run(guest)
    }

    fn registers(&self, guest: &mut Guest, request: u32, argument: u64) -> Option<Result<()>> {
        // The state of a guest that is kept from the host.
        let is_kept = match (self.model.vm().vm_type(), request) {
            // KVM gives what it has itself.
            (VmType::Snp, KVM_GET_VCPU_EVENTS | KVM_SET_VCPU_EVENTS) => false,
            _ => self.model.has_kept_state(),
        };
        match request {
            KVM_GET_NESTED_STATE | KVM_SET_NESTED_STATE if is_kept => Some(Err(Errno::EINVAL)),
            KVM_GET_NESTED_STATE => Some(guest.nested.get(&self.model, argument)),
            KVM_SET_NESTED_STATE => Some(guest.nested.set(&self.model, guest.registers.efer(), argument)),
            _ => {
                let answer = guest.registers.ioctl(request, argument, is_kept)?;
                Some(answer.map(|changed| self.changed(changed)))
            }
        }
    }

    fn changed(&self, changed: Changed) {
        match changed {
            Changed::Nothing => {}
            Changed::Smm(is_in_smm) => self.model.set_smm(is_in_smm),
            Changed::Root => self.model.renew_root(),
        }
    }

    fn pre_fault(&self, argument: u64) -> Result<i64> {
        let mut range: kvm_pre_fault_memory = user::read(argument)?;
        let mut left = PreFault { gpa: range.gpa, size: range.size, flags: range.flags };
        let answer = self.model.pre_fault(&mut left);
        self.see_failed_memory();
        if let Some(fault) = self.model.memory_fault_of_pre_fault() {
            self.page.set_memory_fault(fault);
        }
        if self.model.was_pre_fault_interrupted() {
            self.page.set_exit_reason(KVM_EXIT_INTR);
        }
        (range.gpa, range.size) = (left.gpa, left.size);
        user::write(argument, &range)?;
        answer.map(|()| 0)
    }

    /// Of memory of the process's that has failed, KVM tells the thread by a signal of its own (SIGBUS).
    pub fn see_failed_memory(&self) {
        if self.model.take_signal() {
            signals::tell_of_failed_memory();
        }
    }

    fn use_alone(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sets, or takes back, the signals that wait while the guest runs (KVM_SET_SIGNAL_MASK).
fn set_signal_mask(guest: &mut Guest, argument: u64) -> Result<i64> {
    if argument == 0 {
        guest.signal_mask = None;
        return Ok(0);
    }
    if user::read::<u32>(argument)? != size_of::<u64>() as u32 {
        return Err(Errno::EINVAL);
    }
    guest.signal_mask = Some(user::read(argument + size_of::<u32>() as u64)?);
    Ok(0)
}

/// `KVM_EAGAIN`: a guest's own number.
const GUEST_EAGAIN: u64 = 11;
