//! What it costs to check and to note memslots, one by one, beside all that are there already.
//!
//! The slots come in no order of their places, so that each is looked for among all. `cargo xtask bench` runs it for its
//! time, against a list that is searched from the front, and under callgrind for its growth.
//!
//! usage: memslots SLOTS [list]

mod heap;
mod willing;

use heap::ALLOCATIONS;
use kvmprep::kvm::{Kernel, Region};
use kvmprep::memslot::{Memslot, Nature};
use kvmprep::range::PAGE;
use kvmprep::vm::{Config, Vm};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;
use willing::{HVA, Willing};

/// A prime beside any number of slots: its multiples visit all places in an order that is none.
const STRIDE: u64 = 7919;

fn slot(number: u64, slots: u64) -> Memslot {
    let place = number * STRIDE % slots.max(1) * 2 * PAGE;
    let region = Region {
        slot: number as u32,
        flags: 0,
        gpa: place,
        size: PAGE,
        hva: HVA + place,
        guest_memfd: -1,
        guest_memfd_offset: 0,
    };
    Memslot { region, backing: None, file: None, nature: Nature::default() }
}

/// Through the handle. Returns nanoseconds, and how often the checks asked the heap.
fn by_handle(slots: u64) -> (u128, u64) {
    let kernel: Arc<dyn Kernel> = Arc::new(Willing::default());
    let vm = Vm::new(kernel, Config { vm_fd: 3, gpa_bits: Some(52), ..Config::default() }).expect("a handle");
    let mut asked = 0;
    let started = Instant::now();
    for number in 0..slots {
        let slot = slot(number, slots);
        let before = ALLOCATIONS.load(Relaxed);
        vm.check(&slot).expect("a slot that KVM would take");
        asked += ALLOCATIONS.load(Relaxed) - before;
        vm.note(&slot).expect("a slot");
    }
    (started.elapsed().as_nanos(), asked)
}

/// As a VMM would that keeps its slots in a list. Returns nanoseconds.
fn by_list(slots: u64) -> u128 {
    let mut list: Vec<(u32, u64, u64)> = Vec::new();
    let started = Instant::now();
    for number in 0..slots {
        let region = slot(number, slots).region;
        let (start, end) = (region.gpa, region.gpa + region.size);
        assert!(!list.iter().any(|(id, s, e)| *id == region.slot || (*s < end && start < *e)));
        list.push((region.slot, start, end));
    }
    started.elapsed().as_nanos()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let slots: u64 = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(8);
    if arguments.next().as_deref() == Some("list") {
        println!("slots {slots} ns {} allocations 0", by_list(slots));
    } else {
        let (ns, allocations) = by_handle(slots);
        println!("slots {slots} ns {ns} allocations {allocations}");
    }
}
