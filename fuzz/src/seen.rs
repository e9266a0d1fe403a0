//! Counts what the calls came to, so that a run can show that it reached the rules and not only the door.

use kvmprep::error::Reason;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Calls by what was called, and how many did what was asked; answers by their reason.
static SEEN: Mutex<Seen> = Mutex::new(Seen { calls: BTreeMap::new(), reasons: BTreeMap::new() });

struct Seen {
    calls: BTreeMap<&'static str, [u64; 2]>,
    reasons: BTreeMap<u32, u64>,
}

/// What no argument brings about, only a machine or a moment.
const OUT_OF_REACH: [Reason; 15] = [
    // A file system's or the machine's state.
    Reason::HugetlbShortage,
    Reason::MemoryShortage,
    Reason::Poisoned,
    // A vCPU or a signal.
    Reason::VcpuRefused,
    Reason::Interrupted,
    Reason::RetriesExhausted,
    Reason::TimedOut,
    // Two VMs; another process's VM.
    Reason::GmemOtherVm,
    Reason::VmDead,
    Reason::ThreadFailed,
    // A guest_memfd that can be mapped; a confidential VM's firmware.
    Reason::GmemElsewhere,
    Reason::FirmwareRefused,
    // Two threads at once; and kvmprep_vm_free() has no place to tell it.
    Reason::Busy,
    // A finding.
    Reason::Panicked,
    // What KVM refuses and the library did not foresee.
    Reason::KernelRefused,
];

/// A call was made and gave this reason.
pub fn count(call: &'static str, reason: u32) {
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let [calls, successes] = seen.calls.entry(call).or_default();
    *calls += 1;
    *successes += u64::from(reason == Reason::None as u32);
    *seen.reasons.entry(reason).or_default() += 1;
}

/// Prints the counts when the process ends, for `cargo xtask fuzz` to read: libFuzzer does not return.
#[cfg(feature = "libfuzzer")]
pub fn print_at_exit() {
    extern "C" fn at_exit() {
        print();
    }
    // SAFETY: the function needs nothing that is gone by then.
    unsafe { libc::atexit(at_exit) };
}

/// Prints the counts: a line for each function that was called, and one for each reason that there is.
pub fn print() {
    let seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    for (call, [calls, successes]) in &seen.calls {
        eprintln!("seen: function {call} {calls} calls {successes} successes");
    }
    for reason in Reason::ALL {
        let count = seen.reasons.get(&(*reason as u32)).unwrap_or(&0);
        let reach = if OUT_OF_REACH.contains(reason) { "by chance" } else { "by arguments" };
        eprintln!("seen: reason {} {count} {reach}", reason.name().to_string_lossy());
    }
}
