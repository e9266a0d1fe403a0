//! Many threads at one virtual machine of each type: vCPUs that pre-fault and run, a VMM that converts, punches, discards and
//! changes slots. Whenever they have all come to an end, all invariants are looked at.
//!
//! The model has no unsafe code, so that no race within it is more than a wrong answer. What types do not prove is that its
//! locks do what the kernel's do: that nobody uses a frame any more once it was given back. So a guest_memfd's frames have a
//! word beside them here that is no atomic one. Whoever gives a frame or takes it back writes it, whoever uses the frame reads
//! it, and ThreadSanitizer, under which `cargo xtask test` runs this once more, says whether the one was surely over before
//! the other began. For TDX's private pages that is what blocking, tracking and kicking are for, and no lock.

use kvmprep_model::attributes::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use kvmprep_model::confidential::User;
use kvmprep_model::errno::Result;
use kvmprep_model::gmem::GuestMemfd;
use kvmprep_model::host::simulated::{Advice, Place, Protection, Settings, SimulatedHost, Source, ThpPolicy};
use kvmprep_model::host::{FileFrames, HostLayer, HostMemory};
use kvmprep_model::invariants;
use kvmprep_model::memslot::{FileArgument, GUEST_MEMFD, LOG_DIRTY_PAGES, Region};
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::snp::{self, Firmware, Rmp, RmpHost};
use kvmprep_model::tdx::{self, Module, Seamcall, Status};
use kvmprep_model::units::{Hva, Level, PAGE_SIZE, Pfn, Privacy, Width};
use kvmprep_model::vm::{Access, AttributesArgument, Machine, Operation, PreFault, Vcpu, Vm};
use std::cell::{Cell, UnsafeCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const VERSION: Version = Version(7, 3);
const HUGE: u64 = 2 << 20;
/// Where everything happens, of which frames come and go.
const HOT: Part = Part { slot: 0, gpa: 0, size: 2 * HUGE };
/// What stays as it is.
const CALM: Part = Part { slot: 1, gpa: 1 << 30, size: HUGE };
/// A slot of plain memory that comes and goes.
const PASSING: Part = Part { slot: 2, gpa: 2 << 30, size: HUGE };
const VCPUS: u32 = 3;
const ROUNDS: u64 = if cfg!(tsan) { 3 } else { 8 };
const STEPS: u64 = if cfg!(tsan) { 150 } else { 300 };

/// A slot, and where it is.
struct Part {
    slot: u32,
    gpa: u64,
    size: u64,
}

/// Splitmix64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    /// Some pages of a place: where they begin in it, and how many bytes they are.
    fn part_of(&mut self, place: &Part) -> (u64, u64) {
        let first = self.below(place.size / PAGE_SIZE);
        let most = [4, 64, 600][self.below(3) as usize];
        let pages = (1 + self.below(most)).min(place.size / PAGE_SIZE - first);
        (first * PAGE_SIZE, pages * PAGE_SIZE)
    }
}

/// A word for each frame that says how often it was given and taken back.
struct Words(Box<[UnsafeCell<u64>]>);

// SAFETY: not at all. Whether the model's locks keep threads apart here is what ThreadSanitizer is asked; no word is used
// but as a number that may be any.
unsafe impl Sync for Words {}
// SAFETY: words are plain numbers.
unsafe impl Send for Words {}

impl Words {
    const COUNT: usize = 1 << 16;

    fn new() -> Arc<Self> {
        Arc::new(Words((0..Self::COUNT).map(|_| UnsafeCell::new(0)).collect()))
    }

    #[inline(never)]
    fn use_frame(&self, pfn: Pfn) {
        thread_local!(static USES: Cell<u32> = const { Cell::new(0) });
        let uses = USES.replace(USES.get() + 1);
        if uses % 64 == 0 {
            // Time for others to do what they must not do now.
            thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: within bounds; races are what is looked for.
        std::hint::black_box(unsafe { *self.0[pfn.0 as usize % Self::COUNT].get() });
    }

    #[inline(never)]
    fn hand_over(&self, pfn: Pfn) {
        // SAFETY: within bounds; races are what is looked for.
        unsafe { *self.0[pfn.0 as usize % Self::COUNT].get() += 1 };
    }
}

/// A host that keeps such words.
struct Watched {
    host: Arc<dyn HostMemory>,
    words: Arc<Words>,
}

impl HostLayer for Watched {
    fn below(&self) -> &dyn HostMemory {
        &*self.host
    }

    fn read_frame(&self, pfn: Pfn, offset: usize, bytes: &mut [u8]) {
        self.words.use_frame(pfn);
        self.host.read_frame(pfn, offset, bytes);
    }

    fn write_frame(&self, pfn: Pfn, offset: usize, bytes: &[u8]) {
        self.words.use_frame(pfn);
        self.host.write_frame(pfn, offset, bytes);
    }

    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>> {
        let pfns = (0..pages).map(|_| AtomicU64::new(0)).collect();
        Ok(Box::new(WatchedFrames { frames: self.host.new_file(pages)?, words: self.words.clone(), pfns }))
    }
}

struct WatchedFrames {
    frames: Box<dyn FileFrames>,
    words: Arc<Words>,
    /// 0 for none.
    pfns: Box<[AtomicU64]>,
}

impl FileFrames for WatchedFrames {
    fn allocate(&self, index: u64) -> Result<Pfn> {
        let pfn = self.frames.allocate(index)?;
        if self.pfns[index as usize].swap(pfn.0, Ordering::Relaxed) != pfn.0 {
            self.words.hand_over(pfn);
        }
        Ok(pfn)
    }

    fn release(&self, index: u64) {
        match self.pfns[index as usize].swap(0, Ordering::Relaxed) {
            0 => {}
            pfn => self.words.hand_over(Pfn(pfn)),
        }
        self.frames.release(index);
    }
}

/// One step of a thread.
type Act = Box<dyn Fn(&Bench, &mut Chance) + Send>;

/// A virtual machine and what its VMM has.
struct Bench {
    vm_type: VmType,
    host: Arc<SimulatedHost>,
    memory: [Hva; 3],
    vm: Arc<Vm>,
    vcpus: Vec<Arc<Vcpu>>,
    hot_file: Option<Arc<GuestMemfd>>,
    _calm_file: Option<Arc<GuestMemfd>>,
}

impl Bench {
    fn new(vm_type: VmType) -> Arc<Self> {
        let host = SimulatedHost::new(Settings { thp: ThpPolicy::Madvise, ..Settings::new(VERSION) });
        let memory = [HOT.size, CALM.size, PASSING.size].map(|size| {
            let place = Place::Somewhere { boundary: Level::GIGANTIC, offset: 0 };
            let hva = host.map(place, size, Protection::READ_WRITE, Source::Anonymous).unwrap();
            host.advise(hva, size, Advice::HugePage).unwrap();
            hva
        });
        let vm = Vm::new(&machine(&host), vm_type).unwrap();
        let vcpus = launch(&vm);
        let file = |place: &Part| {
            // Nobody else has plain memory beside a file's.
            let has_file = vm_type != VmType::Default || place.slot == HOT.slot;
            let flags = if vm_type == VmType::Default { 3 } else { 0 };
            has_file.then(|| vm.create_guest_memfd(place.size, flags).unwrap())
        };
        let (hot_file, calm_file) = (file(&HOT), file(&CALM));
        let bench = Bench { vm_type, host, memory, hot_file, _calm_file: calm_file.clone(), vm, vcpus };
        bench.set_slot(&HOT, bench.hot_file.clone(), 0).unwrap();
        bench.set_slot(&CALM, calm_file, 0).unwrap();
        if vm_type != VmType::Default {
            bench.convert(HOT.gpa, HOT.size, Privacy::Private).unwrap();
            bench.convert(CALM.gpa, CALM.size, Privacy::Private).unwrap();
        }
        Arc::new(bench)
    }

    fn set_slot(&self, place: &Part, file: Option<Arc<GuestMemfd>>, flags: u32) -> Result<()> {
        self.vm.set_user_memory_region2(&Region {
            slot: place.slot,
            flags: flags | if file.is_some() { GUEST_MEMFD } else { 0 },
            gpa: place.gpa,
            size: place.size,
            userspace_addr: self.memory[place.slot as usize].0,
            guest_memfd: file.map_or(FileArgument::BadFd, FileArgument::File),
            guest_memfd_offset: 0,
        })
    }

    fn convert(&self, address: u64, size: u64, to: Privacy) -> Result<()> {
        let attributes = if to == Privacy::Private { KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 };
        self.vm.set_memory_attributes(&AttributesArgument { address, size, attributes, flags: 0 })
    }

    /// What one vCPU's thread does.
    fn drive(&self, vcpu: &Vcpu, chance: &mut Chance) {
        let place = [&HOT, &HOT, &CALM, &PASSING][chance.below(4) as usize];
        let (offset, size) = chance.part_of(place);
        if chance.below(3) == 0 {
            let mut left = PreFault { gpa: place.gpa + offset, size, flags: 0 };
            let _ = vcpu.pre_fault(&mut left);
            return;
        }
        vcpu.forget_queue();
        for page in 0..(size / PAGE_SIZE).min(16) {
            let gpa = place.gpa + offset + page * PAGE_SIZE;
            let privacy = self.vm.attributes().privacy(kvmprep_model::units::Gfn::of_gpa(gpa));
            let access = |operation| Access { gpa, width: Width::Eight, operation, privacy };
            let is_accepted = privacy == Privacy::Private && self.vm_type.has_protected_state();
            if is_accepted {
                vcpu.queue(access(Operation::Accept));
            }
            vcpu.queue(access([Operation::Read, Operation::Write(page)][chance.below(2) as usize]));
        }
        vcpu.run();
    }

    fn convert_some(&self, chance: &mut Chance) {
        let (offset, size) = chance.part_of(&HOT);
        let to = [Privacy::Private, Privacy::Shared][chance.below(2) as usize];
        let _ = self.convert(HOT.gpa + offset, size, to);
    }

    fn discard_some(&self, chance: &mut Chance) {
        let place = [&HOT, &PASSING][chance.below(2) as usize];
        let (offset, size) = chance.part_of(place);
        let hva = Hva(self.memory[place.slot as usize].0 + offset);
        match (chance.below(6), &self.hot_file) {
            (0..3, Some(file)) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let (offset, size) = chance.part_of(&HOT);
                file.fallocate(mode, offset as i64, size as i64).unwrap();
            }
            (3, _) => drop(self.host.advise(hva, size, Advice::PopulateWrite)),
            (4, _) => drop(self.host.write(hva, 1)),
            _ => drop(self.host.advise(hva, size, Advice::DontNeed)),
        }
    }

    fn change_slot(&self, chance: &mut Chance) {
        let gone = Part { size: 0, ..PASSING };
        let _ = match chance.below(4) {
            0 => self.set_slot(&gone, None, 0),
            1 => self.vm.get_dirty_log(PASSING.slot).map(drop),
            2 => self.set_slot(&PASSING, None, LOG_DIRTY_PAGES),
            _ => self.set_slot(&PASSING, None, 0),
        };
    }

    /// Has the module be busy when it is next asked for something that KVM tries again for as long as it is.
    fn occupy_module(&self, chance: &mut Chance) {
        const CALLS: [Seamcall; 3] = [Seamcall::MemPageAug, Seamcall::MemSeptAdd, Seamcall::VpEnter];
        if let Some(tdx) = self.vm.tdx() {
            let call = CALLS[chance.below(CALLS.len() as u64) as usize];
            tdx.module().failures().fail(call, 1 + chance.below(4), Status::OPERAND_BUSY);
        }
    }

    /// Everyone at once, until all have come to an end.
    fn round(self: &Arc<Self>, seed: u64) {
        let spawn = |number: u64, act: Act| {
            let bench = self.clone();
            thread::spawn(move || {
                let mut chance = Chance(seed << 8 | number);
                (0..STEPS).for_each(|_| act(&bench, &mut chance));
            })
        };
        let mut threads = vec![
            spawn(100, Box::new(Bench::convert_some)),
            spawn(101, Box::new(Bench::discard_some)),
            spawn(102, Box::new(Bench::change_slot)),
            spawn(103, Box::new(Bench::occupy_module)),
        ];
        for number in 0..VCPUS {
            let vcpu = self.vcpus[number as usize].clone();
            threads.push(spawn(number.into(), Box::new(move |bench, chance| bench.drive(&vcpu, chance))));
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    fn check(&self) {
        assert!(!self.vm.is_dead(), "{:?}", self.vm.mmu().bug());
        let behind = |hva| self.host.view(hva).pfn;
        invariants::check(&self.vm, &behind).unwrap_or_else(|broken| panic!("{broken}"));
    }
}

fn machine(host: &Arc<SimulatedHost>) -> Machine {
    let rmp = Arc::<Rmp>::default();
    let host: Arc<dyn HostMemory> = RmpHost::new(host.clone(), rmp.clone());
    let watched: Arc<dyn HostMemory> = Arc::new(Watched { host, words: Words::new() });
    let mut machine = Machine::new(Personality::with_everything(VERSION), watched.clone());
    machine.module = Some(Module::new(watched.clone(), 1));
    machine.firmware = Some(Firmware::new(watched, rmp, 1, u64::MAX));
    machine
}

/// A guest of which any memory can be used. Nothing of it is loaded.
fn launch(vm: &Arc<Vm>) -> Vec<Arc<Vcpu>> {
    let snp = |call: snp::Call| vm.snp_command(Some(&mut User::new(call.command()))).unwrap();
    let tdx = |call: tdx::Call| vm.tdx_command(&mut User::new(call.command(0))).unwrap();
    match vm.vm_type() {
        // What is punched between being accepted and being used is for the guest (#VE), and not the end of it.
        VmType::Tdx => {
            tdx(tdx::Call::InitVm(User::new(tdx::InitVm { attributes: 0, ..tdx::InitVm::default() })));
        }
        VmType::Snp => {
            snp(snp::Call::Init2(User::new(snp::Init2::default())));
            snp(snp::Call::LaunchStart(User::new(snp::LaunchStart::default())));
        }
        VmType::Default | VmType::SwProtected => {}
    }
    let vcpus: Vec<_> = (0..VCPUS).map(|number| vm.create_vcpu(number).unwrap()).collect();
    match vm.vm_type() {
        VmType::Tdx => {
            let init = || User::new(tdx::Call::InitVcpu.command(0));
            vcpus.iter().for_each(|vcpu| vcpu.tdx_command(&mut init()).unwrap());
            tdx(tdx::Call::FinalizeVm);
        }
        VmType::Snp => snp(snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default()))),
        VmType::Default | VmType::SwProtected => {}
    }
    vcpus
}

fn race(vm_type: VmType) {
    let bench = Bench::new(vm_type);
    let mut mapped = 0;
    for round in 0..ROUNDS {
        bench.round(round);
        bench.check();
        mapped += bench.vm.statistics().pages_4k + bench.vm.statistics().pages_2m;
    }
    assert!(mapped > 0, "nothing was ever mapped");
}

#[test]
fn at_an_ordinary_vm() {
    race(VmType::Default);
}

#[test]
fn at_a_software_protected_vm() {
    race(VmType::SwProtected);
}

#[test]
fn at_an_snp_guest() {
    race(VmType::Snp);
}

#[test]
fn at_a_tdx_guest() {
    race(VmType::Tdx);
}

/// What ThreadSanitizer is not to tell of: it does not know the fence by which the last owner of an `Arc` sees all that others
/// did with it, and the test harness passes its results on through a channel of the standard library's.
#[cfg(tsan)]
#[unsafe(no_mangle)]
extern "C" fn __tsan_default_suppressions() -> *const std::ffi::c_char {
    c"race:alloc::sync::Arc*::drop_slow\nrace:alloc::sync::Arc*core::ops::drop::Drop>::drop\nrace:test::event::\n".as_ptr()
}

/// A frame is handed over while another uses it, with nothing between the two. Fails under ThreadSanitizer, as it must.
#[test]
#[ignore = "run by another"]
fn a_race() {
    let words = Words::new();
    let user = thread::spawn({
        let words = words.clone();
        move || words.use_frame(Pfn(7))
    });
    words.hand_over(Pfn(7));
    user.join().unwrap();
}

#[cfg(tsan)]
#[test]
fn a_race_would_be_seen() {
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    let output = again.args(["a_race", "--exact", "--ignored"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("ThreadSanitizer: data race") && !output.status.success(), "{said}");
    assert!(said.contains("Words"), "{said}");
}
