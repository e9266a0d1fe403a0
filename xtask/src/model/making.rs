//! What a scenario makes: a virtual machine and its vCPUs, memory of the VMM's, and files.
//!
//! It is made at once, by whoever asks, and while nothing is under way that could be in its way.

use super::deeds::Answer;
use super::language::{MemoryKind, Operation};
use super::stage::{Memory, Stage};
use anyhow::{Result, anyhow, ensure};
use kvmprep_model::confidential::User;
use kvmprep_model::errno::Result as Answered;
use kvmprep_model::host::simulated::{Place, Protection, Source, ThpPolicy};
use kvmprep_model::personality::VmType;
use kvmprep_model::snp;
use kvmprep_model::tdx;
use kvmprep_model::units::{Level, PAGE_SIZE};
use kvmprep_model::vm::Vm;

impl Stage {
    /// Makes what an operation is to make, if that is what it is to do.
    pub fn make(&mut self, operation: &Operation, is_quiet: bool) -> Result<Option<Answer>> {
        let is_made = matches!(
            operation,
            Operation::Vm(_) | Operation::Vcpu(_) | Operation::Memory { .. } | Operation::File { .. }
        );
        ensure!(is_quiet || !is_made, "it is to be made while nothing is under way");
        Ok(Some(match operation {
            Operation::Vm(vm_type) => self.make_vm(*vm_type)?,
            Operation::Vcpu(number) => self.make_vcpu(*number)?,
            Operation::Memory { name, size, kind } => self.make_memory(name, *size, kind)?,
            Operation::File { name, size, flags } => self.make_file(name, *size, *flags)?,
            _ => return Ok(None),
        }))
    }

    /// A new virtual machine. One that was before is forgotten with all that hung on it.
    fn make_vm(&mut self, vm_type: VmType) -> Result<Answer> {
        self.vcpus.clear();
        self.files.clear();
        self.slots.clear();
        self.vm = None;
        let vm = match Vm::new(&self.machine(), vm_type) {
            Ok(vm) => vm,
            Err(errno) => return Ok(Answer::of(Err(errno))),
        };
        let begun = begin(&vm);
        self.vm = Some(vm);
        if begun.is_ok() { self.make_vcpu(0) } else { Ok(Answer::of(begun)) }
    }

    fn make_vcpu(&mut self, number: u32) -> Result<Answer> {
        let made = self.vm()?.create_vcpu(number).and_then(|vcpu| {
            if vcpu.vm().tdx().is_some() {
                vcpu.tdx_command(&mut User::new(tdx::Call::InitVcpu.command(0)))?;
            }
            self.vcpus.insert(number, vcpu);
            Ok(())
        });
        Ok(Answer::of(made))
    }

    fn make_memory(&mut self, name: &str, size: u64, kind: &MemoryKind) -> Result<Answer> {
        ensure!(!self.memories.contains_key(name), "there is a memory {name:?} already");
        let (source, boundary) = match kind {
            MemoryKind::Anonymous => (Source::Anonymous, Level::HUGE),
            MemoryKind::Shared => (Source::SharedAnonymous, Level::HUGE),
            MemoryKind::Thp => {
                self.host.set_thp(ThpPolicy::Always);
                (Source::Anonymous, Level::GIGANTIC)
            }
            MemoryKind::Hugetlb(level) => {
                let pages = self.host.pool(*level).map_or(0, |pool| pool.total);
                let more = size.div_ceil(level.pages() * PAGE_SIZE);
                self.host.set_pool(*level, pages + more).map_err(|errno| anyhow!("{errno:?}"))?;
                (Source::HugeAnonymous { level: *level, is_shared: true, is_reserved: true }, Level::GIGANTIC)
            }
            MemoryKind::File(file) => {
                let file = self.file(file)?;
                if let Err(errno) = file.check_mmap(true) {
                    return Ok(Answer::of(Err(errno)));
                }
                (Source::GuestMemfd { file, first: 0 }, Level::HUGE)
            }
        };
        let place = Place::Somewhere { boundary, offset: 0 };
        let made = self.host.map(place, size, Protection::READ_WRITE, source).map(|hva| {
            let is_shared = !matches!(kind, MemoryKind::Anonymous | MemoryKind::Thp);
            self.memories.insert(name.into(), Memory { hva, size, is_shared });
        });
        Ok(Answer::of(made))
    }

    fn make_file(&mut self, name: &str, size: u64, flags: u64) -> Result<Answer> {
        ensure!(!self.files.contains_key(name), "there is a file {name:?} already");
        let made = self.vm()?.create_guest_memfd(size, flags).map(|file| {
            self.files.insert(name.into(), file);
        });
        Ok(Answer::of(made))
    }
}

/// A virtual machine of a confidential guest as it is before its vCPUs, of any other as it is.
fn begin(vm: &Vm) -> Answered<()> {
    if vm.tdx().is_some() {
        let call = tdx::Call::InitVm(User::new(tdx::InitVm::default()));
        vm.tdx_command(&mut User::new(call.command(0)))?;
    }
    if vm.snp().is_some() {
        let init = snp::Call::Init2(User::new(snp::Init2::default()));
        let start = snp::Call::LaunchStart(User::new(snp::LaunchStart::default()));
        for call in [init, start] {
            vm.snp_command(Some(&mut User::new(call.command())))?;
        }
    }
    Ok(())
}
