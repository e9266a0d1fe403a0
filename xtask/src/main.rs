//! kvmprep's own commands.

mod abi;
mod bed;
mod bench;
mod demo;
mod failing_calls;
mod fuzz;
mod install;
mod invariants;
mod lanes;
mod launches;
mod man;
mod model;
mod msrv;
mod programs;
mod project;
mod quick;
mod setup;
mod soak;
mod stock_qemu;
mod tables;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the main job: a real guest, every backing, four ways, the faults that are left.
    Demo(demo::Cli),
    /// Everything that judges a change.
    Test(test::Cli),
    /// The tests' full-size runs.
    Soak(soak::Cli),
    /// Call the C interface with what libFuzzer makes up, under AddressSanitizer.
    Fuzz(fuzz::Cli),
    /// Measure the library against what people do without it.
    Bench(bench::Cli),
    /// Boot real Linux kernels with real KVM under emulation.
    Bed(bed::Cli),
    /// Build the library and install it, as CMake does.
    Install(install::Cli),
    /// The C interface: write the header, or check that it is current.
    Abi(abi::Cli),
    /// Hold the man pages against the header.
    Man,
    /// Show the software model of KVM at work.
    Model(model::Cli),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(cli) => demo::main(cli),
        Command::Test(cli) => test::main(cli),
        Command::Soak(cli) => soak::main(cli),
        Command::Fuzz(cli) => fuzz::main(cli),
        Command::Bench(cli) => bench::main(cli),
        Command::Bed(cli) => bed::main(cli),
        Command::Install(cli) => install::main(cli),
        Command::Abi(cli) => abi::main(cli),
        Command::Man => man::main(),
        Command::Model(cli) => model::main(cli),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // For people: what went wrong and why, without a stack that tells them nothing.
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
