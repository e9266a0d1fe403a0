//! A machine with one virtual machine, to which a step at a time is done, and all invariants looked at after each.
//!
//! What is done is mostly plausible and about few pages, so that things meet. A VM that dies has to be dead of a failure that
//! may end one, and another is made; of the last nothing is left then that was not lost to a failure.

use super::chance::{BASES, Chance, HUGE, MAPPED};
use super::failing::{Agents, Failure};
use kvmprep_model::attributes::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use kvmprep_model::confidential::User;
use kvmprep_model::errno::Result;
use kvmprep_model::gmem::GuestMemfd;
use kvmprep_model::host::HostMemory;
use kvmprep_model::host::simulated::{Advice, Place, Protection, Settings, SimulatedHost, Source, ThpPolicy};
use kvmprep_model::invariants::{self, Step, Watch};
use kvmprep_model::memslot::{FileArgument, GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY, Region};
use kvmprep_model::mmu::invariants::Dump;
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::snp::{self, Firmware, PageType, Rmp, RmpHost};
use kvmprep_model::tdx::{self, Module};
use kvmprep_model::units::{Gfn, Hva, Level, PAGE_SIZE, Privacy, Width};
use kvmprep_model::vm::{Access, AttributesArgument, Machine, Operation, PreFault, Vcpu, Vm};
use std::sync::Arc;

const VERSION: Version = Version(7, 3);
const SLOTS: u32 = 4;

/// A machine, and one virtual machine on it.
pub struct World {
    pub chance: Chance,
    vm_type: VmType,
    host: Arc<SimulatedHost>,
    pub agents: Agents,
    machine: Machine,
    mappings: Vec<Hva>,
    vm: Arc<Vm>,
    vcpus: Vec<Arc<Vcpu>>,
    files: Vec<Option<Arc<GuestMemfd>>>,
    watch: Watch,
    /// In this one's life something was lost of what must be given back.
    has_lost: bool,
    /// The guest has used what it must not, of which it may die.
    is_reckless: bool,
    /// How many VMs died, how many steps did something, and how often each failure happened.
    pub died: u64,
    pub effective: u64,
    pub strikes: Vec<(Failure, u64)>,
}

impl World {
    /// With one failure planned from before the first virtual machine is made.
    pub fn new(vm_type: VmType, seed: u64, planned: Option<(Failure, u64)>) -> Self {
        let host = SimulatedHost::new(Settings { thp: ThpPolicy::Madvise, ..Settings::new(VERSION) });
        let mappings = map_memory(&host);
        let (mut module, mut firmware) = (None, None);
        let mut plain: Arc<dyn HostMemory> = host.clone();
        match vm_type {
            VmType::Tdx => module = Some(Module::new(host.clone(), 1)),
            VmType::Snp => {
                let rmp = Arc::<Rmp>::default();
                plain = RmpHost::new(host.clone(), rmp.clone());
                firmware = Some(Firmware::new(host.clone(), rmp, u32::MAX, u64::MAX));
            }
            VmType::Default | VmType::SwProtected => {}
        }
        let mut agents = Agents::new(module.clone(), firmware.clone());
        if let Some((failure, nth)) = planned {
            failure.prerequisite().into_iter().for_each(|first| agents.plan(first, 1));
            agents.plan(failure, nth);
        }
        let machine = Machine {
            module,
            firmware,
            ..Machine::new(Personality::with_everything(VERSION), agents.failing(plain))
        };
        // Until there is one.
        let vm = placeholder(&host);
        let mut world = World {
            chance: Chance(seed),
            vm_type,
            host,
            agents,
            machine,
            mappings,
            watch: Watch::new(&vm),
            vm,
            vcpus: Vec::new(),
            files: Vec::new(),
            has_lost: false,
            is_reckless: false,
            died: 0,
            effective: 0,
            strikes: Failure::all_of(vm_type).into_iter().map(|failure| (failure, 0)).collect(),
        };
        world.make_vm();
        world
    }

    /// Whether a call failed in that way.
    pub fn was_struck_by(&self, failure: Failure) -> bool {
        self.strikes.iter().any(|(other, times)| *other == failure && *times > 0)
    }

    pub fn is_dead(&self) -> bool {
        self.vm.is_dead()
    }

    /// Another VM, once nothing is left of the last.
    pub fn start_again(&mut self) {
        self.files.clear();
        self.vcpus.clear();
        self.end();
        if self.agents.has_planned_of_module() || self.has_lost {
            self.replace_module();
        }
        self.plan_failure_of_making();
        self.make_vm();
    }

    /// Drops the virtual machine, and sees that everything was given back.
    fn end(&mut self) {
        let last = std::mem::replace(&mut self.vm, placeholder(&self.host));
        let td = last.tdx().and_then(|tdx| tdx.td().cloned());
        let asid = last.snp().and_then(|snp| snp.asid());
        let was_dead = last.is_dead();
        let gone = Arc::downgrade(&last);
        drop(last);
        assert!(gone.upgrade().is_none(), "someone still holds the VM");
        self.note_strikes();
        // A guest that is dead may be so because something of it could not be taken away.
        if self.has_lost || was_dead {
            return;
        }
        if let (Some(td), Some(module)) = (td, &self.agents.module) {
            assert_eq!((module.frames_of(&td), td.children()), (0, 0), "what is left of a TDX guest");
        }
        if let (Some(asid), Some(firmware)) = (asid, &self.agents.firmware) {
            assert_eq!(firmware.rmp().frames_of(asid), 0, "frames that are left of an SNP guest");
        }
    }

    fn make_vm(&mut self) {
        loop {
            (self.has_lost, self.is_reckless) = (false, false);
            let made = make_vm(&self.machine, self.vm_type);
            let struck = self.note_strikes();
            match made {
                Ok((vm, vcpus)) => {
                    (self.vm, self.vcpus) = (vm, vcpus);
                    self.watch = Watch::new(&self.vm);
                    return;
                }
                Err(error) => assert!(!struck.is_empty(), "no VM can be made: {error:?}"),
            }
            // Who could not be made may have kept the only key.
            self.replace_module();
        }
    }

    fn replace_module(&mut self) {
        if self.agents.module.is_some() {
            let module = Module::new(self.host.clone(), 1);
            self.agents.replace_module(module.clone());
            self.machine.module = Some(module);
        }
    }

    fn note_strikes(&mut self) -> Vec<Failure> {
        let struck = self.agents.struck();
        for failure in &struck {
            let strikes = self.strikes.iter_mut().filter(|(other, _)| other == failure);
            strikes.for_each(|(_, times)| *times += 1);
            self.has_lost |= !failure.is_harmless() || *failure == Failure::Entry;
        }
        struck
    }

    /// Now and then a call is to fail: mostly one that KVM must live with.
    pub fn plan_failure(&mut self) {
        if !self.chance.one_in(8) {
            return;
        }
        let (failure, _) = self.strikes[self.chance.below(self.strikes.len() as u64) as usize];
        if failure.is_harmless() || self.chance.one_in(60) {
            failure.prerequisite().into_iter().for_each(|first| self.agents.plan(first, 1));
            self.agents.plan(failure, 1 + self.chance.below(3));
        }
    }

    /// Such calls come seldom, so that one that fails has to be waited for.
    fn plan_failure_of_making(&mut self) {
        let makes = |(failure, _): &&(Failure, u64)| failure.is_of_making();
        let making: Vec<_> = self.strikes.iter().filter(makes).collect();
        if !making.is_empty() && self.chance.one_in(4) {
            let (failure, _) = *self.chance.of(&making);
            self.agents.plan(failure, 1 + self.chance.below(2));
        }
    }

    pub fn step(&mut self) -> std::result::Result<(), String> {
        let was_dead = self.vm.is_dead();
        if self.chance.one_in(50) {
            self.vcpu().send_signal();
        }
        let step = self.act();
        for vcpu in &self.vcpus {
            vcpu.take_signal();
        }
        let struck = self.note_strikes();
        self.effective += u64::from(!matches!(step, Step::Ioctl(Err(_)) | Step::PreFault(_, _, Err(_))));
        let told = |what: String| format!("after {step:?} with {struck:?}: {what}");
        if let (Step::PreFault(_, _, Err(_)), false) = (&step, was_dead) {
            let now = Dump::of(self.vm.mmu());
            let no_trace = invariants::failure_left_no_trace(self.watch.before(), &now);
            no_trace.map_err(|broken| told(broken.to_string()))?;
        }
        let host = self.host.clone();
        let looked = self.watch.after(&self.vm, &step, &|hva| host.view(hva).pfn);
        looked.map_err(|broken| told(broken.to_string()))?;
        if self.vm.is_dead() && !was_dead {
            self.died += 1;
            if !self.is_reckless && struck.iter().all(|failure| failure.is_harmless()) {
                return Err(told(format!("the VM died: {:?}", self.vm.mmu().bug())));
            }
        }
        Ok(())
    }

    fn act(&mut self) -> Step {
        match self.chance.below(32) {
            0..4 => Step::Ioctl(self.set_slot()),
            4..8 => Step::Ioctl(self.convert()),
            8..14 => self.pre_fault(),
            14..21 => self.run(),
            21..25 => self.touch_host(),
            25..27 => self.change_file(),
            27 => Step::Ioctl(self.vm.get_dirty_log(self.chance.below(SLOTS.into()) as u32).map(drop)),
            28 => Step::Ioctl(self.load()),
            29 => Step::Ioctl(self.finish()),
            30 => {
                let vcpu = self.vcpu();
                vcpu.set_smm(self.chance.one_in(3));
                Step::Other
            }
            _ => Step::Ioctl(match self.chance.one_in(20) {
                true => self.vm.enable_capability(213, 0, [1 << 7, 0, 0, 0]),
                false => self.vm.get_dirty_log(1 << 16).map(drop),
            }),
        }
    }

    fn vcpu(&mut self) -> Arc<Vcpu> {
        let at = self.chance.below(self.vcpus.len() as u64);
        self.vcpus[at as usize].clone()
    }

    fn set_slot(&mut self) -> Result<()> {
        let chance = &mut self.chance;
        let slot = chance.below(SLOTS.into()) as u32 | if chance.one_in(8) { 1 << 16 } else { 0 };
        let mut size = if chance.one_in(4) { 0 } else { chance.size() };
        let mut flags = chance.of(&[0, 0, 0, GUEST_MEMFD, GUEST_MEMFD, LOG_DIRTY_PAGES, READONLY]);
        if self.vm_type != VmType::Default && flags != GUEST_MEMFD && chance.one_in(2) {
            flags = GUEST_MEMFD;
        }
        let mut hva = chance.of(&self.mappings).0 + chance.of(&[0, 0, 0, 5 * PAGE_SIZE]);
        let mut gpa = chance.of(&BASES);
        // What is there is changed at times, not only replaced.
        if let (true, Some(old)) = (chance.one_in(3), self.vm.memslots()[0].by_id(slot as u16)) {
            (size, hva) = (old.pages * PAGE_SIZE, old.hva.0);
            if chance.one_in(2) {
                gpa = old.base.gpa();
            }
        }
        let file = match self.files.iter().flatten().next_back() {
            Some(file) if flags == GUEST_MEMFD => FileArgument::File(file.clone()),
            _ => FileArgument::BadFd,
        };
        let offset = chance.of(&[0, 0, HUGE, PAGE_SIZE]);
        self.vm.set_user_memory_region2(&Region {
            slot,
            flags,
            gpa,
            size,
            userspace_addr: hva,
            guest_memfd: file,
            guest_memfd_offset: offset,
        })
    }

    fn convert(&mut self) -> Result<()> {
        let chance = &mut self.chance;
        let attributes = if chance.one_in(2) { KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        let argument =
            AttributesArgument { address: chance.gpa(), size: chance.size(), attributes, flags: 0 };
        self.vm.set_memory_attributes(&argument)
    }

    fn pre_fault(&mut self) -> Step {
        let asked = PreFault { gpa: self.chance.gpa(), size: self.chance.size(), flags: 0 };
        let mut left = asked;
        let answer = self.vcpu().pre_fault(&mut left);
        Step::PreFault(asked, left, answer)
    }

    fn run(&mut self) -> Step {
        let vcpu = self.vcpu();
        vcpu.forget_queue();
        for _ in 0..1 + self.chance.below(4) {
            let word = self.chance.below(u64::MAX);
            let operation = self.chance.of(&[
                Operation::Read,
                Operation::Write(word),
                Operation::Write(word),
                Operation::Fetch,
                Operation::Accept,
                Operation::GiveUp,
            ]);
            let gpa = self.chance.gpa();
            // A sane guest addresses memory as it has had it converted, and accepts it before it uses it.
            let mut privacy = self.vm.attributes().privacy(Gfn::of_gpa(gpa));
            if self.chance.one_in(16) {
                privacy = if privacy == Privacy::Shared { Privacy::Private } else { Privacy::Shared };
            }
            let access = |operation| Access { gpa, width: Width::Eight, operation, privacy };
            if privacy == Privacy::Private && self.vm_type.has_protected_state() {
                if self.chance.one_in(200) {
                    self.is_reckless = true;
                } else {
                    vcpu.queue(access(Operation::Accept));
                }
            }
            vcpu.queue(access(operation));
        }
        vcpu.run();
        Step::Other
    }

    fn touch_host(&mut self) -> Step {
        let chance = &mut self.chance;
        let hva = Hva(chance.of(&self.mappings).0 + chance.of(&[0, HUGE, 5 * PAGE_SIZE]));
        let size = chance.size().min(self.mappings[0].0.max(MAPPED) - HUGE);
        let _ = match chance.below(8) {
            0 => self.host.write(hva, chance.below(u64::MAX)).map_err(drop),
            1 => self.host.read(hva).map(drop).map_err(drop),
            2 | 3 => self.host.advise(hva, size.min(HUGE), Advice::DontNeed).map_err(drop),
            4 => self.host.advise(hva, size.min(HUGE), Advice::PopulateWrite).map_err(drop),
            5 => self.host.advise(hva, size.min(HUGE), Advice::PopulateRead).map_err(drop),
            6 => self.host.advise(hva, size.min(HUGE), Advice::Collapse).map_err(drop),
            _ => self.host.advise(hva, size.min(HUGE), Advice::Remove).map_err(drop),
        };
        Step::Other
    }

    /// A file is made, closed, or loses pages.
    fn change_file(&mut self) -> Step {
        let (offset, len) = (self.chance.of(&[0, HUGE, PAGE_SIZE]) as i64, self.chance.size() as i64);
        match (self.chance.below(8), self.files.last_mut()) {
            (0, Some(file)) => *file = None,
            (1..7, Some(Some(file))) => {
                let _ = file.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len);
            }
            _ => {
                let flags = if self.vm_type == VmType::Default { self.chance.of(&[0, 3]) } else { 0 };
                self.files.push(self.vm.create_guest_memfd(2 * MAPPED, flags).ok());
            }
        }
        Step::Other
    }

    /// Some pages of the initial image.
    fn load(&mut self) -> Result<()> {
        let (mut gpa, pages) = (self.chance.gpa(), 1 + self.chance.below(4));
        // Mostly of what can be part of one.
        let slots = self.vm.memslots();
        if let Some(slot) = slots[0].iter().find(|slot| slot.has_gmem()).filter(|_| !self.chance.one_in(4)) {
            gpa = slot.base.plus(self.chance.below(4)).gpa();
            let private = KVM_MEMORY_ATTRIBUTE_PRIVATE;
            let argument = AttributesArgument { address: gpa, size: HUGE, attributes: private, flags: 0 };
            self.vm.set_memory_attributes(&argument)?;
        }
        let source = self.chance.of(&self.mappings).0;
        match self.vm_type {
            VmType::Tdx => {
                let region = tdx::InitMemRegion { source_addr: source, gpa, nr_pages: pages };
                let call = tdx::Call::InitMemRegion(User::new(region));
                let flags = self.chance.below(2) as u32;
                self.vcpu().tdx_command(&mut User::new(call.command(flags)))
            }
            VmType::Snp => {
                let update = snp::LaunchUpdate {
                    gfn_start: gpa / PAGE_SIZE,
                    uaddr: source,
                    len: pages * PAGE_SIZE,
                    page_type: PageType::Normal as u8,
                    flags: 0,
                };
                let call = snp::Call::LaunchUpdate(User::new(update));
                self.vm.snp_command(Some(&mut User::new(call.command())))
            }
            VmType::Default | VmType::SwProtected => self.convert(),
        }
    }

    /// The image is complete. Not at once, so that it is loaded in some VMs.
    fn finish(&mut self) -> Result<()> {
        if !self.chance.one_in(8) {
            return self.convert();
        }
        match self.vm_type {
            VmType::Tdx => self.vm.tdx_command(&mut User::new(tdx::Call::FinalizeVm.command(0))),
            VmType::Snp => {
                let call = snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default()));
                self.vm.snp_command(Some(&mut User::new(call.command())))
            }
            VmType::Default | VmType::SwProtected => self.convert(),
        }
    }
}

/// Memory of every kind that a slot may have.
fn map_memory(host: &SimulatedHost) -> Vec<Hva> {
    let mut mappings = Vec::new();
    let mut map = |source, advice: Option<Advice>| {
        let place = Place::Somewhere { boundary: Level::GIGANTIC, offset: 0 };
        let hva = host.map(place, MAPPED, Protection::READ_WRITE, source).unwrap();
        if let Some(advice) = advice {
            host.advise(hva, MAPPED, advice).unwrap();
        }
        mappings.push(hva);
    };
    map(Source::Anonymous, Some(Advice::HugePage));
    map(Source::Anonymous, None);
    let file = host.memfd(MAPPED / PAGE_SIZE);
    map(Source::File { file: file.clone(), first: 0, is_shared: true }, None);
    map(Source::File { file, first: 0, is_shared: false }, None);
    mappings
}

fn placeholder(host: &Arc<SimulatedHost>) -> Arc<Vm> {
    Vm::new(&Machine::new(Personality::with_everything(VERSION), host.clone()), VmType::Default).unwrap()
}

fn make_vm(machine: &Machine, vm_type: VmType) -> Result<(Arc<Vm>, Vec<Arc<Vcpu>>)> {
    let vm = Vm::new(machine, vm_type)?;
    match vm_type {
        VmType::Tdx => {
            let call = tdx::Call::InitVm(User::new(tdx::InitVm::default()));
            vm.tdx_command(&mut User::new(call.command(0)))?;
        }
        VmType::Snp => {
            for call in [
                snp::Call::Init2(User::new(snp::Init2::default())),
                snp::Call::LaunchStart(User::new(snp::LaunchStart::default())),
            ] {
                vm.snp_command(Some(&mut User::new(call.command())))?;
            }
        }
        VmType::Default | VmType::SwProtected => {}
    }
    let vcpus = (0..2).map(|number| vm.create_vcpu(number)).collect::<Result<Vec<_>>>()?;
    if vm_type == VmType::Tdx {
        for vcpu in &vcpus {
            vcpu.tdx_command(&mut User::new(tdx::Call::InitVcpu.command(0)))?;
        }
    }
    Ok((vm, vcpus))
}
