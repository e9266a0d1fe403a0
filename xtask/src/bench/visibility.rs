//! What the map of private memory costs: `benches/visibility.rs`, for its time beside what the map could have been made of
//! and beside QEMU's scan; for its size; and under callgrind for how its work grows.

use super::callgrind::Program;
use super::rows::{BITS, RATIO, Row};
use super::samples::median;
use anyhow::{Context, Result};

const ALTERNATIVES: [&str; 2] = ["intervals", "roaring"];
/// Conversions that a time is measured with, and with which the scan's, which takes a thousand times as long.
const TIMED: u64 = 100_000;
const SCANS: u64 = 16;
/// Conversions that are counted, and a number to see the growth from.
const MANY: u64 = 10_000;
const FEW: u64 = 1000;
/// What one may take, in nanoseconds.
const MOST_NS: f64 = 1000.0;
/// What that may be of a scan.
const MOST_OF_SCAN: f64 = 0.001;
/// What the map may take for 4 TiB of one kind, in bytes.
const MOST_BYTES: f64 = 4096.0;
/// And for a page where every other differs.
const MOST_BITS: f64 = 1.1;
/// What log n may be missed by: nothing.
const MOST_GROWTH: f64 = 1.0;

/// The times, one way after the other in each round.
pub fn measure(rounds: u32) -> Result<Vec<Row>> {
    let program = Program::build("visibility")?;
    let time = |way: &str, what: &str, conversions: u64| -> Result<f64> {
        let ns = program.measure(&[way, what, &conversions.to_string()], "ns")?;
        // What is undone is two conversions.
        Ok(ns as f64 / conversions as f64 / if what == "undo" { 2.0 } else { 1.0 })
    };
    let (mut stay, mut undo, mut scan) = (Ways::default(), Ways::default(), Vec::new());
    for _ in 0..rounds {
        stay.measure(|way| time(way, "stay", TIMED))?;
        undo.measure(|way| time(way, "undo", TIMED))?;
        scan.push(time("scan", "undo", SCANS)?);
    }
    let (stayed, undone) = (stay.medians()?, undo.medians()?);
    let scan = median(scan).context("nothing was measured")?;
    Ok(vec![
        Row::nanoseconds("visibility_4tib", stayed.0, stayed.1).time_at_most(MOST_NS),
        Row::nanoseconds("visibility_4tib_undone", undone.0, undone.1).time_at_most(MOST_NS),
        Row::nanoseconds("visibility_vs_scan", undone.0, scan).ratio_at_most(MOST_OF_SCAN),
    ])
}

/// Ours, and each alternative's.
#[derive(Default)]
struct Ways {
    ours: Vec<f64>,
    theirs: [Vec<f64>; ALTERNATIVES.len()],
}

impl Ways {
    fn measure(&mut self, time: impl Fn(&str) -> Result<f64>) -> Result<()> {
        self.ours.push(time("tree")?);
        for (way, times) in ALTERNATIVES.iter().zip(&mut self.theirs) {
            times.push(time(way)?);
        }
        Ok(())
    }

    /// Ours, and the best alternative's.
    fn medians(self) -> Result<(f64, f64)> {
        let best = self.theirs.into_iter().filter_map(median).reduce(f64::min);
        median(self.ours).zip(best).context("nothing was measured")
    }
}

/// What does not depend on the machine: sizes, and growth beyond log n.
pub fn count() -> Result<Vec<Row>> {
    let program = Program::build("visibility")?;
    let mut rows = Vec::new();
    let bytes = |way: &str, what: &str| program.measure(&[way, what], "bytes").map(|bytes| bytes as f64);
    for way in ALTERNATIVES {
        let (ours, theirs) = (bytes("tree", "uniform")?, bytes(way, "uniform")?);
        let id = format!("visibility_uniform_vs_{way}");
        rows.push(Row::counts(id, ours, theirs, "bytes").count_at_most(MOST_BYTES));
    }
    let pages = program.measure(&["tree", "alternating"], "pages")? as f64;
    for way in ALTERNATIVES {
        let bits = |way: &str| bytes(way, "alternating").map(|bytes| bytes * 8.0 / pages);
        let id = format!("visibility_worst_vs_{way}");
        rows.push(Row::counts(id, bits("tree")?, bits(way)?, BITS).count_at_most(MOST_BITS));
    }
    let count = |conversions: u64| program.count(&["tree", "stay", &conversions.to_string()]);
    let (none, few, many) = (count(0)?, count(FEW)?, count(MANY)?);
    let for_each = |all: u64, conversions: u64| (all - none.instructions) as f64 / conversions as f64;
    let growth = for_each(many.instructions, MANY) / for_each(few.instructions, FEW);
    let log_n = (MANY as f64).log2() / (FEW as f64).log2();
    rows.push(Row::count("visibility_growth_vs_log_n", growth / log_n, RATIO).count_at_most(MOST_GROWTH));
    rows.push(Row::count("visibility_instructions", for_each(many.instructions, MANY), "instructions"));
    Ok(rows)
}
