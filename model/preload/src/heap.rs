//! The model's own heap, apart from the program's.
//!
//! A program's signal handler may close a descriptor, and so have the model let go of what lies behind it. If that were freed into
//! the program's heap, and the handler had interrupted the program in `malloc`, it would wait for ever. Of this heap the lock is
//! held by threads whose signals wait, and nothing of the program's is in it: what a program counts of its own heap stays its own.

use crate::real;
use dlmalloc::{Allocator, Dlmalloc};
use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_int;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static HEAP: Heap = Heap(Mutex::new(Dlmalloc::new_with_allocator(Pages)));

struct Heap(Mutex<Dlmalloc<Pages>>);

/// Where the heap has its pages from: mappings that the kernel never makes one with a neighbour of the program's, since they are
/// of another kind. So what happens to the program's (a fork, huge pages) is as if these were not there.
struct Pages;

const PROTECTION: c_int = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
const PAGE_SIZE: usize = 4096;

// SAFETY: what is given is new memory, and what is taken back was given.
unsafe impl Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        // SAFETY: a new mapping touches nothing.
        let start = unsafe { real::mmap(ptr::null_mut(), size, PROTECTION, FLAGS, -1, 0) };
        if start == libc::MAP_FAILED { (ptr::null_mut(), 0, 0) } else { (start.cast(), size, 0) }
    }

    fn remap(&self, start: *mut u8, old: usize, new: usize, can_move: bool) -> *mut u8 {
        let flags = if can_move { libc::MREMAP_MAYMOVE } else { 0 };
        // SAFETY: it is the heap's, who asks for it to be moved or changed in size.
        let moved = unsafe { real::mremap(start.cast(), old, new, flags, ptr::null_mut()) };
        if moved == libc::MAP_FAILED { ptr::null_mut() } else { moved.cast() }
    }

    fn free_part(&self, start: *mut u8, old: usize, new: usize) -> bool {
        // SAFETY: the heap has nothing beyond the new size.
        unsafe { real::munmap(start.add(new).cast(), old - new) == 0 }
    }

    fn free(&self, start: *mut u8, size: usize) -> bool {
        // SAFETY: the heap has nothing in it.
        unsafe { real::munmap(start.cast(), size) == 0 }
    }

    fn can_release_part(&self, _flags: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        PAGE_SIZE
    }
}

impl Heap {
    fn with<T>(&self, act: impl FnOnce(&mut MutexGuard<'_, Dlmalloc<Pages>>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The heap while a thread keeps everybody else from it.
pub struct Held(#[allow(dead_code)] MutexGuard<'static, Dlmalloc<Pages>>);

/// Keeps everybody else from the heap, and oneself.
pub fn hold() -> Held {
    Held(HEAP.0.lock().unwrap_or_else(PoisonError::into_inner))
}

// SAFETY: it is dlmalloc's heap behind a lock, and every call hands on what the caller has promised.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        self.with(|heap| unsafe { heap.malloc(layout.size(), layout.align()) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        self.with(|heap| unsafe { heap.calloc(layout.size(), layout.align()) })
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        self.with(|heap| unsafe { heap.free(pointer, layout.size(), layout.align()) });
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's.
        self.with(|heap| unsafe { heap.realloc(pointer, layout.size(), layout.align(), size) })
    }
}
