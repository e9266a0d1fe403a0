//! What one chunk costs in the library itself: populates guest memory through a kernel that answers every call
//! with success and does nothing.
//!
//! `cargo xtask bench` runs it under callgrind, once with N chunks and once with twice as many: the difference is
//! what N chunks cost, without what setting up costs. It prints the heap allocations of the population. Every
//! chunk goes through both stages, on one thread, in one slot, the usual case.
//!
//! usage: chunk CHUNKS

mod heap;
mod willing;

use heap::ALLOCATIONS;
use kvmprep::kvm::{Kernel, Region};
use kvmprep::memslot::{Memslot, Nature};
use kvmprep::populate::job::{Job, Leave, Options, Worker};
use kvmprep::populate::plan::Intent;
use kvmprep::range::HUGE;
use kvmprep::vm::{Config, Vm};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use willing::{HVA, Willing};

const GPA: u64 = 4 << 30;
const FILE: RawFd = 100;
const VM: RawFd = 101;
const VCPU: RawFd = 102;

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
    let kernel = Arc::new(Willing::default());
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
        for_conversion: false,
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
