//! Instructions and heap allocations for each chunk of 2 MiB, both stages, with a kernel that answers everything:
//! `benches/chunk.rs` under callgrind.
//!
//! One run has twice as many chunks as the other, and only the difference counts, so that starting a process,
//! making a handle and planning cancel out. C library code is counted with ours.

use super::rows::Row;
use crate::{project, setup};
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Chunks of the smaller run: 2 GiB of memory.
const CHUNKS: u64 = 1000;
/// User-space instructions that a chunk may cost.
const MOST_INSTRUCTIONS: f64 = 1500.0;

/// What one run cost.
#[derive(Debug, PartialEq)]
struct Cost {
    instructions: u64,
    allocations: u64,
}

/// Measures both; nothing but the compiler changes them from run to run.
pub fn measure() -> Result<Vec<Row>> {
    setup::require_packages(&["valgrind"])?;
    let program = build()?;
    let (less, more) = (run(&program, CHUNKS)?, run(&program, 2 * CHUNKS)?);
    let each = |more: u64, less: u64| (more as f64 - less as f64) / CHUNKS as f64;
    Ok(vec![
        Row::count("instructions_per_chunk", each(more.instructions, less.instructions), "instructions")
            .count_at_most(MOST_INSTRUCTIONS),
        Row::count("allocations_per_chunk", each(more.allocations, less.allocations), "allocations")
            .count_at_most(0.0),
    ])
}

/// Builds the program as the library is built, and says where it is.
fn build() -> Result<PathBuf> {
    let arguments =
        ["bench", "--no-run", "--package", "kvmprep", "--bench", "chunk", "--message-format=json"];
    let said = project::run(project::cargo().args(arguments))?;
    let messages = said.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let mut executables = messages.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    executables.next().context("cargo does not say where benches/chunk.rs has gone")
}

fn run(program: &Path, chunks: u64) -> Result<Cost> {
    let mut callgrind = Command::new("valgrind");
    callgrind
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .arg(chunks.to_string());
    let output = callgrind.output().context("cannot start valgrind")?;
    let (said, counted) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "benches/chunk.rs failed under callgrind:\n{said}{counted}");
    let cost = cost(&said, &counted);
    cost.with_context(|| format!("callgrind's counts were not understood:\n{said}{counted}"))
}

/// Reads `chunks N calls N allocations N` and callgrind's `==PID== Collected : N`.
fn cost(said: &str, counted: &str) -> Option<Cost> {
    let allocations = said.split_whitespace().skip_while(|word| *word != "allocations").nth(1)?;
    let collected = counted.lines().find_map(|line| line.split_once("Collected :"))?.1;
    Some(Cost { instructions: collected.trim().parse().ok()?, allocations: allocations.parse().ok()? })
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
