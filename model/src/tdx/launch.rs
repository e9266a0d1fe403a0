//! The commands by which the VMM makes a TDX guest: KVM_MEMORY_ENCRYPT_OP of the virtual machine and of a vCPU.
//!
//! Each check stands where the kernel has it, since the VMM sees which one comes first. What was done before an error stays
//! done, and the VMM is told how far it came. Locks are the virtual machine's; here is only said when they are taken.

use super::capabilities::{self, Capabilities, CpuidEntry, CpuidList};
pub use super::config::ATTRIBUTE_SEPT_VE_DISABLE;
use super::config::REQUIRED_XFAM;
use super::guest::{State, Tdx, TdxVcpu};
use super::measurement::CHUNK;
use super::module::TdParams;
use super::status::Status;
use crate::confidential::image::{self, Source};
use crate::confidential::{Held, ImageTarget, User};
use crate::errno::{Errno, Result};
use crate::units::{Gfn, Hva, Level, PAGE_SHIFT, PAGE_SIZE, Pfn};

/// KVM_TDX_MEASURE_MEMORY_REGION.
pub const MEASURE_MEMORY_REGION: u32 = 1;
/// More entries of CPUID than KVM takes.
pub const MAX_CPUID_ENTRIES: usize = 256;

/// `struct kvm_tdx_cmd`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Command {
    /// Which command, and what it points to.
    pub call: Call,
    /// Its flags.
    pub flags: u32,
    /// What the module said.
    pub hw_error: u64,
}

/// A command, and what its `data` is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    /// KVM_TDX_CAPABILITIES.
    Capabilities(User<Capabilities>),
    /// KVM_TDX_INIT_VM.
    InitVm(User<InitVm>),
    /// KVM_TDX_INIT_VCPU.
    InitVcpu,
    /// KVM_TDX_INIT_MEM_REGION.
    InitMemRegion(User<InitMemRegion>),
    /// KVM_TDX_FINALIZE_VM.
    FinalizeVm,
    /// KVM_TDX_GET_CPUID.
    GetCpuid(User<CpuidList>),
    /// Any other.
    Other(u32),
}

impl Call {
    /// The command that makes it.
    pub const fn command(self, flags: u32) -> Command {
        Command { call: self, flags, hw_error: 0 }
    }
}

/// `struct kvm_tdx_init_vm`, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InitVm {
    /// Attributes of the guest.
    pub attributes: u64,
    /// The state that is saved for it, beside what always is.
    pub xfam: u64,
    /// All reserved fields are zero.
    pub is_reserved_zero: bool,
    /// What is chosen of its CPUID.
    pub cpuid: Vec<CpuidEntry>,
}

impl Default for InitVm {
    /// A guest with four levels of page tables.
    fn default() -> Self {
        InitVm {
            attributes: ATTRIBUTE_SEPT_VE_DISABLE,
            xfam: 0,
            is_reserved_zero: true,
            cpuid: vec![CpuidEntry::of_address_width(48)],
        }
    }
}

/// `struct kvm_tdx_init_mem_region`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InitMemRegion {
    /// Where the pages are copied from.
    pub source_addr: u64,
    /// Where the guest has them.
    pub gpa: u64,
    /// How many.
    pub nr_pages: u64,
}

/// What commands ask of the virtual machine.
pub trait TdxVmTarget {
    /// Takes the locks of the virtual machine, of all its vCPUs, and of its slots, in this order. EINTR when the thread is
    /// killed while it waits.
    fn lock_state(&self) -> Result<Box<dyn Held + '_>>;

    /// vCPUs exist.
    fn has_vcpus(&self) -> bool;

    /// The processor has stage 2 tables of five levels.
    fn has_five_levels(&self) -> bool;
}

/// What a vCPU's commands ask of it.
pub trait TdxVcpuTarget: ImageTarget {
    /// The virtual machine's locks, as [`TdxVmTarget::lock_state`] takes them.
    fn lock_state(&self) -> Result<Box<dyn Held + '_>>;

    /// The vCPU's CPUID has the x2APIC, without which it cannot have its APIC's mode.
    fn has_x2apic(&self) -> bool;

    /// Maps a private frame (`kvm_tdp_mmu_map_private_pfn`): tries until it is no longer busy. EINTR when a signal is
    /// pending, EIO when the virtual machine is dead, or when it was mapped before.
    fn map_private(&self, gfn: Gfn, pfn: Pfn) -> Result<()>;

    /// Holds the MMU lock exclusively while a vCPU is made known to the module, which is otherwise busy for those who
    /// remove pages.
    fn lock_mmu(&self) -> Box<dyn Held + '_>;
}

impl Command {
    /// `tdx_get_cmd`.
    fn get(command: &User<Command>) -> Result<Command> {
        let command = command.copy_in()?;
        if command.hw_error != 0 {
            return Err(Errno::EINVAL);
        }
        Ok(command)
    }
}

impl Tdx {
    /// KVM_MEMORY_ENCRYPT_OP of the virtual machine (`tdx_vm_ioctl`). The command is written back, on errors too.
    pub fn vm_command(&self, target: &dyn TdxVmTarget, argument: &mut User<Command>) -> Result<()> {
        let mut command = Command::get(argument)?;
        if let Call::Capabilities(capabilities) = &mut argument.content.call {
            return capabilities::get(command.flags, capabilities);
        }
        let _locks = target.lock_state()?;
        let answer = match &command.call {
            Call::InitVm(parameters) => {
                let (answer, status) = self.init_vm(target, command.flags, parameters);
                command.hw_error = status;
                answer
            }
            Call::FinalizeVm => self.finalize_vm(&mut command.hw_error),
            _ => return Err(Errno::EINVAL),
        };
        argument.copy_out(command)?;
        answer
    }

    /// KVM_MEMORY_ENCRYPT_OP of a vCPU (`tdx_vcpu_unlocked_ioctl`). The command is never written back, what it points to is.
    pub fn vcpu_command(
        &self,
        target: &dyn TdxVcpuTarget,
        vcpu: &TdxVcpu,
        argument: &mut User<Command>,
    ) -> Result<()> {
        let Command { flags, .. } = Command::get(argument)?;
        {
            let _locks = target.lock_state()?;
            self.check_being_made()?;
            match &mut argument.content.call {
                Call::InitMemRegion(region) => return self.init_mem_region(target, vcpu, flags, region),
                Call::InitVcpu => return self.init_vcpu(target, vcpu, flags),
                _ => {}
            }
        }
        self.locked_vcpu_command(argument)
    }

    /// What is asked of a vCPU with its own lock alone (`tdx_vcpu_ioctl`), which others may have finalized meanwhile. Flags
    /// are not looked at.
    fn locked_vcpu_command(&self, argument: &mut User<Command>) -> Result<()> {
        self.check_being_made()?;
        match (&mut argument.content.call, self.td()) {
            (Call::GetCpuid(list), Some(td)) => capabilities::get_cpuid(td, list),
            _ => Err(Errno::EINVAL),
        }
    }

    fn check_being_made(&self) -> Result<()> {
        if self.has_key() && self.state() != State::Runnable { Ok(()) } else { Err(Errno::EINVAL) }
    }

    fn init_vm(&self, target: &dyn TdxVmTarget, flags: u32, parameters: &User<InitVm>) -> (Result<()>, u64) {
        match self.check_init_vm(target, flags, parameters) {
            Ok(params) => self.make_td(params),
            Err(error) => (Err(error), 0),
        }
    }

    fn check_init_vm(
        &self,
        target: &dyn TdxVmTarget,
        flags: u32,
        parameters: &User<InitVm>,
    ) -> Result<TdParams> {
        if self.state() != State::Uninitialized || flags != 0 {
            return Err(Errno::EINVAL);
        }
        let parameters = parameters.copy_in()?;
        if parameters.cpuid.len() > MAX_CPUID_ENTRIES {
            return Err(Errno::E2BIG);
        }
        if !parameters.is_reserved_zero {
            return Err(Errno::EINVAL);
        }
        if target.has_vcpus() {
            return Err(Errno::EBUSY);
        }
        if parameters.attributes & !capabilities::SUPPORTED_ATTRIBUTES != 0
            || parameters.xfam & !capabilities::SUPPORTED_XFAM != 0
        {
            return Err(Errno::EINVAL);
        }
        let levels = match capabilities::address_width(&parameters.cpuid) {
            Some(48) => Level::FOURTH,
            Some(52) if target.has_five_levels() => Level::FIFTH,
            _ => return Err(Errno::EINVAL),
        };
        let cpuid = capabilities::chosen(&parameters.cpuid)?;
        let is_pending_reported = parameters.attributes & ATTRIBUTE_SEPT_VE_DISABLE != 0;
        Ok(TdParams { levels, is_pending_reported, xfam: parameters.xfam | REQUIRED_XFAM, cpuid })
    }

    /// Has the guest made by the module (`__tdx_td_init`). Only operands that TDH.MNG.INIT finds wrong are the VMM's doing, and
    /// told.
    fn make_td(&self, params: TdParams) -> (Result<()>, u64) {
        if !self.module().take_key() {
            return (Err(Errno::ENOSPC), 0);
        }
        if let Err(status) = self.module().mng_create() {
            self.module().give_key_back();
            if status == Status::RND_NO_ENTROPY {
                return (Err(Errno::EAGAIN), 0);
            }
            self.bug();
            return (Err(Errno::EIO), 0);
        }
        match self.module().mng_init(params) {
            Ok(td) => {
                self.set_initialized(td);
                (Ok(()), 0)
            }
            Err(status) => {
                self.module().give_key_back();
                if status.kind() == Status::OPERAND_INVALID {
                    return (Err(Errno::EINVAL), status.0);
                }
                self.bug();
                (Err(Errno::EIO), 0)
            }
        }
    }

    fn finalize_vm(&self, hw_error: &mut u64) -> Result<()> {
        let Some(td) = self.td().filter(|_| self.has_key() && self.state() != State::Runnable) else {
            return Err(Errno::EINVAL);
        };
        if let Err(status) = td.mr_finalize() {
            *hw_error = status.0;
            if status.is_busy() {
                return Err(Errno::EBUSY);
            }
            self.bug();
            return Err(Errno::EIO);
        }
        self.set_runnable();
        Ok(())
    }

    fn init_vcpu(&self, target: &dyn TdxVcpuTarget, vcpu: &TdxVcpu, flags: u32) -> Result<()> {
        if flags != 0 || vcpu.is_initialized() || !target.has_x2apic() {
            return Err(Errno::EINVAL);
        }
        let td = self.td().ok_or(Errno::EINVAL)?;
        let answer = {
            let _exclusive = target.lock_mmu();
            td.vp_init()
        };
        self.ok(answer).map_err(|_| Errno::EIO)?;
        vcpu.set_initialized();
        Ok(())
    }

    fn init_mem_region(
        &self,
        target: &dyn TdxVcpuTarget,
        vcpu: &TdxVcpu,
        flags: u32,
        argument: &mut User<InitMemRegion>,
    ) -> Result<()> {
        if !vcpu.is_initialized() || flags & !MEASURE_MEMORY_REGION != 0 {
            return Err(Errno::EINVAL);
        }
        let mut region = argument.copy_in()?;
        self.check_region(&region)?;
        let answer = self.add_pages(target, &mut region, flags & MEASURE_MEMORY_REGION != 0);
        argument.copy_out(region)?;
        answer
    }

    fn check_region(&self, region: &InitMemRegion) -> Result<()> {
        let end = region.gpa.wrapping_add(region.nr_pages << PAGE_SHIFT);
        if region.source_addr % PAGE_SIZE != 0
            || region.source_addr == 0
            || region.gpa % PAGE_SIZE != 0
            // Also where there are no pages.
            || end <= region.gpa
            || self.is_shared(region.gpa)
            || self.is_shared(end - 1)
        {
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    fn is_shared(&self, gpa: u64) -> bool {
        self.shared_bit().is_some_and(|bit| gpa & bit.gpa() != 0)
    }

    /// Adds page after page, and advances the region by each.
    fn add_pages(
        &self,
        target: &dyn TdxVcpuTarget,
        region: &mut InitMemRegion,
        is_measured: bool,
    ) -> Result<()> {
        while region.nr_pages > 0 {
            if target.is_signal_pending() {
                return Err(Errno::EINTR);
            }
            let source = Source { hva: Hva(region.source_addr), may_be_written: false };
            image::populate(target, Gfn::of_gpa(region.gpa), Some(source), 1, &mut |gfn, pfn, source| {
                self.add_page(target, gfn, pfn, source, is_measured)
            })?;
            region.source_addr += PAGE_SIZE;
            region.gpa += PAGE_SIZE;
            region.nr_pages -= 1;
        }
        Ok(())
    }

    fn add_page(
        &self,
        target: &dyn TdxVcpuTarget,
        gfn: Gfn,
        pfn: Pfn,
        source: Option<Pfn>,
        is_measured: bool,
    ) -> Result<()> {
        self.adding(source, || target.map_private(gfn, pfn))?;
        if !is_measured {
            return Ok(());
        }
        let td = self.td().ok_or(Errno::EIO)?;
        for offset in (0..PAGE_SIZE).step_by(CHUNK as usize) {
            self.ok(td.mr_extend(gfn.gpa() + offset)).map_err(|_| Errno::EIO)?;
        }
        Ok(())
    }
}
