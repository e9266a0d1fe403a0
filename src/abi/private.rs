//! Private memory: guest_memfd, what is private and what shared, and conversion.

use super::boundary::*;
use super::error::kvmprep_error;
use super::vm::{kvmprep_range, kvmprep_vm};
use crate::error::{Error, Reason, Result};
use crate::kvm::Linux;
use crate::kvm::caps::Caps;
use crate::private::convert::Steps;
use crate::private::visibility::{Run, Visibility};
use crate::private::{exits, gmem};
use crate::range::{Range, is_page_aligned};
use crate::vm::{ConvertOptions, ConvertReport, check_vm};
use std::ffi::{c_int, c_void};
use std::os::fd::IntoRawFd;

/// Memory that the host and the guest share.
pub const KVMPREP_SHARED: u32 = 0;
/// Memory that is the guest's alone (KVM_MEMORY_ATTRIBUTE_PRIVATE): its memslot's guest_memfd serves it.
pub const KVMPREP_PRIVATE: u32 = 1;

const _: () =
    assert!(Visibility::Private as u32 == KVMPREP_PRIVATE && Visibility::Shared as u32 == KVMPREP_SHARED);

fn decode_visibility(value: u32, name: &str) -> Result<Visibility> {
    match value {
        KVMPREP_SHARED => Ok(Visibility::Shared),
        KVMPREP_PRIVATE => Ok(Visibility::Private),
        _ => Err(Error::invalid(Reason::BadValue, format!("{name} is {value}, neither private nor shared"))
            .hint("pass KVMPREP_SHARED or KVMPREP_PRIVATE")),
    }
}

/// The file can be mapped, and serves all of a memslot's memory, private or not (GUEST_MEMFD_FLAG_MMAP, Linux 6.18).
pub const KVMPREP_GMEM_MMAP: u64 = 1;
/// Its memory begins as shared: this process may touch its mapping (GUEST_MEMFD_FLAG_INIT_SHARED, Linux 6.19 at the latest;
/// not in a VM with private memory).
pub const KVMPREP_GMEM_INIT_SHARED: u64 = 2;

const _: () = assert!(gmem::MMAP == KVMPREP_GMEM_MMAP && gmem::INIT_SHARED == KVMPREP_GMEM_INIT_SHARED);

/// Makes a guest_memfd for a VM: memory that a memslot with KVM_MEM_GUEST_MEMFD has its private pages from.
///
/// `size` is in bytes, a multiple of 4096 and not 0; it is not rounded. `flags` are KVMPREP_GMEM_*, of which the VM must
/// support each (kvmprep_caps.guest_memfd_flags). The descriptor is the caller's, and close-on-exec: KVM makes it without,
/// so that a fork() and exec() at just that moment could hand it on. Keep it open for as long as a memslot has a part of
/// it: KVM holds on to the memory, not to the descriptor, and drops all of it when the last one is closed; the guest's next
/// access then ends in EFAULT. While it is open the VM lives on.
///
/// Threads: any. Returns the descriptor, or -EINVAL (a size that is 0, not aligned or larger than 2^63 - 1, a flag that is
/// unknown or that this VM does not take; reason GMEM_UNUSED: without KVMPREP_GMEM_MMAP in a VM that has no private memory,
/// which KVM takes and never uses), -EOPNOTSUPP (NO_PRIVATE_MEMORY: no guest_memfd for this VM; before Linux 6.18 only VMs
/// with private memory have them), -EBADF (no VM), -EMFILE, -ENFILE, -ENOMEM. Needs Linux 6.8. Since kvmprep 0.4.
///
/// # Safety
/// `err` points to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_gmem_create(
    vm_fd: c_int,
    size: u64,
    flags: u64,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm_fd = required_fd(vm_fd, "vm_fd")?;
            let kernel = Linux::default();
            check_vm(&kernel, vm_fd)?;
            let caps = Caps::probe(&kernel, None, Some(vm_fd))
                .map_err(|errno| Error::kernel(errno, "probing the VM"))?;
            Ok(gmem::create(&kernel, &caps, vm_fd, size, flags)?.into_raw_fd())
        })
    }
}

/// Neighbouring pages of a guest that are all private, or all shared. Its layout is fixed for ever.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_visibility_run {
    /// First byte; a multiple of 4096.
    pub gpa: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// KVMPREP_SHARED or KVMPREP_PRIVATE.
    pub visibility: u32,
    /// Zero.
    pub reserved0: u32,
    /// Zero.
    pub reserved: [u64; 3],
}

const _: () = assert!(size_of::<kvmprep_visibility_run>() == 48);

impl From<Run> for kvmprep_visibility_run {
    fn from(run: Run) -> Self {
        Self {
            gpa: run.range.start,
            size: run.range.size(),
            visibility: run.visibility as u32,
            ..Self::default()
        }
    }
}

/// Says whether the memory at `gpa` is private or shared, and how far the same goes on from there, at most to the end of the
/// guest's addresses (kvmprep_vm_config.gpa_bits).
///
/// What is said is what the handle did (kvmprep_convert() and the kvmprep_handle_ functions) or was told
/// (kvmprep_visibility_note()); what nobody spoke of is shared, as it is for KVM. Memslots play no part: KVM keeps the
/// attribute of addresses that have none. To go through all memory:
/// `for (gpa = 0; kvmprep_visibility_next(vm, gpa, &run, NULL) == 0; gpa = run.gpa + run.size)`
///
/// Threads: any; while memory is being converted, what is said of it may be true no more. It takes a time that depends on
/// the run, not on the guest's size. Returns 0, or -ENOENT (`gpa` is at the end of the guest's addresses, or beyond),
/// -EINVAL (a pointer NULL or misaligned, `gpa` not a multiple of 4096). Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `run` points to a kvmprep_visibility_run, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_visibility_next(
    vm: *const kvmprep_vm,
    gpa: u64,
    run: *mut kvmprep_visibility_run,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            check_out(run, "run")?;
            if !is_page_aligned(gpa) {
                return Err(Error::invalid(
                    Reason::RangeUnaligned,
                    format!("gpa {gpa:#x} is not a multiple of 4096"),
                )
                .hint("begin at 0, and go on at the end of each run"));
            }
            write(run, vm.0.visibility_at(gpa)?.into(), "run")?;
            Ok(0)
        })
    }
}

/// Notes that the caller has made memory private or shared itself, by KVM_SET_MEMORY_ATTRIBUTES: the guest's memory at its
/// start, or conversions that do not go through the library. What has changed is not covered any more
/// (kvmprep_get_coverage()). The range need not lie in memslots.
///
/// Note everything: the handle's record must be KVM's. A conversion to what the record says already does nothing.
///
/// From the first note or conversion on, a population goes by the record, page by page; before, a memslot with a
/// guest_memfd is taken to be as its `backing` says.
///
/// Threads: any; waits for conversions that overlap. Returns 0, or -EINVAL (a pointer NULL or misaligned, a bad range or
/// visibility; SHARED_BIT: guest addresses are passed without that bit), -EDEADLK (from inside a `changed` function, about
/// memory that its thread is converting). Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_visibility_note(
    vm: *mut kvmprep_vm,
    range: *const kvmprep_range,
    visibility: u32,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let range = reference(range, "range")?.decode()?;
            vm.0.note_visibility(range, decode_visibility(visibility, "visibility")?)?;
            Ok(0)
        })
    }
}

/// Tell KVM (KVM_SET_MEMORY_ATTRIBUTES). Without this step the caller has told it, just before, and the call notes that.
pub const KVMPREP_CONVERT_ATTRIBUTES: u32 = 1;
/// Give up the memory that has gone out of the guest's sight: of the guest_memfd what is shared now, of the memory at the
/// hva what is private now. That is done by what lies there: MADV_DONTNEED for private mappings, MADV_REMOVE for shared ones;
/// where these are locked, a hole is punched into `memory_fd`. What cannot go is kept: see kvmprep_convert_result.kept.
/// Where a guest_memfd that is mapped serves all of a slot's memory nothing goes out of sight, and nothing is given up.
pub const KVMPREP_CONVERT_DROP: u32 = 2;
/// Fill both page tables of the range, on its new side, and those of the rest of the huge pages that the conversion has
/// broken up: the guest takes no fault on either.
pub const KVMPREP_CONVERT_PREFAULT: u32 = 4;

/// Do not give up shared memory that becomes private: a device may have it pinned, or its content may be wanted when it
/// becomes shared again.
pub const KVMPREP_CONVERT_KEEP_SHARED: u32 = 1;

/// Called of each run of memory that has changed: KVM knows, and the memory out of sight is still there. Here a VMM unmaps
/// what became private from its devices (VFIO), or maps what became shared. `to` is KVMPREP_SHARED or KVMPREP_PRIVATE.
///
/// Returns 0, or a negative errno (what is no errno counts as -EINVAL): then the run is put back, and the conversion ends
/// there with that errno. Where putting it back fails, or the caller has set the attributes, it stays. Such a run is told of
/// again when the call is repeated, and so is one whose memory could not be given up. Long runs come in pieces of up to 64 MiB,
/// cut at multiples of that. What the guest has put meanwhile into memory that is put back is lost to it, and with TDX all of
/// a private page's content: KVM removes it when it is made shared.
///
/// It runs on the thread that converts, which has the turn for that memory: from inside, what overlaps cannot be converted or
/// noted, nor its memslots announced or set (-EDEADLK); kvmprep_memslot_note() must not be called of them. It must neither
/// wait for a job nor free one, nor take a lock that another thread holds while it calls what waits for conversions:
/// kvmprep_memslot_changing(), kvmprep_memslot_set(), kvmprep_vm_set_memslots(), kvmprep_range_discarded(),
/// kvmprep_host_range_discarded(), kvmprep_visibility_note(), conversion itself, and all that works on a job or waits for one
/// (kvmprep_populate(), kvmprep_job_run(), kvmprep_job_wait(), kvmprep_job_free()). It must not unwind.
pub type kvmprep_changed_fn =
    Option<unsafe extern "C" fn(range: *const kvmprep_range, to: u32, opaque: *mut c_void) -> c_int>;

/// What a conversion has done. An output that may grow: pass it with its sizeof.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_convert_result {
    /// Bytes that have become private or shared by this call.
    pub converted: u64,
    /// Bytes of memory that were given up.
    pub dropped: u64,
    /// Bytes of memory that are out of sight and were kept: with KVMPREP_CONVERT_KEEP_SHARED; parts of a pool's huge pages
    /// whose rest is to stay, which go with it; memory that several slots show, or that has a userfaultfd handler
    /// (KVMPREP_MEMSLOT_USERFAULTFD); and what the kernel does not give up (a device's memory, a sealed file's).
    pub kept: u64,
    /// Bytes filled in stage 2.
    pub prefaulted: u64,
    /// Of these, bytes beside the range: the rest of huge pages that were broken up.
    pub neighbours: u64,
    /// Calls of KVM_SET_MEMORY_ATTRIBUTES.
    pub calls: u64,
}

impl From<&ConvertReport> for kvmprep_convert_result {
    fn from(report: &ConvertReport) -> Self {
        Self {
            converted: report.done.converted,
            dropped: report.done.dropped,
            kept: report.done.kept,
            prefaulted: report.prefaulted,
            neighbours: report.neighbours,
            calls: report.done.calls,
        }
    }
}

/// How to convert. Start from KVMPREP_CONVERT_OPTS_INIT. An input that may grow.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvmprep_convert_opts {
    /// sizeof(struct kvmprep_convert_opts).
    pub struct_size: u32,
    /// KVMPREP_CONVERT_ATTRIBUTES, _DROP, _PREFAULT; the _INIT macro has the first two, which 0 means too. Each has its own
    /// meaning when left out: without ATTRIBUTES the caller has told KVM, and the record is changed all the same.
    pub steps: u32,
    /// KVMPREP_CONVERT_KEEP_SHARED.
    pub flags: u32,
    /// With KVMPREP_CONVERT_PREFAULT: a vCPU of the handle's VM that the calling thread may use, or -1: only the host's page
    /// tables are filled. Not read without. It may be in the middle of an exit: take what you need out of kvm_run first,
    /// since a failing pre-fault overwrites it, and write the answer afterwards.
    pub vcpu_fd: i32,
    /// The largest range that one call takes, in bytes, a multiple of 4096; 0: no limit. For what guests ask: a larger request
    /// is refused, whether or not there is anything to do.
    pub max_size: u64,
    /// Called of each run that has changed, or NULL.
    pub changed: kvmprep_changed_fn,
    /// Passed to `changed`.
    pub opaque: *mut c_void,
    /// Where to say what was done, or NULL. Written whenever the arguments were right, also with an error.
    pub result: *mut kvmprep_convert_result,
    /// sizeof(struct kvmprep_convert_result), where there is a `result`.
    pub result_size: usize,
}

// SAFETY: repr(C), integers, pointers and a nullable function pointer, no padding, the size first.
unsafe impl Growing for kvmprep_convert_opts {
    const FIRST: usize = 56;
}

const _: () = assert!(size_of::<kvmprep_convert_opts>() == 56);

const DEFAULT_STEPS: u32 = KVMPREP_CONVERT_ATTRIBUTES | KVMPREP_CONVERT_DROP;

const DEFAULT: kvmprep_convert_opts = kvmprep_convert_opts {
    struct_size: size_of::<kvmprep_convert_opts>() as u32,
    steps: DEFAULT_STEPS,
    flags: 0,
    vcpu_fd: -1,
    max_size: 0,
    changed: None,
    opaque: std::ptr::null_mut(),
    result: std::ptr::null_mut(),
    result_size: 0,
};

/// Reads the options, lets `convert` do its work with them, and writes what was done.
///
/// # Safety
/// `opts` is NULL or points to a kvmprep_convert_opts whose pointers are what its fields say.
unsafe fn with_options(
    opts: *const kvmprep_convert_opts,
    convert: impl FnOnce(&ConvertOptions<'_>, &mut ConvertReport) -> Result<()>,
) -> Result<()> {
    // SAFETY: passed on from the caller.
    let opts = if opts.is_null() { DEFAULT } else { unsafe { read_growing(opts, "opts") }? };
    check_flags(opts.steps, DEFAULT_STEPS | KVMPREP_CONVERT_PREFAULT, "opts->steps")?;
    check_flags(opts.flags, KVMPREP_CONVERT_KEEP_SHARED, "opts->flags")?;
    check_optional_out(opts.result, opts.result_size, "opts->result")?;
    let steps = if opts.steps == 0 { DEFAULT_STEPS } else { opts.steps };
    let has = |step| steps & step != 0;
    let prefault = has(KVMPREP_CONVERT_PREFAULT);
    if !is_page_aligned(opts.max_size) {
        return Err(Error::invalid(
            Reason::BadValue,
            format!("opts->max_size is {:#x}, not a multiple of 4096", opts.max_size),
        )
        .hint("pass a multiple of 4096 bytes, or 0 for no limit"));
    }
    let changed = |range, to: Visibility| match opts.changed {
        None => 0,
        // SAFETY: the caller's function, with the caller's pointer, on the caller's thread.
        Some(changed) => unsafe { changed(&kvmprep_range::encode(range), to as u32, opts.opaque) },
    };
    let options = ConvertOptions {
        steps: Steps { attributes: has(KVMPREP_CONVERT_ATTRIBUTES), drop: has(KVMPREP_CONVERT_DROP) },
        prefault,
        keep_shared: opts.flags & KVMPREP_CONVERT_KEEP_SHARED != 0,
        vcpu: if prefault { optional_fd(opts.vcpu_fd, "opts->vcpu_fd")? } else { None },
        max_size: (opts.max_size != 0).then_some(opts.max_size),
        changed: &changed,
    };
    let mut report = ConvertReport::default();
    let outcome = convert(&options, &mut report);
    if !opts.result.is_null() {
        // SAFETY: passed on from the caller.
        unsafe {
            write_sized(opts.result, opts.result_size, &kvmprep_convert_result::from(&report), "opts->result")
        }?;
    }
    outcome
}

/// Makes memory private or shared.
///
/// In this order, which neither exposes nor loses data: for each run of the range that is not so yet, KVM is told, then
/// `opts->changed`, then the memory is given up that has gone out of sight; at last, when asked for, both page tables of the
/// whole range are filled, and those of the rest of the huge pages that were broken up. `opts` may be NULL: KVM is told and
/// memory given up. Only what changes costs system calls, but for what KVMPREP_CONVERT_PREFAULT asks for. The content is
/// not taken along: what becomes visible is fresh memory, or what was kept there; of a private mapping of a file, the file's
/// content. Where a guest_memfd made with KVMPREP_GMEM_MMAP is behind the slot, both sides are one: nothing is given up, and the
/// content stays. With a DROP that was left out once, the memory can be given up by the VMM alone. Memory of the initial image
/// that becomes shared has lost what was measured, and cannot be claimed again.
///
/// The range may span memslots and holes between them. Holes can only be shared, as firmware makes them; so can memory
/// without a guest_memfd. When some of the range cannot be private, nothing of it becomes so.
///
/// On an error the record (kvmprep_visibility_next()) says what is true in KVM, and `err` from where on (`gpa`, `size`) the
/// work is not finished. Calling again finishes it. The stage tells what: with KVMPREP_STAGE_HOST or _STAGE2 all is
/// converted and only not populated: the guest can be run, and faults. With KVMPREP_STAGE_DROP the memory at `gpa` is
/// converted and its other side not given up. Without KVMPREP_CONVERT_ATTRIBUTES the record learns what the caller has told
/// KVM when the work gets there: after an error that came before, it is KVM's again only when the call has been repeated.
///
/// The record must be KVM's: what the handle was never told of counts as shared, so that making it shared does nothing. Where
/// memory began as private, note that first (kvmprep_visibility_note()).
///
/// Threads: any, many at once, vCPUs' own above all. Calls whose memory overlaps take turns, whole huge pages considered
/// (2 MiB with KVMPREP_CONVERT_PREFAULT, the page's size in a pool's memory), for 64 MiB at a time; others run side by side.
/// Jobs are kept away from the memory meanwhile and go on with what it has become. A call waits for another's `changed`.
///
/// Returns 0, or -EINVAL (a pointer NULL or misaligned, a bad range, flag or value; NO_MEMSLOT or NO_GMEM: a part that cannot
/// be private; CONVERT_TOO_LARGE; SHARED_BIT), -E2BIG (a newer caller's field), -EOPNOTSUPP (NO_PRIVATE_MEMORY), -EBUSY
/// (MEMSLOT_CHANGING: again after kvmprep_memslot_note()), -EBADF (the guest_memfd was closed; `vcpu_fd` is no vCPU),
/// -ENOMEM, -EIO (VM_DEAD), -EINTR (with KVMPREP_CONVERT_PREFAULT: a signal came, or kvm_run.immediate_exit is set), -EDEADLK (from inside a
/// `changed` function), what `changed` returned (CALLBACK_FAILED), and what kvmprep_populate() returns. Needs Linux 6.8 and a VM
/// of a type with private memory, to make any private. Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `opts` to a kvmprep_convert_opts or is NULL, `err` to a
/// kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_convert(
    vm: *mut kvmprep_vm,
    range: *const kvmprep_range,
    to: u32,
    opts: *const kvmprep_convert_opts,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let range = reference(range, "range")?.decode()?;
            let to = decode_visibility(to, "to")?;
            with_options(opts, |options, report| vm.0.convert(range, to, options, report))?;
            Ok(0)
        })
    }
}

/// Answers KVM_EXIT_MEMORY_FAULT (KVM_RUN has returned EFAULT): the guest accessed as private what is shared, or the other way
/// round, and the memory becomes what it asked for. Pass `gpa`, `size` and `flags` of kvm_run.memory_fault.
///
/// 0: run the vCPU again. That is also so where another vCPU was faster; KVM is then told once more, in case that it knows
/// better than the handle, whose guest would come back for ever else (but `changed` is not told, and nothing given up: note
/// what you do yourself). Run it again too after -EBUSY (a memslot is changing), -EAGAIN and -EINTR, and where the stage is
/// KVMPREP_STAGE_DROP, _HOST or _STAGE2: it comes back, or goes on. After other errors it would only come back: what to do is
/// the VMM's to decide (NO_MEMSLOT or NO_GMEM of a private access: the guest's mistake). Call it only for EFAULT: with
/// EHWPOISON the memory is broken.
///
/// Threads and errors: as kvmprep_convert(), and -EINVAL with UNKNOWN_FLAGS (a newer kernel's). What a guest asks costs
/// at most its range (opts->max_size), and with KVMPREP_CONVERT_PREFAULT the huge pages at its two ends. Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `opts` points to a kvmprep_convert_opts or is NULL, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_handle_memory_fault(
    vm: *mut kvmprep_vm,
    gpa: u64,
    size: u64,
    exit_flags: u64,
    opts: *const kvmprep_convert_opts,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let range = range(gpa, size)?;
            let to = exits::of_memory_fault(exit_flags)?;
            with_options(opts, |options, report| vm.0.handle_memory_fault(range, to, options, report))?;
            Ok(0)
        })
    }
}

/// Answers KVM_EXIT_HYPERCALL of number KVM_HC_MAP_GPA_RANGE (12), by which a guest asks for memory to become private or shared.
/// Pass the first three of kvm_run.hypercall.args, copied (the kernel's type for them is another than uint64_t): address,
/// pages, and attributes (bit 4: private; bits 0 to 3: the size of page that it would like, 0 to 2, which is a hint and does
/// nothing).
///
/// `*hypercall_ret` is written on every return, where it is not NULL: 0 when the memory is what the guest asked for, also
/// when only populating it failed; EAGAIN (11) when it should ask again (a memslot is changing, memory is short, a signal came,
/// memory could not be given up, or `changed` returned one of -EAGAIN, -EBUSY, -EINTR and -ENOMEM); else EINVAL (22). These are
/// all that KVM takes. Put it into kvm_run.hypercall.ret and run the vCPU, whatever this function returned; only with reason
/// VM_DEAD there is nothing more to run. A negative errno says why the guest's wish was not met: with EINVAL it may be the
/// guest's mistake alone.
///
/// TDX guests ask again after EAGAIN, others need not: KVM makes an error of it for an SNP guest. There, rather call again with
/// the same arguments once the cause is gone, before the vCPU is run.
///
/// KVM makes such exits after KVM_ENABLE_CAP of KVM_CAP_EXIT_HYPERCALL with that number's bit.
///
/// Threads and errors: as kvmprep_convert(), and -EINVAL with UNKNOWN_FLAGS (attributes that nobody knows) or RANGE_* (an
/// address or number of pages that cannot be). Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `args` points to three values, `opts` to a kvmprep_convert_opts or is NULL, `hypercall_ret` to a
/// uint64_t, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_handle_map_gpa_range(
    vm: *mut kvmprep_vm,
    args: *const u64,
    opts: *const kvmprep_convert_opts,
    hypercall_ret: *mut u64,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        // First of all, so that a guest is answered whatever is wrong with the rest, `err` included.
        let place = write(hypercall_ret, libc::EINVAL as u64, "hypercall_ret");
        boundary(err, || {
            place?;
            let vm = reference(vm, "vm")?;
            let args: &[u64; 3] = reference(args.cast(), "args")?;
            let outcome = asked_by_hypercall(args).and_then(|(range, to)| {
                with_options(opts, |options, report| vm.0.convert(range, to, options, report))
            });
            write(hypercall_ret, exits::hypercall_ret(&outcome), "hypercall_ret")?;
            outcome.map(|()| 0)
        })
    }
}

fn asked_by_hypercall(args: &[u64; 3]) -> Result<(Range, Visibility)> {
    let (size, to) = exits::of_map_gpa_range(args[1], args[2])?;
    Ok((range(args[0], size)?, to))
}
