//! What is shown of a guest: that it is so, and that looking changes nothing.

use kvmprep_model::dump::{FrameOwner, VmDump};
use kvmprep_model::units::{Gfn, PAGE_SIZE, Privacy};
use kvmprep_model::vm::Operation;

use crate::bench::{BASE, Bench, IMAGE, PAGES, done, private, run, snp_vm, tdx_vm};
use kvmprep_model::confidential::User;
use kvmprep_model::{snp, tdx};

/// Owners of the frames of the slot's file, by page.
fn owners(dump: &VmDump) -> Vec<(u64, FrameOwner)> {
    let mut owners: Vec<_> =
        dump.frames.iter().filter_map(|frame| Some((frame.file?.1, frame.owner))).collect();
    owners.sort_by_key(|(page, _)| *page);
    owners
}

#[test]
fn an_snp_guests_frames_are_its_own_and_then_accepted() {
    let bench = Bench::new();
    let guest = bench.snp();
    guest.load_snp(0, 1).unwrap();
    let gfn = Gfn::of_gpa(BASE);
    let of_guest = |page, is_accepted| (page, FrameOwner::Guest { gfn: gfn.plus(page), is_accepted });
    let dump = VmDump::of(&guest.vm);
    assert_eq!(owners(&dump), [of_guest(0, true)]);
    assert!(!dump.is_sealed && dump.external.is_none());
    snp_vm(&guest.vm, snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default()))).unwrap();
    assert_eq!(guest.pre_fault(1, 1), (0, Ok(())));
    let dump = VmDump::of(&guest.vm);
    assert!(dump.is_sealed);
    assert_eq!(owners(&dump), [of_guest(0, true), of_guest(1, false)]);
    assert_eq!(private(&guest.vcpu, 1, Operation::Accept), done(&[]));
    assert_eq!(owners(&VmDump::of(&guest.vm)), [of_guest(0, true), of_guest(1, true)]);
}

#[test]
fn looking_allocates_nothing_and_changes_nothing() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx_running();
    let dump = VmDump::of(&guest.vm);
    assert_eq!(VmDump::of(&guest.vm), dump);
    assert_eq!(VmDump::of_stopped(&guest.vm), dump);
    assert_eq!(guest.file.present_pages(), IMAGE);
    assert_eq!(dump.slots[0].file.as_ref().unwrap().pages.len() as u64, IMAGE);
    guest.check();
}

#[test]
fn a_tdx_guest_in_words() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx();
    guest.load_tdx(0, 1).unwrap();
    tdx_vm(&guest.vm, tdx::Call::FinalizeVm).unwrap();
    assert_eq!(guest.pre_fault(1, 1), (0, Ok(())));
    guest.convert(PAGES - 1, 1, Privacy::Shared).unwrap();
    assert_eq!(run(&guest.vcpu, PAGES - 1, Operation::Read, Privacy::Shared), done(&[PAGES]));
    guest.file.close();
    let dump = VmDump::of(&guest.vm);
    let shared = dump.frames.last().unwrap().pfn.0;
    let hva = guest.memory.0;
    let size = PAGES * PAGE_SIZE / 1024;
    let words = format!(
        "vm tdx, its image sealed, shared bit 0x800000000000
slot 0:0: {BASE:#x} +{size}K at {hva:#x}, file 0 from page 0x0, 0 present, closed
private: {BASE:#x} +{}K
mirror root of 4 levels
  0x0 +512G table
    0x40000000 +1G table
      0x40000000 +2M table
direct root of 4 levels, addresses with 0x800000000000
  0x0 +512G table
    0x40000000 +1G table
      0x40000000 +2M table
        0x4003f000 +4K frame {shared:#x} RWXAD
external table
  0x0 +512G table
    0x40000000 +1G table
      0x40000000 +2M table
frames
  {shared:#x}
mapped: 1 of 4K, 0 of 2M, 0 of 1G
",
        size - 4
    );
    assert_eq!(dump.to_string(), words);
}
