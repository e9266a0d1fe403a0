//! How fast pages are mapped, by one vCPU or by several of one virtual machine, each in a range of its own.
//!
//! The host has every page in place already, so that what is measured is the model's KVM alone: the whole of a pre-fault,
//! or the MMU's part of it. Threads begin together, and time is that until the last has ended. `cargo xtask bench` runs it.
//!
//! usage: mapping pre-fault|map THREADS PAGES-EACH

use kvmprep_model::errno::Errno;
use kvmprep_model::host::{FileFrames, FollowError, HostMemory, HostPage, Notifier};
use kvmprep_model::memslot::{FileArgument, Region};
use kvmprep_model::mmu::{AccessKind, MapResult, Mapping, Mirroring, Mmu, Role, Settings};
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::units::{Gfn, Hva, Level, PAGE_SIZE, Pfn};
use kvmprep_model::vm::{Machine, PreFault, Vm};
use std::sync::{Arc, Barrier, Weak};
use std::time::Instant;

/// Ranges begin this far apart, so that no two threads share a table.
const APART: u64 = Level::GIGANTIC.pages() * 8;

const NEWEST: Personality = Personality::with_everything(Version(7, 3));

/// A host where every page is there, small and writable: the frame of an address is its page number.
struct Resident;

impl HostMemory for Resident {
    fn follow(&self, hva: Hva, _: bool) -> Result<HostPage, FollowError> {
        Ok(HostPage { pfn: Pfn(hva.page()), writable: true })
    }

    fn level(&self, _: Hva) -> Level {
        Level::SMALL
    }

    fn read_frame(&self, _: Pfn, _: usize, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn write_frame(&self, _: Pfn, _: usize, _: &[u8]) {}

    fn new_file(&self, _: u64) -> Result<Box<dyn FileFrames>, Errno> {
        Err(Errno::ENOMEM)
    }

    fn register(&self, _: Weak<dyn Notifier>) {}
}

/// Runs `work` on as many threads, each with its number, and gives the nanoseconds that all took.
fn race(threads: u64, work: impl Fn(u64) + Sync) -> u128 {
    let barrier = Barrier::new(threads as usize + 1);
    let started = std::thread::scope(|scope| {
        for thread in 0..threads {
            let (barrier, work) = (&barrier, &work);
            scope.spawn(move || {
                barrier.wait();
                work(thread);
            });
        }
        barrier.wait();
        Instant::now()
    });
    started.elapsed().as_nanos()
}

/// The whole way of a pre-fault.
fn by_pre_fault(threads: u64, pages: u64) -> (u128, u64) {
    let vm = Vm::new(&Machine::new(NEWEST, Arc::new(Resident)), VmType::Default).expect("a VM");
    for thread in 0..threads {
        let region = Region {
            slot: thread as u32,
            flags: 0,
            gpa: Gfn(thread * APART).gpa(),
            size: pages * PAGE_SIZE,
            userspace_addr: Gfn((thread + 1) * APART).gpa(),
            guest_memfd: FileArgument::BadFd,
            guest_memfd_offset: 0,
        };
        vm.set_user_memory_region(&region).expect("a slot");
    }
    let vcpus: Vec<_> = (0..threads).map(|thread| vm.create_vcpu(thread as u32).expect("a vCPU")).collect();
    let ns = race(threads, |thread| {
        let mut range =
            PreFault { gpa: Gfn(thread * APART).gpa(), size: pages * PAGE_SIZE, ..PreFault::default() };
        vcpus[thread as usize].pre_fault(&mut range).expect("memory that is there");
        assert_eq!(range.size, 0);
    });
    (ns, vm.statistics().pages_4k)
}

/// The MMU alone: a lock and a mapping for each page.
fn by_map(threads: u64, pages: u64) -> (u128, u64) {
    let mmu = Mmu::new(Settings::of(&NEWEST), None);
    let role = Role::new(&NEWEST, false, Mirroring::Direct, Gfn(0));
    let ns = race(threads, |thread| {
        let root = mmu.root(role);
        for gfn in thread * APART..thread * APART + pages {
            let mapping = Mapping {
                gfn: Gfn(gfn),
                pfn: Pfn(gfn),
                goal_level: Level::SMALL,
                kind: AccessKind::Read,
                is_prefetch: true,
                is_writable: true,
                dirty_log: None,
            };
            assert_eq!(mmu.lock_shared().map(&root, &mapping), MapResult::Fixed);
        }
    });
    (ns, mmu.page_counts()[0])
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let way = arguments.next().unwrap_or("pre-fault".into());
    let mut number = |default| arguments.next().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (threads, pages) = (number(1), number(1000));
    let (ns, mapped) = if way == "map" { by_map(threads, pages) } else { by_pre_fault(threads, pages) };
    assert_eq!(mapped, threads * pages);
    println!("threads {threads} pages {mapped} ns {ns}");
}
