//! Each wrong order of SEAMCALLs is refused, with the module's own status.

use std::sync::Arc;

use super::module::{Accept, Access, Life, Module, Seamcall, Td, TdParams};
use super::sept::SeptPage;
use super::status::{Operand, Status};
use crate::confidential::testing;
use crate::host::HostMemory;
use crate::units::{Gfn, Level, Pfn};

const GFN: Gfn = Gfn(0x200);
const FRAME: Pfn = Pfn(0x5000);
const SOURCE: Pfn = Pfn(0x6000);
const PARAMS: TdParams = TdParams::least(Level::FOURTH);

fn machine() -> (Arc<Module>, Arc<Td>) {
    let host: Arc<dyn HostMemory> = testing::host();
    let module = Module::new(host, 1);
    let td = module.mng_init(PARAMS).unwrap();
    (module, td)
}

/// With the tables that a page at [`GFN`] needs.
fn machine_with_tables() -> (Arc<Module>, Arc<Td>) {
    let (module, td) = machine();
    for (page, level) in [Level::FOURTH, Level::GIGANTIC, Level::HUGE].into_iter().enumerate() {
        td.mem_sept_add(GFN.rounded_down(level), level, SeptPage(page as u64)).unwrap();
    }
    (module, td)
}

fn runnable() -> (Arc<Module>, Arc<Td>) {
    let (module, td) = machine_with_tables();
    td.vp_init().unwrap();
    td.mr_finalize().unwrap();
    (module, td)
}

fn about_gpa(status: Status) -> Status {
    status.of(Operand::Rcx)
}

#[test]
fn a_table_needs_its_parent_a_free_entry_and_a_page_of_its_own() {
    let (_, td) = machine();
    let add = |level: Level, page| td.mem_sept_add(GFN.rounded_down(level), level, SeptPage(page));
    assert_eq!(add(Level::GIGANTIC, 1), Err(about_gpa(Status::EPT_WALK_FAILED)));
    assert_eq!(add(Level::FOURTH, 1), Ok(()));
    assert_eq!(add(Level::FOURTH, 2), Err(about_gpa(Status::EPT_ENTRY_STATE_INCORRECT)));
    assert_eq!(add(Level::GIGANTIC, 1), Err(Status::PAGE_METADATA_INCORRECT.of(Operand::R8)));
    assert_eq!(add(Level::SMALL, 2), Err(about_gpa(Status::OPERAND_INVALID)));
    assert_eq!(add(Level::FIFTH, 2), Err(about_gpa(Status::OPERAND_INVALID)));
    assert_eq!(td.mem_sept_add(GFN, Level::GIGANTIC, SeptPage(2)), Err(about_gpa(Status::OPERAND_INVALID)));
    assert_eq!(add(Level::GIGANTIC, 2), Ok(()));
    assert_eq!(td.children(), 2);
}

#[test]
fn a_page_needs_its_table_a_free_entry_and_a_frame_of_its_own() {
    let (module, td) = machine();
    assert_eq!(td.mem_page_add(GFN, FRAME, SOURCE), Err(about_gpa(Status::EPT_WALK_FAILED)));
    drop(module);
    let (_, td) = machine_with_tables();
    let shared = Gfn(GFN.0 | td.shared_bit().0);
    assert_eq!(td.shared_bit().gpa(), 1 << 47);
    assert_eq!(td.mem_page_add(shared, FRAME, SOURCE), Err(about_gpa(Status::OPERAND_INVALID)));
    assert_eq!(td.mem_page_add(GFN, FRAME, SOURCE), Ok(()));
    assert_eq!(
        td.mem_page_add(GFN, FRAME.plus(1), SOURCE),
        Err(about_gpa(Status::EPT_ENTRY_STATE_INCORRECT))
    );
    let in_use = Err(Status::PAGE_METADATA_INCORRECT.of(Operand::R8));
    assert_eq!(td.mem_page_add(GFN.plus(1), FRAME, SOURCE), in_use);
    assert_eq!(td.mem_page_aug(GFN.plus(1), FRAME), in_use);
    assert_eq!(td.children(), 4);
}

/// One machine's frames are for all of its guests.
#[test]
fn a_frame_is_one_guests_only() {
    let (module, first) = machine_with_tables();
    let second = module.mng_init(PARAMS).unwrap();
    for level in [Level::FOURTH, Level::GIGANTIC, Level::HUGE] {
        second.mem_sept_add(GFN.rounded_down(level), level, SeptPage(level.number().into())).unwrap();
    }
    first.mem_page_add(GFN, FRAME, SOURCE).unwrap();
    assert_eq!(second.mem_page_add(GFN, FRAME, SOURCE), Err(Status::PAGE_METADATA_INCORRECT.of(Operand::R8)));
    assert_eq!(module.owner(FRAME).map(|owner| (owner.guest, owner.gfn)), Some((first.id(), GFN)));
    assert_eq!((module.frames_of(&first), module.frames_of(&second)), (1, 0));
}

#[test]
fn what_is_of_the_image_comes_before_it_is_finalized() {
    let (_, td) = machine_with_tables();
    assert_eq!(td.mr_finalize(), Err(Status::NO_VCPUS));
    assert_eq!(td.vp_enter().err(), Some(Status::OP_STATE_INCORRECT));
    assert_eq!(td.mem_track(), Err(Status::OP_STATE_INCORRECT));
    td.vp_init().unwrap();
    assert_eq!(td.mr_finalize(), Ok(()));
    assert_eq!(td.mr_finalize(), Err(Status::OP_STATE_INCORRECT));
    assert_eq!(td.vp_init(), Err(Status::OP_STATE_INCORRECT));
    assert_eq!(td.mem_page_add(GFN, FRAME, SOURCE), Err(Status::OP_STATE_INCORRECT));
    assert_eq!(td.mr_extend(GFN.gpa()), Err(Status::OP_STATE_INCORRECT));
    assert_eq!(td.mem_page_aug(GFN, FRAME), Ok(()));
}

#[test]
fn only_pages_of_the_image_are_measured() {
    let (_, td) = machine_with_tables();
    let not_present = Err(about_gpa(Status::EPT_ENTRY_NOT_PRESENT));
    assert_eq!(td.mr_extend(GFN.gpa()), not_present);
    td.mem_page_aug(GFN.plus(1), FRAME.plus(1)).unwrap();
    assert_eq!(td.mr_extend(GFN.plus(1).gpa()), not_present);
    td.mem_page_add(GFN, FRAME, SOURCE).unwrap();
    assert_eq!(td.mr_extend(GFN.gpa() + 128), Err(about_gpa(Status::OPERAND_INVALID)));
    let before = td.measurement();
    assert_eq!(td.mr_extend(GFN.gpa() + 256), Ok(()));
    assert_ne!(td.measurement(), before);
}

#[test]
fn before_it_can_run_a_page_is_removed_at_once() {
    let (module, td) = machine_with_tables();
    td.mem_page_add(GFN, FRAME, SOURCE).unwrap();
    assert_eq!(td.mem_page_remove(GFN, Level::SMALL), Ok(FRAME));
    assert_eq!(td.mem_page_remove(GFN, Level::SMALL), Err(about_gpa(Status::EPT_ENTRY_STATE_INCORRECT)));
    assert_eq!(module.owner(FRAME), None);
    assert_eq!(td.mem_page_add(GFN, FRAME, SOURCE), Ok(()));
}

#[test]
fn a_page_is_blocked_then_tracked_then_removed() {
    let (_, td) = runnable();
    td.mem_page_aug(GFN, FRAME).unwrap();
    let remove = || td.mem_page_remove(GFN, Level::SMALL);
    assert_eq!(remove(), Err(about_gpa(Status::GPA_RANGE_NOT_BLOCKED)));
    assert_eq!(
        td.mem_range_block(GFN.plus(1), Level::SMALL),
        Err(about_gpa(Status::EPT_ENTRY_STATE_INCORRECT))
    );
    assert_eq!(td.mem_range_block(GFN, Level::SMALL), Ok(()));
    assert_eq!(td.mem_range_block(GFN, Level::SMALL), Err(about_gpa(Status::GPA_RANGE_ALREADY_BLOCKED)));
    assert_eq!(remove(), Err(about_gpa(Status::TLB_TRACKING_NOT_DONE)));
    assert_eq!(td.mem_track(), Ok(()));
    assert_eq!(remove(), Ok(FRAME));
}

/// What a vCPU translated before the page was blocked it may use until it leaves.
#[test]
fn a_vcpu_that_entered_before_must_leave_first() {
    let (_, td) = runnable();
    td.mem_page_aug(GFN, FRAME).unwrap();
    let before = td.vp_enter().unwrap();
    td.mem_range_block(GFN, Level::SMALL).unwrap();
    td.mem_track().unwrap();
    let after = td.vp_enter().unwrap();
    assert_eq!(td.mem_page_remove(GFN, Level::SMALL), Err(about_gpa(Status::TLB_TRACKING_NOT_DONE)));
    assert_eq!(td.mem_track(), Err(Status::PREVIOUS_TLB_EPOCH_BUSY));
    drop(before);
    assert_eq!(td.mem_page_remove(GFN, Level::SMALL), Ok(FRAME));
    assert_eq!(td.mem_track(), Ok(()));
    assert_eq!(td.mem_track(), Err(Status::PREVIOUS_TLB_EPOCH_BUSY));
    drop(after);
    assert_eq!(td.mem_track(), Ok(()));
}

#[test]
fn a_guest_uses_what_it_has_accepted() {
    let (module, td) = runnable();
    let guest = td.vp_enter().unwrap();
    assert_eq!(guest.access(GFN), Access::Violation);
    assert_eq!(guest.accept(GFN, Level::SMALL), Accept::Violation);
    td.mem_page_aug(GFN, FRAME).unwrap();
    assert_eq!(guest.access(GFN), Access::Pending);
    assert_eq!(
        guest.accept(GFN.rounded_down(Level::HUGE), Level::HUGE),
        Accept::Refused(Status::PAGE_SIZE_MISMATCH)
    );
    assert_eq!(guest.accept(GFN, Level::SMALL), Accept::Done(FRAME));
    assert_eq!(guest.access(GFN), Access::Done(FRAME));
    assert_eq!(guest.access(Gfn(GFN.0 | td.shared_bit().0 << 1)), Access::Violation, "above all addresses");
    assert_eq!(guest.accept(GFN, Level::SMALL), Accept::Refused(Status::PAGE_ALREADY_ACCEPTED));
    td.mem_range_block(GFN, Level::SMALL).unwrap();
    assert_eq!(guest.access(GFN), Access::Violation);
    assert_eq!(guest.accept(GFN, Level::SMALL), Accept::Violation);
    assert!(module.owner(FRAME).is_some(), "a blocked page is not the host's yet");
}

#[test]
fn without_the_attribute_the_guest_is_told_of_pending_pages_itself() {
    let (module, _) = machine();
    let td = module.mng_init(TdParams { is_pending_reported: false, ..PARAMS }).unwrap();
    for level in [Level::FOURTH, Level::GIGANTIC, Level::HUGE] {
        td.mem_sept_add(GFN.rounded_down(level), level, SeptPage(level.number().into())).unwrap();
    }
    td.vp_init().unwrap();
    td.mr_finalize().unwrap();
    td.mem_page_aug(GFN, FRAME).unwrap();
    assert_eq!(td.vp_enter().unwrap().access(GFN), Access::VirtualizationException);
}

#[test]
fn a_table_goes_when_it_is_blocked_and_empty() {
    let (_, td) = runnable();
    let remove = || td.mem_sept_remove(GFN, Level::HUGE);
    td.mem_page_aug(GFN, FRAME).unwrap();
    assert_eq!(remove(), Err(about_gpa(Status::GPA_RANGE_NOT_BLOCKED)));
    td.mem_range_block(GFN, Level::HUGE).unwrap();
    assert_eq!(td.vp_enter().unwrap().access(GFN), Access::Violation);
    td.mem_range_block(GFN, Level::SMALL).unwrap();
    assert_eq!(remove(), Err(about_gpa(Status::TLB_TRACKING_NOT_DONE)));
    td.mem_track().unwrap();
    assert_eq!(remove(), Err(about_gpa(Status::EPT_PAGE_NOT_FREE)));
    td.mem_page_remove(GFN, Level::SMALL).unwrap();
    assert_eq!(remove(), Ok(SeptPage(2)));
    assert_eq!(td.mem_sept_add(GFN, Level::HUGE, SeptPage(2)), Ok(()));
}

#[test]
fn what_is_left_is_reclaimed_once_the_key_is_gone() {
    let (_, td) = runnable();
    td.mem_page_aug(GFN, FRAME).unwrap();
    assert_eq!(td.phymem_page_reclaim(GFN, Level::HUGE), Err(Status::LIFECYCLE_STATE_INCORRECT));
    td.mng_key_freeid().unwrap();
    assert_eq!(td.life(), Life::Teardown);
    assert_eq!(td.mng_key_freeid(), Err(Status::LIFECYCLE_STATE_INCORRECT));
    assert_eq!(td.mem_page_remove(GFN, Level::SMALL), Err(Status::LIFECYCLE_STATE_INCORRECT));
    for level in [Level::HUGE, Level::GIGANTIC, Level::FOURTH] {
        td.phymem_page_reclaim(GFN.rounded_down(level), level).unwrap();
    }
    let again = td.phymem_page_reclaim(GFN, Level::HUGE);
    assert_eq!(again, Err(about_gpa(Status::PAGE_METADATA_INCORRECT)));
    // The page that nobody removed while there was a key keeps the guest from going.
    assert_eq!(td.phymem_page_reclaim_td(), Err(Status::TD_ASSOCIATED_PAGES_EXIST));
}

#[test]
fn a_call_that_was_made_to_fail_was_never_begun() {
    let (module, td) = machine_with_tables();
    module.failures().fail(Seamcall::MemPageAdd, 1, Status::OPERAND_BUSY);
    let before = (td.children(), td.measurement());
    assert_eq!(td.mem_page_add(GFN, FRAME, SOURCE), Err(Status::OPERAND_BUSY));
    assert_eq!((td.children(), td.measurement()), before);
    assert_eq!(td.mem_page_add(GFN, FRAME, SOURCE), Ok(()));
}

#[test]
fn a_guest_is_made_only_of_what_it_can_be() {
    let (module, _) = machine();
    let with = |change: fn(&mut TdParams)| {
        let mut params = PARAMS;
        change(&mut params);
        module.mng_init(params).map(drop)
    };
    let invalid = |operand| Err(Status::OPERAND_INVALID.of(operand));
    assert_eq!(with(|params| params.xfam = 1), invalid(Operand::Xfam), "SSE cannot be left out");
    assert_eq!(with(|params| params.xfam |= 1 << 9), invalid(Operand::Xfam));
    assert_eq!(with(|params| params.cpuid[8][0] = 48 << 16), invalid(Operand::CpuidConfig));
    assert_eq!(with(|params| params.xfam |= 4), Ok(()));
}
