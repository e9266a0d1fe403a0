//! Who waits for whom: conversions for each other, jobs and changes of slots for conversions, and who must not.

use super::*;

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

/// Two functions, each at work: the one runs a job over what the other converts, which waits for the one.
#[test]
fn a_job_keeps_away_from_memory_whose_converter_waits_for_this_thread() {
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
fn a_job_in_a_function_keeps_away_from_what_another_converts_in_the_same_chunk() {
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
fn a_list_that_is_refused_half_way_leaves_nothing_announced() {
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

/// Another's function may take its time.
#[test]
fn who_waits_for_a_conversion_leaves_when_the_job_ends_or_the_vcpu_is_wanted() {
    let cancel = |_: &Guest, job: &Job| job.cancel();
    let want_vcpu = |guest: &Guest, _: &Job| guest.kernel.exit_requested.store(true, SeqCst);
    for end in [cancel as fn(&Guest, &Job), want_vcpu] {
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
            let is_out = left.recv_timeout(LONG / 10).is_ok();
            let_go.send(()).unwrap();
            assert!(is_out, "it comes out within a chunk");
        });
    }
}

/// As kvmprep_changed_fn says.
#[test]
fn what_is_said_to_wait_for_conversions_does() {
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

#[test]
fn huge_pages_of_a_pool_are_given_up_by_one_at_a_time() {
    let guest = Guest::new();
    let (first, second) = (POOL.pages(0..300), POOL.pages(300..512));
    waits_for_conversion(&guest, first, true, || _ = guest.convert(second, Private).unwrap());
    let removed: Vec<Range> = guest.did().iter().filter(|did| did.0 == Remove).map(|did| did.2).collect();
    assert_eq!(removed, [POOL.hva(POOL.pages(0..512))], "once, by the last of them");
}
