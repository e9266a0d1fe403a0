//! KVM_RUN: the guest's steps are done until the program has to see to something, and `struct kvm_run` says to what.
//!
//! The order is the kernel's: what the last exit left to be finished, then `immediate_exit`, then the guest. Signals are asked for
//! before each step and each access. A vCPU that was given no steps is not run: the model executes no code, and says so.

use crate::run_page::RunPage;
use crate::say;
use crate::steps::{Kind, Step};
use crate::user;
use crate::vcpu::{Guest, VcpuObject};
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::units::Width;
use kvmprep_model::vm::{Access, Exit, MemoryFault, Nested, Operation};
use std::mem::offset_of;
use std::time::Duration;

/// How many accesses are made before it is looked how far they came.
const AT_A_TIME: u64 = 512;
/// How often a guest that runs on is looked at.
const LOOKED_AT: Duration = Duration::from_micros(200);

/// `KVM_HC_MAP_GPA_RANGE`.
const HYPERCALL_MAP_GPA_RANGE: u64 = 12;
/// `KVM_ENOSYS` and `KVM_EINVAL`: a guest's own error numbers.
const GUEST_ENOSYS: u64 = 1000;
const GUEST_EINVAL: u64 = 22;

/// What the guest waits for, which the program answers before the next KVM_RUN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owed {
    /// A word that it reads where no memory is.
    Word(Width),
    /// What a hypercall answers.
    Answer,
}

/// How a step ended.
enum Ended {
    /// It is done, or a part of it.
    Advanced,
    /// KVM_RUN returns with what `struct kvm_run` says.
    Exit,
}

impl VcpuObject {
    /// KVM_RUN.
    pub fn run(&self, guest: &mut Guest) -> Result<i64> {
        self.finish(guest)?;
        if self.page().immediate_exit() {
            return Err(Errno::EINTR);
        }
        self.page().set_exit_reason(KVM_EXIT_UNKNOWN);
        if self.model().nested() == Some(Nested::WithTables) {
            say::once(format!(
                "KVM_RUN of vCPU {}: what a nested guest with page tables of its own does is not modelled: answered with ENOSYS",
                self.number()
            ));
            return Err(Errno::ENOSYS);
        }
        if guest.steps.is_empty() {
            say::once(format!(
                "KVM_RUN of vCPU {}: the model executes no guest's code, and no steps were queued for this one \
                 (kvmprep_model_set_steps of kvmprep-model.h): answered with ENOSYS",
                self.number()
            ));
            return Err(Errno::ENOSYS);
        }
        loop {
            if matches!(self.look_up_from_guest()?, Ended::Exit) {
                return Ok(0);
            }
            let Some(step) = guest.steps.front().copied() else {
                // A guest that has nothing more to do halts.
                self.page().set_exit_reason(KVM_EXIT_HLT);
                return Ok(0);
            };
            match self.do_step(guest, &step)? {
                Ended::Advanced => {}
                Ended::Exit => return Ok(0),
            }
        }
    }

    /// What the last exit left for the program to answer.
    fn finish(&self, guest: &mut Guest) -> Result<()> {
        match guest.owed.take() {
            None => Ok(()),
            Some(Owed::Answer) => {
                let answer = u64::from_le_bytes(self.page().exit(offset_of!(HypercallExit, ret)));
                guest.answered(answer);
                Ok(())
            }
            Some(Owed::Word(width)) => {
                let bytes: [u8; 8] = self.page().exit(offset_of!(MmioExit, data));
                let word = u64::from_le_bytes(bytes) & (u64::MAX >> (64 - 8 * width.bytes()));
                self.take_word(guest, word)
            }
        }
    }

    /// Comes out of the guest if it must: the VM is dead, or a signal waits.
    fn look_up_from_guest(&self) -> Result<Ended> {
        match self.model().run().exit {
            Exit::Failed(errno) => Err(self.failed(errno)),
            Exit::NotEntered { exit_reason } => Ok(self.not_entered(exit_reason)),
            _ => Ok(Ended::Advanced),
        }
    }

    fn not_entered(&self, exit_reason: u32) -> Ended {
        self.page().set_exit_reason(exit_reason);
        Ended::Exit
    }

    fn failed(&self, errno: Errno) -> Errno {
        if errno == Errno::EINTR {
            self.page().set_exit_reason(KVM_EXIT_INTR);
            self.see_failed_memory();
        }
        errno
    }

    fn do_step(&self, guest: &mut Guest, step: &Step) -> Result<Ended> {
        match step.kind {
            Kind::Read { values: None } => self.access(guest, step, AT_A_TIME, |_| Operation::Read),
            Kind::Read { values: Some(_) } => self.access(guest, step, 1, |_| Operation::Read),
            Kind::Write { value, stride } => {
                let word = |nth: u64| value.wrapping_add(nth.wrapping_mul(stride));
                self.access(guest, step, AT_A_TIME, |nth| Operation::Write(word(nth)))
            }
            Kind::Fetch => self.access(guest, step, AT_A_TIME, |_| Operation::Fetch),
            Kind::Accept => self.access(guest, step, AT_A_TIME, |_| Operation::Accept),
            Kind::Copy { to, stride } => match guest.word {
                None => self.access(guest, step, 1, |_| Operation::Read),
                Some(word) => {
                    let write = Step { gpa: to, stride, ..*step };
                    self.access(guest, &write, 1, |_| Operation::Write(word))
                }
            },
            Kind::Out { port, value } => {
                let value = value.unwrap_or(guest.answer as u32);
                guest.next();
                put_out(self.page(), port, step.width, value);
                Ok(Ended::Exit)
            }
            Kind::Hypercall { number, args, .. } => Ok(self.call(guest, number, args)),
            Kind::Halt => {
                guest.next();
                self.page().set_exit_reason(KVM_EXIT_HLT);
                Ok(Ended::Exit)
            }
            Kind::Loop => {
                std::thread::sleep(LOOKED_AT);
                Ok(Ended::Advanced)
            }
        }
    }

    /// Makes up to so many accesses of a step.
    fn access(
        &self,
        guest: &mut Guest,
        step: &Step,
        most: u64,
        operation: impl Fn(u64) -> Operation,
    ) -> Result<Ended> {
        let vcpu = self.model();
        let first = guest.nth;
        let tried = most.min(step.count - first);
        for nth in first..first + tried {
            let (gpa, width, privacy) = (step.address(nth), step.width, step.privacy);
            vcpu.queue(Access { gpa, width, operation: operation(nth), privacy });
        }
        let run = vcpu.run();
        let done = tried - vcpu.queued() as u64;
        vcpu.forget_queue();
        match run.exit {
            // Of an access that goes nowhere nothing is read.
            Exit::Done if most == 1 => {
                self.over(guest, operation(first), run.read.first().copied().unwrap_or(0))?;
                Ok(Ended::Advanced)
            }
            Exit::Done => {
                guest.advance(done);
                Ok(Ended::Advanced)
            }
            Exit::GuestException { .. } => {
                guest.advance(done - 1);
                self.over(guest, Operation::Fetch, 0)?;
                Ok(Ended::Advanced)
            }
            Exit::Mmio { gpa, width, written } => {
                guest.advance(done - 1);
                self.page().set_mmio(gpa, width, written);
                match written {
                    None => guest.owed = Some(Owed::Word(width)),
                    Some(word) => self.over(guest, Operation::Write(word), 0)?,
                }
                Ok(Ended::Exit)
            }
            Exit::EmulationFailed { .. } => {
                guest.advance(done - 1);
                self.page().set_emulation_failed();
                self.over(guest, Operation::Fetch, 0)?;
                Ok(Ended::Exit)
            }
            Exit::MemoryFault(errno, fault) => {
                guest.advance(done);
                self.page().set_memory_fault(fault);
                Err(errno)
            }
            Exit::Failed(errno) => {
                guest.advance(done);
                Err(self.failed(errno))
            }
            Exit::NotEntered { exit_reason } => {
                guest.advance(done);
                Ok(self.not_entered(exit_reason))
            }
        }
    }

    /// One access is over.
    fn over(&self, guest: &mut Guest, operation: Operation, word: u64) -> Result<()> {
        match operation {
            Operation::Read => self.take_word(guest, word),
            _ => {
                guest.word = None;
                guest.advance(1);
                Ok(())
            }
        }
    }

    /// The guest has read a word.
    fn take_word(&self, guest: &mut Guest, word: u64) -> Result<()> {
        match guest.steps.front().map(|step| step.kind) {
            Some(Kind::Copy { .. }) => guest.word = Some(word),
            Some(Kind::Read { values: Some(values) }) => {
                user::write(values.wrapping_add(guest.nth * 8), &word)?;
                guest.advance(1);
            }
            _ => guest.advance(1),
        }
        Ok(())
    }

    fn call(&self, guest: &mut Guest, number: u64, args: [u64; 4]) -> Ended {
        let is_long = guest.registers.is_in_long_mode();
        let args = args.map(|argument| if is_long { argument } else { argument & u64::from(u32::MAX) });
        let [gpa, pages, ..] = args;
        if number != HYPERCALL_MAP_GPA_RANGE || !self.vm().exits_on_hypercall(number) {
            guest.answered(GUEST_ENOSYS.wrapping_neg());
            return Ended::Advanced;
        }
        let first = gpa >> 12;
        if gpa % 4096 != 0 || pages == 0 || first.wrapping_add(pages) <= first {
            guest.answered(GUEST_EINVAL.wrapping_neg());
            return Ended::Advanced;
        }
        guest.owed = Some(Owed::Answer);
        self.page().set_hypercall(number, &args[..3], is_long);
        Ended::Exit
    }
}

/// `kvm_run.hypercall`.
type HypercallExit = kvm_run__bindgen_ty_1__bindgen_ty_8;
/// `kvm_run.mmio`.
type MmioExit = kvm_run__bindgen_ty_1__bindgen_ty_6;
/// `kvm_run.io`.
type IoExit = kvm_run__bindgen_ty_1__bindgen_ty_4;

fn put_out(page: &RunPage, port: u16, width: Width, value: u32) {
    let data = page.set_port_data(&value.to_le_bytes()[..width.bytes()]);
    page.set_exit_reason(KVM_EXIT_IO);
    page.set_exit(offset_of!(IoExit, direction), &[KVM_EXIT_IO_OUT as u8]);
    page.set_exit(offset_of!(IoExit, size), &[width.bytes() as u8]);
    page.set_exit(offset_of!(IoExit, port), &port.to_le_bytes());
    page.set_exit(offset_of!(IoExit, count), &1u32.to_le_bytes());
    page.set_exit(offset_of!(IoExit, data_offset), &data.to_le_bytes());
}

impl RunPage {
    fn set_mmio(&self, gpa: u64, width: Width, written: Option<u64>) {
        self.set_exit_reason(KVM_EXIT_MMIO);
        self.set_exit(offset_of!(MmioExit, phys_addr), &gpa.to_le_bytes());
        self.set_exit(offset_of!(MmioExit, data), &written.unwrap_or(0).to_le_bytes());
        self.set_exit(offset_of!(MmioExit, len), &(width.bytes() as u32).to_le_bytes());
        self.set_exit(offset_of!(MmioExit, is_write), &[u8::from(written.is_some())]);
    }

    fn set_emulation_failed(&self) {
        self.set_exit_reason(KVM_EXIT_INTERNAL_ERROR);
        self.set_exit(0, &KVM_INTERNAL_ERROR_EMULATION.to_le_bytes());
        // Nothing is told of the instruction.
        self.set_exit(4, &0u32.to_le_bytes());
    }

    fn set_hypercall(&self, number: u64, args: &[u64], is_long: bool) {
        self.set_exit_reason(KVM_EXIT_HYPERCALL);
        self.set_exit(offset_of!(HypercallExit, nr), &number.to_le_bytes());
        for (nth, argument) in args.iter().enumerate() {
            self.set_exit(offset_of!(HypercallExit, args) + 8 * nth, &argument.to_le_bytes());
        }
        self.set_exit(offset_of!(HypercallExit, ret), &0u64.to_le_bytes());
        self.set_exit(offset_of!(HypercallExit, __bindgen_anon_1), &u64::from(is_long).to_le_bytes());
    }

    /// `KVM_EXIT_MEMORY_FAULT`.
    pub fn set_memory_fault(&self, fault: MemoryFault) {
        self.set_exit_reason(KVM_EXIT_MEMORY_FAULT);
        for (nth, field) in [fault.flags, fault.gpa, fault.size].iter().enumerate() {
            self.set_exit(8 * nth, &field.to_le_bytes());
        }
    }
}
