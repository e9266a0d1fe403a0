//! The simulated host against the kernel that this test runs on: random programs of mappings, advice and accesses, made on
//! real memory and on the simulated one. After each call its answer, the faults that it took and the state of every page
//! must be equal.
//!
//! It must never change anything outside its own addresses and files: no setting of the machine is touched. What the kernel
//! does not tell (before 6.7 it does not tell which pages are zero pages or huge), or what is disturbed by other sizes of
//! huge pages, is not tested, and that is said.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::io::Error;
use std::sync::Arc;

use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::host::simulated::{
    Advice, Child, File, HugeFile, Mapped, Place, Protection, Settings, SimulatedHost, Source, ThpPolicy,
};
use kvmprep_model::personality::Version;
use kvmprep_model::units::{Hva, Level};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

const PAGE: u64 = 4096;
const HUGE: u64 = 512;
/// Far from all that a process maps by itself.
const ARENA: u64 = 0x6000_0000_0000;
const ARENA_PAGES: u64 = 4 * HUGE;
const FILE_PAGES: u64 = 2 * HUGE;
const FILLED_WITH: u64 = 0x5a5a_5a5a;

#[derive(Clone, Copy, Debug)]
enum Kind {
    Anonymous,
    SharedAnonymous,
    Memfd { is_shared: bool, first: u64 },
    Filled { first: u64 },
    Huge { is_shared: bool, is_reserved: bool },
    HugeMemfd { is_shared: bool, first: u64 },
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Map(u64, u64, Protection, Kind),
    Unmap(u64, u64),
    Protect(u64, u64, Protection),
    Advise(u64, u64, Advice),
    Read(u64),
    Write(u64, u64),
    Punch(u64, u64),
    Allocate(u64, u64),
    PunchHuge(u64, u64),
    AllocateHuge(u64, u64),
    Fork,
    ChildExits,
}

use Operation::*;

/// What a call comes to on either side.
#[derive(PartialEq, Debug)]
struct Answer {
    result: std::result::Result<u64, i32>,
    faults: u64,
}

/// A page: what is mapped, and whether by a large entry.
type Page = (Mapped, bool);

struct Real {
    memfd: i32,
    filled: i32,
    huge: i32,
    pagemap: i32,
    child: Option<(i32, i32)>,
}

fn check(result: i64) -> std::result::Result<u64, i32> {
    if result < 0 {
        Err(Error::last_os_error().raw_os_error().expect("an error has a number"))
    } else {
        Ok(0)
    }
}

fn memfd(pages: u64, flags: u32) -> i32 {
    // SAFETY: the name is a C string; the file is this test's own.
    unsafe {
        let fd = libc::memfd_create(c"kvmprep-model".as_ptr(), flags | libc::MFD_CLOEXEC);
        if fd >= 0 {
            assert_eq!(libc::ftruncate(fd, (pages * PAGE) as i64), 0);
        }
        fd
    }
}

fn at(page: u64) -> *mut libc::c_void {
    (ARENA + page * PAGE) as *mut libc::c_void
}

fn prot(protection: Protection) -> i32 {
    (if protection.read { libc::PROT_READ } else { 0 })
        | (if protection.write { libc::PROT_WRITE } else { 0 })
}

const fn number(advice: Advice) -> i32 {
    match advice {
        Advice::DontNeed => libc::MADV_DONTNEED,
        Advice::Remove => libc::MADV_REMOVE,
        Advice::PopulateRead => libc::MADV_POPULATE_READ,
        Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
        Advice::HugePage => libc::MADV_HUGEPAGE,
        Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
        Advice::Collapse => 25,
        Advice::DontFork => libc::MADV_DONTFORK,
        Advice::DoFork => libc::MADV_DOFORK,
    }
}

fn minor_faults() -> u64 {
    // SAFETY: the structure is filled by the call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, &mut usage), 0);
        usage.ru_minflt as u64
    }
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    inverted: u64,
    mask: u64,
    any_of: u64,
    returned: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const PAGEMAP_SCAN: u64 = 0xc060_6610;
const IS_FILE: u64 = 1 << 2;
const IS_PRESENT: u64 = 1 << 3;
const IS_ZERO: u64 = 1 << 5;
const IS_HUGE: u64 = 1 << 6;

impl Real {
    fn new() -> Real {
        let filled = memfd(FILE_PAGES, 0);
        for page in 0..FILE_PAGES {
            // SAFETY: the word outlives the call.
            let written =
                unsafe { libc::pwrite(filled, (&FILLED_WITH as *const u64).cast(), 8, (page * PAGE) as i64) };
            assert_eq!(written, 8);
        }
        // SAFETY: the path is a C string.
        let pagemap = unsafe { libc::open(c"/proc/self/pagemap".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        Real {
            memfd: memfd(FILE_PAGES, 0),
            filled,
            huge: memfd(FILE_PAGES, libc::MFD_HUGETLB),
            pagemap,
            child: None,
        }
    }

    fn pages(&self) -> Option<Vec<Page>> {
        let mut regions = vec![Region::default(); ARENA_PAGES as usize];
        let categories = IS_FILE | IS_PRESENT | IS_ZERO | IS_HUGE;
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start: ARENA,
            end: ARENA + ARENA_PAGES * PAGE,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            mask: IS_PRESENT,
            returned: categories,
            ..Scan::default()
        };
        // SAFETY: the kernel fills at most as many regions as there are.
        let found = unsafe { libc::ioctl(self.pagemap, PAGEMAP_SCAN, &mut scan) };
        let found = usize::try_from(found).ok()?;
        let mut pages = vec![(Mapped::Nothing, false); ARENA_PAGES as usize];
        for region in &regions[..found] {
            let mapped = match region.categories {
                it if it & IS_ZERO != 0 => Mapped::Zero,
                it if it & IS_FILE != 0 => Mapped::File,
                _ => Mapped::Anonymous,
            };
            for page in (region.start - ARENA) / PAGE..(region.end - ARENA) / PAGE {
                pages[page as usize] = (mapped, region.categories & IS_HUGE != 0);
            }
        }
        Some(pages)
    }

    fn map(&self, start: u64, pages: u64, protection: Protection, kind: Kind) -> i64 {
        let shared = |is_shared| if is_shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        let (flags, fd, first) = match kind {
            Kind::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
            Kind::SharedAnonymous => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0),
            Kind::Memfd { is_shared, first } => (shared(is_shared), self.memfd, first),
            Kind::Filled { first } => (libc::MAP_PRIVATE, self.filled, first),
            Kind::Huge { is_shared, is_reserved } => {
                let reserve = if is_reserved { 0 } else { libc::MAP_NORESERVE };
                (shared(is_shared) | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | reserve, -1, 0)
            }
            Kind::HugeMemfd { is_shared, first } => (shared(is_shared), self.huge, first),
        };
        let flags = flags | libc::MAP_FIXED;
        // SAFETY: the addresses are this test's own.
        let address = unsafe {
            libc::mmap(at(start), (pages * PAGE) as usize, prot(protection), flags, fd, (first * PAGE) as i64)
        };
        if address == libc::MAP_FAILED { -1 } else { 0 }
    }

    fn apply(&mut self, operation: &Operation) -> Answer {
        let before = minor_faults();
        // SAFETY: the addresses and files are this test's own; what is accessed was populated first.
        let result = unsafe {
            match *operation {
                Map(start, pages, protection, kind) => check(self.map(start, pages, protection, kind)),
                Unmap(start, pages) => check(libc::munmap(at(start), (pages * PAGE) as usize).into()),
                Protect(start, pages, protection) => {
                    check(libc::mprotect(at(start), (pages * PAGE) as usize, prot(protection)).into())
                }
                Advise(start, pages, advice) => {
                    check(libc::madvise(at(start), (pages * PAGE) as usize, number(advice)).into())
                }
                Read(page) => check(libc::madvise(at(page), PAGE as usize, libc::MADV_POPULATE_READ).into()),
                Write(page, _) => {
                    check(libc::madvise(at(page), PAGE as usize, libc::MADV_POPULATE_WRITE).into())
                }
                Punch(first, pages) => self.fallocate(self.memfd, 3, first, pages),
                Allocate(first, pages) => self.fallocate(self.memfd, 0, first, pages),
                PunchHuge(first, pages) => self.fallocate(self.huge, 3, first, pages),
                AllocateHuge(first, pages) => self.fallocate(self.huge, 0, first, pages),
                Fork => {
                    self.fork();
                    Ok(0)
                }
                ChildExits => {
                    self.end_child();
                    Ok(0)
                }
            }
        };
        // Nothing is compared of the faults on the stack that follow a fork.
        let is_about_children = matches!(operation, Fork | ChildExits);
        let faults = if is_about_children { 0 } else { minor_faults() - before };
        // The access itself is not counted: the processor may remember the entry that was there before.
        // SAFETY: the page was populated for this access.
        let result = result.map(|_| unsafe {
            match *operation {
                Read(page) => at(page).cast::<u64>().read_volatile(),
                Write(page, word) => {
                    at(page).cast::<u64>().write_volatile(word);
                    0
                }
                _ => 0,
            }
        });
        Answer { result, faults }
    }

    fn fallocate(&self, fd: i32, mode: i32, first: u64, pages: u64) -> std::result::Result<u64, i32> {
        // SAFETY: no memory is passed.
        check(unsafe { libc::fallocate(fd, mode, (first * PAGE) as i64, (pages * PAGE) as i64) }.into())
    }

    fn fork(&mut self) {
        if self.child.is_some() {
            return;
        }
        let mut ends = [0; 2];
        // SAFETY: the child makes only calls that are allowed after a fork of many threads, and waits for the pipe's end.
        unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
            let pid = libc::fork();
            assert!(pid >= 0);
            if pid == 0 {
                let mut byte = 0u8;
                libc::close(ends[1]);
                libc::read(ends[0], (&raw mut byte).cast(), 1);
                libc::_exit(0);
            }
            libc::close(ends[0]);
            self.child = Some((pid, ends[1]));
        }
    }

    fn end_child(&mut self) {
        if let Some((pid, pipe)) = self.child.take() {
            // SAFETY: both are this test's own.
            unsafe {
                libc::close(pipe);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
        }
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.end_child();
        // SAFETY: the addresses and files are this test's own.
        unsafe {
            libc::munmap(at(0), (ARENA_PAGES * PAGE) as usize);
            for fd in [self.memfd, self.filled, self.huge, self.pagemap] {
                libc::close(fd);
            }
        }
    }
}

struct Simulated {
    host: Arc<SimulatedHost>,
    memfd: Arc<File>,
    filled: Arc<File>,
    huge: Arc<HugeFile>,
    child: Option<Child>,
}

fn hva(page: u64) -> Hva {
    Hva(ARENA + page * PAGE)
}

impl Simulated {
    fn new(settings: Settings, huge_pages: u64) -> Self {
        let host = SimulatedHost::new(settings);
        host.set_pool(Level::HUGE, huge_pages).unwrap();
        let huge = host.huge_memfd(Level::HUGE, FILE_PAGES / HUGE).unwrap();
        Simulated {
            memfd: host.memfd(FILE_PAGES),
            filled: host.regular_file(FILE_PAGES, FILLED_WITH),
            huge,
            child: None,
            host,
        }
    }

    fn source(&self, kind: Kind) -> Source {
        match kind {
            Kind::Anonymous => Source::Anonymous,
            Kind::SharedAnonymous => Source::SharedAnonymous,
            Kind::Memfd { is_shared, first } => Source::File { file: self.memfd.clone(), first, is_shared },
            Kind::Filled { first } => Source::File { file: self.filled.clone(), first, is_shared: false },
            Kind::Huge { is_shared, is_reserved } => {
                Source::HugeAnonymous { level: Level::HUGE, is_shared, is_reserved }
            }
            Kind::HugeMemfd { is_shared, first } => {
                Source::HugeFile { file: self.huge.clone(), first, is_shared, is_reserved: true }
            }
        }
    }

    fn apply(&mut self, operation: &Operation) -> Answer {
        let host = &self.host;
        let before = host.faults();
        let done = |result: Result<()>| result.map(|()| 0).map_err(|Errno(number)| number);
        let result = match *operation {
            Map(start, pages, protection, kind) => {
                done(host.map(Place::At(hva(start)), pages * PAGE, protection, self.source(kind)).map(|_| ()))
            }
            Unmap(start, pages) => done(host.unmap(hva(start), pages * PAGE)),
            Protect(start, pages, protection) => done(host.protect(hva(start), pages * PAGE, protection)),
            Advise(start, pages, advice) => done(host.advise(hva(start), pages * PAGE, advice)),
            Read(page) => done(host.advise(hva(page), PAGE, Advice::PopulateRead))
                .map(|_| host.read(hva(page)).unwrap()),
            Write(page, word) => done(host.advise(hva(page), PAGE, Advice::PopulateWrite))
                .inspect(|_| host.write(hva(page), word).unwrap()),
            Punch(first, pages) => done(host.punch(&self.memfd, first, pages)),
            Allocate(first, pages) => done(host.allocate(&self.memfd, first, pages)),
            PunchHuge(first, pages) => done(host.punch_huge(&self.huge, first, pages)),
            AllocateHuge(first, pages) => done(host.allocate_huge(&self.huge, first, pages)),
            Fork => {
                self.child.get_or_insert_with(|| host.fork());
                Ok(0)
            }
            ChildExits => {
                self.child = None;
                Ok(0)
            }
        };
        Answer { result, faults: host.faults() - before }
    }

    fn pages(&self) -> Vec<Page> {
        let page = |page| {
            let view = self.host.view(hva(page));
            (view.mapped, view.level > Level::SMALL)
        };
        (0..ARENA_PAGES).map(page).collect()
    }
}

/// Ranges that begin and end where something changes: at the frames of huge pages, one beside them, or anywhere.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let edge = || {
        prop_oneof![
            4 => (0..=4u64).prop_map(|frame| frame * HUGE),
            2 => (0..=4u64, 0..3u64).prop_map(|(frame, near)| (frame * HUGE + near).saturating_sub(1)),
            2 => 0..=ARENA_PAGES,
        ]
    };
    (edge(), edge()).prop_map(|(one, other)| {
        let (start, end) = (one.min(other), one.max(other).min(ARENA_PAGES));
        let start = start.min(ARENA_PAGES - 1);
        (start, end.max(start + 1) - start)
    })
}

fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => (0..4u64).prop_map(|frame| frame * HUGE),
        2 => (1..=4u64).prop_map(|frame| frame * HUGE - 1),
        3 => (0..4u64, 0..40u64).prop_map(|(frame, near)| frame * HUGE + near),
        3 => 0..ARENA_PAGES,
    ]
}

fn protection() -> impl Strategy<Value = Protection> {
    prop_oneof![
        6 => Just(Protection::READ_WRITE),
        2 => Just(Protection::READ),
        1 => Just(Protection::NONE),
        1 => Just(Protection { read: false, write: true }),
    ]
}

fn kind(has_pool: bool) -> impl Strategy<Value = Kind> {
    let first = || prop_oneof![Just(0), Just(HUGE), Just(1), Just(FILE_PAGES - 4)];
    let small = prop_oneof![
        5 => Just(Kind::Anonymous),
        1 => Just(Kind::SharedAnonymous),
        3 => (any::<bool>(), first()).prop_map(|(is_shared, first)| Kind::Memfd { is_shared, first }),
        1 => first().prop_map(|first| Kind::Filled { first }),
    ];
    let huge = prop_oneof![
        (any::<bool>(), any::<bool>())
            .prop_map(|(is_shared, is_reserved)| Kind::Huge { is_shared, is_reserved }),
        (any::<bool>(), 0..3u64)
            .prop_map(|(is_shared, first)| Kind::HugeMemfd { is_shared, first: first * HUGE }),
    ];
    if has_pool { prop_oneof![6 => small, 4 => huge].boxed() } else { small.boxed() }
}

fn advice() -> impl Strategy<Value = Advice> {
    prop_oneof![
        4 => Just(Advice::DontNeed),
        2 => Just(Advice::Remove),
        3 => Just(Advice::PopulateRead),
        3 => Just(Advice::PopulateWrite),
        4 => Just(Advice::HugePage),
        2 => Just(Advice::NoHugePage),
        2 => Just(Advice::Collapse),
        1 => Just(Advice::DontFork),
        1 => Just(Advice::DoFork),
    ]
}

fn operation(has_pool: bool) -> impl Strategy<Value = Operation> {
    let small = prop_oneof![
        6 => (range(), protection(), kind(has_pool)).prop_map(|((at, pages), protection, kind)| Map(at, pages, protection, kind)),
        1 => range().prop_map(|(at, pages)| Unmap(at, pages)),
        4 => (range(), protection()).prop_map(|((at, pages), protection)| Protect(at, pages, protection)),
        10 => (range(), advice()).prop_map(|((at, pages), advice)| Advise(at, pages, advice)),
        10 => page().prop_map(Read),
        10 => (page(), 1..1000u64).prop_map(|(page, word)| Write(page, word)),
        2 => range().prop_map(|(first, pages)| Punch(first, pages)),
        1 => (0..FILE_PAGES, 1..40u64).prop_map(|(first, pages)| Allocate(first, pages.min(FILE_PAGES - first))),
        1 => Just(Fork),
        2 => Just(ChildExits),
    ];
    let huge = prop_oneof![
        range().prop_map(|(first, pages)| PunchHuge(first, pages)),
        (0..FILE_PAGES, 1..40u64)
            .prop_map(|(first, pages)| AllocateHuge(first, pages.min(FILE_PAGES - first))),
    ];
    if has_pool { prop_oneof![47 => small, 2 => huge].boxed() } else { small.boxed() }
}

/// Half of the programs begin with memory in which huge pages come, and are.
fn beginning() -> impl Strategy<Value = Vec<Operation>> {
    let access = prop_oneof![Just(Advice::PopulateRead), Just(Advice::PopulateWrite)];
    let huge = access.prop_map(|access| {
        vec![
            Map(0, ARENA_PAGES, Protection::READ_WRITE, Kind::Anonymous),
            Advise(0, ARENA_PAGES, Advice::HugePage),
            Advise(0, ARENA_PAGES, access),
        ]
    });
    prop_oneof![Just(Vec::new()), huge]
}

fn word_of(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let chosen = text.split(['[', ']']).nth(1).map(str::to_owned);
    chosen.unwrap_or_else(|| text.trim().to_owned())
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// This machine, as far as it decides what is done with a process's memory.
fn this_machine() -> std::result::Result<(Settings, u64), String> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").map_err(|error| error.to_string())?;
    let mut numbers = release.split('.').map(|part| part.parse().unwrap_or(0));
    let version = Version(numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let thp = match word_of(&format!("{THP}/enabled")).as_str() {
        "always" => ThpPolicy::Always,
        "madvise" => ThpPolicy::Madvise,
        _ => ThpPolicy::Never,
    };
    for size in std::fs::read_dir(THP).into_iter().flatten().flatten() {
        let name = size.file_name().to_string_lossy().into_owned();
        let enabled = word_of(&format!("{THP}/{name}/enabled"));
        if name.starts_with("hugepages-")
            && !name.contains("2048")
            && !["never", ""].contains(&enabled.as_str())
        {
            return Err(format!("{name} are enabled"));
        }
    }
    let number = |name| word_of(&format!("{POOL}/{name}")).parse::<u64>().unwrap_or(0);
    let unused = number("free_hugepages") - number("resv_hugepages");
    let has_surplus = number("nr_overcommit_hugepages") > 0;
    Ok((Settings { thp, ..Settings::new(version) }, if has_surplus { 0 } else { unused }))
}

/// What the kernel has done that no program asked for: pages that khugepaged made huge, and huge pages that were not to be
/// had, as memory is in pieces.
fn disturbances() -> Vec<String> {
    const SHORTAGES: [&str; 2] = ["thp_fault_fallback ", "thp_collapse_alloc_failed "];
    let counts = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let shortages = counts.lines().filter(|line| SHORTAGES.iter().any(|name| line.starts_with(name)));
    let collapsed = word_of(&format!("{THP}/khugepaged/pages_collapsed"));
    shortages.map(String::from).chain([collapsed]).collect()
}

/// What differs is tried that often: what the simulated host has wrong it has wrong each time.
const TRIES: u32 = 5;

fn run(program: &[Operation], settings: Settings, huge_pages: u64) -> std::result::Result<(), TestCaseError> {
    let (mut real, mut simulated) = (Real::new(), Simulated::new(settings, huge_pages));
    for (step, operation) in program.iter().enumerate() {
        let ours = simulated.apply(operation);
        if ours.result == Err(libc::ENOSYS) {
            continue;
        }
        let theirs = real.apply(operation);
        prop_assert_eq!(&ours, &theirs, "step {}, {:?}: simulated, then real", step, operation);
        let (ours, theirs) = (simulated.pages(), real.pages().expect("it was asked before"));
        if let Some(page) = (0..ours.len()).find(|&page| ours[page] != theirs[page]) {
            let message = format!(
                "step {step}, {operation:?}: page {page} is {:?}, really {:?}",
                ours[page], theirs[page]
            );
            return Err(TestCaseError::fail(message));
        }
    }
    Ok(())
}

#[test]
fn the_simulated_host_does_what_this_kernel_does() {
    let skipped = |why: &str| eprintln!("skipped: {why}");
    let (settings, huge_pages) = match this_machine() {
        Ok(machine) => machine,
        Err(why) => return skipped(&why),
    };
    if Real::new().pages().is_none() {
        return skipped("this kernel does not tell which pages are huge or zero");
    }
    // What is kept per processor must not decide whether a page is the process's alone.
    // SAFETY: the set is filled before it is used.
    unsafe {
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu() as usize, &mut one);
        libc::sched_setaffinity(0, size_of_val(&one), &one);
    }
    let steps: u32 =
        std::env::var("KVMPREP_MODEL_STEPS").ok().and_then(|it| it.parse().ok()).unwrap_or(10_000);
    let config = Config { cases: steps.div_ceil(40), failure_persistence: None, ..Config::default() };
    let rest = proptest::collection::vec(operation(huge_pages > 0), 1..80);
    let program = (beginning(), rest).prop_map(|(beginning, rest)| [beginning, rest].concat());
    let result = TestRunner::new(config).run(&program, |program| {
        let before = disturbances();
        // Once in a while the kernel handles a fault twice, and on a busy machine it moves pages.
        let mut result = run(&program, settings, huge_pages);
        for _ in 1..TRIES {
            result = result.or_else(|_| run(&program, settings, huge_pages));
        }
        if disturbances() == before { result } else { Ok(()) }
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}
