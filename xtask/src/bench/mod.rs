//! `cargo xtask bench`: the library against what people do without it, side by side in one run.
//!
//! The programs that measure (`c-tests/bench_*.c`, `benches/chunk.rs`) print raw samples; medians, ratios and bars
//! are made here, once. A time never stands alone: each row is ours against theirs from the same interleaved run.
//! What repeats exactly (faults, instructions, allocations) fails the command when it misses its bar; a time
//! only says so, since the machine has a part in it.

mod callgrind;
mod chart;
mod chunk;
mod host;
mod mapping;
mod memslots;
mod ready;
mod rows;
mod samples;
mod visibility;

use crate::project;
use anyhow::{Result, ensure};
use rows::{Row, Rows};

/// The arguments of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Cli {
    /// Only instructions and allocations for each chunk.
    #[arg(long)]
    quick: bool,
    /// Only one part; its rows are shown, and no figures are written.
    #[arg(long, value_enum, conflicts_with = "quick")]
    only: Option<Part>,
    /// How often each time is measured.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// Write the README's chart, docs/bench.svg, too.
    #[arg(long, conflicts_with = "quick")]
    chart: bool,
}

/// What can be asked for alone.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Time to ready and faults left, in the bed.
    Ready,
    /// The host stage, on this machine.
    Host,
    /// Instructions and allocations for each chunk.
    Chunk,
    /// Checking many memslots.
    Memslots,
    /// The map of what is private.
    Visibility,
    /// How fast the model maps pages.
    Mapping,
}

/// Measures, shows, writes, judges.
pub fn main(cli: Cli) -> Result<()> {
    let only = if cli.quick { Some(Part::Chunk) } else { cli.only };
    let wants = |part| only.is_none_or(|only| only == part);
    let mut rows = Vec::new();
    // Quietest first: the bed leaves the machine warm and its caches full.
    if wants(Part::Chunk) {
        show("What a chunk costs in the library", chunk::measure()?, &mut rows);
    }
    if wants(Part::Memslots) {
        show("What checking a memslot costs", memslots::count()?, &mut rows);
        show("32764 memslots, checked and noted one by one", memslots::measure(cli.rounds)?, &mut rows);
    }
    if wants(Part::Visibility) {
        show("What the map of private memory costs", visibility::count()?, &mut rows);
        show("One conversion in a guest of 4 TiB", visibility::measure(cli.rounds)?, &mut rows);
    }
    if wants(Part::Mapping) {
        show("Pages that the model maps, by one vCPU and by two", mapping::measure(cli.rounds)?, &mut rows);
    }
    if wants(Part::Host) {
        show("The host stage, on this machine", host::measure(cli.rounds)?, &mut rows);
    }
    if wants(Part::Ready) {
        let samples = ready::measure(cli.rounds)?;
        show("The whole job, in the bed", ready::rows(&samples)?, &mut rows);
        if cli.chart {
            println!("Chart: {}", chart::write(&samples)?.display());
        }
    }
    if only.is_none() {
        println!("Figures: {}", project::write_figures("bench.json", &Rows { rows: &rows })?.display());
    }
    judge(&rows)
}

fn show(title: &str, part: Vec<Row>, all: &mut Vec<Row>) {
    println!("{title}\n{}", rows::table(&part));
    all.extend(part);
}

/// What counts, not times, must be: instructions and heap allocations of a chunk, and of checking memslots; the size of the
/// map of private memory.
pub fn check_counts() -> Result<()> {
    let mut rows = chunk::measure()?;
    rows.extend(memslots::count()?);
    rows.extend(visibility::count()?);
    judge(&rows)
}

/// The result of the whole: an error for what repeats exactly and is not as it must be.
fn judge(rows: &[Row]) -> Result<()> {
    let missed: Vec<&Row> = rows.iter().filter(|row| row.is_missed()).collect();
    let (exact, timed): (Vec<&Row>, Vec<&Row>) = missed.iter().partition(|row| row.is_exact());
    let names = |rows: &[&Row]| rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>().join(", ");
    if !timed.is_empty() {
        println!("bars missed by times, which need a quiet machine: {}", names(&timed));
    }
    ensure!(exact.is_empty(), "bars missed: {}", names(&exact));
    Ok(())
}
