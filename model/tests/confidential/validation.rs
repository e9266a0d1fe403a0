//! What an SNP guest must do before it can use its memory, and when it must do so again: the table of frames, as the guest
//! and KVM's memory side meet in it.
//!
//! What KVM does to the table is read in `sev_gmem_make_private` and `sev_gmem_make_shared`: a frame becomes the guest's when
//! it is first mapped or loaded, and the host's when the guest_memfd gives it back, and at no other time.

use kvmprep_model::confidential::User;
use kvmprep_model::errno::Errno;
use kvmprep_model::memslot::{FileArgument, GUEST_MEMFD, Region};
use kvmprep_model::snp::{self, rmp::RmpUpdate};
use kvmprep_model::units::{PAGE_SIZE, Privacy};
use kvmprep_model::vm::{Exit, Operation, Run};

use crate::bench::{BASE, Bench, Guest, IMAGE, PAGES, done, is_memory_fault, private, run, snp_vm};

/// A guest that runs.
fn running(bench: &Bench) -> Guest {
    let guest = bench.snp();
    guest.load_snp(0, IMAGE).unwrap();
    snp_vm(&guest.vm, snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default()))).unwrap();
    guest
}

fn exception(page: u64) -> Run {
    Run { exit: Exit::GuestException { gpa: BASE + page * PAGE_SIZE }, read: vec![] }
}

/// The guest faults for ever, which a signal ends.
fn never() -> Run {
    Run { exit: Exit::Failed(Errno::EINTR), read: vec![] }
}

const EVERY_USE: [Operation; 3] = [Operation::Read, Operation::Write(7), Operation::Fetch];

#[test]
fn a_page_is_used_once_the_guest_has_validated_it() {
    let bench = Bench::new();
    let guest = running(&bench);
    for (page, operation) in (IMAGE..).zip(EVERY_USE) {
        assert_eq!(private(&guest.vcpu, page, operation), exception(page), "{operation:?}");
        assert_eq!(guest.vcpu.queued(), 0, "the access is over");
        guest.check();
        assert_eq!(private(&guest.vcpu, page, Operation::Accept), done(&[]));
        assert_eq!(private(&guest.vcpu, page, Operation::Write(page)), done(&[]));
        assert_eq!(private(&guest.vcpu, page, Operation::Read), done(&[page]));
    }
    assert_eq!(private(&guest.vcpu, 0, Operation::Read), done(&[1]), "the image is validated from the start");
}

#[test]
fn to_pre_fault_is_not_to_validate_but_saves_the_fault_of_validating() {
    let bench = Bench::new();
    let guest = running(&bench);
    assert_eq!(guest.pre_fault(IMAGE, 2), (0, Ok(())));
    let taken = guest.vcpu.statistics().pf_taken;
    assert_eq!(private(&guest.vcpu, IMAGE, Operation::Read), exception(IMAGE));
    assert_eq!(private(&guest.vcpu, IMAGE, Operation::Accept), done(&[]));
    assert_eq!(private(&guest.vcpu, IMAGE, Operation::Read), done(&[0]));
    assert_eq!(guest.vcpu.statistics().pf_taken, taken, "#VC is not KVM's");
    assert_eq!(private(&guest.vcpu, IMAGE + 2, Operation::Accept), done(&[]));
    assert_eq!(guest.vcpu.statistics().pf_taken, taken + 1, "what is not mapped has to be, to be validated");
}

#[test]
fn what_the_guest_gives_up_it_must_validate_again() {
    let bench = Bench::new();
    let guest = running(&bench);
    assert_eq!(private(&guest.vcpu, 1, Operation::GiveUp), done(&[]));
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), exception(1));
    assert_eq!(private(&guest.vcpu, 1, Operation::Accept), done(&[]));
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), done(&[2]), "the frame is the same");
}

/// A conversion zaps, and no more: whether the frame has left the guest in between is what counts.
#[test]
fn shared_and_back_a_page_is_to_be_validated_again_if_its_frame_was_given_back() {
    let bench = Bench::new();
    let guest = running(&bench);
    for is_punched in [false, true] {
        guest.convert(1, 1, Privacy::Shared).unwrap();
        guest.check();
        assert_eq!(run(&guest.vcpu, 1, Operation::Read, Privacy::Shared), done(&[2]), "the VMM's own");
        if is_punched {
            guest.punch(1, 1);
        }
        let fault = private(&guest.vcpu, 1, Operation::Read);
        assert!(is_memory_fault(&fault, 1), "the guest says itself that it is private again: {fault:?}");
        guest.vcpu.forget_queue();
        guest.convert(1, 1, Privacy::Private).unwrap();
        let expected = if is_punched { exception(1) } else { done(&[2]) };
        assert_eq!(private(&guest.vcpu, 1, Operation::Read), expected);
        guest.check();
    }
    assert_eq!(private(&guest.vcpu, 1, Operation::Accept), done(&[]));
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), done(&[0]), "what it held has gone");
}

#[test]
fn a_hole_takes_validation_with_the_frame() {
    let bench = Bench::new();
    let guest = running(&bench);
    guest.punch(0, 2);
    assert_eq!(private(&guest.vcpu, 0, Operation::Read), exception(0));
    assert_eq!(guest.pre_fault(1, 1), (0, Ok(())));
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), exception(1));
    assert_eq!(private(&guest.vcpu, 2, Operation::Read), done(&[3]), "beside the hole all is as it was");
}

/// The kernel takes a frame that is a guest's for one that need not be given to it, whoever's it is and as what.
#[test]
fn a_frame_that_comes_back_at_another_address_faults_for_ever() {
    let bench = Bench::new();
    let guest = running(&bench);
    let place = |gpa, size| Region {
        slot: 0,
        flags: GUEST_MEMFD,
        gpa,
        size,
        userspace_addr: guest.memory.0,
        guest_memfd: FileArgument::File(guest.file.clone()),
        guest_memfd_offset: 0,
    };
    assert_eq!(private(&guest.vcpu, 0, Operation::Read), done(&[1]));
    guest.set_slot(0).unwrap();
    guest.vm.set_user_memory_region2(&place(BASE + PAGE_SIZE, (PAGES - 1) * PAGE_SIZE)).unwrap();
    let taken = guest.vcpu.statistics().pf_taken;
    for operation in [Operation::Read, Operation::Accept] {
        assert_eq!(private(&guest.vcpu, 1, operation), never(), "{operation:?}");
        guest.vcpu.forget_queue();
    }
    assert!(guest.vcpu.statistics().pf_taken > taken);
    guest.check();
    guest.punch(0, 1);
    assert_eq!(private(&guest.vcpu, 1, Operation::Accept), done(&[]), "given back, it can be given anew");
    guest.check();
}

/// Both kinds of access go through the same tables, so that only the table of frames keeps them apart.
#[test]
fn a_mapped_private_page_is_not_written_as_shared_and_read_only_as_ciphertext() {
    let bench = Bench::new();
    let guest = running(&bench);
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), done(&[2]));
    assert_eq!(run(&guest.vcpu, 1, Operation::Read, Privacy::Shared), done(&[!2]));
    let fault = run(&guest.vcpu, 1, Operation::Write(5), Privacy::Shared);
    assert!(is_memory_fault(&fault, 1), "the guest says itself that it is shared: {fault:?}");
    guest.vcpu.forget_queue();
    assert_eq!(private(&guest.vcpu, 1, Operation::Read), done(&[2]));
}

/// A file that the process may map serves shared accesses too, with frames that are the guest's.
#[test]
fn a_frame_of_the_guests_is_read_as_shared_memory_and_not_written() {
    let bench = Bench::new();
    let guest = running(&bench);
    guest.set_slot(0).unwrap();
    let file = guest.vm.create_guest_memfd(PAGES * PAGE_SIZE, 1).unwrap();
    let region = Region {
        slot: 0,
        flags: GUEST_MEMFD,
        gpa: BASE,
        size: PAGES * PAGE_SIZE,
        userspace_addr: guest.memory.0,
        guest_memfd: FileArgument::File(file),
        guest_memfd_offset: 0,
    };
    guest.vm.set_user_memory_region2(&region).unwrap();
    guest.convert(0, 2, Privacy::Shared).unwrap();
    assert_eq!(run(&guest.vcpu, 0, Operation::Read, Privacy::Shared), done(&[!0]));
    assert_eq!(run(&guest.vcpu, 0, Operation::Write(1), Privacy::Shared), never());
    guest.check();
}

/// The kernel goes on, and so the frame stays whose it was.
#[test]
fn a_frame_that_cannot_be_taken_back_is_the_guests_for_good() {
    let bench = Bench::new();
    let guest = running(&bench);
    bench.rmp.failures().fail(RmpUpdate, 1, ());
    guest.punch(0, 1);
    assert!(bench.rmp.failures().are_spent());
    assert_eq!(
        private(&guest.vcpu, 0, Operation::Read),
        done(&[0]),
        "validated, if the same frame comes back"
    );
}
