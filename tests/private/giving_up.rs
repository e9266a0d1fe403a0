//! What is given up of memory that has gone out of sight, how, and what is kept.

use super::*;

/// A slot more, elsewhere in the guest, of the memory at `hva`.
fn slot_more(hva: u64, size: u64) -> Memslot {
    let mut slot = PLAIN.memslot();
    slot.region.slot = 40;
    slot.region.gpa = LARGE.range().end + HUGE;
    (slot.region.hva, slot.region.size) = (hva, size);
    slot
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
    let mut alias = slot_more(ANONYMOUS.hva(shown).start, shown.size());
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

/// The put-back of a page that its VMM wished to keep: the wish must outlive it.
#[test]
fn the_wish_to_keep_outlives_a_change_that_is_put_back() {
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
fn what_a_call_without_drop_left_is_not_given_up_beside_it() {
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
fn of_a_file_that_serves_both_sides_nothing_is_kept_either() {
    let guest = Guest::new();
    let listener = guest.listener();
    let keep = ConvertOptions { keep_shared: true, ..plain_options(&listener) };
    let done = guest.convert_with(MAPPED.pages(0..4), Private, &keep).unwrap().done;
    assert_eq!((done.dropped, done.kept), (0, 0), "nothing is out of sight");
}

#[test]
fn what_was_given_up_before_a_failure_is_told() {
    let guest = Guest::new();
    let range = span(ANONYMOUS.range(), TOLD.range());
    guest.kernel.fail(Remove, 0, libc::EIO);
    let mut report = ConvertReport::default();
    let listener = guest.listener();
    let error = guest.vm.convert(range, Private, &plain_options(&listener), &mut report).unwrap_err();
    assert_eq!(error.stage, Stage::Drop);
    assert_eq!(report.done.dropped, ANONYMOUS.range().size());
}

#[test]
fn a_wish_to_keep_goes_with_the_slot() {
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

/// Two slots show one file, each by a mapping of its own, whichever comes first in the file.
#[test]
fn memory_that_two_slots_show_by_two_mappings_is_kept() {
    for (first, hva) in [(10, LARGE.hva(LARGE.range()).end + (1 << 30)), (0, PAGE)] {
        let guest = Guest::new();
        let shown = UNTOLD.pages(first..20);
        let alias = slot_more(hva, shown.size());
        {
            let mut mappings = guest.kernel.mappings.lock().unwrap();
            let start_of_file = UNTOLD.hva(UNTOLD.range()).start;
            let of_file = *mappings.iter().find(|mapping| mapping.start == start_of_file).unwrap();
            let offset = of_file.offset + first * PAGE;
            mappings.push(Mapping { start: hva, end: hva + shown.size(), offset, ..of_file });
            mappings.sort_by_key(|mapping| mapping.start);
        }
        guest.vm.note(&alias).unwrap();
        let done = guest.convert(UNTOLD.pages(0..30), Private).unwrap().done;
        let removed: Vec<Range> = guest.did().iter().filter(|did| did.0 == Remove).map(|did| did.2).collect();
        assert!(
            removed.iter().all(|hvas| !hvas.overlaps(&UNTOLD.hva(shown))),
            "the other slot's memory is gone"
        );
        assert_eq!(done.kept, shown.size());
    }
}

#[test]
fn what_another_call_kept_is_not_subtracted() {
    let guest = Guest::new();
    guest.convert(POOL.pages(0..300), Private).unwrap();
    let done = guest.convert(POOL.pages(300..612), Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (HUGE, 100 * PAGE));
}

#[test]
fn beside_memory_that_two_slots_show_the_rest_is_given_up() {
    let guest = Guest::new();
    let shown = ANONYMOUS.pages(10..20);
    let alias = slot_more(ANONYMOUS.hva(shown).start, shown.size());
    guest.vm.note(&alias).unwrap();
    let done = guest.convert(ANONYMOUS.pages(0..512), Private).unwrap().done;
    assert_eq!((done.dropped, done.kept), (HUGE - shown.size(), shown.size()));
}
