//! The two calls that put pages into an initial image. Declared only under KVMPREP_EXPERIMENTAL: no promise is made for
//! them, since they have not run on the hardware that they are for. The guard is a feature of the crate, which cbindgen
//! reads item by item.

use super::boundary::*;
use super::error::kvmprep_error;
use super::vm::{kvmprep_range, kvmprep_vm};
use crate::error::{Error, Reason, Result};
use crate::kvm::ImagePages;
use crate::private::launch::{Added, PageType, Way};
use crate::range::Range;
use std::ffi::{c_int, c_void};

/// Measure the content of the pages (the kernel's KVM_TDX_MEASURE_MEMORY_REGION). Experimental.
#[cfg(feature = "experimental")]
pub const KVMPREP_TDX_MEASURE: u32 = 1;

/// Pages whose content is measured; the kernel's number, as of all that follow. Experimental.
#[cfg(feature = "experimental")]
pub const KVMPREP_SNP_PAGE_NORMAL: u32 = 1;
/// Pages of zeroes, measured. Experimental.
#[cfg(feature = "experimental")]
pub const KVMPREP_SNP_PAGE_ZERO: u32 = 3;
/// Pages whose content is not measured. Experimental.
#[cfg(feature = "experimental")]
pub const KVMPREP_SNP_PAGE_UNMEASURED: u32 = 4;
/// The page where the firmware leaves the guest's secrets. Experimental.
#[cfg(feature = "experimental")]
pub const KVMPREP_SNP_PAGE_SECRETS: u32 = 5;
/// The page of CPUID values, which the firmware checks and may correct. Experimental.
#[cfg(feature = "experimental")]
pub const KVMPREP_SNP_PAGE_CPUID: u32 = 6;

/// Puts pages into a TDX guest's initial image: claims them (kvmprep_private_claim()), has KVM add them
/// (KVM_TDX_INIT_MEM_REGION), again while it gets on, and gives back what KVM did not take. Experimental: declared only
/// where KVMPREP_EXPERIMENTAL is defined before the header is included; it may change or go with any version, and it has not
/// run on a machine with TDX.
///
/// `source` is as much memory as `range` is large, aligned to 4096 bytes; the pages are added in order. `flags` is
/// KVMPREP_TDX_MEASURE or 0. `vcpu_fd` is any vCPU of the VM after its KVM_TDX_INIT_VCPU and KVM_SET_CPUID2; the VM is not
/// finalised yet. `*remaining` (may be NULL) says, unless the arguments were refused, what of `range` is not in the image, with
/// size 0 at its end when all is; after an error `range` can be taken up there, with `source` as far on. Nothing is mapped
/// beyond what is added.
///
/// Threads: any, while no vCPU of the VM is in use: KVM takes them all, and waits for those that are. Returns 0, or what
/// kvmprep_private_claim() returns, before anything is done, or -EINTR (a signal, or work that the kernel has for this
/// thread: call again with what remains), -EEXIST (CLAIMED: KVM has the page already, and the handle did not know),
/// -EINVAL (KERNEL_REFUSED: VM or vCPU not initialised, VM finalised, or the page not private in KVM; BAD_VALUE: the handle
/// was told another type of VM; UNKNOWN_FLAGS, a pointer NULL or misaligned, a bad range), -EFAULT (the source cannot be
/// read, or the guest_memfd was closed), -ENOMEM, -EHWPOISON, -EAGAIN (KVM asks to try again, for two seconds), -EBADF,
/// -ENOTTY (no TDX here), -EIO (VM_DEAD, or FIRMWARE_REFUSED with the TDX module's code in `err->firmware_error`), -EPROTO
/// (KVM's answer cannot be: make the VM anew). Needs Linux 6.16. Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `source` to as many bytes, `remaining` to a kvmprep_range or is NULL,
/// `err` to a kvmprep_error or is NULL.
#[cfg(feature = "experimental")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_tdx_init_mem_region(
    vm: *mut kvmprep_vm,
    vcpu_fd: c_int,
    range: *const kvmprep_range,
    source: *const c_void,
    flags: u32,
    remaining: *mut kvmprep_range,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let range = reference(range, "range")?.decode()?;
            check_optional_out(remaining, size_of::<kvmprep_range>(), "remaining")?;
            check_flags(flags, KVMPREP_TDX_MEASURE, "flags")?;
            let way = Way::Tdx { vcpu: required_fd(vcpu_fd, "vcpu_fd")?, flags };
            let pages = ImagePages { range, source: Some(check_source(source, range)?) };
            tell(range, vm.0.launch(way, &pages), remaining)
        })
    }
}

/// Puts pages into an SNP guest's initial image: claims them (kvmprep_private_claim()), has KVM add them
/// (KVM_SEV_SNP_LAUNCH_UPDATE), again while it gets on, and gives back what KVM did not take. Experimental: declared only
/// where KVMPREP_EXPERIMENTAL is defined before the header is included; it may change or go with any version, and it has not
/// run on a machine with SEV-SNP.
///
/// `source` is as much memory as `range` is large, aligned to 4096 bytes; the pages are added in order. `page_type` is
/// KVMPREP_SNP_PAGE_*; with KVMPREP_SNP_PAGE_ZERO `source` is not looked at. `sev_fd` is a descriptor of /dev/sev.
/// `*remaining` is as for kvmprep_tdx_init_mem_region().
///
/// Where the firmware refuses CPUID values (KVMPREP_SNP_PAGE_CPUID), it puts those that it would take into `source`, which
/// must be writable: -EIO with FIRMWARE_REFUSED and 0x16 in `err->firmware_error`. It is for the caller to compare, and to
/// call again with what remains if they will do; the library adds no page that was corrected unseen.
///
/// KVM tells of a failure only where it could not add even one page, and then answers EIO whatever it was; the library
/// finds out what it can. Signals do not end the call.
///
/// Threads: any. Returns 0, or what kvmprep_private_claim() returns, before anything is done, or -EIO (FIRMWARE_REFUSED with
/// the firmware's code in `err->firmware_error`; VM_DEAD; KERNEL_REFUSED: KVM gives no reason: the page may not be private
/// in KVM, or have been added without the handle, or `sev_fd` be another file), -EFAULT (the source cannot be read, or
/// written), -EINVAL (KERNEL_REFUSED: no SNP guest, its launch not started, or no guest_memfd there in KVM; BAD_VALUE: an
/// unknown type, or the handle was told another type of VM; a pointer NULL or misaligned, a bad range), -EINTR (a signal
/// came while the library waited to try again), -EAGAIN (KVM asks to try again, for two seconds), -EBADF, -ENOTTY (no
/// SEV-SNP here), -EPROTO (KVM's answer cannot be: make the VM anew). Needs Linux 6.11. Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `source` to as many bytes, `remaining` to a kvmprep_range or is NULL,
/// `err` to a kvmprep_error or is NULL.
#[cfg(feature = "experimental")]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_snp_launch_update(
    vm: *mut kvmprep_vm,
    sev_fd: c_int,
    range: *const kvmprep_range,
    source: *mut c_void,
    page_type: u32,
    remaining: *mut kvmprep_range,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = reference(vm, "vm")?;
            let range = reference(range, "range")?.decode()?;
            check_optional_out(remaining, size_of::<kvmprep_range>(), "remaining")?;
            let page_type = decode_type(page_type)?;
            let way = Way::Snp { sev: required_fd(sev_fd, "sev_fd")?, page_type };
            let source = match page_type {
                PageType::Zero => None,
                _ => Some(check_source(source, range)?),
            };
            tell(range, vm.0.launch(way, &ImagePages { range, source }), remaining)
        })
    }
}

/// The address of the content; refuses what cannot be as much memory.
fn check_source(source: *const c_void, range: Range) -> Result<u64> {
    check_out(source.cast_mut(), "source")?;
    let size = usize::try_from(range.size()).unwrap_or(usize::MAX);
    host_range(source, size).map(|source| source.start)
}

fn decode_type(value: u32) -> Result<PageType> {
    let types = [PageType::Normal, PageType::Zero, PageType::Unmeasured, PageType::Secrets, PageType::Cpuid];
    types.into_iter().find(|page_type| *page_type as u32 == value).ok_or_else(|| {
        Error::invalid(Reason::BadValue, format!("type {value} is no type of page"))
            .hint("pass one of KVMPREP_SNP_PAGE_*")
    })
}

/// Tells what is left, where that is asked for, and why.
///
/// # Safety
/// `remaining` is NULL or points to writable memory of a `kvmprep_range`.
unsafe fn tell(range: Range, added: Added, remaining: *mut kvmprep_range) -> Result<c_int> {
    if !remaining.is_null() {
        // SAFETY: not NULL; the rest by the caller's word.
        unsafe { write(remaining, kvmprep_range::encode_rest(range, added.rest), "remaining")? };
    }
    added.verdict.map(|()| 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_s_page_types_are_the_firmware_s() {
        let types = [
            (KVMPREP_SNP_PAGE_NORMAL, PageType::Normal),
            (KVMPREP_SNP_PAGE_ZERO, PageType::Zero),
            (KVMPREP_SNP_PAGE_UNMEASURED, PageType::Unmeasured),
            (KVMPREP_SNP_PAGE_SECRETS, PageType::Secrets),
            (KVMPREP_SNP_PAGE_CPUID, PageType::Cpuid),
        ];
        for (number, page_type) in types {
            assert_eq!(decode_type(number).unwrap(), page_type);
        }
        for number in [0, 2, 7, u32::MAX, 0x101] {
            assert_eq!(decode_type(number).unwrap_err().reason, Reason::BadValue);
        }
    }
}
