//! A benchmark of the library's, or the model's, run for its time and under callgrind for its instructions.
//!
//! The programs (`benches/*.rs`) print words and numbers in turn, which are read here. Nothing but the compiler changes
//! what callgrind counts; C library code is counted with ours.

use crate::{project, setup};
use anyhow::{Context, Result, ensure};
use std::path::PathBuf;
use std::process::Command;

/// A benchmark, built as the library is built.
pub struct Program(PathBuf);

/// What one run under callgrind cost.
#[derive(Debug, PartialEq)]
pub struct Cost {
    pub instructions: u64,
    pub allocations: u64,
}

impl Program {
    /// Builds `benches/NAME.rs`.
    pub fn build(name: &str) -> Result<Self> {
        setup::require_packages(&["valgrind"])?;
        Self::build_in("kvmprep", name)
    }

    /// Builds `benches/NAME.rs` of another package, to be run for its time.
    pub fn build_in(package: &str, name: &str) -> Result<Self> {
        let arguments = ["bench", "--no-run", "--package", package, "--bench", name, "--message-format=json"];
        let said = project::run(project::cargo().args(arguments))?;
        let messages = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut executables =
            messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
        let path = executables.next();
        path.map(Self).with_context(|| format!("cargo does not say where benches/{name}.rs has gone"))
    }

    /// Runs it and reads the number that it prints behind `word`.
    pub fn measure(&self, arguments: &[&str], word: &str) -> Result<u64> {
        let said = project::run(Command::new(&self.0).args(arguments))?;
        number(&said, word).with_context(|| format!("no {word} in what the benchmark said:\n{said}"))
    }

    /// Runs it under callgrind.
    pub fn count(&self, arguments: &[&str]) -> Result<Cost> {
        let mut callgrind = Command::new("valgrind");
        callgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(&self.0).args(arguments);
        let output = callgrind.output().context("cannot start valgrind")?;
        let (said, counted) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "a benchmark failed under callgrind:\n{said}{counted}");
        let cost = cost(&said, &counted);
        cost.with_context(|| format!("callgrind's counts were not understood:\n{said}{counted}"))
    }
}

fn number(said: &str, word: &str) -> Option<u64> {
    said.split_whitespace().skip_while(|said| *said != word).nth(1)?.parse().ok()
}

/// Reads `… allocations N` and callgrind's `==PID== Collected : N`.
fn cost(said: &str, counted: &str) -> Option<Cost> {
    let collected = counted.lines().find_map(|line| line.split_once("Collected :"))?.1;
    Some(Cost { instructions: collected.trim().parse().ok()?, allocations: number(said, "allocations")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_counts_are_read() {
        let counted = "==77== Events    : Ir\n==77== Collected : 2073940\n==77== \n";
        let read = cost("chunks 1000 calls 3000 allocations 18\n", counted);
        assert_eq!(read, Some(Cost { instructions: 2_073_940, allocations: 18 }));
        assert_eq!(cost("chunks 1000\n", counted), None);
    }
}
