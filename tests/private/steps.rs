//! The steps of a conversion: in which order, for which pieces, and what is put back or told again where one fails.

use super::*;

#[test]
fn piece_by_piece_kvm_is_told_then_the_caller_and_then_memory_is_given_up() {
    let guest = Guest::new();
    let range = LARGE.pages(100..100 + (130 << 20) / PAGE);
    let (first, second) = (LARGE.range().start + PIECE, LARGE.range().start + 2 * PIECE);
    let pieces = [
        Range { start: range.start, end: first },
        Range { start: first, end: second },
        Range { start: second, end: range.end },
    ];
    let done = guest.convert(range, Private).unwrap().done;
    let expected = pieces
        .map(|piece| [(SetAttributes, VM, piece), told(Private, piece), (Discard, -1, LARGE.hva(piece))]);
    assert_eq!(guest.did(), expected.as_flattened());
    assert_eq!((done.converted, done.dropped, done.kept, done.calls), (range.size(), range.size(), 0, 3));
    assert_eq!(private_runs(&guest), [range]);

    let done = guest.convert(range, Shared).unwrap().done;
    let expected = pieces.map(|piece| {
        [(SetAttributes, VM, piece), told(Shared, piece), (Punch, LARGE.guest_memfd(), LARGE.private(piece))]
    });
    assert_eq!(guest.did(), expected.as_flattened());
    assert_eq!((done.converted, done.dropped, done.kept, done.calls), (range.size(), range.size(), 0, 3));
    assert_eq!(private_runs(&guest), []);
}

#[test]
fn only_what_differs_costs_a_call_and_neighbours_are_one_run() {
    let guest = Guest::new();
    for pages in [3..5, 5..8, 10..11] {
        guest.convert(LARGE.pages(pages), Private).unwrap();
    }
    guest.did();
    let missing = [LARGE.pages(0..3), LARGE.pages(8..10), LARGE.pages(11..20)];
    guest.convert(LARGE.pages(0..20), Private).unwrap();
    let expected =
        missing.map(|run| [(SetAttributes, VM, run), told(Private, run), (Discard, -1, LARGE.hva(run))]);
    assert_eq!(guest.did(), expected.as_flattened());

    guest.convert(LARGE.pages(0..20), Private).unwrap();
    assert_eq!(guest.did(), [], "what is so already costs nothing");

    let done = guest.convert(LARGE.pages(0..30), Shared).unwrap().done;
    let run = LARGE.pages(0..20);
    let expected =
        [(SetAttributes, VM, run), told(Shared, run), (Punch, LARGE.guest_memfd(), LARGE.private(run))];
    assert_eq!(guest.did(), expected);
    assert_eq!(done.converted, run.size());
}

#[test]
fn slots_side_by_side_are_one_run_and_each_gives_up_its_own_way() {
    let guest = Guest::new();
    let range = Range { start: ANONYMOUS.range().end - HUGE, end: UNTOLD.range().start + HUGE };
    let last = |slot: &Backed| Range { start: slot.range().end - HUGE, ..slot.range() };
    let first = |slot: &Backed| Range { end: slot.range().start + HUGE, ..slot.range() };
    guest.convert(range, Private).unwrap();
    let expected = [
        (SetAttributes, VM, range),
        told(Private, range),
        (Discard, -1, ANONYMOUS.hva(last(&ANONYMOUS))),
        (Remove, -1, TOLD.hva(TOLD.range())),
        (Remove, -1, UNTOLD.hva(first(&UNTOLD))),
    ];
    assert_eq!(guest.did(), expected);

    guest.convert(range, Shared).unwrap();
    let punched = |slot: &Backed, part| (Punch, slot.guest_memfd(), slot.private(part));
    let expected = [
        (SetAttributes, VM, range),
        told(Shared, range),
        punched(&ANONYMOUS, last(&ANONYMOUS)),
        punched(&TOLD, TOLD.range()),
        punched(&UNTOLD, first(&UNTOLD)),
    ];
    assert_eq!(guest.did(), expected);
}

/// Firmware does so with all that is no memory.
#[test]
fn holes_become_shared_and_never_private() {
    let guest = Guest::new();
    let range = span(UNTOLD.range(), POOL.range());
    let hole = Range { start: UNTOLD.range().end, end: POOL.range().start };
    let error = refused(guest.convert(range, Private));
    assert_eq!((error.errno, error.reason, error.range), (libc::EINVAL, Reason::NoMemslot, Some(hole)));
    let beyond = Range { start: LARGE.range().end - PAGE, end: LARGE.range().end + PAGE };
    assert_eq!(refused(guest.convert(beyond, Private)).range.unwrap().size(), PAGE);
    assert_eq!(guest.did(), [], "nothing was done before");

    guest.convert(range, Shared).unwrap();
    assert_eq!(guest.did(), [], "it was shared already");
    guest.convert(UNTOLD.range(), Private).unwrap();
    guest.convert(POOL.range(), Private).unwrap();
    guest.did();
    guest.convert(range, Shared).unwrap();
    let parts = [UNTOLD, POOL].map(|slot| {
        let all = slot.range();
        [(SetAttributes, VM, all), told(Shared, all), (Punch, slot.guest_memfd(), slot.private(all))]
    });
    assert_eq!(guest.did(), parts.as_flattened());
}

#[test]
fn memory_without_a_guest_memfd_stays_shared() {
    let guest = Guest::new();
    let range = span(MAPPED.range(), PLAIN.range());
    let error = refused(guest.convert(range, Private));
    assert_eq!((error.errno, error.reason, error.slot), (libc::EINVAL, Reason::NoGmem, Some(PLAIN.id)));
    assert_eq!(error.range, Some(PLAIN.range()));
    assert_eq!(guest.did(), []);
    guest.convert(range, Shared).unwrap();
}

#[test]
fn steps_can_be_chosen() {
    let guest = Guest::new();
    let listener = guest.listener();
    let with =
        |attributes, drop| ConvertOptions { steps: Steps { attributes, drop }, ..plain_options(&listener) };
    let run = TOLD.pages(0..9);
    guest.convert_with(run, Private, &with(true, false)).unwrap();
    assert_eq!(guest.did(), [(SetAttributes, VM, run), told(Private, run)]);
    // The VMM has done that itself.
    guest.kernel.set_attributes(VM, run, 0).unwrap();
    guest.did();
    let done = guest.convert_with(run, Shared, &with(false, true)).unwrap().done;
    assert_eq!(guest.did(), [told(Shared, run), (Punch, TOLD.guest_memfd(), TOLD.private(run))]);
    assert_eq!((done.converted, done.calls), (run.size(), 0));
    assert_eq!(private_runs(&guest), []);
}

#[test]
fn more_than_is_allowed_at_a_time_is_refused_whole() {
    let guest = Guest::new();
    let listener = guest.listener();
    let limited = ConvertOptions { max_size: Some(8 * PAGE), ..plain_options(&listener) };
    let error = refused(guest.convert_with(LARGE.pages(0..9), Private, &limited));
    assert_eq!((error.errno, error.reason), (libc::EINVAL, Reason::ConvertTooLarge));
    assert_eq!(guest.did(), []);
    guest.convert_with(LARGE.pages(0..8), Private, &limited).unwrap();
}

#[test]
fn what_the_caller_cannot_bear_is_put_back() {
    let guest = Guest::new();
    let range = LARGE.range();
    guest.kernel.fail(Changed, 1, libc::EADDRINUSE);
    let mut report = ConvertReport::default();
    let listener = guest.listener();
    let error = guest.vm.convert(range, Private, &plain_options(&listener), &mut report).unwrap_err();
    let (first, second) = (
        Range { start: range.start, end: range.start + PIECE },
        Range { start: range.start + PIECE, end: range.start + 2 * PIECE },
    );
    assert_eq!((error.errno, error.reason), (libc::EADDRINUSE, Reason::CallbackFailed));
    assert_eq!(error.range, Some(Range { start: second.start, end: range.end }), "from there on");
    let expected = [
        (SetAttributes, VM, first),
        told(Private, first),
        (Discard, -1, LARGE.hva(first)),
        (SetAttributes, VM, second),
        told(Private, second),
        (SetAttributes, VM, second),
    ];
    assert_eq!(guest.did(), expected);
    assert_eq!(private_runs(&guest), [first]);
    assert_eq!((report.done.converted, report.done.calls), (PIECE, 3));
}

/// It stays, and the caller hears of it again.
#[test]
fn what_cannot_be_put_back_is_told_again() {
    let guest = Guest::new();
    let run = LARGE.pages(0..9);
    let has_failed = AtomicBool::new(false);
    let failing = |range, to| {
        guest.listener()(range, to);
        if has_failed.swap(true, SeqCst) {
            return 0;
        }
        guest.kernel.fail(SetAttributes, 0, libc::ENOMEM);
        -libc::EBUSY
    };
    let error = refused(guest.convert_with(run, Private, &plain_options(&failing)));
    assert_eq!((error.errno, error.reason), (libc::EBUSY, Reason::CallbackFailed));
    assert_eq!(private_runs(&guest), [run]);
    guest.did();
    guest.convert_with(run, Private, &plain_options(&failing)).unwrap();
    assert_eq!(guest.did(), [told(Private, run), (Discard, -1, LARGE.hva(run))]);
    guest.convert(run, Private).unwrap();
    assert_eq!(guest.did(), []);
}

/// Attributes that the caller has set are the caller's to set back.
#[test]
fn what_is_not_ours_to_put_back_is_told_again() {
    let guest = Guest::new();
    let listener = guest.listener();
    let noted = ConvertOptions { steps: Steps { attributes: false, drop: true }, ..plain_options(&listener) };
    let run = LARGE.pages(0..9);
    guest.kernel.set_attributes(VM, run, 8).unwrap();
    guest.did();
    guest.kernel.fail(Changed, 0, libc::EBUSY);
    refused(guest.convert_with(run, Private, &noted));
    assert_eq!(guest.did(), [told(Private, run)]);
    assert_eq!(private_runs(&guest), [run]);
    guest.convert_with(run, Private, &noted).unwrap();
    assert_eq!(guest.did(), [told(Private, run), (Discard, -1, LARGE.hva(run))]);
}

#[test]
fn what_was_left_is_not_forgotten_when_a_change_is_put_back() {
    let guest = Guest::new();
    let run = LARGE.pages(0..9);
    guest.convert(run, Private).unwrap();
    guest.kernel.fail(Punch, 0, libc::EIO);
    assert_eq!(refused(guest.convert(run, Shared)).stage, Stage::Drop);
    guest.kernel.fail(Changed, 0, libc::EBUSY);
    refused(guest.convert(LARGE.pages(3..5), Private));
    guest.did();
    guest.convert(run, Shared).unwrap();
    let punched: u64 = guest.did().iter().filter(|did| did.0 == Punch).map(|did| did.2.size()).sum();
    assert_eq!(punched, run.size());
}

#[test]
fn a_guest_memfd_that_was_closed_is_found_before_anything_is_done() {
    let other = FileId { device: 9, inode: 9 };
    for now in [None, Some(other)] {
        let guest = Guest::new();
        guest.kernel.reopened.lock().unwrap().insert(TOLD.guest_memfd(), now);
        let error = refused(guest.convert(span(ANONYMOUS.range(), UNTOLD.range()), Private));
        assert_eq!((error.errno, error.reason, error.slot), (libc::EBADF, Reason::BadFd, Some(TOLD.id)));
        assert_eq!(guest.did(), []);
    }
}

#[test]
fn a_fault_on_memory_that_is_so_already_tells_kvm_once_more() {
    let guest = Guest::new();
    let run = LARGE.pages(0..1);
    let listener = guest.listener();
    let fault = || {
        let mut report = ConvertReport::default();
        guest.vm.handle_memory_fault(run, Private, &plain_options(&listener), &mut report).unwrap();
        report.done
    };
    assert_eq!(fault().converted, PAGE);
    // Somebody has told KVM otherwise.
    guest.kernel.set_attributes(VM, run, 0).unwrap();
    guest.did();
    let done = fault();
    assert_eq!(guest.did(), [(SetAttributes, VM, run)]);
    assert_eq!((done.converted, done.calls), (0, 1));
    assert_eq!(private_runs(&guest), [run]);
}

/// KVM knows already, and nothing can take that back.
#[test]
fn what_is_noted_is_noted_whatever_fails() {
    for call in [Call::Mapping, Call::Mappings, Call::ReadFile] {
        let guest = Guest::on(if call == Call::Mapping { kernel() } else { old_kernel() });
        guest.kernel.set_attributes(VM, POOL.pages(3..5), 8).unwrap();
        guest.kernel.fail(call, 0, libc::EMFILE);
        guest.vm.note_visibility(POOL.pages(3..5), Private).unwrap();
        assert!(!guest.kernel.is_still_to_fail());
        assert_eq!(private_runs(&guest), [POOL.pages(3..5)]);
    }
}

#[test]
fn an_error_of_a_later_piece_names_that() {
    let second = LARGE.range().start + PIECE;
    let guest = Guest::on(old_kernel());
    guest.convert(LARGE.range(), Private).unwrap();
    guest.kernel.fail(Call::Mappings, 1, libc::EMFILE);
    let error = refused(guest.convert(LARGE.range(), Shared));
    assert!(!guest.kernel.is_still_to_fail());
    assert_eq!(private_runs(&guest), [Range { start: second, end: LARGE.range().end }]);
    assert_eq!(error.range, Some(Range { start: second, end: LARGE.range().end }));
}
