//! What a call costs: bytes that its thread allocates, and calls of the kernel that is none.
//!
//! What a guest asks for may cost what it changes, however much it says that it asks for. Only the calling thread is
//! counted: a job may be at work on others.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

/// Bytes that this thread has ever allocated.
pub fn allocated() -> u64 {
    ALLOCATED.with(Cell::get)
}

/// The system's allocator, which AddressSanitizer watches.
struct Counting;

// SAFETY: each is the system's own, with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: passed on from the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: passed on from the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: passed on from the caller.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on from the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn count(size: usize) {
    // A thread that ends may allocate once more, which nobody wants to know.
    let _ = ALLOCATED.try_with(|sum| sum.set(sum.get() + size as u64));
}
