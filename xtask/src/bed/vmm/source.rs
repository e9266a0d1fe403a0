//! Has the source of Debian's QEMU, and a meson that can build it.
//!
//! Both are unpacked from the mirror's packages, so that nothing comes from anywhere else and no QEMU code is kept in
//! the project. Debian 12's own meson is too old; the one of the QEMU's release runs with any Python 3. The source is
//! Debian's, with all of Debian's patches: it must never be changed here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::super::apt::Apt;
use super::super::cache::Cache;
use super::super::{Unavailable, process, progress};

/// Where a QEMU 10 is looked for: Debian 13, else Debian 12's backports of it.
const SUITE_SETS: [&[&str]; 2] = [&["trixie"], &["bookworm-backports"]];

/// The versions that the patches are for.
const MAJOR: &str = "10.";

const ENTRY: &str = "vmm-source";
/// Changes whenever an entry is laid out differently.
const RECIPE: &str = "source package of QEMU 10, and meson, layout 1";

/// The source, packed.
pub struct Source {
    dir: PathBuf,
    /// The version of the source package.
    pub version: String,
}

impl Source {
    /// The one in the cache, fetched first when there is none.
    pub fn obtain<'a>(cache: &Cache, apt: impl FnOnce() -> Result<Apt<'a>>) -> Result<Self> {
        let dir = cache.get_or_make(ENTRY, RECIPE, |into| fetch(&apt()?, into))?;
        let version = fs::read_to_string(dir.join("version"))?;
        Ok(Source { dir, version })
    }

    /// Unpacks it, with Debian's patches applied, as `into`.
    pub fn unpack(&self, into: &Path) -> Result<()> {
        crate::setup::require_packages(&["dpkg-dev"])?;
        let files = fs::read_dir(self.dir.join("package"))?.flatten().map(|entry| entry.path());
        let description = files.into_iter().find(|path| path.extension().is_some_and(|name| name == "dsc"));
        let mut unpack = Command::new("dpkg-source");
        // apt has verified it; the keys of those who uploaded it are not on every machine.
        unpack.args(["--no-check", "--extract"]).arg(description.context("the source has no description")?);
        process::capture(unpack.arg(into))?.or_fail().map(drop)
    }

    /// What `PYTHONPATH` must say for meson to be found.
    pub fn python_path(&self) -> PathBuf {
        self.dir.join("meson")
    }
}

fn fetch(apt: &Apt<'_>, into: &Path) -> Result<()> {
    let _step = progress::step("fetching QEMU's source");
    let mut missing = None;
    for suites in SUITE_SETS {
        match fetch_from(apt, suites, into) {
            Ok(()) => return Ok(()),
            Err(error) if error.is::<Unavailable>() => missing = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(missing.unwrap_or_else(|| Unavailable("no suite has QEMU's source".into()).into()))
}

fn fetch_from(apt: &Apt<'_>, suites: &[&str], into: &Path) -> Result<()> {
    let package = tempfile::tempdir_in(into)?;
    let version = apt.source(suites, "qemu", package.path())?;
    if !is_supported(&version) {
        let what = format!("{} has QEMU {version}; the patches are for {MAJOR}x", suites.join(" "));
        return Err(Unavailable(what).into());
    }
    let meson = tempfile::tempdir_in(into)?;
    apt.unpack(suites, &["meson".to_string()], meson.path())?;
    fs::rename(meson.path().join("usr/lib/python3/dist-packages"), into.join("meson"))
        .context("the package of meson holds no Python module")?;
    fs::rename(package.keep(), into.join("package"))?;
    Ok(fs::write(into.join("version"), version)?)
}

/// Whether the package version `1:10.0.13+ds-0+deb13u1` is of a QEMU that the patches are for.
fn is_supported(version: &str) -> bool {
    version.split_once(':').map_or(version, |(_, rest)| rest).starts_with(MAJOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_versions_that_the_patches_are_for_are_taken() {
        assert!(is_supported("1:10.0.13+ds-0+deb13u1") && is_supported("10.2.2"));
        assert!(!is_supported("1:7.2+dfsg-7") && !is_supported("1:100.1"));
    }
}
