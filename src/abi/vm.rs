//! One VM: its handle, its memslots, what is populated.

use super::boundary::*;
use super::caps::shared_bit;
use super::error::kvmprep_error;
use super::memslot::{decode_rule, kvmprep_memslot};
use crate::error::{Error, Reason, Result};
use crate::kvm::Linux;
use crate::kvm::caps::physical_address_bits;
use crate::memslot::check_guest_width;
use crate::range::Range;
use crate::vm::{Config, Vm};
use std::ffi::{c_int, c_void};
use std::sync::Arc;

/// Disable the slot-zap-all quirk while the handle is made: what kvmprep_keep_mappings() does, and with its
/// conditions. The handle then knows that mappings outlive the deletion of other slots.
pub const KVMPREP_VM_KEEP_MAPPINGS: u32 = 1;
/// The caller has disabled that quirk already, or the VM is of a type without it (any but the default type).
pub const KVMPREP_VM_MAPPINGS_ARE_KEPT: u32 = 2;

/// A range of guest physical memory, in bytes. Its layout is fixed for ever.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvmprep_range {
    /// First byte; a multiple of 4096.
    pub gpa: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// Must be zero; written as zero.
    pub reserved: [u64; 2],
}

const _: () = assert!(size_of::<kvmprep_range>() == 32);

impl kvmprep_range {
    pub(super) fn decode(&self) -> Result<Range> {
        check_reserved(self.reserved == [0; 2], "kvmprep_range")?;
        range(self.gpa, self.size)
    }

    pub(super) fn encode(range: Range) -> Self {
        Self { gpa: range.start, size: range.size(), reserved: [0; 2] }
    }

    /// What is left of `asked`: when nothing is, size 0 at its end.
    pub(super) fn encode_rest(asked: Range, rest: Option<Range>) -> Self {
        rest.map_or(Self { gpa: asked.end, ..Self::default() }, Self::encode)
    }
}

/// Checks a range without a handle: below what this host can address.
pub(super) fn check_guest_range(range: Range) -> Result<()> {
    check_guest_width(range, physical_address_bits())
}

/// How a handle is to be. Start from KVMPREP_VM_CONFIG_INIT. An input that may grow.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvmprep_vm_config {
    /// sizeof(struct kvmprep_vm_config).
    pub struct_size: u32,
    /// KVMPREP_VM_KEEP_MAPPINGS, KVMPREP_VM_MAPPINGS_ARE_KEPT.
    pub flags: u32,
    /// The VM. It stays the caller's, and open while the handle lives.
    pub vm_fd: i32,
    /// Bits of a guest physical address, 12 to 52, as the guest's CPUID says; 0: as many as the host has. Memory
    /// beyond is refused: KVM would map it somewhere else (it drops the bits that its page tables do not have).
    pub gpa_bits: u32,
    /// KVM_X86_*: the VM's type, as it was made; 0: the default type. With any other, mappings are known to be kept (Linux
    /// 6.12): the slot-zap-all quirk is of the default type alone. Since 0.3, as all that follows.
    pub vm_type: u32,
    /// KVMPREP_ALIGN_*: what kvmprep_memslot_set() holds slots to; it matters with KVMPREP_ALIGN_STRICT only.
    pub alignment_rule: u32,
    /// The number of the bit of a gpa that says "shared", for TDX: 47 or 51; else 0.
    pub gpa_shared_bit: u32,
    /// Must be zero.
    pub reserved: u32,
}

// SAFETY: repr(C), integers only, no padding, the size first.
unsafe impl Growing for kvmprep_vm_config {
    const FIRST: usize = 16;
}

/// One VM. Made by kvmprep_vm_new(), freed by kvmprep_vm_free(); may be used by many threads at once.
pub struct kvmprep_vm(pub(super) Arc<Vm>);

/// For Rust programs that call the C functions with a kernel of their own beneath.
impl From<Arc<Vm>> for kvmprep_vm {
    fn from(vm: Arc<Vm>) -> Self {
        Self(vm)
    }
}

/// Makes a handle for a VM, without slots: tell it of them with kvmprep_vm_set_memslots(),
/// kvmprep_memslot_set() or kvmprep_memslot_note().
///
/// On success `*out` is a handle that the caller frees with kvmprep_vm_free(). On error `*out` is untouched. The
/// handle belongs to the process that made the VM: after fork() the child must neither use nor free it. It keeps
/// /proc/self/maps, smaps and pagemap open, where it may open them: make it before privileges are dropped.
///
/// Threads: any. Returns 0, or -EINVAL (a pointer NULL or misaligned, an unknown flag or rule, gpa_bits or the shared bit
/// out of range, a type of VM that this kernel does not make),
/// -E2BIG (a newer caller's field), -EBADF, -EOPNOTSUPP (KVMPREP_VM_KEEP_MAPPINGS on a kernel that cannot), -EIO
/// (another process's VM).
///
/// # Safety
/// `config` points to a kvmprep_vm_config, `out` to a pointer, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_vm_new(
    config: *const kvmprep_vm_config,
    out: *mut *mut kvmprep_vm,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            check_out(out, "out")?;
            let config = read_growing(config, "config")?;
            check_flags(
                config.flags,
                KVMPREP_VM_KEEP_MAPPINGS | KVMPREP_VM_MAPPINGS_ARE_KEPT,
                "config->flags",
            )?;
            check_reserved(config.reserved == 0, "config")?;
            if config.gpa_bits != 0 && !(12..=52).contains(&config.gpa_bits) {
                return Err(Error::invalid(
                    Reason::BadValue,
                    format!("config->gpa_bits is {}, not 12 to 52 or 0", config.gpa_bits),
                )
                .hint("pass the guest's MAXPHYADDR, or 0 for the host's"));
            }
            let demand = decode_rule(config.alignment_rule, "config->alignment_rule")?;
            let gpa_shared_bit = shared_bit(config.gpa_shared_bit)?;
            let config = Config {
                vm_fd: required_fd(config.vm_fd, "config->vm_fd")?,
                gpa_bits: (config.gpa_bits != 0).then_some(config.gpa_bits),
                keep_mappings: config.flags & KVMPREP_VM_KEEP_MAPPINGS != 0,
                mappings_are_kept: config.flags & KVMPREP_VM_MAPPINGS_ARE_KEPT != 0,
                vm_type: config.vm_type,
                gpa_shared_bit,
                demand,
            };
            let vm = Vm::new(Arc::new(Linux::with_open_files()), config)?;
            write(out, Box::into_raw(Box::new(kvmprep_vm(Arc::new(vm)))), "out")?;
            Ok(0)
        })
    }
}

/// Frees a handle; NULL is accepted and does nothing. The VM itself and all descriptors stay as they are.
///
/// Threads: any, but no other call on the handle may be under way or follow. Returns 0, or -EBUSY while jobs of
/// it live (free them first), or -EINVAL (`vm` misaligned): the handle is then untouched.
///
/// # Safety
/// `vm` is NULL or a handle that has not been freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_vm_free(vm: *mut kvmprep_vm) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(std::ptr::null_mut(), || {
            if vm.is_null() {
                return Ok(0);
            }
            if reference(vm, "vm")?.0.has_jobs() {
                return Err(Error::new(libc::EBUSY, Reason::Busy, "jobs of this VM live"));
            }
            drop(Box::from_raw(vm));
            Ok(0)
        })
    }
}

/// Tells the handle of all memslots there are, in place of all it knew: for a VMM whose slots are set before the
/// handle is made. Of slots that were known and are the same, coverage is kept. Jobs under way lose the slots
/// that are gone; the call returns once no worker touches those.
///
/// Threads: any. Returns 0, or -EINVAL (a pointer NULL or misaligned, a slot that is malformed, twice in the
/// list or of size 0), -EEXIST (two slots overlap; `err` names both), -EBADF, -EDEADLK (from inside a `changed` function). On
/// error nothing has changed.
///
/// # Safety
/// `vm` is a handle, `slots` points to `n` elements, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_vm_set_memslots(
    vm: *mut kvmprep_vm,
    slots: *const kvmprep_memslot,
    n: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let slots =
                slice(slots, n, "slots")?.iter().map(kvmprep_memslot::decode).collect::<Result<Vec<_>>>()?;
            vm.0.set_memslots(&slots)?;
            Ok(0)
        })
    }
}

/// Makes, changes or deletes (size 0) a memslot: checks it as kvmprep_vm_check_memslot() does, by the alignment rule of the
/// handle, lets workers go of its memory, calls KVM_SET_USER_MEMORY_REGION (2 with a guest_memfd, Linux 6.8) and notes the
/// change.
///
/// Threads: any; changes of one slot must not race with each other. Waits for workers as
/// kvmprep_memslot_changing() does. Returns 0, or what kvmprep_memslot_check() returns, before anything is done; or what
/// KVM answered: -EINVAL with reason GMEM_OTHER_VM (a guest_memfd of another VM's, or a slot that the handle was not told
/// of has its number or its part of the file), -EEXIST or -EINVAL (slots that the handle was not told of), -ENOMEM, -EIO. On
/// error the slot is as it was before; one that was to be moved has lost its mappings. The deletion of a slot that the
/// handle was not told of is KVM's to refuse.
///
/// # Safety
/// `vm` is a handle, `slot` points to a kvmprep_memslot, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_memslot_set(
    vm: *mut kvmprep_vm,
    slot: *const kvmprep_memslot,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            reference(vm, "vm")?.0.set(&reference(slot, "slot")?.decode()?)?;
            Ok(0)
        })
    }
}

/// Announces that a memslot is about to be deleted, moved, changed in its flags, or that its backing is about to
/// be unmapped or closed. Returns once no worker touches its memory; from then on none will: jobs under way give
/// the slot up (it is in their result, as remaining), new ones leave it out or, when it is named, fail with
/// -EBUSY, until kvmprep_memslot_note(). A slot that the handle does not know is accepted and does nothing.
///
/// Where the slot stays as it is and only the memory behind it is replaced (munmap, mmap over it), call
/// kvmprep_range_discarded() too: a note of the same slot changes nothing, and the memory would still count as
/// populated.
///
/// It matters: a pre-fault of any slot that is under way when any slot is deleted or moved spins in the kernel
/// until a signal comes (Linux 6.11 to 7.3 at least), and before 6.18 one of the slot itself and the deletion wait
/// for each other for ever. So, unless mappings are kept, no pre-fault of any slot is under way when this returns,
/// and none begins before the change is noted: jobs wait for that, and fail with -EAGAIN after two seconds.
///
/// Threads: any, but not one that a worker waits for: a library thread inside the kernel for a vCPU that is in
/// KVM_RUN, or for userfaultfd memory, is waited for. So is a conversion of the slot's memory. Returns 0, or -EINVAL (`vm`
/// NULL), -EDEADLK (from inside a `changed` function, of the slot that its thread is converting; nothing is announced then).
///
/// # Safety
/// `vm` is a handle, `err` points to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_memslot_changing(
    vm: *mut kvmprep_vm,
    slot: u32,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            reference(vm, "vm")?.0.changing(slot)?;
            Ok(0)
        })
    }
}

/// Notes what a memslot is now: call it after each KVM_SET_USER_MEMORY_REGION of the VMM's own, with size 0 for
/// a deletion, and with the old description when the ioctl failed after kvmprep_memslot_changing(). What the
/// change has cost is dropped from the coverage: the slot's own mappings, and, unless mappings are kept, those of
/// all slots. A slot that is noted as it was has cost nothing: that its memory was replaced meanwhile is told by
/// kvmprep_range_discarded().
///
/// Threads: any. Returns 0, or, for bad arguments only, -EINVAL (NULL, malformed), -EEXIST (it overlaps another
/// slot that the handle knows: a deletion was not noted), -EBADF. On error nothing has changed.
///
/// # Safety
/// `vm` is a handle, `slot` points to a kvmprep_memslot, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_memslot_note(
    vm: *mut kvmprep_vm,
    slot: *const kvmprep_memslot,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            reference(vm, "vm")?.0.note(&reference(slot, "slot")?.decode()?)?;
            Ok(0)
        })
    }
}

/// Announces that guest memory is about to be discarded while its slot stays: madvise(MADV_DONTNEED), hole punch,
/// a balloon, virtio-mem's unplug, another mapping in its place. Returns once no worker touches it; jobs under way
/// give the range up, and it is not covered any more, nor is the rest of the 2 MiB frames that it touches. Start no job
/// over it until the discard is done. The range need not lie in slots.
///
/// Threads: as kvmprep_memslot_changing(). Returns 0, or -EINVAL (a pointer NULL, a bad range).
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_range_discarded(
    vm: *mut kvmprep_vm,
    range: *const kvmprep_range,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let range = reference(range, "range")?.decode()?;
            check_guest_width(range, vm.0.gpa_bits()?)?;
            vm.0.discarded(range);
            Ok(0)
        })
    }
}

/// As kvmprep_range_discarded(), by where the memory is in this process: for a VMM that discards by host address,
/// as a balloon does, whether or not guest memory lies there, and in how many slots. `size` bytes at `memory`,
/// both multiples of 4096; each slot of address space 0 whose `hva` range has part in it loses that part.
///
/// Threads: as kvmprep_memslot_changing(). Returns 0, or -EINVAL (`vm` NULL or misaligned, a bad range). Since
/// kvmprep 0.2.
///
/// # Safety
/// `vm` is a handle, `err` points to a kvmprep_error or is NULL. `memory` is never read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_host_range_discarded(
    vm: *mut kvmprep_vm,
    memory: *const c_void,
    size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            vm.0.host_discarded(host_range(memory, size)?);
            Ok(0)
        })
    }
}

/// Nothing was lost.
pub const KVMPREP_LOSS_NOTHING: u32 = 0;
/// The slot was deleted, moved or replaced.
pub const KVMPREP_LOSS_SLOT_CHANGED: u32 = 1;
/// Some slot was deleted or moved, and the VM's mappings are not kept: see kvmprep_keep_mappings().
pub const KVMPREP_LOSS_ZAP_ALL: u32 = 2;
/// kvmprep_range_discarded().
pub const KVMPREP_LOSS_DISCARDED: u32 = 3;
/// Dirty logging was turned on: first writes fault again.
pub const KVMPREP_LOSS_DIRTY_LOGGING: u32 = 4;
/// The memory was made private or shared: of its 2 MiB frames all counts as lost. Since kvmprep 0.4.
pub const KVMPREP_LOSS_CONVERTED: u32 = 5;

/// How much of a range is populated, in bytes. An output that may grow: pass it with its sizeof.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_coverage {
    /// Memory: what of the range has a memslot.
    pub memory: u64,
    /// In the host's page tables, prepared at least for reading.
    pub host: u64,
    /// In stage 2, prepared at least for reading.
    pub stage2: u64,
    /// In stage 2, prepared for writing too.
    pub stage2_writable: u64,
    /// Was in stage 2 and is known to have been lost since.
    pub lost: u64,
    /// KVMPREP_LOSS_*: why something was lost, the last time, anywhere in the VM.
    pub last_loss: u32,
    /// Zero.
    pub reserved: u32,
}

/// Says what the library has populated of a range of address space 0, as far as it knows.
///
/// An upper bound: what the kernel drops unasked is not seen: KSM (QEMU marks guest memory mergeable by default:
/// worse than not populating), fork of the VMM without MADV_DONTFORK, NUMA balancing, compaction, swap,
/// non-coherent device attachment, APICv inhibition. Pages mapped by KVMPREP_INTENT_RESIDENT are not counted.
///
/// Threads: any. Returns 0, or -EINVAL (a pointer NULL or misaligned, a bad range or size).
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `out` to `out_size` bytes, `err` to a kvmprep_error or
/// is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_get_coverage(
    vm: *const kvmprep_vm,
    range: *const kvmprep_range,
    out: *mut kvmprep_coverage,
    out_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let range = reference(range, "range")?.decode()?;
            let (memory, covered) = vm.0.coverage(range);
            let coverage = kvmprep_coverage {
                memory,
                host: covered.host,
                stage2: covered.stage2_read,
                stage2_writable: covered.stage2_write,
                lost: covered.lost,
                last_loss: covered.last_loss as u32,
                reserved: 0,
            };
            write_sized(out, out_size, &coverage, "out")?;
            Ok(0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_without_a_handle_ends_below_the_host_s_width() {
        let end = 1 << physical_address_bits();
        check_guest_range(Range { start: end - 0x1000, end }).unwrap();
        let error = check_guest_range(Range { start: end - 0x1000, end: end + 0x1000 }).unwrap_err();
        assert_eq!((error.errno, error.reason), (libc::EINVAL, Reason::RangeBeyondGuest));
    }
}
