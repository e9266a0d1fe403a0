//! The program that keeps VMs in every guest, for the sake of the emulator; `keeper.c` says why.
//!
//! It is linked statically, since a guest may have nothing else. It must never be what a program's result depends on,
//! but for the emulated machine's staying whole.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::cache::Cache;
use super::process;

/// Its source, by which a cached one is known to be current.
const SOURCE: &str = include_str!("keeper.c");

const ENTRY: &str = "keeper";

/// The program, built when it is not in the cache.
pub fn obtain(cache: &Cache) -> Result<PathBuf> {
    let dir = cache.get_or_make(ENTRY, SOURCE, |into| {
        crate::setup::require_packages(&["gcc", "libc6-dev", "linux-libc-dev"])?;
        std::fs::write(into.join("keeper.c"), SOURCE)?;
        let mut gcc = Command::new("gcc");
        gcc.args(["-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "keeper.c", "-o", ENTRY]);
        process::capture(gcc.current_dir(into))?.or_fail().context("the keeper of VMs").map(drop)
    })?;
    Ok(dir.join(ENTRY))
}
