//! How fast the model maps pages: `model/benches/mapping.rs`, with one vCPU, and with two of one virtual machine.
//!
//! The best of all rounds counts: whatever else the machine does only makes a round slower, and a rate has nobody beside it
//! in the same run to be slowed with it.

use super::callgrind::Program;
use super::rows::Row;
use anyhow::{Context, Result};

/// Pages for each vCPU, of 4 KiB.
const PAGES: u64 = 1_000_000;
/// What one vCPU must map a second, and how many times that two must.
const LEAST: f64 = 5e6;
const LEAST_SCALING: f64 = 1.7;
/// The unit of all of it.
const RATE: &str = "pages/s";

/// Measures the whole of a pre-fault, and the MMU's part of it.
pub fn measure(rounds: u32) -> Result<Vec<Row>> {
    let program = Program::build_in("kvmprep-model", "mapping")?;
    let (mut one, mut two, mut mmu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        one.push(rate(&program, "pre-fault", 1)?);
        two.push(rate(&program, "pre-fault", 2)?);
        mmu.push(rate(&program, "map", 1)?);
    }
    let best = |rates: Vec<f64>| rates.into_iter().reduce(f64::max).context("nothing was measured");
    let (one, two, mmu) = (best(one)?, best(two)?, best(mmu)?);
    Ok(vec![
        Row::count("model_pages_per_s", one.round(), RATE).rate_at_least(LEAST),
        Row::counts("model_scaling_2", two.round(), one.round(), RATE).ratio_at_least(LEAST_SCALING),
        Row::count("model_mmu_pages_per_s", mmu.round(), RATE),
    ])
}

/// Pages a second, of all threads together.
fn rate(program: &Program, way: &str, threads: u64) -> Result<f64> {
    let ns = program.measure(&[way, &threads.to_string(), &PAGES.to_string()], "ns")?;
    Ok((threads * PAGES) as f64 * 1e9 / ns as f64)
}
