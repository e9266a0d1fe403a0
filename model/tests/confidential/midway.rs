//! Changes of the mirror seen from the middle: a call of the module is stopped, and what there is by then is looked at.
//!
//! What comes of a change is tested elsewhere; here only in which order it happens.

use std::time::Duration;

use kvmprep_model::dump::{ExternalEntry, ExternalTarget, VmDump};
use kvmprep_model::mmu::{Mirroring, Spte};
use kvmprep_model::tdx::{Seamcall, Status};
use kvmprep_model::units::{Gfn, Level};

use crate::bench::{BASE, Bench, Guest, IMAGE, done, private};
use kvmprep_model::vm::Operation;

const SOON: Duration = Duration::from_secs(300);

/// Has `act` stop in the first such call, looks at the guest there, and lets it go on.
fn midway<T: Send, R>(
    bench: &Bench,
    guest: &Guest,
    call: Seamcall,
    act: impl FnOnce() -> T + Send,
    look: impl FnOnce(&VmDump) -> R,
) -> (R, T) {
    let stop = bench.module.failures().stop(call, 1);
    std::thread::scope(|scope| {
        let thread = scope.spawn(act);
        assert!(stop.is_reached_within(SOON), "{call:?} was not made");
        let seen = look(&VmDump::of_stopped(&guest.vm));
        drop(stop);
        (seen, thread.join().unwrap())
    })
}

/// The page's entry in the mirror.
fn mirrored(dump: &VmDump, page: u64) -> Option<Spte> {
    let gfn = Gfn::of_gpa(BASE).plus(page);
    let root = dump.roots(Mirroring::Mirror).next()?;
    let entry = root.entries.iter().find(|entry| (entry.gfn, entry.level) == (gfn, Level::SMALL));
    entry.map(|entry| entry.spte)
}

/// The page's entry in the external table.
fn external(dump: &VmDump, page: u64) -> Option<ExternalEntry> {
    let gfn = Gfn::of_gpa(BASE).plus(page);
    let entries = dump.external.as_ref().unwrap();
    entries.iter().find(|entry| (entry.gfn, entry.level) == (gfn, Level::SMALL)).copied()
}

#[test]
fn a_page_is_put_in_behind_a_frozen_entry() {
    let bench = Bench::new();
    let (guest, second) = bench.tdx_running();
    let ((), answer) = midway(
        &bench,
        &guest,
        Seamcall::MemPageAug,
        || guest.pre_fault(IMAGE, 1),
        |dump| {
            assert_eq!(mirrored(dump, IMAGE), Some(Spte::FROZEN));
            assert_eq!(external(dump, IMAGE), None);
            assert_eq!(dump.page_counts, [IMAGE, 0, 0], "it does not count yet");
            // Who wants another page is not kept from it.
            assert_eq!(private(&second, IMAGE + 1, Operation::Accept), done(&[]));
        },
    );
    assert_eq!(answer, (0, Ok(())));
    let dump = VmDump::of(&guest.vm);
    let pfn = mirrored(&dump, IMAGE).unwrap().pfn();
    assert_eq!(external(&dump, IMAGE).unwrap().target, ExternalTarget::Page { pfn, is_pending: true });
    assert_eq!(dump.page_counts, [IMAGE + 2, 0, 0]);
}

#[test]
fn a_table_is_put_in_behind_a_frozen_entry() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx();
    let ((), answer) = midway(
        &bench,
        &guest,
        Seamcall::MemSeptAdd,
        || guest.load_tdx(0, 1),
        |dump| {
            let root = dump.roots(Mirroring::Mirror).next().unwrap();
            let entries: Vec<_> = root.entries.iter().map(|entry| (entry.level, entry.spte)).collect();
            assert_eq!(entries, [(Level::FOURTH, Spte::FROZEN)], "nothing is below it yet");
            assert_eq!(dump.external.as_deref(), Some(&[][..]));
        },
    );
    assert_eq!(answer, Ok(()));
    guest.check();
}

/// `tdx_sept_remove_leaf_spte` blocks whatever it removes; before the guest can run there is nobody to track (`tdx_track`).
#[test]
fn a_page_of_an_unfinished_image_is_blocked_too_and_not_tracked() {
    let bench = Bench::new();
    let (guest, _second) = bench.tdx();
    guest.load_tdx(0, IMAGE).unwrap();
    bench.module.failures().fail(Seamcall::MemTrack, 1, Status::OPERAND_INVALID);
    let look = |dump: &VmDump| {
        assert_eq!(mirrored(dump, 1), None);
        assert_eq!(external(dump, 1).map(|entry| entry.is_blocked), Some(true));
    };
    midway(&bench, &guest, Seamcall::MemPageRemove, || guest.punch(1, 1), look);
    assert!(bench.module.failures().is_planned(Seamcall::MemTrack) && !guest.vm.is_dead());
    assert_eq!(external(&VmDump::of(&guest.vm), 1), None);
    guest.check();
}

#[test]
fn a_page_goes_from_the_mirror_first_then_is_blocked_tracked_and_removed() {
    // What is there when the call is made: whether the external table has the page, and whether the guest can use it.
    let steps = [
        (Seamcall::MemRangeBlock, Some(false)),
        (Seamcall::MemTrack, Some(true)),
        (Seamcall::MemPageRemove, Some(true)),
        (Seamcall::PhymemPageWbinvd, None),
    ];
    for (call, is_blocked) in steps {
        let bench = Bench::new();
        let (guest, _second) = bench.tdx_running();
        let look = |dump: &VmDump| {
            assert_eq!(mirrored(dump, 1), None, "{call:?}");
            assert_eq!(external(dump, 1).map(|entry| entry.is_blocked), is_blocked, "{call:?}");
            assert!(mirrored(dump, 2).is_some() && external(dump, 2).is_some(), "{call:?}: another page");
        };
        midway(&bench, &guest, call, || guest.punch(1, 1), look);
        assert_eq!(external(&VmDump::of(&guest.vm), 1), None);
        guest.check();
    }
}
