//! A machine with TDX and SNP, and what a VMM does with guests of it.
//!
//! Nothing is checked here.

use std::sync::Arc;

use kvmprep_model::attributes::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use kvmprep_model::confidential::User;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::gmem::GuestMemfd;
use kvmprep_model::host::simulated::{Place, Protection, Settings, SimulatedHost, Source};
use kvmprep_model::memslot::{FileArgument, GUEST_MEMFD, Region};
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::snp::{self, Firmware, PageType, Rmp, RmpHost};
use kvmprep_model::tdx::{self, Module};
use kvmprep_model::units::{Hva, Level, PAGE_SIZE, Privacy, Width};
use kvmprep_model::vm::{Access, AttributesArgument, Exit, Machine, Operation, PreFault, Run, Vcpu, Vm};
use kvmprep_model::{invariants, mmu};

pub const VERSION: Version = Version(7, 3);
/// Where the slot begins, and how many pages it has.
pub const BASE: u64 = 0x4000_0000;
pub const PAGES: u64 = 64;
/// The image: the first pages of the slot. Page n of the VMM's memory begins with the word n + 1.
pub const IMAGE: u64 = 4;

pub struct Bench {
    pub host: Arc<SimulatedHost>,
    pub module: Arc<Module>,
    pub rmp: Arc<Rmp>,
    pub machine: Machine,
}

/// A virtual machine with one slot, whose memory is all private.
pub struct Guest {
    host: Arc<SimulatedHost>,
    pub vm: Arc<Vm>,
    pub vcpu: Arc<Vcpu>,
    pub file: Arc<GuestMemfd>,
    pub memory: Hva,
}

impl Bench {
    pub fn new() -> Self {
        let host = SimulatedHost::new(Settings::new(VERSION));
        let module = Module::new(host.clone(), 1);
        let rmp = Arc::<Rmp>::default();
        let firmware = Firmware::new(host.clone(), rmp.clone(), 2, u64::MAX);
        let guarded = RmpHost::new(host.clone(), rmp.clone());
        let mut machine = Machine::new(Personality::with_everything(VERSION), guarded);
        machine.module = Some(module.clone());
        machine.firmware = Some(firmware);
        Bench { host, module, rmp, machine }
    }

    /// A TDX guest up to where its image is to be loaded, with a second vCPU.
    pub fn tdx(&self) -> (Guest, Arc<Vcpu>) {
        let vm = Vm::new(&self.machine, VmType::Tdx).unwrap();
        tdx_vm(&vm, tdx::Call::InitVm(User::new(tdx::InitVm::default()))).unwrap();
        let guest = self.guest(vm);
        tdx_vcpu(&guest.vcpu, tdx::Call::InitVcpu, 0).unwrap();
        let second = guest.vm.create_vcpu(1).unwrap();
        tdx_vcpu(&second, tdx::Call::InitVcpu, 0).unwrap();
        (guest, second)
    }

    /// A TDX guest that runs.
    pub fn tdx_running(&self) -> (Guest, Arc<Vcpu>) {
        let (guest, second) = self.tdx();
        guest.load_tdx(0, IMAGE).unwrap();
        tdx_vm(&guest.vm, tdx::Call::FinalizeVm).unwrap();
        (guest, second)
    }

    /// An SNP guest up to where its image is to be loaded.
    pub fn snp(&self) -> Guest {
        let vm = Vm::new(&self.machine, VmType::Snp).unwrap();
        snp_vm(&vm, snp::Call::Init2(User::new(snp::Init2::default()))).unwrap();
        snp_vm(&vm, snp::Call::LaunchStart(User::new(snp::LaunchStart::default()))).unwrap();
        self.guest(vm)
    }

    pub fn guest(&self, vm: Arc<Vm>) -> Guest {
        let place = Place::Somewhere { boundary: Level::HUGE, offset: 0 };
        let size = PAGES * PAGE_SIZE;
        let memory = self.host.map(place, size, Protection::READ_WRITE, Source::Anonymous).unwrap();
        for page in 0..PAGES {
            self.host.write(memory.plus_pages(page), page + 1).unwrap();
        }
        let file = vm.create_guest_memfd(size, 0).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let guest = Guest { host: self.host.clone(), vm, vcpu, file, memory };
        guest.set_slot(size).unwrap();
        guest.convert(0, PAGES, Privacy::Private).unwrap();
        guest
    }
}

impl Guest {
    pub fn set_slot(&self, size: u64) -> Result<()> {
        self.vm.set_user_memory_region2(&Region {
            slot: 0,
            flags: GUEST_MEMFD,
            gpa: BASE,
            size,
            userspace_addr: self.memory.0,
            guest_memfd: FileArgument::File(self.file.clone()),
            guest_memfd_offset: 0,
        })
    }

    pub fn convert(&self, first: u64, pages: u64, to: Privacy) -> Result<()> {
        let attributes = if to == Privacy::Private { KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let address = BASE + first * PAGE_SIZE;
        self.vm.set_memory_attributes(&AttributesArgument {
            address,
            size: pages * PAGE_SIZE,
            attributes,
            flags: 0,
        })
    }

    /// KVM_TDX_INIT_MEM_REGION, measured.
    pub fn load_tdx(&self, first: u64, nr_pages: u64) -> Result<()> {
        let source_addr = self.memory.plus_pages(first).0;
        let region = tdx::InitMemRegion { source_addr, gpa: BASE + first * PAGE_SIZE, nr_pages };
        tdx_vcpu(&self.vcpu, tdx::Call::InitMemRegion(User::new(region)), 1)
    }

    /// KVM_SEV_SNP_LAUNCH_UPDATE.
    pub fn load_snp(&self, first: u64, pages: u64) -> Result<()> {
        let update = snp::LaunchUpdate {
            gfn_start: BASE / PAGE_SIZE + first,
            uaddr: self.memory.plus_pages(first).0,
            len: pages * PAGE_SIZE,
            page_type: PageType::Normal as u8,
            flags: 0,
        };
        snp_vm(&self.vm, snp::Call::LaunchUpdate(User::new(update)))
    }

    /// KVM_PRE_FAULT_MEMORY: what is left of the pages, and what it answers.
    pub fn pre_fault(&self, first: u64, pages: u64) -> (u64, Result<()>) {
        let mut range = PreFault { gpa: BASE + first * PAGE_SIZE, size: pages * PAGE_SIZE, flags: 0 };
        let answer = self.vcpu.pre_fault(&mut range);
        (range.size / PAGE_SIZE, answer)
    }

    pub fn punch(&self, first: u64, pages: u64) {
        let (offset, len) = ((first * PAGE_SIZE) as i64, (pages * PAGE_SIZE) as i64);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.file.fallocate(mode, offset, len).unwrap();
    }

    pub fn pages(&self) -> u64 {
        self.vm.statistics().pages_4k
    }

    /// How many pages the secure EPT has.
    pub fn pages_private(&self) -> u64 {
        let mut pages = 0;
        self.vm.tdx().unwrap().td().unwrap().visit(&mut |_, _, entry| {
            pages += u64::from(matches!(entry, tdx::sept::Entry::Page { .. }));
        });
        pages
    }

    /// Everything that must be true of a guest that nobody is at.
    pub fn check(&self) {
        let behind = |hva| self.host.view(hva).pfn;
        invariants::check(&self.vm, &behind).unwrap_or_else(|broken| panic!("{broken}"));
    }

    /// Everything that must be true of its tables, whoever is at them.
    pub fn check_tables(&self) {
        mmu::invariants::check(self.vm.mmu()).unwrap();
    }
}

pub fn tdx_vm(vm: &Vm, call: tdx::Call) -> Result<()> {
    vm.tdx_command(&mut User::new(call.command(0)))
}

pub fn tdx_vcpu(vcpu: &Vcpu, call: tdx::Call, flags: u32) -> Result<()> {
    vcpu.tdx_command(&mut User::new(call.command(flags)))
}

pub fn snp_vm(vm: &Vm, call: snp::Call) -> Result<()> {
    vm.snp_command(Some(&mut User::new(call.command())))
}

/// Has the guest do one thing with a page.
pub fn run(vcpu: &Vcpu, page: u64, operation: Operation, privacy: Privacy) -> Run {
    vcpu.queue(Access { gpa: BASE + page * PAGE_SIZE, width: Width::Eight, operation, privacy });
    vcpu.run()
}

pub fn private(vcpu: &Vcpu, page: u64, operation: Operation) -> Run {
    run(vcpu, page, operation, Privacy::Private)
}

pub fn done(read: &[u64]) -> Run {
    Run { exit: Exit::Done, read: read.to_vec() }
}

pub fn is_memory_fault(run: &Run, page: u64) -> bool {
    matches!(run.exit, Exit::MemoryFault(Errno::EFAULT, fault) if fault.gpa == BASE + page * PAGE_SIZE)
}
