//! What TDX and SNP are to a virtual machine, and what their commands ask of it.
//!
//! The guests' own states are theirs ([`crate::tdx`], [`crate::snp`]); here they are given slots, pages and locks, and the
//! tables that are mirrored for TDX. Of an ordinary VM nothing here is so.

use super::vcpu::Vcpu;
use super::{Machine, Vm};
use crate::confidential::{Held, ImageTarget, User};
use crate::errno::{Errno, Result};
use crate::host::HostMemory;
use crate::memslot::Memslot;
use crate::mmu::{AccessKind, ExternalTable, MapResult, Mapping, Role};
use crate::personality::{Personality, VmType};
use crate::snp::{self, Snp, SnpTarget};
use crate::tdx::{self, SecureEpt, Tdx, TdxVcpu, TdxVcpuTarget, TdxVmTarget};
use crate::units::{Gfn, Level, Pfn, Privacy};
use std::sync::{Arc, Weak};

/// What kind of confidential guest.
pub(super) enum Confidential {
    /// None that a platform knows of.
    None,
    Tdx {
        tdx: Arc<Tdx>,
        external: Arc<SecureEpt>,
    },
    Snp(Arc<Snp>),
}

impl Confidential {
    /// The machine has what the type needs.
    pub(super) fn new(machine: &Machine, vm_type: VmType, vm: &Weak<Vm>) -> Self {
        let dead = vm.clone();
        let on_bug = move || {
            if let Some(vm) = dead.upgrade() {
                vm.kill();
            }
        };
        match (vm_type, &machine.module, &machine.firmware) {
            (VmType::Tdx, Some(module), _) => {
                let tdx = Tdx::new(module.clone(), on_bug);
                Confidential::Tdx { external: SecureEpt::new(tdx.clone()), tdx }
            }
            (VmType::Snp, _, Some(firmware)) => Confidential::Snp(Snp::new(firmware.clone(), on_bug)),
            _ => Confidential::None,
        }
    }

    pub(super) fn external(&self) -> Option<Arc<dyn ExternalTable>> {
        match self {
            Confidential::Tdx { external, .. } => Some(external.clone()),
            _ => None,
        }
    }

    pub(super) fn create_vcpu(&self) -> Result<Option<Arc<TdxVcpu>>> {
        match self {
            Confidential::Tdx { tdx, .. } => tdx.create_vcpu().map(Some),
            _ => Ok(None),
        }
    }

    pub(super) fn allows_pre_fault(&self) -> bool {
        match self {
            Confidential::None => true,
            Confidential::Tdx { tdx, .. } => tdx.is_pre_fault_allowed(),
            Confidential::Snp(snp) => snp.is_pre_fault_allowed(),
        }
    }

    pub(super) fn shared_bit(&self) -> Gfn {
        match self {
            Confidential::Tdx { tdx, .. } => tdx.shared_bit().unwrap_or(Gfn(0)),
            _ => Gfn(0),
        }
    }

    /// A TDX guest's tables have as many levels as its vCPUs' CPUID says, and that is what KVM_TDX_INIT_VM was told.
    pub(super) fn role(&self, role: Role) -> Role {
        match self {
            Confidential::Tdx { tdx, .. } => {
                let levels = tdx.td().map_or(role.levels, |td| td.levels().number());
                Role { levels, ..role }
            }
            _ => role,
        }
    }

    pub(super) fn load_root(&self, role: Role, vcpu: Option<&TdxVcpu>) {
        if let (Confidential::Tdx { tdx, .. }, Some(vcpu)) = (self, vcpu) {
            tdx.load_root(vcpu, Level::new(role.levels));
        }
    }

    /// A private frame of a guest_memfd is about to be mapped (`kvm_gmem_prepare_folio`).
    pub(super) fn prepare_page(&self, gfn: Gfn, pfn: Pfn) -> Result<()> {
        match self {
            Confidential::Snp(snp) => snp.make_private(gfn, pfn),
            _ => Ok(()),
        }
    }
}

impl Vm {
    /// What the guest is to TDX.
    pub fn tdx(&self) -> Option<&Arc<Tdx>> {
        match &self.confidential {
            Confidential::Tdx { tdx, .. } => Some(tdx),
            _ => None,
        }
    }

    /// What the guest is to SNP.
    pub fn snp(&self) -> Option<&Arc<Snp>> {
        match &self.confidential {
            Confidential::Snp(snp) => Some(snp),
            _ => None,
        }
    }

    /// KVM_MEMORY_ENCRYPT_OP with TDX.
    pub fn tdx_command(&self, command: &mut User<tdx::Command>) -> Result<()> {
        self.check_alive()?;
        self.tdx().ok_or(Errno::ENOTTY)?.vm_command(self, command)
    }

    /// KVM_MEMORY_ENCRYPT_OP with SNP.
    pub fn snp_command(&self, command: Option<&mut User<snp::Command>>) -> Result<()> {
        self.check_alive()?;
        self.snp().ok_or(Errno::ENOTTY)?.command(self, command)
    }

    fn lock_all(&self) -> Box<dyn Held + '_> {
        let vcpus = self.vcpus_in_use.write();
        Box::new((self.slots.change(), vcpus))
    }

    fn private_slot(&self, gfn: Gfn) -> Result<Arc<Memslot>> {
        let slot = self.slots.of(0).find(gfn).cloned();
        slot.filter(|slot| slot.has_gmem()).ok_or(Errno::EINVAL)
    }
}

impl Vcpu {
    /// Whether its state is kept from the host (`guest_state_protected`): an SNP guest's once it is measured.
    pub fn has_kept_state(&self) -> bool {
        self.vm.tdx().is_some() || self.vm.snp().is_some_and(|snp| snp.has_measured(self.index))
    }

    /// KVM_MEMORY_ENCRYPT_OP of a vCPU, which is TDX's alone.
    pub fn tdx_command(&self, command: &mut User<tdx::Command>) -> Result<()> {
        self.vm.check_alive()?;
        match (self.vm.tdx(), &self.tdx) {
            (Some(tdx), Some(vcpu)) => tdx.vcpu_command(self, vcpu, command),
            _ => Err(Errno::EINVAL),
        }
    }
}

impl ImageTarget for Vm {
    fn host(&self) -> &dyn HostMemory {
        &*self.host
    }

    fn is_signal_pending(&self) -> bool {
        Vm::is_signal_pending(self)
    }

    fn backed_pages(&self, gfn: Gfn) -> Result<u64> {
        let slot = self.private_slot(gfn)?;
        let gmem = slot.gmem.as_ref().ok_or(Errno::EINVAL)?;
        gmem.file.upgrade().map(|_| slot.range().end.0 - gfn.0).ok_or(Errno::EFAULT)
    }

    fn fill_page(&self, gfn: Gfn, fill: &mut dyn FnMut(Pfn) -> Result<()>) -> Result<()> {
        let slot = self.private_slot(gfn)?;
        let gmem = slot.gmem.as_ref().ok_or(Errno::EINVAL)?;
        let file = gmem.file.upgrade().ok_or(Errno::EFAULT)?;
        let is_private = || self.privacy(gfn) == Privacy::Private;
        file.populate(&self.rules(), gmem.first_index + slot.relative(gfn), is_private, fill)
    }
}

impl ImageTarget for Vcpu {
    fn host(&self) -> &dyn HostMemory {
        &*self.vm.host
    }

    fn is_signal_pending(&self) -> bool {
        Vcpu::is_signal_pending(self)
    }

    fn backed_pages(&self, gfn: Gfn) -> Result<u64> {
        self.vm.backed_pages(gfn)
    }

    fn fill_page(&self, gfn: Gfn, fill: &mut dyn FnMut(Pfn) -> Result<()>) -> Result<()> {
        self.vm.fill_page(gfn, fill)
    }
}

impl TdxVmTarget for Vm {
    fn lock_state(&self) -> Result<Box<dyn Held + '_>> {
        Ok(self.lock_all())
    }

    fn has_vcpus(&self) -> bool {
        self.vcpus() != 0
    }

    fn has_five_levels(&self) -> bool {
        self.personality.address_bits > 48
    }
}

impl TdxVcpuTarget for Vcpu {
    fn lock_state(&self) -> Result<Box<dyn Held + '_>> {
        Ok(self.vm.lock_all())
    }

    fn has_x2apic(&self) -> bool {
        true
    }

    fn map_private(&self, gfn: Gfn, pfn: Pfn) -> Result<()> {
        let vm = &self.vm;
        let root = self.private_root();
        let mapping = Mapping {
            gfn,
            pfn,
            goal_level: Level::SMALL,
            kind: AccessKind::Read,
            is_prefetch: true,
            is_writable: true,
            dirty_log: None,
        };
        loop {
            if Vcpu::is_signal_pending(self) {
                return Err(Errno::EINTR);
            }
            vm.check_alive()?;
            match vm.mmu.lock_shared().map(&root, &mapping) {
                MapResult::Fixed => return Ok(()),
                MapResult::Retry => {}
                MapResult::Spurious | MapResult::Bug => return Err(Errno::EIO),
            }
        }
    }

    fn lock_mmu(&self) -> Box<dyn Held + '_> {
        Box::new(self.vm.mmu.lock_exclusive())
    }
}

impl SnpTarget for Vm {
    fn personality(&self) -> &Personality {
        &self.personality
    }

    fn lock_slots(&self) -> Box<dyn Held + '_> {
        Box::new(self.slots.change())
    }

    fn lock_vcpus(&self) -> Result<Box<dyn Held + '_>> {
        Ok(Box::new(self.vcpus_in_use.write()))
    }

    fn vcpus(&self) -> usize {
        super::lock(&self.vcpus).len()
    }
}

/// What was mapped goes first, then the key that it was mapped with, then tables, then the guest.
impl Drop for Vm {
    fn drop(&mut self) {
        if let Confidential::Tdx { tdx, .. } = &self.confidential {
            let private = crate::mmu::RootFilter { direct: false, ..crate::mmu::RootFilter::EVERYTHING };
            self.mmu.lock_exclusive().zap_leafs(private, crate::units::GfnRange::ALL);
            tdx.release_key();
        }
        self.mmu.destroy();
        if let Confidential::Tdx { tdx, .. } = &self.confidential {
            // What the module keeps is lost, which it remembers itself.
            let _ = tdx.destroy();
        }
    }
}
