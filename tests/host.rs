//! The host's memory on a kernel that answers as it is told: what it is asked when a job is planned, what
//! `CHECK_FREE` counts, and whose fault a failure is.

mod fake;

use fake::{Call, Fake};
use kvmprep::error::{Error, Reason};
use kvmprep::kvm::{FileKind, FileStatus, MEM_GUEST_MEMFD, MappedObject, Mapping, Region};
use kvmprep::memslot::{Memslot, Nature, SlotRecord};
use kvmprep::populate::job::{Job, Options};
use kvmprep::populate::plan::{HostMethod, Intent, Plan, Wish};
use kvmprep::populate::worker::Worker;
use kvmprep::range::{HUGE, PAGE, Range};
use kvmprep::vm::{Config, Vm};
use std::sync::Arc;
use std::sync::atomic::Ordering;

const HVA: u64 = 0x7f00_0000_0000;
const GPA: u64 = 1 << 32;
const SIZE: u64 = 8 * HUGE;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

const HOST_ONLY: Options = Options {
    intent: Intent::Write,
    host_only: true,
    huge_advice: false,
    require_stage2: false,
    check_free: false,
    skip_covered: false,
    dirty_logged_too: false,
    exact: false,
    for_conversion: false,
    timeout: None,
};

fn slot() -> Memslot {
    Memslot {
        region: Region {
            slot: 1,
            flags: 0,
            gpa: GPA,
            size: SIZE,
            hva: HVA,
            guest_memfd: -1,
            guest_memfd_offset: 0,
        },
        backing: None,
        file: None,
        nature: Nature::default(),
    }
}

/// A kernel with this behind the guest's memory.
fn fake(object: MappedObject, shared: bool, page_size: u64) -> Fake {
    let kernel = Fake::new(Range { start: HVA, end: HVA + SIZE });
    for mapping in kernel.mappings.lock().unwrap().iter_mut() {
        *mapping = Mapping { object, shared, page_size, ..*mapping };
    }
    kernel
}

fn anonymous() -> Fake {
    fake(MappedObject::Anonymous, false, PAGE)
}

fn vm_of(kernel: Fake, slot: Memslot) -> (Arc<Fake>, Arc<Vm>) {
    let kernel = Arc::new(kernel);
    let config = Config { vm_fd: 3, gpa_bits: Some(40), ..Config::default() };
    let vm = Vm::new(kernel.clone(), config).unwrap();
    vm.set_memslots(&[slot]).unwrap();
    (kernel, Arc::new(vm))
}

/// What a job says after `between`, once planned.
fn verdict(kernel: Fake, slot: Memslot, between: impl Fn(&Fake)) -> Result<(), Error> {
    let (kernel, vm) = vm_of(kernel, slot);
    let job = Job::new(&vm, &[], HOST_ONLY)?;
    between(&kernel);
    job.run(Worker::visitor(&*kernel, None, &[])?, &mut |_| {});
    job.verdict()
}

// ---- Planning ----

#[test]
fn where_a_look_costs_all_mappings_a_plan_takes_one_and_each_plan_its_own() {
    let mut kernel = anonymous();
    kernel.has_no_query = true;
    let pieces = 1000;
    *kernel.mappings.lock().unwrap() = (0..pieces)
        .map(|at| Mapping {
            start: HVA + at * SIZE / pieces / PAGE * PAGE,
            end: HVA + (at + 1) * SIZE / pieces / PAGE * PAGE,
            offset: 0,
            inode: 0,
            on_mount: false,
            readable: true,
            writable: true,
            shared: at % 2 == 0,
            page_size: 0,
            object: MappedObject::Anonymous,
        })
        .collect();
    let mut record = SlotRecord::default();
    record.replace(&slot(), None);
    let wish = Wish {
        intent: Intent::Write,
        stage2: true,
        dirty_logged_too: false,
        has_private_memory: true,
        told: None,
    };
    let before = kernel.calls.load(Ordering::Relaxed);
    let plan = Plan::new(&kernel, &record, &[], wish).unwrap();
    assert_eq!(kernel.calls.load(Ordering::Relaxed) - before, 1);
    assert_eq!(plan.segments.len() as u64, pieces);
    assert_eq!(plan.segments.iter().map(|s| s.range.size()).sum::<u64>(), SIZE);

    kernel.mappings.lock().unwrap().remove(500);
    let error = Plan::new(&kernel, &record, &[], wish).unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::EFAULT, Reason::NoHostMapping));
}

#[test]
fn a_guest_memfd_of_a_vm_without_private_memory_is_not_what_the_guest_sees() {
    let mut record = SlotRecord::default();
    let mut slot = slot();
    slot.region.flags = MEM_GUEST_MEMFD;
    slot.region.guest_memfd = 7;
    record.replace(&slot, None);
    for has_private_memory in [true, false] {
        let wish = Wish {
            intent: Intent::Write,
            stage2: true,
            dirty_logged_too: false,
            has_private_memory,
            told: None,
        };
        let plan = Plan::new(&anonymous(), &record, &[], wish).unwrap();
        let segment = &plan.segments[0];
        let private: Vec<Range> = Some(segment.range).filter(|_| has_private_memory).into_iter().collect();
        assert_eq!(segment.private_parts(segment.range, None), private, "all of it, while nobody has said");
        let side = segment.private_side(segment.range).map(|side| (side.host, side.file));
        assert_eq!(side, has_private_memory.then_some((HostMethod::Allocate, Some((7, 0)))));
        assert_eq!(segment.host, HostMethod::PopulateWrite);
    }
}

/// What is allocated before it is touched has no huge pages, where those depend on advice.
#[test]
fn shared_memory_that_may_have_huge_pages_is_not_allocated_first() {
    const POLICY: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    const OF_2M: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled";
    let policy = |chosen: &str| format!("always within_size advise [{chosen}] deny force\n");
    for (all, of_2m, host) in [
        ("never", None, HostMethod::AllocateAndPopulate),
        ("never", Some("inherit"), HostMethod::AllocateAndPopulate),
        ("never", Some("advise"), HostMethod::PopulateWrite),
        ("advise", None, HostMethod::PopulateWrite),
        ("advise", Some("never"), HostMethod::AllocateAndPopulate),
        ("deny", Some("always"), HostMethod::AllocateAndPopulate),
        ("force", Some("never"), HostMethod::PopulateWrite),
    ] {
        let mut kernel = Fake::new(Range::new(HVA, SIZE).unwrap());
        kernel.mappings.lock().unwrap()[0].object = MappedObject::Shmem;
        kernel.mappings.lock().unwrap()[0].shared = true;
        kernel.files.insert(POLICY.into(), policy(all));
        kernel.files.extend(of_2m.map(|of_2m| (OF_2M.to_string(), policy(of_2m))));
        let mut record = SlotRecord::default();
        record.replace(&Memslot { file: Some((7, 0)), ..slot() }, None);
        let wish = Wish {
            intent: Intent::Write,
            stage2: true,
            dirty_logged_too: false,
            has_private_memory: false,
            told: None,
        };
        let plan = Plan::new(&kernel, &record, &[], wish).unwrap();
        assert_eq!(plan.segments[0].host, host, "{all} {of_2m:?}");
    }
}

// ---- CHECK_FREE ----

fn check(
    mut kernel: Fake,
    files: &[(&'static str, String)],
    slot: Memslot,
    intent: Intent,
) -> Result<(), Error> {
    kernel.files.extend(files.iter().map(|(path, text)| (path.to_string(), text.clone())));
    let (_, vm) = vm_of(kernel, slot);
    Job::new(&vm, &[], Options { check_free: true, intent, ..HOST_ONLY }).map(drop)
}

fn meminfo(available: u64, swap: u64) -> (&'static str, String) {
    ("/proc/meminfo", format!("MemAvailable: {} kB\nSwapFree: {} kB\n", available >> 10, swap >> 10))
}

fn assert_short(result: Result<(), Error>, reason: Reason) {
    let error = result.unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::ENOMEM, reason));
}

#[test]
fn free_swap_is_memory() {
    assert_short(
        check(anonymous(), &[meminfo(SIZE - PAGE, 0)], slot(), Intent::Write),
        Reason::MemoryShortage,
    );
    check(anonymous(), &[meminfo(SIZE - PAGE, PAGE)], slot(), Intent::Write).unwrap();
}

/// Limits of a cgroup with half of what is needed free, and this much swap.
fn cgroup(swap_max: &str) -> Vec<(&'static str, String)> {
    vec![
        ("/sys/fs/cgroup/memory.max", (2 * SIZE).to_string()),
        ("/sys/fs/cgroup/memory.current", (2 * SIZE).to_string()),
        (
            "/sys/fs/cgroup/memory.stat",
            format!("inactive_file {}\nactive_file 0\nslab_reclaimable 0\n", SIZE / 2),
        ),
        ("/sys/fs/cgroup/memory.swap.max", swap_max.to_string()),
        ("/sys/fs/cgroup/memory.swap.current", PAGE.to_string()),
    ]
}

#[test]
fn what_looks_like_the_root_cgroup_has_limits_and_swap_of_its_own() {
    for path in ["/", "/inner"] {
        for (swap, swap_max, fits) in [
            (0, "max".to_string(), false),
            (SIZE, "max".to_string(), true),
            (SIZE, (SIZE / 2).to_string(), false),
            (SIZE, (SIZE / 2 + PAGE).to_string(), true),
        ] {
            let mut files = cgroup(&swap_max);
            files.push(meminfo(4 * SIZE, swap));
            files.push(("/proc/self/cgroup", format!("0::{path}\n")));
            let result = check(anonymous(), &files, slot(), Intent::Write);
            assert_eq!(result.is_ok(), fits, "{path} {swap} {swap_max}");
            if let Err(error) = result {
                assert!(error.message.contains("/sys/fs/cgroup"), "{}", error.message);
            }
        }
    }
}

#[test]
fn huge_pages_of_a_size_that_nobody_tells_are_not_counted_as_memory() {
    let empty = [meminfo(0, 0)];
    check(fake(MappedObject::Hugetlb, false, 0), &empty, slot(), Intent::Write).unwrap();

    let smaps = format!("{HVA:x}-{:x} rw-p 0 00:00 0\nKernelPageSize: 2048 kB\n", HVA + SIZE);
    let pool = |free: u64| {
        [
            ("/proc/self/smaps", smaps.clone()),
            ("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", free.to_string()),
            ("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages", "0".to_string()),
            ("/sys/kernel/mm/hugepages/hugepages-2048kB/surplus_hugepages", "0".to_string()),
        ]
    };
    assert_short(
        check(fake(MappedObject::Hugetlb, false, 0), &pool(7), slot(), Intent::Write),
        Reason::HugetlbShortage,
    );
    check(fake(MappedObject::Hugetlb, false, 0), &pool(8), slot(), Intent::Write).unwrap();

    // Shared ones may be there already, filled by whoever has them mapped too: only the file tells.
    check(fake(MappedObject::Hugetlb, true, 0), &pool(0), slot(), Intent::Write).unwrap();
    let with_file = Memslot { file: Some((9, 0)), ..slot() };
    for (allocated, fits) in [(0, false), (SIZE - HUGE, false), (SIZE, true)] {
        let mut kernel = fake(MappedObject::Hugetlb, true, 0);
        kernel.file_kind = FileKind { object: MappedObject::Hugetlb, page_size: HUGE };
        kernel.file_status = FileStatus { length: SIZE, allocated, ..kernel.file_status };
        assert_eq!(check(kernel, &pool(0), with_file, Intent::Write).is_ok(), fits, "{allocated}");
    }
}

#[test]
fn reading_a_private_mapping_takes_only_what_its_file_lacks() {
    for (cached, intent, fits) in
        [(SIZE, Intent::Read, true), (SIZE - PAGE, Intent::Read, false), (SIZE, Intent::Write, false)]
    {
        let mut kernel = fake(MappedObject::Shmem, false, PAGE);
        kernel.cached = cached;
        let result = check(kernel, &[meminfo(0, 0)], slot(), intent);
        assert_eq!(result.is_ok(), fits, "{cached} {intent:?}");
    }
}

// ---- Failures ----

#[test]
fn memory_unmapped_behind_a_job_is_no_shortage() {
    for has_no_query in [false, true] {
        for page_size in [PAGE, HUGE] {
            let mut kernel = fake(MappedObject::Hugetlb, false, page_size);
            kernel.has_no_query = has_no_query;
            let error = verdict(kernel, slot(), |kernel| {
                kernel.mappings.lock().unwrap()[0].start = HVA + HUGE / 2;
                kernel.fail(Call::Populate, 0, libc::ENOMEM);
            })
            .unwrap_err();
            assert_eq!(
                (error.errno, error.reason),
                (libc::EFAULT, Reason::NoHostMapping),
                "{}",
                error.message
            );
            assert_eq!(error.range.unwrap().start, GPA);
        }
    }
}

#[test]
fn a_shortage_of_mapped_memory_is_one() {
    let error =
        verdict(anonymous(), slot(), |kernel| kernel.fail(Call::Populate, 3, libc::ENOMEM)).unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::ENOMEM, Reason::MemoryShortage));
    assert_eq!(error.range.unwrap().start, GPA + 3 * HUGE);
}

#[test]
fn a_pool_is_blamed_only_when_it_is_empty() {
    let huge = |free: &str, reserved: &str| {
        let mut kernel = fake(MappedObject::Hugetlb, true, HUGE);
        for (name, count) in [("free", free), ("resv", reserved), ("nr", "8")] {
            let path = format!("{POOL}/{name}_hugepages");
            kernel.files.insert(path, format!("{count}\n"));
        }
        kernel
    };
    let failing = |errno| move |kernel: &Fake| kernel.fail(Call::Populate, 0, errno);
    for (errno, free, reserved, reason) in [
        (libc::EFAULT, "0", "0", Reason::HugetlbShortage),
        (libc::EFAULT, "3", "3", Reason::HugetlbShortage),
        (libc::EFAULT, "3", "0", Reason::NoHostMapping),
        (libc::ENOMEM, "3", "0", Reason::HugetlbShortage),
    ] {
        let error = verdict(huge(free, reserved), slot(), failing(errno)).unwrap_err();
        assert_eq!(error.reason, reason, "{errno} {free} {reserved}");
    }
    // A file's own size is the better witness.
    let with_file = Memslot { file: Some((9, 0)), ..slot() };
    for (length, reason) in [(0, Reason::NoHostMapping), (SIZE, Reason::HugetlbShortage)] {
        let mut kernel = huge("3", "0");
        kernel.file_kind = FileKind { object: MappedObject::Hugetlb, page_size: HUGE };
        kernel.file_status = FileStatus { length, allocated: 0, ..kernel.file_status };
        assert_eq!(verdict(kernel, with_file, failing(libc::EFAULT)).unwrap_err().reason, reason);
    }
    let short = fake(MappedObject::Shmem, true, PAGE);
    let error = verdict(short, slot(), failing(libc::EFAULT)).unwrap_err();
    assert_eq!((error.errno, error.reason), (libc::EFAULT, Reason::NoHostMapping));
}

#[test]
fn memory_that_does_not_let_itself_be_populated_is_told_from_an_old_kernel() {
    for (release, hints) in
        [("5.10.0-30-amd64", ["Linux 5.14", ""]), ("6.12.1", ["KVMPREP_MEMSLOT_DEVICE", "PROT_NONE"])]
    {
        let mut kernel = anonymous();
        kernel.files.insert("/proc/sys/kernel/osrelease".into(), format!("{release}\n"));
        let error =
            verdict(kernel, slot(), |kernel| kernel.fail(Call::Populate, 0, libc::EINVAL)).unwrap_err();
        assert_eq!((error.errno, error.reason), (libc::EOPNOTSUPP, Reason::KernelRefused));
        assert!(hints.iter().all(|hint| error.hint.contains(hint)), "{}", error.hint);
        assert!(error.hint.len() < 256, "{}", error.hint);
    }
}
