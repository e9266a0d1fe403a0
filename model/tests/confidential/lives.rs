//! The ways of a VMM: load, finalize, pre-fault, run, convert, delete, tear down; with TDX's mirror held against the secure EPT
//! after each step, and everything given back at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvmprep_model::confidential::User;
use kvmprep_model::errno::Errno;
use kvmprep_model::personality::VmType;
use kvmprep_model::snp::{self};
use kvmprep_model::tdx::{self, Seamcall, Status};
use kvmprep_model::units::{PAGE_SIZE, Privacy};
use kvmprep_model::vm::{Exit, Operation, PreFault, Vcpu, Vm};

use crate::bench::{BASE, Bench, Guest, IMAGE, PAGES, done, is_memory_fault, private, run, snp_vm, tdx_vm};

#[test]
fn a_tdx_guest_from_its_image_to_its_end() {
    let bench = Bench::new();
    let (guest, second) = bench.tdx();
    guest.load_tdx(0, IMAGE).unwrap();
    guest.check();
    assert_eq!(guest.pages(), IMAGE);
    assert_eq!(guest.pre_fault(IMAGE, 2), (2, Err(Errno::EOPNOTSUPP)));
    let too_early = private(&guest.vcpu, 1, Operation::Read);
    assert_eq!(too_early.exit, Exit::Failed(Errno::EINVAL));
    guest.vcpu.forget_queue();
    tdx_vm(&guest.vm, tdx::Call::FinalizeVm).unwrap();
    assert_eq!(guest.load_tdx(IMAGE, 1), Err(Errno::EINVAL));

    // The image is there, for every vCPU, and costs no fault.
    let taken = guest.vcpu.statistics().pf_taken;
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), done(&[2]));
    assert_eq!(private(&second, 3, Operation::Read), done(&[4]));
    assert_eq!(guest.vcpu.statistics().pf_taken, taken);

    // What is pre-faulted is accepted, and costs none either. What is not costs one.
    assert_eq!(guest.pre_fault(IMAGE, 4), (0, Ok(())));
    assert_eq!(guest.pre_fault(0, 8), (0, Ok(())), "what is there already is passed over");
    guest.check();
    assert_eq!(guest.pages(), IMAGE + 4);
    for page in [IMAGE, IMAGE + 1] {
        assert_eq!(private(&guest.vcpu, page, Operation::Accept), done(&[]));
    }
    assert_eq!(private(&guest.vcpu, IMAGE, Operation::Read), done(&[0]));
    assert_eq!(private(&guest.vcpu, IMAGE, Operation::Write(99)), done(&[]));
    assert_eq!(private(&second, IMAGE, Operation::Read), done(&[99]));
    assert_eq!(guest.vcpu.statistics().pf_taken, taken);
    assert_eq!(private(&guest.vcpu, 20, Operation::Accept), done(&[]));
    assert_eq!(guest.vcpu.statistics().pf_taken, taken + 1);

    // A conversion: the guest's other kind of access waits for the VMM.
    let fault = run(&guest.vcpu, IMAGE, Operation::Read, Privacy::Shared);
    assert!(is_memory_fault(&fault, IMAGE), "{fault:?}");
    guest.convert(IMAGE, 1, Privacy::Shared).unwrap();
    guest.check();
    assert_eq!(guest.vcpu.run(), done(&[IMAGE + 1]), "the VMM's own memory");
    assert!(is_memory_fault(&private(&second, IMAGE, Operation::Read), IMAGE));
    guest.convert(IMAGE, 1, Privacy::Private).unwrap();
    second.forget_queue();
    assert_eq!(private(&second, IMAGE, Operation::Accept), done(&[]));
    assert_eq!(private(&second, IMAGE, Operation::Read), done(&[0]), "what it held has gone");
    guest.check();

    // A hole, a slot that goes, a file that is closed.
    guest.punch(0, 2);
    guest.check();
    assert_eq!(private(&second, 0, Operation::Accept), done(&[]));
    let before = guest.pages();
    guest.set_slot(0).unwrap();
    assert_eq!((before, guest.pages()), (8, 0));
    assert_eq!(bench.module.frames_of(guest.vm.tdx().unwrap().td().unwrap()), 0);
    guest.check();
    guest.set_slot(PAGES * PAGE_SIZE).unwrap();
    assert_eq!(guest.pre_fault(0, 3), (0, Ok(())));
    guest.check();

    let td = Arc::clone(guest.vm.tdx().unwrap().td().unwrap());
    assert!(!bench.module.take_key(), "the only key is the guest's");
    // Whoever still has the file has no page of it mapped.
    let _file = Arc::clone(&guest.file);
    drop((guest, second));
    assert_eq!((bench.module.frames_of(&td), td.children()), (0, 0));
    assert!(bench.module.take_key());
}

#[test]
fn a_tdx_guest_that_does_not_accept_ends() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx_running();
    assert_eq!(guest.pre_fault(IMAGE, 1), (0, Ok(())));
    let before = guest.vcpu.statistics();
    assert_eq!(private(&guest.vcpu, IMAGE, Operation::Read).exit, Exit::Failed(Errno::EIO));
    assert_eq!(guest.vcpu.statistics(), before, "no fault is handled any more");
    assert!(guest.vm.is_dead());
    assert_eq!(guest.pre_fault(IMAGE + 1, 1), (1, Err(Errno::EIO)));
    assert_eq!(guest.convert(0, 1, Privacy::Shared), Err(Errno::EIO));
    assert_eq!(guest.set_slot(0), Err(Errno::EIO));
    assert_eq!(tdx_vm(&guest.vm, tdx::Call::FinalizeVm), Err(Errno::EIO));
    assert_eq!(guest.load_tdx(0, 1), Err(Errno::EIO));
}

/// `kvm_mmu_load` tells the module where the shared tables are, and of such a vCPU it knows nothing: `tdh_vp_wr_failed`.
#[test]
fn a_pre_fault_by_a_vcpu_without_init_vcpu_ends_the_guest() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx();
    let third = guest.vm.create_vcpu(2).unwrap();
    let pre_fault = || third.pre_fault(&mut PreFault { gpa: BASE, size: PAGE_SIZE, flags: 0 });
    assert_eq!(pre_fault(), Err(Errno::EOPNOTSUPP), "too early to do harm");
    tdx_vm(&guest.vm, tdx::Call::FinalizeVm).unwrap();
    assert_eq!(third.run().exit, Exit::Failed(Errno::EINVAL));
    assert!(!guest.vm.is_dead());
    assert_eq!(pre_fault(), Err(Errno::EIO));
    assert!(guest.vm.is_dead());
    assert_eq!(guest.pages(), 0);
}

/// `tdx_vcpu_run` and `tdx_exit_handlers_fastpath`: a vCPU that is kept out has taken no fault.
#[test]
fn a_vcpu_that_is_kept_out_of_the_guest_comes_again_and_no_fault_is_counted() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx_running();
    private(&guest.vcpu, 0, Operation::Read);
    let before = guest.vcpu.statistics();
    bench.module.failures().fail_times(Seamcall::VpEnter, 1, 3, Status::OPERAND_BUSY);
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), done(&[2]));
    assert_eq!(guest.vcpu.statistics(), before);
    // Another refusal is told, and is none of KVM's own bugs (`__tdx_handle_exit`).
    bench.module.failures().fail(Seamcall::VpEnter, 1, Status::NON_RECOVERABLE_TD);
    let refused = private(&guest.vcpu, 1, Operation::Read);
    assert!(matches!(refused.exit, Exit::NotEntered { exit_reason: 17 }), "{refused:?}");
    assert_eq!(guest.vcpu.statistics(), before);
    assert_eq!(guest.vcpu.run(), done(&[2]));
    assert!(!guest.vm.is_dead());
}

/// An entry that says that there is no memory is one that the processor tells the guest of itself, whatever generation of
/// slots it is of (`tdx_vm_init`; for SNP `sev_hardware_setup`): KVM does not hear of the access any more, so that a slot
/// that comes later has to be pre-faulted.
#[test]
fn what_was_no_memory_to_a_confidential_guest_stays_so_until_it_is_pre_faulted() {
    let bench = Bench::new();
    let snp = || {
        let guest = bench.snp();
        snp_vm(&guest.vm, snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default()))).unwrap();
        guest
    };
    for guest in [bench.tdx_running().0, snp()] {
        guest.convert(10, 2, Privacy::Shared).unwrap();
        guest.set_slot(0).unwrap();
        let read = |page| run(&guest.vcpu, page, Operation::Read, Privacy::Shared);
        let is_exception = |run: &kvmprep_model::vm::Run| matches!(run.exit, Exit::GuestException { .. });
        let before = guest.vcpu.statistics();
        assert!(is_exception(&read(10)));
        assert!(is_exception(&read(10)));
        let after = guest.vcpu.statistics();
        assert_eq!((after.pf_taken, after.pf_emulate), (before.pf_taken + 1, before.pf_emulate + 1));
        assert_eq!(guest.pre_fault(11, 1), (1, Err(Errno::ENOENT)));
        guest.set_slot(PAGES * PAGE_SIZE).unwrap();
        assert!(is_exception(&read(10)) && is_exception(&read(11)), "there is memory by now");
        assert_eq!(guest.vcpu.statistics().pf_taken, after.pf_taken);
        assert_eq!(guest.pre_fault(10, 2), (0, Ok(())));
        assert_eq!((read(10), read(11)), (done(&[11]), done(&[12])));
        guest.check();
    }
}

/// `tdx_handle_ept_violation` takes it for a broken processor: the guest itself gets an exception.
#[test]
fn a_tdx_guest_does_not_execute_shared_memory() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx_running();
    guest.convert(10, 1, Privacy::Shared).unwrap();
    let before = guest.vcpu.statistics();
    let fetched = run(&guest.vcpu, 10, Operation::Fetch, Privacy::Shared);
    assert!(matches!(fetched.exit, Exit::GuestException { .. }), "{fetched:?}");
    assert_eq!(guest.vcpu.statistics(), before);
    assert!(!guest.vm.is_dead());
}

#[test]
fn a_pre_fault_names_no_shared_bit() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx_running();
    let mut range = PreFault { gpa: BASE | 1 << 47, size: PAGE_SIZE, flags: 0 };
    assert_eq!(guest.vcpu.pre_fault(&mut range), Err(Errno::EINVAL));
    guest.convert(10, 2, Privacy::Shared).unwrap();
    assert_eq!(guest.pre_fault(9, 4), (0, Ok(())), "which pages are shared KVM knows itself");
    guest.check();
    assert_eq!(run(&guest.vcpu, 10, Operation::Read, Privacy::Shared), done(&[11]));
    assert_eq!(private(&guest.vcpu, 12, Operation::Accept), done(&[]));
}

#[test]
fn the_image_comes_only_from_private_pages_of_a_guest_memfd() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx();
    guest.convert(1, 1, Privacy::Shared).unwrap();
    assert_eq!(guest.load_tdx(0, 2), Err(Errno::EINVAL));
    assert_eq!(guest.pages(), 1);
    assert_eq!(guest.load_tdx(0, 1), Err(Errno::EIO), "once only");
    assert!(!guest.vm.is_dead());
    guest.vcpu.send_signal();
    assert_eq!(guest.load_tdx(2, 1), Err(Errno::EINTR));
    guest.vcpu.take_signal();
    guest.file.close();
    assert_eq!(guest.load_tdx(2, 1), Err(Errno::EFAULT));
    assert_eq!(guest.pages(), 0, "closing the file took the image");
    guest.check();
}

/// A guest with every step that calls the module; true if nothing on the way was refused.
fn live(bench: &Bench) -> (Guest, Arc<Vcpu>, bool) {
    let (guest, second) = bench.tdx();
    let mut is_well = guest.load_tdx(0, IMAGE).is_ok();
    is_well &= tdx_vm(&guest.vm, tdx::Call::FinalizeVm).is_ok();
    is_well &= guest.pre_fault(IMAGE, 8) == (0, Ok(()));
    for page in [IMAGE, IMAGE + 1, IMAGE + 9] {
        is_well &= private(&second, page, Operation::Accept) == done(&[]);
        second.forget_queue();
    }
    is_well &= guest.convert(1, 5, Privacy::Shared).is_ok();
    is_well &= guest.convert(1, 5, Privacy::Private).is_ok();
    if !guest.vm.is_dead() {
        guest.punch(0, 2);
    }
    is_well &= guest.set_slot(0).is_ok();
    (guest, second, is_well)
}

/// Of each call, the first, the second, and so on, until there is none so late.
#[test]
fn whatever_is_busy_once_is_done_all_the_same() {
    let calls = [
        Seamcall::MemSeptAdd,
        Seamcall::MemPageAdd,
        Seamcall::MemPageAug,
        Seamcall::MemRangeBlock,
        Seamcall::MemTrack,
        Seamcall::MemPageRemove,
        Seamcall::VpEnter,
    ];
    for call in calls {
        let mut nth = 1;
        loop {
            let bench = Bench::new();
            bench.module.failures().fail(call, nth, Status::OPERAND_BUSY);
            let (guest, _second, is_well) = live(&bench);
            assert!(is_well && !guest.vm.is_dead(), "{call:?} {nth}");
            guest.check();
            if !bench.module.failures().are_spent() {
                break;
            }
            nth += 1;
        }
        assert!(nth > 1, "{call:?} was never made");
    }
}

#[test]
fn whatever_is_refused_once_ends_the_guest_and_nothing_else() {
    let calls = [
        Seamcall::MemSeptAdd,
        Seamcall::MemPageAdd,
        Seamcall::MrExtend,
        Seamcall::MrFinalize,
        Seamcall::MemPageAug,
        Seamcall::MemRangeBlock,
        Seamcall::MemTrack,
        Seamcall::MemPageRemove,
        Seamcall::PhymemPageWbinvd,
    ];
    for call in calls {
        let mut nth = 1;
        loop {
            let bench = Bench::new();
            bench.module.failures().fail(call, nth, Status::OPERAND_INVALID);
            let (guest, second, is_well) = live(&bench);
            if !bench.module.failures().are_spent() {
                assert!(is_well && !guest.vm.is_dead(), "{call:?} {nth}");
                break;
            }
            assert!(guest.vm.is_dead(), "{call:?} {nth}");
            assert_eq!(guest.pre_fault(0, 1), (1, Err(Errno::EIO)));
            drop((guest, second));
            // The machine goes on: it has its key back, and what it lost it knows.
            let (guest, _second, is_well) = live(&bench);
            assert!(is_well && !guest.vm.is_dead(), "after {call:?} {nth}");
            // So many pages are loaded that not each chunk of each of them need be tried.
            nth += if call == Seamcall::MrExtend { 11 } else { 1 };
        }
        assert!(nth > 1, "{call:?} was never made");
    }
}

/// One vCPU pre-faults, the other runs, and the VMM converts, punches holes and deletes the slot under both.
#[test]
fn threads_beside_each_other_leave_the_mirror_and_the_secure_ept_equal() {
    let bench = Bench::new();
    let (guest, second) = bench.tdx_running();
    let rounds: u64 = std::env::var("KVMPREP_MODEL_STEPS").map_or(300, |steps| steps.parse().unwrap());
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // A range that is changed meanwhile may stop it, with a word about it.
                let answer = guest.pre_fault(0, PAGES).1;
                assert!(
                    matches!(answer, Ok(()) | Err(Errno::EFAULT | Errno::EAGAIN | Errno::ENOENT)),
                    "{answer:?}"
                );
            }
        });
        scope.spawn(|| {
            for page in (0..PAGES).cycle() {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                let run = private(&second, page, Operation::Accept);
                assert!(matches!(run.exit, Exit::Done | Exit::MemoryFault(..)), "{run:?}");
                second.forget_queue();
            }
        });
        for round in 0..rounds {
            let (first, pages) = (round * 7 % PAGES, 1 + round % 5);
            let pages = pages.min(PAGES - first);
            guest.convert(first, pages, Privacy::Shared).unwrap();
            guest.punch(first, pages);
            guest.convert(first, pages, Privacy::Private).unwrap();
            if round % 10 == 0 {
                guest.set_slot(0).unwrap();
                guest.set_slot(PAGES * PAGE_SIZE).unwrap();
            }
            if round % 25 == 0 {
                guest.check_tables();
            }
        }
        is_over.store(true, Ordering::Relaxed);
    });
    guest.check();
    assert!(!guest.vm.is_dead());
    assert_eq!(bench.module.frames_of(guest.vm.tdx().unwrap().td().unwrap()), guest.pages_private());
    let td = Arc::clone(guest.vm.tdx().unwrap().td().unwrap());
    drop((guest, second));
    assert_eq!((bench.module.frames_of(&td), td.children()), (0, 0));
}

#[test]
fn an_snp_guest_from_its_image_to_its_end() {
    let bench = Bench::new();
    let guest = bench.snp();
    let asid = guest.vm.snp().unwrap().asid().unwrap();
    guest.load_snp(0, IMAGE).unwrap();
    assert_eq!(guest.load_snp(1, 1), Err(Errno::EIO));
    assert_eq!(bench.rmp.frames_of(asid), IMAGE);
    assert_eq!(guest.pages(), 0, "an image is not mapped yet");
    assert_eq!(guest.pre_fault(0, 1), (1, Err(Errno::EOPNOTSUPP)));
    let finish = || snp_vm(&guest.vm, snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default())));
    finish().unwrap();
    assert_eq!(finish(), Err(Errno::EINVAL));

    assert_eq!(guest.pre_fault(0, IMAGE + 2), (0, Ok(())));
    guest.check();
    assert_eq!((guest.pages(), bench.rmp.frames_of(asid)), (IMAGE + 2, IMAGE + 2));
    let taken = guest.vcpu.statistics().pf_taken;
    assert_eq!(private(&guest.vcpu, 2, Operation::Read), done(&[3]));
    assert_eq!(guest.vcpu.statistics().pf_taken, taken);

    // A frame stays the guest's when its page becomes shared, until the hole is punched.
    guest.convert(0, 2, Privacy::Shared).unwrap();
    guest.check();
    assert_eq!(bench.rmp.frames_of(asid), IMAGE + 2);
    guest.punch(0, 2);
    assert_eq!(bench.rmp.frames_of(asid), IMAGE);
    assert_eq!(run(&guest.vcpu, 1, Operation::Read, Privacy::Shared), done(&[2]));
    let vm = Arc::downgrade(&guest.vm);
    drop(guest);
    assert!(vm.upgrade().is_none());
    assert_eq!(bench.rmp.frames_of(asid), 0);
}

/// A vCPU's state has to be a page of the guest's before it is let in (VMRUN; `snp_launch_update_vmsa`).
#[test]
fn an_snp_guest_does_not_run_before_its_vcpus_are_measured() {
    let bench = Bench::new();
    let nothing = Vm::new(&bench.machine, VmType::Snp).unwrap();
    assert_eq!(
        nothing.create_vcpu(0).unwrap().run().exit,
        Exit::Failed(Errno::EINVAL),
        "before KVM_SEV_INIT2"
    );

    let guest = bench.snp();
    let not_entered = |vcpu: &Vcpu| {
        let run = private(vcpu, 0, Operation::Read);
        vcpu.forget_queue();
        assert!(matches!(run.exit, Exit::NotEntered { exit_reason: 9 }), "{run:?}");
    };
    guest.load_snp(0, IMAGE).unwrap();
    not_entered(&guest.vcpu);
    assert_eq!((guest.pages(), guest.vcpu.statistics().pf_taken), (0, 0));
    let finish = || snp_vm(&guest.vm, snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default())));
    finish().unwrap();
    assert_eq!(private(&guest.vcpu, 0, Operation::Read), done(&[1]));
    // One that is made later is the guest's to begin.
    let late = guest.vm.create_vcpu(1).unwrap();
    not_entered(&late);
    assert_eq!(finish(), Err(Errno::EINVAL), "what is the guest's cannot be measured again");
    assert_eq!(private(&guest.vcpu, 0, Operation::Read), done(&[1]));
    not_entered(&late);
}

#[test]
fn a_frame_that_cannot_be_given_to_the_guest_stops_a_pre_fault() {
    let bench = Bench::new();
    let guest = bench.snp();
    snp_vm(&guest.vm, snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default()))).unwrap();
    bench.rmp.failures().fail_times(snp::rmp::RmpUpdate, 3, 2, ());
    assert_eq!(guest.pre_fault(0, 4), (2, Ok(())), "what was done is not taken back, and no error is told");
    assert_eq!(guest.pre_fault(2, 2), (2, Err(Errno::EINVAL)));
    let fault = guest.vcpu.memory_fault_of_pre_fault();
    assert_eq!(fault.map(|fault| fault.gpa), Some(BASE + 2 * PAGE_SIZE));
    assert_eq!(guest.pre_fault(2, 2), (0, Ok(())));
    guest.check();
}

/// The host's frames are for all guests: what one has no other gets.
#[test]
fn guests_of_both_kinds_share_a_machine() {
    let bench = Bench::new();
    let (td, _second) = bench.tdx_running();
    let snp = bench.snp();
    snp.load_snp(0, IMAGE).unwrap();
    let free = bench.host.frames_in_use();
    assert_eq!(td.pre_fault(0, PAGES), (0, Ok(())));
    td.check();
    assert!(bench.host.frames_in_use() > free);
    let asid = snp.vm.snp().unwrap().asid().unwrap();
    assert_eq!(bench.rmp.frames_of(asid), IMAGE);
    for page in 0..PAGES {
        let pfn = td.file.pfn(page).unwrap();
        assert!(bench.rmp.is_hosts(pfn) && bench.module.owner(pfn).is_some());
    }
    assert_eq!(bench.machine.host.load(td.file.pfn(0).unwrap()), 1);
}
