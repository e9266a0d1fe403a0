//! The C interface: the header that is made of the sources, the symbols that are exported, the record of both, and
//! programs that were built with what was recorded earlier.
//!
//! Whatever of the interface may not change without being noticed is judged below this file, and nothing else.

mod agreement;
mod callers;
mod header;
pub mod promise;
mod record;
mod symbols;
pub mod text;
mod usable;
mod view;

use crate::bed::Bed;
use crate::lanes::{self, Lane};
use crate::programs::Programs;
use crate::setup;
use anyhow::{Context, Result};
use std::time::Instant;

pub use callers::{NAME as CALLERS, build as build_callers};
pub use header::path as header_path;
pub use symbols::{check as check_symbols, check_soname};

/// What programs linked against the library ask for. Another one means that they all must be linked anew; build.rs and
/// CMakeLists.txt give it to the library.
pub const SONAME: &str = "libkvmprep.so.0";

const PACKAGES: &[&str] = &["abigail-tools", "binutils", "gcc", "libc6-dev"];

#[derive(clap::Args)]
pub struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Write include/kvmprep.h anew.
    Header,
    /// Fail when the header is not current, not what the library exports, or not what is recorded.
    Check,
    /// Record the interface as that of the library's version; refused when it would break programs.
    Record,
}

pub fn main(cli: Cli) -> Result<()> {
    match cli.action {
        Action::Header => {
            std::fs::write(header_path(), header::generate()?).context("cannot write the header")
        }
        Action::Check => {
            setup::require_packages(usable::PACKAGES)?;
            let started = Instant::now();
            let mut lane = Lane::new("abi");
            check(&mut lane, &Programs::prepare()?, &Bed::open()?);
            lanes::conclude("abi.json", started, &[lane])
        }
        Action::Record => {
            setup::require_packages(PACKAGES)?;
            record::record()
        }
    }
}

/// Adds every check of the interface to the lane.
pub fn check(lane: &mut Lane, built: &Programs, bed: &Bed) {
    lane.check("the header is current", header::check());
    lane.check("the library exports what the header declares", symbols::check(&built.library()));
    lane.check("the library has its soname", symbols::check_soname(&built.library()));
    let tools = setup::require_packages(PACKAGES);
    lane.check("the interface is the recorded one", tools.and_then(|()| record::check()));
    lane.check("the library's types are the header's", agreement::check());
    usable::check(lane, bed);
}
