//! The engine on a kernel that answers as it is told: what the real one does seldom, or never twice alike.
//!
//! Every test ends by asking the same question: is each byte either populated in both page tables or named as
//! remaining?

mod fake;

use fake::{Call, Fake, WRITE};
use kvmprep::error::{Reason, Stage};
use kvmprep::kvm::{Errno, MEM_LOG_DIRTY_PAGES, Region};
use kvmprep::memslot::{Memslot, Nature};
use kvmprep::populate::job::{Job, Leave, Options, Stage2State, Worker};
use kvmprep::populate::plan::Intent;
use kvmprep::range::{HUGE, PAGE, Range};
use kvmprep::vm::{Config, Vm};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const HVA: u64 = 0x7f00_0000_0000;
const GPA: u64 = 1 << 32;
/// Not a multiple of the chunk: a tail must not be skipped.
const SIZE: u64 = 16 * HUGE + 0x5000;
const GUEST: Range = Range { start: GPA, end: GPA + SIZE };

fn slot(id: u32, gpa: u64, size: u64) -> Memslot {
    Memslot {
        region: Region {
            slot: id,
            flags: 0,
            gpa,
            size,
            hva: HVA + (gpa - GPA),
            guest_memfd: -1,
            guest_memfd_offset: 0,
        },
        backing: None,
        file: None,
        nature: Nature::default(),
    }
}

fn fake() -> Fake {
    Fake::new(Range { start: HVA, end: HVA + SIZE })
}

fn vm_of(kernel: Fake) -> (Arc<Fake>, Arc<Vm>) {
    vm_with(kernel, false)
}

fn vm_with(kernel: Fake, mappings_are_kept: bool) -> (Arc<Fake>, Arc<Vm>) {
    let kernel = Arc::new(kernel);
    let config = Config { vm_fd: 3, gpa_bits: Some(40), mappings_are_kept, ..Config::default() };
    let vm = Vm::new(kernel.clone(), config).unwrap();
    vm.set_memslots(&[slot(1, GPA, SIZE)]).unwrap();
    (kernel, Arc::new(vm))
}

fn visit(kernel: &Fake, job: &Job, vcpu: Option<RawFd>) -> Leave {
    job.run(Worker::visitor(kernel, vcpu, &[]).unwrap(), &mut |_| {})
}

fn assert_all_populated(kernel: &Fake, job: &Job) {
    assert_eq!(job.remaining().size(), 0);
    assert_eq!(
        kernel.host.lock().unwrap().iter().collect::<Vec<_>>(),
        [Range { start: HVA, end: HVA + SIZE }]
    );
    assert_eq!(kernel.stage2.lock().unwrap().iter().collect::<Vec<_>>(), [GUEST]);
}

#[test]
fn one_thread_populates_all_of_it() {
    let (kernel, vm) = vm_of(fake());
    let job = Job::new(&vm, &[], WRITE).unwrap();
    assert_eq!(visit(&kernel, &job, Some(5)), Leave::NoWork);
    job.verdict().unwrap();
    assert_all_populated(&kernel, &job);
    let report = job.report();
    assert_eq!((report.host, report.stage2, report.stage2_state), (SIZE, SIZE, Stage2State::Done));
    let (memory, covered) = vm.coverage(GUEST);
    assert_eq!((memory, covered.host, covered.stage2_write), (SIZE, SIZE, SIZE));
}

#[test]
fn chunks_end_at_huge_page_boundaries() {
    let mut kernel = fake();
    let torn = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&torn);
    kernel.script = Some(Box::new(move |_, range| {
        let is_aligned = range.end % HUGE == 0 || range.end == GUEST.end;
        count.fetch_add(u32::from(!is_aligned), Ordering::Relaxed);
        None
    }));
    let (kernel, vm) = vm_of(kernel);
    // Beginning in the middle of a huge page, which must not shift all others.
    let asked = Range { start: GPA + 0x3000, end: GUEST.end };
    let job = Job::new(&vm, &[asked], WRITE).unwrap();
    visit(&kernel, &job, Some(5));
    assert_eq!(torn.load(Ordering::Relaxed), 0);
    assert_eq!(kernel.stage2.lock().unwrap().size(), asked.size());
}

#[test]
fn partial_progress_is_carried_on() {
    let mut kernel = fake();
    kernel.step = 0x3000;
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    job.spawn(&[5], 0).unwrap();
    job.wait(None).unwrap();
    assert_all_populated(&kernel, &job);
}

/// The kernel tells of what it has mapped and not of the signal that has stopped it.
#[test]
fn a_step_that_falls_short_is_a_signal_to_a_callers_thread() {
    let mut kernel = fake();
    kernel.step = 0x80000;
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    assert_eq!(visit(&kernel, &job, Some(5)), Leave::Interrupted);
    assert_eq!(job.progress().stage2, 0x81000);
    while visit(&kernel, &job, Some(5)) == Leave::Interrupted {}
    assert_all_populated(&kernel, &job);
}

#[test]
fn a_passing_refusal_is_repeated() {
    let mut kernel = fake();
    let refusals = AtomicU32::new(0);
    kernel.script = Some(Box::new(move |_, _| {
        (refusals.fetch_add(1, Ordering::Relaxed) < 5).then_some(Err(Errno(libc::EAGAIN)))
    }));
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    visit(&kernel, &job, Some(5));
    job.verdict().unwrap();
    assert_eq!(job.report().retries, 5);
    assert_all_populated(&kernel, &job);
}

#[test]
fn patience_ends_and_names_the_range() {
    let mut kernel = fake();
    let stuck = GPA + 3 * HUGE;
    kernel.script = Some(Box::new(move |_, range| {
        (range.start <= stuck && stuck < range.end).then_some(Err(Errno(libc::EAGAIN)))
    }));
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    assert_eq!(visit(&kernel, &job, Some(5)), Leave::Ended);
    let error = job.verdict().unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::EAGAIN, Reason::RetriesExhausted));
    assert_eq!((error.range.unwrap().start, error.slot, error.stage), (stuck, Some(1), Stage::Stage2));
    assert_eq!(job.remaining().first().unwrap().start, stuck);
}

#[test]
fn no_progress_without_an_error_ends_as_well() {
    let mut kernel = fake();
    kernel.script = Some(Box::new(|_, range| Some(Ok(Some(range)))));
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    visit(&kernel, &job, Some(5));
    assert_eq!(job.verdict().unwrap_err().reason, Reason::RetriesExhausted);
}

#[test]
fn the_chunks_of_a_vcpu_that_refuses_go_to_another() {
    let mut kernel = fake();
    kernel.script = Some(Box::new(|vcpu, _| (vcpu == 5).then_some(Err(Errno(libc::EOPNOTSUPP)))));
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    assert_eq!(visit(&kernel, &job, Some(5)), Leave::VcpuRefused);
    assert_eq!(job.remaining().size(), SIZE);
    assert_eq!(job.report().host, SIZE, "what it could do is done");
    assert_eq!(visit(&kernel, &job, Some(6)), Leave::NoWork);
    job.verdict().unwrap();
    assert_all_populated(&kernel, &job);
}

#[test]
fn when_all_vcpus_refuse_the_host_stage_is_done_and_the_result_says_so() {
    for require_stage2 in [false, true] {
        let mut kernel = fake();
        kernel.script = Some(Box::new(|_, _| Some(Err(Errno(libc::EOPNOTSUPP)))));
        let (_, vm) = vm_of(kernel);
        let job = Job::new(&vm, &[], Options { require_stage2, ..WRITE }).unwrap();
        job.spawn(&[5, 6], 1).unwrap();
        job.wait(None).unwrap();
        job.join_library(&mut |_| {});
        let report = job.report();
        assert_eq!((report.host, report.stage2_state), (SIZE, Stage2State::VcpusRefused));
        assert_eq!(report.remaining.size(), SIZE);
        assert_eq!(job.verdict().is_err(), require_stage2);
    }
}

#[test]
fn a_number_that_means_something_else_is_no_stage_2() {
    for errno in [libc::ENOTTY, libc::EINVAL, libc::ENOSYS] {
        let mut kernel = fake();
        kernel.script = Some(Box::new(move |_, _| Some(Err(Errno(errno)))));
        let (kernel, vm) = vm_of(kernel);
        let job = Job::new(&vm, &[], WRITE).unwrap();
        assert_eq!(visit(&kernel, &job, Some(5)), Leave::NoWork);
        job.verdict().unwrap();
        let report = job.report();
        assert_eq!((report.host, report.stage2, report.stage2_state), (SIZE, 0, Stage2State::Unavailable));
    }
}

#[test]
fn a_kernel_without_it_is_refused_where_stage_2_is_required() {
    let mut kernel = fake();
    kernel.has_pre_fault = false;
    let (_, vm) = vm_of(kernel);
    let error = Job::new(&vm, &[], Options { require_stage2: true, ..WRITE }).err().unwrap();
    assert_eq!((error.errno, error.reason), (libc::EOPNOTSUPP, Reason::NoStage2));
    assert!(!vm.has_jobs());
}

#[test]
fn an_interrupted_visitor_loses_nothing() {
    let mut kernel = fake();
    let calls = AtomicU32::new(0);
    kernel.step = 0x10_0000;
    kernel.script = Some(Box::new(move |_, _| {
        (calls.fetch_add(1, Ordering::Relaxed) % 3 == 2).then_some(Err(Errno(libc::EINTR)))
    }));
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    let mut interruptions = 0;
    while visit(&kernel, &job, Some(5)) == Leave::Interrupted {
        interruptions += 1;
        let done = kernel.stage2.lock().unwrap().size();
        assert_eq!(job.remaining().size() + done, SIZE);
    }
    assert!(interruptions > 5);
    assert_eq!(job.report().interruptions, interruptions);
    assert_all_populated(&kernel, &job);
}

#[test]
fn a_signal_between_chunks_is_seen_by_the_exit_request() {
    let (kernel, vm) = vm_of(fake());
    kernel.exit_requested.store(true, Ordering::SeqCst);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    assert_eq!(visit(&kernel, &job, Some(5)), Leave::Interrupted);
    assert_eq!(job.remaining().size(), SIZE);
}

#[test]
fn an_interrupted_library_thread_goes_on() {
    let mut kernel = fake();
    let calls = AtomicU32::new(0);
    kernel.script = Some(Box::new(move |_, _| {
        (calls.fetch_add(1, Ordering::Relaxed) % 2 == 0).then_some(Err(Errno(libc::EINTR)))
    }));
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    job.spawn(&[5, 6], 2).unwrap();
    job.wait(None).unwrap();
    job.join_library(&mut |_| {});
    job.verdict().unwrap();
    assert_all_populated(&kernel, &job);
}

#[test]
fn any_other_error_stops_the_job_and_says_where() {
    for (errno, reason) in [
        (libc::ENOENT, Reason::NoMemslot),
        (libc::EFAULT, Reason::NoHostMapping),
        (libc::EHWPOISON, Reason::Poisoned),
        (libc::ENOMEM, Reason::MemoryShortage),
        (libc::EIO, Reason::VmDead),
        (libc::EACCES, Reason::KernelRefused),
    ] {
        let mut kernel = fake();
        let bad = GPA + 5 * HUGE + 0x7000;
        kernel.script = Some(Box::new(move |_, range| match range.start {
            start if start == bad => Some(Err(Errno(errno))),
            start if start < bad && bad < range.end => Some(Ok(Range::between(bad, range.end))),
            _ => None,
        }));
        let (kernel, vm) = vm_of(kernel);
        let job = Job::new(&vm, &[], WRITE).unwrap();
        assert_eq!(visit(&kernel, &job, Some(5)), Leave::Ended);
        let error = job.verdict().unwrap_err();
        assert_eq!((error.errno, error.reason, error.slot), (errno, reason, Some(1)));
        assert_eq!(error.range.unwrap().start, bad);
        assert_eq!(job.remaining().first().unwrap(), Range { start: bad, end: GUEST.end });
    }
}

#[test]
fn without_a_vcpu_the_host_stage_is_done() {
    let (kernel, vm) = vm_of(fake());
    let job = Job::new(&vm, &[], Options { host_only: true, ..WRITE }).unwrap();
    assert_eq!(visit(&kernel, &job, None), Leave::NoWork);
    job.verdict().unwrap();
    assert_eq!(kernel.host.lock().unwrap().size(), SIZE);
    assert_eq!(kernel.stage2.lock().unwrap().size(), 0);
    assert_eq!(job.remaining().size(), 0);
}

#[test]
fn what_is_covered_is_skipped_and_what_was_lost_is_not() {
    let (kernel, vm) = vm_of(fake());
    let again = Options { skip_covered: true, ..WRITE };
    visit(&kernel, &Job::new(&vm, &[], WRITE).unwrap(), Some(5));
    let job = Job::new(&vm, &[], again).unwrap();
    assert!(job.has_ended(), "nothing to do");
    assert_eq!(job.report().skipped, SIZE);

    let discarded = Range { start: GPA + HUGE, end: GPA + 3 * HUGE };
    vm.discarded(discarded);
    kernel.stage2.lock().unwrap().clear();
    let job = Job::new(&vm, &[], again).unwrap();
    visit(&kernel, &job, Some(5));
    assert_eq!(kernel.stage2.lock().unwrap().iter().collect::<Vec<_>>(), [discarded]);
    assert_eq!(job.report().skipped, SIZE - discarded.size());
}

#[test]
fn a_discard_by_host_address_reaches_every_slot_that_has_the_memory() {
    let (kernel, vm) = vm_of(fake());
    // A second slot shows the last three MiB of the same memory once more, elsewhere.
    let (alias, tail) = (GPA + 4 * SIZE, 3 << 20);
    let mut second = slot(2, alias, tail);
    second.region.hva = HVA + SIZE - tail;
    vm.note(&second).unwrap();
    visit(&kernel, &Job::new(&vm, &[], WRITE).unwrap(), Some(5));

    // The last two pages, and memory behind them that is nobody's.
    let host = Range { start: HVA + SIZE - 0x2000, end: HVA + SIZE + 0x3000 };
    vm.host_discarded(host);
    let covered = |start, end| vm.coverage(Range { start, end }).1.stage2_write;
    assert_eq!(covered(GPA, GPA + 16 * HUGE), 16 * HUGE, "other frames keep their mappings");
    assert_eq!(covered(GPA + SIZE - 0x2000, GPA + SIZE), 0);
    assert!(covered(alias, alias + tail) > 0, "of a frame that is mapped whole, more may be lost");
    assert_eq!(covered(alias + tail - 0x2000, alias + tail), 0);
}

#[test]
fn the_deletion_of_another_slot_costs_stage_2_only() {
    let (kernel, vm) = vm_of(fake());
    let other = slot(9, 1 << 36, 0x1000);
    vm.note(&other).unwrap();
    visit(&kernel, &Job::new(&vm, &[GUEST], WRITE).unwrap(), Some(5));
    vm.changing(9).unwrap();
    vm.note(&slot(9, GPA, 0)).unwrap();
    let (_, covered) = vm.coverage(GUEST);
    assert_eq!((covered.host, covered.stage2_read, covered.lost), (SIZE, 0, SIZE));
    let job = Job::new(&vm, &[], Options { skip_covered: true, ..WRITE }).unwrap();
    visit(&kernel, &job, Some(5));
    assert_eq!((job.report().host, job.report().stage2), (0, SIZE));
}

#[test]
fn memory_is_not_touched_after_its_change_was_announced() {
    for round in 0..20 {
        let mut kernel = fake();
        kernel.step = 0x8000;
        // Where they are not kept, the other slot's job waits for the note.
        let (kernel, vm) = vm_with(kernel, true);
        let half = (SIZE / 2) & !0xfff;
        vm.set_memslots(&[slot(1, GPA, half), slot(2, GPA + half, SIZE - half)]).unwrap();
        let gone = Range { start: GPA + half, end: GUEST.end };
        let job = Job::new(&vm, &[], WRITE).unwrap();
        job.spawn(&[5, 6], 1).unwrap();
        std::thread::sleep(Duration::from_micros(round * 7));
        vm.changing(2).unwrap();
        kernel.forbidden.lock().unwrap().insert(gone);
        job.wait(None).unwrap();
        job.join_library(&mut |_| {});
        job.verdict().unwrap();
        assert!(!kernel.trespassed.load(Ordering::SeqCst));
        assert_eq!(job.remaining().iter().filter(|r| !gone.contains(r)).count(), 0);
    }
}

#[test]
fn no_pre_fault_begins_between_a_change_s_announcement_and_its_note() {
    let (kernel, vm) = vm_of(fake());
    vm.note(&slot(9, 1 << 36, 0x1000)).unwrap();
    vm.changing(9).unwrap();
    let job = Job::new(&vm, &[GUEST], WRITE).unwrap();
    assert_eq!(visit(&kernel, &job, Some(5)), Leave::Ended);
    let error = job.verdict().unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::EAGAIN, Reason::RetriesExhausted));
    assert_eq!(kernel.stage2.lock().unwrap().size(), 0);
    vm.note(&slot(9, GPA, 0)).unwrap();
    let job = Job::new(&vm, &[GUEST], WRITE).unwrap();
    visit(&kernel, &job, Some(5));
    assert_all_populated(&kernel, &job);
}

#[test]
fn a_slot_that_is_changing_is_left_out_or_refused_by_name() {
    let (kernel, vm) = vm_of(fake());
    vm.changing(1).unwrap();
    let job = Job::new(&vm, &[], WRITE).unwrap();
    visit(&kernel, &job, Some(5));
    assert_eq!(job.remaining().size(), SIZE);
    let error = Job::new(&vm, &[GUEST], WRITE).err().unwrap();
    assert_eq!((error.errno, error.reason, error.slot), (libc::EBUSY, Reason::MemslotChanging, Some(1)));
    vm.note(&slot(1, GPA, SIZE)).unwrap();
    visit(&kernel, &Job::new(&vm, &[GUEST], WRITE).unwrap(), Some(5));
    assert_eq!(kernel.stage2.lock().unwrap().size(), SIZE);
}

#[test]
fn only_resident_memory_is_mapped_where_that_is_wanted() {
    let (kernel, vm) = vm_of(fake());
    let there = [(0x1000, 0x3000), (3 * HUGE - 0x1000, 3 * HUGE + 0x2000), (SIZE - 0x1000, SIZE)];
    let size: u64 = there.iter().map(|(from, to)| to - from).sum();
    for (from, to) in there {
        kernel.host.lock().unwrap().insert(Range { start: HVA + from, end: HVA + to });
    }
    let job = Job::new(&vm, &[], Options { intent: Intent::Resident, ..WRITE }).unwrap();
    visit(&kernel, &job, Some(5));
    job.verdict().unwrap();
    let mapped: Vec<_> = kernel.stage2.lock().unwrap().iter().collect();
    assert_eq!(mapped, there.map(|(from, to)| Range { start: GPA + from, end: GPA + to }));
    assert_eq!((job.report().stage2, job.report().absent), (size, SIZE - size));
}

#[test]
fn time_and_cancellation_end_a_job_and_the_rest_is_named() {
    let (kernel, vm) = vm_of(fake());
    let job = Job::new(&vm, &[], Options { timeout: Some(Duration::ZERO), ..WRITE }).unwrap();
    assert_eq!(visit(&kernel, &job, Some(5)), Leave::Ended);
    assert_eq!(job.verdict().unwrap_err().reason, Reason::TimedOut);

    let job = Job::new(&vm, &[], WRITE).unwrap();
    let mut chunks = 0;
    let worker = Worker::visitor(&*kernel, Some(5), &[]).unwrap();
    let leave = job.run(worker, &mut |job| {
        chunks += 1;
        if chunks == 4 {
            job.cancel();
        }
    });
    assert_eq!(leave, Leave::Ended);
    assert_eq!(job.verdict().unwrap_err().reason, Reason::Cancelled);
    assert_eq!(kernel.stage2.lock().unwrap().size() + job.remaining().size(), SIZE);
    assert_eq!(job.remaining().first().unwrap().start, GPA + 3 * HUGE);
}

#[test]
fn a_thread_takes_its_own_memory_first_and_then_helps() {
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut kernel = fake();
    let seen = Arc::clone(&order);
    kernel.script = Some(Box::new(move |_, range| {
        seen.lock().unwrap().push(range.start);
        None
    }));
    let (kernel, vm) = vm_of(kernel);
    let own = [Range { start: GPA + 8 * HUGE, end: GPA + 10 * HUGE }];
    let job = Job::new(&vm, &[], WRITE).unwrap();
    job.run(Worker::visitor(&*kernel, Some(5), &own).unwrap(), &mut |_| {});
    let order = order.lock().unwrap();
    assert_eq!(order[..3], [GPA + 8 * HUGE, GPA + 9 * HUGE, GPA]);
    assert_all_populated(&kernel, &job);
}

/// Each system call in turn fails, with each errno it can give, at its first, second and third use. The job may
/// fail, but what it says remains must be true, and doing it again must finish it.
#[test]
fn every_system_call_may_fail_and_nothing_is_lost() {
    let calls = [
        Call::PreFault,
        Call::Stats,
        Call::ExitRequest,
        Call::Populate,
        Call::AdviseHuge,
        Call::Mapping,
        Call::Event,
    ];
    let errnos = [
        libc::EINTR,
        libc::EAGAIN,
        libc::ENOMEM,
        libc::EFAULT,
        libc::EIO,
        libc::EBADF,
        libc::ENOENT,
        libc::EMFILE,
    ];
    for call in calls {
        let mut failures = 0;
        for errno in errnos {
            for after in 0..3 {
                let (kernel, vm) = vm_of(fake());
                kernel.fail(call, after, errno);
                if let Ok(job) = Job::new(&vm, &[], Options { huge_advice: true, ..WRITE }) {
                    if let Ok(worker) = Worker::visitor(&*kernel, Some(5), &[]) {
                        job.run(worker, &mut |_| {});
                    }
                    let done = kernel.stage2.lock().unwrap().size();
                    assert_eq!(done + job.remaining().size(), SIZE, "{call:?} {errno} {after}");
                }
                assert!(!vm.has_jobs(), "{call:?} {errno} {after}");
                failures += u32::from(!kernel.is_still_to_fail());
                kernel.fail(Call::ReadFile, u32::MAX, 0);
                let job = Job::new(&vm, &[], WRITE).unwrap();
                visit(&kernel, &job, Some(5));
                job.verdict().unwrap();
                assert_all_populated(&kernel, &job);
            }
        }
        assert!(failures >= errnos.len() as u32, "{call:?} was never used");
    }
}

#[test]
fn a_vm_that_cannot_be_probed_is_no_handle() {
    let kernel = Arc::new(fake());
    let config = Config { vm_fd: 3, keep_mappings: true, ..Config::default() };
    for (call, after) in [(Call::CheckExtension, 0), (Call::CheckExtension, 5), (Call::DisableQuirks, 0)] {
        kernel.fail(call, after, libc::EIO);
        let error = Vm::new(kernel.clone(), config).err().unwrap();
        assert_eq!((error.errno, error.reason), (libc::EIO, Reason::VmDead));
        assert!(!kernel.is_still_to_fail());
    }
    Vm::new(kernel, config).unwrap();
}

/// What is skipped in a slot without stage 2 is nothing of what stage 2 has to do.
#[test]
fn what_is_skipped_is_counted_where_it_would_have_been_done() {
    let (kernel, vm) = vm_of(fake());
    let half = SIZE / 2 / PAGE * PAGE;
    let mut logged = slot(2, GPA + half, SIZE - half);
    logged.region.flags = MEM_LOG_DIRTY_PAGES;
    vm.set_memslots(&[slot(1, GPA, half), logged]).unwrap();
    visit(&kernel, &Job::new(&vm, &[], Options { host_only: true, ..WRITE }).unwrap(), None);
    let job = Job::new(&vm, &[], Options { skip_covered: true, ..WRITE }).unwrap();
    visit(&kernel, &job, Some(5));
    let progress = job.progress();
    assert_eq!((progress.host_total, progress.host), (0, 0));
    assert_eq!((progress.stage2_total, progress.stage2), (half, half));
}

#[test]
fn a_slot_that_the_kernel_refuses_is_as_it_was() {
    let (kernel, vm) = vm_of(fake());
    kernel.fail(Call::SetRegion, 0, libc::EEXIST);
    let error = vm.set(&slot(1, GPA, 0)).unwrap_err();
    assert_eq!((error.errno, error.slot, error.stage), (libc::EEXIST, Some(1), Stage::Memslot));
    visit(&kernel, &Job::new(&vm, &[GUEST], WRITE).unwrap(), Some(5));
    assert_eq!(kernel.stage2.lock().unwrap().size(), SIZE);
    vm.set(&slot(1, GPA, 0)).unwrap();
    assert_eq!(Job::new(&vm, &[GUEST], WRITE).err().unwrap().reason, Reason::NoMemslot);
}

/// What is known of a refusal is not written over by what is said of any.
#[test]
fn a_refused_slot_comes_with_the_advice_that_fits() {
    for (errno, reason, advice) in [
        (libc::EINVAL, Reason::KernelRefused, "tell the handle of every slot"),
        (libc::EEXIST, Reason::KernelRefused, "tell the handle"),
        (libc::ENOMEM, Reason::KernelRefused, "as it was"),
        (libc::EBADF, Reason::BadFd, "file descriptor"),
        (libc::EIO, Reason::VmDead, "dead"),
    ] {
        let (kernel, vm) = vm_of(fake());
        kernel.fail(Call::SetRegion, 0, errno);
        let error = vm.set(&slot(1, GPA, 0)).unwrap_err();
        assert_eq!((error.errno, error.reason), (errno, reason));
        assert!(error.hint.contains(advice), "{errno}: {}", error.hint);
    }
}

#[test]
fn a_log_in_the_way_of_a_required_stage_2_is_named() {
    let (_, vm) = vm_of(fake());
    let half = SIZE / 2 / PAGE * PAGE;
    let mut logged = slot(2, GPA + half, SIZE - half);
    logged.region.flags = MEM_LOG_DIRTY_PAGES;
    vm.set_memslots(&[slot(1, GPA, half), logged]).unwrap();
    let error = Job::new(&vm, &[], Options { require_stage2: true, ..WRITE }).err().unwrap();
    assert_eq!((error.errno, error.reason), (libc::EBUSY, Reason::MemslotDirtyLogged));
    assert_eq!((error.slot, error.range), (Some(2), logged.range()));
}

#[test]
fn a_job_that_all_its_vcpus_refuse_ends_even_when_a_visitor_leaves_last() {
    for _ in 0..50 {
        let mut kernel = fake();
        kernel.script = Some(Box::new(|_, _| Some(Err(Errno(libc::EOPNOTSUPP)))));
        let (kernel, vm) = vm_of(kernel);
        let job = Job::new(&vm, &[], WRITE).unwrap();
        job.spawn(&[5], 0).unwrap();
        visit(&kernel, &job, None);
        job.wait(Some(Duration::from_secs(120))).expect("the job ends");
        job.join_library(&mut |_| {});
        assert_eq!(job.report().stage2_state, Stage2State::VcpusRefused);
    }
}

#[test]
fn an_unannounced_change_takes_the_slot_out_of_jobs_under_way() {
    let (kernel, vm) = vm_of(fake());
    let half = (SIZE / 2) & !0xfff;
    vm.set_memslots(&[slot(1, GPA, half), slot(2, GPA + half, SIZE - half)]).unwrap();
    let job = Job::new(&vm, &[], WRITE).unwrap();
    vm.note(&slot(2, GPA, 0)).unwrap();
    visit(&kernel, &job, Some(5));
    job.verdict().unwrap();
    assert_eq!(
        kernel.stage2.lock().unwrap().iter().collect::<Vec<_>>(),
        [Range { start: GPA, end: GPA + half }]
    );
    assert_eq!(job.remaining().iter().collect::<Vec<_>>(), [Range { start: GPA + half, end: GUEST.end }]);
}

#[test]
fn what_has_worked_and_works_no_more_is_an_error() {
    let mut kernel = fake();
    let bad = GPA + 4 * HUGE;
    kernel.script = Some(Box::new(move |_, range| (range.start >= bad).then_some(Err(Errno(libc::EINVAL)))));
    let (kernel, vm) = vm_of(kernel);
    let job = Job::new(&vm, &[], WRITE).unwrap();
    visit(&kernel, &job, Some(5));
    let error = job.verdict().unwrap_err();
    assert_eq!((error.errno, error.reason, error.slot), (libc::EINVAL, Reason::KernelRefused, Some(1)));
    assert_eq!(error.range.unwrap().start, bad);
}

#[test]
fn nothing_is_handed_out_once_a_job_is_over() {
    let (kernel, vm) = vm_of(fake());
    let job = Job::new(&vm, &[], WRITE).unwrap();
    // Cancelled in the middle of a chunk, after its host stage.
    let worker = Worker::visitor(&*kernel, Some(5), &[]).unwrap();
    job.cancel();
    assert_eq!(job.run(worker, &mut |_| {}), Leave::Ended);
    assert_eq!(kernel.host.lock().unwrap().size() + kernel.stage2.lock().unwrap().size(), 0);
    job.wait(Some(Duration::ZERO)).unwrap();
}

#[test]
fn a_discard_inside_a_huge_page_loses_all_of_it() {
    let (kernel, vm) = vm_of(fake());
    visit(&kernel, &Job::new(&vm, &[], WRITE).unwrap(), Some(5));
    vm.discarded(Range { start: GPA + HUGE + 0x5000, end: GPA + HUGE + 0x6000 });
    let (_, covered) = vm.coverage(GUEST);
    assert_eq!((covered.host, covered.stage2_read, covered.lost), (SIZE - HUGE, SIZE - HUGE, HUGE));
}

#[test]
fn patience_is_a_matter_of_time_and_names_its_cause() {
    let (kernel, vm) = vm_of(fake());
    vm.note(&slot(7, 1 << 36, 0x1000)).unwrap();
    vm.changing(7).unwrap();
    let job = Job::new(&vm, &[GUEST], WRITE).unwrap();
    let began = std::time::Instant::now();
    visit(&kernel, &job, Some(5));
    assert!(began.elapsed() >= Duration::from_secs(2));
    let error = job.verdict().unwrap_err();
    assert_eq!(error.reason, Reason::RetriesExhausted);
    assert!(error.message.contains("announced and has not been noted"), "{}", error.message);
}
