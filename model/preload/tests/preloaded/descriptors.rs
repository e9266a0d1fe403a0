//! Descriptors: whose they are, how long they keep what lies behind them, and what handlers and children may do with them.

use crate::harness::preloaded;
use crate::kvm::*;
use kvm_bindings::KVM_EXIT_MEMORY_FAULT;
use std::ffi::c_int;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const SIZE: u64 = MIB;

/// How many descriptors the process has.
fn open_now() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
}

static SHARED: AtomicI32 = AtomicI32::new(-1);
/// What the handler is to close for good.
static LAST: AtomicI32 = AtomicI32::new(-1);
static HANDLED: AtomicU32 = AtomicU32::new(0);
/// So many signals that they must have come at all kinds of moments.
const ENOUGH: u32 = 20;

/// What a VMM's handler may do: only calls that are said to be safe in one.
extern "C" fn handle(_: c_int) {
    // SAFETY: of descriptors of its own, and of one that stays open.
    unsafe {
        let saved = *libc::__errno_location();
        let copy = libc::dup(SHARED.load(Ordering::Relaxed));
        libc::read(copy, std::ptr::null_mut(), 0);
        libc::close(copy);
        let last = LAST.load(Ordering::Relaxed);
        if last >= 0 {
            libc::close(last);
            LAST.store(-1, Ordering::Relaxed);
        }
        *libc::__errno_location() = saved;
    }
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

/// Has this thread be signalled again and again. (A timer's signal would be the process's, and any thread's to handle.)
fn signal_every(period: Duration) {
    // SAFETY: the handler does nothing but what one may.
    let thread = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
        libc::pthread_self()
    };
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(period);
            // SAFETY: the process ends with the test's thread.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
        }
    });
}

unsafe extern "C" {
    fn closefrom(first: c_int);
}

preloaded! {
    fn a_file_lives_until_its_last_descriptor_and_mapping_are_gone() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let file = vm.guest_memfd(SIZE, 3).expect("a file");
        let memory = map(SIZE, libc::MAP_SHARED, file).expect("the file");
        assert_eq!(vm.set_file_region(1, GPA, memory, SIZE, file), Ok(0));
        // SAFETY: a descriptor of ours.
        let copy = unsafe { libc::dup(file) };
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        close(file);
        close(copy);
        assert_eq!(vm.statistic("pages_4k"), SIZE / PAGE, "it is mapped still");
        unmap(memory, SIZE);
        assert_eq!(vm.statistic("pages_4k"), 0);
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Err(libc::EFAULT), SIZE));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_MEMORY_FAULT);
    }

    fn a_descriptor_that_another_is_put_over_is_closed() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let file = vm.guest_memfd(SIZE, 0).expect("a file");
        assert_eq!(vm.set_file_region(1, GPA, memory(SIZE), SIZE, file), Ok(0));
        let other = open(c"/dev/null").expect("a file");
        // SAFETY: descriptors of ours.
        assert_eq!(unsafe { libc::dup2(other, file) }, file);
        // Its pages are bound to nothing now, so the slot can be given another file.
        let second = vm.guest_memfd(SIZE, 0).expect("a file");
        assert_eq!(vm.set_region(1, GPA, 0, 0), Ok(0));
        assert_eq!(vm.set_file_region(1, GPA, memory(SIZE), SIZE, second), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, PAGE).0, Ok(0));
        assert_eq!(vm.set_file_region(2, 2 * GPA, memory(SIZE), SIZE, file), Err(libc::EINVAL));
        assert_eq!(vm.set_file_region(2, 2 * GPA, memory(SIZE), SIZE, 99), Err(libc::EBADF));
    }

    fn nothing_is_put_over_the_models_own_descriptors() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let other = open(c"/dev/null").expect("a file");
        // Where the model keeps its own.
        for fd in 512..540 {
            // SAFETY: of the program's numbers none is so high.
            unsafe {
                libc::dup2(other, fd);
                libc::dup3(other, fd, libc::O_CLOEXEC);
            }
        }
        assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        Vm::new();
    }

    fn a_file_that_a_stream_closes_is_closed() {
        let vm = Vm::new();
        let left_open = |close: fn(c_int)| {
            let file = vm.guest_memfd(SIZE, 0).expect("a file");
            close(file);
            open_now()
        };
        // The model's own descriptor goes with the program's.
        let by_close = left_open(close);
        let by_stream = left_open(|file| {
            // SAFETY: descriptors of ours.
            assert_eq!(unsafe { libc::fclose(libc::fdopen(file, c"r".as_ptr())) }, 0);
        });
        assert_eq!(by_close, by_stream);
    }

    fn who_closes_all_descriptors_can_begin_anew() {
        // SAFETY: nothing of the test's is open beyond the standard ones.
        let ways: [fn(); 3] = unsafe {
            [
                || closefrom(3),
                || assert_eq!(libc::close_range(3, u32::MAX, 0), 0),
                || (3..1024).for_each(|fd| { libc::close(fd); }),
            ]
        };
        for close_all in ways {
            let vm = Vm::new();
            let vcpu = vm.vcpu(0);
            assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
            assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
            close_all();
            assert_eq!(ioctl(vm.fd, CHECK_EXTENSION, 10), Err(libc::EBADF));
        }
        assert_eq!(Vm::new().kvm, 3);
    }

    fn a_vm_lives_as_long_as_its_vcpus() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
        close(vm.fd);
        close(vm.kvm);
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
    }

    fn nothing_is_left_open() {
        let once = || {
            let vm = Vm::new();
            let vcpu = vm.vcpu(0);
            let file = vm.guest_memfd(SIZE, 3).expect("a file");
            let memory = map(SIZE, libc::MAP_SHARED, file).expect("the file");
            assert_eq!(vm.set_file_region(1, GPA, memory, SIZE, file), Ok(0));
            vm.statistic("pages_4k");
            for fd in [file, vcpu.fd, vm.fd, vm.kvm] {
                close(fd);
            }
            unmap(vcpu.page as u64, 3 * PAGE);
            unmap(memory, SIZE);
        };
        // What the model opens for itself it opens at the first time.
        once();
        let before = open_now();
        (0..10).for_each(|_| once());
        assert_eq!(open_now(), before);
    }

    fn the_lowest_numbers_are_the_programs() {
        let lowest = open(c"/dev/null").expect("a file");
        close(lowest);
        let vm = Vm::new();
        assert_eq!((vm.kvm, vm.fd), (lowest, lowest + 1));
        assert_eq!(vm.vcpu(0).fd, lowest + 2);
    }

    fn without_room_for_a_descriptor_nothing_is_made() {
        let vm = Vm::new();
        let limit = libc::rlimit { rlim_cur: 3, rlim_max: 1024 };
        // SAFETY: a number is set.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
        assert_eq!(ioctl(vm.fd, CREATE_VCPU, 0), Err(libc::EMFILE));
        assert_eq!(vm.guest_memfd(SIZE, 0), Err(libc::EMFILE));
        assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
    }

    fn a_forked_child_has_no_part_in_it_and_does_not_wait() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
        let stop = std::sync::Arc::new(AtomicU32::new(0));
        // Another thread has the model's locks all the time.
        let busy = std::thread::spawn({
            let stop = stop.clone();
            let vcpu = vcpu.fd;
            move || {
                while stop.load(Ordering::Relaxed) == 0 {
                    let mut range = [GPA, SIZE, 0, 0, 0, 0, 0, 0];
                    ioctl_with(vcpu, PRE_FAULT, &mut range).expect("a pre-fault");
                }
            }
        });
        for _ in 0..50 {
            // SAFETY: the child calls nothing but what is answered without a lock.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let is_refused = ioctl(vm.fd, CHECK_EXTENSION, 10) == Err(libc::EIO)
                    && ioctl(vcpu.fd, RUN, 0) == Err(libc::EIO);
                close(vcpu.fd);
                // SAFETY: the child ends.
                unsafe { libc::_exit(i32::from(!is_refused)) };
            }
            let mut status = 0;
            // SAFETY: there is room for the status.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0);
        }
        stop.store(1, Ordering::Relaxed);
        busy.join().expect("the other thread");
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
    }

    fn a_signal_ends_a_pre_fault_between_pages_and_is_handled_afterwards() {
        const LARGE: u64 = 64 * MIB;
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        let memory = memory(LARGE);
        assert_eq!(vm.set_region(1, GPA, memory, LARGE), Ok(0));
        signal_every(Duration::from_millis(5));
        // On a busy machine all may be done before the first comes: then all of it once more.
        let mut calls = 0;
        while calls <= 1 {
            assert_eq!(advise(memory, LARGE, libc::MADV_DONTNEED), Ok(0));
            let mut done = 0;
            calls = 0;
            while done < LARGE {
                let handled = HANDLED.load(Ordering::Relaxed);
                let (answer, left) = vcpu.pre_fault(GPA + done, LARGE - done);
                assert!(matches!(answer, Ok(0) | Err(libc::EINTR)), "{answer:?}");
                assert!(left == 0 || HANDLED.load(Ordering::Relaxed) > handled, "nothing was in the way");
                assert_eq!(answer.is_ok(), left < LARGE - done);
                (done, calls) = (LARGE - left, calls + 1);
            }
        }
    }

    fn a_signal_ends_the_allocation_of_a_file_between_pages() {
        const LARGE: u64 = 4096 * MIB;
        let file = Vm::new().guest_memfd(LARGE, 0).expect("a file");
        signal_every(Duration::from_millis(5));
        assert_eq!(fallocate(file, libc::FALLOC_FL_KEEP_SIZE, 0, LARGE), Err(libc::EINTR));
    }

    fn a_handler_may_close_the_last_descriptor_in_the_midst_of_the_programs_malloc() {
        let vm = Vm::new();
        SHARED.store(vm.fd, Ordering::Relaxed);
        signal_every(Duration::from_micros(200));
        let start = Instant::now();
        // On a busy machine signals are late: until there were enough of them.
        while start.elapsed() < Duration::from_millis(300) || HANDLED.load(Ordering::Relaxed) <= ENOUGH {
            // What the handler closes is the only descriptor: `handle` has no copy of its own then.
            LAST.store(vm.guest_memfd(MIB, 0).expect("a file"), Ordering::Relaxed);
            while LAST.load(Ordering::Relaxed) >= 0 {
                // SAFETY: it is freed at once.
                unsafe { libc::free(std::hint::black_box(libc::malloc(5000))) };
                drop(std::hint::black_box(vec![0u8; 200_000]));
            }
        }
    }

    fn a_thread_that_is_new_to_the_model_takes_nothing_of_the_programs_heap() {
        // What `malloc` has given away; what a thread keeps of what it gave back for its next calls is in it.
        // SAFETY: it is asked for numbers.
        let given = || unsafe { libc::mallinfo2() }.uordblks;
        let vm = Vm::new();
        let memory = memory(SIZE);
        let (before, after) = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let before = given();
                let file = vm.guest_memfd(SIZE, 0).expect("a file");
                let vcpu = vm.vcpu(0);
                let answers = (vm.set_file_region(1, GPA, memory, SIZE, file), vcpu.pre_fault(GPA, SIZE));
                close(file);
                assert_eq!(answers, (Ok(0), (Ok(0), 0)));
                (before, given())
            });
            thread.join().expect("the thread")
        });
        assert_eq!(before, after);
    }

    fn a_handler_may_close_and_read_at_any_time() {
        let vm = Vm::new();
        let vcpu = vm.vcpu(0);
        assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
        SHARED.store(vm.fd, Ordering::Relaxed);
        signal_every(Duration::from_micros(200));
        let start = Instant::now();
        // On a busy machine signals are late: until there were enough of them.
        while start.elapsed() < Duration::from_millis(300) || HANDLED.load(Ordering::Relaxed) <= ENOUGH {
            // A signal may come before the first page.
            let answer = vcpu.pre_fault(GPA, SIZE).0;
            assert!(matches!(answer, Ok(0) | Err(libc::EINTR)), "{answer:?}");
            vm.statistic("pages_4k");
            let file = vm.guest_memfd(PAGE, 0).expect("a file");
            close(file);
        }
    }
}
