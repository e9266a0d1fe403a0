//! What it costs to check and note memslots one by one: `benches/memslots.rs`, for its time against a list that is
//! searched from the front, and under callgrind for how that grows with their number.

use super::callgrind::{Cost, Program};
use super::rows::{RATIO, Row};
use super::samples::median;
use anyhow::{Context, Result};

/// As many as KVM has in an address space, and a number to see the growth from.
const ALL: u64 = 32764;
const FEW: u64 = 1000;
/// What all of them may take, in milliseconds.
const MOST_MS: f64 = 10.0;
/// What n log n may be missed by: nothing.
const MOST_GROWTH: f64 = 1.0;

/// The time, on a machine as quiet as can be had.
pub fn measure(rounds: u32) -> Result<Vec<Row>> {
    let program = Program::build("memslots")?;
    let all = ALL.to_string();
    let time = |arguments: &[&str]| program.measure(arguments, "ns").map(|ns| ns as f64);
    let (mut ours, mut lists) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        ours.push(time(&[&all])?);
        lists.push(time(&[&all, "list"])?);
    }
    let (ours, lists) = median(ours).zip(median(lists)).context("nothing was measured")?;
    Ok(vec![Row::times("memslots_32764", ours, lists).time_at_most(MOST_MS)])
}

/// What does not depend on the machine: growth beyond n log n, and what the checks ask of the heap.
pub fn count() -> Result<Vec<Row>> {
    let program = Program::build("memslots")?;
    let count = |slots: u64| program.count(&[&slots.to_string()]);
    let (none, few, all) = (count(0)?, count(FEW)?, count(ALL)?);
    let for_each = |cost: &Cost, slots: u64| (cost.instructions - none.instructions) as f64 / slots as f64;
    let growth = for_each(&all, ALL) / for_each(&few, FEW);
    let n_log_n = (ALL as f64).log2() / (FEW as f64).log2();
    Ok(vec![
        Row::count("memslots_growth_vs_n_log_n", growth / n_log_n, RATIO).count_at_most(MOST_GROWTH),
        Row::count("memslots_instructions", for_each(&all, ALL), "instructions"),
        Row::count("memslots_check_allocations", all.allocations as f64, "allocations").count_at_most(0.0),
    ])
}
