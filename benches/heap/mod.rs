//! What benchmarks count memory with: a heap that says how often it was asked, and how much of it is held.
//!
//! Counts repeat exactly from run to run, where times do not.

#![allow(dead_code, reason = "each benchmark needs a part")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

struct Counting;

/// How often the heap was asked.
pub static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// How many bytes of it are held.
pub static HELD: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static HEAP: Counting = Counting;

/// What an allocation takes in the C library's heap: with a word before it, in steps of two words.
fn taken(size: usize) -> u64 {
    (size as u64 + 8).next_multiple_of(16).max(32)
}

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        HELD.fetch_add(taken(layout.size()), Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        HELD.fetch_add(taken(layout.size()), Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(taken(layout.size()), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        HELD.fetch_sub(taken(layout.size()), Relaxed);
        HELD.fetch_add(taken(size), Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}
