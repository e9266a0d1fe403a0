//! A guest with private memory on the fake kernel: a slot of each backing, holes, and what was done to it.
//!
//! It only sets up and looks: what is right is for the tests.

use super::{Call, Fake, Ram};
use kvmprep::error::Result;
use kvmprep::kvm::{MEM_GUEST_MEMFD, MappedObject, Mapping, Region};
use kvmprep::memslot::{Memslot, Nature};
use kvmprep::private::convert::Steps;
use kvmprep::private::visibility::Visibility;
use kvmprep::range::{HUGE, PAGE, Range, RangeSet};
use kvmprep::vm::{Config, ConvertOptions, ConvertReport, Vm};
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;

const BASE: u64 = 1 << 32;
const MIB: u64 = 1 << 20;
/// A vCPU of the calling thread's.
pub const VCPU: RawFd = 5;

/// A slot of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Backed {
    pub id: u32,
    /// From the guest's first byte on, in MiB.
    first: u64,
    size: u64,
    object: MappedObject,
    shared: bool,
    has_file: bool,
}

/// Anonymous memory, in transparent huge pages.
pub const ANONYMOUS: Backed = backed(1, 0, 8, MappedObject::Anonymous);
/// A memfd whose descriptor was told.
pub const TOLD: Backed = Backed { shared: true, has_file: true, ..backed(2, 8, 4, MappedObject::Shmem) };
/// One whose was not.
pub const UNTOLD: Backed = Backed { shared: true, ..backed(3, 12, 4, MappedObject::Shmem) };
/// Huge pages of a pool. Below it is a hole of 2 MiB.
pub const POOL: Backed = Backed { shared: true, ..backed(4, 18, 8, MappedObject::Hugetlb) };
/// Its own guest_memfd is mapped.
pub const MAPPED: Backed = Backed { shared: true, ..backed(5, 26, 2, MappedObject::GuestMemfd) };
/// Without a guest_memfd.
pub const PLAIN: Backed = backed(6, 28, 2, MappedObject::Anonymous);
/// Large, in small pages. Below it is a hole.
pub const LARGE: Backed = backed(7, 64, 256, MappedObject::Anonymous);

const ALL: [Backed; 7] = [ANONYMOUS, TOLD, UNTOLD, POOL, MAPPED, PLAIN, LARGE];

const fn backed(id: u32, first: u64, size: u64, object: MappedObject) -> Backed {
    Backed { id, first, size, object, shared: false, has_file: false }
}

impl Backed {
    pub fn range(&self) -> Range {
        Range::new(BASE + self.first * MIB, self.size * MIB).unwrap()
    }

    /// Pages of it, counted from its first.
    pub fn pages(&self, pages: std::ops::Range<u64>) -> Range {
        let start = self.range().start;
        Range { start: start + pages.start * PAGE, end: start + pages.end * PAGE }
    }

    /// Where it lies in this process.
    pub fn hva(&self, gpas: Range) -> Range {
        shifted(gpas, self.range().start, self.ram().hva)
    }

    pub fn guest_memfd(&self) -> RawFd {
        100 + self.id as RawFd
    }

    pub fn file(&self) -> RawFd {
        20 + self.id as RawFd
    }

    /// Where it lies in its guest_memfd.
    pub fn private(&self, gpas: Range) -> Range {
        shifted(gpas, self.range().start, self.ram().guest_memfd.1)
    }

    /// Where it lies in its file.
    pub fn in_file(&self, gpas: Range) -> Range {
        shifted(gpas, self.range().start, u64::from(self.id) * 32 * MIB)
    }

    fn ram(&self) -> Ram {
        Ram {
            gpa: self.range().start,
            size: self.range().size(),
            hva: 0x7f00_0000_0000 + (u64::from(self.id) << 30) + self.first * MIB % (64 * MIB),
            guest_memfd: (self.guest_memfd(), u64::from(self.id) * 16 * PAGE),
            file: self.has_file.then_some((self.file(), u64::from(self.id) * 32 * MIB)),
        }
    }

    pub fn memslot(&self) -> Memslot {
        let has_guest_memfd = self.id != PLAIN.id;
        Memslot {
            region: Region {
                slot: self.id,
                flags: if has_guest_memfd { MEM_GUEST_MEMFD } else { 0 },
                gpa: self.ram().gpa,
                size: self.ram().size,
                hva: self.ram().hva,
                guest_memfd: if has_guest_memfd { self.guest_memfd() } else { -1 },
                guest_memfd_offset: if has_guest_memfd { self.ram().guest_memfd.1 } else { 0 },
            },
            backing: None,
            file: self.ram().file,
            nature: Nature::default(),
        }
    }

    fn mapping(&self) -> Mapping {
        let hva = self.hva(self.range());
        Mapping {
            start: hva.start,
            end: hva.end,
            offset: self.ram().file.map_or(0, |(_, offset)| offset),
            inode: if self.shared { self.file() as u64 } else { 0 },
            readable: true,
            writable: true,
            shared: self.shared,
            on_mount: false,
            page_size: if self.object == MappedObject::Hugetlb { HUGE } else { PAGE },
            object: self.object,
        }
    }
}

fn shifted(part: Range, from: u64, to: u64) -> Range {
    Range { start: part.start - from + to, end: part.end - from + to }
}

/// All that a conversion or a population leaves behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    pub private: RangeSet,
    pub host: RangeSet,
    pub stage2: RangeSet,
    /// What is allocated of each file.
    pub allocated: BTreeMap<RawFd, RangeSet>,
    /// Bytes that the handle takes to be in the host's tables, and in stage 2.
    pub covered: [u64; 2],
}

/// The guest, with all memory shared.
pub struct Guest {
    pub kernel: Arc<Fake>,
    pub vm: Arc<Vm>,
}

/// A kernel with the guest's memory: what is anonymous is in both page tables, in huge pages, and nothing else is in any.
pub fn kernel() -> Fake {
    let mut kernel = Fake::new(ANONYMOUS.hva(ANONYMOUS.range()));
    kernel.mappings = ALL.iter().map(Backed::mapping).collect::<Vec<_>>().into();
    kernel.has_private = true;
    kernel.ram = ALL.iter().map(Backed::ram).collect();
    let (gpas, hvas) = (ANONYMOUS.range(), ANONYMOUS.hva(ANONYMOUS.range()));
    kernel.huge.lock().unwrap().insert(hvas);
    kernel.host.lock().unwrap().insert(hvas);
    kernel.stage2.lock().unwrap().insert(gpas);
    kernel
}

/// The same before Linux 6.11, where a look at one mapping costs all of them and their pages' size is told elsewhere.
pub fn old_kernel() -> Fake {
    let mut kernel = kernel();
    kernel.has_no_query = true;
    kernel.mappings.lock().unwrap().iter_mut().for_each(|mapping| mapping.page_size = 0);
    let hva = POOL.hva(POOL.range());
    let smaps = format!("{:x}-{:x} rw-s 0 00:0e 9 /pool\nKernelPageSize: 2048 kB\n", hva.start, hva.end);
    kernel.files.insert("/proc/self/smaps".to_string(), smaps);
    kernel
}

pub fn config() -> Config {
    Config { vm_fd: 3, gpa_bits: Some(40), mappings_are_kept: true, ..Config::default() }
}

/// KVM is told, `changed`, and memory given up.
pub fn plain_options(changed: &dyn Fn(Range, Visibility) -> i32) -> ConvertOptions<'_> {
    ConvertOptions {
        steps: Steps { attributes: true, drop: true },
        prefault: false,
        keep_shared: false,
        vcpu: None,
        max_size: None,
        changed,
    }
}

impl Guest {
    pub fn new() -> Self {
        Self::on(kernel())
    }

    pub fn on(mut kernel: Fake) -> Self {
        kernel.mappable = Some(MAPPED.guest_memfd());
        let kernel = Arc::new(kernel);
        let vm = Vm::new(kernel.clone(), config()).unwrap();
        vm.set_memslots(&ALL.map(|slot| slot.memslot())).unwrap();
        Self { kernel, vm: Arc::new(vm) }
    }

    /// A function that is told of changes, and fails when the kernel is told that it should.
    pub fn listener(&self) -> impl Fn(Range, Visibility) -> i32 + '_ {
        |range, to| match self.kernel.enter_memory(Call::Changed, to as RawFd, range) {
            Ok(()) => 0,
            Err(errno) => -errno.0,
        }
    }

    pub fn convert(&self, range: Range, to: Visibility) -> Result<ConvertReport> {
        self.convert_with(range, to, &plain_options(&self.listener()))
    }

    pub fn convert_with(
        &self,
        range: Range,
        to: Visibility,
        options: &ConvertOptions<'_>,
    ) -> Result<ConvertReport> {
        let mut report = ConvertReport::default();
        self.vm.convert(range, to, options, &mut report).map(|()| report)
    }

    /// What was called about memory since the last look.
    pub fn did(&self) -> Vec<(Call, RawFd, Range)> {
        std::mem::take(&mut self.kernel.did.lock().unwrap())
    }

    /// What the handle takes to be private.
    pub fn recorded(&self) -> RangeSet {
        let mut private = RangeSet::new();
        let mut at = 0;
        while let Ok(run) = self.vm.visibility_at(at) {
            assert_eq!(run.range.start, at);
            at = run.range.end;
            if run.visibility == Visibility::Private {
                private.insert(run.range);
            }
        }
        assert_eq!(at, 1 << 40);
        private
    }

    pub fn traces(&self) -> Traces {
        let all = Range { start: 0, end: 1 << 40 };
        let (_, covered) = self.vm.coverage(all);
        let mut allocated = self.kernel.allocated.lock().unwrap().clone();
        allocated.retain(|_, set| !set.is_empty());
        Traces {
            private: self.kernel.private.lock().unwrap().clone(),
            host: self.kernel.host.lock().unwrap().clone(),
            stage2: self.kernel.stage2.lock().unwrap().clone(),
            allocated,
            covered: [covered.host, covered.stage2_write],
        }
    }
}
