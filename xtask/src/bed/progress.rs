//! Says what the bed is busy with, on standard error.
//!
//! A terminal gets a spinner that vanishes when the step is over; a log gets one line a step. Never standard
//! output, which belongs to the program in the guest.

use std::io::IsTerminal;
use std::sync::LazyLock;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// Steps may lie within steps, and must not draw over each other.
static STEPS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// A step under way; it is over when this is dropped.
pub struct Step(Option<ProgressBar>);

/// Announces a step.
pub fn step(message: &str) -> Step {
    if !std::io::stderr().is_terminal() {
        say(message);
        return Step(None);
    }
    let bar = STEPS.add(ProgressBar::new_spinner().with_message(message.to_string()));
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    Step(Some(bar))
}

/// Tells something that stays on the screen.
pub fn say(message: &str) {
    STEPS.suspend(|| eprintln!("bed: {message}"));
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
