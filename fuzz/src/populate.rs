//! Populations and jobs over little memory: the host stage for real, stage 2 where no kernel is beneath.

use crate::call::{call, call_with};
use crate::conversion;
use crate::guest::Guest;
use crate::heap::{Block, Passed, bytes_of, bytes_of_all, growing};
use crate::input::{GIANT, Input};
use crate::oracle::{demand, judge_output};
use crate::slots;
use kvmprep::abi::*;
use std::ffi::{c_int, c_void};

extern "C" fn go_on(_: *const kvmprep_progress, _: *mut c_void) -> c_int {
    0
}

/// Options of which most make sense.
fn options(input: &mut Input, guest: &Guest) -> kvmprep_populate_opts {
    let size: u128 = guest.record.values().map(|slot| u128::from(slot.size)).sum();
    kvmprep_populate_opts {
        struct_size: size_of::<kvmprep_populate_opts>() as u32,
        intent: input.code(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3]),
        flags: flags(input),
        // Terabytes would take as long as a gigabyte takes, thousands of times.
        timeout_ms: if size > u128::from(4 * GIANT) || guest.may_hold_up {
            2
        } else {
            input.pick(&[0, 0, 0, 1, 1000])
        },
        vcpu_fd: -1,
        host_threads: 0,
        vcpu_fds: std::ptr::null(),
        n_vcpu_fds: 0,
        progress: None,
        opaque: std::ptr::null_mut(),
        remaining: std::ptr::null_mut(),
        remaining_capacity: 0,
    }
}

fn flags(input: &mut Input) -> u32 {
    let bits = [
        (KVMPREP_POPULATE_HOST_ONLY, 4),
        (KVMPREP_POPULATE_HUGE_ADVICE, 8),
        (KVMPREP_POPULATE_REQUIRE_STAGE2, 4),
        (KVMPREP_POPULATE_CHECK_FREE, 8),
        (KVMPREP_POPULATE_SKIP_COVERED, 8),
        (KVMPREP_POPULATE_DIRTY_LOGGED, 8),
        (KVMPREP_POPULATE_EXACT, 2),
        (1 << 7, 64),
    ];
    bits.into_iter().filter(|(_, n)| input.rarely(*n)).fold(0, |flags, (bit, _)| flags | bit)
}

/// Descriptors of vCPUs: none of a real VM's, since they would run for real.
fn vcpus(input: &mut Input, guest: &Guest) -> Vec<i32> {
    let count = if guest.is_real || input.rarely(2) { 0 } else { 1 + input.below(3) };
    (100..100 + count as i32).map(|fd| if input.rarely(12) { input.pick(&[100, -1]) } else { fd }).collect()
}

/// kvmprep_populate().
pub fn populate(input: &mut Input, guest: &mut Guest) {
    const NAME: &str = "kvmprep_populate";
    guest.furnish(input);
    let ranges = slots::ranges(input, &guest.slots());
    let mut opts = options(input, guest);
    let vcpus = vcpus(input, guest);
    let vcpu_block = Block::new(&bytes_of_all(&vcpus), input.passed());
    (opts.vcpu_fds, opts.n_vcpu_fds) = (vcpu_block.pointer(), vcpus.len());
    if !guest.is_real && input.rarely(4) {
        opts.vcpu_fd = input.pick(&[99, 99, 99, 100, -2]);
    }
    opts.host_threads = if input.rarely(8) { input.pick(&[1, 1, 2, 1025]) } else { 0 };
    opts.progress = input.rarely(2).then_some(go_on as _);
    opts.remaining_capacity = input.below(4);
    let remaining = Block::output(opts.remaining_capacity * size_of::<kvmprep_range>(), input.passed());
    opts.remaining = remaining.pointer();
    let whole = size_of::<kvmprep_populate_result>();
    let size = input.struct_size(whole);
    let result = Block::output(size, input.passed());
    let range_block = Block::new(&bytes_of_all(&ranges), input.passed());
    let opts_block = Block::new(&growing(input, &opts), input.passed());
    guest.has_touched = true;
    let answer = call(input, NAME, &(&ranges, opts, size), |err| {
        // SAFETY: the handle lives; each block has what is said of it.
        unsafe {
            kvmprep_populate(
                guest.vm,
                range_block.pointer(),
                ranges.len(),
                opts_block.pointer(),
                result.pointer(),
                size,
                err,
            )
        }
    });
    // It is written on errors too, once work was begun.
    judge_output(NAME, &result, whole, answer.is_success() || !result.is_unwritten());
    if answer.is_success() && result.is_passed() && size >= whole {
        let done = result.read::<kvmprep_populate_result>();
        demand(done.remaining <= done.bytes, NAME, "no more remains than was asked for");
        demand(
            done.skipped <= done.bytes && done.stage2 <= done.bytes,
            NAME,
            "no more is done than asked for",
        );
        demand((done.n_remaining == 0) == (done.remaining == 0), NAME, "what remains lies in ranges");
    }
}

/// A job from its making to its end.
pub fn job(input: &mut Input, guest: &mut Guest) {
    const NAME: &str = "kvmprep_job_new";
    guest.furnish(input);
    let ranges = slots::ranges(input, &guest.slots());
    let range_block = Block::new(&bytes_of_all(&ranges), input.passed());
    let mut opts = options(input, guest);
    if input.rarely(16) {
        opts.vcpu_fd = 0;
    }
    let opts_block = Block::new(&growing(input, &opts), input.passed());
    let untouched = usize::MAX;
    let out = Block::new(&bytes_of(&untouched), input.passed());
    guest.has_touched = true;
    let answer = call(input, NAME, &(&ranges, opts), |err| {
        // SAFETY: the handle lives; each block has what is said of it.
        unsafe {
            kvmprep_job_new(
                guest.vm,
                range_block.pointer(),
                ranges.len(),
                opts_block.pointer(),
                out.pointer(),
                err,
            )
        }
    });
    let made = out.read::<usize>();
    demand((made != untouched) == answer.is_success(), NAME, "a job on success, and nothing else");
    if !answer.is_success() {
        return;
    }
    let job = made as *mut kvmprep_job;
    // SAFETY: the handle lives; it refuses, since the job lives.
    demand(unsafe { kvmprep_vm_free(guest.vm) } == -libc::EBUSY, "kvmprep_vm_free", "not while a job lives");
    for _ in 0..input.below(6) {
        job_call(input, guest, job);
    }
    // SAFETY: the job lives, and nobody is inside it.
    demand(unsafe { kvmprep_job_free(job) } == 0, "kvmprep_job_free", "a job can be freed");
}

/// Any call on a job, or a change of the guest while it lives.
fn job_call(input: &mut Input, guest: &mut Guest, job: *mut kvmprep_job) {
    match input.below(12) {
        0 | 1 => {
            let vcpu = if guest.is_real { -1 } else { input.pick(&[-1, 100, 101, -2]) };
            call(input, "kvmprep_job_run", &vcpu, |err| {
                // SAFETY: the job lives.
                unsafe { kvmprep_job_run(job, vcpu, err) }
            });
        }
        2 => {
            let own = slots::ranges(input, &guest.slots());
            let block = Block::new(&bytes_of_all(&own), input.passed());
            call(input, "kvmprep_job_run_near", &own, |err| {
                // SAFETY: the job lives; the block has that many ranges.
                unsafe { kvmprep_job_run_near(job, -1, block.pointer(), own.len(), err) }
            });
        }
        3 => {
            let vcpus = vcpus(input, guest);
            let threads = input.pick(&[0, 0, 1, 2, 1025]);
            let block = Block::new(&bytes_of_all(&vcpus), input.passed());
            call(input, "kvmprep_job_spawn", &(&vcpus, threads), |err| {
                // SAFETY: the job lives; the block has that many descriptors.
                unsafe { kvmprep_job_spawn(job, block.pointer(), vcpus.len(), threads, err) }
            });
        }
        4 => progress(input, job),
        5 => remaining(input, job),
        6 => wait(input, job),
        7 => {
            call(input, "kvmprep_job_cancel", &(), |err| {
                // SAFETY: the job lives.
                unsafe { kvmprep_job_cancel(job, err) }
            });
            wait(input, job);
        }
        8 => {
            let answer = call_with(Passed::Right, "kvmprep_job_fd", &(), |err| {
                // SAFETY: the job lives.
                unsafe { kvmprep_job_fd(job, err) }
            });
            demand(answer.is_success(), "kvmprep_job_fd", "a descriptor");
        }
        9 | 10 => conversion::any(input, guest, false),
        _ => match input.below(4) {
            0 => guest.changing(input),
            1 => guest.note(input),
            2 => guest.discarded(input),
            _ => guest.set_memslots(input),
        },
    }
}

fn progress(input: &mut Input, job: *mut kvmprep_job) {
    const NAME: &str = "kvmprep_job_progress";
    let whole = size_of::<kvmprep_progress>();
    let size = input.struct_size(whole);
    let out = Block::output(size, input.passed());
    let answer = call(input, NAME, &size, |err| {
        // SAFETY: the job lives; the block has that many bytes.
        unsafe { kvmprep_job_progress(job, out.pointer(), size, err) }
    });
    judge_output(NAME, &out, whole, answer.is_success());
    if answer.is_success() && size >= whole {
        let progress = out.read::<kvmprep_progress>();
        demand(progress.host_done <= progress.host_total, NAME, "no more is done than there is, in the host");
        demand(
            progress.stage2_done <= progress.stage2_total,
            NAME,
            "no more is done than there is, in stage 2",
        );
    }
}

fn remaining(input: &mut Input, job: *mut kvmprep_job) {
    let capacity = input.below(4);
    let ranges = Block::output(capacity * size_of::<kvmprep_range>(), input.passed());
    let n = Block::output(size_of::<usize>(), input.passed());
    call(input, "kvmprep_job_remaining", &capacity, |err| {
        // SAFETY: the job lives; the blocks have that many ranges, and a size_t.
        unsafe { kvmprep_job_remaining(job, ranges.pointer(), capacity, n.pointer(), err) }
    });
}

fn wait(input: &mut Input, job: *mut kvmprep_job) {
    let whole = size_of::<kvmprep_populate_result>();
    let size = input.struct_size(whole);
    let result = Block::output(size, input.passed());
    let timeout = input.below(2) as c_int;
    let answer = call(input, "kvmprep_job_wait", &(timeout, size), |err| {
        // SAFETY: the job lives; the block has that many bytes.
        unsafe { kvmprep_job_wait(job, timeout, result.pointer(), size, err) }
    });
    judge_output("kvmprep_job_wait", &result, whole, answer.is_success() || !result.is_unwritten());
}
