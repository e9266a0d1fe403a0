//! Whether a thread is inside the model: then what it calls of the C library goes to the C library.
//!
//! While it is, its signals wait, as they do for a thread in a system call: so no handler ever finds a lock of the model's held
//! by the thread that it interrupts. Nothing here may allocate, since any function that is interposed comes here first.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Set in a process that was forked: the model is its parent's.
static IS_FORKED: AtomicBool = AtomicBool::new(false);

/// Held while a thread is inside. What `errno` was before it is again afterwards.
pub struct Inside {
    errno: c_int,
}

/// Comes in.
pub fn enter() -> Inside {
    DEPTH.set(DEPTH.get() + 1);
    tell_sanitizer(&COMING);
    Inside { errno: errno() }
}

/// Whether the calling thread is inside.
pub fn is_inside() -> bool {
    DEPTH.get() != 0
}

/// Whether this process is another than the one that the model's objects are of.
pub fn is_forked() -> bool {
    IS_FORKED.load(Ordering::Relaxed)
}

/// From now on this process is such.
pub fn set_forked() {
    IS_FORKED.store(true, Ordering::Relaxed);
}

impl Drop for Inside {
    fn drop(&mut self) {
        tell_sanitizer(&GOING);
        set_errno(self.errno);
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// What the calling thread's last failing call said.
pub fn errno() -> c_int {
    // SAFETY: each thread has one.
    unsafe { *libc::__errno_location() }
}

/// Has the calling thread's last failing call have said this.
pub fn set_errno(errno: c_int) {
    // SAFETY: each thread has one.
    unsafe { *libc::__errno_location() = errno }
}

/// A function of ThreadSanitizer's, in a program that has it. It sees the model's `memcpy`, and not its locks, so all that is
/// done here would be races: it is asked not to look.
type Notice = unsafe extern "C" fn();

static COMING: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
static GOING: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Looks them up when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_UP: extern "C" fn() = {
    extern "C" fn look_up() {
        // SAFETY: the names end with a zero.
        let [coming, going] = [c"__tsan_ignore_thread_begin", c"__tsan_ignore_thread_end"]
            .map(|name| unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) });
        if !coming.is_null() && !going.is_null() {
            COMING.store(coming, Ordering::Relaxed);
            GOING.store(going, Ordering::Relaxed);
        }
    }
    look_up
};

fn tell_sanitizer(notice: &AtomicPtr<c_void>) {
    let function = notice.load(Ordering::Relaxed);
    if !function.is_null() {
        // SAFETY: the function of these names has this type.
        unsafe { mem::transmute::<*mut c_void, Notice>(function)() };
    }
}
