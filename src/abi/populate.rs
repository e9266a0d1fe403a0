//! Pre-population in one blocking call.

use super::boundary::*;
use super::error::kvmprep_error;
use super::vm::{kvmprep_range, kvmprep_vm};
use crate::error::{Error, Reason, Result};
use crate::kvm::Kernel;
use crate::memslot::{Backing, check_guest_width};
use crate::populate::job::{
    Job, Leave, Options, Progress, Report, VCPU_REFUSED_HINT, Worker, vcpu_refused_message, watch_vcpu,
};
use crate::populate::plan::Intent;
use crate::range::Range;
use crate::vm::Vm;
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The guest takes no stage-2 fault on memory, on read or write. Private copies are made where the mapping is
/// private. Read-only slots are treated as with KVMPREP_INTENT_READ.
pub const KVMPREP_INTENT_WRITE: u32 = 0;
/// The guest takes none on reads. Copy-on-write is never broken: a snapshot stays shared, and first writes to
/// private mappings fault twice afterwards, not once (`first_writes` in the result).
pub const KVMPREP_INTENT_READ: u32 = 1;
/// Only pages that this process's page tables hold are mapped, for writing where they are writable. Nothing is
/// allocated and userfaultfd never triggered (unless a page is taken away while the job runs; discards must be
/// announced): the intent for migration targets, postcopy and running guests. The rest is counted as `absent`.
/// Found by PAGEMAP_SCAN (Linux 6.7), else /proc/self/pagemap. guest_memfd pages without a mapping cannot be
/// asked about and are left out: as remaining, or, where the handle's record says that they are private, as absent.
pub const KVMPREP_INTENT_RESIDENT: u32 = 2;

/// Fill the host's page tables only.
pub const KVMPREP_POPULATE_HOST_ONLY: u32 = 1;
/// Advise huge pages (MADV_HUGEPAGE) for anonymous and shmem memory first. A refusal is told in the result.
pub const KVMPREP_POPULATE_HUGE_ADVICE: u32 = 2;
/// Fail with -EOPNOTSUPP where stage 2 cannot be filled; by default the host stage is done and the result says
/// so.
pub const KVMPREP_POPULATE_REQUIRE_STAGE2: u32 = 4;
/// Refuse with -ENOMEM, before anything is done, a population that surely does not fit what the machine, the
/// cgroup or the pool of huge pages has free. No promise that a population that passes will fit.
pub const KVMPREP_POPULATE_CHECK_FREE: u32 = 8;
/// Do only what is not known to be populated. By default all is done again, since the kernel may have dropped
/// pages unseen; what is there costs little.
pub const KVMPREP_POPULATE_SKIP_COVERED: u32 = 16;
/// Fill stage 2 of slots with KVM_MEM_LOG_DIRTY_PAGES too. Every page of them becomes dirty. Never with a dirty
/// ring: the kernel lets it overflow.
pub const KVMPREP_POPULATE_DIRTY_LOGGED: u32 = 32;
/// Refuse with -EINVAL, reason RANGE_INEXACT, before anything is done, ranges at whose edges KVM would be allowed to map
/// beyond them: it maps a whole page of 2 MiB or 1 GiB for one of 4 KiB asked for. `err` has the range as wide as its
/// edges would have to be. Whether huge pages are there at this moment does not matter, only whether the slot and the kind
/// of its memory can have them. Private memory has none: that a slot is all private is believed of who says so
/// (KVMPREP_BACKING_GUEST_MEMFD), since KVM goes by each page's attribute. With n = 0, or without stage 2, there is nothing to refuse. Since
/// 0.3.
pub const KVMPREP_POPULATE_EXACT: u32 = 64;

/// How far a population is. Its fields only grow in number; a callback must not rely on its sizeof.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_progress {
    /// Bytes that the host stage has to do.
    pub host_total: u64,
    /// Bytes that the host stage has done.
    pub host_done: u64,
    /// Bytes that stage 2 has to do.
    pub stage2_total: u64,
    /// Bytes that stage 2 has done, absent ones (KVMPREP_INTENT_RESIDENT) included.
    pub stage2_done: u64,
    /// Since the job was made, in nanoseconds.
    pub elapsed_ns: u64,
    /// 1 when the job is over, whether or not all was done.
    pub ended: u32,
    /// Zero.
    pub reserved: u32,
}

impl From<&Progress> for kvmprep_progress {
    fn from(progress: &Progress) -> Self {
        Self {
            host_total: progress.host_total,
            host_done: progress.host,
            stage2_total: progress.stage2_total,
            stage2_done: progress.stage2,
            elapsed_ns: progress.elapsed.as_nanos() as u64,
            ended: progress.ended.into(),
            reserved: 0,
        }
    }
}

/// Called with progress, at most some twenty times a second, on the thread inside kvmprep_populate(), holding no
/// lock: it may call any function of the library but those that free. Non-zero cancels. It must not unwind.
pub type kvmprep_progress_fn =
    Option<unsafe extern "C" fn(progress: *const kvmprep_progress, opaque: *mut c_void) -> c_int>;

/// How to populate. Start from KVMPREP_POPULATE_OPTS_INIT. An input that may grow.
///
/// A job (kvmprep_job_new()) reads only `intent`, `flags` and `timeout_ms`. Its threads come by kvmprep_job_run() and
/// kvmprep_job_spawn(), and so `vcpu_fd` must be -1, `progress` NULL, and `host_threads`, `n_vcpu_fds` and
/// `remaining_capacity` 0, as the _INIT macro leaves them; the other pointers do not matter then.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvmprep_populate_opts {
    /// sizeof(struct kvmprep_populate_opts).
    pub struct_size: u32,
    /// KVMPREP_INTENT_*.
    pub intent: u32,
    /// KVMPREP_POPULATE_*.
    pub flags: u32,
    /// How long it may take, in milliseconds; 0: as long as it takes. Kept to within one chunk, unless a thread
    /// is stuck in the kernel: on a vCPU that another thread runs, or on userfaultfd memory.
    pub timeout_ms: u32,
    /// A vCPU that the calling thread may use, or -1. It must be one of the handle's VM, which the library cannot
    /// check. See kvmprep_job_run().
    pub vcpu_fd: i32,
    /// Library threads to start for the host stage alone, 0 to 1024. The calling thread works too.
    pub host_threads: u32,
    /// vCPUs for library threads, one thread each, or NULL: of the handle's VM too. See kvmprep_job_spawn().
    pub vcpu_fds: *const i32,
    /// How many.
    pub n_vcpu_fds: usize,
    /// Called with progress, or NULL.
    pub progress: kvmprep_progress_fn,
    /// Passed to `progress`.
    pub opaque: *mut c_void,
    /// Where to write the ranges that remain undone, in order, or NULL.
    pub remaining: *mut kvmprep_range,
    /// How many fit there. `n_remaining` in the result says how many there are.
    pub remaining_capacity: usize,
}

// SAFETY: repr(C), integers, pointers and a nullable function pointer, no padding, the size first.
unsafe impl Growing for kvmprep_populate_opts {
    const FIRST: usize = 72;
}

const _: () = assert!(size_of::<kvmprep_populate_opts>() == 72);

impl kvmprep_populate_opts {
    pub(super) fn options(&self) -> Result<Options> {
        let known = KVMPREP_POPULATE_HOST_ONLY
            | KVMPREP_POPULATE_HUGE_ADVICE
            | KVMPREP_POPULATE_REQUIRE_STAGE2
            | KVMPREP_POPULATE_CHECK_FREE
            | KVMPREP_POPULATE_SKIP_COVERED
            | KVMPREP_POPULATE_DIRTY_LOGGED
            | KVMPREP_POPULATE_EXACT;
        check_flags(self.flags, known, "opts->flags")?;
        let has = |flag| self.flags & flag != 0;
        if has(KVMPREP_POPULATE_HOST_ONLY) && has(KVMPREP_POPULATE_REQUIRE_STAGE2) {
            return Err(Error::invalid(Reason::BadValue, "HOST_ONLY and REQUIRE_STAGE2 exclude each other")
                .hint("pass one of them"));
        }
        let intent = match self.intent {
            KVMPREP_INTENT_WRITE => Intent::Write,
            KVMPREP_INTENT_READ => Intent::Read,
            KVMPREP_INTENT_RESIDENT => Intent::Resident,
            other => {
                return Err(Error::invalid(
                    Reason::BadValue,
                    format!("opts->intent is {other}, no KVMPREP_INTENT_*"),
                )
                .hint("pass KVMPREP_INTENT_WRITE, _READ or _RESIDENT"));
            }
        };
        Ok(Options {
            intent,
            host_only: has(KVMPREP_POPULATE_HOST_ONLY),
            huge_advice: has(KVMPREP_POPULATE_HUGE_ADVICE),
            require_stage2: has(KVMPREP_POPULATE_REQUIRE_STAGE2),
            check_free: has(KVMPREP_POPULATE_CHECK_FREE),
            skip_covered: has(KVMPREP_POPULATE_SKIP_COVERED),
            dirty_logged_too: has(KVMPREP_POPULATE_DIRTY_LOGGED),
            for_conversion: false,
            exact: has(KVMPREP_POPULATE_EXACT),
            timeout: (self.timeout_ms != 0).then(|| Duration::from_millis(self.timeout_ms.into())),
        })
    }
}

/// Stage 2 was filled, for all that was not left out.
pub const KVMPREP_STAGE2_DONE: u32 = 0;
/// It was not wanted (KVMPREP_POPULATE_HOST_ONLY).
pub const KVMPREP_STAGE2_NOT_WANTED: u32 = 1;
/// There was no vCPU to fill it with.
pub const KVMPREP_STAGE2_NO_VCPU: u32 = 2;
/// This kernel, host or VM has no pre-fault.
pub const KVMPREP_STAGE2_UNAVAILABLE: u32 = 3;
/// Every vCPU refused: its confidential VM is not finalised, or, by the library's own look before a thread's first
/// pre-fault, it is in SMM or runs a nested guest.
pub const KVMPREP_STAGE2_VCPUS_REFUSED: u32 = 4;
/// It was stopped before its end.
pub const KVMPREP_STAGE2_UNFINISHED: u32 = 5;

/// The host stage had nothing to do.
pub const KVMPREP_HOST_NOTHING: u32 = 0;
/// madvise(MADV_POPULATE_READ), Linux 5.14.
pub const KVMPREP_HOST_POPULATE_READ: u32 = 1;
/// madvise(MADV_POPULATE_WRITE), Linux 5.14.
pub const KVMPREP_HOST_POPULATE_WRITE: u32 = 2;
/// fallocate(), then madvise(MADV_POPULATE_WRITE), chunk by chunk.
pub const KVMPREP_HOST_ALLOCATE_AND_POPULATE: u32 = 3;
/// fallocate() alone: guest_memfd.
pub const KVMPREP_HOST_ALLOCATE: u32 = 4;

/// What was done with the memory of one backing.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_backing_result {
    /// Bytes of it that were to be populated; 0: there is none, and the other fields mean nothing.
    pub bytes: u64,
    /// KVMPREP_HOST_*: how its host stage was done.
    pub host: u32,
    /// 1 when it was prepared for writing, 0 for reading only.
    pub writable: u32,
}

/// What was done. An output that may grow: pass it with its sizeof.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_populate_result {
    /// Bytes that were to be populated.
    pub bytes: u64,
    /// Bytes found covered and left alone (KVMPREP_POPULATE_SKIP_COVERED).
    pub skipped: u64,
    /// Bytes that went through the host stage.
    pub host: u64,
    /// Bytes mapped in stage 2.
    pub stage2: u64,
    /// Bytes not in memory and so not mapped (KVMPREP_INTENT_RESIDENT).
    pub absent: u64,
    /// Bytes mapped for reading whose first write will still fault. Not counted with KVMPREP_INTENT_RESIDENT, which
    /// maps for writing what the host's page tables have writable.
    pub first_writes: u64,
    /// Bytes kept out of stage 2 because their slot's writes are logged.
    pub dirty_logged: u64,
    /// Bytes mapped in stage 2 and perhaps lost again while the job ran, by a slot's deletion.
    pub lost: u64,
    /// Bytes that are not done: see `remaining` in the options.
    pub remaining: u64,
    /// In how many ranges.
    pub n_remaining: u64,
    /// Time in the host stage, summed over threads, in nanoseconds.
    pub host_ns: u64,
    /// Time in stage 2, summed over threads, in nanoseconds.
    pub stage2_ns: u64,
    /// Time by the clock, from the job's making to its end, in nanoseconds.
    pub wall_ns: u64,
    /// Times that the kernel was asked again.
    pub retries: u64,
    /// Times that a caller's thread was interrupted.
    pub interruptions: u64,
    /// By how much the VM's 4 KiB mappings have grown; other slots' changes meanwhile count too.
    pub pages_4k: i64,
    /// Likewise, 2 MiB.
    pub pages_2m: i64,
    /// Likewise, 1 GiB.
    pub pages_1g: i64,
    /// 1 when the kernel tells the three above (Linux 5.14), else 0.
    pub pages_known: u32,
    /// KVMPREP_STAGE2_*: what became of stage 2. It says nothing of `lost`, which may be most of it.
    pub stage2_state: u32,
    /// 1 when huge-page advice was asked for and refused somewhere.
    pub advice_refused: u32,
    /// Zero.
    pub reserved: u32,
    /// By backing: the element at KVMPREP_BACKING_*; the first is unused.
    pub backings: [kvmprep_backing_result; 16],
}

impl From<&Report> for kvmprep_populate_result {
    fn from(report: &Report) -> Self {
        let [pages_4k, pages_2m, pages_1g] = report.pages.unwrap_or_default();
        let mut backings = [kvmprep_backing_result::default(); 16];
        for (index, _) in Backing::ALL.iter().enumerate() {
            let done = &report.backings[index];
            backings[index + 1] =
                kvmprep_backing_result { bytes: done.bytes, host: done.host, writable: done.writable.into() };
        }
        Self {
            bytes: report.asked,
            skipped: report.skipped,
            host: report.host,
            stage2: report.stage2,
            absent: report.absent,
            first_writes: report.first_writes,
            dirty_logged: report.dirty_logged,
            lost: report.lost,
            remaining: report.remaining.size(),
            n_remaining: report.remaining.len() as u64,
            host_ns: report.host_ns,
            stage2_ns: report.stage2_ns,
            wall_ns: report.wall_ns,
            retries: report.retries,
            interruptions: report.interruptions,
            pages_4k,
            pages_2m,
            pages_1g,
            pages_known: report.pages.is_some().into(),
            stage2_state: report.stage2_state as u32,
            advice_refused: report.advice_refused.into(),
            reserved: 0,
            backings,
        }
    }
}

/// Decodes the ranges of a population.
///
/// # Safety
/// As [`slice`].
pub(super) unsafe fn decode_ranges(vm: &Vm, ranges: *const kvmprep_range, n: usize) -> Result<Vec<Range>> {
    let bits = vm.gpa_bits()?;
    // SAFETY: passed on from the caller.
    let ranges = unsafe { slice(ranges, n, "ranges")? };
    let decode = |range: &kvmprep_range| {
        let range = range.decode()?;
        check_guest_width(range, bits)?;
        Ok(range)
    };
    ranges.iter().map(decode).collect()
}

/// Writes ranges, as many as fit.
///
/// # Safety
/// `to` points to `capacity` writable elements, or `capacity` is 0.
pub(super) unsafe fn write_ranges(
    ranges: impl Iterator<Item = Range>,
    to: *mut kvmprep_range,
    capacity: usize,
) {
    for (index, range) in ranges.take(capacity).enumerate() {
        // SAFETY: below the capacity.
        unsafe { to.add(index).write(kvmprep_range::encode(range)) };
    }
}

/// Decodes the vCPUs for library threads: open ones, each once.
///
/// # Safety
/// As [`slice`].
pub(super) unsafe fn decode_vcpus<'a>(kernel: &dyn Kernel, fds: *const i32, n: usize) -> Result<&'a [RawFd]> {
    // SAFETY: passed on from the caller.
    let fds = unsafe { slice(fds, n, "vcpu_fds")? };
    for (index, fd) in fds.iter().enumerate() {
        required_fd(*fd, "a descriptor in vcpu_fds")?;
        if fds[..index].contains(fd) {
            return Err(Error::invalid(
                Reason::BadValue,
                format!("descriptor {fd} stands in vcpu_fds twice"),
            )
            .hint("pass each vCPU once: one thread uses it"));
        }
        watch_vcpu(kernel, *fd)?;
    }
    Ok(fds)
}

pub(super) fn check_thread_count(threads: u32) -> Result<u32> {
    if threads > 1024 {
        return Err(Error::invalid(Reason::BadValue, format!("{threads} host threads are more than 1024"))
            .hint("as many as the machine has CPUs is enough"));
    }
    Ok(threads)
}

/// Pre-populates guest memory: fills the host's page tables and, through the vCPUs given, the guest's stage-2
/// page tables, in the order that leaves no fault (Linux 5.14 for the first, 6.11 for the second).
///
/// `ranges` are `n` ranges of address space 0; overlaps are united. n = 0 means all memory of the slots that the
/// handle knows, but slots marked SPARSE or DEVICE, slots that are about to change, and, unless the intent is
/// RESIDENT, slots with userfaultfd; what is left out so is in `remaining`, the first two kinds apart. All the rest
/// must be memory: one piece that the kernel does not populate, such as a device's memory in a slot that is not
/// marked DEVICE, or a guard page (PROT_NONE), stops all. `opts` may be NULL for the defaults: then only the host
/// stage is done, by the calling thread.
///
/// Who works: the calling thread, with `opts->vcpu_fd` if that is not -1; `opts->host_threads` library threads
/// without a vCPU; one library thread for each of `opts->vcpu_fds`, for which the caller vouches that they are
/// parked, with no userspace exit pending, until the call returns. Library threads have a stack of 256 KiB and
/// all but the synchronous signals blocked; the library sets no affinity and no priority. A SIGBUS that memory
/// broken in hardware raises is synchronous: the program's handler runs on that stack, or, without one, the process
/// dies. The call returns once all of them are gone.
///
/// When: after KVM_SET_CPUID2 on each vCPU that works here, with all slots in place, before the vCPUs run; not in SMM
/// and not while a nested guest runs (such a vCPU is refused). A handle that knows no slots populates nothing, and that
/// succeeds. What undoes it later: the deletion of any slot (see kvmprep_keep_mappings()), dirty logging, and what
/// kvmprep_get_coverage() names. Before Linux 6.15 nobody may read or save the state of a vCPU that is being used: see
/// kvmprep_vcpu_pre_fault().
///
/// `result` may be NULL. It and `opts->remaining` are written whenever work was begun, on error too: no progress
/// is lost. But each call starts from the front: to do the rest after an interruption, call again with
/// KVMPREP_POPULATE_SKIP_COVERED or with `opts->remaining` as `ranges`; with KVMPREP_INTENT_RESIDENT, which leaves no
/// coverage, with the latter. The same call repeated under a periodic signal may never come to an end.
///
/// Threads: any; many populations may run at once on one VM, each with vCPUs of its own. Returns 0 when all that
/// can be done was done (see `stage2_state`), or -EINTR (a signal came to the calling thread while in a pre-fault
/// or waiting, or its vCPU's kvm_run.immediate_exit is set), -ECANCELED (`progress` said so), -ETIMEDOUT, -ENOENT
/// (no memslot in part of the ranges), -EBUSY (a named slot is changing or under userfaultfd; or, with
/// REQUIRE_STAGE2, a slot is dirty-logged, with n = 0 too: `err` names the first, and its range), -EACCES (a mapping that cannot be written), -EFAULT (memory that is not mapped
/// or whose file is too short), -ENOMEM (no memory, or the pool of huge pages that the message names is empty),
/// -EOPNOTSUPP (REQUIRE_STAGE2; no MADV_POPULATE on this kernel, or not for this memory), -EAGAIN (a slot's deletion
/// that was not announced and did not end; or no thread could be started), -EMFILE (no descriptor
/// for an event), -EHWPOISON, -EIO (VM dead or another process's), -EINVAL and -EBADF for bad arguments, -E2BIG (a
/// newer caller's options).
///
/// # Safety
/// Each pointer is NULL where that is allowed or points to what its type and count say.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_populate(
    vm: *mut kvmprep_vm,
    ranges: *const kvmprep_range,
    n: usize,
    opts: *const kvmprep_populate_opts,
    result: *mut kvmprep_populate_result,
    result_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = &reference(vm, "vm")?.0;
            check_optional_out(result, result_size, "result")?;
            let asked = decode_ranges(vm, ranges, n)?;
            let opts = if opts.is_null() { default_opts() } else { read_growing(opts, "opts")? };
            check_array(opts.remaining.cast_const(), opts.remaining_capacity, "opts->remaining")?;
            let mut options = opts.options()?;
            let threads = Threads {
                own: optional_fd(opts.vcpu_fd, "opts->vcpu_fd")?,
                vcpus: decode_vcpus(&*vm.kernel, opts.vcpu_fds, opts.n_vcpu_fds)?,
                hosts: check_thread_count(opts.host_threads)?,
            };
            if threads.own.is_some_and(|own| threads.vcpus.contains(&own)) {
                return Err(Error::invalid(Reason::BadValue, "opts->vcpu_fd stands in opts->vcpu_fds too")
                    .hint("pass each vCPU once: one thread uses it"));
            }
            let worker = Worker::visitor(&*vm.kernel, threads.own, &[])?;
            let has_vcpu = threads.own.is_some() || !threads.vcpus.is_empty();
            let no_vcpu = !has_vcpu && !options.host_only;
            if no_vcpu && options.require_stage2 {
                return Err(Error::new(
                    libc::EOPNOTSUPP,
                    Reason::NoStage2,
                    "no vCPU was passed to fill stage 2 with",
                )
                .hint("set opts->vcpu_fd or opts->vcpu_fds"));
            }
            options.host_only |= no_vcpu;
            let job = Job::new(vm, &asked, options)?;
            let verdict = drive(&job, worker, &threads, &opts);
            let report = job.report();
            write_ranges(report.remaining.iter(), opts.remaining, opts.remaining_capacity);
            if !result.is_null() {
                let mut done = kvmprep_populate_result::from(&report);
                if no_vcpu {
                    done.stage2_state = KVMPREP_STAGE2_NO_VCPU;
                }
                write_sized(result, result_size, &done, "result")?;
            }
            verdict.map(|()| 0)
        })
    }
}

struct Threads<'a> {
    own: Option<RawFd>,
    vcpus: &'a [RawFd],
    hosts: u32,
}

pub(super) fn default_opts() -> kvmprep_populate_opts {
    kvmprep_populate_opts {
        struct_size: size_of::<kvmprep_populate_opts>() as u32,
        intent: KVMPREP_INTENT_WRITE,
        flags: 0,
        timeout_ms: 0,
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

/// Works on the calling thread until the job is over and its threads are gone.
fn drive(
    job: &Arc<Job>,
    worker: Worker<'_>,
    threads: &Threads<'_>,
    opts: &kvmprep_populate_opts,
) -> Result<()> {
    let mut teller = Teller { call: opts.progress, opaque: Opaque(opts.opaque), last: Instant::now() };
    let spawned = job.spawn(threads.vcpus, threads.hosts);
    let leave = job.run(worker, &mut |job| teller.tell(job));
    if leave == Leave::Interrupted {
        job.cancel();
    }
    job.join_library(&mut |job| teller.tell(job));
    job.give_up();
    spawned?;
    if leave == Leave::Interrupted {
        return Err(interrupted(
            "call again with KVMPREP_POPULATE_SKIP_COVERED, or with opts->remaining as ranges (with \
             KVMPREP_INTENT_RESIDENT the latter): else all is done again from the front",
        ));
    }
    job.verdict()
}

pub(super) fn interrupted(hint: &'static str) -> Error {
    Error::new(libc::EINTR, Reason::Interrupted, "a signal came, or kvm_run.immediate_exit is set").hint(hint)
}

pub(super) fn refused() -> Error {
    Error::new(libc::EOPNOTSUPP, Reason::VcpuRefused, vcpu_refused_message()).hint(VCPU_REFUSED_HINT)
}

/// Tells the caller of progress, not too often.
struct Teller {
    call: kvmprep_progress_fn,
    opaque: Opaque,
    last: Instant,
}

impl Teller {
    fn tell(&mut self, job: &Job) {
        let Some(call) = self.call else { return };
        if self.last.elapsed() < Duration::from_millis(50) {
            return;
        }
        self.last = Instant::now();
        let progress = kvmprep_progress::from(&job.progress());
        // SAFETY: the caller's function, with the caller's pointer, on the caller's thread.
        if unsafe { call(&progress, self.opaque.0) } != 0 {
            job.cancel();
        }
    }
}
