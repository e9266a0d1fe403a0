//! `struct kvm_run`: the pages that a vCPU shares with the program, written as the kernel writes them.
//!
//! They are the model's own mapping of the vCPU's file; the program has its own, and may look and write at any time. So every
//! field is read or written on its own, and nothing that was read is relied on to stay. What an exit means is not known here.

use crate::memfd::Memfd;
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use std::mem::offset_of;
use std::ptr::{self, NonNull};

const PAGE: usize = 4096;
/// The structure, a page for data of ports, and one for coalesced MMIO, which stays empty: `KVM_GET_VCPU_MMAP_SIZE`.
pub const SIZE: usize = 3 * PAGE;

/// Where the union of the exits begins.
const EXIT_AT: usize = offset_of!(kvm_run, __bindgen_anon_1);

/// A vCPU's shared pages.
pub struct RunPage {
    start: NonNull<u8>,
}

// SAFETY: it is memory that everybody may write at any time, and is only ever accessed as such.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// The pages of a vCPU's file.
    pub fn map(file: &Memfd) -> Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: it is a new mapping of a file of ours, which has that size and keeps it.
        let start =
            unsafe { crate::real::mmap(ptr::null_mut(), SIZE, protection, libc::MAP_SHARED, file.fd(), 0) };
        match NonNull::new(start.cast::<u8>()).filter(|_| start != libc::MAP_FAILED) {
            Some(start) => Ok(RunPage { start }),
            None => Err(Errno::ENOMEM),
        }
    }

    /// Whether the program wants KVM_RUN to return at once.
    pub fn immediate_exit(&self) -> bool {
        self.read::<1>(offset_of!(kvm_run, immediate_exit)) != [0]
    }

    /// Says why KVM_RUN has returned.
    pub fn set_exit_reason(&self, reason: u32) {
        self.write(offset_of!(kvm_run, exit_reason), &reason.to_le_bytes());
    }

    /// Bytes of the exit's own structure, from an offset in it on.
    pub fn exit<const N: usize>(&self, at: usize) -> [u8; N] {
        self.read(EXIT_AT + at)
    }

    /// Writes bytes of the exit's own structure.
    pub fn set_exit(&self, at: usize, bytes: &[u8]) {
        self.write(EXIT_AT + at, bytes);
    }

    /// Writes what the guest puts out on a port, and answers at which offset of the pages that is.
    pub fn set_port_data(&self, bytes: &[u8]) -> u64 {
        self.write(PAGE, bytes);
        PAGE as u64
    }

    fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= SIZE, "outside of the vCPU's pages");
        // SAFETY: it lies within the mapping.
        std::array::from_fn(|nth| unsafe { self.start.as_ptr().add(at + nth).read_volatile() })
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= SIZE, "outside of the vCPU's pages");
        for (nth, byte) in bytes.iter().enumerate() {
            // SAFETY: it lies within the mapping.
            unsafe { self.start.as_ptr().add(at + nth).write_volatile(*byte) };
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: nobody has it any more.
        unsafe { crate::real::munmap(self.start.as_ptr().cast(), SIZE) };
    }
}
