//! Builds the kernel with `KVM_SW_PROTECTED_VM`, which no distribution ships.
//!
//! Source and configuration are both given: the distribution's linux-source package of the newest suite, and
//! `tinyconfig` with the options of `private-kernel.config`. A kernel in which one of those options did not
//! take is refused, since it would quietly test something else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::apt::Apt;
use super::kernel::{NEWEST_SUITES, store, upstream_version};
use super::{process, progress};

/// The options on top of `tinyconfig`.
pub const CONFIG: &str = include_str!("private-kernel.config");

const PACKAGES: [&str; 8] = ["bc", "bison", "flex", "gcc", "libc6-dev", "libelf-dev", "make", "xz-utils"];

/// Builds the kernel and lays it out in `into`. Lets go of `apt` as soon as the source is there: others may
/// want it.
pub fn build(apt: Apt<'_>, into: &Path) -> Result<()> {
    crate::setup::require_packages(&PACKAGES)?;
    let work = tempfile::tempdir_in(into)?;
    let (tree, version) = source(&apt, work.path())?;
    drop(apt);
    configure(&tree)?;
    let _step = progress::step(&format!("building the private kernel {version} (some minutes, once)"));
    let jobs = std::thread::available_parallelism().map_or(1, |count| count.get());
    process::capture(make(&tree).arg(format!("-j{jobs}")).arg("bzImage"))?.or_fail()?;
    store(into, &tree.join("arch/x86/boot/bzImage"), &version, &[])
}

/// Unpacks the newest source there is. Answers with its directory and version.
fn source(apt: &Apt<'_>, work: &Path) -> Result<(PathBuf, String)> {
    let _step = progress::step("fetching the private kernel's source");
    let names = apt.names(NEWEST_SUITES, "^linux-source-[0-9.]+$")?;
    let Some(package) = newest_source(&names) else {
        return Err(apt.unavailable("no linux-source package in the newest suites").into());
    };
    let versions = apt.unpack(NEWEST_SUITES, std::slice::from_ref(&package), work)?;
    let version = upstream_version(versions.first().map_or("", String::as_str)).to_string();
    let archive = work.join("usr/src").join(format!("{package}.tar.xz"));
    let tree = work.join("tree");
    fs::create_dir(&tree)?;
    let mut tar = Command::new("tar");
    tar.arg("--extract")
        .arg("--strip-components=1")
        .arg("--file")
        .arg(&archive)
        .arg("--directory")
        .arg(&tree);
    process::capture(&mut tar)?.or_fail()?;
    Ok((tree, version))
}

fn newest_source(names: &[String]) -> Option<String> {
    let version = |name: &&String| -> Vec<u64> {
        let digits = name.trim_start_matches("linux-source-").split('.');
        digits.filter_map(|part| part.parse().ok()).collect()
    };
    names.iter().max_by_key(version).cloned()
}

fn configure(tree: &Path) -> Result<()> {
    process::capture(make(tree).arg("tinyconfig"))?.or_fail()?;
    let path = tree.join(".config");
    let tiny = fs::read_to_string(&path)?;
    // Later lines win, and olddefconfig drops the earlier ones.
    fs::write(&path, format!("{tiny}\n{CONFIG}"))?;
    process::capture(make(tree).arg("olddefconfig"))?.or_fail()?;
    let configured = fs::read_to_string(&path)?;
    let lost = missing_options(CONFIG, &configured);
    if !lost.is_empty() {
        bail!("the kernel's configuration refuses {}; see private-kernel.config", lost.join(" "));
    }
    Ok(())
}

/// Options of `wanted` that `configured` does not have.
fn missing_options(wanted: &str, configured: &str) -> Vec<String> {
    let set: Vec<&str> = configured.lines().map(str::trim).collect();
    let wanted = wanted.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    wanted.filter(|line| !set.contains(line)).map(str::to_string).collect()
}

/// A make that leaves the machine usable meanwhile.
fn make(tree: &Path) -> Command {
    let mut command = Command::new("nice");
    command.arg("make").arg("--silent").arg("--directory").arg(tree).env("LC_ALL", "C");
    // The variables of an outer make, or of a cargo run by one, are about another build.
    command.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("CARGO_MAKEFLAGS");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_source_is_chosen_by_number() {
        let names = ["linux-source-7.3", "linux-source-7.10", "linux-source-6.12"].map(str::to_string);
        assert_eq!(newest_source(&names).as_deref(), Some("linux-source-7.10"));
        assert_eq!(newest_source(&[]), None);
    }

    #[test]
    fn an_option_that_did_not_take_is_found() {
        let configured = "CONFIG_KVM=y\n# CONFIG_KVM_AMD is not set\n";
        let missing = missing_options("# comment\nCONFIG_KVM=y\nCONFIG_KVM_AMD=y\n\n", configured);
        assert_eq!(missing, ["CONFIG_KVM_AMD=y"]);
    }

    #[test]
    fn the_configuration_asks_for_what_it_is_for() {
        assert!(CONFIG.lines().any(|line| line == "CONFIG_KVM_SW_PROTECTED_VM=y"));
    }
}
