//! One call of the C interface: where its error goes, what it came to, and a line about it for who replays it.

use crate::heap::{Block, Passed};
use crate::input::Input;
use crate::{oracle, seen};
use kvmprep::abi::kvmprep_error;
use kvmprep::error::Reason;
use std::ffi::c_int;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a call came to.
#[derive(Clone, Copy)]
pub struct Answer {
    /// What it returned.
    pub code: c_int,
    /// What it said, where it was given a place for that.
    pub error: Option<kvmprep_error>,
}

impl Answer {
    /// Whether it did what was asked.
    pub fn is_success(&self) -> bool {
        self.code >= 0
    }

    /// What it said, where that was the reason.
    pub fn error_of(&self, reason: Reason) -> Option<kvmprep_error> {
        self.error.filter(|error| error.reason == reason as u32)
    }
}

static TRACES: AtomicBool = AtomicBool::new(false);

/// Has every call printed.
pub fn trace() {
    TRACES.store(true, Ordering::Relaxed);
}

/// Makes a call, holds its answer against what is said of all answers, and counts it.
pub fn call(
    input: &mut Input,
    name: &'static str,
    arguments: &dyn Debug,
    function: impl FnOnce(*mut kvmprep_error) -> c_int,
) -> Answer {
    call_with(input.passed(), name, arguments, function)
}

/// As [`call`], for a call that must tell of its error.
pub fn call_with(
    passed: Passed,
    name: &'static str,
    arguments: &dyn Debug,
    function: impl FnOnce(*mut kvmprep_error) -> c_int,
) -> Answer {
    let traces = TRACES.load(Ordering::Relaxed);
    if traces {
        // First, since it may not return.
        eprint!("{name} {arguments:x?}");
    }
    let place = Block::output(size_of::<kvmprep_error>(), passed);
    let code = function(place.pointer());
    if passed == Passed::Misaligned {
        oracle::demand(code == -libc::EINVAL, name, "a misaligned err is refused");
    }
    if passed != Passed::Right {
        if traces {
            eprintln!(" = {code}");
        }
        oracle::demand(code > -4096, name, "a negative errno");
        oracle::demand(place.is_unwritten(), name, "err is not touched");
        return Answer { code, error: None };
    }
    let error = place.read::<kvmprep_error>();
    if traces {
        let said = |text| oracle::text(text).unwrap_or("(no text)").to_owned();
        eprintln!(" = {code} [{}] {} | {}", error.reason, said(&error.message), said(&error.hint));
    }
    oracle::judge_error(name, code, &error);
    seen::count(name, error.reason);
    Answer { code, error: Some(error) }
}
