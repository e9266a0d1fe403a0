//! The lane that judges installation: installs in each way, moves the tree, looks at it, and builds users of it.
//!
//! All is made anew below one directory and left there to be looked at.

use super::consumers::{self, Places};
use super::model;
use super::packaged;
use super::tree::{Entry, Tree};
use crate::lanes::Lane;
use crate::project;
use crate::setup;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What both ways of installing are told, so that they can be compared.
const PREFIX: &str = "/opt/kvmprep";

pub fn lane() -> Result<Lane> {
    setup::require_packages(&["binutils", "cmake", "gcc", "git", "libc6-dev", "make"])?;
    setup::require_packages(consumers::PACKAGES)?;
    let mut lane = Lane::new("install");
    let work = project::output()?.join("install");
    match Trees::make(&work) {
        Ok(trees) => judge(&mut lane, &trees, &work)?,
        Err(error) => lane.check("installing", Err(error)),
    }
    Ok(lane)
}

/// The tree that plain CMake installed, moved, and the one that `cargo xtask install` did.
struct Trees {
    source: PathBuf,
    moved: Tree,
    by_xtask: Tree,
}

impl Trees {
    fn make(work: &Path) -> Result<Self> {
        if work.exists() {
            std::fs::remove_dir_all(work).with_context(|| format!("cannot empty {}", work.display()))?;
        }
        // A space is where a build's quoting shows.
        let source = work.join("a copy of the source");
        copy_of("", &source)?;
        let (by_cmake, by_xtask) = (work.join("by-cmake"), work.join("by-xtask"));
        install_by_cmake(&source, &by_cmake)?;
        install_by_xtask(&by_xtask, PREFIX, "lib", &[])?;
        let moved = work.join("moved tree");
        std::fs::rename(beneath(&by_cmake, PREFIX), &moved).context("nothing was installed at the prefix")?;
        let version = project::version()?;
        let by_xtask = Tree { prefix: beneath(&by_xtask, PREFIX), version: version.clone() };
        Ok(Self { source, moved: Tree { prefix: moved, version }, by_xtask })
    }
}

fn judge(lane: &mut Lane, trees: &Trees, work: &Path) -> Result<()> {
    let tree = &trees.moved;
    lane.check("cargo xtask install installs what CMake does", same(tree, &trees.by_xtask));
    lane.check("the files, manual and licences", tree.check_files(&trees.source.join("man")));
    lane.check("names and soname of the shared library", tree.check_links());
    lane.check("the shared library's symbols, versioned", tree.check_shared_symbols());
    lane.check("the static library's global symbols", tree.check_static_symbols());
    lane.check("the static library's section groups", tree.check_groups());
    lane.check("what the shared library needs", tree.check_needed());
    lane.check("nodelete, relro, stack", tree.check_hardening());
    lane.check("its size", tree.check_size());
    lane.check("pkg-config, in a tree that was moved", tree.check_pkg_config(&tree.prefix.join("lib")));
    lane.check("a library directory of several parts", other_libdir(work, "lib/x86_64-linux-gnu"));
    lane.check("an absolute library directory", absolute_libdir(work));
    let projects = work.join("consumers");
    copy_of("consumers", &projects)?;
    let places = Places { projects, prefix: tree.prefix.clone(), source: trees.source.clone() };
    packaged::check(lane, tree, &places, &work.join("packaged"));
    consumers::check(lane, &places);
    match with_model(work) {
        Ok(with_model) => model::check(lane, tree, with_model, &places, &work.join("model")),
        Err(error) => lane.check("installing the model", Err(error)),
    }
    Ok(())
}

/// The library and its model, installed by the command itself and moved.
fn with_model(work: &Path) -> Result<Tree> {
    let (destdir, prefix) = (work.join("with-model"), work.join("moved tree with the model"));
    install_by_xtask(&destdir, PREFIX, "lib", &["--model"])?;
    std::fs::rename(beneath(&destdir, PREFIX), &prefix).context("nothing was installed at the prefix")?;
    Ok(Tree { prefix, version: project::version()? })
}

/// As the README says it.
fn install_by_cmake(source: &Path, destdir: &Path) -> Result<()> {
    let cmake = |arguments: &[&str]| {
        let mut command = Command::new("cmake");
        project::run(command.current_dir(source).args(arguments).env("DESTDIR", destdir))
    };
    cmake(&["-B", "build", &format!("-DCMAKE_INSTALL_PREFIX={PREFIX}"), "-DCMAKE_INSTALL_LIBDIR=lib"])?;
    cmake(&["--build", "build"])?;
    cmake(&["--install", "build"]).map(drop)
}

/// By the command itself.
fn install_by_xtask(destdir: &Path, prefix: &str, libdir: &str, more: &[&str]) -> Result<()> {
    let mut xtask = Command::new(std::env::current_exe()?);
    xtask.args(["install", "--prefix", prefix, "--libdir", libdir]).args(more).arg("--destdir").arg(destdir);
    project::run(&mut xtask).map(drop)
}

/// Fails when two trees differ in a name, a link or a file. What was linked twice need not be the same to the byte.
fn same(one: &Tree, other: &Tree) -> Result<()> {
    let (one, other) = (one.files()?, other.files()?);
    let (names, others): (Vec<_>, Vec<_>) = (one.keys().collect(), other.keys().collect());
    ensure!(names == others, "{names:?} and {others:?}");
    let is_library = |path: &Path| path.to_string_lossy().contains("libkvmprep.");
    let alike = |path: &Path, one: &Entry, other: &Entry| match (one, other) {
        (Entry::File(_), Entry::File(_)) if is_library(path) => true,
        _ => one == other,
    };
    let differing: Vec<_> =
        one.iter().filter(|(path, entry)| !alike(path, entry, &other[*path])).map(|(path, _)| path).collect();
    ensure!(differing.is_empty(), "{differing:?} differ");
    Ok(())
}

fn other_libdir(work: &Path, libdir: &str) -> Result<()> {
    let destdir = work.join("other libdir");
    install_by_xtask(&destdir, PREFIX, libdir, &[])?;
    let prefix = beneath(&destdir, PREFIX);
    let libdir = prefix.join(libdir);
    ensure!(libdir.join("libkvmprep.so.0").exists(), "no library in {}", libdir.display());
    Tree { prefix, version: project::version()? }.check_pkg_config(&libdir)
}

/// There is nothing to be relative to: the paths must be those that were given.
fn absolute_libdir(work: &Path) -> Result<()> {
    let destdir = work.join("absolute libdir");
    install_by_xtask(&destdir, "/usr", "/lib64", &[])?;
    let file = beneath(&destdir, "/lib64").join("pkgconfig/kvmprep.pc");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    ensure!(text.contains("prefix=/usr\nlibdir=/lib64\nincludedir=${prefix}/include\n"), "{text}");
    Ok(())
}

/// An absolute path, seen from another root.
pub fn beneath(root: &Path, absolute: &str) -> PathBuf {
    root.join(absolute.trim_start_matches('/'))
}

/// Copies what git knows below `directory`, changes and new files included.
fn copy_of(directory: &str, to: &Path) -> Result<()> {
    let from = project::root().join(directory);
    let mut git = Command::new("git");
    git.current_dir(&from).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    for name in project::run(&mut git)?.split_terminator('\0') {
        // A file that was deleted is known until that is committed.
        if from.join(name).exists() {
            let target = to.join(name);
            std::fs::create_dir_all(target.parent().unwrap_or(to))?;
            std::fs::copy(from.join(name), &target).with_context(|| format!("cannot copy {name}"))?;
        }
    }
    Ok(())
}
