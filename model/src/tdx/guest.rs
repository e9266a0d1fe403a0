//! What KVM keeps of a TDX guest, and of its vCPUs while they run.
//!
//! It is what `struct kvm_tdx` and `struct vcpu_tdx` are. Whatever the module refuses without being busy is a bug of KVM's,
//! and ends the virtual machine: that too is here. The module's own state is never looked at, only asked for.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use super::module::{Accept, Access, Answer, Entered, Module, Td};
use super::status::Status;
use crate::confidential::Digest;
use crate::errno::{Errno, Result};
use crate::sync::plain::{Mutex, MutexGuard, OnceLock};
use crate::units::{Gfn, Level, Pfn};

/// How far a guest is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum State {
    /// KVM_TDX_INIT_VM has not been.
    Uninitialized,
    /// Its image is loaded.
    Initialized,
    /// KVM_TDX_FINALIZE_VM has been.
    Runnable,
}

/// A TDX guest.
pub struct Tdx {
    module: Arc<Module>,
    /// What the module made of it at KVM_TDX_INIT_VM.
    td: OnceLock<Arc<Td>>,
    state: AtomicU8,
    has_key: AtomicBool,
    is_pre_fault_allowed: AtomicBool,
    /// What the page that is being mapped is to be a copy of. Only set while the slots_lock is held and a page is added.
    page_add_source: Mutex<Option<Pfn>>,
    /// While set, no vCPU enters, so that the module is not busy with them.
    is_zapping: AtomicBool,
    vcpus: Mutex<Vec<Arc<TdxVcpu>>>,
    on_bug: Box<dyn Fn() + Send + Sync>,
}

/// A vCPU of a TDX guest.
#[derive(Debug, Default)]
pub struct TdxVcpu {
    is_initialized: AtomicBool,
    /// How often it has entered and left: odd while it runs.
    turns: AtomicU64,
}

impl Tdx {
    /// A guest of which nothing is known yet. `on_bug` is called when the virtual machine is dead.
    pub fn new(module: Arc<Module>, on_bug: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Tdx {
            module,
            td: OnceLock::new(),
            state: AtomicU8::new(State::Uninitialized as u8),
            has_key: AtomicBool::new(false),
            is_pre_fault_allowed: AtomicBool::new(false),
            page_add_source: Mutex::default(),
            is_zapping: AtomicBool::new(false),
            vcpus: Mutex::default(),
            on_bug: Box::new(on_bug),
        })
    }

    /// The machine's module.
    pub fn module(&self) -> &Arc<Module> {
        &self.module
    }

    /// The guest as the module has it, once KVM_TDX_INIT_VM has been.
    pub fn td(&self) -> Option<&Arc<Td>> {
        self.td.get()
    }

    /// How far it is.
    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            0 => State::Uninitialized,
            1 => State::Initialized,
            _ => State::Runnable,
        }
    }

    /// Its image is complete: other memory may be pre-faulted.
    pub fn is_pre_fault_allowed(&self) -> bool {
        self.is_pre_fault_allowed.load(Ordering::Acquire)
    }

    /// The bit that a shared frame has in the tables that the processor walks itself; none before KVM_TDX_INIT_VM.
    pub fn shared_bit(&self) -> Option<Gfn> {
        self.td().map(|td| td.shared_bit())
    }

    /// A root for shared memory is loaded (`tdx_load_mmu_pgd`). If it has other levels than the guest was made with, the
    /// vCPU's CPUID is not the one that KVM_TDX_INIT_VM got, and the virtual machine ends. So it does with a vCPU that the
    /// module does not know, KVM_TDX_INIT_VCPU not having been: where its root is cannot be written (`tdh_vp_wr_failed`).
    pub fn load_root(&self, vcpu: &TdxVcpu, levels: Level) {
        if self.td().is_none_or(|td| td.levels() != levels) || !vcpu.is_initialized() {
            self.bug();
        }
    }

    /// What was measured.
    pub fn measurement(&self) -> Option<Digest> {
        self.td().map(|td| td.measurement())
    }

    /// A vCPU is created: not before KVM_TDX_INIT_VM, nor after KVM_TDX_FINALIZE_VM.
    pub fn create_vcpu(&self) -> Result<Arc<TdxVcpu>> {
        if self.state() != State::Initialized {
            return Err(Errno::EIO);
        }
        let vcpu = Arc::new(TdxVcpu::default());
        lock(&self.vcpus).push(Arc::clone(&vcpu));
        Ok(vcpu)
    }

    /// A vCPU enters. None where it has to be tried again.
    pub fn enter<'a>(&'a self, vcpu: &'a TdxVcpu) -> Answer<Option<InGuest<'a>>> {
        if self.is_zapping.load(Ordering::Acquire) {
            return Ok(None);
        }
        let td = self.td().ok_or(Status::OP_STATE_INCORRECT)?;
        let turn = Turn::begin(vcpu);
        match td.vp_enter() {
            Ok(entered) => Ok(Some(InGuest { entered, _turn: turn })),
            Err(status) if status.is_busy() => Ok(None),
            Err(status) => Err(status),
        }
    }

    /// The last vCPU is gone, and every page was removed: the key is given up (`tdx_mmu_release_hkid`).
    pub fn release_key(&self) {
        let Some(td) = self.td().filter(|_| self.has_key()) else { return };
        if self.ok(td.mng_key_freeid()).is_ok() {
            self.has_key.store(false, Ordering::Release);
        }
    }

    /// The tables are gone too: the rest is reclaimed (`tdx_vm_destroy`). What the module does not give back is lost.
    pub fn destroy(&self) -> Answer<()> {
        let Some(td) = self.td().filter(|_| !self.has_key()) else { return Ok(()) };
        td.phymem_page_reclaim_td()
    }

    /// The guest has a key, without which nothing private can be mapped.
    pub fn has_key(&self) -> bool {
        self.has_key.load(Ordering::Acquire)
    }

    /// Something went wrong that cannot: the virtual machine is dead.
    pub(super) fn bug(&self) {
        (self.on_bug)();
    }

    /// What the module refused is a bug.
    pub(super) fn ok<T>(&self, answer: Answer<T>) -> Answer<T> {
        if answer.is_err() {
            self.bug();
        }
        answer
    }

    /// KVM_TDX_INIT_VM is done.
    pub(super) fn set_initialized(&self, td: Arc<Td>) {
        self.td.get_or_init(|| td);
        self.has_key.store(true, Ordering::Release);
        self.state.store(State::Initialized as u8, Ordering::Release);
    }

    /// KVM_TDX_FINALIZE_VM is done. Whoever sees that pre-faulting is allowed must map as a runnable guest's pages are.
    pub(super) fn set_runnable(&self) {
        self.state.store(State::Runnable as u8, Ordering::Release);
        self.is_pre_fault_allowed.store(true, Ordering::Release);
    }

    /// Says of what the page that is mapped in the call is to be a copy.
    pub(super) fn adding<T>(&self, source: Option<Pfn>, call: impl FnOnce() -> Result<T>) -> Result<T> {
        if lock(&self.page_add_source).is_some() {
            self.bug();
            return Err(Errno::EIO);
        }
        *lock(&self.page_add_source) = source;
        let answer = call();
        *lock(&self.page_add_source) = None;
        answer
    }

    pub(super) fn page_add_source(&self) -> Option<Pfn> {
        *lock(&self.page_add_source)
    }

    /// Makes a call of those that must not fail. If the module is busy with a vCPU, all of them are kept out meanwhile.
    pub(super) fn without_vcpus<T>(&self, call: impl Fn() -> Answer<T>) -> Answer<T> {
        match call() {
            Err(status) if status.is_busy() => {
                self.is_zapping.store(true, Ordering::Release);
                self.kick_all();
                let answer = call();
                self.is_zapping.store(false, Ordering::Release);
                answer
            }
            answer => answer,
        }
    }

    /// Waits until each vCPU that runs has left (`KVM_REQ_OUTSIDE_GUEST_MODE`).
    pub(super) fn kick_all(&self) {
        let running: Vec<_> = lock(&self.vcpus)
            .iter()
            .map(|vcpu| (Arc::clone(vcpu), vcpu.turns.load(Ordering::Acquire)))
            .filter(|(_, turn)| turn % 2 == 1)
            .collect();
        for (vcpu, turn) in running {
            while vcpu.turns.load(Ordering::Acquire) == turn {
                std::thread::yield_now();
            }
        }
    }
}

impl TdxVcpu {
    /// KVM_TDX_INIT_VCPU has been.
    pub fn is_initialized(&self) -> bool {
        self.is_initialized.load(Ordering::Acquire)
    }

    pub(super) fn set_initialized(&self) {
        self.is_initialized.store(true, Ordering::Release);
    }
}

/// A vCPU that runs until this is dropped, which must be soon: who removes a page waits for it. So it must be dropped
/// before any lock is taken.
pub struct InGuest<'a> {
    // Dropped first: the vCPU has left for the module before it has for KVM.
    entered: Entered<'a>,
    _turn: Turn<'a>,
}

impl InGuest<'_> {
    /// The guest reads, writes or fetches at a private address.
    pub fn access(&self, gfn: Gfn) -> Access {
        self.entered.access(gfn)
    }

    /// The guest takes a page: TDG.MEM.PAGE.ACCEPT.
    pub fn accept(&self, gfn: Gfn, level: Level) -> Accept {
        self.entered.accept(gfn, level)
    }
}

struct Turn<'a>(&'a TdxVcpu);

impl<'a> Turn<'a> {
    fn begin(vcpu: &'a TdxVcpu) -> Self {
        vcpu.turns.fetch_add(1, Ordering::AcqRel);
        Turn(vcpu)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.turns.fetch_add(1, Ordering::AcqRel);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
