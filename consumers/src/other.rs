// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another library with a C face: it brings a whole Rust runtime, as any does.

/// Panics inside, on this thread and on another, and returns 1 when both were caught.
#[no_mangle]
pub extern "C" fn other_panics_and_catches() -> i32 {
    let here = std::panic::catch_unwind(|| panic!("here, and caught"));
    let elsewhere = std::thread::spawn(|| panic!("on a thread, and caught")).join();
    i32::from(here.is_err() && elsewhere.is_err())
}
