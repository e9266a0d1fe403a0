//! Builds the QEMU that the library is tried in: as Debian has it, with the patches of `contrib/qemu`, and with one patch
//! more that is for tests alone.
//!
//! All come from one source tree and are built with the same options, so that what differs between them is the
//! patches. The trees stay in the cache, so that an edit of the patches compiles what it touches and no more. They must
//! never be taken for each other: the plain one is built before any patch is applied.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::super::cache::Cache;
use super::super::{process, progress};
use super::series;
use super::source::Source;
use crate::install;
use crate::project;

/// What QEMU's build needs beyond what the library's does.
const PACKAGES: [&str; 11] = [
    "bash",
    "ccache",
    "dpkg-dev",
    "gcc",
    "libc6-dev",
    "libfdt-dev",
    "libglib2.0-dev",
    "ninja-build",
    "patch",
    "pkg-config",
    "python3-venv",
];

/// x86-64 with KVM and what its machines consist of. Nothing is fetched, and ROMs come from packages.
const OPTIONS: [&str; 13] = [
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-system",
    "--enable-kvm",
    "--disable-tcg",
    "--enable-pie",
    "--enable-fdt=system",
    "--disable-docs",
    "--disable-download",
    "--disable-install-blobs",
    "--disable-debug-info",
    // The one of the distribution, whatever else is in the user's path.
    "--python=/usr/bin/python3",
    // Most of what the patches leave alone is compiled once for both.
    "--cc=ccache gcc",
];

/// What the patched one is configured with besides.
const PATCHED_OPTION: &str = "--enable-kvmprep";

/// Gives QEMU a guest with private memory that needs no special hardware. It must never get into the series.
const SW_PROTECTED: &str = include_str!("sw-protected.patch");

const PROGRAM: &str = "qemu-system-x86_64";
/// Changes whenever an entry is laid out differently.
const LAYOUT: &str = "a QEMU of our own, layout 1";

/// All, ready to be run.
pub struct Built {
    /// As Debian has it.
    pub plain: PathBuf,
    /// With the patches.
    pub patched: PathBuf,
    /// With the patches, and a guest that has private memory.
    pub private: PathBuf,
    /// Where the library is that the patched ones are linked against.
    pub libraries: PathBuf,
    /// The version of the source package.
    pub version: String,
}

/// Takes them from the cache, or builds what it does not have.
pub fn obtain(cache: &Cache, source: &Source) -> Result<Built> {
    let patches = series::read(&project::root().join("contrib/qemu"))?;
    let header = fs::read_to_string(project::root().join("include/kvmprep.h"))?;
    let (prefix, _) = cache.scratch("vmm-prefix")?;
    let libraries = PathBuf::from("lib");
    install::install(&prefix, None, Some(&libraries)).context("the library cannot be installed for QEMU")?;

    let recipe = format!("{LAYOUT}\n{}\n{}\n", source.version, OPTIONS.join(" "));
    let plain = cache.get_or_make("vmm-plain", &recipe, |into| {
        let _step = progress::step(&format!("building QEMU {} (some minutes, once)", source.version));
        Workshop::open(cache, source)?.build("", &[], &prefix, into)
    })?;
    let recipe = format!("{recipe}{PATCHED_OPTION}\n{patches}\n{header}");
    let patched = cache.get_or_make("vmm-patched", &recipe, |into| {
        let _step = progress::step(&format!("building QEMU {} with our patches", source.version));
        Workshop::open(cache, source)?.build(&patches, &[PATCHED_OPTION], &prefix, into)
    })?;
    let recipe = format!("{recipe}{SW_PROTECTED}");
    let private = cache.get_or_make("vmm-private", &recipe, |into| {
        let _step =
            progress::step(&format!("building QEMU {} with our patches and private memory", source.version));
        let patches = patches + SW_PROTECTED;
        Workshop::open(cache, source)?.build(&patches, &[PATCHED_OPTION], &prefix, into)
    })?;
    Ok(Built {
        plain: plain.join(PROGRAM),
        patched: patched.join(PROGRAM),
        private: private.join(PROGRAM),
        libraries: prefix.join(libraries),
        version: source.version.clone(),
    })
}

/// The trees, and what is known of them.
struct Workshop<'a> {
    dir: PathBuf,
    _lock: super::super::cache::Lock,
    source: &'a Source,
}

impl<'a> Workshop<'a> {
    fn open(cache: &Cache, source: &'a Source) -> Result<Self> {
        crate::setup::require_packages(&PACKAGES)?;
        let (dir, lock) = cache.scratch("vmm-build")?;
        Ok(Workshop { dir, _lock: lock, source })
    }

    /// Builds the source with `patches` and leaves the program in `into`.
    fn build(&self, patches: &str, options: &[&str], prefix: &Path, into: &Path) -> Result<()> {
        self.prepare_source(patches)?;
        self.configure(options, prefix)?;
        let mut ninja = self.tool("ninja", prefix);
        process::capture(ninja.arg("-C").arg(self.build_dir()).arg(PROGRAM))?.or_fail()?;
        let mut strip = Command::new("strip");
        strip.arg("-o").arg(into.join(PROGRAM)).arg(self.build_dir().join(PROGRAM));
        process::capture(&mut strip)?.or_fail().map(drop)
    }

    /// Has the source tree with `patches`, from what it is now where that is known.
    fn prepare_source(&self, patches: &str) -> Result<()> {
        let (tree, state) = (self.source_dir(), self.dir.join("source.state"));
        let version = format!("{}\n", self.source.version);
        let known = fs::read_to_string(&state).unwrap_or_default();
        // Whoever is interrupted leaves a tree of which nothing is known.
        remove_file(&state)?;
        let applied = match known.strip_prefix(&version).filter(|_| tree.exists()) {
            Some(applied) => applied,
            None => {
                remove_dir(&tree)?;
                self.source.unpack(&tree)?;
                ""
            }
        };
        series::exchange(&tree, applied, patches)?;
        Ok(fs::write(&state, version + patches)?)
    }

    /// Has a build directory configured with `options`; ninja itself sees to changes of QEMU's own build files.
    fn configure(&self, options: &[&str], prefix: &Path) -> Result<()> {
        let (build, state) = (self.build_dir(), self.dir.join("build.state"));
        let wanted: Vec<&str> = OPTIONS.iter().chain(options).copied().collect();
        let wanted = wanted.join("\n") + &self.source.version;
        if fs::read_to_string(&state).is_ok_and(|known| known == wanted) {
            return Ok(());
        }
        remove_file(&state)?;
        remove_dir(&build)?;
        fs::create_dir(&build)?;
        let mut configure = self.tool("bash", prefix);
        configure.current_dir(&build).arg("../source/configure").args(OPTIONS).args(options);
        process::capture(&mut configure)?.or_fail().context("QEMU's configure")?;
        Ok(fs::write(&state, wanted)?)
    }

    /// A tool of the build, with what every one of them needs to know.
    fn tool(&self, name: &str, prefix: &Path) -> Command {
        let mut command = Command::new("nice");
        command.arg(name).env("LC_ALL", "C").env("PYTHONPATH", self.source.python_path());
        // Python would leave its compiled modules in the cache's entry.
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command
            .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"))
            .env("CCACHE_DIR", self.dir.join("ccache"));
        for name in ["CC", "CFLAGS", "LDFLAGS", "MAKEFLAGS", "CARGO_MAKEFLAGS", "NINJA_STATUS", "PYTHONHOME"]
        {
            command.env_remove(name);
        }
        command
    }

    fn source_dir(&self) -> PathBuf {
        self.dir.join("source")
    }

    fn build_dir(&self) -> PathBuf {
        self.dir.join("build")
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match path.exists() {
        true => fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display())),
        false => Ok(()),
    }
}

fn remove_dir(path: &Path) -> Result<()> {
    match path.exists() {
        true => fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display())),
        false => Ok(()),
    }
}
