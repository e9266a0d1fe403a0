//! KVM's rules for memslots that no kernel at hand can show side by side: those that changed from release to release,
//! and TDX's.
//!
//! And what depends on settings that a test should not change: policies for huge pages, a file's cache. Everything else is
//! held against real kernels: see `cargo xtask bed diff`.

mod fake;

use fake::{Call, Fake};
use kvmprep::error::{Reason, Stage};
use kvmprep::kvm::caps::Caps;
use kvmprep::kvm::{
    FileId, FileStatus, MEM_GUEST_MEMFD, MEM_LOG_DIRTY_PAGES, MEM_READONLY, MappedObject, Mapping, Region,
    USER_ADDRESSES_END,
};
use kvmprep::memslot::alignment::{Demand, Rule};
use kvmprep::memslot::check::{Change, check, look};
use kvmprep::memslot::prediction::{Counts, Limit};
use kvmprep::memslot::report::report;
use kvmprep::memslot::{Backing, Memslot, Nature, SlotRecord};
use kvmprep::populate::exact;
use kvmprep::range::Range;
use kvmprep::vm::{Config, Vm};
use std::sync::Arc;

const GPA: u64 = 1 << 32;
const HVA: u64 = 1 << 40;
const SIZE: u64 = 1 << 21;
const GMEM: i32 = 9;

fn caps(release: [u32; 3]) -> Caps {
    Caps {
        release,
        read_only: true,
        guest_memfd: true,
        memslots: 32764,
        address_spaces: 2,
        gpa_bits: 48,
        nested_paging: true,
        user_memory2: true,
        hva_end: USER_ADDRESSES_END,
        ..Caps::default()
    }
}

fn kernel() -> Fake {
    let mut kernel = Fake::new(Range::new(HVA, SIZE).unwrap());
    kernel.file_status =
        FileStatus { id: FileId { device: 1, inode: 2 }, length: 4 * SIZE, ..kernel.file_status };
    kernel
}

fn slot(id: u32, gpa: u64, flags: u32, offset: u64) -> Memslot {
    let region =
        Region { slot: id, flags, gpa, size: SIZE, hva: HVA, guest_memfd: GMEM, guest_memfd_offset: offset };
    Memslot { region, backing: None, file: None, nature: Nature::default() }
}

/// What the check of `slot` says beside a slot 1 that has the first `SIZE` bytes of the guest_memfd.
fn verdict(caps: &Caps, slot: &Memslot) -> (i32, Reason) {
    let kernel = kernel();
    let mut record = SlotRecord::default();
    record.replace(&self::slot(1, 0, MEM_GUEST_MEMFD, 0), Some(kernel.file_status.id));
    match check(caps, &record, slot, look(&kernel, slot)) {
        Ok(verdict) => {
            assert_eq!(verdict.change, Change::Create);
            (0, Reason::None)
        }
        Err(error) => {
            assert_eq!((error.stage, error.slot), (Stage::Memslot, Some(slot.id())));
            assert!(!error.message.is_empty() && !error.hint.is_empty());
            (error.errno, error.reason)
        }
    }
}

#[test]
fn what_is_bound_already_is_found_as_each_release_finds_it() {
    let bound = slot(2, GPA, MEM_GUEST_MEMFD, SIZE / 2);
    let bound_and_too_high = slot(2, 1 << 50, MEM_GUEST_MEMFD, SIZE / 2);
    for (release, alone, with_both) in [
        ([6, 8, 0], (libc::EINVAL, Reason::GmemBound), (libc::EINVAL, Reason::GmemBound)),
        ([6, 18, 44], (libc::EINVAL, Reason::GmemBound), (libc::EINVAL, Reason::GmemBound)),
        ([7, 2, 13], (libc::EEXIST, Reason::GmemBound), (libc::EEXIST, Reason::GmemBound)),
        ([7, 3, 0], (libc::EEXIST, Reason::GmemBound), (libc::EINVAL, Reason::MemslotBeyondHost)),
    ] {
        assert_eq!(verdict(&caps(release), &bound), alone, "{release:?}");
        assert_eq!(verdict(&caps(release), &bound_and_too_high), with_both, "{release:?}");
    }
}

#[test]
fn an_overlap_comes_before_all_that_is_about_the_file() {
    let mut overlapping = slot(2, SIZE / 2, MEM_GUEST_MEMFD, 8 * SIZE);
    assert_eq!(verdict(&caps([7, 3, 0]), &overlapping), (libc::EEXIST, Reason::MemslotOverlap));
    overlapping.region.gpa = GPA;
    assert_eq!(verdict(&caps([7, 3, 0]), &overlapping), (libc::EINVAL, Reason::GmemTooShort));
    overlapping.region.guest_memfd_offset = SIZE;
    assert_eq!(verdict(&caps([7, 3, 0]), &overlapping), (0, Reason::None));
}

/// Kernels before 7.2 let it pass, by an overflow.
#[test]
fn a_part_beyond_what_a_file_can_have_is_refused_everywhere() {
    let beyond = slot(2, GPA, MEM_GUEST_MEMFD, (1 << 63) - SIZE);
    for release in [[6, 18, 44], [7, 3, 0]] {
        assert_eq!(verdict(&caps(release), &beyond), (libc::EINVAL, Reason::GmemTooShort));
    }
}

#[test]
fn the_shared_bit_of_tdx_is_no_address() {
    let tdx = Caps { gpa_shared_bit: 1 << 47, ..caps([7, 3, 0]) };
    assert_eq!(verdict(&tdx, &slot(2, 1 << 47, 0, 0)), (libc::EINVAL, Reason::SharedBit));
    assert_eq!(verdict(&tdx, &slot(2, (1 << 47) - SIZE, 0, 0)), (0, Reason::None));
    assert_eq!(verdict(&caps([7, 3, 0]), &slot(2, 1 << 47, 0, 0)), (0, Reason::None));
}

#[test]
fn the_width_is_the_host_s_or_52_bits_where_page_tables_are_shadowed() {
    let high = slot(2, 1 << 48, 0, 0);
    assert_eq!(verdict(&caps([7, 3, 0]), &high), (libc::EINVAL, Reason::MemslotBeyondHost));
    let shadowed = Caps { nested_paging: false, ..caps([7, 3, 0]) };
    assert_eq!(verdict(&shadowed, &high), (0, Reason::None));
    assert_eq!(verdict(&shadowed, &slot(2, 1 << 52, 0, 0)), (libc::EINVAL, Reason::MemslotBeyondHost));
}

#[test]
fn what_a_vm_has_not_is_refused_as_its_kernel_does() {
    let with_gmem = slot(2, GPA, MEM_GUEST_MEMFD, SIZE);
    let old = Caps { user_memory2: false, guest_memfd: false, ..caps([6, 1, 0]) };
    assert_eq!(verdict(&old, &with_gmem), (libc::ENOTTY, Reason::FlagsUnsupported));
    let default_vm = Caps { guest_memfd: false, ..caps([6, 12, 0]) };
    assert_eq!(verdict(&default_vm, &with_gmem), (libc::EINVAL, Reason::FlagsUnsupported));
    let protected = Caps { read_only: false, address_spaces: 1, ..caps([7, 3, 0]) };
    assert_eq!(verdict(&protected, &slot(2, GPA, MEM_READONLY, 0)), (libc::EINVAL, Reason::FlagsUnsupported));
    assert_eq!(verdict(&protected, &slot(0x1_0002, GPA, 0, 0)), (libc::EINVAL, Reason::MemslotNumber));
}

#[test]
fn kvm_s_own_slots_are_named() {
    let mut record = SlotRecord::default();
    let mut tss = slot(32764 + 1, 0xfeff_d000, 0, 0);
    tss.region.size = 0x3000;
    record.replace(&tss, None);
    let error = check(&caps([7, 3, 0]), &record, &slot(2, 0xfee0_0000, 0, 0), None).unwrap_err();
    assert_eq!((error.reason, error.other_slot), (Reason::MemslotOverlap, Some(32765)));
    assert!(error.hint.contains("task state segment"), "{}", error.hint);
}

#[test]
fn a_check_that_finds_nothing_wrong_asks_the_kernel_nothing() {
    let kernel = Arc::new(kernel());
    let vm = Vm::new(kernel.clone(), Config { vm_fd: 3, ..Config::default() }).unwrap();
    let before = kernel.calls.load(std::sync::atomic::Ordering::Relaxed);
    vm.check(&slot(2, GPA, 0, 0)).unwrap();
    assert_eq!(kernel.calls.load(std::sync::atomic::Ordering::Relaxed), before);
}

#[test]
fn what_only_kvm_knows_is_told_when_kvm_has_refused() {
    let kernel = Arc::new(kernel());
    let vm = Vm::new(kernel.clone(), Config { vm_fd: 3, gpa_bits: Some(40), ..Config::default() }).unwrap();
    let with_gmem = slot(2, GPA, MEM_GUEST_MEMFD, 0);
    assert!(vm.check(&with_gmem).unwrap().binds.is_some());
    kernel.fail(Call::SetRegion, 0, libc::EINVAL);
    let error = vm.set(&with_gmem).unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::EINVAL, Reason::GmemOtherVm));
    vm.set(&with_gmem).unwrap();
}

#[test]
fn a_strict_handle_sets_no_slot_that_breaks_its_rule() {
    let demand = Demand { rule: Rule::Congruent, strict: true };
    let kernel = Arc::new(kernel());
    let vm = Vm::new(kernel.clone(), Config { vm_fd: 3, demand, ..Config::default() }).unwrap();
    let mut odd = slot(2, 1 << 32, 0, 0);
    odd.region.hva += 0x1000;
    kernel.fail(Call::SetRegion, 0, libc::EIO);
    let error = vm.set(&odd).unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::EINVAL, Reason::MemslotMisaligned));
    assert!(kernel.is_still_to_fail(), "KVM was asked all the same");
    odd.region.size = 0x1000;
    assert_eq!(vm.set(&odd).unwrap_err().reason, Reason::VmDead, "a slot without huge pages breaks no rule");
}

#[test]
fn a_slot_that_is_there_may_change_its_flags_and_go_whatever_the_rule() {
    let demand = Demand { rule: Rule::Congruent, strict: true };
    let vm = Vm::new(Arc::new(kernel()), Config { vm_fd: 3, demand, ..Config::default() }).unwrap();
    let mut odd = slot(2, 1 << 32, 0, 0);
    odd.region.hva += 0x1000;
    vm.note(&odd).unwrap();
    odd.region.flags = MEM_LOG_DIRTY_PAGES;
    vm.set(&odd).unwrap();
    odd.region.size = 0;
    vm.set(&odd).unwrap();
}

/// It may have been made before there was a handle.
#[test]
fn a_deletion_of_a_slot_that_the_handle_does_not_know_is_kvm_s_to_refuse() {
    let kernel = Arc::new(kernel());
    let vm = Vm::new(kernel.clone(), Config { vm_fd: 3, ..Config::default() }).unwrap();
    let mut gone = slot(5, GPA, 0, 0);
    gone.region.size = 0;
    assert_eq!(vm.check(&gone).unwrap_err().reason, Reason::MemslotAbsent);
    vm.set(&gone).unwrap();
    kernel.fail(Call::SetRegion, 0, libc::EINVAL);
    let error = vm.set(&gone).unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::EINVAL, Reason::MemslotAbsent));
}

#[test]
fn a_type_that_the_vm_cannot_be_of_is_refused() {
    let of_type = |vm_type| {
        // The fake makes VMs of type 0 and has no private memory.
        let kernel: Arc<Fake> = Arc::new(kernel());
        Vm::new(kernel, Config { vm_fd: 3, vm_type, ..Config::default() }).map(drop).map_err(|e| e.reason)
    };
    assert_eq!(of_type(0), Ok(()));
    for vm_type in [1, 4, 5, 63, 64, 99] {
        assert_eq!(of_type(vm_type), Err(Reason::BadValue), "type {vm_type}");
    }
    let both = Caps { vm_types: 0b11, ..caps([7, 3, 0]) };
    assert_eq!(both.check_type(1).unwrap_err().reason, Reason::BadValue, "it has no private memory");
    Caps { memory_attributes: 8, ..both }.check_type(1).unwrap();
}

// ---- The memory behind a slot ----

const M2: u64 = 2 << 20;
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// What is expected of a slot over one mapping, and why no more.
fn expected(kernel: &Fake, slot: &Memslot) -> (Counts, Limit) {
    let found =
        report(kernel, &caps([7, 3, 0]), slot, slot.range().unwrap(), None, Demand::default()).unwrap();
    (found.prediction.expected, found.prediction.below_2m.limit)
}

fn mapped(object: MappedObject, on_mount: bool, smaps: &str) -> Fake {
    let mut kernel = kernel();
    {
        let mut mappings = kernel.mappings.lock().unwrap();
        mappings[0] = Mapping { object, on_mount, shared: object != MappedObject::Anonymous, ..mappings[0] };
    }
    let entry = format!("{HVA:x}-{:x} rw-s 0 0:0 1 /x\nKernelPageSize: 4 kB\n{smaps}\n", HVA + SIZE);
    kernel.files.insert("/proc/self/smaps".into(), entry);
    for (name, value) in
        [("enabled", "always [madvise] never"), ("shmem_enabled", "always advise [never] deny force")]
    {
        kernel.files.insert(format!("{THP}/{name}"), value.into());
    }
    kernel
}

const HUGE: Counts = Counts { k4: 0, m2: SIZE / M2, g1: 0 };
const SMALL: Counts = Counts { k4: SIZE / 4096, m2: 0, g1: 0 };

#[test]
fn anonymous_memory_has_huge_pages_where_they_are_advised() {
    let anonymous = |smaps| expected(&mapped(MappedObject::Anonymous, false, smaps), &slot(1, GPA, 0, 0));
    assert_eq!(anonymous("VmFlags: rd wr hg"), (HUGE, Limit::None));
    assert_eq!(anonymous("VmFlags: rd wr"), (SMALL, Limit::Advice));
    assert_eq!(anonymous("VmFlags: rd wr nh"), (SMALL, Limit::NoThp));
}

/// The setting for shared memory says nothing of a mount; that a mapping is eligible does.
#[test]
fn a_file_on_a_tmpfs_mount_goes_by_its_mount() {
    for (on_mount, smaps, outcome) in [
        (true, "THPeligible: 1\nVmFlags: rd", (HUGE, Limit::None)),
        (true, "THPeligible: 0\nVmFlags: rd", (SMALL, Limit::NoThp)),
        (false, "THPeligible: 1\nVmFlags: rd", (SMALL, Limit::NoThp)),
    ] {
        let kernel = mapped(MappedObject::Shmem, on_mount, smaps);
        assert_eq!(expected(&kernel, &slot(1, GPA, 0, 0)), outcome, "{on_mount} {smaps}");
    }
    let kernel = mapped(MappedObject::Shmem, true, "THPeligible: 0\nVmFlags: rd");
    kernel.mappings.lock().unwrap()[0].offset = 0x1000;
    assert_eq!(expected(&kernel, &slot(1, GPA, 0, 0)), (SMALL, Limit::FileOffset));
    // By its path it is any file; its descriptor tells.
    let kernel = mapped(MappedObject::File, true, "THPeligible: 1\nVmFlags: rd");
    assert_eq!(expected(&kernel, &slot(1, GPA, 0, 0)), (SMALL, Limit::Backing));
    let told = Memslot { file: Some((7, 0)), ..slot(1, GPA, 0, 0) };
    assert_eq!(expected(&kernel, &told), (HUGE, Limit::None));
}

#[test]
fn shared_memory_of_which_a_part_is_cached_has_small_pages() {
    let force = |cached| {
        let mut kernel = mapped(MappedObject::Shmem, false, "THPeligible: 1\nVmFlags: rd");
        kernel.files.insert(format!("{THP}/shmem_enabled"), "never deny [force]".into());
        kernel.cached = cached;
        expected(&kernel, &slot(1, GPA, 0, 0))
    };
    assert_eq!(force(0), (HUGE, Limit::None));
    assert_eq!(force(0x1000), (SMALL, Limit::Resident));
    assert_eq!(force(SIZE), (HUGE, Limit::None));
}

#[test]
fn a_breach_is_what_the_report_speaks_of() {
    let kernel = mapped(MappedObject::Anonymous, false, "VmFlags: rd");
    let mut odd = slot(1, GPA, MEM_LOG_DIRTY_PAGES, 0);
    odd.region.hva += 0x1000;
    let range = odd.range().unwrap();
    let found = report(&kernel, &caps([7, 3, 0]), &odd, range, None, Demand::default()).unwrap();
    assert!(found.alignment.hva_breach && found.message.contains("differ modulo"), "{}", found.message);
    assert!(found.hint.contains("0x1ff000 bytes higher"), "{}", found.hint);
}

/// Where the VMM says nothing, KVM's attributes may say "shared"; and without private memory its word means nothing.
#[test]
fn exact_believes_only_who_says_that_memory_is_private() {
    let part = [Range::new(GPA + 0x1000, 0x1000).unwrap()];
    let hidden = Some(Backing { object: MappedObject::GuestMemfd, shared: false });
    for (attributes, backing, is_exact) in [(8, None, false), (8, hidden, true), (0, hidden, false)] {
        let mut record = SlotRecord::default();
        record.replace(&Memslot { backing, ..slot(1, GPA, MEM_GUEST_MEMFD, 0) }, None);
        let caps = Caps { memory_attributes: attributes, ..caps([7, 3, 0]) };
        let checked = exact::check(&kernel(), &caps, &record, &part, None);
        assert_eq!(checked.is_ok(), is_exact, "{attributes} {backing:?}");
        if let Err(error) = checked {
            assert_eq!((error.reason, error.slot), (Reason::RangeInexact, Some(1)));
            assert_eq!(error.range, Range::new(GPA, M2));
        }
    }
}
