//! Compares the kernel that it runs on with the model; with `--repeat` the kernel with itself, which shows what of it is
//! not the same twice.
//!
//! Nothing is judged here but whether there was a difference.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use kvmprep_model_diff::campaign::{self, Plan};
use kvmprep_model_diff::real::RealKvm;
use kvmprep_model_diff::simulated::Simulated;

/// A twentieth of what a whole run does.
const USUAL_OPERATIONS: u64 = 50_000;

#[derive(Parser)]
struct Arguments {
    /// From which all random choices follow.
    #[arg(long, env = "KVMPREP_DIFF_SEED", default_value_t = 1)]
    seed: u64,
    /// How many operations to do; 50000 times the scale of the tests when it is not said.
    #[arg(long, env = "KVMPREP_DIFF_OPERATIONS")]
    operations: Option<u64>,
    /// The scale of the tests. More than 20, which make a million operations, is taken for 20.
    #[arg(long, env = "KVMPREP_TEST_SCALE", default_value_t = 1)]
    scale: u64,
    /// How many operations a program has. To make and unmake a virtual machine takes as long as some fifty.
    #[arg(long, env = "KVMPREP_DIFF_LENGTH", default_value_t = 200)]
    length: usize,
    /// Begins with this program of the seed.
    #[arg(long, env = "KVMPREP_DIFF_PROGRAM", default_value_t = 0)]
    program: u64,
    /// Ends when there are differences of more kinds than this.
    #[arg(long, env = "KVMPREP_DIFF_KINDS", default_value_t = 10)]
    kinds: usize,
    /// Compares the kernel with itself.
    #[arg(long)]
    repeat: bool,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let kvm = RealKvm::open()?;
    let plan = Plan {
        seed: arguments.seed,
        operations: arguments.operations.unwrap_or(USUAL_OPERATIONS * arguments.scale.min(20)),
        length: arguments.length,
        skip: arguments.program,
        most_shown: arguments.kinds,
    };
    let abilities = kvm.abilities()?;
    let report = match arguments.repeat {
        true => campaign::run(&plan, &abilities, &kvm, &kvm)?,
        false => campaign::run(&plan, &abilities, &kvm, &Simulated::of_this_kernel(&abilities)?)?,
    };
    report.print();
    println!("diff: seed {} operations {} mismatches {}", plan.seed, report.operations, report.mismatches);
    // As a C test ends, for whoever counts those.
    let failed = u8::from(report.mismatches > 0);
    println!("{} the model and the kernel do the same", if failed == 0 { "ok" } else { "FAILED" });
    println!("cases: {} passed, {failed} failed, 0 skipped", 1 - failed);
    Ok(ExitCode::from(failed))
}
