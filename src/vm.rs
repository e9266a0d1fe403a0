//! What the library remembers of one guest: its slots, what is populated, and the work under way.
//!
//! This is where slot changes meet running work: a change is announced, the work lets go, the change is noted.
//! It never closes a descriptor of the VMM's and holds no lock across a system call that can wait.

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::{Caps, QUIRK_SLOT_ZAP_ALL};
use crate::kvm::{Errno, FileId, Kernel};
use crate::memslot::alignment::Demand;
use crate::memslot::check::{self, Change, Descriptor, Verdict, check_overlap};
use crate::memslot::{Memslot, SlotId, SlotRecord, address_space, check_guest_width};
use crate::populate::coverage::{Coverage, Covered, Loss};
use crate::populate::queue::Queue;
use crate::range::Range;
use once_cell::sync::OnceCell;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How a handle is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Config {
    /// The VM's descriptor; stays the caller's.
    pub vm_fd: RawFd,
    /// Bits of a guest physical address; `None`: as many as the host has.
    pub gpa_bits: Option<u32>,
    /// Disable the slot-zap-all quirk.
    pub keep_mappings: bool,
    /// The caller has disabled that quirk itself.
    pub mappings_are_kept: bool,
    /// `KVM_X86_*`: the VM's type.
    pub vm_type: u32,
    /// TDX: the bit of a gpa that says "shared", as a mask.
    pub gpa_shared_bit: u64,
    /// What slots are held to that the handle sets.
    pub demand: Demand,
}

/// One guest.
pub struct Vm {
    pub(crate) kernel: Arc<dyn Kernel>,
    config: Config,
    mappings_are_kept: bool,
    caps: OnceCell<Caps>,
    memory: Mutex<Memory>,
    work: Mutex<Vec<Weak<Queue>>>,
    /// Counts pre-faults that have ended; a futex.
    pre_faults_ended: AtomicU32,
}

/// The part of a guest that changes.
#[derive(Default)]
pub(crate) struct Memory {
    pub slots: SlotRecord,
    pub coverage: Coverage,
    /// Counts changes announced and noted.
    pub changes: u64,
    /// Pre-faults under way, counted where one could hang, and those who wait for their end.
    pre_faults: usize,
    awaiting_pre_faults: usize,
}

/// Disables the slot-zap-all quirk of a VM.
pub fn keep_mappings(kernel: &dyn Kernel, vm_fd: RawFd) -> Result<()> {
    check_vm(kernel, vm_fd)?;
    let caps =
        Caps::probe(kernel, None, Some(vm_fd)).map_err(|errno| Error::kernel(errno, "probing the VM"))?;
    if !caps.can_keep_mappings {
        return Err(Error::new(
            libc::EOPNOTSUPP,
            Reason::KernelRefused,
            "this kernel cannot keep stage-2 mappings across the deletion of a memslot",
        )
        .hint("needs Linux 6.12 on x86-64; populate again after slots have changed"));
    }
    kernel
        .disable_quirks(vm_fd, QUIRK_SLOT_ZAP_ALL)
        .map_err(|errno| Error::kernel(errno, "disabling KVM_X86_QUIRK_SLOT_ZAP_ALL"))
}

/// Whether the descriptor is not known to be something else than a VM.
pub(crate) fn is_vm(kernel: &dyn Kernel, fd: RawFd) -> bool {
    kernel.file_name(fd).is_none_or(|name| name.contains("kvm-vm"))
}

/// Refuses what is no VM. /dev/kvm answers what the probe asks too, so the probe's answers cannot tell.
pub(crate) fn check_vm(kernel: &dyn Kernel, fd: RawFd) -> Result<()> {
    if is_vm(kernel, fd) {
        return Ok(());
    }
    Err(Error::new(libc::EBADF, Reason::BadFd, format!("descriptor {fd} is not a VM"))
        .hint("pass what KVM_CREATE_VM returned"))
}

/// Why KVM did not take a slot. What is known of any refusal of its own goes before what is known of slots.
fn refused_slot(slot: &Memslot, verdict: Verdict, errno: Errno) -> Error {
    if let (libc::EINVAL, Some(binding)) = (errno.0, verdict.binds) {
        let fd = slot.region.guest_memfd;
        let or_none = if binding.is_certain { "" } else { ", or none" };
        let error = Error::invalid(
            Reason::GmemOtherVm,
            format!(
                "KVM refused the memslot: guest_memfd {fd} is another VM's{or_none}, or there is a slot that the handle was \
                 not told of"
            ),
        );
        let error = error.hint(
            "use a guest_memfd made for this VM; tell the handle of each slot that has this number or part of the file",
        );
        return Error { range: slot.range(), ..error.stage(Stage::Memslot).slot(slot.id()) };
    }
    let mut error = Error::kernel(errno, "KVM_SET_USER_MEMORY_REGION").stage(Stage::Memslot).slot(slot.id());
    error.range = slot.range();
    if !error.hint.is_empty() {
        return error;
    }
    error.hint(match errno.0 {
        libc::EINVAL => {
            "tell the handle of every slot there is, and of each change: by those it was told of, this one is right"
        }
        libc::EEXIST => "tell the handle of every slot there is: KVM has one there already",
        libc::ENOTTY => "needs x86-64, and for a guest_memfd Linux 6.8",
        _ => "the slot is as it was before",
    })
}

impl Vm {
    /// A handle without slots.
    pub fn new(kernel: Arc<dyn Kernel>, config: Config) -> Result<Self> {
        check_vm(&*kernel, config.vm_fd)?;
        if config.keep_mappings {
            keep_mappings(&*kernel, config.vm_fd)?;
        }
        let mut vm = Self {
            kernel,
            config,
            mappings_are_kept: config.keep_mappings || config.mappings_are_kept,
            caps: OnceCell::new(),
            memory: Mutex::default(),
            work: Mutex::default(),
            pre_faults_ended: AtomicU32::new(0),
        };
        let caps = vm.caps()?;
        caps.check_type(config.vm_type)?;
        // Other types than the default have not had the quirk since there has been a way to disable it.
        vm.mappings_are_kept |= config.vm_type != 0 && caps.can_keep_mappings;
        Ok(vm)
    }

    /// The VM's descriptor.
    pub(crate) fn fd(&self) -> RawFd {
        self.config.vm_fd
    }

    /// What this VM offers.
    pub fn caps(&self) -> Result<&Caps> {
        self.caps.get_or_try_init(|| {
            let caps = Caps::probe(&*self.kernel, None, Some(self.fd()))
                .map_err(|errno| Error::kernel(errno, "probing the VM"))?;
            let Config { vm_type, gpa_shared_bit, .. } = self.config;
            Ok(Caps { vm_type, gpa_shared_bit, ..caps })
        })
    }

    /// Bits of a guest physical address.
    pub fn gpa_bits(&self) -> Result<u32> {
        Ok(self.config.gpa_bits.unwrap_or(self.caps()?.gpa_bits))
    }

    /// Bits that a memslot's addresses may have: the guest's, where they were told, else what KVM takes.
    fn memslot_gpa_bits(&self) -> Result<u32> {
        Ok(self.config.gpa_bits.unwrap_or(self.caps()?.memslot_gpa_bits()))
    }

    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) -> Vec<Arc<Queue>> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        work.retain(|queue| queue.strong_count() > 0);
        work.iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether any job of it lives.
    pub fn has_jobs(&self) -> bool {
        !self.work().is_empty()
    }

    /// A job's queue wants to hear of memory that goes away.
    pub(crate) fn register(&self, queue: &Arc<Queue>) {
        self.work.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(queue));
    }

    fn withdraw(&self, range: Range) {
        for queue in self.work() {
            queue.withdraw(range);
        }
    }

    /// Replaces the record by `slots`.
    pub fn set_memslots(&self, slots: &[Memslot]) -> Result<()> {
        let gpa_bits = self.memslot_gpa_bits()?;
        let mut fresh = SlotRecord::default();
        for slot in slots {
            slot.check(gpa_bits)?;
            let unusable = |message: &str| {
                Error::invalid(Reason::BadValue, message).stage(Stage::Memslot).slot(slot.id())
            };
            if slot.range().is_none() {
                return Err(
                    unusable("a slot in the list has size 0").hint("list the slots there are, not deletions")
                );
            }
            if fresh.get(slot.id()).is_some() {
                return Err(unusable("a slot number stands in the list twice").hint("list each slot once"));
            }
            check_overlap(&fresh, slot)?;
            fresh.replace(slot, self.guest_memfd_of(slot));
        }
        let gone: Vec<Memslot> =
            self.memory().slots.iter().filter(|old| fresh.get(old.id()) != Some(old)).copied().collect();
        for old in &gone {
            self.changing(old.id());
        }
        let mut memory = self.memory();
        for old in &gone {
            self.note_loss(&mut memory, Some(old), fresh.get(old.id()));
        }
        memory.slots = fresh;
        Ok(())
    }

    /// A slot is about to change: returns once no worker touches its memory.
    pub fn changing(&self, slot: SlotId) {
        let range = {
            let mut memory = self.memory();
            memory.slots.set_changing(slot, true);
            memory.changes += 1;
            let range = memory.slots.get(slot).and_then(Memslot::range);
            if range.is_some() && !self.mappings_are_kept {
                memory.coverage.zap_may_come();
            }
            range
        };
        if range.is_some() {
            self.await_pre_faults();
        }
        // Population is of address space 0 alone; the others' slots are in no queue.
        if let (Some(range), 0) = (range, address_space(slot)) {
            self.withdraw(range);
        }
    }

    /// Whether a pre-fault of any slot hangs when any slot is deleted meanwhile. Deleting a slot makes all page
    /// tables obsolete, and a pre-fault under way goes on trying with those it began with, until a signal comes
    /// (Linux 7.3 too). Where mappings are kept it is not so.
    fn has_hanging_zaps(&self) -> bool {
        !self.mappings_are_kept
    }

    /// Whether a pre-fault may begin now. If so, [`Vm::end_pre_fault`] must follow.
    pub(crate) fn begin_pre_fault(&self) -> bool {
        if !self.has_hanging_zaps() {
            return true;
        }
        let mut memory = self.memory();
        if memory.slots.is_any_changing() {
            return false;
        }
        memory.pre_faults += 1;
        true
    }

    /// A pre-fault is over.
    pub(crate) fn end_pre_fault(&self) {
        if !self.has_hanging_zaps() {
            return;
        }
        let is_awaited = {
            let mut memory = self.memory();
            memory.pre_faults -= 1;
            memory.pre_faults == 0 && memory.awaiting_pre_faults > 0
        };
        if is_awaited {
            self.pre_faults_ended.fetch_add(1, Ordering::SeqCst);
            self.kernel.wake(&self.pre_faults_ended);
        }
    }

    /// Returns once no pre-fault is under way, where one could hang on a slot's change.
    fn await_pre_faults(&self) {
        if !self.has_hanging_zaps() {
            return;
        }
        self.memory().awaiting_pre_faults += 1;
        loop {
            let ended = self.pre_faults_ended.load(Ordering::SeqCst);
            {
                let mut memory = self.memory();
                if memory.pre_faults == 0 {
                    memory.awaiting_pre_faults -= 1;
                    return;
                }
            }
            // A signal is no reason not to wait: the slot is about to go.
            let _ = self.kernel.wait(&self.pre_faults_ended, ended, Duration::from_millis(20));
        }
    }

    /// A slot has changed.
    pub fn note(&self, slot: &Memslot) -> Result<()> {
        slot.check(self.memslot_gpa_bits()?)?;
        let file = self.guest_memfd_of(slot);
        let old = {
            let mut memory = self.memory();
            check_overlap(&memory.slots, slot)?;
            let old = memory.slots.replace(slot, file);
            memory.changes += 1;
            self.note_loss(&mut memory, old.as_ref(), Some(slot));
            old
        };
        // Where the change was not announced, jobs still have the old slot in their queues.
        let gone = old.filter(|old| old != slot && address_space(old.id()) == 0).and_then(|old| old.range());
        if let Some(gone) = gone {
            self.work().iter().for_each(|queue| queue.take_away(gone));
        }
        Ok(())
    }

    /// Checks, announces, sets and notes a slot.
    pub fn set(&self, slot: &Memslot) -> Result<()> {
        let verdict = match self.check(slot) {
            Err(error) if error.reason == Reason::MemslotAbsent => return self.delete_unknown(slot, error),
            verdict => verdict?,
        };
        self.config.demand.check(&*self.kernel, slot, verdict.change)?;
        if verdict.change == Change::None {
            return self.note(slot);
        }
        self.changing(slot.id());
        if let Err(errno) = self.kernel.set_region(self.fd(), &slot.region) {
            let mut memory = self.memory();
            memory.slots.set_changing(slot.id(), false);
            if verdict.change == Change::Move {
                // KVM drops the mappings first, and puts back the slot alone.
                self.note_unmapped(&mut memory, slot.id());
            }
            return Err(refused_slot(slot, verdict, errno));
        }
        self.note(slot)
    }

    /// Deletes a slot that the handle was not told of, if KVM has it.
    fn delete_unknown(&self, slot: &Memslot, unknown: Error) -> Result<()> {
        self.kernel.set_region(self.fd(), &slot.region).map_err(|errno| match errno.0 {
            libc::EINVAL => unknown,
            _ => Error::kernel(errno, "KVM_SET_USER_MEMORY_REGION").stage(Stage::Memslot).slot(slot.id()),
        })?;
        if !self.mappings_are_kept {
            self.memory().coverage.lost_all_stage2();
        }
        self.note(slot)
    }

    /// Whether KVM would take the slot, as far as the handle knows of others.
    pub fn check(&self, slot: &Memslot) -> Result<Verdict> {
        let caps = self.caps()?;
        let descriptor = check::look(&*self.kernel, slot);
        let verdict = check::check(caps, &self.memory().slots, slot, descriptor)?;
        if let (Some(range), Some(bits)) = (slot.range(), self.config.gpa_bits) {
            check_guest_width(range, bits).map_err(|e| e.stage(Stage::Memslot).slot(slot.id()))?;
        }
        Ok(verdict)
    }

    /// Which file the slot's guest_memfd is, where it has one.
    fn guest_memfd_of(&self, slot: &Memslot) -> Option<FileId> {
        match check::look(&*self.kernel, slot)? {
            Descriptor::Usable(binding) => Some(binding.file.id),
            Descriptor::Closed(_) | Descriptor::Foreign => None,
        }
    }

    /// A slot has stayed, and its stage-2 mappings have not.
    fn note_unmapped(&self, memory: &mut Memory, slot: SlotId) {
        let place = memory.slots.get(slot).and_then(Memslot::range).filter(|_| address_space(slot) == 0);
        if let Some(place) = place {
            memory.coverage.lost_stage2(place, Loss::SlotChanged);
        }
        if !self.mappings_are_kept {
            memory.coverage.zap_may_come();
            memory.coverage.lost_all_stage2();
        }
    }

    /// What the change from `old` to `new` has cost.
    fn note_loss(&self, memory: &mut Memory, old: Option<&Memslot>, new: Option<&Memslot>) {
        let Some((old, place)) = old.and_then(|old| Some((old, old.range()?))) else { return };
        let same_memory = new.is_some_and(|new| {
            (new.region.gpa, new.region.size, new.region.hva) == (place.start, place.size(), old.region.hva)
                && new.region.guest_memfd_offset == old.region.guest_memfd_offset
                && new.has_guest_memfd() == old.has_guest_memfd()
                && new.is_read_only() == old.is_read_only()
        });
        let in_space_0 = address_space(old.id()) == 0;
        if same_memory {
            if in_space_0 && new.is_some_and(Memslot::is_dirty_logged) && !old.is_dirty_logged() {
                memory.coverage.write_protected(place);
            }
            return;
        }
        if in_space_0 {
            memory.coverage.forget(place);
        }
        if !self.mappings_are_kept {
            memory.coverage.zap_may_come();
            memory.coverage.lost_all_stage2();
        }
    }

    /// Memory is about to be discarded: returns once no worker touches it.
    pub fn discarded(&self, range: Range) {
        self.withdraw(range);
        self.memory().coverage.discarded(range);
    }

    /// Memory of this process is about to be discarded: whatever guest memory it is.
    pub fn host_discarded(&self, host: Range) {
        let guest: Vec<Range> =
            self.memory().slots.of_address_space(0).filter_map(|(_, slot)| slot.gpas_of(host)).collect();
        guest.into_iter().for_each(|range| self.discarded(range));
    }

    /// How much of `range` is populated, and how much of it is memory at all.
    pub fn coverage(&self, range: Range) -> (u64, Covered) {
        let memory = self.memory();
        let slots = memory.slots.touching(0, range).filter_map(|(place, _)| place.intersect(&range));
        (slots.map(|part| part.size()).sum(), memory.coverage.within(range))
    }
}
