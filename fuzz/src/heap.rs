//! Memory as a C caller has it: blocks of exactly as many bytes as are spoken of, one allocation each.
//!
//! A block ends where its content ends, so AddressSanitizer sees an access to the byte behind.

use crate::input::Input;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

/// The alignment of every block's start; no struct of the interface needs more.
const ALIGNMENT: usize = 8;

/// What a place for output holds before the call; no answer is made of nothing but this.
const UNWRITTEN: u8 = 0xa5;

/// No struct of the interface is larger than the 4096 bytes that the library takes for the most; what is said to be
/// larger must be refused unread.
const LARGEST: usize = 8192;

/// How a pointer is passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// As it should be.
    Right,
    /// As NULL.
    Null,
    /// Some bytes off.
    Misaligned,
}

/// One allocation, and the pointer to pass for it.
pub struct Block {
    start: *mut u8,
    layout: Layout,
    /// Bytes before the content.
    lead: usize,
    passed: Passed,
}

impl Block {
    /// A block with that content.
    pub fn new(content: &[u8], passed: Passed) -> Self {
        let lead = match passed {
            Passed::Misaligned => ALIGNMENT / 2 - 1,
            // An allocation cannot be empty; its end can be pointed to all the same.
            _ if content.is_empty() => ALIGNMENT,
            _ => 0,
        };
        let layout = Layout::from_size_align(lead + content.len(), ALIGNMENT).expect("a small size");
        // SAFETY: the size is not 0; the content fits behind the lead.
        let start = unsafe {
            let start = alloc(layout);
            if start.is_null() {
                handle_alloc_error(layout);
            }
            start.write_bytes(0, lead);
            start.add(lead).copy_from_nonoverlapping(content.as_ptr(), content.len());
            start
        };
        Self { start, layout, lead, passed }
    }

    /// A place for output of that many bytes.
    pub fn output(size: usize, passed: Passed) -> Self {
        Self::new(&vec![UNWRITTEN; if size > LARGEST { 0 } else { size }], passed)
    }

    /// A place like another, that holds that byte throughout.
    pub fn output_over(other: &Block, byte: u8) -> Self {
        Self::new(&vec![byte; other.content().len()], other.passed)
    }

    /// Whether the call was given a pointer to it.
    pub fn is_passed(&self) -> bool {
        self.passed == Passed::Right
    }

    /// Whether a place for output is as it was: of the same byte throughout, which no answer is.
    pub fn is_unwritten(&self) -> bool {
        self.content().iter().all(|byte| *byte == self.content()[0])
    }

    /// The pointer that the call is given.
    pub fn pointer<T>(&self) -> *mut T {
        match self.passed {
            Passed::Null => std::ptr::null_mut(),
            // SAFETY: the lead lies in the allocation, or ends it.
            _ => unsafe { self.start.add(self.lead).cast() },
        }
    }

    /// What is in it now.
    pub fn content(&self) -> &[u8] {
        // SAFETY: the allocation has that many bytes behind the lead, all written when it was made.
        unsafe { std::slice::from_raw_parts(self.start.add(self.lead), self.layout.size() - self.lead) }
    }

    /// What is in it now, as a `T`; bytes that it has not got are zero.
    pub fn read<T: Plain>(&self) -> T {
        let content = self.content();
        let mut value = std::mem::MaybeUninit::<T>::zeroed();
        // SAFETY: no more than a T is copied over zeroes, and any bytes are a T.
        unsafe {
            std::ptr::copy_nonoverlapping(
                content.as_ptr(),
                value.as_mut_ptr().cast(),
                content.len().min(size_of::<T>()),
            );
            value.assume_init()
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: it was allocated so.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// A struct of the C interface.
///
/// # Safety
/// The type is `repr(C)`, has no padding, and any bytes make a valid one.
pub unsafe trait Plain: Copy {}

/// The bytes of a struct.
pub fn bytes_of<T: Plain>(value: &T) -> Vec<u8> {
    bytes_of_all(std::slice::from_ref(value))
}

/// The bytes of an array.
pub fn bytes_of_all<T: Plain>(values: &[T]) -> Vec<u8> {
    // SAFETY: no padding: each byte is initialised.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }.to_vec()
}

/// A struct that may grow and begins with its size, as a caller of this, an older or a newer version has it, or a
/// confused one.
pub fn growing<T: Plain>(input: &mut Input, value: &T) -> Vec<u8> {
    let (mut bytes, size) = sized(input, value);
    // The size is there in any case.
    bytes.resize(bytes.len().max(size_of::<u32>()), 0);
    bytes[..size_of::<u32>()].copy_from_slice(&(size as u32).to_ne_bytes());
    bytes
}

/// A struct that may grow and whose size is passed beside it, likewise.
pub fn sized<T: Plain>(input: &mut Input, value: &T) -> (Vec<u8>, usize) {
    let mut bytes = bytes_of(value);
    let size = input.struct_size(bytes.len());
    let known = bytes.len();
    bytes.resize(if size > LARGEST { 0 } else { size }, 0);
    if bytes.len() > known && input.rarely(2) {
        let last = bytes.len() - 1;
        bytes[last] = 1;
    }
    (bytes, size)
}

macro_rules! plain {
    ($($name:ty),* $(,)?) => { $(
        // SAFETY: repr(C), of integers, pointers and nullable function pointers alone, with explicit padding.
        unsafe impl Plain for $name {}
    )* };
}

plain!(
    i32,
    u64,
    usize,
    kvmprep::abi::kvmprep_error,
    kvmprep::abi::kvmprep_range,
    kvmprep::abi::kvmprep_memslot,
    kvmprep::abi::kvmprep_caps,
    kvmprep::abi::kvmprep_memslot_report,
    kvmprep::abi::kvmprep_vm_config,
    kvmprep::abi::kvmprep_coverage,
    kvmprep::abi::kvmprep_fault_stats,
    kvmprep::abi::kvmprep_progress,
    kvmprep::abi::kvmprep_populate_opts,
    kvmprep::abi::kvmprep_populate_result,
    kvmprep::abi::kvmprep_visibility_run,
    kvmprep::abi::kvmprep_convert_opts,
    kvmprep::abi::kvmprep_convert_result,
);
