//! KVM's rules for memslots that no kernel at hand can show side by side: those that changed from release to release,
//! and TDX's.
//!
//! Everything else of the rules is held against real kernels: see `cargo xtask bed diff memslots`.

mod fake;

use fake::{Call, Fake};
use kvmprep::error::{Reason, Stage};
use kvmprep::kvm::caps::Caps;
use kvmprep::kvm::{FileId, FileStatus, MEM_GUEST_MEMFD, MEM_READONLY, Region, USER_ADDRESSES_END};
use kvmprep::memslot::alignment::{Demand, Rule};
use kvmprep::memslot::check::{Change, check};
use kvmprep::memslot::{Memslot, Nature, SlotRecord};
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
    match check(&kernel, caps, &record, slot) {
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
    let kernel = kernel();
    let mut record = SlotRecord::default();
    let mut tss = slot(32764 + 1, 0xfeff_d000, 0, 0);
    tss.region.size = 0x3000;
    record.replace(&tss, None);
    let error = check(&kernel, &caps([7, 3, 0]), &record, &slot(2, 0xfee0_0000, 0, 0)).unwrap_err();
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
    assert!(vm.check(&with_gmem).unwrap().gmem_owner_unknown);
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
