//! Where panics end: the library's own mistakes become an error, and are not printed.
//!
//! Whoever lets code of ours run, an entry point or a thread, lets it run in [`catch`].

use crate::error::{Error, Reason};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    /// How deep this thread is inside the library: a panic there is ours to catch.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
}

/// Runs `body`; `None` when it panicked. Prints nothing.
///
/// Silence takes a panic hook, which belongs to the Rust runtime: to the one inside the shared library, or inside
/// the static one. Where the crate is linked into a Rust program it is that program's; then panics outside
/// the library go to the hook that was there before.
pub fn catch<T>(body: AssertUnwindSafe<impl FnOnce() -> T>) -> Option<T> {
    static SILENCE: Once = Once::new();
    SILENCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if INSIDE.get() == 0 {
                before(info);
            }
        }));
    });
    INSIDE.set(INSIDE.get() + 1);
    let result = catch_unwind(body).ok();
    INSIDE.set(INSIDE.get() - 1);
    result
}

/// The error that a panic becomes.
pub fn panicked() -> Error {
    Error::new(libc::ENOTRECOVERABLE, Reason::Panicked, "the library has found an error of its own")
        .hint("free the handle and do without; please report this with what led to it")
}
