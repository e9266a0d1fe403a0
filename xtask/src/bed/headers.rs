//! Has the kernel's own C headers, as programs of an older and of a newest distribution include them.
//!
//! They are unpacked for compilers to be pointed at. They must never be installed, and are never looked at by any
//! compiler that was not told to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::apt::Apt;
use super::cache::Cache;
use super::{kernel, process, progress};

const PACKAGE: &str = "linux-libc-dev";
/// Changes whenever an entry is laid out differently.
const RECIPE: &str = "linux, asm and asm-generic of linux-libc-dev, layout 1";

/// A kernel's headers for programs.
pub struct KernelHeaders {
    dir: PathBuf,
    version: String,
}

impl KernelHeaders {
    /// What they are asked for by.
    pub const NAMES: [&str; 2] = ["6.1", "newest"];

    /// The ones in the cache, fetched first when there are none.
    pub fn obtain<'a>(name: &str, cache: &Cache, apt: impl FnOnce() -> Result<Apt<'a>>) -> Result<Self> {
        let suites: &[&str] = if name == Self::NAMES[0] { &["bookworm"] } else { kernel::NEWEST_SUITES };
        let dir = cache
            .get_or_make(&format!("headers-{name}"), RECIPE, |into| fetch(name, suites, &apt()?, into))?;
        let version = fs::read_to_string(dir.join("version"))?;
        Ok(KernelHeaders { dir: dir.join("include"), version })
    }

    /// The directory to point a compiler at.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kernel's version.
    pub fn version(&self) -> &str {
        &self.version
    }
}

fn fetch(name: &str, suites: &[&str], apt: &Apt<'_>, into: &Path) -> Result<()> {
    let _step = progress::step(&format!("fetching kernel headers {name}"));
    let root = tempfile::tempdir_in(into)?;
    let versions = apt.unpack(suites, &[PACKAGE.to_string()], root.path())?;
    let (include, from) = (into.join("include"), root.path().join("usr/include"));
    fs::create_dir(&include)?;
    // Debian 12 has asm apart, for each architecture; later ones lead there by links.
    let parts = ["linux", "asm-generic", "x86_64-linux-gnu/asm"].map(|part| from.join(part));
    process::capture(Command::new("cp").arg("-rL").args(parts).arg(&include))?
        .or_fail()
        .with_context(|| format!("{PACKAGE} does not hold the headers"))?;
    let version = kernel::upstream_version(versions.first().map_or("", String::as_str));
    Ok(fs::write(into.join("version"), version)?)
}
