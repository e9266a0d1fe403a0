//! Slots, pre-faults and what becomes of them when the program changes its memory.

use crate::harness::preloaded;
use crate::kvm::*;
use kvm_bindings::KVM_EXIT_INTR;
use std::ffi::{c_int, c_void};
use std::time::Duration;

const SIZE: u64 = MIB;
const PAGES: u64 = SIZE / PAGE;

/// The signal that ends a child that does this.
fn signal_of_a_child(act: impl FnOnce()) -> i32 {
    // SAFETY: the child does nothing else, and ends.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            act();
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        libc::WTERMSIG(status)
    }
}

/// Has whoever faults there wait for a page that nobody brings, where a process may have the kernel's faults wait.
fn watcher_of(memory: u64, size: u64) -> Option<c_int> {
    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    const MISSING: u64 = 1;
    // SAFETY: a descriptor is asked for.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as c_int;
    ioctl_with(fd, UFFDIO_API, &mut [0xaau64, 0, 0]).ok()?;
    ioctl_with(fd, UFFDIO_REGISTER, &mut [memory, size, MISSING, 0]).ok()?;
    Some(fd)
}

preloaded! {
    fn what_is_pre_faulted_is_mapped_and_counted() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
        // Beyond the slot is nothing: what was done is done, the rest is left.
        assert_eq!(vcpu.pre_fault(GPA, 2 * SIZE), (Ok(0), SIZE));
        assert_eq!(vcpu.pre_fault(GPA + SIZE, SIZE), (Err(libc::ENOENT), SIZE));
        assert_eq!(vm.statistic("pages_4k"), PAGES);
        assert_eq!(vcpu.statistic("pf_taken"), 0);
    }

    fn structures_that_cannot_be_read_are_efault_and_what_is_wrong_in_them_einval() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        assert_eq!(ioctl(vm.fd, SET_REGION, 8), Err(libc::EFAULT));
        assert_eq!(ioctl(vcpu.fd, PRE_FAULT, 8), Err(libc::EFAULT));
        assert_eq!(vcpu.pre_fault(GPA + 1, SIZE).0, Err(libc::EINVAL));
        assert_eq!(vm.set_region(1, GPA, 1, SIZE), Err(libc::EINVAL));
    }

    fn advice_and_unmapping_take_mappings_away() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let memory = memory(SIZE);
        assert_eq!(vm.set_region(1, GPA, memory, SIZE), Ok(0));
        assert_eq!(advise(memory, SIZE, libc::MADV_POPULATE_WRITE), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        assert_eq!(advise(memory, SIZE / 2, libc::MADV_DONTNEED), Ok(0));
        assert_eq!(vm.statistic("pages_4k"), PAGES / 2);
        unmap(memory + SIZE / 2, SIZE / 4);
        assert_eq!(vm.statistic("pages_4k"), PAGES / 4);
        assert_eq!(vcpu.pre_fault(GPA + SIZE / 2, PAGE), (Err(libc::EFAULT), PAGE));
    }

    fn a_file_of_the_guests_has_its_rules() {
        let vm = Vm::new();
        let plain = vm.guest_memfd(SIZE, 0).expect("a file");
        assert_eq!(map(SIZE, libc::MAP_SHARED, plain), Err(libc::ENODEV));
        let mapped = vm.guest_memfd(SIZE, 3).expect("a file that can be mapped");
        // One whose pages are private can be mapped, but not used so.
        let private = vm.guest_memfd(SIZE, 1).expect("a file that can be mapped");
        let memory = map(SIZE, libc::MAP_SHARED, private).expect("the file");
        assert_eq!(signal_of_a_child(|| { word(memory); }), libc::SIGBUS);
        // SAFETY: a pipe of our own; what cannot be read is an error of the call.
        unsafe {
            let mut ends = [0; 2];
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            assert_eq!(libc::write(ends[1], memory as *const _, 1), -1);
            assert_eq!(errno(), libc::EFAULT);
        }
        assert_eq!(map(SIZE, libc::MAP_PRIVATE, mapped), Err(libc::EINVAL));
        assert_eq!(fallocate(mapped, 0, 0, PAGE), Err(libc::EOPNOTSUPP));
        assert_eq!(fallocate(mapped, libc::FALLOC_FL_KEEP_SIZE, SIZE, PAGE), Err(libc::EINVAL));
        assert_eq!(vm.guest_memfd(SIZE + 1, 0), Err(libc::EINVAL));
        // SAFETY: nothing is read, and nothing cut.
        unsafe {
            assert_eq!(libc::read(mapped, std::ptr::null_mut(), 0), -1);
            assert_eq!(errno(), libc::EINVAL);
            assert_eq!(libc::pread(mapped, std::ptr::null_mut(), 0, 0), -1);
            assert_eq!(errno(), libc::ESPIPE);
            assert_eq!(libc::ftruncate(mapped, 0), -1);
            assert_eq!(errno(), libc::EINVAL);
        }
    }

    fn a_mapped_file_is_the_guests_memory_and_the_programs() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let file = vm.guest_memfd(SIZE, 3).expect("a file");
        let memory = map(SIZE, libc::MAP_SHARED, file).expect("the file");
        assert_eq!(vm.set_file_region(1, GPA, memory, SIZE, file), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        set_word(memory + PAGE, 7);
        let punch = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
        assert_eq!(fallocate(file, punch, PAGE, PAGE), Ok(0));
        assert_eq!(vm.statistic("pages_4k"), PAGES - 1);
        assert_eq!(word(memory + PAGE), 0);
    }

    fn what_is_removed_through_any_mapping_of_a_file_goes_from_the_guest() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let file = vm.guest_memfd(SIZE, 3).expect("a file");
        let mapped = map(SIZE, libc::MAP_SHARED, file).expect("the file");
        // The slot's own address says nothing of the file.
        assert_eq!(vm.set_file_region(1, GPA, memory(SIZE), SIZE, file), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        set_word(mapped + 2 * PAGE, 7);
        assert_eq!(advise(mapped + 2 * PAGE, PAGE, libc::MADV_REMOVE), Ok(0));
        assert_eq!(vm.statistic("pages_4k"), PAGES - 1);
        assert_eq!(word(mapped + 2 * PAGE), 0);
    }

    fn a_hole_takes_what_only_the_program_has_touched() {
        let vm = Vm::new();
        let file = vm.guest_memfd(SIZE, 3).expect("a file");
        let memory = map(SIZE, libc::MAP_SHARED, file).expect("the file");
        (0..4).for_each(|page| set_word(memory + page * PAGE, 7));
        let punch = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE;
        assert_eq!(fallocate(file, punch, 0, 2 * PAGE), Ok(0));
        assert_eq!(advise(memory + 2 * PAGE, PAGE, libc::MADV_REMOVE), Ok(0));
        assert_eq!([0, 1, 2, 3].map(|page| word(memory + page * PAGE)), [0, 0, 0, 7]);
    }

    fn a_wait_for_a_page_ends_by_signals_and_leaves_one_thread_at_most() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let memory = memory(SIZE);
        let Some(watcher) = watcher_of(memory, SIZE) else {
            return println!("no userfaultfd for faults of the kernel here");
        };
        assert_eq!(vm.set_region(1, GPA, memory, SIZE), Ok(0));
        extern "C" fn nothing(_: c_int) {}
        // SAFETY: the handler does nothing, and the thread is this one.
        let this = unsafe {
            libc::signal(libc::SIGUSR1, nothing as extern "C" fn(c_int) as usize);
            libc::pthread_self()
        };
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(20));
                // SAFETY: the process ends with the test's thread.
                unsafe { libc::pthread_kill(this, libc::SIGUSR1) };
            }
        });
        let threads = || std::fs::read_dir("/proc/self/task").expect("threads").count();
        let before = threads();
        for _ in 0..10 {
            assert_eq!(vcpu.pre_fault(GPA, PAGE), (Err(libc::EINTR), PAGE));
        }
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_INTR);
        assert!(vcpu.statistic("signal_exits") > 0);
        assert_eq!(threads(), before + 1);
        close(watcher);
    }

    fn conversions_take_what_was_of_the_other_kind() {
        let vm = Vm::of_type(1);
        let vcpu = vm.vcpu(0);
        let file = vm.guest_memfd(SIZE, 0).expect("a file");
        assert_eq!(vm.set_file_region(1, GPA, memory(SIZE), SIZE, file), Ok(0));
        assert_eq!(vm.set_private(GPA, SIZE, true), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        assert_eq!(vm.set_private(GPA, SIZE / 2, false), Ok(0));
        assert_eq!(vm.statistic("pages_4k"), PAGES / 2);
        assert_eq!(Vm::new().set_private(GPA, SIZE, true), Err(libc::EINVAL));
    }

    fn nothing_is_written_to_the_models_files_and_nothing_sought_in_them() {
        let vm = Vm::new();
        let file = vm.guest_memfd(SIZE, 3).expect("a file");
        let mapped = map(SIZE, libc::MAP_SHARED, file).expect("the file");
        let statistics = ioctl(vm.fd, GET_STATS_FD, 0).expect("statistics");
        let mut bytes = [7u8; 8];
        let one = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: as many bytes are there as are said.
        unsafe {
            for (fd, write_error) in [(file, libc::EINVAL), (vm.fd, libc::EINVAL), (statistics, libc::EBADF)] {
                assert_eq!((libc::write(fd, one.iov_base, 8), errno()), (-1, write_error));
                assert_eq!((libc::writev(fd, &one, 1), errno()), (-1, write_error));
                assert_eq!((libc::pwrite(fd, one.iov_base, 8, 0), errno()), (-1, libc::ESPIPE));
                assert_eq!((libc::pwritev(fd, &one, 1, 0), errno()), (-1, libc::ESPIPE));
            }
            assert_eq!((libc::lseek(file, 0, libc::SEEK_END), errno()), (-1, libc::ESPIPE));
            assert_eq!(libc::read(statistics, one.iov_base, 8), 8);
            assert_eq!(libc::lseek(statistics, 0, libc::SEEK_SET), 8, "nothing is moved");
        }
        assert_eq!(word(mapped), 0);
    }

    fn statistics_are_read_in_every_way() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
        let open = || ioctl(vm.fd, GET_STATS_FD, 0).expect("statistics");
        let statistics = open();
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        // A header, the name, three statistics of which this is the first.
        let at = (24 + 48 + 3 * 64) as i64;
        let mut count = 0u64;
        let room = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 8 };
        // SAFETY: there is room for what is read.
        unsafe {
            assert_eq!(libc::preadv(statistics, &room, 1, at), 8);
            assert_eq!(count, PAGES);
            let stream = libc::fdopen(open(), c"r".as_ptr());
            let mut all = vec![0u8; at as usize + 8];
            assert_eq!(libc::fread(all.as_mut_ptr().cast(), all.len(), 1, stream), 1);
            assert_eq!(all[at as usize..], PAGES.to_le_bytes());
        }
    }

    fn nothing_that_is_mapped_of_the_models_is_executed() {
        let vm = Vm::new();
        let map_executable = |fd| {
            // SAFETY: a new mapping touches nothing.
            let start = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_SHARED, fd, 0) };
            (start == libc::MAP_FAILED).then(errno)
        };
        assert_eq!(map_executable(vm.vcpu(0).fd), Some(libc::EPERM));
        assert_eq!(map_executable(vm.guest_memfd(SIZE, 3).expect("a file")), Some(libc::EPERM));
    }

    fn nothing_of_the_models_becomes_executable() {
        let vm = Vm::new();
        // Anonymous memory, and a file behind it.
        let start = memory(2 * SIZE);
        let (place, file) = ((start + SIZE) as *mut c_void, vm.guest_memfd(SIZE, 3).expect("a file"));
        let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: over memory of the test's own.
        assert_eq!(unsafe { libc::mmap(place, SIZE as usize, rights, flags, file, 0) }, place);
        let make = |start, size, rights| protect(start, size, libc::PROT_READ | rights);
        let is_executable = |address: u64| {
            let maps = std::fs::read_to_string("/proc/self/maps").expect("a list");
            maps.lines().any(|line| {
                let (range, rest) = line.split_once(' ').expect("rights");
                let (first, end) = range.split_once('-').expect("a range");
                let number = |text| u64::from_str_radix(text, 16).expect("a number");
                (number(first)..number(end)).contains(&address) && rest.as_bytes()[2] == b'x'
            })
        };
        assert_eq!(make(start + SIZE, PAGE, libc::PROT_EXEC), Err(libc::EACCES));
        assert_eq!(make(start, 2 * SIZE, libc::PROT_EXEC), Err(libc::EACCES));
        assert!(is_executable(start), "what lies before it was changed");
        assert!(!is_executable(start + SIZE));
        assert_eq!(make(start + SIZE + 1, PAGE, libc::PROT_EXEC), Err(libc::EINVAL));
        assert_eq!(make(start, SIZE, libc::PROT_EXEC), Ok(0));
        assert_eq!(make(start, 2 * SIZE, libc::PROT_WRITE), Ok(0));
    }
}
