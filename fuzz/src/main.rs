//! Calls the C interface as bytes say, and judges what comes back.
//!
//! The bytes are libFuzzer's, where the feature `libfuzzer` is on (`cargo xtask fuzz`); without it this program replays
//! the files that are named to it and prints each call. It calls only what a C program could call, with pointers to
//! heap memory of exactly the size that goes with them, so that a sanitizer sees every access beyond. It must never
//! call in a way that the header forbids: what is found here is the library's fault.

#![cfg_attr(feature = "libfuzzer", no_main)]

mod call;
mod conversion;
mod effort;
#[path = "../../tests/fake/mod.rs"]
mod fake;
mod guest;
mod heap;
mod image;
mod input;
mod listener;
mod memslots;
mod oracle;
mod populate;
mod program;
mod rules;
mod seen;
mod sight;
mod slots;
mod world;

#[cfg(feature = "libfuzzer")]
libfuzzer_sys::fuzz_target!(init: prepare(), |bytes: &[u8]| {
    program::run(bytes);
});

/// Once the library has put its own panic hook, which is silent, puts one in front that is not: a panic of the library's
/// is a finding, and where it happened is what one wants to know of it.
#[cfg(feature = "libfuzzer")]
fn prepare() {
    // SAFETY: NULL is accepted and does nothing.
    unsafe { kvmprep::abi::kvmprep_vm_free(std::ptr::null_mut()) };
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("finding: {panic}\n{}", std::backtrace::Backtrace::force_capture());
        std::process::abort();
    }));
    seen::print_at_exit();
    if std::env::var_os("KVMPREP_FUZZ_TRACE").is_some() {
        call::trace();
    }
}

#[cfg(not(feature = "libfuzzer"))]
fn main() -> std::io::Result<()> {
    call::trace();
    for path in std::env::args_os().skip(1) {
        program::run(&std::fs::read(path)?);
    }
    seen::print();
    Ok(())
}
