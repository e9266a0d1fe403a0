//! A vCPU: what of its state decides over its memory.
//!
//! One thread at a time uses a vCPU, as one ioctl at a time does in the kernel; another one waits, unless the vCPU may be
//! asked without that (a signal, its counters). The registers of a guest are none of the model's business.

use super::pre_fault::MemoryFault;
use super::run::Access;
use super::{Vm, lock};
use crate::errno::{Errno, Result};
use crate::mistake::{Mistake, mistaken};
use crate::mmu::{Mirroring, Role, Root};
use crate::stats::{VcpuCounters, VcpuStatistics};
use crate::sync::plain::{Mutex, MutexGuard};
use crate::sync::sharded::ShardedLockReadGuard;
use crate::tdx::TdxVcpu;
use crate::units::{Gfn, Privacy};
use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A virtual processor.
pub struct Vcpu {
    pub(super) vm: Arc<Vm>,
    /// What it is to TDX.
    pub(super) tdx: Option<Arc<TdxVcpu>>,
    /// How many were made before it.
    pub(super) index: usize,
    pub(super) counters: VcpuCounters,
    state: Mutex<State>,
    has_signal: AtomicBool,
    /// Where it last found no memory, and which snapshot of the slots that was (`vcpu_cache_mmio_info`).
    no_memory: Mutex<Option<(Gfn, u64)>>,
}

/// A vCPU that is used by an ioctl.
pub(super) struct InUse<'a> {
    state: MutexGuard<'a, State>,
    _gate: ShardedLockReadGuard<'a, ()>,
}

impl Deref for InUse<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for InUse<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

/// A guest that a guest runs, by whose page tables its memory is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nested {
    /// Tables that the guest makes for it, of which KVM keeps shadows: nested paging.
    WithTables,
    /// KVM's own, which are others while it runs; its memory is the guest's.
    WithoutTables,
}

/// What only the thread that uses the vCPU touches.
#[derive(Default)]
pub(super) struct State {
    pub(super) queue: VecDeque<Access>,
    pub(super) is_in_smm: bool,
    pub(super) nested: Option<Nested>,
    pub(super) told: Option<MemoryFault>,
    pub(super) is_interrupted: bool,
    direct: Option<Root>,
    mirror: Option<Root>,
}

impl Vcpu {
    pub(super) fn new(vm: Arc<Vm>, tdx: Option<Arc<TdxVcpu>>, index: usize) -> Self {
        Vcpu {
            vm,
            tdx,
            index,
            counters: VcpuCounters::default(),
            state: Mutex::default(),
            has_signal: AtomicBool::new(false),
            no_memory: Mutex::default(),
        }
    }

    /// The VM that it belongs to.
    pub fn vm(&self) -> &Arc<Vm> {
        &self.vm
    }

    /// What is counted of it.
    pub fn statistics(&self) -> VcpuStatistics {
        self.counters.read()
    }

    /// Has its guest do this when it next runs, after what was queued before.
    pub fn queue(&self, access: Access) {
        lock(&self.state).queue.push_back(access);
    }

    /// What its guest has not done yet.
    pub fn queued(&self) -> usize {
        lock(&self.state).queue.len()
    }

    /// Drops what its guest has not done yet: the VMM has it go on elsewhere.
    pub fn forget_queue(&self) {
        lock(&self.state).queue.clear();
    }

    /// What `struct kvm_run` tells of a fault that the last pre-fault came upon, if it came upon one.
    pub fn memory_fault_of_pre_fault(&self) -> Option<MemoryFault> {
        lock(&self.state).told
    }

    /// Whether `struct kvm_run` tells of the last pre-fault that a signal ended its search for a frame (`KVM_EXIT_INTR`).
    pub fn was_pre_fault_interrupted(&self) -> bool {
        lock(&self.state).is_interrupted
    }

    /// Whether it is in system management mode, which has its own address space and root. A vCPU whose state the host cannot
    /// see is never in it.
    pub fn set_smm(&self, is_in_smm: bool) {
        let is_in_smm = is_in_smm && !self.vm.vm_type.has_protected_state();
        let mut state = lock(&self.state);
        if state.is_in_smm != is_in_smm {
            // It leaves the guest that its guest ran (`kvm_leave_nested`).
            state.change_mode(|state| (state.is_in_smm, state.nested) = (is_in_smm, None));
        }
    }

    /// Has it find its root anew at its next use, as after a change of its paging mode.
    pub fn renew_root(&self) {
        lock(&self.state).change_mode(|_| ());
    }

    /// Has its guest run a guest of its own, or no longer: EINVAL in SMM, where it cannot, and of a vCPU whose state the host
    /// cannot see. What a nested guest with tables of its own accesses is not modelled.
    pub fn set_nested(&self, nested: Option<Nested>) -> Result<()> {
        let mut state = lock(&self.state);
        if nested.is_some() && (state.is_in_smm || self.vm.vm_type.has_protected_state()) {
            return Err(Errno::EINVAL);
        }
        state.change_mode(|state| state.nested = nested);
        Ok(())
    }

    /// The guest that its guest runs.
    pub fn nested(&self) -> Option<Nested> {
        lock(&self.state).nested
    }

    /// A signal for the thread that uses it, pending until [`take_signal`](Self::take_signal).
    pub fn send_signal(&self) {
        self.has_signal.store(true, Ordering::Release);
    }

    /// The thread handles its signal; answers whether there was one.
    pub fn take_signal(&self) -> bool {
        self.has_signal.swap(false, Ordering::AcqRel)
    }

    pub(super) fn is_signal_pending(&self) -> bool {
        self.has_signal.load(Ordering::Acquire) || self.vm.host.is_signal_pending()
    }

    /// The root of private accesses, for who holds the locks of all vCPUs.
    pub(super) fn private_root(&self) -> Root {
        lock(&self.state).root(self, Privacy::Private)
    }

    /// Remembers that there is no memory at a frame (`vcpu_cache_mmio_info`).
    pub(super) fn note_no_memory(&self, root: &Root, gfn: Gfn) {
        *lock(&self.no_memory) = Some((gfn, self.generation_for_mmio(root)));
    }

    /// Whether it remembers that, and takes it for true still.
    pub(super) fn remembers_no_memory(&self, root: &Root, gfn: Gfn) -> bool {
        *lock(&self.no_memory) == Some((gfn, self.generation_for_mmio(root)))
    }

    fn generation_for_mmio(&self, root: &Root) -> u64 {
        let is_of_space = self.vm.personality.remembered_mmio_is_of_address_space();
        self.vm.slots.generation(if is_of_space { self.vm.as_id_of(root) } else { 0 })
    }

    /// For one ioctl at a time.
    pub(super) fn enter(&self) -> InUse<'_> {
        let gate = self.vm.vcpus_in_use.read();
        InUse { state: lock(&self.state), _gate: gate }
    }
}

impl State {
    fn change_mode(&mut self, change: impl FnOnce(&mut State)) {
        change(self);
        (self.direct, self.mirror) = (None, None);
    }

    /// The address space that its accesses are in.
    pub(super) fn as_id(&self) -> usize {
        usize::from(self.is_in_smm && !mistaken(Mistake::SmmHasNoAddressSpace))
    }

    /// The root for accesses of this kind (`kvm_mmu_reload`). Private ones have a root of their own only where there are
    /// external tables to mirror.
    pub(super) fn root(&mut self, vcpu: &Vcpu, privacy: Privacy) -> Root {
        self.let_go_of_obsolete_roots();
        self.root_if_none(vcpu, privacy)
    }

    fn let_go_of_obsolete_roots(&mut self) {
        self.direct.take_if(|root| root.is_invalid());
        self.mirror.take_if(|root| root.is_invalid());
    }

    /// The same, but one that it has it keeps, even if that is obsolete.
    pub(super) fn root_if_none(&mut self, vcpu: &Vcpu, privacy: Privacy) -> Root {
        let vm = &vcpu.vm;
        let mirroring = match privacy {
            Privacy::Private if vm.mmu.has_external() => Mirroring::Mirror,
            _ => Mirroring::Direct,
        };
        let role = Role {
            guest_mode: self.nested == Some(Nested::WithoutTables),
            ..Role::new(&vm.personality, self.is_in_smm, mirroring, vm.shared_bit())
        };
        let role = vm.confidential.role(role);
        let held = if mirroring == Mirroring::Mirror { &mut self.mirror } else { &mut self.direct };
        match held {
            Some(root) => root.clone(),
            None => {
                vm.confidential.load_root(role, vcpu.tdx.as_deref());
                held.insert(vm.mmu.root(role)).clone()
            }
        }
    }
}
