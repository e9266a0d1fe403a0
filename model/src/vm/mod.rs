//! Virtual machines and vCPUs: the ioctls, and what the guest does.
//!
//! A [`Vm`] ties the rooms together as `struct kvm` does. Each ioctl has a file of its own here; what is common to all is
//! who may go on at all: a VM that is dead answers EIO to everything. The locks, in the order in which they are taken:
//! a vCPU's own, that of the slots, the readers' (in the kernel SRCU), the MMU's. Host memory is asked for with none of the
//! last held, since it calls back.

mod attributes;
mod capability;
mod confidential;
mod dirty_log;
mod fault;
mod notifier;
mod pre_fault;
mod region;
mod run;
mod slots;
mod vcpu;

pub use attributes::AttributesArgument;
pub use pre_fault::{MemoryFault, PreFault};
pub use run::{Access, Exit, Operation, Run};
pub use vcpu::{Nested, Vcpu};

use crate::attributes::Attributes;
use crate::errno::{Errno, Result};
use crate::gmem::GuestMemfd;
use crate::host::HostMemory;
use crate::memslot::{Memslots, Rules, VmId};
use crate::mmu::{Mmu, Settings};
use crate::personality::{Personality, VmType};
use crate::snp::Firmware;
use crate::stats::VmStatistics;
use crate::sync::plain::{Mutex, MutexGuard};
use crate::sync::sharded::ShardedLock;
use crate::tdx::Module;
use crate::units::{Gfn, GfnRange, Level};
use confidential::Confidential;
use slots::Slots;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// `KVM_MAX_VCPUS`: how many vCPUs a virtual machine can ever have.
pub const MOST_VCPUS: usize = 1024;

/// A virtual machine.
pub struct Vm {
    me: Weak<Vm>,
    personality: Personality,
    vm_type: VmType,
    id: VmId,
    host: Arc<dyn HostMemory>,
    mmu: Mmu,
    confidential: Confidential,
    slots: Slots,
    attributes: Attributes,
    vcpus: Mutex<BTreeMap<u32, Weak<Vcpu>>>,
    /// Held shared by whoever uses a vCPU; exclusively it is all of their locks.
    vcpus_in_use: ShardedLock<()>,
    files: Mutex<Vec<Weak<GuestMemfd>>>,
    quirks: AtomicU64,
    dirty_log_protect: AtomicU64,
    has_signal: AtomicBool,
    is_dead: AtomicBool,
}

/// The machine that virtual machines are made on.
#[derive(Clone)]
pub struct Machine {
    /// Its kernel.
    pub personality: Personality,
    /// The process that the VMM is.
    pub host: Arc<dyn HostMemory>,
    /// With TDX: its module.
    pub module: Option<Arc<Module>>,
    /// With SEV-SNP: its firmware.
    pub firmware: Option<Arc<Firmware>>,
}

impl Machine {
    /// One that has neither TDX nor SNP.
    pub fn new(personality: Personality, host: Arc<dyn HostMemory>) -> Self {
        Machine { personality, host, module: None, firmware: None }
    }

    /// Whether a VM of this type can be made here.
    pub fn has_vm_type(&self, vm_type: VmType) -> bool {
        self.personality.has_vm_type(vm_type)
            && match vm_type {
                VmType::Default | VmType::SwProtected => true,
                VmType::Snp => self.firmware.is_some(),
                VmType::Tdx => self.module.is_some(),
            }
    }
}

impl Vm {
    /// KVM_CREATE_VM: EINVAL for a type that this kernel does not have.
    pub fn new(machine: &Machine, vm_type: VmType) -> Result<Arc<Vm>> {
        if !machine.has_vm_type(vm_type) {
            return Err(Errno::EINVAL);
        }
        let Machine { personality, host, .. } = machine.clone();
        let vm = Arc::new_cyclic(|me| {
            let confidential = Confidential::new(machine, vm_type, me);
            let external = confidential.external();
            Vm {
                me: me.clone(),
                personality,
                vm_type,
                id: VmId::new(),
                host,
                mmu: Mmu::new(Settings::of(&personality), external),
                confidential,
                slots: Slots::new(personality.address_spaces(vm_type)),
                attributes: Attributes::new(),
                vcpus: Mutex::default(),
                vcpus_in_use: ShardedLock::new(()),
                files: Mutex::default(),
                quirks: AtomicU64::new(capability::SLOT_ZAP_ALL),
                dirty_log_protect: AtomicU64::new(0),
                has_signal: AtomicBool::new(false),
                is_dead: AtomicBool::new(false),
            }
        });
        vm.host.register(vm.notifier());
        Ok(vm)
    }

    /// KVM_CREATE_VCPU: EINVAL if there are as many as there can be, EEXIST if there is one of this number.
    pub fn create_vcpu(&self, number: u32) -> Result<Arc<Vcpu>> {
        self.check_alive()?;
        let mut vcpus = lock(&self.vcpus);
        if vcpus.len() >= MOST_VCPUS {
            return Err(Errno::EINVAL);
        }
        if vcpus.contains_key(&number) {
            return Err(Errno::EEXIST);
        }
        let tdx = self.confidential.create_vcpu()?;
        let vcpu = Arc::new(Vcpu::new(self.me.upgrade().expect("it is being used"), tdx, vcpus.len()));
        vcpus.insert(number, Arc::downgrade(&vcpu));
        Ok(vcpu)
    }

    /// Whether a vCPU was ever made.
    pub fn has_vcpus(&self) -> bool {
        !lock(&self.vcpus).is_empty()
    }

    /// KVM_CREATE_GUEST_MEMFD.
    pub fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<Arc<GuestMemfd>> {
        self.check_alive()?;
        let file = GuestMemfd::create(&self.rules(), size, flags, &*self.host, self.gmem_user())?;
        let mut files = lock(&self.files);
        files.retain(|file| file.strong_count() > 0);
        files.push(Arc::downgrade(&file));
        drop(files);
        Ok(file)
    }

    /// What is counted of it.
    pub fn statistics(&self) -> VmStatistics {
        for as_id in 0..self.slots.all().len() {
            self.settle(as_id, GfnRange::ALL);
        }
        let [pages_4k, pages_2m, pages_1g] = self.mmu.page_counts();
        VmStatistics { pages_4k, pages_2m, pages_1g }
    }

    /// Which kernel it is of.
    pub fn personality(&self) -> &Personality {
        &self.personality
    }

    /// Its type.
    pub fn vm_type(&self) -> VmType {
        self.vm_type
    }

    /// Its MMU, to look at.
    pub fn mmu(&self) -> &Mmu {
        &self.mmu
    }

    /// What of its memory is private.
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// Its memslots, as they are now, of each address space.
    pub fn memslots(&self) -> Vec<Arc<Memslots>> {
        self.slots.all()
    }

    /// The guest_memfds that it was asked for and that are open.
    pub fn guest_memfds(&self) -> Vec<Arc<GuestMemfd>> {
        lock(&self.files).iter().filter_map(Weak::upgrade).collect()
    }

    /// The host's memory that it is made of.
    pub fn host(&self) -> &Arc<dyn HostMemory> {
        &self.host
    }

    /// Whether something went wrong that cannot be mended (`KVM_BUG_ON`, `KVM_REQ_VM_DEAD`).
    pub fn is_dead(&self) -> bool {
        self.is_dead.load(Ordering::Acquire) || self.mmu.has_bug()
    }

    /// Ends it: every later ioctl is answered with EIO.
    pub fn kill(&self) {
        self.is_dead.store(true, Ordering::Release);
    }

    /// A signal for the thread that calls the VM's own ioctls, pending until [`take_signal`](Self::take_signal).
    pub fn send_signal(&self) {
        self.has_signal.store(true, Ordering::Release);
    }

    /// That thread handles its signal; answers whether there was one.
    pub fn take_signal(&self) -> bool {
        self.has_signal.swap(false, Ordering::AcqRel)
    }

    /// The bit of a frame number that a shared access of the guest has set; 0 where there is none.
    pub fn shared_bit(&self) -> Gfn {
        self.confidential.shared_bit()
    }

    fn is_signal_pending(&self) -> bool {
        self.has_signal.load(Ordering::Acquire) || self.host.is_signal_pending()
    }

    /// The address space whose slots a root maps.
    fn as_id_of(&self, root: &crate::mmu::Root) -> usize {
        root.role().as_id()
    }

    fn check_alive(&self) -> Result<()> {
        if self.is_dead() { Err(Errno::EIO) } else { Ok(()) }
    }

    fn rules(&self) -> Rules {
        Rules {
            personality: self.personality,
            vm_type: self.vm_type,
            shared_bit: self.shared_bit(),
            vm: self.id,
        }
    }

    fn has_quirk(&self, quirk: u64) -> bool {
        self.quirks.load(Ordering::Relaxed) & quirk != 0
    }

    /// The largest page that its tables may have.
    fn largest_page(&self) -> Level {
        self.personality.largest_page
    }
}

/// A lock that no thread leaves poisoned behind: a panic is the model's own bug and ends the test.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread has failed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::simulated::{Settings, SimulatedHost};
    use crate::personality::Version;
    use crate::units::PAGE_SIZE;

    #[test]
    fn guest_memfds_that_have_gone_are_forgotten() {
        let version = Version(7, 3);
        let host = SimulatedHost::new(Settings::new(version));
        let vm =
            Vm::new(&Machine::new(Personality::with_everything(version), host), VmType::Default).unwrap();
        (0..3).for_each(|_| drop(vm.create_guest_memfd(PAGE_SIZE, 0).unwrap()));
        assert_eq!(lock(&vm.files).len(), 1);
    }
}
