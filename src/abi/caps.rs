//! Without a handle: what the kernel offers, one pre-fault done right, statistics.

use super::boundary::*;
use super::error::kvmprep_error;
use super::vm::{check_guest_range, kvmprep_range};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{Kernel, Linux, Stats};
use crate::populate::job::{VCPU_REFUSED_HINT, vcpu_refused_message};
use crate::populate::stage2::{self, Outcome, Patience, Pause, is_vcpu};
use crate::range::Range;
use crate::vm::{check_vm, is_vm};
use std::ffi::c_int;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// What a kernel and a VM offer.
///
/// An output that may grow: pass it with its sizeof. Each field is 0 where the kernel has no such thing.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvmprep_caps {
    /// 1 when the kernel claims KVM_PRE_FAULT_MEMORY for this VM (Linux 6.11, nested paging). A claim only: one
    /// downstream kernel uses the number for something else, and each vCPU may still refuse.
    pub pre_fault: u32,
    /// 1 when kvmprep_keep_mappings() will work (Linux 6.12, x86-64).
    pub keep_mappings: u32,
    /// 1 when memslots may be read-only (KVM_MEM_READONLY).
    pub read_only_memslots: u32,
    /// 1 when memslots may have a guest_memfd (Linux 6.8).
    pub guest_memfd: u32,
    /// GUEST_MEMFD_FLAG_* that KVM_CREATE_GUEST_MEMFD takes.
    pub guest_memfd_flags: u64,
    /// KVM_MEMORY_ATTRIBUTE_* that can be set.
    pub memory_attributes: u64,
    /// Bitmap of the VM types that can be made.
    pub vm_types: u64,
    /// Memslots that one address space may have.
    pub memslots: u32,
    /// Address spaces.
    pub address_spaces: u32,
    /// Bits of a physical address of this host.
    pub gpa_bits: u32,
    /// Release of the running kernel: major << 16 | minor << 8 | patch (at most 255 each).
    pub kernel_release: u32,
    /// 1 when KVM uses nested paging on this host, 0 when it shadows page tables. Since 0.3, as all that follows.
    pub nested_paging: u32,
    /// 1 when there is KVM_SET_USER_MEMORY_REGION2 (Linux 6.8).
    pub user_memory2: u32,
    /// One past the last address of this process that a memslot may have, in bytes; a multiple of 4096.
    pub hva_end: u64,
    /// KVM_X86_*: the VM's type. The kernel cannot be asked: written as 0, KVM_X86_DEFAULT_VM; the caller may set it.
    pub vm_type: u32,
    /// The number of the bit of a gpa that says "shared", for TDX: 47 or 51, by the guest's width; 0: there is none.
    /// Written as 0; the caller may set it.
    pub gpa_shared_bit: u32,
}

const _: () = assert!(size_of::<kvmprep_caps>() == kvmprep_caps::FIRST_PASSED_IN);

impl kvmprep_caps {
    /// Size of the first version that could be passed in, in bytes: 0.3's.
    pub(super) const FIRST_PASSED_IN: usize = 80;
}

impl From<&Caps> for kvmprep_caps {
    fn from(caps: &Caps) -> Self {
        let [major, minor, patch] = caps.release.map(|n| n.min(255));
        Self {
            pre_fault: caps.pre_fault.into(),
            keep_mappings: caps.can_keep_mappings.into(),
            read_only_memslots: caps.read_only.into(),
            guest_memfd: caps.guest_memfd.into(),
            guest_memfd_flags: caps.guest_memfd_flags,
            memory_attributes: caps.memory_attributes,
            vm_types: caps.vm_types,
            memslots: caps.memslots,
            address_spaces: caps.address_spaces,
            gpa_bits: caps.gpa_bits,
            kernel_release: major << 16 | minor << 8 | patch,
            nested_paging: caps.nested_paging.into(),
            user_memory2: caps.user_memory2.into(),
            hva_end: caps.hva_end,
            vm_type: caps.vm_type,
            gpa_shared_bit: 63u32.saturating_sub(caps.gpa_shared_bit.leading_zeros()),
        }
    }
}

impl kvmprep_caps {
    /// What a caller passes in, whose own fields are checked.
    pub(super) fn decode(&self) -> Result<Caps> {
        if self.memslots == 0 {
            return Err(Error::invalid(Reason::BadValue, "caps are none that a probe has written")
                .hint("fill them by kvmprep_probe() with the VM"));
        }
        let release = self.kernel_release;
        let caps = Caps {
            release: [release >> 16, release >> 8 & 0xff, release & 0xff],
            pre_fault: self.pre_fault != 0,
            can_keep_mappings: self.keep_mappings != 0,
            read_only: self.read_only_memslots != 0,
            guest_memfd: self.guest_memfd != 0,
            guest_memfd_flags: self.guest_memfd_flags,
            memory_attributes: self.memory_attributes,
            vm_types: self.vm_types,
            memslots: self.memslots,
            address_spaces: self.address_spaces,
            gpa_bits: self.gpa_bits,
            nested_paging: self.nested_paging != 0,
            user_memory2: self.user_memory2 != 0,
            hva_end: self.hva_end,
            vm_type: self.vm_type,
            gpa_shared_bit: shared_bit(self.gpa_shared_bit)?,
        };
        caps.check_type(caps.vm_type)?;
        Ok(caps)
    }
}

/// The mask of TDX's shared bit, told by its number; 0 for 0, which says that there is none.
pub(super) fn shared_bit(number: u32) -> Result<u64> {
    match number {
        0 => Ok(0),
        47 | 51 => Ok(1 << number),
        _ => Err(Error::invalid(Reason::BadValue, format!("gpa_shared_bit is {number}, not 47, 51 or 0"))
            .hint("pass the number of the bit, as the guest's width has it, not its mask")),
    }
}

/// Finds out what the kernel offers.
///
/// `kvm_fd` is a descriptor of /dev/kvm, `vm_fd` one of a VM; either may be -1, not both. Where there is a VM
/// its answers are taken, since they are the ones that hold. Both stay the caller's.
///
/// Threads: any, at any time. Returns 0, or -EINVAL (`caps` NULL or misaligned, a bad size), -EBADF (no usable
/// descriptor, or `vm_fd` is no VM), -ENOTTY or -EINVAL with reason BAD_FD (`kvm_fd` is not /dev/kvm), -EIO (another
/// process's VM).
///
/// # Safety
/// `caps` points to `caps_size` bytes, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_probe(
    kvm_fd: c_int,
    vm_fd: c_int,
    caps: *mut kvmprep_caps,
    caps_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            check_sized_out(caps, caps_size, "caps")?;
            let found = probe(optional_fd(kvm_fd, "kvm_fd")?, optional_fd(vm_fd, "vm_fd")?)?;
            write_sized(caps, caps_size, &(&found).into(), "caps")?;
            Ok(0)
        })
    }
}

fn probe(kvm: Option<RawFd>, vm: Option<RawFd>) -> Result<Caps> {
    let kernel = Linux::default();
    if kvm.or(vm).is_none() {
        return Err(Error::new(libc::EBADF, Reason::BadFd, "both kvm_fd and vm_fd are -1")
            .hint("pass one of /dev/kvm, or of the VM"));
    }
    if let Some(vm) = vm {
        check_vm(&kernel, vm)?;
    }
    Caps::probe(&kernel, kvm, vm).map_err(|errno| match (errno.0, kvm, vm) {
        (libc::ENOTTY | libc::EINVAL, Some(kvm), None) => {
            Error::new(errno.0, Reason::BadFd, format!("descriptor {kvm} is not /dev/kvm"))
                .hint("pass what opening /dev/kvm returned")
        }
        _ => Error::kernel(errno, "asking KVM for its capabilities"),
    })
}

/// A patience of its own: for one call on the caller's thread.
struct OneCall<'a>(&'a Linux);

impl Patience for OneCall<'_> {
    fn yields_to_signals(&self) -> bool {
        true
    }

    fn pause(&self, length: Duration) -> Pause {
        let word = AtomicU32::new(0);
        if self.0.wait(&word, 0, length).is_err() {
            return Pause::Signal;
        }
        Pause::Over
    }
}

/// Pre-faults guest memory through one vCPU: KVM_PRE_FAULT_MEMORY (Linux 6.11) until nothing is left, with its
/// retries. The host's page tables are not filled first: for a private mapping whose pages the VMM has not
/// touched, that makes the guest's first writes slower, not faster. kvmprep_populate() does both.
///
/// `remaining` holds the range to map, a multiple of 4096 bytes, and is updated as pages are mapped: on any
/// return, error or not, what it holds is what is left, with size 0 for nothing. All of it must lie in memslots
/// of the address space that the vCPU is in.
///
/// Threads: the one that owns the vCPU. The call waits, unkillable by ordinary signals, while another thread is in
/// KVM_RUN on this vCPU; and, until a signal comes, for memory registered with userfaultfd. A failed call overwrites
/// the exit reason in kvm_run: make it with no userspace exit pending. When: after KVM_SET_CPUID2 (which may change
/// the number of page-table levels), not in SMM and not while a nested guest runs (neither is looked for here: KVM fills
/// page tables of no use afterwards, or refuses where the nested guest has its own), and not while any memslot is deleted
/// or moved, unless mappings are kept (kvmprep_keep_mappings()): else the kernel spins in this call until a signal
/// comes (Linux 6.11 to 7.3 at least), and the deletion may wait for it. Before Linux 6.15, wherever there is a
/// pre-fault, a deletion of the past would do the same to a vCPU that has not been in KVM_RUN since: there the
/// library writes the vCPU's EFER and puts it back before each pre-fault, in jobs too. Nobody may read or save that
/// vCPU's state meanwhile.
///
/// Returns 0, or -EINVAL (`remaining` NULL, misaligned, empty, unaligned, wrapping, beyond the host's address width),
/// -EINVAL or -ENOTTY (not a vCPU), -EBADF, -EINTR (a signal: call again), -ENOENT (no memslot at `remaining->gpa`),
/// -EFAULT (nothing mapped there in the host), -EAGAIN (its slot is being deleted, for two seconds), -EOPNOTSUPP
/// (reason NO_STAGE2: this kernel has no such ioctl; VCPU_REFUSED: not this vCPU now, or no vCPU of this host ever,
/// since it has no nested paging: kvmprep_probe() with the VM tells, so ask it before trying again), -ENOMEM,
/// -EHWPOISON, -EIO (dead or another process's VM).
///
/// # Safety
/// `remaining` points to a kvmprep_range, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_vcpu_pre_fault(
    vcpu_fd: c_int,
    remaining: *mut kvmprep_range,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            check_out(remaining, "remaining")?;
            let asked = reference(remaining, "remaining")?.decode()?;
            check_guest_range(asked)?;
            let vcpu = required_fd(vcpu_fd, "vcpu_fd")?;
            let kernel = Linux::default();
            let (rest, error) = sort(asked, stage2::pre_fault(&kernel, vcpu, asked, &OneCall(&kernel)));
            write(remaining, kvmprep_range::encode_rest(asked, rest), "remaining")?;
            error.map_or(Ok(0), Err)
        })
    }
}

/// What is left, and why.
fn sort(asked: Range, outcome: Outcome) -> (Option<Range>, Option<Error>) {
    let at = |rest: Range, errno, reason, message: &str| {
        Some(Error::new(errno, reason, message).stage(Stage::Stage2).range(rest))
    };
    match outcome {
        Outcome::Done => (None, None),
        Outcome::Interrupted(rest) | Outcome::Stopped(rest) => (
            Some(rest),
            at(rest, libc::EINTR, Reason::Interrupted, "a signal came").map(|e| e.hint("call again")),
        ),
        Outcome::VcpuRefused(rest) => (
            Some(rest),
            // KVM says the same where there is no nested paging. A vCPU cannot be asked which it is, only a VM can.
            at(
                rest,
                libc::EOPNOTSUPP,
                Reason::VcpuRefused,
                &format!("{}; or this host has no nested paging", vcpu_refused_message()),
            )
            .map(|e| {
                e.hint(format!(
                    "ask kvmprep_probe whether this VM can pre-fault at all; if so, {VCPU_REFUSED_HINT}"
                ))
            }),
        ),
        Outcome::Unavailable(rest) => (
            Some(rest),
            at(asked, libc::EOPNOTSUPP, Reason::NoStage2, "this kernel has no KVM_PRE_FAULT_MEMORY")
                .map(|e| e.hint("needs Linux 6.11 with nested paging")),
        ),
        // There is no handle here that could be told of anything.
        Outcome::Failed(rest, error) if error.reason == Reason::NoMemslot => {
            (Some(rest), Some(error.hint("pre-fault only what lies in memslots of the vCPU's address space")))
        }
        Outcome::Failed(rest, error) => (Some(rest), Some(error)),
    }
}

/// Makes stage-2 mappings outlive the deletion of other memslots, for the rest of the VM's life: disables
/// KVM_X86_QUIRK_SLOT_ZAP_ALL (Linux 6.12, x86-64, VMs of the default type; others never had it).
///
/// By default KVM drops every mapping of every slot when any slot is deleted or moved. The quirk exists because
/// dropping less once made a guest with an assigned GPU unstable: disable it where no device is assigned, or
/// offer the choice. Before Linux 6.15 (or a stable release with that fix) disabling quirks replaces the set that
/// was disabled before: there a VMM that disables others by KVM_CAP_DISABLE_QUIRKS2 itself passes all of them in
/// one call of its own, KVM_X86_QUIRK_SLOT_ZAP_ALL (128) among them, instead of this one, and tells the handle by
/// KVMPREP_VM_MAPPINGS_ARE_KEPT.
///
/// Threads: any; before slots are deleted. Returns 0, or -EBADF (not a VM), -EOPNOTSUPP (not this kernel), -EIO.
///
/// # Safety
/// `err` points to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_keep_mappings(vm_fd: c_int, err: *mut kvmprep_error) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            crate::vm::keep_mappings(&Linux::default(), required_fd(vm_fd, "vm_fd")?)?;
            Ok(0)
        })
    }
}

/// Counters of KVM's, summed over the descriptors given.
///
/// An output that may grow: pass it with its sizeof.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_fault_stats {
    /// Stage-2 faults that guests took, MMIO included; pre-faulting does not count (vCPU).
    pub taken: u64,
    /// Of these: mended by a new mapping (vCPU).
    pub fixed: u64,
    /// Of these: found mended by another vCPU (vCPU).
    pub spurious: u64,
    /// Of these: handed to the emulator (vCPU).
    pub emulated: u64,
    /// Mended without the MMU lock; pre-faulting counts too (vCPU).
    pub fast: u64,
    /// Mappings made that say "MMIO"; pre-faulting a hole counts too (vCPU).
    pub mmio: u64,
    /// Exits of guests (vCPU).
    pub exits: u64,
    /// 4 KiB mappings that stand now (VM).
    pub pages_4k: u64,
    /// 2 MiB mappings that stand now (VM).
    pub pages_2m: u64,
    /// 1 GiB mappings that stand now (VM).
    pub pages_1g: u64,
    /// How many of the descriptors were vCPUs, and how many VMs.
    pub vcpus: u32,
    /// See `vcpus`.
    pub vms: u32,
}

impl kvmprep_fault_stats {
    fn add(&mut self, stats: &Stats) {
        let get = |name| stats.get(name).unwrap_or(0);
        self.taken += get("pf_taken");
        self.fixed += get("pf_fixed");
        self.spurious += get("pf_spurious");
        self.emulated += get("pf_emulate");
        self.fast += get("pf_fast");
        self.mmio += get("pf_mmio_spte_created");
        self.exits += get("exits");
        self.pages_4k += get("pages_4k");
        self.pages_2m += get("pages_2m");
        self.pages_1g += get("pages_1g");
        self.vcpus += u32::from(stats.get("pf_taken").is_some());
        self.vms += u32::from(stats.get("pages_4k").is_some());
    }
}

/// Reads the counters of `n_fds` vCPUs and VMs and sums them (KVM_GET_STATS_FD, Linux 5.14).
///
/// `taken` before and after the guest ran tells what population was worth.
///
/// Threads: any. Waits for a vCPU that is inside KVM_RUN on another thread: where that matters, keep a stats
/// descriptor of one's own. Returns 0, or -EINVAL (a pointer NULL or misaligned, a bad size, no descriptor),
/// -EBADF (not a vCPU or VM), -EOPNOTSUPP (no statistics on this kernel), -EIO, -EMFILE.
///
/// # Safety
/// `fds` points to `n_fds` ints, `stats` to `stats_size` bytes, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_get_fault_stats(
    fds: *const c_int,
    n_fds: usize,
    stats: *mut kvmprep_fault_stats,
    stats_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            check_sized_out(stats, stats_size, "stats")?;
            let fds = slice(fds, n_fds, "fds")?;
            if fds.is_empty() {
                return Err(Error::invalid(Reason::BadValue, "no descriptor to read counters of")
                    .hint("pass vCPU or VM descriptors"));
            }
            let sum = sum_stats(fds)?;
            write_sized(stats, stats_size, &sum, "stats")?;
            Ok(0)
        })
    }
}

fn sum_stats(fds: &[c_int]) -> Result<kvmprep_fault_stats> {
    let kernel = Linux::default();
    let mut sum = kvmprep_fault_stats::default();
    for fd in fds {
        let fd = required_fd(*fd, "a descriptor in fds")?;
        let stats = kernel.stats(fd).map_err(|errno| match errno.0 {
            libc::ENOTTY | libc::EINVAL if is_vcpu(&kernel, fd) || is_vm(&kernel, fd) => Error::new(
                libc::EOPNOTSUPP,
                Reason::KernelRefused,
                format!("this kernel has no statistics for descriptor {fd}: {errno}"),
            )
            .hint("needs Linux 5.14"),
            libc::ENOTTY | libc::EINVAL => {
                Error::new(libc::EBADF, Reason::BadFd, format!("descriptor {fd} is neither a vCPU nor a VM"))
                    .hint("pass what KVM_CREATE_VCPU or KVM_CREATE_VM returned")
            }
            _ => Error::kernel(errno, "reading KVM's statistics"),
        })?;
        sum.add(&stats);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Range = Range { start: 0x1000, end: 0x3000 };

    /// A caller that waits for the vCPU would wait for ever on a host without nested paging.
    #[test]
    fn a_refused_vcpu_may_be_a_host_without_nested_paging() {
        let (rest, error) = sort(ASKED, Outcome::VcpuRefused(ASKED));
        let error = error.unwrap();
        assert_eq!((rest, error.errno, error.reason), (Some(ASKED), libc::EOPNOTSUPP, Reason::VcpuRefused));
        assert!(error.message.contains("nested paging"), "{}", error.message);
        assert!(error.hint.contains("kvmprep_probe"), "{}", error.hint);
        // What does not fit into the error is cut.
        assert!(error.message.len() < 256 && error.hint.len() < 256);
    }

    #[test]
    fn a_call_without_a_handle_does_not_speak_of_one() {
        let of_a_handle = Error::new(libc::ENOENT, Reason::NoMemslot, "").hint("tell the handle");
        let (_, error) = sort(ASKED, Outcome::Failed(ASKED, of_a_handle));
        assert!(!error.unwrap().hint.contains("handle"));
    }
}
