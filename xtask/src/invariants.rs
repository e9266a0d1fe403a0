//! The model's twenty invariants over many millions of steps: what `cargo test` does with a few thousand.
//!
//! The test itself says what it does; here it is only built to be fast, with each check that Rust can make, and given more
//! steps and a seed of its own.

use crate::bed;
use crate::lanes::{Lane, cargo_counts};
use crate::project;
use anyhow::{Context, Result};

/// At a scale of 1, of each type of virtual machine: ten millions at the default scale.
const STEPS: u64 = 200_000;

const TEST: &[&str] = &["test", "--package", "kvmprep-model", "--profile", "fuzz", "--test", "invariants"];

/// So many times the steps; prints what each type of virtual machine went through.
pub fn lane(scale: u32) -> Lane {
    let mut lane = Lane::new("model");
    let steps = STEPS * u64::from(scale);
    let seed = bed::seed_of_the_day();
    println!("{steps} steps of each type, after each all invariants; KVMPREP_MODEL_SEED={seed}");
    match run(steps, seed) {
        Ok((text, is_well)) => {
            print!("{text}");
            let mut counts = cargo_counts(&text);
            counts.failed = counts.failed.max(u64::from(!is_well));
            lane.add("invariants", counts, "");
        }
        Err(error) => lane.check("invariants", Err(error)),
    }
    lane
}

fn run(steps: u64, seed: u64) -> Result<(String, bool)> {
    let mut cargo = project::cargo();
    // Tests beside each other would print into each other's lines.
    cargo.args(TEST).args(["--", "--show-output"]);
    cargo.env("KVMPREP_MODEL_STEPS", steps.to_string());
    cargo.env("KVMPREP_MODEL_SEED", seed.to_string());
    let output = cargo.output().context("cannot start cargo")?;
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((text, output.status.success()))
}
