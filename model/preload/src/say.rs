//! What the model says on the program's standard error: what it does not model, and what is wrong with its settings.
//!
//! Written straight to the descriptor, in one call, with no lock and no buffer of the program's. Nothing that the program asks
//! in the ordinary way is answered here; each thing that is not modelled is said once.

use crate::real;
use std::collections::HashSet;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// Writes a line.
pub fn line(what: fmt::Arguments<'_>) {
    let text = format!("kvmprep-model: {what}\n");
    // SAFETY: that many bytes are there. Whoever has no standard error cannot be told.
    unsafe { real::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}

/// Writes a line, if it was not written before.
pub fn once(what: String) {
    static SAID: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.get_or_insert_default().insert(what.clone()) {
        drop(said);
        line(format_args!("{what}"));
    }
}

/// `EX_CONFIG`: what a program ends with that is not set up well.
const NOT_SET_UP_WELL: libc::c_int = 78;

/// Says what is wrong with the settings, and ends the program before it has begun: nothing of it is to be run at its end, and
/// there is nothing to be found in a core file.
pub fn end_before_begin(why: fmt::Arguments<'_>) -> ! {
    line(why);
    // SAFETY: nothing comes after it.
    unsafe { libc::_exit(NOT_SET_UP_WELL) }
}

/// Says why the program cannot go on, and ends it.
pub fn end(why: fmt::Arguments<'_>) -> ! {
    line(why);
    std::process::abort()
}
