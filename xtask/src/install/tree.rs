//! What an installed tree must be, whoever installed it: the files, and the two libraries as the linker made them.
//!
//! It looks and reports; it never builds, and never changes the tree.

use crate::abi;
use crate::project;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the shared library may need, and no more.
const MAY_NEED: &[&str] = &["libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"];
/// What it may be at most when stripped, in bytes.
const LARGEST: u64 = 1 << 20;
/// The interface's first version.
const FIRST_NODE: &str = "KVMPREP_0.1";

/// What the manual has of the model, which is installed with that.
pub const MODEL_PAGE: &str = "kvmprep_model.7";

/// What a path in a tree leads to.
#[derive(PartialEq)]
pub enum Entry {
    File(Vec<u8>),
    Link(PathBuf),
}

/// An installed tree, with its libraries in `lib`.
pub struct Tree {
    pub prefix: PathBuf,
    /// Of the library, as Cargo.toml has it.
    pub version: String,
}

impl Tree {
    /// The shared library, under the name that programs ask for.
    pub fn shared(&self) -> PathBuf {
        self.prefix.join("lib/libkvmprep.so.0")
    }

    fn archive(&self) -> PathBuf {
        self.prefix.join("lib/libkvmprep.a")
    }

    /// Every path in it, and what is there.
    pub fn files(&self) -> Result<BTreeMap<PathBuf, Entry>> {
        let mut files = BTreeMap::new();
        collect(&self.prefix, Path::new(""), &mut files)?;
        Ok(files)
    }

    /// Fails when a file is missing, or one is there that nobody expects.
    pub fn check_files(&self, manual: &Path) -> Result<()> {
        let found: BTreeSet<PathBuf> = self.files()?.into_keys().collect();
        let expected = expected_files(&self.version, manual)?;
        let missing: Vec<_> = expected.difference(&found).collect();
        let unexpected: Vec<_> = found.difference(&expected).collect();
        ensure!(
            missing.is_empty() && unexpected.is_empty(),
            "missing {missing:?}, unexpected {unexpected:?}"
        );
        Ok(())
    }

    /// Fails when the links from the name for linking to the file do not lead there.
    pub fn check_links(&self) -> Result<()> {
        let leads = |name: &str| std::fs::read_link(self.prefix.join("lib").join(name));
        let (real, soname) = (format!("libkvmprep.so.{}", self.version), "libkvmprep.so.0");
        ensure!(leads(soname)? == Path::new(&real), "{soname} does not lead to {real}");
        ensure!(leads("libkvmprep.so")? == Path::new(soname), "libkvmprep.so does not lead to {soname}");
        abi::check_soname(&self.shared())
    }

    /// Fails when the shared library's symbols are not the header's functions, each with a version.
    pub fn check_shared_symbols(&self) -> Result<()> {
        abi::check_symbols(&self.shared())?;
        let symbols = symbols(&self.shared(), "--dynamic")?;
        let bare: Vec<_> = symbols.iter().filter(|name| !has_version(name)).collect();
        ensure!(bare.is_empty(), "without a version: {bare:?}");
        let first = format!("kvmprep_version@@{FIRST_NODE}");
        ensure!(symbols.contains(&first), "no {first} among {symbols:?}");
        Ok(())
    }

    /// Fails when the static library has any other global symbol than the header's functions: it could clash.
    pub fn check_static_symbols(&self) -> Result<()> {
        let global = symbols(&self.archive(), "--extern-only")?;
        let versioned = symbols(&self.shared(), "--dynamic")?;
        let interface: BTreeSet<String> = versioned
            .iter()
            .filter_map(|name| name.split_once('@'))
            .map(|(name, _)| name.to_string())
            .collect();
        let (extra, missing): (Vec<_>, Vec<_>) =
            (global.difference(&interface).collect(), interface.difference(&global).collect());
        ensure!(
            extra.is_empty() && missing.is_empty(),
            "global beside the interface: {extra:?}; not: {missing:?}"
        );
        Ok(())
    }

    /// Fails when the static library holds section groups: those are one for all of a program, by name.
    pub fn check_groups(&self) -> Result<()> {
        let groups = readelf("--section-groups", &self.archive())?;
        ensure!(groups.contains("There are no section groups"), "{groups}");
        Ok(())
    }

    /// Fails when the shared library needs more than a C program has anyway.
    pub fn check_needed(&self) -> Result<()> {
        check_needed(&self.shared())
    }

    /// Fails when the shared library can be unmapped, rewritten or executed where it should not.
    pub fn check_hardening(&self) -> Result<()> {
        check_hardening(&self.shared())?;
        let dynamic = readelf("--dynamic", &self.shared())?;
        let flags = dynamic.lines().find(|line| line.contains("(FLAGS_1)")).context("no FLAGS_1")?;
        ensure!(flags.contains("NODELETE"), "not nodelete: {flags}");
        Ok(())
    }

    /// Fails when the shared library, stripped, is too large.
    pub fn check_size(&self) -> Result<()> {
        let stripped = project::output()?.join("stripped.so");
        project::run(Command::new("strip").arg("-o").arg(&stripped).arg(self.shared()))?;
        let size = std::fs::metadata(&stripped)?.len();
        println!("       {size} bytes stripped");
        ensure!(size < LARGEST, "{size} bytes stripped, {LARGEST} is the limit");
        Ok(())
    }

    /// Fails when pkg-config does not find the version and the directories where the tree is now.
    pub fn check_pkg_config(&self, libdir: &Path) -> Result<()> {
        let include = self.prefix.join("include");
        self.check_module("kvmprep", libdir, &[("libdir", libdir), ("includedir", &include)])
    }

    /// Fails when pkg-config does not say the version and, in these variables of a module, these paths.
    pub fn check_module(&self, module: &str, libdir: &Path, variables: &[(&str, &Path)]) -> Result<()> {
        let ask = |what: &str| -> Result<String> {
            let mut command = Command::new("pkg-config");
            command.env("PKG_CONFIG_PATH", libdir.join("pkgconfig")).args([what, module]);
            Ok(project::run(&mut command)?.trim().to_string())
        };
        let version = ask("--modversion")?;
        ensure!(version == self.version, "pkg-config says {version}, Cargo.toml {}", self.version);
        for (variable, expected) in variables {
            let said = ask(&format!("--variable={variable}"))?;
            // Where the path has a space, it comes as a shell needs it.
            let said = PathBuf::from(said.replace("\\ ", " "));
            let (said, expected) = (said.canonicalize(), expected.canonicalize()?);
            ensure!(
                said.as_ref().is_ok_and(|said| *said == expected),
                "{variable} is {said:?}, not {expected:?}"
            );
        }
        Ok(())
    }
}

/// Fails when a library needs more than a C program has anyway.
pub fn check_needed(library: &Path) -> Result<()> {
    let dynamic = readelf("--dynamic", library)?;
    let needed: Vec<&str> = dynamic
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split(['[', ']']).nth(1))
        .collect();
    println!("       needs {}", needed.join(", "));
    ensure!(needed.contains(&"libc.so.6"), "it needs {needed:?}, which cannot be all");
    let more: Vec<_> = needed.iter().filter(|name| !MAY_NEED.contains(name)).collect();
    ensure!(more.is_empty(), "it needs {more:?} too");
    Ok(())
}

/// Fails when a library can be rewritten or executed where it should not.
pub fn check_hardening(library: &Path) -> Result<()> {
    let dynamic = readelf("--dynamic", library)?;
    let flags = dynamic.lines().find(|line| line.contains("(FLAGS_1)")).context("no FLAGS_1")?;
    ensure!(flags.contains("NOW"), "not now: {flags}");
    ensure!(!dynamic.contains("(TEXTREL)"), "its code is relocated when loaded");
    let segments = readelf("--segments", library)?;
    ensure!(segments.contains("GNU_RELRO"), "no GNU_RELRO");
    let stack = segments.lines().find(|line| line.contains("GNU_STACK")).context("no GNU_STACK")?;
    ensure!(!stack.contains("RWE"), "it asks for an executable stack");
    Ok(())
}

/// All that is installed for a program to be built and run, and for its maker to read.
fn expected_files(version: &str, manual: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files: BTreeSet<PathBuf> = [
        "include/kvmprep.h",
        "lib/cmake/kvmprep/kvmprepConfig.cmake",
        "lib/cmake/kvmprep/kvmprepConfigVersion.cmake",
        "lib/cmake/kvmprep/kvmprepStaticTargets-release.cmake",
        "lib/cmake/kvmprep/kvmprepStaticTargets.cmake",
        "lib/cmake/kvmprep/kvmprepTargets-release.cmake",
        "lib/cmake/kvmprep/kvmprepTargets.cmake",
        "lib/libkvmprep.a",
        "lib/libkvmprep.so",
        "lib/libkvmprep.so.0",
        "lib/pkgconfig/kvmprep.pc",
        "share/doc/kvmprep/LICENSE-APACHE",
        "share/doc/kvmprep/LICENSE-MIT",
        "share/man/man3/kvmprep_populate.3",
        "share/man/man7/kvmprep.7",
    ]
    .map(PathBuf::from)
    .into();
    files.insert(format!("lib/libkvmprep.so.{version}").into());
    for entry in std::fs::read_dir(manual).context("cannot list the manual")? {
        let page = PathBuf::from(entry?.file_name());
        if page == Path::new(MODEL_PAGE) {
            continue;
        }
        let section = page.extension().context("a page without a section")?.to_string_lossy().into_owned();
        files.insert(Path::new("share/man").join(format!("man{section}")).join(page));
    }
    Ok(files)
}

fn collect(root: &Path, below: &Path, files: &mut BTreeMap<PathBuf, Entry>) -> Result<()> {
    for entry in std::fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(root, &path, files)?;
        } else if kind.is_symlink() {
            files.insert(path, Entry::Link(std::fs::read_link(entry.path())?));
        } else {
            files.insert(path, Entry::File(std::fs::read(entry.path())?));
        }
    }
    Ok(())
}

/// The symbols that a library defines, but for the names of versions, which are absolute.
pub fn symbols(library: &Path, which: &str) -> Result<BTreeSet<String>> {
    let mut nm = Command::new("nm");
    let text = project::run(nm.args([which, "--defined-only", "--format=posix"]).arg(library))?;
    // An archive's members have a line each, above theirs.
    let lines = text.lines().filter(|line| !line.ends_with("]:") && !line.contains(" A "));
    Ok(lines.filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
}

/// Whether it is `name@@KVMPREP_X.Y`, the default of its name, or in the node of what nobody is promised.
fn has_version(symbol: &str) -> bool {
    let Some((_, node)) = symbol.split_once("@@") else { return false };
    let is_version = |version: &str| {
        version.split('.').count() == 2 && version.split('.').all(|part| part.parse::<u32>().is_ok())
    };
    node == abi::promise::MACRO || node.strip_prefix("KVMPREP_").is_some_and(is_version)
}

pub fn readelf(what: &str, file: &Path) -> Result<String> {
    project::run(Command::new("readelf").args([what, "--wide"]).arg(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_a_default_one_of_two_numbers() {
        assert!(has_version("kvmprep_a@@KVMPREP_0.1") && has_version("kvmprep_a@@KVMPREP_EXPERIMENTAL"));
        for bad in ["kvmprep_a", "kvmprep_a@KVMPREP_0.1", "kvmprep_a@@Base", "kvmprep_a@@KVMPREP_0"] {
            assert!(!has_version(bad), "{bad}");
        }
    }
}
