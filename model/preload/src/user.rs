//! The program's memory, as ioctls name it by address: `copy_from_user` and `copy_to_user`.
//!
//! Copied by a call to the kernel, so that an address where nothing is gives EFAULT, and never a signal. Nothing is kept of what
//! was read.

use crate::host;
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use std::io;
use std::mem::{MaybeUninit, size_of_val};

/// What is made of bytes alone.
///
/// # Safety
///
/// Any bytes are a value of it, and all bytes of a value are initialised: it has no padding.
pub unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($type:ty),* $(,)?) => {
        $(
            // SAFETY: it is numbers alone, with fields of its own where the C compiler would pad.
            unsafe impl Plain for $type {}
        )*
    };
}

plain!(u8, u32, u64, [u8; 96], DirtyLog, ClearDirtyLog);
plain!(
    kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
    kvm_memory_attributes,
    kvm_create_guest_memfd,
    kvm_pre_fault_memory,
    kvm_enable_cap,
    kvm_clock_data,
    kvm_msr_entry,
    kvm_cpuid_entry2,
    kvm_vcpu_events,
    kvm_sev_cmd,
    kvm_enc_region,
    kvm_sev_init,
    kvm_sev_snp_launch_start,
    kvm_sev_snp_launch_update,
);

/// `struct kvm_dirty_log`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DirtyLog {
    /// The slot, with its address space.
    pub slot: u32,
    _padding: u32,
    /// Where the bits go.
    pub bitmap: u64,
}

/// `struct kvm_clear_dirty_log`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ClearDirtyLog {
    /// The slot, with its address space.
    pub slot: u32,
    /// How many pages.
    pub pages: u32,
    /// The first.
    pub first_page: u64,
    /// Where their bits are.
    pub bitmap: u64,
}

/// Reads a structure.
pub fn read<T: Plain>(address: u64) -> Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: zeros are a value of it, as any bytes are.
    let read = unsafe { value.assume_init_mut() };
    read_all(address, std::slice::from_mut(read))?;
    Ok(*read)
}

/// Writes a structure.
pub fn write<T: Plain>(address: u64, value: &T) -> Result<()> {
    write_all(address, std::slice::from_ref(value))
}

/// Whether a structure, of which this is a copy, can be written back to where it stands.
pub fn is_writable<T: Plain>(address: u64, copy: &T) -> bool {
    write(address, copy).is_ok()
}

/// Reads as many structures as there is room for.
pub fn read_all<T: Plain>(address: u64, values: &mut [T]) -> Result<()> {
    let (start, size) = (values.as_mut_ptr().cast(), size_of_val(values));
    // SAFETY: these are their bytes, and any bytes are values of them.
    let bytes = unsafe { std::slice::from_raw_parts_mut(start, size) };
    done(host::read_memory(address, bytes))
}

/// Writes structures, one after the other.
pub fn write_all<T: Plain>(address: u64, values: &[T]) -> Result<()> {
    // SAFETY: these are their bytes, all of which are initialised.
    let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
    done(host::write_memory(address, bytes))
}

fn done(copied: io::Result<()>) -> Result<()> {
    copied.map_err(|_| Errno::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_copied_and_what_is_not_is_efault() {
        let mut word = 5u64;
        let address = &raw mut word as u64;
        assert_eq!(read::<u64>(address), Ok(5));
        assert_eq!(write(address, &6u64), Ok(()));
        assert_eq!(word, 6);
        assert_eq!(read::<u64>(8), Err(Errno::EFAULT));
        assert_eq!(write(8, &6u64), Err(Errno::EFAULT));
    }
}
