//! `cargo xtask install`: the library as it is shipped, built and installed.
//!
//! CMake knows how, here it is only driven, so that there is one way and no second. Whatever of ours needs the library
//! gets it by this way too: what is tested is what is installed.

mod consumers;
mod lane;
mod model;
mod packaged;
mod tree;

pub use lane::lane;

use crate::project;
use crate::setup;
use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
pub struct Cli {
    /// Where the library is to be used.
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// Put everything beneath this directory instead of the root: for packages.
    #[arg(long, value_name = "DIRECTORY")]
    destdir: Option<PathBuf>,
    /// The directory for libraries, beneath the prefix or absolute, where the distribution's own is not wanted.
    #[arg(long, value_name = "DIRECTORY")]
    libdir: Option<PathBuf>,
    /// Install libkvmprep-model.so too, the software KVM that test suites preload (x86-64).
    #[arg(long)]
    model: bool,
}

pub fn main(cli: Cli) -> Result<()> {
    let said = build_and_install(&cli)?;
    print!("{said}");
    Ok(())
}

/// Builds what is not built yet and installs the library alone; returns what CMake said of that.
pub fn install(prefix: &Path, destdir: Option<&Path>, libdir: Option<&Path>) -> Result<String> {
    let owned = |path: Option<&Path>| path.map(Path::to_owned);
    let (destdir, libdir) = (owned(destdir), owned(libdir));
    build_and_install(&Cli { prefix: prefix.to_owned(), destdir, libdir, model: false })
}

fn build_and_install(cli: &Cli) -> Result<String> {
    setup::require_packages(&["binutils", "cmake", "gcc", "libc6-dev", "make"])?;
    let build = project::output()?.join("build");
    // Each sets the build's directories to its own.
    let _alone = lock(&build.with_extension("lock"))?;
    configure(&build, cli)?;
    project::run(Command::new("cmake").arg("--build").arg(&build)).context("the library does not build")?;
    let mut install = Command::new("cmake");
    install.arg("--install").arg(&build).env_remove("DESTDIR");
    if let Some(destdir) = &cli.destdir {
        install.env("DESTDIR", std::path::absolute(destdir)?);
    }
    project::run(&mut install)
}

fn configure(build: &Path, cli: &Cli) -> Result<()> {
    let mut cmake = Command::new("cmake");
    cmake.arg("-S").arg(project::root()).arg("-B").arg(build).args(["-G", "Unix Makefiles"]);
    // Another installation's directories may be left there.
    cmake.args(["-U", "CMAKE_INSTALL_*"]);
    cmake.arg(define("CMAKE_INSTALL_PREFIX", &std::path::absolute(&cli.prefix)?));
    if let Some(libdir) = &cli.libdir {
        cmake.arg(define("CMAKE_INSTALL_LIBDIR", libdir));
    }
    cmake.arg(define("KVMPREP_CARGO", Path::new(project::cargo().get_program())));
    cmake.arg(format!("-DKVMPREP_MODEL={}", if cli.model { "ON" } else { "OFF" }));
    cmake.arg("-DCMAKE_BUILD_TYPE=Release");
    project::run(&mut cmake).map(drop)
}

/// An option that sets a path in CMake's cache. Untyped: CMake would make a relative one absolute by itself.
pub fn define(name: &str, path: &Path) -> std::ffi::OsString {
    let mut option = std::ffi::OsString::from(format!("-D{name}:STRING="));
    option.push(path);
    option
}

/// Waits for other commands of ours that build; the kernel lets go when the file is closed.
fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    flock(&file, FlockOperation::LockExclusive).with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
