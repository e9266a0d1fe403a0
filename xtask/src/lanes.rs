//! What a test run counts, and how it ends.
//!
//! A lane is a place where tests run: the sources themselves, this machine's KVM, one kernel in the bed. A lane
//! that cannot be run says why and counts as skipped; nothing that did not run counts as passed.

use crate::project;
use anyhow::{Result, bail};
use serde::Serialize;
use std::time::Instant;

/// What one lane came to.
#[derive(Serialize, Debug, Default)]
pub struct Lane {
    pub name: String,
    pub kernel: String,
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
    pub why_skipped: String,
}

/// What one program, tool or check came to.
#[derive(Debug, Default, PartialEq, Clone, Copy)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

/// Whose answers a lane's programs get, which is printed above it.
#[derive(Clone, Copy)]
pub enum Kvm {
    /// This machine's, whatever it can.
    Native,
    /// A real one, with nested paging, on a processor that is emulated.
    Emulated,
    /// None: the software model's, by that kernel's rules.
    Modelled,
}

impl Lane {
    pub fn new(name: &str) -> Self {
        println!("\n== {name}");
        Self { name: name.into(), ..Self::default() }
    }

    /// One whose programs use KVM.
    pub fn of_kernel(name: &str, kernel: &str, kvm: Kvm) -> Self {
        let whose = match kvm {
            Kvm::Native => "this machine's own KVM",
            Kvm::Emulated => "real KVM on an emulated processor",
            Kvm::Modelled => "no KVM but the software model",
        };
        println!("\n== {name}: Linux {kernel}, {whose}");
        Self { name: name.into(), kernel: kernel.into(), ..Self::default() }
    }

    /// A lane that cannot be run here.
    pub fn skipped(name: &str, why: &str) -> Self {
        println!("\n== {name}: SKIPPED: {why}");
        Self { name: name.into(), skipped: 1, why_skipped: why.into(), ..Self::default() }
    }

    /// Adds what something came to; `details` are shown when it failed.
    pub fn add(&mut self, what: &str, counts: Counts, details: &str) {
        // Something that ran nothing is not a success.
        let counts = if counts == Counts::default() { Counts { failed: 1, ..counts } } else { counts };
        self.passed += counts.passed;
        self.failed += counts.failed;
        self.skipped += counts.skipped;
        let verdict = if counts.failed > 0 { "FAILED" } else { "ok" };
        println!(
            "{verdict:6} {what}: {} passed, {} failed, {} skipped",
            counts.passed, counts.failed, counts.skipped
        );
        if counts.failed > 0 {
            details.lines().for_each(|line| println!("       {line}"));
        }
    }

    /// Adds one check that either holds or says why not.
    pub fn check(&mut self, what: &str, result: Result<()>) {
        match result {
            Ok(()) => self.add(what, Counts { passed: 1, ..Counts::default() }, ""),
            Err(error) => self.add(what, Counts { failed: 1, ..Counts::default() }, &format!("{error:#}")),
        }
    }
}

/// A whole run.
#[derive(Serialize)]
struct Figures<'a> {
    passed: u64,
    failed: u64,
    skipped: u64,
    seconds: u64,
    lanes: &'a [Lane],
}

/// Writes the figures, prints the last lines and says whether all is well.
pub fn conclude(file: &str, started: Instant, lanes: &[Lane]) -> Result<()> {
    let sum = |f: fn(&Lane) -> u64| lanes.iter().map(f).sum();
    let (passed, failed, skipped) = (sum(|l| l.passed), sum(|l| l.failed), sum(|l| l.skipped));
    let seconds = started.elapsed().as_secs();
    project::write_figures(file, &Figures { passed, failed, skipped, seconds, lanes })?;
    println!();
    for lane in lanes {
        let Lane { name, kernel, passed, failed, skipped, why_skipped } = lane;
        println!(
            "{name:9} {kernel:12} {passed:4} passed {failed:3} failed {skipped:3} skipped  {why_skipped}"
        );
    }
    println!("in {} min {} s", seconds / 60, seconds % 60);
    println!("result: {passed} passed, {failed} failed, {skipped} skipped");
    if failed > 0 || passed == 0 {
        bail!("{failed} failed");
    }
    Ok(())
}

/// Sums the `test result:` lines of cargo test.
pub fn cargo_counts(output: &str) -> Counts {
    sum_lines(output, "test result:", ["passed", "failed", "ignored"])
}

/// Sums the `cases:` lines of the C tests.
pub fn case_counts(output: &str) -> Counts {
    sum_lines(output, "cases:", ["passed", "failed", "skipped"])
}

fn sum_lines(output: &str, start: &str, words: [&str; 3]) -> Counts {
    let mut counts = [0; 3];
    for line in output.lines().filter_map(|line| line.strip_prefix(start)) {
        let tokens: Vec<&str> = line.split([' ', ',', ';', '.']).filter(|token| !token.is_empty()).collect();
        for pair in tokens.windows(2) {
            let place = words.iter().position(|word| *word == pair[1]);
            if let (Ok(number), Some(place)) = (pair[0].parse::<u64>(), place) {
                counts[place] += number;
            }
        }
    }
    Counts { passed: counts[0], failed: counts[1], skipped: counts[2] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_summed_over_lines() {
        let output = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
                      test result: FAILED. 2 passed; 5 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(cargo_counts(output), Counts { passed: 5, failed: 5, skipped: 1 });
        assert_eq!(
            case_counts("ok a\ncases: 8 passed, 1 failed, 2 skipped\n"),
            Counts { passed: 8, failed: 1, skipped: 2 }
        );
    }

    #[test]
    fn what_ran_nothing_has_failed() {
        let mut lane = Lane::default();
        lane.add("nothing", Counts::default(), "");
        assert_eq!((lane.passed, lane.failed), (0, 1));
    }
}
