//! Each of the twenty is seen to fail once: something is broken on purpose, and what looks for just that must say so.

use super::{Broken, NAMES, Now, Step, Watch, bindings_are_disjoint, check};
use crate::attributes::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use crate::gmem::GuestMemfd;
use crate::host::HostMemory;
use crate::host::simulated::{Advice, Place, Protection, Settings, SimulatedHost, Source, ThpPolicy};
use crate::memslot::{FileArgument, GUEST_MEMFD, Memslots, Region};
use crate::mmu::invariants::{Dump, broken as of_tables};
use crate::personality::{Personality, Version, VmType};
use crate::tdx::{Module, TdParams, sept::SeptPage};
use crate::units::{Gfn, GfnRange, Hva, Level, PAGE_SIZE, Pfn, Privacy};
use crate::vm::{AttributesArgument, Machine, PreFault, Vcpu, Vm};
use std::sync::Arc;

const VERSION: Version = Version(7, 3);
const SIZE: u64 = 4 << 20;

/// Breaks something of a virtual machine in which both slots are mapped, and looks.
type Break = fn(&Scene) -> Result<(), Broken>;

/// By the numbers of the list.
const BREAKS: &[(usize, Break)] = &[
    (9, |scene| {
        scene.vm.attributes().set(GfnRange::new(Gfn(3), 1), Privacy::Private);
        scene.look()
    }),
    // Where both kinds are in one root, what became shared with its private page mapped maps another frame than it should.
    (10, |scene| {
        scene.vm.attributes().set(GfnRange::new(FILE.plus(3), 1), Privacy::Shared);
        Now::of(&scene.vm, &|hva| scene.behind(hva)).check_pages(&Dump::of(scene.vm.mmu()))
    }),
    (10, |scene| check(&scene.vm, &|_| Some(Pfn(1)))),
    (11, |_| removed_without_being_blocked()),
    (14, |scene| {
        scene.vm.memslots()[0].find(Gfn(0)).unwrap().lpage.disallow(Gfn(0), Level::HUGE);
        scene.look()
    }),
    (14, |scene| {
        scene.vm.memslots()[0].find(FILE).unwrap().lpage.set_mixed(FILE, Level::HUGE, true);
        scene.look()
    }),
    (16, |scene| {
        let mut now = Now::of(&scene.vm, &|_| None);
        now.slots = vec![Arc::new(Memslots::new())];
        now.check_pages(&Dump::of(scene.vm.mmu()))
    }),
    (17, |scene| {
        let asked = PreFault { gpa: 0, size: PAGE_SIZE, flags: 0 };
        scene.after(&Step::PreFault(asked, asked, Ok(())))
    }),
    (17, |scene| {
        let asked = PreFault { gpa: 0, size: 2 * PAGE_SIZE, flags: 0 };
        scene.after(&Step::PreFault(asked, PreFault { size: PAGE_SIZE, ..asked }, Ok(())))
    }),
    (19, |scene| {
        let slots = scene.vm.memslots();
        scene.file.bind_regardless(1, slots[0].find(FILE).unwrap());
        bindings_are_disjoint(&scene.vm)
    }),
    (20, |scene| {
        scene.vm.kill();
        let mut watch = Watch::new(&scene.vm);
        watch.after(&scene.vm, &Step::Ioctl(Ok(())), &|hva| scene.behind(hva))
    }),
];

/// Where the slot with a file is.
const FILE: Gfn = Gfn(1 << 18);

struct Scene {
    host: Arc<SimulatedHost>,
    vm: Arc<Vm>,
    file: Arc<GuestMemfd>,
    _vcpu: Arc<Vcpu>,
}

impl Scene {
    /// Plain memory with huge pages, and private memory.
    fn new() -> Self {
        let host = SimulatedHost::new(Settings { thp: ThpPolicy::Always, ..Settings::new(VERSION) });
        let vm = Vm::new(&machine(host.clone()), VmType::SwProtected).unwrap();
        let file = vm.create_guest_memfd(SIZE, 0).unwrap();
        for (slot, gfn) in [Gfn(0), FILE].into_iter().enumerate() {
            let place = Place::Somewhere { boundary: Level::GIGANTIC, offset: 0 };
            let hva = host.map(place, SIZE, Protection::READ_WRITE, Source::Anonymous).unwrap();
            host.advise(hva, SIZE, Advice::PopulateWrite).unwrap();
            let region = Region {
                slot: slot as u32,
                flags: if gfn == FILE { GUEST_MEMFD } else { 0 },
                gpa: gfn.gpa(),
                size: SIZE,
                userspace_addr: hva.0,
                guest_memfd: FileArgument::File(file.clone()),
                guest_memfd_offset: 0,
            };
            vm.set_user_memory_region2(&region).unwrap();
        }
        let attributes = KVM_MEMORY_ATTRIBUTE_PRIVATE;
        let private = AttributesArgument { address: FILE.gpa(), size: SIZE, attributes, flags: 0 };
        vm.set_memory_attributes(&private).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        for (gfn, size) in [(Gfn(0), SIZE), (FILE, 8 * PAGE_SIZE)] {
            vcpu.pre_fault(&mut PreFault { gpa: gfn.gpa(), size, flags: 0 }).unwrap();
        }
        assert_eq!((vm.statistics().pages_2m, vm.statistics().pages_4k), (2, 8));
        let scene = Scene { host, vm, file, _vcpu: vcpu };
        scene.look().expect("nothing is broken yet");
        scene
    }

    fn behind(&self, hva: Hva) -> Option<Pfn> {
        self.host.view(hva).pfn
    }

    fn look(&self) -> Result<(), Broken> {
        check(&self.vm, &|hva| self.behind(hva))
    }

    fn after(&self, step: &Step) -> Result<(), Broken> {
        Watch::new(&self.vm).after(&self.vm, step, &|hva| self.behind(hva))
    }
}

fn machine(host: Arc<dyn HostMemory>) -> Machine {
    Machine::new(Personality::with_everything(VERSION), host)
}

/// The module itself refuses it, and KVM would take that for a bug.
fn removed_without_being_blocked() -> Result<(), Broken> {
    let host = SimulatedHost::new(Settings::new(VERSION));
    let td = Module::new(host, 1).mng_init(TdParams::least(Level::FOURTH)).unwrap();
    for (page, level) in [Level::FOURTH, Level::GIGANTIC, Level::HUGE].into_iter().enumerate() {
        td.mem_sept_add(Gfn(0), level, SeptPage(page as u64)).unwrap();
    }
    td.vp_init().unwrap();
    td.mr_finalize().unwrap();
    td.mem_page_aug(Gfn(0), Pfn(1)).unwrap();
    let removed = td.mem_page_remove(Gfn(0), Level::SMALL);
    removed.map(drop).map_err(|status| Broken { number: 11, what: format!("refused: {status:?}") })
}

#[test]
fn each_of_the_twenty_is_seen_to_fail() {
    let mut seen = [false; NAMES.len()];
    let tables = of_tables::BREAKS
        .iter()
        .map(|(number, act)| (*number, act().map_err(|what| Broken { number: *number, what })));
    let vms = BREAKS.iter().map(|(number, act)| (*number, act(&Scene::new())));
    for (number, result) in tables.chain(vms) {
        let broken = result.expect_err(NAMES[number - 1]);
        println!("{broken}");
        assert_eq!(broken.number, number, "{broken}");
        seen[number - 1] = true;
    }
    let unseen: Vec<_> = NAMES.iter().zip(seen).filter(|(_, seen)| !seen).map(|(name, _)| name).collect();
    assert!(unseen.is_empty(), "{unseen:?}");
}
