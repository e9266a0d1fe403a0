//! The host held against the kernel that it runs on: with everything that /proc may say, and without what older kernels or an
//! unprivileged process do not have.

use super::*;
use kvmprep_model::memslot::{FileArgument, Region};
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::stats::VmStatistics;
use kvmprep_model::units::{Privacy, Width};
use kvmprep_model::vm::{Access, Exit, Machine, Operation, PreFault, Run, Vcpu, Vm};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// One test at a time: a fork changes all of the process's memory.
static TURN: Mutex<()> = Mutex::new(());

const PAGES: u64 = 64;
const HUGE_PAGE: u64 = 2 << 20;

/// What of /proc a host may use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kernel {
    New,
    NewUnprivileged,
    Old,
    OldUnprivileged,
}

const KERNELS: [Kernel; 4] = [Kernel::New, Kernel::NewUnprivileged, Kernel::Old, Kernel::OldUnprivileged];

impl Kernel {
    fn host(self) -> Arc<ProcessHost> {
        let (mut pagemap, mut mappings) = (Pagemap::open().unwrap(), Mappings::open().unwrap());
        if matches!(self, Kernel::Old | Kernel::OldUnprivileged) {
            (pagemap, mappings) = (pagemap.without_scan(), mappings.without_query());
        }
        if matches!(self, Kernel::NewUnprivileged | Kernel::OldUnprivileged) {
            pagemap = pagemap.without_frames();
        }
        ProcessHost::of(pagemap, mappings).unwrap()
    }
}

/// Does a test with each kind of host.
fn with_each(test: impl Fn(Kernel, &Arc<ProcessHost>)) {
    let _turn = lock(&TURN);
    for kernel in KERNELS {
        println!("{kernel:?}");
        test(kernel, &kernel.host());
    }
}

/// Memory of the process's.
struct Memory {
    start: u64,
    size: u64,
}

impl Memory {
    fn map(size: u64, flags: c_int, fd: RawFd) -> Option<Self> {
        Self::map_at(0, size, flags, fd)
    }

    fn map_at(at: u64, size: u64, flags: c_int, fd: RawFd) -> Option<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: what is there already is the test's own, if anything.
        let start = unsafe { libc::mmap(at as *mut _, size as usize, rights, flags, fd, 0) };
        (start != libc::MAP_FAILED).then_some(Memory { start: start as u64, size })
    }

    fn anonymous(pages: u64) -> Self {
        let memory = Self::map(pages * PAGE_SIZE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
            .expect("there is memory");
        assert_eq!(memory.advise(0, pages, libc::MADV_NOHUGEPAGE), 0);
        memory
    }

    /// At a boundary of huge pages; they are used if the machine does.
    fn huge(count: u64) -> Self {
        let room = Self::map((count + 1) * HUGE_PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).unwrap();
        let memory = Memory { start: room.start.next_multiple_of(HUGE_PAGE), size: count * HUGE_PAGE };
        std::mem::forget(room);
        memory.advise(0, memory.pages(), libc::MADV_HUGEPAGE);
        memory
    }

    fn pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }

    fn at(&self, page: u64) -> u64 {
        self.start + page * PAGE_SIZE
    }

    fn hva(&self, page: u64) -> Hva {
        Hva(self.at(page))
    }

    fn range(&self, pages: Range<u64>) -> Range<u64> {
        self.at(pages.start)..self.at(pages.end)
    }

    fn advise(&self, first: u64, pages: u64, advice: c_int) -> c_int {
        // SAFETY: it is the test's memory, and nobody relies on what it holds.
        unsafe { libc::madvise(self.at(first) as *mut _, (pages * PAGE_SIZE) as usize, advice) }
    }

    fn populate(&self) {
        assert_eq!(self.advise(0, self.pages(), libc::MADV_POPULATE_WRITE), 0);
    }

    fn protect(&self, rights: c_int) {
        // SAFETY: it is the test's memory.
        assert_eq!(unsafe { libc::mprotect(self.start as *mut _, self.size as usize, rights) }, 0);
    }

    fn word(&self, page: u64) -> *mut u64 {
        self.at(page) as *mut u64
    }

    fn read(&self, page: u64) -> u64 {
        // SAFETY: it is mapped, and words of it are looked at in this way alone.
        unsafe { self.word(page).read_volatile() }
    }

    fn write(&self, page: u64, word: u64) {
        // SAFETY: as above.
        unsafe { self.word(page).write_volatile(word) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(self.start as *mut _, self.size as usize) };
    }
}

/// A memfd of so many bytes.
fn memfd(size: u64, flags: u32) -> Option<RawFd> {
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC | flags) };
    // SAFETY: it is the test's.
    (fd >= 0 && unsafe { libc::ftruncate(fd, size as i64) } == 0).then_some(fd)
}

fn close(fd: RawFd) {
    // SAFETY: it is the test's.
    unsafe { libc::close(fd) };
}

/// Writes down what it is told.
#[derive(Default)]
struct Listener(Mutex<Vec<Range<u64>>>);

impl Notifier for Listener {
    fn invalidate_start(&self, start: Hva, end: Hva) {
        lock(&self.0).push(start.0..end.0);
    }

    fn invalidate_end(&self, _: Hva, _: Hva) {}
}

impl Listener {
    fn of(host: &ProcessHost) -> Arc<Self> {
        let listener = Arc::new(Listener::default());
        let told: Weak<Listener> = Arc::downgrade(&listener);
        host.register(told);
        listener
    }

    /// What it was told since the last time.
    fn heard(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut lock(&self.0))
    }
}

fn follow(host: &ProcessHost, hva: Hva, write: bool) -> Result<bool, FollowError> {
    host.follow(hva, write).map(|page| {
        assert_eq!(page.pfn, Pfn(hva.page()));
        page.writable
    })
}

#[test]
fn the_zero_page_is_read_only_and_kvm_is_told_when_it_goes() {
    with_each(|kernel, host| {
        let memory = Memory::anonymous(4);
        let listener = Listener::of(host);
        assert_eq!(follow(host, memory.hva(0), false), Ok(false));
        assert_eq!(listener.heard(), []);
        assert_eq!(follow(host, memory.hva(0), true), Ok(true));
        assert_eq!(listener.heard(), [memory.range(0..1)], "{kernel:?}");
        assert_eq!(follow(host, memory.hva(0), false), Ok(true));
        assert_eq!(follow(host, memory.hva(1), true), Ok(true));
        memory.write(2, 7);
        assert_eq!(follow(host, memory.hva(2), false), Ok(true));
        assert_eq!(listener.heard(), [], "nothing was there before");
        assert_eq!(host.load(Pfn(memory.hva(2).page())), 7);
        assert_eq!(follow(host, Hva(0), false), Err(FollowError::NoMapping));
    });
}

#[test]
fn what_the_program_did_itself_is_found_when_somebody_looks() {
    with_each(|kernel, host| {
        let memory = Memory::anonymous(4);
        let listener = Listener::of(host);
        for page in 0..4 {
            assert_eq!(follow(host, memory.hva(page), false), Ok(false));
        }
        let settle = |pages: Range<u64>| host.settle(memory.hva(pages.start), memory.hva(pages.end));
        settle(0..4);
        assert_eq!(listener.heard(), []);
        memory.write(1, 1);
        memory.write(2, 1);
        settle(0..2);
        assert_eq!(listener.heard(), [memory.range(1..2)], "{kernel:?}");
        settle(0..4);
        assert_eq!(listener.heard(), [memory.range(2..3)]);
        memory.advise(3, 1, libc::MADV_DONTNEED);
        settle(0..4);
        assert_eq!(listener.heard(), [memory.range(3..4)]);
        settle(0..4);
        assert_eq!(listener.heard(), []);
    });
}

#[test]
fn memory_that_is_gone_or_guarded_is_not_followed() {
    with_each(|_, host| {
        let memory = Memory::anonymous(2);
        let listener = Listener::of(host);
        memory.write(0, 1);
        host.changing(&[memory.range(0..2)], || memory.protect(libc::PROT_READ));
        assert_eq!(listener.heard(), [memory.range(0..2)]);
        assert_eq!(follow(host, memory.hva(0), true), Err(FollowError::NoMapping));
        assert_eq!(follow(host, memory.hva(0), false), Ok(false));
        host.changing(&[memory.range(0..2)], || memory.protect(libc::PROT_NONE));
        assert_eq!(follow(host, memory.hva(0), false), Err(FollowError::NoMapping));
        host.changing(&[memory.range(0..2)], || memory.protect(libc::PROT_READ | libc::PROT_WRITE));
        assert_eq!(follow(host, memory.hva(0), false), Ok(true));
        let (start, range) = (memory.hva(0), memory.range(0..2));
        host.changing(&[range], || drop(memory));
        assert_eq!(follow(host, start, false), Err(FollowError::NoMapping));
        let mut bytes = [1; 8];
        host.read_frame(Pfn(start.page()), 0, &mut bytes);
        assert_eq!(bytes, [0; 8], "a frame that is gone is read without a fault");
        host.write_frame(Pfn(start.page()), 0, &bytes);
    });
}

#[test]
fn a_part_of_a_huge_page_takes_all_of_it_along() {
    with_each(|kernel, host| {
        let populated = || {
            let memory = Memory::huge(2);
            memory.populate();
            memory
        };
        let Some(memory) = with_huge_pages(populated) else {
            return println!("memory is in pieces");
        };
        if host.level(memory.hva(0)) == Level::SMALL {
            assert!(!are_huge_pages_used(), "{kernel:?}");
            return println!("no transparent huge pages here");
        }
        let listener = Listener::of(host);
        assert_eq!(follow(host, memory.hva(5), false), Ok(true));
        let advise = |first, pages| {
            let advice = libc::MADV_DONTNEED;
            host.advising(memory.at(first), pages * PAGE_SIZE, advice, || {
                memory.advise(first, pages, advice)
            });
        };
        advise(511, 2);
        assert_eq!(listener.heard(), [memory.range(0..1024)]);
        assert_eq!(host.level(memory.hva(5)), Level::SMALL);
        advise(5, 2);
        assert_eq!(listener.heard(), [memory.range(5..7)]);
        assert_eq!(host.level(memory.hva(5)), Level::SMALL);
    });
}

/// Huge pages are had by whom asks for them.
fn are_huge_pages_used() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|text| !text.contains("[never]"))
}

/// What comes of it when nobody on this machine is refused a huge page meanwhile, as may be where memory is in pieces.
fn with_huge_pages<T>(act: impl Fn() -> T) -> Option<T> {
    let refused = || {
        let counts = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
        counts.lines().find(|line| line.starts_with("thp_fault_fallback ")).map(str::to_owned)
    };
    (0..10).find_map(|_| {
        let before = refused();
        let found = act();
        (refused() == before).then_some(found)
    })
}

#[test]
fn advice_is_told_as_far_as_it_changes_anything() {
    with_each(|_, host| {
        let fd = memfd(8 * PAGE_SIZE, 0).unwrap();
        let first = Memory::map(8 * PAGE_SIZE, libc::MAP_SHARED, fd).unwrap();
        let second = Memory::map(8 * PAGE_SIZE, libc::MAP_PRIVATE, fd).unwrap();
        let listener = Listener::of(host);
        let advise = |advice| {
            host.advising(first.at(2), 3 * PAGE_SIZE, advice, || assert_eq!(first.advise(2, 3, advice), 0));
            let mut heard = listener.heard();
            heard.sort_unstable_by_key(|range| range.start != first.at(2));
            heard
        };
        assert_eq!(advise(libc::MADV_POPULATE_WRITE), []);
        assert_eq!(advise(libc::MADV_NOHUGEPAGE), []);
        assert_eq!(advise(libc::MADV_DONTNEED), [first.range(2..5)]);
        assert_eq!(advise(libc::MADV_REMOVE), [first.range(2..5), second.range(2..5)]);
        close(fd);
    });
}

#[test]
fn a_hole_in_a_file_is_told_wherever_the_file_is_mapped() {
    with_each(|_, host| {
        let fd = memfd(8 * PAGE_SIZE, 0).unwrap();
        let memory = Memory::map(8 * PAGE_SIZE, libc::MAP_SHARED, fd).unwrap();
        memory.write(3, 9);
        assert_eq!(follow(host, memory.hva(3), false), Ok(true));
        let listener = Listener::of(host);
        let punch = |offset, length| {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: the file is the test's.
            let call = || unsafe { libc::fallocate(fd, mode, offset as i64, length as i64) };
            assert_eq!(host.file_changing(fd, offset, length, call), 0);
        };
        punch(3 * PAGE_SIZE + 8, PAGE_SIZE);
        assert_eq!(listener.heard(), [], "no page goes");
        punch(3 * PAGE_SIZE, PAGE_SIZE + 8);
        assert_eq!(listener.heard(), [memory.range(3..4)]);
        assert_eq!(memory.read(3), 0);
        // SAFETY: the file is the test's.
        host.file_changing(fd, 6 * PAGE_SIZE, u64::MAX, || unsafe {
            libc::ftruncate(fd, 6 * PAGE_SIZE as i64)
        });
        assert_eq!(listener.heard(), [memory.range(6..8)]);
        assert_eq!(follow(host, memory.hva(7), true), Err(FollowError::NoMapping), "the file has ended");
        close(fd);
    });
}

#[test]
fn frames_of_a_guest_memfd_are_what_the_program_has_mapped_of_it() {
    with_each(|_, host| {
        let frames = host.new_file(1 << 40).unwrap();
        let fd = host.take_new_file().unwrap();
        assert_eq!(host.take_new_file(), None);
        let memory = Memory::map(1024 * PAGE_SIZE, libc::MAP_SHARED, fd).unwrap();
        let listener = Listener::of(host);
        let pfn = frames.allocate(600).unwrap();
        assert_eq!(frames.allocate(600), Ok(pfn));
        assert_eq!(frames.allocate(601), Ok(pfn.plus(1)));
        assert_ne!(frames.allocate(1 << 35).unwrap(), frames.allocate(88).unwrap());
        assert_eq!(host.load(pfn), 0);
        host.write_frame(pfn, 8, &[1, 2, 3]);
        let mut page = [0; PAGE_SIZE as usize];
        page[8..11].copy_from_slice(&[1, 2, 3]);
        assert_eq!(host.page(pfn), page);
        memory.write(600, 77);
        assert_eq!(host.load(pfn), 77);
        frames.release(600);
        assert_eq!(listener.heard(), [memory.range(600..601)]);
        assert_eq!((memory.read(600), host.load(pfn)), (0, 0));
        drop(memory);
        host.mapped();
        frames.release(601);
        assert_eq!(listener.heard(), []);
        drop(frames);
        host.store(pfn, 5);
        assert_eq!(host.load(pfn), 0, "the file has gone");
        let other = host.new_file(1).unwrap();
        let again = other.allocate(0).unwrap();
        assert!(again.0 >> 9 <= pfn.0 >> 9, "its numbers are used again");
        assert_eq!(host.load(again), 0);
    });
}

/// A virtual machine whose memory is the process's.
struct Guest {
    vm: Arc<Vm>,
    vcpu: Arc<Vcpu>,
}

impl Guest {
    fn new(host: &Arc<ProcessHost>, memory: &Memory) -> Self {
        let vm = Vm::new(
            &Machine::new(Personality::with_everything(Version(7, 3)), host.clone()),
            VmType::Default,
        )
        .unwrap();
        let region = Region {
            slot: 0,
            flags: 0,
            gpa: 0,
            size: memory.size,
            userspace_addr: memory.start,
            guest_memfd: FileArgument::BadFd,
            guest_memfd_offset: 0,
        };
        vm.set_user_memory_region(&region).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Guest { vm, vcpu }
    }

    fn pre_fault(&self, size: u64) {
        let mut range = PreFault { gpa: 0, size, flags: 0 };
        assert_eq!((self.vcpu.pre_fault(&mut range), range.size), (Ok(()), 0));
    }

    /// Does this with the first word of each page, and says how many faults that took.
    fn touch(&self, memory: &Memory, operation: Operation) -> (u64, Vec<u64>) {
        for page in 0..memory.pages() {
            let (gpa, width) = (page * PAGE_SIZE, Width::Eight);
            self.vcpu.queue(Access { gpa, width, operation, privacy: Privacy::Shared });
        }
        let before = self.vcpu.statistics().pf_taken;
        let Run { exit, read } = self.vcpu.run();
        assert_eq!(exit, Exit::Done);
        (self.vcpu.statistics().pf_taken - before, read)
    }

    fn writes(&self, memory: &Memory) -> u64 {
        self.touch(memory, Operation::Write(1)).0
    }
}

/// The faults of a guest that writes each page: with nothing done before; pre-faulted; populated by the process; both.
fn faults_by_way(host: &Arc<ProcessHost>, map: impl Fn() -> Memory) -> [u64; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(is_populated, is_pre_faulted)| {
        let memory = map();
        host.mapped();
        if is_populated {
            memory.populate();
        }
        let guest = Guest::new(host, &memory);
        if is_pre_faulted {
            guest.pre_fault(memory.size);
        }
        guest.writes(&memory)
    })
}

/// As measured on real kernels.
#[test]
fn each_kind_of_memory_costs_a_guest_the_faults_that_it_costs_with_a_kernel() {
    with_each(|_, host| {
        let anonymous = faults_by_way(host, || Memory::anonymous(PAGES));
        assert_eq!(anonymous, [PAGES, 2 * PAGES, PAGES, 0]);
        let fd = memfd(PAGES * PAGE_SIZE, 0).unwrap();
        let file = |flags| faults_by_way(host, || Memory::map(PAGES * PAGE_SIZE, flags, fd).unwrap());
        assert_eq!(file(libc::MAP_PRIVATE), [PAGES, 2 * PAGES, PAGES, 0]);
        assert_eq!(file(libc::MAP_SHARED), [PAGES, 0, PAGES, 0]);
        close(fd);
    });
}

/// By that, older kernels tell it from small zero pages.
fn is_huge_zero_page_of_file(host: &ProcessHost) -> bool {
    let memory = Memory::huge(1);
    memory.read(0);
    host.pagemap.entry(memory.hva(0).page()).is_of_file()
}

#[test]
fn so_do_huge_pages() {
    with_each(|kernel, host| {
        if !are_huge_pages_used() {
            return println!("no transparent huge pages here");
        }
        if matches!(kernel, Kernel::Old | Kernel::OldUnprivileged) && !is_huge_zero_page_of_file(host) {
            return println!("{kernel:?}: this kernel would have told of huge pages in another way");
        }
        let faults = with_huge_pages(|| faults_by_way(host, || Memory::huge(2)));
        let Some([nothing, pre_faulted, populated, both]) = faults else {
            return println!("memory is in pieces");
        };
        assert_eq!((nothing, populated, both), (2, 2, 0));
        // Older kernels map the huge zero page by small pages as soon as one is written, until they are put together again.
        assert!((4..=2 * 1024).contains(&pre_faulted), "{pre_faulted}");
        println!("{kernel:?}: {pre_faulted} faults after a pre-fault alone");
    });
}

#[test]
fn so_does_hugetlb() {
    with_each(|_, host| {
        let kinds = [
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, [2, 2, 2, 0]),
            (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, [2, 0, 2, 0]),
        ];
        for (flags, expected) in kinds {
            if Memory::map(2 * HUGE_PAGE, flags, -1).is_none() {
                return println!("no pool of huge pages here");
            }
            assert_eq!(faults_by_way(host, || Memory::map(2 * HUGE_PAGE, flags, -1).unwrap()), expected);
        }
    });
}

#[test]
fn guest_and_process_see_what_the_other_has_written() {
    with_each(|_, host| {
        let memory = Memory::anonymous(PAGES);
        let guest = Guest::new(host, &memory);
        guest.pre_fault(memory.size);
        (0..PAGES).for_each(|page| memory.write(page, page + 100));
        let pages = guest.vm.statistics();
        assert_eq!(
            pages,
            VmStatistics { pages_4k: 0, pages_2m: 0, pages_1g: 0 },
            "KVM would have been told of each"
        );
        let (faults, read) = guest.touch(&memory, Operation::Read);
        assert_eq!((faults, read), (PAGES, (100..100 + PAGES).collect()));
        assert_eq!(guest.writes(&memory), 0, "its pages were writable when they were read");
        assert!((0..PAGES).all(|page| memory.read(page) == 1));
        let access = Access {
            gpa: 4096 + 6,
            width: Width::Two,
            operation: Operation::Write(0xabcd),
            privacy: Privacy::Shared,
        };
        guest.vcpu.queue(access);
        assert_eq!(guest.vcpu.run().exit, Exit::Done);
        assert_eq!(memory.read(1), 1 | 0xabcd << 48);
    });
}

#[test]
fn what_is_discarded_or_moved_is_mapped_anew() {
    with_each(|_, host| {
        let memory = Memory::anonymous(PAGES);
        let guest = Guest::new(host, &memory);
        assert_eq!(guest.writes(&memory), PAGES);
        let advice = libc::MADV_DONTNEED;
        host.advising(memory.at(0), 8 * PAGE_SIZE, advice, || memory.advise(0, 8, advice));
        assert_eq!(guest.vm.statistics().pages_4k, PAGES - 8);
        let (faults, read) = guest.touch(&memory, Operation::Read);
        assert_eq!((faults, read[7], read[8]), (8, 0, 1));
        // By a call that nobody sees.
        memory.advise(8, 8, advice);
        assert_eq!(guest.vm.statistics().pages_4k, PAGES - 8);
        // Moved away, and other memory in its place.
        let place = Memory::anonymous(PAGES);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let size = memory.size as usize;
        host.changing(&[memory.range(0..PAGES), place.range(0..PAGES)], || {
            // SAFETY: both are the test's memory.
            unsafe {
                libc::mremap(memory.start as *mut _, size, size, flags, place.start as *mut libc::c_void)
            }
        });
        assert_eq!((place.read(8), place.read(16)), (0, 1));
        assert_eq!(guest.vm.statistics().pages_4k, 0);
        let fixed = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let new =
            host.changing(&[memory.range(0..PAGES)], || Memory::map_at(memory.start, memory.size, fixed, -1));
        assert_eq!(guest.touch(&memory, Operation::Read), (PAGES, vec![0; PAGES as usize]));
        std::mem::forget(new);
    });
}

/// A child that lives until it is dropped.
struct Child(c_int);

impl Child {
    fn of(host: &ProcessHost) -> Self {
        host.forking();
        // SAFETY: the child does nothing but wait.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            loop {
                // SAFETY: it only waits.
                unsafe { libc::pause() };
            }
        }
        host.forked();
        Child(pid)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: it is ours, and waited for once.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

#[test]
fn a_fork_is_told_where_the_process_has_pages_of_its_own() {
    with_each(|kernel, host| {
        // In mappings of their own: with nothing between, they would be one. (The heap is never one with them.)
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let above = Memory::map(4 * PAGE_SIZE, flags, -1).unwrap();
        above.protect(libc::PROT_NONE);
        let memories = [(); 4].map(|()| {
            let [memory, between] = [(); 2].map(|()| Memory::map(4 * PAGE_SIZE, flags, -1).unwrap());
            between.protect(libc::PROT_NONE);
            (memory, between)
        });
        let [untouched, read, written, kept] = memories.each_ref().map(|(memory, _)| memory);
        read.advise(0, 4, libc::MADV_NOHUGEPAGE);
        read.read(0);
        written.write(1, 1);
        kept.write(1, 1);
        kept.advise(0, 4, libc::MADV_DONTFORK);
        let listener = Listener::of(host);
        drop(Child::of(host));
        let heard = listener.heard();
        let is_told = |memory: &Memory| heard.iter().any(|range| range.contains(&memory.at(1)));
        let told = [untouched, read, written, kept].map(is_told);
        assert_eq!(told, [false, false, true, false], "{kernel:?}");
    });
}

/// As measured on real kernels.
#[test]
fn a_fork_costs_a_prepared_guest_what_it_costs_with_a_kernel() {
    with_each(|kernel, host| {
        let prepared = || {
            let memory = Memory::anonymous(PAGES);
            memory.populate();
            let guest = Guest::new(host, &memory);
            guest.pre_fault(memory.size);
            (memory, guest)
        };
        let (memory, guest) = prepared();
        let child = Child::of(host);
        assert_eq!(guest.writes(&memory), 2 * PAGES, "{kernel:?}: each page is copied");
        drop(child);
        assert_eq!(guest.writes(&memory), 0, "{kernel:?}: the copies stay");

        let (memory, guest) = prepared();
        drop(Child::of(host));
        assert_eq!(guest.writes(&memory), PAGES, "{kernel:?}: each page is found to be the process's alone");

        let (memory, guest) = prepared();
        drop(Child::of(host));
        guest.pre_fault(memory.size);
        assert_eq!(guest.writes(&memory), PAGES, "{kernel:?}: a read does not find that");
        assert_eq!(guest.writes(&memory), 0);

        let (memory, guest) = prepared();
        let child = Child::of(host);
        (0..PAGES).for_each(|page| memory.write(page, 3));
        drop(child);
        guest.pre_fault(memory.size);
        // Without the frames nobody knows which was copied.
        let shows_frames = host.pagemap.entry(memory.hva(0).page()).frame().is_some();
        assert_eq!(guest.writes(&memory), if shows_frames { 0 } else { PAGES }, "{kernel:?}");

        let (memory, guest) = prepared();
        drop(Child::of(host));
        let advice = libc::MADV_DONTNEED;
        host.advising(memory.at(0), memory.size, advice, || memory.advise(0, PAGES, advice));
        memory.populate();
        guest.pre_fault(memory.size);
        assert_eq!(guest.writes(&memory), 0, "{kernel:?}: new pages were never a child's");

        let (memory, guest) = prepared();
        memory.advise(0, PAGES, libc::MADV_DONTFORK);
        let _child = Child::of(host);
        assert_eq!(guest.writes(&memory), 0, "{kernel:?}: the child has not got it");
    });
}

#[test]
fn a_signal_ends_a_pre_fault_between_pages() {
    with_each(|_, host| {
        let memory = Memory::anonymous(PAGES);
        let guest = Guest::new(host, &memory);
        let _blocked = signals::Blocked::new();
        let mut range = PreFault { gpa: 0, size: memory.size, flags: 0 };
        // SAFETY: it is this thread's own, and is to be ignored before it could be handled.
        unsafe {
            libc::signal(libc::SIGRTMIN(), libc::SIG_DFL);
            libc::pthread_kill(libc::pthread_self(), libc::SIGRTMIN());
        }
        assert_eq!(guest.vcpu.pre_fault(&mut range), Err(Errno::EINTR));
        assert_eq!(guest.vcpu.run().exit, Exit::Failed(Errno::EINTR));
        // SAFETY: what waits is thrown away.
        unsafe { libc::signal(libc::SIGRTMIN(), libc::SIG_IGN) };
        assert_eq!(guest.vcpu.pre_fault(&mut range), Ok(()));
    });
}

/// `userfaultfd`, as far as it is needed here.
struct Userfaultfd(RawFd);

/// `UFFDIO_REGISTER_MODE_MISSING` and `UFFDIO_REGISTER_MODE_WP`.
const MISSING: u64 = 1;
const WRITTEN: u64 = 2;

impl Userfaultfd {
    fn on(memory: &Memory, mode: u64) -> Option<Self> {
        const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
        const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
        // SAFETY: a descriptor is asked for.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as RawFd;
        let mut api = [0xaau64, 0, 0];
        let mut register = [memory.start, memory.size, mode, 0];
        // SAFETY: both arguments are as the kernel wants them.
        let is_registered = fd >= 0
            && unsafe { libc::ioctl(fd, UFFDIO_API, api.as_mut_ptr()) } == 0
            && unsafe { libc::ioctl(fd, UFFDIO_REGISTER, register.as_mut_ptr()) } == 0;
        is_registered.then_some(Userfaultfd(fd))
    }

    fn copy(&self, from: &Memory, to: u64) {
        const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
        let mut argument = [to, from.start, PAGE_SIZE, 0, 0];
        // SAFETY: the argument is as the kernel wants it, and the page is missing.
        assert_eq!(unsafe { libc::ioctl(self.0, UFFDIO_COPY, argument.as_mut_ptr()) }, 0);
    }

    fn protect(&self, range: Range<u64>, is_protected: bool) {
        const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
        let mut argument = [range.start, range.end - range.start, is_protected.into()];
        // SAFETY: the argument is as the kernel wants it.
        assert_eq!(unsafe { libc::ioctl(self.0, UFFDIO_WRITEPROTECT, argument.as_mut_ptr()) }, 0);
    }
}

impl Drop for Userfaultfd {
    fn drop(&mut self) {
        close(self.0);
    }
}

#[test]
fn who_waits_for_a_page_is_ended_by_a_signal_or_by_the_page() {
    let _turn = lock(&TURN);
    let host = Kernel::New.host();
    let memory = Memory::anonymous(4);
    let Some(fd) = Userfaultfd::on(&memory, MISSING) else {
        return println!("no userfaultfd for faults of the kernel here");
    };
    host.waiting(memory.range(0..4), true);
    let source = Memory::anonymous(1);
    source.write(0, 42);
    fd.copy(&source, memory.at(0));
    assert_eq!(follow(&host, memory.hva(0), false), Ok(true), "it is there");
    let is_followed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let found = follow(&host, memory.hva(1), false);
            is_followed.store(true, Ordering::Release);
            found
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!is_followed.load(Ordering::Acquire));
        fd.copy(&source, memory.at(1));
        assert_eq!(waiter.join().unwrap(), Ok(true));
    });
    let blocked = signals::Blocked::new();
    // SAFETY: it is this thread's own, and is to be ignored before it could be handled.
    unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGRTMIN() + 1) };
    assert_eq!(follow(&host, memory.hva(2), false), Err(FollowError::Interrupted));
    // SAFETY: what waits is thrown away.
    unsafe { libc::signal(libc::SIGRTMIN() + 1, libc::SIG_IGN) };
    drop(blocked);
    fd.copy(&source, memory.at(2));
}

#[test]
fn who_writes_a_page_that_is_watched_waits_for_the_watcher() {
    with_each(|kernel, host| {
        let memory = Memory::anonymous(4);
        let Some(fd) = Userfaultfd::on(&memory, WRITTEN) else {
            return println!("no userfaultfd for writes of the kernel here");
        };
        memory.populate();
        let listener = Listener::of(host);
        for page in 0..4 {
            assert_eq!(follow(host, memory.hva(page), false), Ok(true));
        }
        fd.protect(memory.range(1..3), true);
        host.settle(memory.hva(0), memory.hva(4));
        assert_eq!(listener.heard(), [memory.range(1..3)], "{kernel:?}");
        assert_eq!(follow(host, memory.hva(1), false), Ok(false), "{kernel:?}");
        let is_followed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let found = follow(host, memory.hva(1), true);
                is_followed.store(true, Ordering::Release);
                found
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!is_followed.load(Ordering::Acquire), "{kernel:?}");
            fd.protect(memory.range(1..2), false);
            assert_eq!(writer.join().unwrap(), Ok(true));
        });
        let blocked = signals::Blocked::new();
        // SAFETY: it is this thread's own, and is to be ignored before it could be handled.
        unsafe {
            libc::signal(libc::SIGRTMIN() + 2, libc::SIG_DFL);
            libc::pthread_kill(libc::pthread_self(), libc::SIGRTMIN() + 2);
        }
        assert_eq!(follow(host, memory.hva(2), true), Err(FollowError::Interrupted), "{kernel:?}");
        // SAFETY: what waits is thrown away.
        unsafe { libc::signal(libc::SIGRTMIN() + 2, libc::SIG_IGN) };
        drop(blocked);
        fd.protect(memory.range(2..3), false);
    });
}

#[test]
fn of_memory_that_is_mostly_holes_only_the_pages_are_looked_at() {
    with_each(|kernel, host| {
        // As sanitizers have it, and VMMs that reserve addresses for memory to come.
        const RESERVED: u64 = 1 << 43;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let memory = Memory::map(RESERVED, flags, -1).unwrap();
        memory.advise(0, memory.pages(), libc::MADV_NOHUGEPAGE);
        let written = [0, 1, 5000, memory.pages() - 1];
        written.iter().for_each(|page| memory.write(*page, 1));
        assert_eq!(follow(host, memory.hva(5000), true), Ok(true));
        let parts = host.parts_with_pages(&memory.range(0..memory.pages()));
        let last = memory.pages() - 1;
        let written = [0..2, 5000..5001, last..last + 1].map(|pages| memory.range(pages));
        // Older kernels do not say where pages are.
        let is_said = host.pagemap.parts_with_pages(&memory.range(0..1)).is_some();
        assert_eq!(parts, if is_said { &written[..] } else { &written[1..2] }, "{kernel:?}");
        let few = memory.range(0..100);
        assert!(host.parts_with_pages(&few).iter().any(|part| part.contains(&few.start)), "{kernel:?}");
    });
}
