//! kvmprep's own commands.

mod abi;
mod bed;
mod project;
mod setup;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Boot real Linux kernels with real KVM under emulation.
    Bed(bed::Cli),
    /// The C interface: write the header, or check that it is current.
    Abi(abi::Cli),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Bed(cli) => bed::main(cli),
        Command::Abi(cli) => abi::main(cli),
    }
}
