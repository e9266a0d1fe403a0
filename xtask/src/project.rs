//! Where things are in the project, and how a tool is run on it.
//!
//! Every other file asks here; no path is made twice.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The project's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Where cargo builds.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Where the project's commands leave what they make, figures among it.
pub fn output() -> Result<PathBuf> {
    let directory = target().join("kvmprep");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// Writes a file of figures.
pub fn write_figures(name: &str, figures: &impl serde::Serialize) -> Result<PathBuf> {
    let path = output()?.join(name);
    let text = serde_json::to_string_pretty(figures)? + "\n";
    std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The library's version, as cargo knows it.
pub fn version() -> Result<String> {
    let id = run(cargo().args(["pkgid", "--package", "kvmprep"]))?;
    let version = id.trim().rsplit(['#', '@']).next().context("cargo pkgid says nothing")?;
    Ok(version.to_owned())
}

/// Runs a tool; its failure is an error that shows what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{command:?}: {}\n{said}{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(said)
}

/// Cargo, as it was started.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // Property tests choose the same each time: whether a change is right must not depend on what they come upon. Without
    // the project's commands, `cargo test` chooses anew.
    command.env("PROPTEST_RNG_SEED", "1");
    command
}
