//! Has a QEMU that emulates nested paging rightly, and a static busybox for the guests.
//!
//! Versions before 10.0 show a nested guest stale translations, and Debian 12's own is older. So one is
//! unpacked, with every library it needs and its own loader, and runs beside whatever the machine has. It
//! must never be installed, and never run with the machine's libraries.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::cache::Cache;
use super::{Unavailable, process, progress};

/// Where a QEMU of at least 10.0 is looked for: within one release, so that libraries fit. The last suite of
/// each set is the one the package is to come from.
const SUITE_SETS: [&[&str]; 2] = [&["trixie"], &["bookworm", "bookworm-backports"]];

const ENTRY: &str = "qemu";
/// Changes whenever an entry is laid out differently.
const RECIPE: &str = "qemu and busybox, flat, layout 1";

const FIRMWARE: [&str; 6] =
    ["kvmvapic.bin", "linuxboot.bin", "linuxboot_dma.bin", "multiboot.bin", "multiboot_dma.bin", "pvh.bin"];

/// An unpacked QEMU.
pub struct Qemu {
    dir: PathBuf,
}

impl Qemu {
    /// The one in the cache, fetched first when there is none.
    pub fn obtain<'a>(cache: &Cache, apt: impl FnOnce() -> Result<Apt<'a>>) -> Result<Self> {
        let dir = cache.get_or_make(ENTRY, RECIPE, |into| fetch(&apt()?, into))?;
        Ok(Qemu { dir })
    }

    /// The one in the cache, if any.
    pub fn cached(cache: &Cache) -> Result<Option<Self>> {
        Ok(cache.get(ENTRY, RECIPE)?.map(|dir| Qemu { dir }))
    }

    /// Its directory in the cache.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The ROMs of the x86 machines that need no display and no network.
    pub fn firmware(&self) -> PathBuf {
        self.dir.join("firmware")
    }

    /// The static busybox.
    pub fn busybox(&self) -> PathBuf {
        self.dir.join("busybox")
    }

    /// Its version, as it says itself.
    pub fn version(&self) -> Result<String> {
        let said = process::capture(self.command().arg("--version"))?.or_fail()?.stdout;
        let version = said.split_whitespace().skip_while(|word| *word != "version").nth(1);
        Ok(version.context("QEMU does not say its version")?.to_string())
    }

    /// A command that runs it; arguments are the caller's.
    pub fn command(&self) -> Command {
        self.command_with_loader(&[])
    }

    /// The same, with a shared library before its own: of this machine's make, so its C library must not be newer than QEMU's.
    pub fn command_preloading(&self, library: &Path) -> Command {
        self.command_with_loader(&["--preload".as_ref(), library.as_os_str()])
    }

    fn command_with_loader(&self, options: &[&OsStr]) -> Command {
        // Should we be killed before we can end it, it goes as well: a hanging guest would run for ever.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(self.dir.join("lib/ld.so"));
        command.args(options).arg("--library-path").arg(self.dir.join("lib"));
        command.arg(self.dir.join("qemu-system-x86_64"));
        command.arg("-L").arg(self.firmware());
        // Modules of another build must not be found.
        command
            .env("QEMU_MODULE_DIR", self.dir.join("modules"))
            .env_remove("LD_LIBRARY_PATH")
            .env_remove("LD_PRELOAD");
        command
    }
}

fn fetch(apt: &Apt<'_>, into: &Path) -> Result<()> {
    let _step = progress::step("fetching QEMU");
    let mut missing = None;
    for suites in SUITE_SETS {
        let root = tempfile::tempdir_in(into)?;
        let packages = ["qemu-system-x86", "busybox-static"].map(str::to_string);
        match apt.unpack_with_dependencies(suites, &packages, root.path()) {
            Ok(()) => {
                flatten(root.path(), into)?;
                return check(into);
            }
            Err(error) if error.is::<Unavailable>() => missing = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(missing.unwrap_or_else(|| Unavailable("no suite has QEMU".into()).into()))
}

/// Debian's tree holds much that emulating this one machine does not need; takes over the rest.
fn flatten(root: &Path, into: &Path) -> Result<()> {
    let program = root.join("usr/bin/qemu-system-x86_64");
    let library_path = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|dir| root.join(dir));
    let loader = first_of(root, &["usr/lib64/ld-linux-x86-64.so.2", "lib64/ld-linux-x86-64.so.2"])
        .or_else(|_| first_of(root, &["lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"]))?;
    let joined = std::env::join_paths(&library_path)?;
    let listing = process::capture(
        Command::new(&loader).arg("--library-path").arg(joined).arg("--list").arg(&program),
    )?;
    for dir in ["lib", "firmware", "modules"] {
        fs::create_dir(into.join(dir))?;
    }
    for library in super::guest::parse_ldd(&listing.or_fail()?.stdout)? {
        // Whatever name the loader found it by; the loader itself is listed too.
        copy(&library.path, &into.join("lib").join(&library.name))?;
    }
    copy(&loader, &into.join("lib/ld.so"))?;
    copy(&program, &into.join("qemu-system-x86_64"))?;
    copy(&first_of(root, &["usr/bin/busybox", "bin/busybox"])?, &into.join("busybox"))?;
    for name in FIRMWARE {
        copy(&root.join("usr/share/qemu").join(name), &into.join("firmware").join(name))?;
    }
    for name in ["bios-256k.bin", "bios-microvm.bin"] {
        copy(&root.join("usr/share/seabios").join(name), &into.join("firmware").join(name))?;
    }
    Ok(())
}

fn first_of(root: &Path, names: &[&str]) -> Result<PathBuf> {
    let found = names.iter().map(|name| root.join(name)).find(|path| path.exists());
    found.with_context(|| format!("the packages do not hold {}", names.join(" or ")))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("the packages do not hold {}", from.display()))
}

/// An entry enters the cache only when it starts and is new enough.
fn check(dir: &Path) -> Result<()> {
    let version = Qemu { dir: dir.to_path_buf() }.version()?;
    let major: u32 = version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if major < 10 {
        bail!("the packages hold QEMU {version}; the bed needs 10.0 or newer");
    }
    Ok(())
}
