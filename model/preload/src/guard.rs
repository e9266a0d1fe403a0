//! How a call of the program's is answered out of the model: inside, and with its signals waiting.
//!
//! Every interposed function that may take a lock of the model's holds a [`Guard`] from before until after. Nothing is decided
//! here.

use crate::host::signals::Blocked;
use crate::inside::{self, Inside};
use kvmprep_model::errno::Result;
use std::ffi::{c_int, c_void};
use std::ptr;

/// Held while a call is answered.
pub struct Guard {
    // Dropped first: a handler that runs as soon as signals are let in again is outside.
    inside: Inside,
    signals: Blocked,
    _uncancelled: Uncancelled,
}

/// While it is held, the thread is not cancelled (`pthread_cancel`): what the model calls of the C library is no concern of the
/// program's, and `ioctl` is no place where a thread ends.
struct Uncancelled(c_int);

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
}

const PTHREAD_CANCEL_DISABLE: c_int = 1;

impl Uncancelled {
    fn new() -> Self {
        let mut before = 0;
        // SAFETY: there is room for what is written.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &mut before) };
        Uncancelled(before)
    }
}

impl Drop for Uncancelled {
    fn drop(&mut self) {
        // SAFETY: it is what was before.
        unsafe { pthread_setcancelstate(self.0, ptr::null_mut()) };
    }
}

/// What a function of the C library answers when it fails.
pub trait Failing {
    /// That value.
    const FAILED: Self;
}

impl Failing for c_int {
    const FAILED: Self = -1;
}

impl Failing for isize {
    const FAILED: Self = -1;
}

impl Failing for *mut c_void {
    const FAILED: Self = libc::MAP_FAILED;
}

impl Guard {
    /// Comes in.
    pub fn enter() -> Self {
        let uncancelled = Uncancelled::new();
        let signals = Blocked::new();
        Guard { inside: inside::enter(), signals, _uncancelled: uncancelled }
    }

    /// Goes out, with the answer.
    pub fn answer<T: Failing>(self, answer: Result<T>) -> T {
        drop(self.inside);
        drop(self.signals);
        answer.unwrap_or_else(|errno| {
            inside::set_errno(errno.0);
            T::FAILED
        })
    }

    /// Goes out, with what the C library has answered, and with its error.
    pub fn pass<T>(self, answer: T) -> T {
        let errno = inside::errno();
        drop(self.inside);
        drop(self.signals);
        inside::set_errno(errno);
        answer
    }
}
