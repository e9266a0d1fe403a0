//! From an access that found no mapping to one that does: the path that the guest's faults and pre-faults share.
//!
//! The frame is looked up with no lock held, and the lock is taken only then; if anything was invalidated in between, the
//! fault is tried again from the start. Who asks decides how often: a guest by running on, a pre-fault in a loop.

use super::Vm;
use super::pre_fault::MemoryFault;
use super::vcpu::Vcpu;
use crate::errno::{Errno, Result};
use crate::host::FollowError;
use crate::memslot::{Memslot, Memslots};
use crate::mistake::{Mistake, mistaken};
use crate::mmu::{
    AccessKind, DirtyLog, FastFault, InvalidationSnapshot, MapResult, Mapping, NoMemory, Root, Shared,
};
use crate::units::{Gfn, Level, PAGE_SIZE, Pfn, Privacy};
use std::sync::Arc;

/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`.
const EXIT_PRIVATE: u64 = 1 << 3;

/// What became of a fault (`RET_PF_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// There is a mapping now.
    Fixed,
    /// There was one.
    Spurious,
    /// Something changed meanwhile: the access is to be made again.
    Retry,
    /// There is no memory, or none that can be written: the instruction must be emulated.
    Emulate,
}

/// Why a fault cannot be handled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FaultError {
    pub(super) errno: Errno,
    /// What the VMM is told beside the error.
    pub(super) exit: Option<MemoryFault>,
    /// A signal ended the search for a frame (`kvm_handle_signal_exit`).
    pub(super) is_interrupted: bool,
}

impl From<Errno> for FaultError {
    fn from(errno: Errno) -> Self {
        FaultError { errno, exit: None, is_interrupted: false }
    }
}

/// A fault (`struct kvm_page_fault`).
pub(super) struct Fault {
    gfn: Gfn,
    privacy: Privacy,
    kind: AccessKind,
    is_prefetch: bool,
    /// The processor found an entry that does not allow the access.
    is_violation: bool,
    /// The processor found an entry that says that there is no memory, of older memslots.
    is_outdated_mmio: bool,
    /// The level that it was to be mapped with. That of small pages until it is known.
    pub(super) goal_level: Level,
}

impl Fault {
    pub(super) fn new(gfn: Gfn, privacy: Privacy, kind: AccessKind) -> Self {
        Fault {
            gfn,
            privacy,
            kind,
            is_prefetch: false,
            is_violation: false,
            is_outdated_mmio: false,
            goal_level: Level::SMALL,
        }
    }

    pub(super) fn by_pre_fault(self) -> Self {
        Fault { is_prefetch: true, ..self }
    }

    pub(super) fn of_violation(self, is_violation: bool) -> Self {
        Fault { is_violation, ..self }
    }

    pub(super) fn of_outdated_mmio(self) -> Self {
        Fault { is_outdated_mmio: true, privacy: Privacy::Shared, ..self }
    }

    fn is_write(&self) -> bool {
        self.kind == AccessKind::Write
    }

    fn error_with_exit(&self, errno: Errno) -> FaultError {
        let flags = if self.privacy == Privacy::Private { EXIT_PRIVATE } else { 0 };
        let exit = Some(MemoryFault { gpa: self.gfn.gpa(), size: PAGE_SIZE, flags });
        FaultError { errno, exit, is_interrupted: false }
    }
}

/// The frame that was found behind a fault.
struct Found<'a> {
    slot: &'a Arc<Memslot>,
    pfn: Pfn,
    is_writable: bool,
    max_level: Level,
    before: InvalidationSnapshot,
}

/// What looking for a frame comes to, where it is not an error.
enum Search<'a> {
    Found(Found<'a>),
    NoMemory,
    Ended(Outcome),
}

impl Vm {
    /// What a frame is.
    pub(super) fn privacy(&self, gfn: Gfn) -> Privacy {
        if self.vm_type.has_private_memory() { self.attributes.privacy(gfn) } else { Privacy::Shared }
    }
}

impl Vcpu {
    /// Handles a fault once.
    pub(super) fn handle_fault(
        &self,
        root: &Root,
        slots: &Memslots,
        fault: &mut Fault,
    ) -> std::result::Result<Outcome, FaultError> {
        fault.goal_level = Level::SMALL;
        if let Some(outcome) = self.handle_fast(root, slots, fault) {
            return Ok(outcome);
        }
        let outcome = match self.find_frame(slots, fault)? {
            Search::Found(found) => self.map(root, fault, &found)?,
            Search::NoMemory => self.map_no_memory(root, fault)?,
            Search::Ended(outcome) => outcome,
        };
        if outcome == Outcome::Emulate && fault.privacy == Privacy::Private {
            return Err(fault.error_with_exit(Errno::EFAULT));
        }
        Ok(outcome)
    }

    /// What needs no lock, as only a permission is to be given back (`fast_page_fault`).
    fn handle_fast(&self, root: &Root, slots: &Memslots, fault: &Fault) -> Option<Outcome> {
        let vm = &self.vm;
        let is_fast = if fault.is_violation { fault.is_write() } else { !vm.personality.has_accessed_dirty };
        let is_as_told = !vm.vm_type.has_private_memory() || fault.privacy == vm.privacy(fault.gfn);
        // Above all memory the walk would come to the entry of another page.
        let is_beyond = fault.gfn > vm.personality.last_gfn();
        if !is_fast || fault.is_outdated_mmio || !is_as_told || is_beyond {
            return None;
        }
        let slot = slots.find(fault.gfn);
        let fast = FastFault {
            gfn: fault.gfn,
            kind: fault.kind,
            is_present: fault.is_violation,
            dirty_log: slot.and_then(log_of),
        };
        let result = vm.mmu.lock_shared().fix_fast(root, &fast)?;
        self.counters.pf_fast.count();
        Some(if result == MapResult::Spurious { Outcome::Spurious } else { Outcome::Fixed })
    }

    /// `kvm_mmu_faultin_pfn`.
    fn find_frame<'a>(
        &self,
        slots: &'a Memslots,
        fault: &Fault,
    ) -> std::result::Result<Search<'a>, FaultError> {
        let vm = &self.vm;
        let before = vm.mmu.snapshot();
        if fault.privacy != vm.privacy(fault.gfn) {
            return Err(fault.error_with_exit(Errno::EFAULT));
        }
        let Some(slot) = slots.find(fault.gfn) else {
            return match fault.privacy {
                Privacy::Private => Err(fault.error_with_exit(Errno::EFAULT)),
                Privacy::Shared => Ok(Search::NoMemory),
            };
        };
        if slot.is_invalid {
            let gives_up = fault.is_prefetch && vm.personality.pre_fault_gives_up_on_changing_slot();
            return if gives_up { Err(Errno::EAGAIN.into()) } else { Ok(Search::Ended(Outcome::Retry)) };
        }
        if fault.privacy == Privacy::Private || slot.is_gmem_only() {
            let pfn = slot.gmem_pfn(fault.gfn).map_err(|errno| fault.error_with_exit(errno))?;
            vm.confidential.prepare_page(fault.gfn, pfn).map_err(|errno| fault.error_with_exit(errno))?;
            let is_writable = !slot.is_read_only();
            return Ok(Search::Found(Found { slot, pfn, is_writable, max_level: Level::SMALL, before }));
        }
        if fault.is_write() && slot.is_read_only() {
            return Ok(Search::Ended(Outcome::Emulate));
        }
        match vm.host.follow(slot.hva_of(fault.gfn), fault.is_write()) {
            Ok(page) => {
                let is_writable = page.writable && !slot.is_read_only();
                let max_level = vm.largest_page();
                Ok(Search::Found(Found { slot, pfn: page.pfn, is_writable, max_level, before }))
            }
            Err(FollowError::NoMapping) => Err(Errno::EFAULT.into()),
            Err(FollowError::Interrupted) => {
                self.counters.signal_exits.count();
                Err(FaultError { errno: Errno::EINTR, exit: None, is_interrupted: true })
            }
            Err(FollowError::Poisoned) => {
                self.send_signal();
                Ok(Search::Ended(Outcome::Retry))
            }
        }
    }

    fn map(&self, root: &Root, fault: &mut Fault, found: &Found<'_>) -> Result<Outcome> {
        let vm = &self.vm;
        let lock = vm.mmu.lock_shared();
        if root.is_invalid() || lock.is_stale(found.before, fault.gfn) {
            return Ok(Outcome::Retry);
        }
        fault.goal_level = vm.mapping_level(&lock, fault, found);
        let mapping = Mapping {
            gfn: fault.gfn,
            pfn: found.pfn,
            goal_level: fault.goal_level,
            kind: fault.kind,
            is_prefetch: fault.is_prefetch,
            is_writable: found.is_writable,
            dirty_log: log_of(found.slot),
        };
        vm.outcome(lock.map(root, &mapping))
    }

    /// Remembers that there is no memory, so that the next access need not be looked into.
    fn map_no_memory(&self, root: &Root, fault: &Fault) -> Result<Outcome> {
        let vm = &self.vm;
        self.note_no_memory(root, fault.gfn);
        if fault.gfn.gpa() >> vm.personality.address_bits != 0 {
            return Ok(Outcome::Emulate);
        }
        let lock = vm.mmu.lock_shared();
        if root.is_invalid() {
            return Ok(Outcome::Retry);
        }
        let page = NoMemory {
            gfn: fault.gfn,
            generation: vm.slots.generation(vm.as_id_of(root)),
            kind: fault.kind,
            is_prefetch: fault.is_prefetch,
        };
        match lock.map_mmio(root, &page) {
            MapResult::Fixed => {
                self.counters.pf_mmio_spte_created.count();
                Ok(Outcome::Emulate)
            }
            result => vm.outcome(result),
        }
    }
}

impl Vm {
    fn outcome(&self, result: MapResult) -> Result<Outcome> {
        match result {
            MapResult::Fixed => Ok(Outcome::Fixed),
            MapResult::Spurious => Ok(Outcome::Spurious),
            MapResult::Retry => Ok(Outcome::Retry),
            MapResult::Bug => {
                self.kill();
                Err(Errno::EIO)
            }
        }
    }

    /// `kvm_mmu_hugepage_adjust`: all limits must hold, the smallest wins.
    fn mapping_level(&self, _lock: &Shared<'_>, fault: &Fault, found: &Found<'_>) -> Level {
        if found.slot.logs_dirty() && !mistaken(Mistake::ALoggedSlotHasHugePages) {
            Level::SMALL
        } else {
            self.largest_level(found.slot, fault.gfn, found.max_level)
        }
    }

    /// `kvm_mmu_max_mapping_level`.
    pub(super) fn largest_level(&self, slot: &Memslot, gfn: Gfn, max_level: Level) -> Level {
        let is_allowed = |level: &Level| slot.lpage.is_allowed(gfn, *level);
        let by_slot = Level::OF_PAGES.into_iter().rev().filter(|level| *level <= max_level).find(is_allowed);
        match by_slot {
            None | Some(Level::SMALL) => Level::SMALL,
            // Its pages are small ones, whatever the host's page tables look like.
            Some(_) if slot.is_gmem_only() || self.privacy(gfn) == Privacy::Private => Level::SMALL,
            Some(level) => level.min(self.host.level(slot.hva_of(gfn))),
        }
    }
}

/// A page that can be written without KVM's knowledge counts as written.
impl DirtyLog for Memslot {
    fn mark(&self, gfn: Gfn) {
        if let Some(dirty) = &self.dirty {
            dirty.mark(self.relative(gfn));
        }
    }
}

fn log_of(slot: &Arc<Memslot>) -> Option<&dyn DirtyLog> {
    if slot.logs_dirty() { Some(&**slot) } else { None }
}
