//! What one chunk costs in the library itself: populates guest memory through a kernel that answers every call
//! with success and does nothing.
//!
//! `cargo xtask bench` runs it under callgrind, once with N chunks and once with twice as many: the difference is
//! what N chunks cost, without what setting up costs. It prints the heap allocations of the population. Every
//! chunk goes through both stages, on one thread, in one slot, the usual case.
//!
//! usage: chunk CHUNKS

use kvmprep::kvm::{
    Access, Errno, ExitRequest, FileKind, FileStatus, Kernel, MappedObject, Mapping, Region, Stats, Sys,
};
use kvmprep::memslot::{Memslot, Nature};
use kvmprep::populate::job::{Job, Leave, Options, Worker};
use kvmprep::populate::plan::Intent;
use kvmprep::range::{HUGE, Range};
use kvmprep::vm::{Config, Vm};
use std::alloc::{GlobalAlloc, Layout, System};
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Counts what is asked of the heap.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static HEAP: Counting = Counting;

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

const GPA: u64 = 4 << 30;
const HVA: u64 = 1 << 40;
const FILE: RawFd = 100;
const VM: RawFd = 101;
const VCPU: RawFd = 102;

/// A kernel whose every call succeeds at once. It offers pre-fault and a shared memfd of any size, the backing
/// with the most system calls for each chunk.
struct Willing {
    calls: AtomicU64,
}

struct NeverWanted;

impl ExitRequest for NeverWanted {
    fn is_set(&self) -> bool {
        false
    }
}

impl Willing {
    fn count(&self) {
        self.calls.fetch_add(1, Relaxed);
    }
}

impl Kernel for Willing {
    fn check_extension(&self, _: RawFd, _: u32) -> Sys<u32> {
        Ok(1)
    }
    fn disable_quirks(&self, _: RawFd, _: u64) -> Sys<()> {
        Ok(())
    }
    fn set_region(&self, _: RawFd, _: &Region) -> Sys<()> {
        Ok(())
    }
    fn pre_fault(&self, _: RawFd, _: Range) -> Sys<Option<Range>> {
        self.count();
        Ok(None)
    }
    fn stats(&self, _: RawFd) -> Sys<Stats> {
        Err(Errno(libc::ENOTTY))
    }
    fn exit_request(&self, _: RawFd) -> Sys<Box<dyn ExitRequest>> {
        Ok(Box::new(NeverWanted))
    }
    fn populate(&self, _: u64, _: u64, _: Access) -> Sys<()> {
        self.count();
        Ok(())
    }
    fn advise_huge(&self, _: u64, _: u64) -> Sys<()> {
        Ok(())
    }
    fn allocate(&self, _: RawFd, _: u64, _: u64) -> Sys<()> {
        self.count();
        Ok(())
    }
    fn file_status(&self, _: RawFd) -> Sys<FileStatus> {
        Err(Errno(libc::ENOTTY))
    }

    fn file_kind(&self, _: RawFd) -> Sys<FileKind> {
        Ok(FileKind { object: MappedObject::Shmem, page_size: 4096 })
    }
    fn mapping(&self, _: u64) -> Sys<Option<Mapping>> {
        let object = MappedObject::Shmem;
        Ok(Some(Mapping {
            start: HVA,
            end: u64::MAX,
            offset: 0,
            writable: true,
            shared: true,
            page_size: 4096,
            object,
        }))
    }
    fn resident(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        Ok(Some((start, end)))
    }
    fn cached(&self, _: u64, size: u64) -> Sys<u64> {
        Ok(size)
    }
    fn file_name(&self, _: RawFd) -> Option<String> {
        None
    }
    fn read_file(&self, _: &str) -> Sys<String> {
        Err(Errno(libc::ENOENT))
    }
    fn wait(&self, _: &AtomicU32, _: u32, _: Duration) -> Sys<()> {
        Ok(())
    }
    fn wake(&self, _: &AtomicU32) {}
    fn event(&self) -> Sys<OwnedFd> {
        Ok(std::fs::File::open("/dev/null").map_err(|_| Errno(libc::EMFILE))?.into())
    }
    fn event_add(&self, _: &OwnedFd, _: u64) -> Sys<()> {
        Ok(())
    }
    fn event_take(&self, _: &OwnedFd) -> Sys<()> {
        Ok(())
    }
}

/// A guest whose memory is one slot over one memfd.
fn vm(kernel: &Arc<Willing>, size: u64) -> Arc<Vm> {
    let kernel: Arc<dyn Kernel> = Arc::<Willing>::clone(kernel);
    let config = Config { vm_fd: VM, gpa_bits: Some(52), ..Config::default() };
    let vm = Vm::new(kernel, config).expect("a handle");
    let region =
        Region { slot: 0, flags: 0, gpa: GPA, size, hva: HVA, guest_memfd: -1, guest_memfd_offset: 0 };
    let slot = Memslot { region, backing: None, file: Some((FILE, 0)), nature: Nature::default() };
    vm.note(&slot).expect("a slot");
    Arc::new(vm)
}

fn main() {
    // `cargo test --benches` and its like give no count, and want to know only that it runs.
    let chunks: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(8);
    let kernel = Arc::new(Willing { calls: AtomicU64::new(0) });
    let vm = vm(&kernel, chunks * HUGE);
    let options = Options {
        intent: Intent::Write,
        host_only: false,
        huge_advice: false,
        require_stage2: true,
        check_free: false,
        skip_covered: false,
        dirty_logged_too: false,
        exact: false,
        timeout: None,
    };
    let before = ALLOCATIONS.load(Relaxed);
    let job = Job::new(&vm, &[], options).expect("a job");
    let worker = Worker::visitor(job.kernel(), Some(VCPU), &[]).expect("a worker");
    let leave = job.run(worker, &mut |_| {});
    let allocations = ALLOCATIONS.load(Relaxed) - before;

    let report = job.report();
    assert_eq!(leave, Leave::NoWork, "the worker left early");
    assert_eq!((report.host, report.stage2), (chunks * HUGE, chunks * HUGE), "not all was done");
    let calls = kernel.calls.load(Relaxed);
    assert!(calls >= 2 * chunks, "{calls} system calls do not make {chunks} chunks of both stages");
    println!("chunks {chunks} calls {calls} allocations {allocations}");
}
