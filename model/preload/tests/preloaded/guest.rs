//! What a queued guest does, and how KVM_RUN tells of it.

use crate::harness::preloaded;
use crate::kvm::*;
use kvm_bindings::*;
use std::ffi::c_int;
use std::ptr;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

const SIZE: u64 = MIB;
const PORT: u32 = 0x10;

const READ: u32 = 1;
const WRITE: u32 = 2;
const FETCH: u32 = 3;
const COPY: u32 = 4;
const OUT: u32 = 6;
const HYPERCALL: u32 = 7;
const HALT: u32 = 8;
const LOOP: u32 = 9;

/// `struct kvmprep_model_step`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Step {
    kind: u32,
    flags: u32,
    gpa: u64,
    count: u64,
    stride: u64,
    width: u32,
    port: u32,
    value: u64,
    value_stride: u64,
    to: u64,
    to_stride: u64,
    args: [u64; 4],
    values: *mut u64,
}

fn step(kind: u32) -> Step {
    // SAFETY: it is numbers, and a pointer that may be null.
    Step { kind, ..unsafe { std::mem::zeroed() } }
}

fn pages(kind: u32, gpa: u64, count: u64) -> Step {
    Step { gpa, count, stride: PAGE, ..step(kind) }
}

type SetSteps = unsafe extern "C" fn(c_int, *const Step, usize) -> c_int;

fn set_steps(vcpu: &Vcpu, steps: &[Step]) -> c_int {
    // SAFETY: the function has this type, and is given what is there.
    unsafe {
        let function = libc::dlsym(libc::RTLD_DEFAULT, c"kvmprep_model_set_steps".as_ptr());
        assert!(!function.is_null(), "the library offers it");
        let function: SetSteps = std::mem::transmute(function);
        function(vcpu.fd, steps.as_ptr(), steps.len())
    }
}

/// A VM with memory that the program has populated, and a vCPU.
fn guest() -> (Vm, Vcpu, u64) {
    let vm = Vm::new();
    let vcpu = vm.vcpu(0);
    let memory = memory(SIZE);
    assert_eq!(advise(memory, SIZE, libc::MADV_POPULATE_WRITE), Ok(0));
    assert_eq!(vm.set_region(1, GPA, memory, SIZE), Ok(0));
    (vm, vcpu, memory)
}

fn io(vcpu: &Vcpu) -> (u16, u32) {
    assert_eq!(vcpu.exit_reason(), KVM_EXIT_IO);
    // SAFETY: that is the exit.
    let io = unsafe { vcpu.exit().io };
    assert_eq!((io.direction, io.count), (1, 1));
    (io.port, word(vcpu.page as u64 + io.data_offset))
}

preloaded! {
    fn it_touches_writes_and_reads_the_programs_memory() {
        let (_vm, vcpu, memory) = guest();
        let mut read = [0u64; 4];
        set_word(memory + SIZE / 2, 11);
        let write = Step { value: 100, value_stride: 5, ..pages(WRITE, GPA, 16) };
        let look = Step { values: read.as_mut_ptr(), ..pages(READ, GPA + SIZE / 2, 4) };
        let out = Step { port: PORT, value: 0x1234, ..step(OUT) };
        assert_eq!(set_steps(&vcpu, &[write, look, out, step(HALT)]), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(io(&vcpu), (PORT as u16, 0x1234));
        assert_eq!((word(memory), word(memory + 15 * PAGE)), (100, 175));
        assert_eq!(read, [11, 0, 0, 0]);
        assert_eq!(vcpu.statistic("pf_taken"), 20);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_HLT);
    }

    fn what_is_pre_faulted_it_touches_without_a_fault() {
        let (_vm, vcpu, _) = guest();
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        assert_eq!(set_steps(&vcpu, &[pages(WRITE, GPA, SIZE / PAGE)]), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.statistic("pf_taken"), 0);
    }

    fn what_it_copies_keeps_its_width() {
        let (_vm, vcpu, memory) = guest();
        set_word(memory + 8, 0xaabb_ccdd);
        let copy = Step { to: GPA + PAGE + 2, width: 2, ..pages(COPY, GPA + 8, 1) };
        assert_eq!(set_steps(&vcpu, &[copy]), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(word(memory + PAGE), 0xccdd_0000);
    }

    fn where_no_memory_is_the_program_answers() {
        let (_vm, vcpu, _) = guest();
        let mut read = [0u64; 1];
        let look = Step { values: read.as_mut_ptr(), ..pages(READ, 2 * GPA, 1) };
        let write = Step { value: 9, ..pages(WRITE, 2 * GPA + 4, 1) };
        assert_eq!(set_steps(&vcpu, &[look, write, step(HALT)]), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_MMIO);
        // SAFETY: that is the exit.
        let exit = unsafe { vcpu.exit().mmio };
        assert_eq!((exit.phys_addr, exit.len, exit.is_write), (2 * GPA, 4, 0));
        // SAFETY: the data is the program's to write.
        unsafe { (&raw mut (*vcpu.page).__bindgen_anon_1.mmio.data).write_volatile([7, 0, 0, 0, 9, 9, 9, 9]) };
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(read, [7]);
        // SAFETY: that is the exit.
        let exit = unsafe { vcpu.exit().mmio };
        assert_eq!((exit.phys_addr, exit.data[0], exit.is_write), (2 * GPA + 4, 9, 1));
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_HLT);
    }

    fn where_no_memory_is_nothing_can_be_executed() {
        let (_vm, vcpu, _) = guest();
        assert_eq!(set_steps(&vcpu, &[pages(FETCH, 2 * GPA, 1), step(HALT)]), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_INTERNAL_ERROR);
        // SAFETY: that is the exit.
        let exit = unsafe { vcpu.exit().internal };
        assert_eq!((exit.suberror, exit.ndata), (KVM_INTERNAL_ERROR_EMULATION, 0));
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_HLT);
    }

    fn above_all_addresses_is_no_memory() {
        let (_vm, vcpu, memory) = guest();
        set_word(memory, 42);
        let (mut below, mut above) = ([0u64; 1], [0u64; 1]);
        let look = |gpa, values: &mut [u64; 1]| Step { values: values.as_mut_ptr(), ..pages(READ, gpa, 1) };
        let steps = [look(GPA, &mut below), look(GPA + (1 << 48), &mut above), step(HALT)];
        assert_eq!(set_steps(&vcpu, &steps), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_MMIO);
        // SAFETY: that is the exit.
        assert_eq!(unsafe { vcpu.exit().mmio.phys_addr }, GPA + (1 << 48));
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!((vcpu.exit_reason(), below, above), (KVM_EXIT_HLT, [42], [0]));
    }

    fn an_access_that_the_vmm_must_see_to_is_made_again() {
        let vm = Vm::of_type(1);
        let vcpu = vm.vcpu(0);
        let file = vm.guest_memfd(SIZE, 0).expect("a file");
        assert_eq!(vm.set_file_region(1, GPA, memory(SIZE), SIZE, file), Ok(0));
        assert_eq!(vm.set_private(GPA, SIZE, true), Ok(0));
        close(file);
        let out = Step { port: PORT, ..step(OUT) };
        assert_eq!(set_steps(&vcpu, &[pages(WRITE, GPA, 3), out]), 0);
        for _ in 0..2 {
            assert_eq!(vcpu.run(), Err(libc::EFAULT));
            assert_eq!(vcpu.exit_reason(), KVM_EXIT_MEMORY_FAULT);
            // SAFETY: that is the exit.
            let fault = unsafe { vcpu.exit().memory_fault };
            assert_eq!((fault.gpa, fault.size, fault.flags), (GPA, PAGE, 8));
        }
        assert_eq!(vm.set_private(GPA, SIZE, false), Ok(0));
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(io(&vcpu).0, PORT as u16);
    }

    fn a_hypercall_is_handed_on_where_that_is_wanted() {
        let (vm, vcpu, _) = guest();
        let call = Step { value: 12, args: [GPA, 2, 16, 0], ..step(HYPERCALL) };
        let rax = || {
            let mut regs = kvm_regs::default();
            assert_eq!(ioctl_with(vcpu.fd, GET_REGS, &mut regs), Ok(0));
            regs.rax
        };
        assert_eq!(set_steps(&vcpu, &[call, step(HALT)]), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!((vcpu.exit_reason(), rax() as u32 as i32), (KVM_EXIT_HLT, -1000));
        let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_HYPERCALL, args: [1 << 12, 0, 0, 0], ..Default::default() };
        assert_eq!(ioctl_with(vm.fd, ENABLE_CAP, &mut cap), Ok(0));
        assert_eq!(set_steps(&vcpu, &[call, step(HALT)]), 0);
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_HYPERCALL);
        // SAFETY: that is the exit.
        let exit = unsafe { vcpu.exit().hypercall };
        assert_eq!((exit.nr, exit.args[0], exit.args[1], exit.args[2]), (12, GPA, 2, 16));
        // SAFETY: the answer is the program's to write.
        unsafe { (&raw mut (*vcpu.page).__bindgen_anon_1.hypercall.ret).write_volatile(5) };
        assert_eq!(vcpu.run(), Ok(0));
        assert_eq!((vcpu.exit_reason(), rax()), (KVM_EXIT_HLT, 5));
    }

    fn immediate_exit_and_signals_end_a_run() {
        let (_vm, vcpu, _) = guest();
        assert_eq!(set_steps(&vcpu, &[step(LOOP)]), 0);
        vcpu.set_immediate_exit(true);
        assert_eq!(vcpu.run(), Err(libc::EINTR));
        vcpu.set_immediate_exit(false);
        // SAFETY: this thread's mask and signals alone; the sets are written before they are read.
        unsafe {
            let mut blocked: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut blocked, libc::SIGUSR1);
            libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, ptr::null_mut());
            libc::pthread_kill(libc::pthread_self(), libc::SIGUSR1);
        }
        // The signal waits for the thread, and only KVM lets it through: as a VMM has it that is kicked.
        let mut nothing_blocked = [8u32, 0, 0];
        assert_eq!(ioctl_with(vcpu.fd, SET_SIGNAL_MASK, &mut nothing_blocked), Ok(0));
        assert_eq!(vcpu.run(), Err(libc::EINTR));
        assert_eq!(vcpu.exit_reason(), KVM_EXIT_INTR);
        assert_eq!(vcpu.statistic("signal_exits"), 1);
    }

    fn a_thread_is_not_cancelled_while_it_runs_the_guest() {
        let (_vm, vcpu, _) = guest();
        assert_eq!(set_steps(&vcpu, &[step(LOOP)]), 0);
        extern "C" fn nothing(_: c_int) {}
        // SAFETY: the handler does nothing.
        unsafe { libc::signal(libc::SIGUSR1, nothing as extern "C" fn(c_int) as usize) };
        let (tell, told) = channel();
        let vcpu = vcpu.fd;
        let runner = thread::spawn(move || {
            // SAFETY: it asks who it is.
            tell.send(unsafe { libc::pthread_self() }).expect("who waits for it");
            ioctl(vcpu, RUN, 0)
        });
        let thread = told.recv().expect("the thread");
        thread::sleep(Duration::from_millis(50));
        // SAFETY: the thread has not been joined.
        assert_eq!(unsafe { libc::pthread_cancel(thread) }, 0);
        while !runner.is_finished() {
            thread::sleep(Duration::from_millis(50));
            // SAFETY: as before.
            unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
        }
        assert_eq!(runner.join().expect("it ended by itself"), Err(libc::EINTR));
    }

    fn steps_that_make_no_sense_are_refused() {
        let (vm, vcpu, _) = guest();
        assert_eq!(set_steps(&vcpu, &[pages(WRITE, GPA + 2, 1)]), -libc::EINVAL);
        assert_eq!(set_steps(&vcpu, &[step(77)]), -libc::EINVAL);
        assert_eq!(set_steps(&Vcpu { fd: vm.fd, page: ptr::null_mut() }, &[step(HALT)]), -libc::EBADF);
    }
}
