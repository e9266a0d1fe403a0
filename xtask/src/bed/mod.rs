//! The test bed: boots real Linux kernels under emulation, with real KVM inside, and runs a program there.
//!
//! It needs no hardware virtualisation and no preparation: QEMU and kernels come from the machine's own
//! package mirror into the user's cache. It must never change the machine, beyond installing host tools that
//! are missing, and never report success for what did not run.
//!
//! ```ignore
//! let bed = Bed::open()?;
//! let kernel = bed.resolve(&Kernel::named("6.12")?)?;
//! let mut guest = Guest::new(["/program", "argument"]);
//! guest.add(Path::new("target/program"), "/program", &[Path::new("target/debug")])?;
//! let outcome = bed::run(&bed, &kernel, &guest, &mut |line| println!("{line}"))?;
//! ```

mod apt;
mod boot;
mod cache;
mod cli;
mod diff;
mod guest;
mod headers;
mod initramfs;
mod keeper;
mod kernel;
mod kernel_log;
mod mirror;
mod mistakes;
mod modules;
mod private;
mod process;
mod progress;
mod qemu;
mod rust;
mod stream;
mod vmm;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::Result;

pub use boot::Outcome;
pub use cli::{Cli, main};
pub use diff::seed_of_the_day;
pub use guest::Guest;
pub use headers::KernelHeaders;
pub use kernel::{Kernel, ResolvedKernel};
pub use mistakes::lane as mistakes_lane;
pub use rust::Rust;
pub use vmm::lane as qemu_lane;

use apt::Apt;
use cache::Cache;
use mirror::Mirror;
use qemu::Qemu;

/// The bed: its cache, and what it has taken from there so far.
pub struct Bed {
    cache: Cache,
    qemu: OnceLock<Qemu>,
    keeper: OnceLock<PathBuf>,
    updated: apt::Updated,
}

/// Something that cannot be had on this machine; a fact about its surroundings, not a failure.
#[derive(Debug, Clone)]
pub struct Unavailable(String);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unavailable {}

/// Why a kernel, or whatever else was asked for, is not ready.
#[derive(Debug)]
pub enum ResolveError {
    /// It cannot be had here, and why: what needs it is to be skipped.
    Unavailable(String),
    /// It can be had, but getting it failed.
    Failed(anyhow::Error),
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ResolveError::Unavailable(reason) => f.write_str(reason),
            ResolveError::Failed(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for ResolveError {}

impl From<anyhow::Error> for ResolveError {
    fn from(error: anyhow::Error) -> Self {
        match error.is::<Unavailable>() {
            true => ResolveError::Unavailable(format!("{error:#}")),
            false => ResolveError::Failed(error),
        }
    }
}

impl Bed {
    /// The bed of the user who runs this. Fetches nothing yet.
    pub fn open() -> Result<Self> {
        Ok(Bed {
            cache: Cache::open()?,
            qemu: OnceLock::new(),
            keeper: OnceLock::new(),
            updated: OnceLock::new(),
        })
    }

    /// Makes `kernel`, and the QEMU to boot it with, ready: from the cache, or else fetched or built.
    pub fn resolve(&self, kernel: &Kernel) -> Result<ResolvedKernel, ResolveError> {
        let apt = || self.apt();
        Ok(kernel::obtain(kernel, &self.cache, self.qemu()?, apt)?)
    }

    /// Makes the oldest Rust that the project claims to build with ready, likewise.
    pub fn rust(&self) -> Result<Rust, ResolveError> {
        Ok(Rust::obtain(&self.cache, || self.apt())?)
    }

    /// Makes a kernel's C headers ready, likewise; `name` is one of [`KernelHeaders::NAMES`].
    pub fn kernel_headers(&self, name: &str) -> Result<KernelHeaders, ResolveError> {
        Ok(KernelHeaders::obtain(name, &self.cache, || self.apt())?)
    }

    /// The distribution's QEMU as it runs the bed, unchanged, with `library` preloaded; fetched likewise.
    pub fn qemu_preloading(&self, library: &Path) -> Result<Command, ResolveError> {
        Ok(self.qemu()?.command_preloading(library))
    }

    fn qemu(&self) -> Result<&Qemu> {
        if self.qemu.get().is_none() {
            let qemu = Qemu::obtain(&self.cache, || self.apt())?;
            let _ = self.qemu.set(qemu);
        }
        self.qemu.get().ok_or_else(|| anyhow::anyhow!("there is no QEMU"))
    }

    fn keeper(&self) -> Result<&Path> {
        if self.keeper.get().is_none() {
            let _ = self.keeper.set(keeper::obtain(&self.cache)?);
        }
        self.keeper.get().map(PathBuf::as_path).ok_or_else(|| anyhow::anyhow!("there is no keeper of VMs"))
    }

    fn apt(&self) -> Result<Apt<'_>> {
        Apt::new(&self.cache, Mirror::configured(Path::new("/etc"))?, &self.updated)
    }
}

/// Boots `guest` on `kernel`, hands the lines of its output to `on_line` as they come, and answers how it
/// ended. An exit status other than 0 is an answer too. Several guests may run at once, each from a thread of
/// its own.
pub fn run(
    bed: &Bed,
    kernel: &ResolvedKernel,
    guest: &Guest,
    on_line: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    boot::run(bed.qemu()?, bed.keeper()?, kernel, guest, on_line)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn what_cannot_be_had_is_told_apart_from_failure() {
        let missing: Result<()> = Err(Unavailable("no such package".into())).context("in this suite");
        assert!(matches!(ResolveError::from(missing.unwrap_err()), ResolveError::Unavailable(reason)
            if reason == "in this suite: no such package"));
        assert!(matches!(ResolveError::from(anyhow::anyhow!("broken")), ResolveError::Failed(_)));
    }
}
