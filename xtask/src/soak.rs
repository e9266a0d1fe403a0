//! `cargo xtask soak`: the C tests of `cargo xtask test` with many times the rounds, for hours if one likes.
//!
//! Nothing here is different from the tests but the number of rounds, which each reads from its environment, and for how
//! long the C interface is fuzzed.

use crate::bed::{self, Bed};
use crate::fuzz;
use crate::lanes;
use crate::test::{Tests, kernel_lane};
use anyhow::Result;
use std::time::Instant;

/// At a scale of 1: ten minutes at the default scale.
const FUZZING_SECONDS: u64 = 12;

#[derive(clap::Args)]
pub struct Cli {
    /// How many times the rounds of `cargo xtask test`.
    #[arg(long, default_value_t = 50)]
    scale: u32,
    /// Only these C tests.
    #[arg(long = "program", value_name = "NAME")]
    programs: Vec<String>,
    /// Only these kernels.
    #[arg(long = "kernel", value_name = "KERNEL")]
    kernels: Vec<String>,
}

pub fn main(cli: Cli) -> Result<()> {
    let started = Instant::now();
    let tests = Tests::build(&cli.programs)?;
    let bed = Bed::open()?;
    let mut lanes = Vec::new();
    for (name, backings) in crate::test::KERNELS {
        if cli.kernels.is_empty() || cli.kernels.iter().any(|kernel| kernel == name) {
            lanes.push(kernel_lane(&bed, name, backings, &tests, cli.scale)?);
        }
    }
    if cli.kernels.is_empty() && cli.programs.is_empty() {
        lanes.push(bed::qemu_lane(&bed)?);
        lanes.push(fuzz::lane(FUZZING_SECONDS * u64::from(cli.scale)));
    }
    lanes::conclude("soak.json", started, &lanes)
}
