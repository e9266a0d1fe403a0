//! Instructions and heap allocations for each chunk of 2 MiB, both stages, with a kernel that answers everything:
//! `benches/chunk.rs` under callgrind.
//!
//! One run has twice as many chunks as the other, and only the difference counts, so that starting a process,
//! making a handle and planning cancel out.

use super::callgrind::Program;
use super::rows::Row;
use anyhow::Result;

/// Chunks of the smaller run: 2 GiB of memory.
const CHUNKS: u64 = 1000;
/// User-space instructions that a chunk may cost.
const MOST_INSTRUCTIONS: f64 = 1500.0;

/// Measures both.
pub fn measure() -> Result<Vec<Row>> {
    let program = Program::build("chunk")?;
    let count = |chunks: u64| program.count(&[&chunks.to_string()]);
    let (less, more) = (count(CHUNKS)?, count(2 * CHUNKS)?);
    let each = |more: u64, less: u64| (more as f64 - less as f64) / CHUNKS as f64;
    Ok(vec![
        Row::count("instructions_per_chunk", each(more.instructions, less.instructions), "instructions")
            .count_at_most(MOST_INSTRUCTIONS),
        Row::count("allocations_per_chunk", each(more.allocations, less.allocations), "allocations")
            .count_at_most(0.0),
    ])
}
