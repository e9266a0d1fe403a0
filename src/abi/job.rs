//! Pre-population as a job that the caller's threads join.

use super::boundary::*;
use super::error::kvmprep_error;
use super::populate::*;
use super::vm::{kvmprep_range, kvmprep_vm};
use crate::error::{Error, Reason, Result};
use crate::populate::job::{Job, Leave, Worker};
use crate::range::Range;
use std::ffi::c_int;
use std::sync::Arc;
use std::time::Duration;

/// One population under way. Made by kvmprep_job_new(), freed by kvmprep_job_free(); may be used by many threads
/// at once.
pub struct kvmprep_job(Arc<Job>);

/// Makes a job: a population that threads join. The slots are taken as they are now; what changes of them later
/// is given up when it is announced (kvmprep_memslot_changing()). Nothing is populated yet, but huge-page advice,
/// where asked for, is given here, and the time limit begins.
///
/// `ranges`, `n` and `opts` are as for kvmprep_populate(), and are not needed after the call. Of the options only
/// `intent`, `flags` and `timeout_ms` are read, and the others must name no thread, no callback and no room for
/// ranges; NULL means the defaults.
///
/// On success `*out` is a job that the caller frees with kvmprep_job_free(); it keeps `vm` from being freed. On
/// error `*out` is untouched.
///
/// Threads: any. Returns 0, or -EINVAL, -E2BIG, -ENOENT, -EBUSY, -EACCES, -EFAULT, -ENOMEM, -EOPNOTSUPP as
/// kvmprep_populate() does, or -EMFILE (no descriptor for the job's event).
///
/// # Safety
/// Each pointer is NULL where that is allowed or points to what its type and count say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_new(
    vm: *mut kvmprep_vm,
    ranges: *const kvmprep_range,
    n: usize,
    opts: *const kvmprep_populate_opts,
    out: *mut *mut kvmprep_job,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = &reference(vm, "vm")?.0;
            check_out(out, "out")?;
            let asked = decode_ranges(vm, ranges, n)?;
            let opts = if opts.is_null() { default_opts() } else { read_growing(opts, "opts")? };
            let has_threads = opts.vcpu_fd != -1 || opts.n_vcpu_fds != 0 || opts.host_threads != 0;
            if has_threads || opts.progress.is_some() || opts.remaining_capacity != 0 {
                return Err(Error::invalid(
                    Reason::BadValue,
                    "a job's options name threads, a callback or an array",
                )
                .hint(
                    "use kvmprep_job_run, kvmprep_job_spawn, kvmprep_job_progress and kvmprep_job_remaining",
                ));
            }
            let job = Job::new(vm, &asked, opts.options()?)?;
            write(out, Box::into_raw(Box::new(kvmprep_job(job))), "out")?;
            Ok(0)
        })
    }
}

/// Works on the job, on the calling thread, until nothing is left for it to do. `vcpu_fd` is a vCPU of the handle's
/// VM that no other thread runs or uses meanwhile, with no userspace exit pending (a failed pre-fault overwrites
/// kvm_run), or -1 for the host stage only. Whose vCPU it is the library cannot check: with another VM's, that VM's
/// page tables are filled, and success is reported.
///
/// Made for a VMM's own vCPU threads: a thread comes before its first KVM_RUN, or in between. To get it back, do
/// as for KVM_RUN: set kvm_run.immediate_exit, then send a signal that has a handler; the thread returns -EINTR
/// within one chunk, nothing is lost, and it may come again. A signal alone ends only a pre-fault or a wait: the
/// host stage goes on under any but a fatal one, and a signal that comes then is forgotten. Who does not use
/// immediate_exit, and a thread with vcpu_fd -1, which has none to set, comes back by the end of the work or by
/// kvmprep_job_cancel(). A chunk is 2 MiB, or one
/// page of the backing if that is larger. Signals do not end a wait for another thread that runs this vCPU, nor
/// one for userfaultfd memory in the host stage.
///
/// Threads: any number at once, each with a vCPU of its own. Returns 0 when nothing is left for this thread:
/// the job is over, or what remains needs a vCPU and this thread has none; kvmprep_job_wait() with a timeout of 0
/// tells which. -EINTR: see above. -EOPNOTSUPP
/// (VCPU_REFUSED): this vCPU cannot now; its work is left for others. -EINVAL (`job` NULL), -EBADF (not a
/// vCPU), -ENOMEM (its kvm_run cannot be mapped). When the job has failed, been cancelled or run out of time: its error, as
/// kvmprep_job_wait() gives it.
///
/// # Safety
/// `job` is a job, `err` points to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_run(
    job: *mut kvmprep_job,
    vcpu_fd: c_int,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let job = &reference(job, "job")?.0;
            run(job, vcpu_fd, &[])
        })
    }
}

/// As kvmprep_job_run(), for a thread that has memory of its own: what lies in `own` it takes first, then it helps
/// with the rest. For NUMA: the thread runs on a node, and the ranges are that node's. The library sets no
/// affinity.
///
/// Threads and errors: as kvmprep_job_run(), and -EINVAL for a bad range. `own` is not needed after the call.
///
/// # Safety
/// `job` is a job, `own` points to `n_own` elements, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_run_near(
    job: *mut kvmprep_job,
    vcpu_fd: c_int,
    own: *const kvmprep_range,
    n_own: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let job = &reference(job, "job")?.0;
            let own =
                slice(own, n_own, "own")?.iter().map(kvmprep_range::decode).collect::<Result<Vec<_>>>()?;
            run(job, vcpu_fd, &own)
        })
    }
}

fn run(job: &Arc<Job>, vcpu_fd: c_int, own: &[Range]) -> Result<c_int> {
    // Held on to: the job may be freed as soon as this thread does not count as being inside.
    let job = Arc::clone(job);
    let worker = Worker::visitor(job.kernel(), optional_fd(vcpu_fd, "vcpu_fd")?, own)?;
    match job.run(worker, &mut |_| {}) {
        Leave::NoWork => Ok(0),
        Leave::Interrupted => Err(interrupted("run the job again: what is done stays done")),
        Leave::VcpuRefused => Err(refused()),
        Leave::Ended => job.verdict().map(|()| 0),
    }
}

/// Starts library threads that work on the job: one for each of `n_vcpus` vCPUs, and `host_threads` (0 to 1024)
/// for the host stage only. Returns at once.
///
/// The caller vouches that the vCPUs are the handle's VM's, which the library cannot check (see kvmprep_job_run()),
/// and that they are parked, with no userspace exit pending, until the job is over: a vCPU
/// ioctl waits, and no signal ends the wait, while its vCPU is inside KVM_RUN, a halted one included. When every
/// vCPU given refuses and no caller's thread is inside, the job ends with what the host stage could do. Host
/// threads alone do not end a job that wants stage 2: it waits for a thread with a vCPU. Where none will come, ask
/// for KVMPREP_POPULATE_HOST_ONLY.
///
/// The threads have a stack of 256 KiB, all but the synchronous signals blocked, and the caller's affinity and
/// priority. A SIGBUS that memory broken in hardware raises is synchronous: the program's handler runs on that
/// stack, or, without one, the process dies, as it does on any thread.
///
/// Threads: any. Returns 0, or -EINVAL (NULL, too many threads, a vCPU twice), -EBADF, -EAGAIN (a thread could
/// not be started: the job has then failed).
///
/// # Safety
/// `job` is a job, `vcpu_fds` points to `n_vcpus` ints, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_spawn(
    job: *mut kvmprep_job,
    vcpu_fds: *const c_int,
    n_vcpus: usize,
    host_threads: u32,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let job = &reference(job, "job")?.0;
            job.spawn(decode_vcpus(job.kernel(), vcpu_fds, n_vcpus)?, check_thread_count(host_threads)?)?;
            Ok(0)
        })
    }
}

/// Says how far the job is, and quiets its descriptor until there is more to say.
///
/// Threads: any. Returns 0, or -EINVAL (a pointer NULL or misaligned, a bad size).
///
/// # Safety
/// `job` is a job, `progress` points to `progress_size` bytes, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_progress(
    job: *mut kvmprep_job,
    progress: *mut kvmprep_progress,
    progress_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let job = &reference(job, "job")?.0;
            // First, since to ask for progress quiets the descriptor.
            check_sized_out(progress, progress_size, "progress")?;
            write_sized(progress, progress_size, &(&job.progress()).into(), "progress")?;
            Ok(0)
        })
    }
}

/// Says which memory is not done, in order: at any time, at the end above all. Writes as many ranges as fit in
/// `capacity` and returns in `*n` how many there are, which may be more.
///
/// Threads: any. Returns 0, or -EINVAL (a pointer NULL or misaligned; `ranges` may be NULL when `capacity` is 0).
///
/// # Safety
/// `job` is a job, `ranges` points to `capacity` elements, `n` to a size_t, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_remaining(
    job: *mut kvmprep_job,
    ranges: *mut kvmprep_range,
    capacity: usize,
    n: *mut usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let job = &reference(job, "job")?.0;
            check_out(n, "n")?;
            check_array(ranges.cast_const(), capacity, "ranges")?;
            let remaining = job.remaining();
            write_ranges(remaining.iter(), ranges, capacity);
            write(n, remaining.len(), "n")?;
            Ok(0)
        })
    }
}

/// Waits for the end of the job, at most `timeout_ms` milliseconds; negative: as long as it takes; 0: asks only.
/// It does no work itself. The end is when no thread has memory in hand any more, after a cancellation too. A job
/// that only callers' threads work on ends when they have done it all, or by kvmprep_job_cancel() or its time
/// limit. So does one that only host threads work on, unless KVMPREP_POPULATE_HOST_ONLY was asked for or there is
/// no stage 2 here: without a thread that has a vCPU, a wait without a limit never returns.
///
/// `result` may be NULL; it is written when the job is over, whether it succeeded or not.
///
/// Threads: any. Returns what became of the job: 0, or an error as kvmprep_populate() gives it; or, when it is
/// not over, -ETIMEDOUT (reason NOT_FINISHED), or -EINTR (a signal came to this thread: wait again). -EINVAL (a
/// pointer NULL or misaligned, a bad size).
///
/// # Safety
/// `job` is a job, `result` is NULL or points to `result_size` bytes, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_wait(
    job: *mut kvmprep_job,
    timeout_ms: c_int,
    result: *mut kvmprep_populate_result,
    result_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let job = &reference(job, "job")?.0;
            check_optional_out(result, result_size, "result")?;
            job.wait(u64::try_from(timeout_ms).ok().map(Duration::from_millis))?;
            if !result.is_null() {
                write_sized(result, result_size, &(&job.report()).into(), "result")?;
            }
            job.verdict().map(|()| 0)
        })
    }
}

/// Stops the job: every thread leaves within one chunk, unless it is stuck in the kernel (see kvmprep_job_run()).
/// What is done stays done. A job that is over is left as it is.
///
/// Threads: any; it waits for nothing. Not from a signal handler. Returns 0, or -EINVAL (`job` NULL).
///
/// # Safety
/// `job` is a job, `err` points to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_cancel(job: *mut kvmprep_job, err: *mut kvmprep_error) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            reference(job, "job")?.0.cancel();
            Ok(0)
        })
    }
}

/// A descriptor that becomes readable, at most twenty times a second, when there is progress since the last
/// kvmprep_job_progress(), and is readable for good when the job is over: for poll and its like. Do not read
/// from it: kvmprep_job_progress() quiets it. It belongs to the job: it must not be closed, and is gone with the
/// job. That the time limit has passed is noticed by the threads at work and by calls on the job: where there are
/// neither, poll with that limit.
///
/// Threads: any. Returns the descriptor, or -EINVAL (`job` NULL).
///
/// # Safety
/// `job` is a job, `err` points to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_fd(job: *const kvmprep_job, err: *mut kvmprep_error) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe { boundary(err, || Ok(reference(job, "job")?.0.event_fd())) }
}

/// Frees a job; NULL is accepted and does nothing. A job under way is cancelled first, and its library threads
/// are waited for.
///
/// Threads: any, but no other call on the job may be under way or follow. Returns 0, or -EBUSY while a caller's
/// thread is inside kvmprep_job_run(): the job is then cancelled, and must be freed again;
/// or -EINVAL (`job` misaligned).
///
/// # Safety
/// `job` is NULL or a job that has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_job_free(job: *mut kvmprep_job) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(std::ptr::null_mut(), || {
            if job.is_null() {
                return Ok(0);
            }
            let inner = &reference(job, "job")?.0;
            inner.cancel();
            if inner.has_visitors() {
                return Err(Error::new(libc::EBUSY, Reason::Busy, "a caller's thread is inside the job"));
            }
            inner.join_library(&mut |_| {});
            let job = Box::from_raw(job).0;
            // A caller's thread that has just left may be a few instructions from its return.
            while Arc::strong_count(&job) > 1 {
                std::thread::yield_now();
            }
            Ok(0)
        })
    }
}
