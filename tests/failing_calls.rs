//! Every system call that a piece of work makes is failed in turn, with each errno that it can give; then the work is asked
//! for once more.
//!
//! Whatever failed, the error has to say where, the handle's record to be what is true in KVM, nobody's turn to be left
//! taken, and the second call to end as if there had been one: the same memory in the same page tables and files, nothing
//! open, nothing left to do. It knows nothing of how the work is done but which errnos each call has.

mod fake;

use fake::guest::{
    ANONYMOUS, Backed, Guest, LARGE, MAPPED, POOL, TOLD, Traces, UNTOLD, VCPU, config, kernel, old_kernel,
    plain_options,
};
use fake::{Call, Fake};
use kvmprep::error::{Error, Reason, Result, Stage};
use kvmprep::kvm::Kernel;
use kvmprep::kvm::caps::Caps;
use kvmprep::memslot::Memslot;
use kvmprep::populate::job::{Job, Leave, Options, Worker};
use kvmprep::populate::plan::Intent;
use kvmprep::private::convert::{PIECE, Steps};
use kvmprep::private::gmem;
use kvmprep::private::visibility::Visibility::{self, Private, Shared};
use kvmprep::range::{PAGE, Range, RangeSet};
use kvmprep::vm::{ConvertOptions, ConvertReport, Vm};
use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

/// What each call can give, by its manual page or, for KVM's, by its source (KVM_SET_MEMORY_ATTRIBUTES, for one, knows no
/// EINTR). Those of a path in /proc are those of opening it too.
fn errnos(call: Call) -> &'static [i32] {
    use libc::*;
    match call {
        Call::CheckExtension => &[EBADF, EINVAL, EIO, ENOTTY],
        Call::DisableQuirks => &[EBADF, EINVAL, EIO, ENOTTY],
        Call::SetRegion => &[EBADF, EEXIST, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY],
        Call::PreFault => &[
            EAGAIN, EBADF, EFAULT, EHWPOISON, EINTR, EINVAL, EIO, ENOENT, ENOMEM, ENOSPC, ENOTTY, EOPNOTSUPP,
        ],
        Call::CreateGuestMemfd => &[EBADF, EFAULT, EINVAL, EIO, EMFILE, ENFILE, ENOMEM, ENOTTY],
        Call::SetAttributes => &[EBADF, EFAULT, EINVAL, EIO, ENOMEM, ENOTTY],
        Call::CloseOnExec => &[EBADF],
        Call::Discard => &[EAGAIN, EBADF, EINTR, EINVAL, ENOMEM, EPERM],
        Call::Remove => &[EACCES, EAGAIN, EBADF, EINTR, EINVAL, EIO, ENOMEM, EOPNOTSUPP, EPERM],
        Call::Punch => &[
            EBADF, EFBIG, EINTR, EINVAL, EIO, ENODEV, ENOMEM, ENOSPC, ENOSYS, EOPNOTSUPP, EPERM, ESPIPE,
            ETXTBSY,
        ],
        Call::Stats => &[EBADF, EMFILE, ENFILE, ENOMEM, ENOTTY],
        Call::ExitRequest => &[EACCES, EAGAIN, EBADF, EINVAL, ENODEV, ENOMEM, EPERM],
        Call::Populate => &[EAGAIN, EFAULT, EHWPOISON, EINTR, EINVAL, EIO, ENOMEM, EPERM],
        Call::AdviseHuge => &[EAGAIN, EINVAL, ENOMEM],
        Call::Allocate => &[
            EBADF, EFBIG, EINTR, EINVAL, EIO, ENODEV, ENOMEM, ENOSPC, ENOSYS, EOPNOTSUPP, EPERM, ESPIPE,
            ETXTBSY,
        ],
        Call::FileKind => &[EBADF, EFAULT, EINTR, EIO, ENOMEM, ENOSYS, EOVERFLOW],
        Call::FileStatus => &[EBADF, EFAULT, EIO, ENOMEM, EOVERFLOW],
        Call::Mapping | Call::Mappings => {
            &[EACCES, EFAULT, EINTR, EIO, EMFILE, ENFILE, ENOENT, ENOMEM, EPERM]
        }
        Call::Resident | Call::HugePages => {
            &[EACCES, EFAULT, EINTR, EINVAL, EMFILE, ENFILE, ENOENT, ENOMEM, EPERM]
        }
        Call::Event => &[EMFILE, ENFILE, ENODEV, ENOMEM],
        Call::ReadFile => &[EACCES, EIO, EMFILE, ENFILE, ENOENT, ENOMEM],
        // Not a system call; it may give any.
        Call::Changed => &[EBUSY, EINVAL, ENOMEM],
    }
}

/// Whether that is how the kernel says of memory that it cannot be given up at all.
fn is_kept_for_good(call: Call, errno: i32) -> bool {
    let is_giving_up = matches!(call, Call::Discard | Call::Remove);
    is_giving_up
        && matches!(errno, libc::EINVAL | libc::EACCES | libc::EPERM | libc::ENODEV | libc::EOPNOTSUPP)
}

/// A piece of work.
struct Work {
    name: &'static str,
    kernel: fn() -> Fake,
    /// What has come before; none of that fails.
    before: fn(&Guest),
    run: fn(&Guest) -> Result<()>,
    /// The memory that it may speak of; `None`: it is about none.
    about: Option<Range>,
}

/// What the work leaves behind when nothing fails, and the calls that it takes.
struct Clean {
    counts: BTreeMap<Call, u32>,
    traces: Traces,
}

fn counts(guest: &Guest) -> BTreeMap<Call, u32> {
    guest.kernel.counts.lock().unwrap().clone()
}

impl Work {
    fn guest(&self) -> Guest {
        let guest = Guest::on((self.kernel)());
        (self.before)(&guest);
        guest.did();
        guest
    }

    fn clean(&self) -> Clean {
        let guest = self.guest();
        let before = counts(&guest);
        (self.run)(&guest).unwrap_or_else(|error| panic!("{}: {error:?}", self.name));
        let mut counts = counts(&guest);
        counts.iter_mut().for_each(|(call, count)| *count -= before.get(call).unwrap_or(&0));
        Clean { counts, traces: guest.traces() }
    }

    /// Fails the call of that number of a kind. Says whether the work was refused, and what is wrong with what came of it.
    fn fail(&self, clean: &Clean, call: Call, number: u32, errno: i32) -> (bool, Vec<String>) {
        let guest = Arc::new(self.guest());
        let mut told = guest.kernel.private.lock().unwrap().clone();
        let mut wrong = Vec::new();
        let mut demand = |holds: bool, what: &dyn Fn() -> String| {
            if !holds {
                wrong.push(what());
            }
        };
        guest.kernel.fail(call, number, errno);
        let first = (self.run)(&guest);
        demand(!guest.kernel.is_still_to_fail(), &|| "the call was not made".to_string());
        guest.kernel.fail_none();
        if let Err(error) = &first {
            self.check_error(error, errno, &guest, &mut demand);
        }
        let truth = guest.kernel.private.lock().unwrap().clone();
        let is_noted = self.about.is_some() || first.is_ok();
        demand(!is_noted || guest.recorded() == truth, &|| "the record is not what is true".to_string());
        demand(!guest.vm.has_jobs(), &|| "a job lives on".to_string());

        // By another thread, which would wait for ever for a turn that was left taken.
        let (done, end) = channel();
        let (run, other) = (self.run, Arc::clone(&guest));
        std::thread::spawn(move || done.send((run)(&other)));
        match end.recv_timeout(Duration::from_secs(120)) {
            Ok(second) => demand(second.is_ok(), &|| format!("again: {second:?}")),
            Err(_) => {
                demand(false, &|| "again: it does not end".to_string());
                return (first.is_err(), wrong);
            }
        }
        let mut traces = guest.traces();
        if first.is_ok() && is_kept_for_good(call, errno) {
            // It is told as kept, and stays.
            demand(
                clean.traces.host.iter().all(|range| traces.host.size_within(range) == range.size()),
                &|| difference(&traces, &clean.traces),
            );
            traces.host = clean.traces.host.clone();
        }
        demand(traces == clean.traces, &|| difference(&traces, &clean.traces));
        demand(guest.kernel.open_descriptors() == 0, &|| "descriptors are left open".to_string());
        for (_, to, range) in guest.did().into_iter().filter(|did| did.0 == Call::Changed) {
            if to == Private as RawFd {
                told.insert(range);
            } else {
                told.remove(range);
            }
        }
        demand(self.about.is_none() || told == traces.private, &|| format!("told of {told:?}"));

        demand((self.run)(&guest).is_ok(), &|| "a third call fails".to_string());
        let is_change = |call| {
            matches!(call, Call::Changed | Call::SetAttributes | Call::Discard | Call::Remove | Call::Punch)
        };
        let left: Vec<_> = guest.did().into_iter().filter(|did| is_change(did.0)).collect();
        let expected = self.name.starts_with("a fault") as usize;
        demand(left.len() == expected, &|| format!("a third call has work: {left:?}"));
        (first.is_err(), wrong)
    }

    fn check_error(
        &self,
        error: &Error,
        errno: i32,
        guest: &Guest,
        demand: &mut dyn FnMut(bool, &dyn Fn() -> String),
    ) {
        // Where the kernel's number says too little another is told.
        let others = [libc::ENOMEM, libc::EFAULT, libc::EOPNOTSUPP, libc::EBADF, libc::EINVAL];
        let is_known = error.errno == errno || others.contains(&error.errno);
        demand(is_known, &|| format!("errno {}", error.errno));
        demand(!error.message.is_empty() && !error.hint.is_empty(), &|| {
            format!("not said what to do: {error:?}")
        });
        let Some(about) = self.about else { return };
        if error.stage == Stage::None {
            // An argument's fault is found before anything is done.
            return demand(guest.kernel.did.lock().unwrap().is_empty(), &|| format!("too late: {error:?}"));
        }
        let Some(range) = error.range else {
            return demand(false, &|| format!("no range: {error:?}"));
        };
        demand(about.contains(&range), &|| format!("not about {about}: {error:?}"));
    }
}

fn difference(found: &Traces, clean: &Traces) -> String {
    let mut text = "it ends otherwise:".to_string();
    let mut compare = |name: &str, found: &RangeSet, clean: &RangeSet| {
        if found != clean {
            let (mut less, mut more) = (clean.clone(), found.clone());
            found.iter().for_each(|range| _ = less.remove(range));
            clean.iter().for_each(|range| _ = more.remove(range));
            text += &format!(" {name}: lacks {:x?}, has {:x?} too;", less, more);
        }
    };
    compare("private", &found.private, &clean.private);
    compare("host", &found.host, &clean.host);
    compare("stage 2", &found.stage2, &clean.stage2);
    if found.allocated != clean.allocated {
        text += &format!(" allocated {:x?} for {:x?};", found.allocated, clean.allocated);
    }
    if found.covered != clean.covered {
        text += &format!(" covered {:x?} for {:x?};", found.covered, clean.covered);
    }
    text
}

fn convert(
    guest: &Guest,
    range: Range,
    to: Visibility,
    change: impl FnOnce(ConvertOptions<'_>) -> ConvertOptions<'_>,
) -> Result<()> {
    let listener = guest.listener();
    guest.convert_with(range, to, &change(plain_options(&listener))).map(drop)
}

fn prefaulting(options: ConvertOptions<'_>) -> ConvertOptions<'_> {
    ConvertOptions { prefault: true, vcpu: Some(VCPU), ..options }
}

fn populate(guest: &Guest, intent: Intent, asked: Range) -> Result<()> {
    let options = Options {
        intent,
        host_only: false,
        huge_advice: true,
        require_stage2: true,
        check_free: true,
        skip_covered: false,
        dirty_logged_too: false,
        exact: false,
        for_conversion: false,
        timeout: None,
    };
    let job = Job::new(&guest.vm, &[asked], options)?;
    let worker = Worker::visitor(&*guest.kernel, Some(VCPU), &[])?;
    let leave = job.run(worker, &mut |_| {});
    job.give_up();
    match leave {
        Leave::Interrupted => Err(Error::new(libc::EINTR, Reason::Interrupted, "a signal came")
            .stage(Stage::Stage2)
            .range(asked)
            .hint("again")),
        _ => job.verdict(),
    }
}

/// From the middle of a huge page of the first slot to the middle of the third.
fn three_slots() -> Range {
    Range { start: ANONYMOUS.pages(1000..1001).start, end: UNTOLD.pages(0..700).end }
}

/// 300 pages on either side of a multiple of 64 MiB, where conversions are cut.
fn across_pieces() -> Range {
    let middle = PIECE / PAGE;
    LARGE.pages(middle - 300..middle + 300)
}

fn deletion(slot: &Backed) -> Memslot {
    let mut gone = slot.memslot();
    gone.region.size = 0;
    gone
}

fn from(first: Backed, last: Backed) -> Range {
    Range { start: first.range().start, end: last.range().end }
}

/// A kernel with all of the guest's shared memory in this process's page tables: what is to be given up is there.
fn resident() -> Fake {
    with_memory(kernel())
}

fn old_resident() -> Fake {
    with_memory(old_kernel())
}

fn with_memory(kernel: Fake) -> Fake {
    for slot in [ANONYMOUS, TOLD, UNTOLD, POOL, MAPPED, LARGE] {
        kernel.host.lock().unwrap().insert(slot.hva(slot.range()));
    }
    kernel
}

fn all_works() -> Vec<Work> {
    let nothing: fn(&Guest) = |_| {};
    vec![
        Work {
            name: "three slots become private and are mapped",
            kernel: resident,
            before: nothing,
            run: |guest| convert(guest, three_slots(), Private, prefaulting),
            about: Some(from(ANONYMOUS, UNTOLD)),
        },
        Work {
            name: "five slots and a hole become shared and are mapped",
            kernel: resident,
            before: |guest| {
                for run in [three_slots(), POOL.pages(100..1500), MAPPED.pages(9..10)] {
                    convert(guest, run, Private, prefaulting).unwrap();
                }
            },
            run: |guest| convert(guest, from(ANONYMOUS, MAPPED), Shared, prefaulting),
            about: Some(from(ANONYMOUS, MAPPED)),
        },
        Work {
            name: "one page of a huge page becomes private",
            kernel: resident,
            before: nothing,
            run: |guest| convert(guest, ANONYMOUS.pages(700..701), Private, prefaulting),
            about: Some(ANONYMOUS.range()),
        },
        Work {
            name: "the same, and its shared side is kept",
            kernel: resident,
            before: nothing,
            run: |guest| {
                convert(guest, ANONYMOUS.pages(700..701), Private, |options| ConvertOptions {
                    keep_shared: true,
                    ..prefaulting(options)
                })
            },
            about: Some(ANONYMOUS.range()),
        },
        Work {
            name: "the rest of a pool's page becomes private",
            kernel: resident,
            before: |guest| convert(guest, POOL.pages(0..100), Private, prefaulting).unwrap(),
            run: |guest| convert(guest, POOL.pages(100..600), Private, prefaulting),
            about: Some(POOL.range()),
        },
        Work {
            name: "the rest of a pool's page, before Linux 6.11",
            kernel: old_resident,
            before: |guest| convert(guest, POOL.pages(0..100), Private, prefaulting).unwrap(),
            run: |guest| convert(guest, POOL.pages(100..600), Private, prefaulting),
            about: Some(POOL.range()),
        },
        Work {
            name: "a mapped guest_memfd becomes private",
            kernel: resident,
            before: nothing,
            run: |guest| convert(guest, MAPPED.range(), Private, prefaulting),
            about: Some(MAPPED.range()),
        },
        Work {
            name: "pieces of 64 MiB become private",
            kernel: resident,
            before: nothing,
            run: |guest| convert(guest, LARGE.range(), Private, |options| options),
            about: Some(LARGE.range()),
        },
        Work {
            name: "two pieces become private and are mapped",
            kernel: resident,
            before: nothing,
            run: |guest| convert(guest, across_pieces(), Private, prefaulting),
            about: Some(LARGE.range()),
        },
        Work {
            name: "two pieces become shared and are mapped",
            kernel: resident,
            before: |guest| convert(guest, across_pieces(), Private, |options| options).unwrap(),
            run: |guest| convert(guest, across_pieces(), Shared, prefaulting),
            about: Some(LARGE.range()),
        },
        Work {
            name: "many runs become shared on the host alone",
            kernel: resident,
            before: |guest| {
                for first in [0, 10, 20] {
                    convert(guest, TOLD.pages(first..first + 3), Private, |options| options).unwrap();
                }
            },
            run: |guest| {
                convert(guest, TOLD.pages(0..30), Shared, |options| ConvertOptions {
                    prefault: true,
                    ..options
                })
            },
            about: Some(TOLD.range()),
        },
        Work {
            name: "the VMM has set the attributes",
            kernel: resident,
            before: |guest| guest.kernel.set_attributes(3, TOLD.pages(0..30), 8).unwrap(),
            run: |guest| {
                convert(guest, TOLD.pages(0..30), Private, |options| ConvertOptions {
                    steps: Steps { attributes: false, drop: true },
                    ..options
                })
            },
            about: None,
        },
        Work {
            name: "a fault on what is private already",
            kernel: resident,
            before: |guest| convert(guest, TOLD.pages(0..1), Private, |options| options).unwrap(),
            run: |guest| {
                let listener = guest.listener();
                let options = plain_options(&listener);
                let mut report = ConvertReport::default();
                guest.vm.handle_memory_fault(TOLD.pages(0..1), Private, &options, &mut report)
            },
            about: Some(TOLD.range()),
        },
        Work {
            name: "mixed memory is populated",
            kernel: resident,
            before: |guest| {
                for run in [three_slots(), POOL.pages(100..1500), MAPPED.pages(9..10)] {
                    convert(guest, run, Private, |options| options).unwrap();
                }
            },
            run: |guest| {
                populate(guest, Intent::Write, from(ANONYMOUS, UNTOLD))?;
                populate(guest, Intent::Write, from(POOL, MAPPED))
            },
            about: None,
        },
        Work {
            name: "what is resident of mixed memory is mapped",
            kernel: resident,
            before: |guest| {
                populate(guest, Intent::Write, from(ANONYMOUS, UNTOLD)).unwrap();
                convert(guest, three_slots(), Private, |options| options).unwrap();
                guest.kernel.stage2.lock().unwrap().clear();
            },
            run: |guest| populate(guest, Intent::Resident, from(ANONYMOUS, UNTOLD)),
            about: None,
        },
        Work {
            name: "a guest_memfd is made",
            kernel: resident,
            before: nothing,
            run: |guest| {
                let caps = Caps::probe(&*guest.kernel, None, Some(3))
                    .map_err(|errno| Error::kernel(errno, "probing the VM").hint("-"))?;
                gmem::create(&*guest.kernel, &caps, 3, 64 * PAGE, 0).map(drop)
            },
            about: None,
        },
        Work {
            name: "a handle is made",
            kernel: resident,
            before: nothing,
            run: |guest| {
                let config = kvmprep::vm::Config { keep_mappings: true, ..config() };
                Vm::new(guest.kernel.clone(), config).map(drop)
            },
            about: None,
        },
        Work {
            name: "a slot is deleted",
            kernel: resident,
            before: |guest| convert(guest, TOLD.range(), Private, prefaulting).unwrap(),
            run: |guest| guest.vm.set(&deletion(&TOLD)),
            about: None,
        },
        Work {
            name: "a slot is made",
            kernel: resident,
            before: |guest| guest.vm.set(&deletion(&TOLD)).unwrap(),
            run: |guest| match guest.vm.set(&TOLD.memslot()) {
                Err(error) if error.reason == Reason::MemslotFixed => Ok(()),
                answer => answer,
            },
            about: None,
        },
    ]
}

#[test]
fn after_any_failure_the_same_call_ends_as_if_there_had_been_none() {
    let mut wrong = Vec::new();
    let (mut all, mut all_refused) = (0, 0);
    println!("{:55} {:>6} {:>6} {:>8}", "failing each call, with each errno", "calls", "cases", "refused");
    for work in all_works() {
        let clean = work.clean();
        let (mut cases, mut refusals) = (0, 0);
        for (call, count) in &clean.counts {
            for (number, errno) in
                (0..*count).flat_map(|n| errnos(*call).iter().map(move |errno| (n, *errno)))
            {
                let (refused, faults) = work.fail(&clean, *call, number, errno);
                cases += 1;
                refusals += usize::from(refused);
                let errno = kvmprep::kvm::Errno(errno);
                wrong.extend(
                    faults.iter().map(|what| format!("{}: {call:?} {number}, {errno}: {what}", work.name)),
                );
            }
        }
        let calls: u32 = clean.counts.values().sum();
        println!("{:55} {calls:>6} {cases:>6} {refusals:>8}", work.name);
        (all, all_refused) = (all + cases, all_refused + refusals);
    }
    println!("{:55} {:>6} {all:>6} {all_refused:>8}", "all", "");
    assert!(all > 1000, "{all} cases are too few to mean anything");
    assert!(wrong.is_empty(), "{} things are wrong:\n{}", wrong.len(), wrong.join("\n"));
}
