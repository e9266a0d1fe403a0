//! What the library remembers of one guest: its slots, what is populated, and the work under way.
//!
//! The record is here; what happens to it has files of its own: `slots` change, memory is converted (`conversion`),
//! the initial image is made (`initial_image`), `pre_faults` are counted, and what several slots show is found (`shown_twice`).
//! It never closes a descriptor of the VMM's and holds no lock across a system call that can wait.

mod conversion;
mod initial_image;
mod pre_faults;
mod refill;
mod shown_twice;
mod slots;

pub use conversion::{ConvertOptions, ConvertReport};

use crate::error::{Error, Reason, Result};
use crate::kvm::caps::{Caps, QUIRK_SLOT_ZAP_ALL};
use crate::kvm::{Kernel, Mappings, Sys};
use crate::memslot::alignment::Demand;
use crate::memslot::{Memslot, SlotRecord};
use crate::populate::coverage::{Coverage, Covered, Loss};
use crate::populate::queue::Queue;
use crate::private::ledger::Ledger;
use crate::private::turns::Turns;
use crate::private::visibility::VisibilityMap;
use crate::range::{PrivateMemory, Range, RangeSet};
use once_cell::sync::OnceCell;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

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
    /// What of the guest's memory is private.
    pub(crate) visibility: VisibilityMap,
    /// Those who convert or populate memory that could be converted.
    pub(crate) turns: Turns,
    /// What was put into the initial image, and whether it is closed.
    ledger: Mutex<Ledger>,
    /// Where memory lies that more than one slot shows, and as of which change of the slots.
    shown_twice: Mutex<(u64, Arc<RangeSet>)>,
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
            visibility: VisibilityMap::default(),
            turns: Turns::default(),
            ledger: Mutex::default(),
            shown_twice: Mutex::default(),
            work: Mutex::default(),
            pre_faults_ended: AtomicU32::new(0),
        };
        let caps = vm.caps()?;
        caps.check_type(config.vm_type)?;
        // Other types than the default have not had the quirk since there has been a way to disable it.
        let is_default = config.vm_type == 0 && !caps.has_private_memory();
        vm.mappings_are_kept |= !is_default && caps.can_keep_mappings;
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
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        // Each conversion may come here, and nobody else may come for long.
        work.retain(|queue| queue.strong_count() > 0);
        work.push(Arc::downgrade(queue));
    }

    /// Takes memory away from all work: returns once no worker touches it.
    fn withdraw(&self, range: Range) {
        let work = self.work();
        // From all at once, since one may wait for another.
        work.iter().for_each(|queue| queue.take_away(range));
        work.iter().for_each(|queue| queue.withdraw(range));
    }

    /// What of the guest's memory is private, once anybody has said.
    pub(crate) fn told(&self) -> Option<&dyn PrivateMemory> {
        self.visibility.is_told().then_some(&self.visibility as &dyn PrivateMemory)
    }

    /// Where in this process memory lies that more than one slot shows, by one mapping or by several of one file.
    fn shown_twice(&self, mappings: &Mappings<'_>) -> Sys<Arc<RangeSet>> {
        let mut known = self.shown_twice.lock().unwrap_or_else(PoisonError::into_inner);
        let (changes, places) = {
            let memory = self.memory();
            if known.0 == memory.changes {
                return Ok(Arc::clone(&known.1));
            }
            (memory.changes, memory.slots.host_places())
        };
        *known = (changes, Arc::new(shown_twice::find(&places, mappings)?));
        Ok(Arc::clone(&known.1))
    }

    /// Memory is about to be discarded: returns once no worker touches it.
    pub fn discarded(&self, range: Range) {
        self.withdraw(range);
        // Whoever discards in a conversion of its own knows that one is under way.
        let _ = self.turns.wait(range);
        // Nor is it mapped again for a huge page that it once was a part of.
        self.visibility.set_torn(range, false);
        self.memory().coverage.discarded(range, Loss::Discarded);
    }

    /// Memory of this process is about to be discarded: whatever guest memory it is.
    pub fn host_discarded(&self, host: Range) {
        let guest: Vec<Range> =
            self.memory().slots.of_address_space(0).filter_map(|(_, slot)| slot.gpas_of(host)).collect();
        guest.into_iter().for_each(|range| self.discarded(range));
    }

    /// The slot in which `range` begins.
    pub fn slot_at(&self, range: Range) -> Result<Memslot> {
        let memory = self.memory();
        let found = memory.slots.touching(0, range).next().filter(|(place, _)| place.start <= range.start);
        found.map(|(_, slot)| *slot).ok_or_else(|| {
            Error::new(
                libc::ENOENT,
                Reason::NoMemslot,
                format!("no memslot at guest address {:#x}", range.start),
            )
            .range(range)
            .hint("name only memory that has a slot, and tell the handle of every slot")
        })
    }

    /// How much of `range` is populated, and how much of it is memory at all.
    pub fn coverage(&self, range: Range) -> (u64, Covered) {
        let memory = self.memory();
        let slots = memory.slots.touching(0, range).filter_map(|(place, _)| place.intersect(&range));
        (slots.map(|part| part.size()).sum(), memory.coverage.within(range))
    }
}
