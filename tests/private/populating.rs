//! Populating what is in sight: by conversion, for the rest of huge pages that it broke up too, and by jobs; and what counts
//! as covered afterwards.

use super::*;

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
fn what_was_discarded_is_not_mapped_again_by_a_conversion_beside_it() {
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
fn another_slot_s_memory_is_not_populated_for_a_huge_page_of_the_former_one() {
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
fn a_fault_that_tells_kvm_once_more_is_no_longer_covered() {
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
fn private_memory_that_is_there_needs_no_free_memory() {
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
fn first_writes_to_private_memory_do_not_fault() {
    let guest = Guest::new();
    guest.convert(LARGE.pages(0..512), Private).unwrap();
    let job =
        Job::new(&guest.vm, &[LARGE.pages(0..1024)], Options { intent: Intent::Read, ..WRITE }).unwrap();
    job.run(Worker::visitor(&*guest.kernel, Some(VCPU), &[]).unwrap(), &mut |_| {});
    job.verdict().unwrap();
    assert_eq!(job.report().first_writes, HUGE, "of private memory KVM maps each page for writing");
}

/// A huge page of a pool goes as a whole, and KVM then forgets all that it has mapped of it, privately too.
#[test]
fn a_huge_page_that_goes_is_covered_no_more() {
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
