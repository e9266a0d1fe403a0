//! KVM's ioctls on x86-64, each a thin safe function over the one `ioctl` of the floor.
//!
//! A wrong descriptor is the kernel's to refuse (EBADF, ENOTTY); a structure passed here that points at memory
//! says so where it is passed.

use super::linux::{ioctl, ioctl_answer, ioctl_value, last_errno};
use super::uapi::*;
use super::{Errno, ExitRequest, ImagePages, Launched, MEM_GUEST_MEMFD, Region, Sys};
use crate::level::Level;
use crate::range::{PAGE, Range, is_page_aligned};
use libc::c_ulong;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};

const MSR_EFER: u32 = 0xc000_0080;
const EFER_NX: u64 = 1 << 11;

/// The quirk by which deleting any slot drops the mappings of all.
pub const QUIRK_SLOT_ZAP_ALL: u64 = KVM_X86_QUIRK_SLOT_ZAP_ALL;

pub fn check_extension(fd: RawFd, capability: u32) -> Sys<u32> {
    ioctl_value(fd, KVM_CHECK_EXTENSION, capability as c_ulong)
}

pub fn disable_quirks(vm: RawFd, mask: u64) -> Sys<()> {
    let mut cap =
        kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, flags: 0, args: [mask, 0, 0, 0], pad: [0; 64] };
    ioctl(vm, KVM_ENABLE_CAP, &mut cap)
}

pub fn set_region(vm: RawFd, region: &Region) -> Sys<()> {
    if region.flags & MEM_GUEST_MEMFD == 0 {
        // The first version does the same and is known to every kernel.
        let mut v1 = kvm_userspace_memory_region {
            slot: region.slot,
            flags: region.flags,
            guest_phys_addr: region.gpa,
            memory_size: region.size,
            userspace_addr: region.hva,
        };
        return ioctl(vm, KVM_SET_USER_MEMORY_REGION, &mut v1);
    }
    let mut v2 = kvm_userspace_memory_region2 {
        slot: region.slot,
        flags: region.flags,
        guest_phys_addr: region.gpa,
        memory_size: region.size,
        userspace_addr: region.hva,
        guest_memfd_offset: region.guest_memfd_offset,
        guest_memfd: region.guest_memfd as u32,
        pad1: 0,
        pad2: [0; 14],
    };
    ioctl(vm, KVM_SET_USER_MEMORY_REGION2, &mut v2)
}

/// Lets a vCPU find out whether its stage-2 root is still the VM's. Linux 6.11 to 6.14 look at that in KVM_RUN
/// alone, and a pre-fault through a root that a slot's deletion has made obsolete spins until a signal comes.
/// There is no call for it; a change of the paging mode, taken back at once, does it. The guest cannot see it,
/// since the vCPU is not running. Where KVM refuses (protected state) the vCPU is left as it is.
pub fn renew_root(vcpu: RawFd) {
    let entry = kvm_msr_entry { index: MSR_EFER, ..Default::default() };
    let mut msr = kvm_msrs_of_one { nmsrs: 1, pad: 0, entry };
    if !msr_ioctl(vcpu, KVM_GET_MSRS, &mut msr) {
        return;
    }
    let efer = msr.entry.data;
    msr.entry.data = efer ^ EFER_NX;
    if msr_ioctl(vcpu, KVM_SET_MSRS, &mut msr) {
        msr.entry.data = efer;
        // The value that was there a moment ago is not refused; what fails is a wait for the vCPU, by a signal.
        while !msr_ioctl(vcpu, KVM_SET_MSRS, &mut msr) && last_errno() == Errno(libc::EINTR) {}
    }
}

/// Reads or writes the one register; whether KVM came to it.
fn msr_ioctl(vcpu: RawFd, request: c_ulong, msr: &mut kvm_msrs_of_one) -> bool {
    // SAFETY: KVM touches the header and as many entries as it tells of, which is one.
    unsafe { libc::ioctl(vcpu, request, std::ptr::from_mut(msr)) == 1 }
}

/// Whether the vCPU is in system management mode, where it uses page tables of its own.
pub fn is_in_smm(vcpu: RawFd) -> bool {
    let mut events = kvm_vcpu_events { before_smi: [0; 6], smi_smm: 0, after: [0; 39] };
    ioctl(vcpu, KVM_GET_VCPU_EVENTS, &mut events).is_ok() && events.smi_smm != 0
}

/// Whether the vCPU's guest runs a nested one, for which it uses other page tables. They may be KVM's own for it: then no
/// pre-fault is refused, and none is of use.
pub fn has_nested_guest(vcpu: RawFd) -> bool {
    let mut state = kvm_nested_state::default();
    ioctl(vcpu, KVM_GET_NESTED_STATE, &mut state).is_ok() && state.flags & KVM_STATE_NESTED_GUEST_MODE != 0
}

pub fn create_guest_memfd(vm: RawFd, size: u64, flags: u64) -> Sys<OwnedFd> {
    let mut arg = kvm_create_guest_memfd { size, flags, ..Default::default() };
    let fd = ioctl_answer(vm, KVM_CREATE_GUEST_MEMFD, &mut arg)?;
    // SAFETY: the ioctl has just opened this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn set_attributes(vm: RawFd, range: Range, attributes: u64) -> Sys<()> {
    let mut arg = kvm_memory_attributes { address: range.start, size: range.size(), attributes, flags: 0 };
    ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &mut arg)
}

pub fn pre_fault(vcpu: RawFd, range: Range) -> Sys<Option<Range>> {
    let mut arg = kvm_pre_fault_memory { gpa: range.start, size: range.size(), ..Default::default() };
    ioctl(vcpu, KVM_PRE_FAULT_MEMORY, &mut arg)?;
    // The kernel keeps gpa + size constant. An answer that breaks this comes from something else that has
    // the same number: to believe it would be to skip memory.
    if arg.gpa.checked_add(arg.size) != Some(range.end) || arg.gpa < range.start {
        return Err(Errno(libc::ENOTTY));
    }
    Ok(Range::between(arg.gpa, range.end))
}

/// Both launches: a command with a structure behind it that KVM reads and updates.
fn memory_encrypt_op<T>(fd: RawFd, command: &mut T) -> Sys<()> {
    // SAFETY: the commands that come here are those whose structure T is, and `data` in them points at one that lives
    // across the call, of which KVM touches no more than its command has. The content that those lead to is the VMM's:
    // addresses that cannot be read, or written where firmware corrects a page, are refused.
    match unsafe { libc::ioctl(fd, KVM_MEMORY_ENCRYPT_OP, std::ptr::from_mut(command)) } {
        0.. => Ok(()),
        _ => Err(last_errno()),
    }
}

/// What a launch came to that says of its progress where the rest begins, where its content, and how large it is: the
/// end stays the same, and content and guest memory go on together.
fn launched(
    pages: &ImagePages,
    gpa: u64,
    source: u64,
    size: Option<u64>,
    answer: Sys<()>,
    firmware: u64,
) -> Launched {
    let is_sound = size.and_then(|size| gpa.checked_add(size)) == Some(pages.range.end)
        && gpa >= pages.range.start
        && is_page_aligned(gpa)
        && pages.source.is_none_or(|first| source.wrapping_sub(first) == gpa - pages.range.start);
    if is_sound {
        Launched { left: Range::between(gpa, pages.range.end), answer, firmware }
    } else {
        Launched { firmware, ..Launched::refused(pages, Errno(libc::EPROTO)) }
    }
}

pub fn tdx_init_mem_region(vcpu: RawFd, pages: &ImagePages, flags: u32) -> Launched {
    let mut region = kvm_tdx_init_mem_region {
        source_addr: pages.source.unwrap_or(0),
        gpa: pages.range.start,
        nr_pages: pages.range.size() / PAGE,
    };
    let data = std::ptr::from_mut(&mut region) as u64;
    let mut command = kvm_tdx_cmd { id: KVM_TDX_INIT_MEM_REGION, flags, data, hw_error: 0 };
    let answer = memory_encrypt_op(vcpu, &mut command);
    // Updated on an error too.
    let kvm_tdx_init_mem_region { source_addr, gpa, nr_pages } = region;
    launched(pages, gpa, source_addr, nr_pages.checked_mul(PAGE), answer, command.hw_error)
}

pub fn snp_launch_update(vm: RawFd, sev: RawFd, pages: &ImagePages, page_type: u8) -> Launched {
    let mut update = kvm_sev_snp_launch_update {
        gfn_start: pages.range.start / PAGE,
        uaddr: pages.source.unwrap_or(0),
        len: pages.range.size(),
        type_: page_type,
        ..Default::default()
    };
    let data = std::ptr::from_mut(&mut update) as u64;
    let mut command =
        kvm_sev_cmd { id: KVM_SEV_SNP_LAUNCH_UPDATE, data, sev_fd: sev as u32, ..Default::default() };
    let answer = memory_encrypt_op(vm, &mut command);
    // Too large a number is none of ours, and is refused as such.
    let gpa = update.gfn_start.saturating_mul(PAGE);
    launched(pages, gpa, update.uaddr, Some(update.len), answer, command.error.into())
}

pub fn stats_fd(fd: RawFd) -> Sys<OwnedFd> {
    let stats = ioctl_value(fd, KVM_GET_STATS_FD, 0)?;
    // SAFETY: the ioctl has just opened this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(stats as RawFd) })
}

/// The first page of a vCPU's `kvm_run`, mapped.
struct RunPage(*const AtomicU8);

// SAFETY: the mapping belongs to the process, not to a thread, and is only read, atomically.
unsafe impl Send for RunPage {}

impl ExitRequest for RunPage {
    fn is_set(&self) -> bool {
        // SAFETY: the page stays mapped until drop; immediate_exit is a byte that its owner may write at any
        // time from a signal handler, hence the atomic load.
        unsafe { &*self.0.add(KVM_RUN_IMMEDIATE_EXIT) }.load(Ordering::Relaxed) != 0
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: maps exactly what `exit_request` mapped, once.
        unsafe { libc::munmap(self.0 as *mut libc::c_void, crate::range::PAGE as usize) };
    }
}

pub fn exit_request(vcpu: RawFd) -> Sys<Box<dyn ExitRequest>> {
    // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing of ours.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            crate::range::PAGE as usize,
            libc::PROT_READ,
            libc::MAP_SHARED,
            vcpu,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(last_errno());
    }
    Ok(Box::new(RunPage(page as *const AtomicU8)))
}

/// The largest page that this CPU's nested paging has, by what its own paging has. On AMD these are the same; Intel's may
/// lack 1 GiB in nested paging only where another hypervisor hides it.
pub fn largest_page() -> Level {
    const PDPE1GB: u32 = 1 << 26;
    #[allow(unused_unsafe, reason = "safe to call since Rust 1.94")]
    // SAFETY: CPUID exists on every x86-64, and so does this leaf.
    let features = unsafe { std::arch::x86_64::__cpuid(0x8000_0001) }.edx;
    if features & PDPE1GB != 0 { Level::G1 } else { Level::M2 }
}

/// Physical address bits of this CPU.
pub fn physical_address_bits() -> u32 {
    #[allow(unused_unsafe, reason = "safe to call since Rust 1.94")]
    // SAFETY: CPUID exists on every x86-64.
    unsafe {
        if std::arch::x86_64::__cpuid(0x8000_0000).eax < 0x8000_0008 {
            return 36;
        }
        std::arch::x86_64::__cpuid(0x8000_0008).eax & 0xff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u64 = 1 << 32;
    const SOURCE: u64 = 0x7f00_0000_0000;
    const PAGES: ImagePages =
        ImagePages { range: Range { start: START, end: START + 4 * PAGE }, source: Some(SOURCE) };

    fn left(gpa: u64, source: u64, size: Option<u64>) -> Launched {
        launched(&PAGES, gpa, source, size, Ok(()), 7)
    }

    #[test]
    fn progress_is_believed_where_it_can_be() {
        let rest = Range { start: START + PAGE, end: PAGES.range.end };
        let told = left(rest.start, SOURCE + PAGE, Some(3 * PAGE));
        assert_eq!(told, Launched { left: Some(rest), answer: Ok(()), firmware: 7 });
        assert_eq!(left(PAGES.range.end, SOURCE + 4 * PAGE, Some(0)).left, None);
        // Zeroes have no source, which then does not go on.
        let zeroes = ImagePages { source: None, ..PAGES };
        assert_eq!(launched(&zeroes, rest.start, 0, Some(3 * PAGE), Ok(()), 0).left, Some(rest));
    }

    #[test]
    fn progress_that_cannot_be_is_none() {
        let lies = [
            left(START - PAGE, SOURCE - PAGE, Some(5 * PAGE)),
            left(START + PAGE, SOURCE, Some(3 * PAGE)),
            left(START + PAGE, SOURCE + PAGE, Some(2 * PAGE)),
            left(START + 1, SOURCE + 1, Some(4 * PAGE - 1)),
            left(START + 5 * PAGE, SOURCE + 5 * PAGE, Some(PAGE.wrapping_neg())),
            left(START, SOURCE, None),
        ];
        for lie in lies {
            assert_eq!((lie.left, lie.answer), (Some(PAGES.range), Err(Errno(libc::EPROTO))));
        }
    }

    /// What is no VM and no vCPU answers ENOTTY: nothing was done.
    #[test]
    fn a_descriptor_of_another_kind_does_nothing() {
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let refused = Launched::refused(&PAGES, Errno(libc::ENOTTY));
        assert_eq!(tdx_init_mem_region(fd, &PAGES, 0), refused);
        assert_eq!(snp_launch_update(fd, -1, &PAGES, 1), refused);
    }
}
