//! The faults that a guest takes when it writes all of its memory, by what was done before: the counts that real kernels
//! gave, which this project is built on.
//!
//! "Nothing" is a guest that is just run; "ioctl" has been pre-faulted, "prealloc" had `MADV_POPULATE_WRITE`, and "both" had
//! one after the other.

use kvmprep_model::errno::Errno;
use kvmprep_model::gmem::{FLAG_INIT_SHARED, FLAG_MMAP};
use kvmprep_model::host::simulated::{Advice, Place, Protection, Settings, SimulatedHost, Source, ThpPolicy};
use kvmprep_model::host::{FollowError, HostLayer, HostMemory, HostPage};
use kvmprep_model::invariants;
use kvmprep_model::memslot::{FileArgument, GUEST_MEMFD, Region};
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::units::{Hva, Level, PAGE_SIZE, Privacy, Width};
use kvmprep_model::vm::{Access, AttributesArgument, Exit, Machine, Operation, PreFault, Vcpu, Vm};
use std::sync::{Arc, Mutex, Weak};

const SIZE: u64 = 64 << 20;
const PAGES: u64 = SIZE / PAGE_SIZE;
const HUGE_PAGES: u64 = SIZE >> 21;
const GPA: u64 = 1 << 30;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Backing {
    Anonymous,
    Transparent,
    MemfdPrivate,
    FilePrivate,
    HugetlbPrivate,
    MemfdShared,
    HugetlbShared,
    GmemShared,
    GmemPrivate,
}

use Backing::*;

struct Bed {
    host: Arc<SimulatedHost>,
    vm: Arc<Vm>,
    vcpu: Arc<Vcpu>,
    hva: Hva,
    /// Open, or the slot would have nothing to map.
    _file: FileArgument,
}

impl Bed {
    fn new(version: Version, backing: Backing) -> Self {
        let host = SimulatedHost::new(Settings { thp: ThpPolicy::Always, ..Settings::new(version) });
        host.set_pool(Level::HUGE, HUGE_PAGES).unwrap();
        let machine = Machine::new(Personality::with_everything(version), host.clone());
        let vm_type = if backing == GmemPrivate { VmType::SwProtected } else { VmType::Default };
        let vm = Vm::new(&machine, vm_type).unwrap();
        let (source, flags, file) = match backing {
            Anonymous | Transparent => (Source::Anonymous, 0, FileArgument::BadFd),
            MemfdPrivate => (file(host.memfd(PAGES), false), 0, FileArgument::BadFd),
            FilePrivate => (file(host.regular_file(PAGES, 7), false), 0, FileArgument::BadFd),
            MemfdShared => (file(host.memfd(PAGES), true), 0, FileArgument::BadFd),
            HugetlbPrivate | HugetlbShared => {
                let is_shared = backing == HugetlbShared;
                let source = Source::HugeAnonymous { level: Level::HUGE, is_shared, is_reserved: true };
                (source, 0, FileArgument::BadFd)
            }
            GmemShared => {
                let gmem = vm.create_guest_memfd(SIZE, FLAG_MMAP | FLAG_INIT_SHARED).unwrap();
                let source = Source::GuestMemfd { file: gmem.clone(), first: 0 };
                (source, GUEST_MEMFD, FileArgument::File(gmem))
            }
            GmemPrivate => {
                let gmem = vm.create_guest_memfd(SIZE, 0).unwrap();
                (Source::Anonymous, GUEST_MEMFD, FileArgument::File(gmem))
            }
        };
        let place = Place::Somewhere { boundary: Level::HUGE, offset: 0 };
        let hva = host.map(place, SIZE, Protection::READ_WRITE, source).unwrap();
        if backing == Anonymous || backing == GmemPrivate {
            host.advise(hva, SIZE, Advice::NoHugePage).unwrap();
        }
        let region = Region {
            slot: 1,
            flags,
            gpa: GPA,
            size: SIZE,
            userspace_addr: hva.0,
            guest_memfd: file.clone(),
            guest_memfd_offset: 0,
        };
        let set = if flags == 0 { Vm::set_user_memory_region } else { Vm::set_user_memory_region2 };
        set(&vm, &region).unwrap();
        if backing == GmemPrivate {
            let private = AttributesArgument { address: GPA, size: SIZE, attributes: 8, flags: 0 };
            vm.set_memory_attributes(&private).unwrap();
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        Bed { host, vm, vcpu, hva, _file: file }
    }

    fn pre_fault(&self) {
        let mut left = PreFault { gpa: GPA, size: SIZE, flags: 0 };
        while left.size > 0 {
            self.vcpu.pre_fault(&mut left).unwrap();
        }
        assert_eq!(self.vcpu.statistics().pf_taken, 0);
    }

    fn populate(&self) {
        self.host.advise(self.hva, SIZE, Advice::PopulateWrite).unwrap();
    }

    /// The faults that the guest takes while it writes to each page, and reads it back.
    fn faults(&self) -> u64 {
        for page in 0..PAGES {
            let gpa = GPA + page * PAGE_SIZE;
            for operation in [Operation::Write(page + 1), Operation::Read] {
                self.vcpu.queue(Access { gpa, width: Width::Eight, operation, privacy: Privacy::Shared });
            }
        }
        let run = self.vcpu.run();
        assert_eq!(run.exit, Exit::Done);
        assert!(run.read.iter().copied().eq(1..=PAGES));
        invariants::check(&self.vm, &|hva| self.host.view(hva).pfn).unwrap();
        self.vcpu.statistics().pf_taken
    }
}

fn file(file: Arc<kvmprep_model::host::simulated::File>, is_shared: bool) -> Source {
    Source::File { file, first: 0, is_shared }
}

/// Nothing, ioctl, prealloc, both.
fn measure(version: Version, backing: Backing) -> [u64; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(populates, pre_faults)| {
        let bed = Bed::new(version, backing);
        if populates && backing != GmemPrivate {
            bed.populate();
        }
        if pre_faults {
            bed.pre_fault();
        }
        bed.faults()
    })
}

/// As measured on Linux 7.3.
#[test]
fn as_on_linux_7_3() {
    let newest = |backing| measure(Version(7, 3), backing);
    for small in [Anonymous, MemfdPrivate, FilePrivate] {
        assert_eq!(newest(small), [PAGES, 2 * PAGES, PAGES, 0], "{small:?}");
    }
    assert_eq!(newest(Transparent), [HUGE_PAGES, 2 * HUGE_PAGES, HUGE_PAGES, 0]);
    assert_eq!(newest(HugetlbPrivate), [HUGE_PAGES, HUGE_PAGES, HUGE_PAGES, 0]);
    for small in [MemfdShared, GmemShared] {
        assert_eq!(newest(small), [PAGES, 0, PAGES, 0], "{small:?}");
    }
    assert_eq!(newest(HugetlbShared), [HUGE_PAGES, 0, HUGE_PAGES, 0]);
    assert_eq!(newest(GmemPrivate), [PAGES, 0, PAGES, 0]);
}

/// Linux 6.12 breaks the huge zero page into small ones, each of which is copied by itself.
#[test]
fn as_on_linux_6_12() {
    assert_eq!(measure(Version(6, 12), Transparent), [HUGE_PAGES, 2 * PAGES, HUGE_PAGES, 0]);
    assert_eq!(measure(Version(6, 12), Anonymous), [PAGES, 2 * PAGES, PAGES, 0]);
}

fn region(gpa: u64, size: u64, hva: Hva) -> Region {
    Region {
        slot: 0,
        flags: 0,
        gpa,
        size,
        userspace_addr: hva.0,
        guest_memfd: FileArgument::BadFd,
        guest_memfd_offset: 0,
    }
}

/// Random programs on Linux 7.3 found that: each address space had its snapshots counted by itself.
#[test]
fn what_one_address_space_has_not_another_may_have() {
    let bed = Bed::new(Version(7, 3), Anonymous);
    let below = Access {
        gpa: GPA - PAGE_SIZE,
        operation: Operation::Read,
        privacy: Privacy::Shared,
        width: Width::Eight,
    };
    let exit_of_read = || {
        bed.vcpu.queue(below);
        bed.vcpu.run().exit
    };
    for is_in_smm in [true, false] {
        bed.vcpu.set_smm(is_in_smm);
        assert!(matches!(exit_of_read(), Exit::Mmio { .. }));
    }
    let of_smm = Region { slot: 1 << 16, ..region(below.gpa, PAGE_SIZE, bed.hva) };
    bed.vm.set_user_memory_region(&of_smm).unwrap();
    bed.vcpu.set_smm(true);
    assert_eq!(exit_of_read(), Exit::Done);
    bed.vcpu.set_smm(false);
    assert!(matches!(exit_of_read(), Exit::Mmio { .. }));
}

/// KVM's walk loses the bits above the root's, and without accessed bits it walks before it looks for a slot.
#[test]
fn above_all_addresses_is_no_memory() {
    for has_accessed_dirty in [true, false] {
        let version = Version(7, 3);
        let host = SimulatedHost::new(Settings::new(version));
        let personality = Personality { has_accessed_dirty, ..Personality::with_everything(version) };
        let vm = Vm::new(&Machine::new(personality, host.clone()), VmType::Default).unwrap();
        let place = Place::Somewhere { boundary: Level::HUGE, offset: 0 };
        let hva = host.map(place, PAGE_SIZE, Protection::READ_WRITE, Source::Anonymous).unwrap();
        vm.set_user_memory_region(&region(GPA, PAGE_SIZE, hva)).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let pre_fault = |gpa| vcpu.pre_fault(&mut PreFault { gpa, size: PAGE_SIZE, flags: 0 });
        assert_eq!(pre_fault(GPA), Ok(()));
        let above = GPA + (1 << 48);
        let no_slot = region(above, PAGE_SIZE, hva);
        assert_eq!(vm.set_user_memory_region(&Region { slot: 1, ..no_slot.clone() }), Err(Errno::EINVAL));
        assert_eq!(vm.set_user_memory_region2(&Region { slot: 1, ..no_slot }), Err(Errno::EINVAL));
        assert_eq!(pre_fault(above), Err(Errno::ENOENT));
        vcpu.queue(Access {
            gpa: above,
            operation: Operation::Read,
            privacy: Privacy::Shared,
            width: Width::Eight,
        });
        assert!(matches!(vcpu.run().exit, Exit::Mmio { gpa, .. } if gpa == above));
    }
}

/// A host during whose next look-up all roots become obsolete, as when any slot is deleted just then.
#[derive(Default)]
struct Undermining {
    host: Option<Arc<SimulatedHost>>,
    victim: Mutex<Weak<Vm>>,
}

impl HostLayer for Undermining {
    fn below(&self) -> &dyn HostMemory {
        &**self.host.as_ref().unwrap()
    }

    fn follow(&self, hva: Hva, write: bool) -> Result<HostPage, FollowError> {
        if let Some(vm) = std::mem::take(&mut *self.victim.lock().unwrap()).upgrade() {
            vm.mmu().lock_exclusive().invalidate_all_direct_roots();
            vm.mmu().zap_invalidated_roots();
        }
        self.below().follow(hva, write)
    }
}

/// A pre-fault looks for a root once a page, and tries that page with it for ever (`kvm_tdp_page_prefault`): seen on 7.3,
/// where neither it nor the deletion that it met came to an end before a signal did.
#[test]
fn a_pre_fault_whose_root_becomes_obsolete_under_it_ends_with_a_signal() {
    for version in [Version(6, 12), Version(7, 3)] {
        let below = SimulatedHost::new(Settings::new(version));
        let place = Place::Somewhere { boundary: Level::HUGE, offset: 0 };
        let hva = below.map(place, PAGE_SIZE * 2, Protection::READ_WRITE, Source::Anonymous).unwrap();
        let host = Arc::new(Undermining { host: Some(below), ..Undermining::default() });
        let machine = Machine::new(Personality::with_everything(version), host.clone());
        let vm = Vm::new(&machine, VmType::Default).unwrap();
        vm.set_user_memory_region(&region(GPA, PAGE_SIZE * 2, hva)).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let pre_fault = || {
            let mut left = PreFault { gpa: GPA, size: PAGE_SIZE * 2, flags: 0 };
            (vcpu.pre_fault(&mut left), left.size / PAGE_SIZE)
        };
        *host.victim.lock().unwrap() = Arc::downgrade(&vm);
        assert_eq!(pre_fault(), (Err(Errno::EINTR), 2), "{version:?}");
        if version == Version(6, 12) {
            assert_eq!(pre_fault(), (Err(Errno::EINTR), 2), "only a run lets go of the root");
            vcpu.queue(Access {
                gpa: GPA,
                width: Width::Eight,
                operation: Operation::Read,
                privacy: Privacy::Shared,
            });
            assert_eq!(vcpu.run().exit, Exit::Done);
        }
        assert_eq!(pre_fault(), (Ok(()), 0), "{version:?}");
    }
}
