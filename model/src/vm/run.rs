//! KVM_RUN: the guest does what was queued for it, and takes the faults and exits that a real one would.
//!
//! A guest is its accesses: words of memory, read or written. Each is made by the processor's own walk of the
//! tables; where that fails, KVM handles the fault, and the access is made again until it goes through or the VMM must see to
//! it. Nothing of what a real guest would compute is modelled.

use super::fault::{Fault, Outcome};
use super::pre_fault::MemoryFault;
use super::vcpu::{State as VcpuState, Vcpu};
use crate::errno::Errno;
use crate::mistake::{Mistake, mistaken};
use crate::mmu::{AccessKind, Mirroring, Root, Violation};
use crate::personality::VmType;
use crate::snp::Refusal;
use crate::tdx::guest::State;
use crate::tdx::{Accept, Access as TdAccess, InGuest, Tdx, TdxVcpu};
use crate::units::{Gfn, GfnRange, Level, PAGE_SIZE, Pfn, Privacy, Width};

/// What a guest does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Reads the word.
    Read,
    /// Writes it.
    Write(u64),
    /// Executes from the page.
    Fetch,
    /// Accepts the page, so that it can be used: `TDG.MEM.PAGE.ACCEPT`, or PVALIDATE.
    Accept,
    /// Gives up a page that it accepted, as an SNP guest does that is to share it: PVALIDATE. Others have no such thing.
    GiveUp,
}

/// An access to a word of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// Where its word is, without the shared bit. What is not a multiple of the width is rounded down.
    pub gpa: u64,
    /// How many bytes the word has.
    pub width: Width,
    /// What is done.
    pub operation: Operation,
    /// How the guest addresses it: with TDX by the shared bit, with SNP by the C bit. A guest of another type cannot choose,
    /// its memory is what KVM was told.
    pub privacy: Privacy,
}

/// Why a run ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// All that was queued is done.
    Done,
    /// The guest accesses what is no memory, or writes what cannot be written (`KVM_EXIT_MMIO`). The access is over.
    Mmio {
        /// The first byte.
        gpa: u64,
        /// How many bytes.
        width: Width,
        /// What it writes.
        written: Option<u64>,
    },
    /// The guest executes what is no memory, where KVM finds no instruction to emulate (`KVM_EXIT_INTERNAL_ERROR`). The access
    /// is over: the guest gets #UD.
    EmulationFailed {
        /// The first byte.
        gpa: u64,
    },
    /// The guest gets an exception of its own: for an access to what is no memory, since the host cannot emulate it, or for
    /// one to what it has not accepted (#VC, #VE). The access is over.
    GuestException {
        /// The first byte.
        gpa: u64,
    },
    /// The access has to wait for the VMM (`KVM_EXIT_MEMORY_FAULT`, with this error). It is made again at the next run.
    MemoryFault(Errno, MemoryFault),
    /// KVM_RUN failed with nothing said. The access is made again at the next run.
    Failed(Errno),
    /// The processor, or the module, does not let the vCPU into the guest. The access is made again at the next run.
    NotEntered {
        /// What `struct kvm_run` tells: `KVM_EXIT_FAIL_ENTRY` of an SNP guest, `KVM_EXIT_INTERNAL_ERROR` of a TDX guest.
        exit_reason: u32,
    },
}

const EXIT_FAIL_ENTRY: u32 = 9;
const EXIT_INTERNAL_ERROR: u32 = 17;

/// What a run came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// Why it ended.
    pub exit: Exit,
    /// The words that the guest has read, in order.
    pub read: Vec<u64>,
}

/// How one access ended.
enum Ended {
    Done(Option<u64>),
    Exit(Exit),
}

/// What an access came to that KVM is not asked about.
enum Reached {
    /// Memory, and the word that was read.
    Memory(Option<u64>),
    /// Nothing: the vCPU was not let in, or the virtual machine has died of the access. To be looked at again.
    Nothing,
    /// Nothing: the module does not let the vCPU in at all.
    Refused,
    /// A page that the guest has not accepted.
    NotAccepted,
    /// A frame that is not the guest's.
    NotTheGuests,
}

impl From<Refusal> for Reached {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NotValidated => Reached::NotAccepted,
            Refusal::NotTheGuests => Reached::NotTheGuests,
        }
    }
}

impl Vcpu {
    /// KVM_RUN.
    pub fn run(&self) -> Run {
        let mut read = Vec::new();
        let mut state = self.enter();
        if !self.vm.is_dead() && self.needs_initialization() {
            return Run { exit: Exit::Failed(Errno::EINVAL), read };
        }
        let has_state = self.vm.snp().is_none_or(|snp| snp.has_measured(self.index));
        let exit = loop {
            if self.vm.is_dead() {
                break Exit::Failed(Errno::EIO);
            }
            if self.is_signal_pending() {
                // It is seen just before the guest would run: with a root.
                state.root(self, Privacy::Shared);
                self.counters.signal_exits.count();
                break Exit::Failed(Errno::EINTR);
            }
            if !has_state {
                // Its state is no page of the guest's yet (`snp_launch_update_vmsa`), which VMRUN wants.
                break Exit::NotEntered { exit_reason: EXIT_FAIL_ENTRY };
            }
            let Some(access) = state.queue.front().copied() else { break Exit::Done };
            match self.make(&mut state, access) {
                Ended::Done(word) => read.extend(word),
                Ended::Exit(exit @ (Exit::MemoryFault(..) | Exit::Failed(_) | Exit::NotEntered { .. })) => {
                    break exit;
                }
                Ended::Exit(exit) => {
                    state.queue.pop_front();
                    break exit;
                }
            }
            state.queue.pop_front();
        };
        Run { exit, read }
    }

    /// A TDX guest cannot run before it is finalized (`tdx_vcpu_needs_initialization`), nor an SNP guest before it is one
    /// (`sev_vcpu_needs_initialization`).
    fn needs_initialization(&self) -> bool {
        if let Some(snp) = self.vm.snp() {
            return snp.asid().is_none();
        }
        let is_ready = |tdx: &Tdx, vcpu: &TdxVcpu| vcpu.is_initialized() && tdx.state() == State::Runnable;
        match (self.vm.tdx(), &self.tdx) {
            (Some(tdx), Some(vcpu)) => !is_ready(tdx, vcpu),
            _ => false,
        }
    }

    /// Makes an access, however many faults it takes.
    fn make(&self, state: &mut VcpuState, access: Access) -> Ended {
        let vm = &self.vm;
        let gfn = Gfn::of_gpa(access.gpa);
        if (vm.vm_type, access.privacy, access.operation) == (VmType::Tdx, Privacy::Shared, Operation::Fetch)
        {
            // No processor asks KVM about that, which would take it for broken (`tdx_handle_ept_violation`).
            return Ended::Exit(Exit::GuestException { gpa: access.gpa });
        }
        let mut is_refused_still = false;
        loop {
            if vm.is_dead() {
                return Ended::Exit(Exit::Failed(Errno::EIO));
            }
            if self.is_signal_pending() {
                self.counters.signal_exits.count();
                return Ended::Exit(Exit::Failed(Errno::EINTR));
            }
            let privacy = self.privacy_of(&access);
            let root = state.root(self, privacy);
            vm.settle(state.as_id(), GfnRange::new(gfn, 1));
            let is_refused;
            let violation = match self.access_memory(&root, gfn, access) {
                Ok(Reached::Memory(word)) => return Ended::Done(word),
                Ok(Reached::Nothing) => continue,
                Ok(Reached::Refused) => {
                    return Ended::Exit(Exit::NotEntered { exit_reason: EXIT_INTERNAL_ERROR });
                }
                Ok(Reached::NotAccepted) => return Ended::Exit(Exit::GuestException { gpa: access.gpa }),
                Ok(Reached::NotTheGuests) if is_refused_still => return self.fault_for_ever(),
                Ok(Reached::NotTheGuests) => {
                    is_refused = true;
                    Violation::Protected
                }
                Err(violation) => {
                    is_refused = false;
                    violation
                }
            };
            let mut fault = Fault::new(gfn, privacy, access.operation.kind())
                .of_violation(violation == Violation::Protected);
            if let Violation::Mmio { generation } = violation {
                // A guest whose state is its own the processor tells at once (#VE, #VC), without asking KVM whether slots have
                // changed since: it goes on until something is mapped there (`tdx_vm_init`, `sev_hardware_setup`).
                if vm.vm_type.has_protected_state() {
                    return self.emulate(access);
                }
                // A private page is never taken for none.
                if self.remembers_no_memory(&root, gfn) || self.is_current(&root, generation) {
                    self.note_no_memory(&root, gfn);
                    return self.emulate(access);
                }
                // What faults at an entry for no memory KVM takes for a shared access, even where the page has
                // become private meanwhile.
                fault = fault.of_outdated_mmio();
            }
            self.counters.pf_taken.count();
            let slots = vm.slots.read();
            let result = self.handle_fault(&root, &slots.of(state.as_id()), &mut fault);
            drop(slots);
            is_refused_still = is_refused && matches!(result, Ok(Outcome::Fixed | Outcome::Spurious));
            match result {
                Ok(Outcome::Fixed) => self.counters.pf_fixed.count(),
                Ok(Outcome::Spurious) => self.counters.pf_spurious.count(),
                Ok(Outcome::Retry) => {
                    if mistaken(Mistake::ARetryCountsAsFixed) {
                        self.counters.pf_fixed.count();
                    }
                }
                Ok(Outcome::Emulate) => {
                    self.counters.pf_emulate.count();
                    return self.emulate(access);
                }
                Err(error) => {
                    let exit = match error.exit {
                        Some(told) => Exit::MemoryFault(error.errno, told),
                        None => Exit::Failed(error.errno),
                    };
                    return Ended::Exit(exit);
                }
            }
        }
    }

    /// The table of frames refuses the access, and KVM, to which that is told, finds everything mapped as it should be: the
    /// guest faults again. It would never end. Nobody waits for that: the signal comes at once.
    fn fault_for_ever(&self) -> Ended {
        self.counters.signal_exits.count();
        Ended::Exit(Exit::Failed(Errno::EINTR))
    }

    /// Of a software-protected VM each page is what KVM was told that it is.
    fn privacy_of(&self, access: &Access) -> Privacy {
        match self.vm.vm_type {
            VmType::Default => Privacy::Shared,
            VmType::SwProtected => self.vm.privacy(Gfn::of_gpa(access.gpa)),
            VmType::Snp | VmType::Tdx => access.privacy,
        }
    }

    fn is_current(&self, root: &Root, generation: u64) -> bool {
        const KEPT: u64 = (1 << 18) - 1;
        mistaken(Mistake::NoMemoryIsRememberedForEver)
            || generation & KEPT == self.vm.slots.generation(self.vm.as_id_of(root)) & KEPT
    }

    /// The access as the processor makes it. What it reaches stays mapped until it is over.
    fn access_memory(&self, root: &Root, gfn: Gfn, access: Access) -> Result<Reached, Violation> {
        let vm = &self.vm;
        let operation = access.operation;
        let lock;
        let in_guest;
        let pfn = match (vm.tdx(), root.mirroring()) {
            (Some(tdx), Mirroring::Mirror) => {
                let vcpu = self.tdx.as_deref().ok_or(Violation::NotPresent)?;
                // Who removes pages keeps vCPUs out: to be tried again, which counts for nothing (`tdx_vcpu_run`). Another refusal
                // is none of KVM's bugs (`__tdx_handle_exit`).
                in_guest = match tdx.enter(vcpu) {
                    Ok(Some(in_guest)) => in_guest,
                    Ok(None) => return Ok(Reached::Nothing),
                    Err(_) => return Ok(Reached::Refused),
                };
                match self.access_external(&in_guest, gfn, operation)? {
                    Ok(pfn) => pfn,
                    Err(reached) => return Ok(reached),
                }
            }
            _ => {
                lock = vm.mmu.lock_shared();
                let pfn = lock.hardware_access(root, gfn, operation.kind())?.pfn;
                if let Err(refusal) = self.ask_table_of_frames(gfn, pfn, &access) {
                    return Ok(refusal.into());
                }
                pfn
            }
        };
        let (offset, width) = (access.offset(), access.width.bytes());
        match operation {
            Operation::Read => {
                let mut word = [0; 8];
                vm.host.read_frame(pfn, offset, &mut word[..width]);
                if self.sees_ciphertext(pfn, &access) {
                    word[..width].iter_mut().for_each(|byte| *byte = !*byte);
                }
                return Ok(Reached::Memory(Some(u64::from_le_bytes(word))));
            }
            Operation::Write(word) => vm.host.write_frame(pfn, offset, &word.to_le_bytes()[..width]),
            Operation::Fetch | Operation::Accept | Operation::GiveUp => {}
        }
        Ok(Reached::Memory(None))
    }

    /// What the processor makes of an SNP guest's access by whose the frame is.
    fn ask_table_of_frames(&self, gfn: Gfn, pfn: Pfn, access: &Access) -> Result<(), Refusal> {
        let Some(snp) = self.vm.snp() else { return Ok(()) };
        match (access.privacy, access.operation) {
            (Privacy::Private, Operation::Accept) => snp.validate(gfn, pfn, true),
            (Privacy::Private, Operation::GiveUp) => snp.validate(gfn, pfn, false),
            (Privacy::Private, _) => snp.check_private_access(gfn, pfn),
            (Privacy::Shared, Operation::Write(_)) => snp.check_shared_write(pfn),
            (Privacy::Shared, _) => Ok(()),
        }
    }

    /// What the guest reads as shared of a frame that is a guest's is something else than was written there, without a fault.
    fn sees_ciphertext(&self, pfn: Pfn, access: &Access) -> bool {
        let as_shared = self.vm.snp().filter(|_| access.privacy == Privacy::Shared);
        as_shared.is_some_and(|snp| !snp.rmp().is_hosts(pfn))
    }

    /// A private access of a TDX guest, by the table that it really runs on: to which frame, or what else it reaches.
    fn access_external(
        &self,
        in_guest: &InGuest<'_>,
        gfn: Gfn,
        operation: Operation,
    ) -> Result<Result<Pfn, Reached>, Violation> {
        if operation == Operation::Accept {
            return match in_guest.accept(gfn, Level::SMALL) {
                Accept::Violation => Err(Violation::NotPresent),
                // One that is accepted already is the guest's own matter.
                Accept::Done(_) | Accept::Refused(_) => Ok(Err(Reached::Memory(None))),
            };
        }
        if operation == Operation::GiveUp {
            return Ok(Err(Reached::Memory(None)));
        }
        match in_guest.access(gfn) {
            TdAccess::Done(pfn) => Ok(Ok(pfn)),
            TdAccess::Violation => Err(Violation::NotPresent),
            // The guest uses what it has not accepted, which KVM can do nothing for, and does not count as a fault.
            TdAccess::Pending => {
                self.vm.kill();
                Ok(Err(Reached::Nothing))
            }
            TdAccess::VirtualizationException => Ok(Err(Reached::NotAccepted)),
        }
    }

    /// An access to what is no memory, or a write to what cannot be written.
    fn emulate(&self, access: Access) -> Ended {
        let Access { gpa, width, .. } = access;
        if self.vm.vm_type.has_protected_state() {
            return Ended::Exit(Exit::GuestException { gpa });
        }
        if access.operation == Operation::Fetch {
            return Ended::Exit(Exit::EmulationFailed { gpa });
        }
        self.counters.mmio_exits.count();
        let written = match access.operation {
            Operation::Write(word) => Some(word),
            _ => None,
        };
        Ended::Exit(Exit::Mmio { gpa, width, written })
    }
}

impl Access {
    /// Where in its page the word begins.
    fn offset(&self) -> usize {
        (self.gpa % PAGE_SIZE) as usize & !(self.width.bytes() - 1)
    }
}

impl Operation {
    fn kind(self) -> AccessKind {
        match self {
            Operation::Read | Operation::Accept | Operation::GiveUp => AccessKind::Read,
            Operation::Write(_) => AccessKind::Write,
            Operation::Fetch => AccessKind::Fetch,
        }
    }
}
