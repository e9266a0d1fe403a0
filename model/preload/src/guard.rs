//! How a call of the program's is answered out of the model: inside, and with its signals waiting.
//!
//! Every interposed function that may take a lock of the model's holds a [`Guard`] from before until after. Nothing is decided
//! here.

use crate::host::signals::Blocked;
use crate::inside::{self, Inside};
use kvmprep_model::errno::Result;
use std::ffi::{c_int, c_void};

/// Held while a call is answered.
pub struct Guard {
    // Dropped first: a handler that runs as soon as signals are let in again is outside.
    inside: Inside,
    signals: Blocked,
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
        let signals = Blocked::new();
        Guard { inside: inside::enter(), signals }
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
