//! Conversion on a kernel that keeps what it was asked: the order of the steps, what is given up and how, who waits for
//! whom.
//!
//! What the real KVM makes of it is for the programs of `c-tests`; here it is seen what it is asked for, call by call, and
//! that nothing else is.

mod fake;

use fake::Call::{self, Changed, Discard, PreFault, Punch, Remove, SetAttributes};
use fake::guest::{
    ANONYMOUS, Backed, Guest, LARGE, MAPPED, PLAIN, POOL, TOLD, UNTOLD, VCPU, kernel, old_kernel,
    plain_options,
};
use kvmprep::error::{Error, Reason, Result, Stage};
use kvmprep::kvm::{Errno, FileId, Kernel, Mapping};
use kvmprep::populate::coverage::Loss;
use kvmprep::populate::job::{Job, Options, Worker};
use kvmprep::populate::plan::Intent;
use kvmprep::private::convert::{PIECE, Steps};
use kvmprep::private::visibility::Visibility::{self, Private, Shared};
use kvmprep::range::{HUGE, PAGE, Range};
use kvmprep::vm::{ConvertOptions, ConvertReport};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const VM: RawFd = 3;
/// Long enough for what is to happen, and for what should not to show.
const MOMENT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(120);

fn told(to: Visibility, range: Range) -> (Call, RawFd, Range) {
    (Changed, to as RawFd, range)
}

/// From the start of one to the end of the other.
fn span(first: Range, last: Range) -> Range {
    Range { start: first.start, end: last.end }
}

fn refused(result: Result<ConvertReport>) -> Error {
    result.expect_err("it was to be refused")
}

fn private_runs(guest: &Guest) -> Vec<Range> {
    assert_eq!(guest.recorded(), *guest.kernel.private.lock().unwrap(), "the record is what is true");
    guest.recorded().iter().collect()
}

fn allocated(guest: &Guest, fd: RawFd) -> Vec<Range> {
    guest.kernel.allocated.lock().unwrap().get(&fd).map(|set| set.iter().collect()).unwrap_or_default()
}

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
fn of_a_file_that_serves_both_sides_nothing_goes_out_of_sight() {
    let guest = Guest::new();
    let run = MAPPED.pages(7..9);
    for to in [Private, Shared] {
        let done = guest.convert(run, to).unwrap().done;
        assert_eq!(guest.did(), [(SetAttributes, VM, run), told(to, run)]);
        assert_eq!((done.dropped, done.kept), (0, 0));
    }
}

#[test]
fn huge_pages_of_a_pool_go_when_all_of_one_is_out_of_sight() {
    for kernel in [kernel as fn() -> fake::Fake, old_kernel] {
        let guest = Guest::on(kernel());
        // The end of the first page, the second, the beginning of the third.
        let run = POOL.pages(500..1030);
        let done = guest.convert(run, Private).unwrap().done;
        let whole = POOL.pages(512..1024);
        let removed = (Remove, -1, POOL.hva(whole));
        assert_eq!(guest.did(), [(SetAttributes, VM, run), told(Private, run), removed]);
        assert_eq!((done.dropped, done.kept), (whole.size(), run.size() - whole.size()));

        let rest = POOL.pages(0..500);
        let done = guest.convert(rest, Private).unwrap().done;
        let removed = (Remove, -1, POOL.hva(POOL.pages(0..512)));
        assert_eq!(guest.did(), [(SetAttributes, VM, rest), told(Private, rest), removed]);
        assert_eq!(
            (done.dropped, done.kept),
            (HUGE, 0),
            "all of the page is counted, by the call that gives it up"
        );

        let within = POOL.pages(2000..2001);
        let done = guest.convert(within, Private).unwrap().done;
        assert_eq!(guest.did(), [(SetAttributes, VM, within), told(Private, within)]);
        assert_eq!((done.dropped, done.kept), (0, PAGE));

        // In two runs, the first of which is kept until the second has come.
        let guest = Guest::on(kernel());
        guest.convert(POOL.pages(100..200), Private).unwrap();
        let done = guest.convert(POOL.pages(0..512), Private).unwrap().done;
        assert_eq!((done.dropped, done.kept), (HUGE, 0));
    }
}

/// Because its VMM wished so, or was not told yet: a device may have it pinned.
#[test]
fn a_huge_page_of_which_a_part_is_to_stay_stays() {
    let guest = Guest::new();
    let listener = guest.listener();
    let (part, rest) = (POOL.pages(0..100), POOL.pages(100..512));
    let gone = [(Remove, -1, POOL.hva(POOL.pages(0..512)))];
    let keep = ConvertOptions { keep_shared: true, ..plain_options(&listener) };
    guest.convert_with(part, Private, &keep).unwrap();
    let done = guest.convert(rest, Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (0, rest.size()));
    // Shared again, and private without that wish.
    guest.convert(part, Shared).unwrap();
    guest.did();
    guest.convert(part, Private).unwrap();
    assert_eq!(guest.did()[2..], gone);

    let guest = Guest::new();
    guest.kernel.set_attributes(VM, part, 8).unwrap();
    guest.kernel.fail(Changed, 0, libc::EBUSY);
    let listener = guest.listener();
    let noted = ConvertOptions { steps: Steps { attributes: false, drop: true }, ..plain_options(&listener) };
    refused(guest.convert_with(part, Private, &noted));
    let done = guest.convert(rest, Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (0, rest.size()));
    guest.did();
    let done = guest.convert(part, Private).unwrap().done;
    assert_eq!(guest.did(), [&[told(Private, part)][..], &gone].concat());
    assert_eq!((done.dropped, done.kept), (HUGE, 0));
}

#[test]
fn a_slot_may_have_several_mappings_and_gaps_between() {
    let guest = Guest::new();
    {
        let mut mappings = guest.kernel.mappings.lock().unwrap();
        let large = mappings.last_mut().unwrap();
        let after = Mapping { start: LARGE.hva(LARGE.pages(200..201)).start, shared: true, ..*large };
        large.end = LARGE.hva(LARGE.pages(100..101)).start;
        mappings.push(after);
    }
    let run = LARGE.pages(90..210);
    let done = guest.convert(run, Private).unwrap().done;
    let given_up =
        [(Discard, -1, LARGE.hva(LARGE.pages(90..100))), (Remove, -1, LARGE.hva(LARGE.pages(200..210)))];
    assert_eq!(guest.did()[2..], given_up);
    assert_eq!((done.dropped, done.kept), (20 * PAGE, 0), "what nothing is mapped behind is neither");
    let unmapped = LARGE.pages(110..120);
    guest.convert(unmapped, Shared).unwrap();
    guest.did();
    guest.convert(unmapped, Private).unwrap();
    assert_eq!(guest.did(), [(SetAttributes, VM, unmapped), told(Private, unmapped)]);
}

#[test]
fn shared_memory_is_kept_on_request_and_private_memory_is_not() {
    let guest = Guest::new();
    let listener = guest.listener();
    let keep = ConvertOptions { keep_shared: true, ..plain_options(&listener) };
    let run = TOLD.pages(0..9);
    let done = guest.convert_with(run, Private, &keep).unwrap().done;
    assert_eq!(guest.did(), [(SetAttributes, VM, run), told(Private, run)]);
    assert_eq!((done.dropped, done.kept), (0, run.size()));
    guest.convert_with(run, Shared, &keep).unwrap();
    let punched = (Punch, TOLD.guest_memfd(), TOLD.private(run));
    assert_eq!(guest.did(), [(SetAttributes, VM, run), told(Shared, run), punched]);
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
fn a_locked_file_goes_by_its_descriptor_while_that_is_of_it() {
    let run = TOLD.pages(0..9);
    let reopen = |guest: &Guest, as_what| {
        guest.kernel.reopened.lock().unwrap().insert(TOLD.file(), as_what);
    };
    let shift = |guest: &Guest| {
        let mut mappings = guest.kernel.mappings.lock().unwrap();
        mappings.iter_mut().for_each(|mapping| mapping.offset += PAGE);
    };
    type Change<'a> = &'a dyn Fn(&Guest);
    let cases: [(Change, bool); 4] = [
        (&|_| {}, true),
        (&|guest| reopen(guest, None), false),
        (&|guest| reopen(guest, Some(FileId { device: 1, inode: 99 })), false),
        (&shift, false),
    ];
    for (change, is_it) in cases {
        let guest = Guest::new();
        change(&guest);
        guest.kernel.fail(Remove, 0, libc::EINVAL);
        let done = guest.convert(run, Private).unwrap().done;
        let punched: Vec<_> = guest.did().into_iter().filter(|did| did.0 == Punch).collect();
        let expected = (Punch, TOLD.file(), TOLD.in_file(run));
        assert_eq!(punched, if is_it { vec![expected] } else { vec![] });
        let given = if is_it { (run.size(), 0) } else { (0, run.size()) };
        assert_eq!((done.dropped, done.kept), given);
    }
}

#[test]
fn what_can_never_be_given_up_is_kept_and_that_is_told() {
    let (file, anonymous) = (UNTOLD.pages(0..9), ANONYMOUS.pages(0..9));
    for errno in [libc::EPERM, libc::EACCES, libc::EINVAL, libc::ENODEV, libc::EOPNOTSUPP] {
        for (call, run) in [(Remove, file), (Discard, anonymous)] {
            let guest = Guest::new();
            guest.kernel.fail(call, 0, errno);
            let done = guest.convert(run, Private).unwrap().done;
            assert_eq!((done.converted, done.dropped, done.kept), (run.size(), 0, run.size()), "{errno}");
        }
    }
}

#[test]
fn memory_that_two_slots_show_is_kept() {
    let guest = Guest::new();
    let shown = ANONYMOUS.pages(10..20);
    let mut alias = PLAIN.memslot();
    alias.region.slot = 40;
    alias.region.gpa = LARGE.range().end + HUGE;
    alias.region.hva = ANONYMOUS.hva(shown).start;
    alias.region.size = shown.size();
    guest.vm.note(&alias).unwrap();
    let beside = guest.convert(ANONYMOUS.pages(0..10), Private).unwrap().done;
    assert_eq!((beside.dropped, beside.kept), (10 * PAGE, 0));
    let done = guest.convert(shown, Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (0, shown.size()));
    guest.convert(shown, Shared).unwrap();
    alias.region.size = 0;
    guest.vm.note(&alias).unwrap();
    assert_eq!(guest.convert(shown, Private).unwrap().done.dropped, shown.size());
}

/// A worker with a chunk in hand must not wait for who waits for that chunk.
#[test]
fn from_inside_memory_can_be_discarded_while_a_job_wants_it() {
    let guest = Arc::new(Guest::new());
    guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
    let run = LARGE.pages(10..11);
    let (has_ended, ended) = channel();
    let other = Arc::clone(&guest);
    std::thread::spawn(move || {
        let inside = |_, _| {
            // In its first chunk the run lies.
            let job = Job::new(&other.vm, &[LARGE.pages(0..2048)], WRITE).unwrap();
            job.spawn(&[VCPU], 1).unwrap();
            std::thread::sleep(MOMENT);
            other.vm.discarded(LARGE.pages(100..101));
            other.vm.discarded(run);
            let verdict = other.vm.changing(LARGE.id).map_err(|error| error.errno);
            job.cancel();
            if verdict == Err(libc::EDEADLK) { 0 } else { -libc::EIO }
        };
        other.convert_with(run, Private, &plain_options(&inside)).unwrap();
        has_ended.send(()).unwrap();
    });
    ended.recv_timeout(LONG).expect("it hangs, or the slot's change was not refused");
}

#[test]
fn from_inside_the_function_that_is_told_nothing_can_be_waited_for() {
    let guest = Guest::new();
    let run = LARGE.pages(10..20);
    let verdicts = Mutex::new(Vec::new());
    let inside = |range: Range, _| {
        let overlapping = Range { start: range.start - PAGE, end: range.start + PAGE };
        let errors = [
            guest.convert(overlapping, Shared).unwrap_err(),
            guest.vm.note_visibility(overlapping, Shared).unwrap_err(),
            guest.vm.changing(LARGE.id).unwrap_err(),
        ];
        verdicts.lock().unwrap().extend(errors.map(|error| (error.errno, error.reason)));
        guest.convert(LARGE.pages(20..21), Private).unwrap();
        0
    };
    guest.convert_with(run, Private, &plain_options(&inside)).unwrap();
    assert_eq!(*verdicts.lock().unwrap(), [(libc::EDEADLK, Reason::WouldDeadlock); 3]);
    assert_eq!(private_runs(&guest), [LARGE.pages(10..21)], "what is beside can be converted");
    guest.convert(run, Shared).unwrap();
}

#[test]
fn a_list_of_slots_that_is_refused_from_inside_has_announced_nothing() {
    let guest = Guest::new();
    let inside = |_, _| {
        assert_eq!(guest.vm.set_memslots(&[]).unwrap_err().errno, libc::EDEADLK);
        0
    };
    guest.convert_with(LARGE.pages(0..1), Private, &plain_options(&inside)).unwrap();
    for slot in [&ANONYMOUS, &POOL, &LARGE] {
        guest.convert(slot.range(), Private).expect("no slot is about to change");
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
fn what_was_covered_is_not_any_more() {
    let guest = Guest::new();
    guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
    let populate = || {
        let job = Job::new(&guest.vm, &[LARGE.pages(0..1024)], WRITE).unwrap();
        job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
    };
    let covered = || {
        let covered = guest.vm.coverage(LARGE.range()).1;
        [covered.host, covered.stage2_write]
    };
    populate();
    assert_eq!(covered(), [2 * HUGE; 2]);
    guest.convert(LARGE.pages(3..5), Private).unwrap();
    assert_eq!(covered(), [HUGE; 2], "a frame goes as a whole");
    assert_eq!(guest.vm.coverage(LARGE.range()).1.last_loss, Loss::Converted);
    populate();
    assert_eq!(covered(), [2 * HUGE; 2]);
    guest.vm.note_visibility(LARGE.pages(512..513), Private).unwrap();
    assert_eq!(covered(), [HUGE; 2]);
    guest.vm.note_visibility(LARGE.pages(3..5), Private).unwrap();
    assert_eq!(covered(), [HUGE; 2], "that was so already");
}

// Both page tables afterwards.

fn prefaulting(changed: &dyn Fn(Range, Visibility) -> i32) -> ConvertOptions<'_> {
    ConvertOptions { prefault: true, vcpu: Some(VCPU), ..plain_options(changed) }
}

fn stage2(guest: &Guest) -> Vec<Range> {
    guest.kernel.stage2.lock().unwrap().iter().collect()
}

#[test]
fn the_rest_of_broken_huge_pages_is_mapped_again() {
    let guest = Guest::new();
    let listener = guest.listener();
    // In the second and in the third huge page.
    let run = ANONYMOUS.pages(1000..1030);
    let report = guest.convert_with(run, Private, &prefaulting(&listener)).unwrap();
    assert_eq!(stage2(&guest), [ANONYMOUS.range()]);
    assert_eq!(allocated(&guest, ANONYMOUS.guest_memfd()), [ANONYMOUS.private(run)]);
    assert_eq!((report.neighbours, report.prefaulted), (2 * HUGE - run.size(), 2 * HUGE));
    let host = guest.kernel.host.lock().unwrap().missing(ANONYMOUS.hva(ANONYMOUS.range()));
    assert_eq!(host, [ANONYMOUS.hva(run)], "its shared side is gone, and the neighbours' is there");

    // No huge page is left there, and what is shared again breaks none.
    guest.did();
    let report = guest.convert_with(run, Shared, &prefaulting(&listener)).unwrap();
    assert_eq!((report.neighbours, report.prefaulted), (0, run.size()));
    assert_eq!(stage2(&guest), [ANONYMOUS.range()]);
    let filled: u64 = guest.did().iter().filter(|did| did.0 == PreFault).map(|did| did.2.size()).sum();
    assert_eq!(filled, run.size());
    let report = guest.convert_with(ANONYMOUS.pages(1010..1011), Private, &prefaulting(&listener)).unwrap();
    assert_eq!((report.neighbours, report.prefaulted), (0, PAGE), "they were mapped again");
}

#[test]
fn giving_up_a_part_of_a_split_huge_page_costs_both_sides_their_mappings() {
    let guest = Guest::new();
    let listener = guest.listener();
    // Half of the second huge page is private, and mapped in small pages; the host's page is still huge.
    let (half, run) = (ANONYMOUS.pages(512..768), ANONYMOUS.pages(800..801));
    let keeping = ConvertOptions { keep_shared: true, ..prefaulting(&listener) };
    guest.convert_with(half, Private, &keeping).unwrap();
    guest.did();
    let report = guest.convert_with(run, Private, &prefaulting(&listener)).unwrap();
    assert_eq!((report.neighbours, report.prefaulted), (HUGE - run.size(), HUGE));
    let filled: u64 = guest.did().iter().filter(|did| did.0 == PreFault).map(|did| did.2.size()).sum();
    assert_eq!(filled, HUGE);
}

#[test]
fn what_is_told_of_neighbours_is_what_was_done() {
    let mut kernel = kernel();
    let end = ANONYMOUS.pages(8..9).end;
    kernel.script = Some(Box::new(move |_, range| match range.start < end {
        true => Some(Ok(Range::between(end, range.end))),
        false => Some(Err(Errno(libc::EINTR))),
    }));
    let guest = Guest::on(kernel);
    let mut report = ConvertReport::default();
    let run = ANONYMOUS.pages(3..6);
    let listener = guest.listener();
    let error = guest.vm.convert(run, Private, &prefaulting(&listener), &mut report).unwrap_err();
    assert_eq!((error.errno, error.stage), (libc::EINTR, Stage::Stage2));
    assert_eq!((report.prefaulted, report.neighbours), (9 * PAGE, 6 * PAGE));
}

/// What may not be there yet is not to be allocated by another's conversion.
#[test]
fn small_pages_have_no_neighbours() {
    let guest = Guest::new();
    let listener = guest.listener();
    let run = LARGE.pages(3..5);
    let report = guest.convert_with(run, Private, &prefaulting(&listener)).unwrap();
    assert_eq!((report.neighbours, report.prefaulted), (0, run.size()));
    let host = guest.kernel.host.lock().unwrap().size_within(LARGE.hva(LARGE.range()));
    assert_eq!(host, 0);
}

#[test]
fn a_huge_page_that_is_converted_whole_has_no_neighbours() {
    let guest = Guest::new();
    let listener = guest.listener();
    let run = ANONYMOUS.pages(512..1024);
    let report = guest.convert_with(run, Private, &prefaulting(&listener)).unwrap();
    assert_eq!((report.neighbours, report.prefaulted), (0, HUGE));
    assert_eq!(stage2(&guest), [ANONYMOUS.range()]);
}

#[test]
fn without_a_vcpu_the_host_s_side_is_filled() {
    let guest = Guest::new();
    let listener = guest.listener();
    let host_only = ConvertOptions { vcpu: None, ..prefaulting(&listener) };
    let run = TOLD.pages(3..9);
    let report = guest.convert_with(run, Private, &host_only).unwrap();
    assert_eq!(allocated(&guest, TOLD.guest_memfd()), [TOLD.private(run)]);
    assert_eq!((report.neighbours, report.prefaulted), (0, 0));
    guest.convert_with(run, Shared, &host_only).unwrap();
    assert_eq!(allocated(&guest, TOLD.guest_memfd()), []);
    assert_eq!(guest.kernel.host.lock().unwrap().size_within(TOLD.hva(run)), run.size());
    assert!(guest.did().iter().all(|did| did.0 != PreFault));
}

#[test]
fn a_vcpu_that_cannot_now_is_no_error() {
    let mut kernel = kernel();
    kernel.script = Some(Box::new(|_, _| Some(Err(Errno(libc::EOPNOTSUPP)))));
    let guest = Guest::on(kernel);
    let listener = guest.listener();
    let run = TOLD.pages(3..9);
    let report = guest.convert_with(run, Private, &prefaulting(&listener)).unwrap();
    assert_eq!(report.prefaulted, 0);
    assert_eq!(allocated(&guest, TOLD.guest_memfd()), [TOLD.private(run)]);
}

#[test]
fn what_is_no_vcpu_is_found_before_anything_is_done() {
    let guest = Guest::new();
    let listener = guest.listener();
    guest.kernel.fail(Call::ExitRequest, 0, libc::ENODEV);
    let error = refused(guest.convert_with(TOLD.pages(3..9), Private, &prefaulting(&listener)));
    assert_eq!((error.errno, error.reason), (libc::EBADF, Reason::BadFd));
    assert_eq!(guest.did(), []);
}

#[test]
fn a_signal_leaves_it_converted_and_says_what_is_not_populated() {
    let guest = Guest::new();
    let listener = guest.listener();
    guest.kernel.exit_requested.store(true, SeqCst);
    let run = ANONYMOUS.pages(3..9);
    let error = refused(guest.convert_with(run, Private, &prefaulting(&listener)));
    assert_eq!((error.errno, error.reason, error.stage), (libc::EINTR, Reason::Interrupted, Stage::Stage2));
    assert_eq!(private_runs(&guest), [run]);
    guest.kernel.exit_requested.store(false, SeqCst);
    let report = guest.convert_with(run, Private, &prefaulting(&listener)).unwrap();
    assert_eq!(report.done.converted, 0);
    assert_eq!(stage2(&guest), [ANONYMOUS.range()], "neighbours too");
    assert_eq!(report.neighbours, HUGE - run.size());
}

// Who waits for whom.

const WRITE: Options = Options {
    intent: Intent::Write,
    host_only: false,
    huge_advice: false,
    require_stage2: false,
    check_free: false,
    skip_covered: false,
    dirty_logged_too: false,
    exact: false,
    for_conversion: false,
    timeout: None,
};

#[test]
fn a_job_populates_the_side_that_is_in_sight_when_it_comes_there() {
    let guest = Guest::new();
    // As anybody would who has told of initial attributes.
    guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
    let job = Job::new(&guest.vm, &[TOLD.range()], WRITE).unwrap();
    let runs = [TOLD.pages(5..9), TOLD.pages(700..1000)];
    for run in runs {
        guest.convert(run, Private).unwrap();
    }
    job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
    job.verdict().unwrap();
    assert_eq!(job.remaining().size(), 0);
    assert_eq!(allocated(&guest, TOLD.guest_memfd()), runs.map(|run| TOLD.private(run)));
    let host: Vec<Range> = guest.kernel.host.lock().unwrap().missing(TOLD.hva(TOLD.range()));
    assert_eq!(host, runs.map(|run| TOLD.hva(run)), "what is private is not populated on its shared side");
    assert_eq!(guest.kernel.stage2.lock().unwrap().size_within(TOLD.range()), TOLD.range().size());
}

/// The whole of LARGE is populated by library threads while parts are converted; from the moment that KVM is told until the
/// old side is gone nobody may touch them.
#[test]
fn jobs_keep_away_from_memory_while_it_is_converted() {
    let mut kernel = kernel();
    kernel.step = 64 * PAGE;
    kernel.script = Some(Box::new(|_, _| {
        std::thread::sleep(Duration::from_micros(50));
        None
    }));
    let guest = Guest::on(kernel);
    guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
    let job = Job::new(&guest.vm, &[LARGE.range()], WRITE).unwrap();
    job.spawn(&[VCPU, VCPU + 1], 1).unwrap();
    let listener = |range, to| {
        guest.kernel.forbidden.lock().unwrap().insert(range);
        std::thread::sleep(Duration::from_micros(300));
        guest.kernel.forbidden.lock().unwrap().remove(range);
        guest.listener()(range, to)
    };
    let mut at = 0;
    while !job.has_ended() || at < 64 {
        let first = at * 997 % (LARGE.range().size() / PAGE - 40);
        let to = if at % 3 == 2 { Shared } else { Private };
        guest.convert_with(LARGE.pages(first..first + 40), to, &plain_options(&listener)).unwrap();
        at += 1;
    }
    job.join_library(&mut |_| {});
    job.verdict().unwrap();
    assert!(!guest.kernel.trespassed.load(SeqCst));
    assert_eq!(job.remaining().size(), 0);
    private_runs(&guest);
}

/// Runs `blocked` while a conversion of `range` is held up in its function, at its first piece, and sees whether it waits
/// for that, as is expected.
fn waits_for_conversion(guest: &Guest, range: Range, expected: bool, blocked: impl FnOnce() + Send) {
    let (is_inside, inside) = channel();
    let (let_go, go) = channel::<()>();
    let (has_ended, end) = channel();
    let hold = {
        let go = Mutex::new(go);
        let was_held = AtomicBool::new(false);
        move |_, _| {
            if !was_held.swap(true, SeqCst) {
                is_inside.send(()).unwrap();
                go.lock().unwrap().recv_timeout(LONG).unwrap();
            }
            0
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(move || guest.convert_with(range, Private, &plain_options(&hold)).unwrap());
        inside.recv_timeout(LONG).unwrap();
        scope.spawn(move || {
            blocked();
            has_ended.send(()).unwrap();
        });
        // What goes on may be slow; what waits does so for ever.
        let has_waited = end.recv_timeout(if expected { MOMENT } else { LONG }).is_err();
        let_go.send(()).unwrap();
        assert_eq!(has_waited, expected);
    });
}

#[test]
fn what_overlaps_waits_and_what_does_not_goes_on() {
    let run = LARGE.pages(512..522);
    let check = |expected, blocked: &(dyn Fn(&Guest) + Sync)| {
        let guest = Guest::new();
        waits_for_conversion(&guest, run, expected, || blocked(&guest));
    };
    let waits = |blocked: &(dyn Fn(&Guest) + Sync)| check(true, blocked);
    let goes_on = |blocked: &(dyn Fn(&Guest) + Sync)| check(false, blocked);
    let listener = |_, _| 0;
    waits(&|guest| _ = guest.convert(LARGE.pages(521..530), Shared).unwrap());
    waits(&|guest| _ = guest.convert(run, Private).unwrap());
    waits(&|guest| guest.vm.note_visibility(LARGE.pages(521..530), Shared).unwrap());
    waits(&|guest| guest.vm.discarded(LARGE.pages(0..1000)));
    waits(&|guest| guest.vm.changing(LARGE.id).unwrap());
    goes_on(&|guest| _ = guest.convert(LARGE.pages(522..523), Private).unwrap());
    goes_on(&|guest| _ = guest.convert(TOLD.pages(0..1), Private).unwrap());
    goes_on(&|guest| guest.vm.changing(TOLD.id).unwrap());
    // With a pre-fault whole frames count, since they may be broken up.
    let same_frame = LARGE.pages(600..601);
    goes_on(&|guest| _ = guest.convert(same_frame, Private).unwrap());
    waits(&|guest| _ = guest.convert_with(same_frame, Private, &prefaulting(&listener)).unwrap());
}

/// A guest may ask for all of its memory at once, and others must not wait for all of that.
#[test]
fn the_turn_is_taken_piece_by_piece() {
    let second = LARGE.range().start + PIECE;
    let next = Range { start: second, end: second + PAGE };
    let guest = Guest::new();
    waits_for_conversion(&guest, LARGE.range(), false, || _ = guest.convert(next, Shared).unwrap());
    private_runs(&guest);
}

#[test]
fn between_pieces_a_vcpu_s_owner_is_heard() {
    let guest = Guest::new();
    let range = LARGE.range();
    let (first, second) = (range.start + PIECE, range.start + 2 * PIECE);
    let listener = |piece: Range, to| {
        guest.kernel.exit_requested.store(piece.start == first, SeqCst);
        guest.listener()(piece, to)
    };
    let error = refused(guest.convert_with(range, Private, &prefaulting(&listener)));
    assert_eq!(
        (error.errno, error.reason, error.stage),
        (libc::EINTR, Reason::Interrupted, Stage::Attributes)
    );
    assert_eq!(error.range, Some(Range { start: second, end: range.end }));
    assert_eq!(private_runs(&guest), [Range { start: range.start, end: second }]);
    guest.kernel.exit_requested.store(false, SeqCst);
    let report = guest.convert_with(range, Private, &prefaulting(&guest.listener())).unwrap();
    assert_eq!((report.done.converted, report.prefaulted), (range.end - second, range.size()));
}

#[test]
fn huge_pages_of_a_pool_are_given_up_by_one_at_a_time() {
    let guest = Guest::new();
    let (first, second) = (POOL.pages(0..300), POOL.pages(300..512));
    waits_for_conversion(&guest, first, true, || _ = guest.convert(second, Private).unwrap());
    let removed: Vec<Range> = guest.did().iter().filter(|did| did.0 == Remove).map(|did| did.2).collect();
    assert_eq!(removed, [POOL.hva(POOL.pages(0..512))], "once, by the last of them");
}

#[test]
fn a_slot_that_is_changing_is_converted_when_it_has_changed() {
    let guest = Guest::new();
    guest.vm.changing(TOLD.id).unwrap();
    for to in [Private, Shared] {
        let all = span(ANONYMOUS.range(), TOLD.range());
        let error = refused(guest.convert(all, to));
        assert_eq!((error.errno, error.reason), (libc::EBUSY, Reason::MemslotChanging));
        // Nothing is done, what lies before the slot neither.
        assert_eq!((error.slot, error.range), (Some(TOLD.id), Some(all)));
    }
    assert_eq!(guest.did(), []);
    guest.vm.note(&TOLD.memslot()).unwrap();
    guest.convert(TOLD.range(), Private).unwrap();
}

/// Eight threads, ranges that overlap at random: one at a time is told of any page, and the record is what is true.
#[test]
fn conversions_that_race_take_turns() {
    let guest = Guest::new();
    const PAGES: u64 = 64;
    let at_work: [AtomicU32; PAGES as usize] = std::array::from_fn(|_| AtomicU32::new(0));
    let listener = |range: Range, to| {
        let first = ((range.start - LARGE.range().start) / PAGE) as usize;
        let mine = &at_work[first..first + (range.size() / PAGE) as usize];
        mine.iter().for_each(|page| assert_eq!(page.fetch_add(1, SeqCst), 0));
        std::thread::yield_now();
        mine.iter().for_each(|page| assert_eq!(page.fetch_sub(1, SeqCst), 1));
        guest.listener()(range, to)
    };
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (guest, listener) = (&guest, &listener);
            scope.spawn(move || {
                let mut seed = thread + 1;
                for _ in 0..300 {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let (first, length) = ((seed >> 33) % (PAGES - 8), 1 + (seed >> 45) % 8);
                    let to = if seed >> 60 & 1 == 0 { Private } else { Shared };
                    let run = LARGE.pages(first..first + length);
                    let options = plain_options(listener);
                    let options =
                        ConvertOptions { vcpu: Some(VCPU), prefault: seed >> 61 & 1 == 0, ..options };
                    guest.convert_with(run, to, &options).unwrap();
                }
            });
        }
    });
    private_runs(&guest);
    // Told in turn of each page: every change was one.
    let mut private = kvmprep::range::RangeSet::new();
    for (_, to, range) in guest.did().into_iter().filter(|did| did.0 == Changed) {
        if to == Private as RawFd {
            assert_eq!(private.size_within(range), 0);
            private.insert(range);
        } else {
            assert_eq!(private.remove(range), range.size());
        }
    }
    assert_eq!(private, guest.recorded());
}

/// The put-back of a page that its VMM wished to keep: the wish must outlive it.
#[test]
fn hunt_the_wish_to_keep_outlives_a_change_that_is_put_back() {
    let guest = Guest::new();
    let listener = guest.listener();
    let (part, rest) = (POOL.pages(0..100), POOL.pages(100..512));
    let keep = ConvertOptions { keep_shared: true, ..plain_options(&listener) };
    guest.convert_with(part, Private, &keep).unwrap();
    guest.kernel.fail(Changed, 0, libc::EBUSY);
    refused(guest.convert(part, Shared));
    assert_eq!(private_runs(&guest), [part], "it was put back");
    guest.did();
    let done = guest.convert(rest, Private).unwrap().done;
    let gone: Vec<_> = guest.did().into_iter().filter(|did| did.0 == Remove).collect();
    assert_eq!(gone, [], "the kept part is not given up");
    assert_eq!((done.dropped, done.kept), (0, rest.size()));
}

#[test]
fn hunt_what_a_call_without_drop_left_is_not_given_up_beside_it() {
    for keep_shared in [true, false] {
        let guest = Guest::new();
        let listener = guest.listener();
        let (part, rest) = (POOL.pages(0..100), POOL.pages(100..512));
        let no_drop = ConvertOptions {
            steps: Steps { attributes: true, drop: false },
            keep_shared,
            ..plain_options(&listener)
        };
        guest.convert_with(part, Private, &no_drop).unwrap();
        guest.did();
        let done = guest.convert(rest, Private).unwrap().done;
        let gone: Vec<_> = guest.did().into_iter().filter(|did| did.0 == Remove).collect();
        assert_eq!(gone, [], "that is for the VMM alone to give up; keep_shared: {keep_shared}");
        assert_eq!((done.dropped, done.kept), (0, rest.size()));
    }
}

#[test]
fn hunt_an_error_of_a_later_piece_names_that() {
    let second = LARGE.range().start + PIECE;
    let guest = Guest::on(old_kernel());
    guest.convert(LARGE.range(), Private).unwrap();
    guest.kernel.fail(Call::Mappings, 1, libc::EMFILE);
    let error = refused(guest.convert(LARGE.range(), Shared));
    assert!(!guest.kernel.is_still_to_fail());
    assert_eq!(private_runs(&guest), [Range { start: second, end: LARGE.range().end }]);
    assert_eq!(error.range, Some(Range { start: second, end: LARGE.range().end }));
}

#[test]
fn hunt_of_a_file_that_serves_both_sides_nothing_is_kept_either() {
    let guest = Guest::new();
    let listener = guest.listener();
    let keep = ConvertOptions { keep_shared: true, ..plain_options(&listener) };
    let done = guest.convert_with(MAPPED.pages(0..4), Private, &keep).unwrap().done;
    assert_eq!((done.dropped, done.kept), (0, 0), "nothing is out of sight");
}

#[test]
fn hunt_what_was_given_up_before_a_failure_is_told() {
    let guest = Guest::new();
    let range = span(ANONYMOUS.range(), TOLD.range());
    guest.kernel.fail(Remove, 0, libc::EIO);
    let mut report = ConvertReport::default();
    let listener = guest.listener();
    let error = guest.vm.convert(range, Private, &plain_options(&listener), &mut report).unwrap_err();
    assert_eq!(error.stage, Stage::Drop);
    assert_eq!(report.done.dropped, ANONYMOUS.range().size());
}

/// Whose conversion was cut short before the rest of a broken huge page was mapped again.
fn with_torn_pages(guest: &Guest) -> Range {
    let listener = guest.listener();
    guest.kernel.exit_requested.store(true, SeqCst);
    let run = ANONYMOUS.pages(3..9);
    let error = refused(guest.convert_with(run, Private, &prefaulting(&listener)));
    assert_eq!(error.reason, Reason::Interrupted);
    guest.kernel.exit_requested.store(false, SeqCst);
    run
}

#[test]
fn hunt_what_was_discarded_is_not_mapped_again_by_a_conversion_beside_it() {
    let guest = Guest::new();
    with_torn_pages(&guest);
    // The balloon.
    let balloon = ANONYMOUS.pages(100..200);
    guest.vm.discarded(balloon);
    guest.kernel.discard(ANONYMOUS.hva(balloon).start, balloon.size()).unwrap();
    let listener = guest.listener();
    guest.convert_with(ANONYMOUS.pages(9..10), Private, &prefaulting(&listener)).unwrap();
    let host = guest.kernel.host.lock().unwrap().size_within(ANONYMOUS.hva(balloon));
    assert_eq!(host, 0, "what the VMM has given up is there again");
}

#[test]
fn hunt_another_slot_s_memory_is_not_populated_for_a_huge_page_of_the_former_one() {
    let guest = Guest::new();
    with_torn_pages(&guest);
    guest.vm.changing(ANONYMOUS.id).unwrap();
    let mut gone = ANONYMOUS.memslot();
    gone.region.size = 0;
    guest.vm.note(&gone).unwrap();
    // Another memory, of which nothing is there.
    guest.kernel.huge.lock().unwrap().remove(ANONYMOUS.hva(ANONYMOUS.range()));
    guest.kernel.host.lock().unwrap().remove(ANONYMOUS.hva(ANONYMOUS.range()));
    guest.kernel.stage2.lock().unwrap().remove(ANONYMOUS.range());
    let mut sparse = ANONYMOUS.memslot();
    sparse.nature.sparse = true;
    guest.vm.note(&sparse).unwrap();
    let listener = guest.listener();
    let run = ANONYMOUS.pages(9..10);
    let report = guest.convert_with(run, Private, &prefaulting(&listener)).unwrap();
    assert_eq!((report.neighbours, report.prefaulted), (0, PAGE));
}

#[test]
fn hunt_a_wish_to_keep_goes_with_the_slot() {
    let guest = Guest::new();
    let listener = guest.listener();
    let (part, rest) = (POOL.pages(0..100), POOL.pages(100..512));
    let keep = ConvertOptions { keep_shared: true, ..plain_options(&listener) };
    guest.convert_with(part, Private, &keep).unwrap();
    let mut gone = POOL.memslot();
    gone.region.size = 0;
    guest.vm.changing(POOL.id).unwrap();
    guest.vm.note(&gone).unwrap();
    // Another pool's memory.
    guest.vm.note(&POOL.memslot()).unwrap();
    let done = guest.convert(rest, Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (HUGE, 0), "nobody has asked to keep any of this memory");
}

/// Two functions, each at work: the one runs a job over what the other converts, which waits for the one.
#[test]
fn hunt_a_job_keeps_away_from_memory_whose_converter_waits_for_this_thread() {
    let guest = Guest::new();
    guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
    let (a, b) = (TOLD.pages(0..1), LARGE.pages(0..1));
    let (b_is_inside, b_inside) = channel();
    let (let_b_wait, b_may_wait) = channel::<()>();
    std::thread::scope(|scope| {
        let guest = &guest;
        scope.spawn(move || {
            let of_b = |_, _| {
                guest.kernel.forbidden.lock().unwrap().insert(b);
                b_is_inside.send(()).unwrap();
                b_may_wait.recv_timeout(LONG).unwrap();
                // Waits for the other thread.
                let listener = |_, _| 0;
                let _ = guest.convert_with(a, Private, &plain_options(&listener));
                guest.kernel.forbidden.lock().unwrap().remove(b);
                0
            };
            guest.convert_with(b, Private, &plain_options(&of_b)).unwrap();
        });
        b_inside.recv_timeout(LONG).unwrap();
        let of_a = |_, _| {
            let_b_wait.send(()).unwrap();
            std::thread::sleep(MOMENT);
            let job = Job::new(&guest.vm, &[LARGE.pages(0..512)], Options { timeout: Some(MOMENT), ..WRITE })
                .unwrap();
            job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
            job.cancel();
            0
        };
        guest.convert_with(a, Private, &plain_options(&of_a)).unwrap();
    });
    assert!(!guest.kernel.trespassed.load(SeqCst), "it was populated while it was converted");
}

/// A chunk in which both this thread and another convert a page.
#[test]
fn hunt_a_job_in_a_function_keeps_away_from_what_another_converts_in_the_same_chunk() {
    let guest = Guest::new();
    guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
    let (a, b) = (LARGE.pages(0..1), LARGE.pages(5..6));
    let (b_is_inside, b_inside) = channel();
    std::thread::scope(|scope| {
        let guest = &guest;
        scope.spawn(move || {
            let of_b = |_, _| {
                guest.kernel.forbidden.lock().unwrap().insert(b);
                b_is_inside.send(()).unwrap();
                std::thread::sleep(2 * MOMENT);
                guest.kernel.forbidden.lock().unwrap().remove(b);
                0
            };
            guest.convert_with(b, Private, &plain_options(&of_b)).unwrap();
        });
        b_inside.recv_timeout(LONG).unwrap();
        let of_a = |_, _| {
            let job = Job::new(&guest.vm, &[LARGE.pages(0..512)], WRITE).unwrap();
            job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
            job.verdict().map_or_else(|error| -error.errno, |()| 0)
        };
        guest.convert_with(a, Private, &plain_options(&of_a)).unwrap();
    });
    assert!(!guest.kernel.trespassed.load(SeqCst), "it was populated while it was converted");
}

#[test]
fn hunt_a_list_that_is_refused_half_way_leaves_nothing_announced() {
    let guest = Guest::new();
    // T1 is inside for A and sets a list; B's slot is held for a while, then C's holder waits for A.
    let (a, b, c) = (LARGE.pages(0..1), ANONYMOUS.pages(0..1), TOLD.pages(0..1));
    let (b_in, b_inside) = channel();
    let (b_go, b_may_go) = channel::<()>();
    let (c_in, c_inside) = channel();
    let (c_go, c_may_go) = channel::<()>();
    let verdict = Mutex::new(None);
    std::thread::scope(|scope| {
        let guest = &guest;
        let verdict = &verdict;
        scope.spawn(move || {
            let of_b = |_, _| {
                b_in.send(()).unwrap();
                b_may_go.recv_timeout(LONG).unwrap();
                0
            };
            guest.convert_with(b, Private, &plain_options(&of_b)).unwrap();
        });
        scope.spawn(move || {
            let of_c = |_, _| {
                c_in.send(()).unwrap();
                c_may_go.recv_timeout(LONG).unwrap();
                let nothing = |_, _| 0;
                let _ = guest.convert_with(a, Shared, &plain_options(&nothing));
                0
            };
            guest.convert_with(c, Private, &plain_options(&of_c)).unwrap();
        });
        b_inside.recv_timeout(LONG).unwrap();
        c_inside.recv_timeout(LONG).unwrap();
        scope.spawn(move || {
            let of_a = |_, _| {
                let kept = [UNTOLD, POOL, MAPPED, PLAIN, LARGE].map(|slot| slot.memslot());
                *verdict.lock().unwrap() = Some(guest.vm.set_memslots(&kept).map_err(|error| error.errno));
                0
            };
            guest.convert_with(a, Private, &plain_options(&of_a)).unwrap();
        });
        std::thread::sleep(MOMENT);
        c_go.send(()).unwrap();
        std::thread::sleep(MOMENT);
        b_go.send(()).unwrap();
    });
    assert_eq!(*verdict.lock().unwrap(), Some(Err(libc::EDEADLK)));
    guest.convert(ANONYMOUS.pages(5..6), Private).expect("on error nothing has changed");
}

#[test]
fn hunt_a_fault_that_tells_kvm_once_more_is_no_longer_covered() {
    let guest = Guest::new();
    guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
    let run = LARGE.pages(0..512);
    guest.convert(run, Private).unwrap();
    // Somebody has told KVM otherwise.
    guest.kernel.set_attributes(VM, LARGE.pages(3..4), 0).unwrap();
    let job = Job::new(&guest.vm, &[run], WRITE).unwrap();
    job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
    assert_eq!(guest.vm.coverage(run).1.stage2_write, HUGE);
    let mut report = ConvertReport::default();
    let listener = guest.listener();
    guest.vm.handle_memory_fault(LARGE.pages(3..4), Private, &plain_options(&listener), &mut report).unwrap();
    let covered = guest.vm.coverage(run).1.stage2_write;
    let mapped = guest.kernel.stage2.lock().unwrap().size_within(run);
    assert!(covered <= mapped, "covered {covered:#x}, mapped {mapped:#x}");
}

#[test]
fn hunt_private_memory_that_is_there_needs_no_free_memory() {
    let mut kernel = kernel();
    let meminfo = "MemTotal: 1048576 kB\nMemAvailable: 65536 kB\nSwapFree: 0 kB\n";
    kernel.files.insert("/proc/meminfo".to_string(), meminfo.to_string());
    let guest = Guest::on(kernel);
    guest.convert(LARGE.range(), Private).unwrap();
    let populate = |check_free| {
        let job = Job::new(&guest.vm, &[LARGE.range()], Options { check_free, ..WRITE })?;
        job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
        job.verdict()
    };
    populate(false).unwrap();
    assert_eq!(allocated(&guest, LARGE.guest_memfd()), [LARGE.private(LARGE.range())]);
    populate(true).expect("all of it is there already");
}

#[test]
fn hunt_first_writes_to_private_memory_do_not_fault() {
    let guest = Guest::new();
    guest.convert(LARGE.pages(0..512), Private).unwrap();
    let job =
        Job::new(&guest.vm, &[LARGE.pages(0..1024)], Options { intent: Intent::Read, ..WRITE }).unwrap();
    job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
    job.verdict().unwrap();
    assert_eq!(job.report().first_writes, HUGE, "of private memory KVM maps each page for writing");
}

/// Two slots show one file, each by a mapping of its own.
#[test]
fn hunt_memory_that_two_slots_show_by_two_mappings_is_kept() {
    let guest = Guest::new();
    let shown = UNTOLD.pages(10..20);
    let mut alias = PLAIN.memslot();
    alias.region.slot = 40;
    alias.region.gpa = LARGE.range().end + HUGE;
    alias.region.hva = LARGE.hva(LARGE.range()).end + (1 << 30);
    alias.region.size = shown.size();
    {
        let mut mappings = guest.kernel.mappings.lock().unwrap();
        let of_file =
            *mappings.iter().find(|mapping| mapping.start == UNTOLD.hva(UNTOLD.range()).start).unwrap();
        let start = alias.region.hva;
        mappings.push(Mapping {
            start,
            end: start + shown.size(),
            offset: of_file.offset + 10 * PAGE,
            ..of_file
        });
        mappings.sort_by_key(|mapping| mapping.start);
    }
    guest.vm.note(&alias).unwrap();
    let done = guest.convert(UNTOLD.pages(0..30), Private).unwrap().done;
    let removed: Vec<Range> = guest.did().iter().filter(|did| did.0 == Remove).map(|did| did.2).collect();
    assert!(removed.iter().all(|hvas| !hvas.overlaps(&UNTOLD.hva(shown))), "the other slot's memory is gone");
    assert!(done.kept >= shown.size());
}

#[test]
fn hunt_what_another_call_kept_is_not_subtracted() {
    let guest = Guest::new();
    guest.convert(POOL.pages(0..300), Private).unwrap();
    let done = guest.convert(POOL.pages(300..612), Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (HUGE, 100 * PAGE));
}

#[test]
fn hunt_beside_memory_that_two_slots_show_the_rest_is_given_up() {
    let guest = Guest::new();
    let shown = ANONYMOUS.pages(10..20);
    let mut alias = PLAIN.memslot();
    alias.region.slot = 40;
    alias.region.gpa = LARGE.range().end + HUGE;
    alias.region.hva = ANONYMOUS.hva(shown).start;
    alias.region.size = shown.size();
    guest.vm.note(&alias).unwrap();
    let done = guest.convert(ANONYMOUS.pages(0..512), Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (HUGE - shown.size(), shown.size()));
}

/// Another's function may take its time.
#[test]
fn hunt_who_waits_for_a_conversion_leaves_when_the_job_ends_or_the_vcpu_is_wanted() {
    let ends: [&(dyn Fn(&Guest, &Job) + Sync); 2] =
        [&|_, job| job.cancel(), &|guest, _| guest.kernel.exit_requested.store(true, SeqCst)];
    for end in ends {
        let guest = Guest::new();
        guest.vm.note_visibility(PLAIN.range(), Shared).unwrap();
        let (is_inside, inside) = channel();
        let (let_go, go) = channel::<()>();
        let (has_left, left) = channel();
        let go = Mutex::new(go);
        let hold = |_, _| {
            is_inside.send(()).unwrap();
            go.lock().unwrap().recv_timeout(LONG).unwrap();
            0
        };
        let job = Job::new(&guest.vm, &[LARGE.pages(0..512)], WRITE).unwrap();
        std::thread::scope(|scope| {
            let (guest, job, hold) = (&guest, &job, &hold);
            scope
                .spawn(move || guest.convert_with(LARGE.pages(0..1), Private, &plain_options(hold)).unwrap());
            inside.recv_timeout(LONG).unwrap();
            scope.spawn(move || {
                job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
                has_left.send(()).unwrap();
            });
            std::thread::sleep(MOMENT);
            end(guest, job);
            let is_out = left.recv_timeout(20 * MOMENT).is_ok();
            let_go.send(()).unwrap();
            assert!(is_out, "it comes out within a chunk");
        });
    }
}

/// As kvmprep_changed_fn says.
#[test]
fn hunt_what_is_said_to_wait_for_conversions_does() {
    let run = LARGE.pages(512..522);
    let waits = |blocked: &(dyn Fn(&Guest) + Sync)| {
        let guest = Guest::new();
        waits_for_conversion(&guest, run, true, || blocked(&guest));
    };
    let mut gone = LARGE.memslot();
    gone.region.size = 0;
    waits(&|guest| guest.vm.set(&gone).unwrap());
    waits(&|guest| guest.vm.set_memslots(&[]).unwrap());
    waits(&|guest| guest.vm.host_discarded(LARGE.hva(run)));
    waits(&|guest| {
        let job = Job::new(&guest.vm, &[LARGE.range()], WRITE).unwrap();
        job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
    });
}

/// A huge page of a pool goes as a whole, and KVM then forgets all that it has mapped of it, privately too.
#[test]
fn hunt_a_huge_page_that_goes_is_covered_no_more() {
    const POOL_PAGE: u64 = 16 << 20;
    let guest = Guest::new();
    {
        let mut mappings = guest.kernel.mappings.lock().unwrap();
        let large = mappings.last_mut().unwrap();
        *large = Mapping { shared: true, inode: 9, page_size: POOL_PAGE, object: fake_hugetlb(), ..*large };
    }
    let page = LARGE.pages(0..POOL_PAGE / PAGE);
    guest.vm.note_visibility(LARGE.range(), Private).unwrap();
    guest.kernel.set_attributes(VM, LARGE.range(), 8).unwrap();
    // Two pages are shared, and private again by one call that names more.
    for page in [LARGE.pages(1000..1001), LARGE.pages(1500..1501)] {
        guest.convert(page, Shared).unwrap();
    }
    let job = Job::new(&guest.vm, &[page], WRITE).unwrap();
    job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
    assert_eq!(guest.vm.coverage(page).1.stage2_write, POOL_PAGE);
    guest.did();
    guest.convert(LARGE.pages(900..1600), Private).unwrap();
    assert_eq!(guest.did().last(), Some(&(Remove, -1, LARGE.hva(page))), "all of it goes");
    assert_eq!(guest.vm.coverage(page).1.stage2_write, 0);
}

fn fake_hugetlb() -> kvmprep::kvm::MappedObject {
    kvmprep::kvm::MappedObject::Hugetlb
}
