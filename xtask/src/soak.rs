//! `cargo xtask soak`: the C tests of `cargo xtask test` with many times the rounds, for hours if one likes.
//!
//! Nothing here is different from the tests but the number of rounds, which each reads from its environment, and for how
//! long the C interface is fuzzed; and that the comparison of the model with kernels must find what is wrong with it on
//! purpose. At the default scale `hostile_guest` has ten minutes, as the fuzzer has, `conversions` makes 250,000
//! conversions, and the model is looked at after ten million steps of each type of virtual machine.

use crate::bed::{self, Bed};
use crate::fuzz;
use crate::invariants;
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
    /// Only the model's invariants.
    #[arg(long, conflicts_with_all = ["programs", "kernels"])]
    invariants: bool,
}

pub fn main(cli: Cli) -> Result<()> {
    let started = Instant::now();
    if cli.invariants {
        return lanes::conclude("soak.json", started, &[invariants::lane(cli.scale)]);
    }
    let tests = Tests::build(&cli.programs)?;
    let bed = Bed::open()?;
    let mut lanes = Vec::new();
    for (name, backings) in crate::test::KERNELS {
        if cli.kernels.is_empty() || cli.kernels.iter().any(|kernel| kernel == name) {
            lanes.push(kernel_lane(&bed, name, backings, &tests, cli.scale)?);
        }
    }
    if cli.kernels.is_empty() && cli.programs.is_empty() {
        lanes.push(bed::mistakes_lane(&bed, None)?);
        lanes.push(bed::qemu_lane(&bed)?);
        lanes.push(fuzz::lane(FUZZING_SECONDS * u64::from(cli.scale)));
        lanes.push(invariants::lane(cli.scale));
    }
    lanes::conclude("soak.json", started, &lanes)
}
