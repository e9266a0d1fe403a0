//! Conversion on a kernel that keeps what it was asked: the order of the steps, what is given up and how, who waits for
//! whom.
//!
//! What the real KVM makes of it is for the programs of `c-tests`; here it is seen what it is asked for, call by call, and
//! that nothing else is.

#[path = "../fake/mod.rs"]
mod fake;
mod giving_up;
mod populating;
mod steps;
mod waiting;

use fake::Call::{self, Changed, Discard, PreFault, Punch, Remove, SetAttributes};
use fake::WRITE;
use fake::guest::{
    ANONYMOUS, Backed, Guest, LARGE, MAPPED, PLAIN, POOL, TOLD, UNTOLD, VCPU, kernel, old_kernel,
    plain_options,
};
use kvmprep::error::{Error, Reason, Result, Stage};
use kvmprep::kvm::{Errno, FileId, Kernel, Mapping};
use kvmprep::memslot::Memslot;
use kvmprep::populate::coverage::Loss;
use kvmprep::populate::job::{Job, Options, Worker};
use kvmprep::populate::plan::Intent;
use kvmprep::private::convert::{PIECE, Steps};
use kvmprep::private::visibility::Visibility::{self, Private, Shared};
use kvmprep::range::{HUGE, PAGE, Range};
use kvmprep::vm::{ConvertOptions, ConvertReport};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const VM: RawFd = 3;
/// Long enough for what is to happen, and for what should not to show.
const MOMENT: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_secs(120);

fn told(to: Visibility, range: Range) -> (Call, RawFd, Range) {
    (Changed, to as RawFd, range)
}

/// From the start of one to the end of the other.
fn span(first: Range, last: Range) -> Range {
    Range { start: first.start, end: last.end }
}

fn refused(result: Result<ConvertReport>) -> Error {
    result.expect_err("it was to be refused")
}

fn private_runs(guest: &Guest) -> Vec<Range> {
    assert_eq!(guest.recorded(), *guest.kernel.private.lock().unwrap(), "the record is what is true");
    guest.recorded().iter().collect()
}

fn allocated(guest: &Guest, fd: RawFd) -> Vec<Range> {
    guest.kernel.allocated.lock().unwrap().get(&fd).map(|set| set.iter().collect()).unwrap_or_default()
}

fn prefaulting(changed: &dyn Fn(Range, Visibility) -> i32) -> ConvertOptions<'_> {
    ConvertOptions { prefault: true, vcpu: Some(VCPU), ..plain_options(changed) }
}
