//! Builds and runs `consumers/`: small projects as they stand outside this tree, each in its own build system.
//!
//! They get a copy of themselves, the place of an installed library and, where they build it themselves, a copy of
//! the source. Nothing else of this tree may reach them.

use super::define;
use crate::lanes::{Counts, Lane};
use crate::project;
use anyhow::{Context, Result, ensure};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a program ends with when it could not show anything here.
const SKIPPED: i32 = 77;

/// Where things are for them.
pub struct Places {
    /// A copy of `consumers/`.
    pub projects: PathBuf,
    /// An installed library.
    pub prefix: PathBuf,
    /// A copy of the library's source.
    pub source: PathBuf,
}

/// How a program has the library.
#[derive(Clone, Copy, PartialEq)]
enum Has {
    /// Among those that the loader brings.
    Shared,
    /// Inside.
    Static,
    /// By dlopen.
    Loaded,
}
use Has::{Loaded, Shared, Static};

/// One project: how it is built, and the programs that this must make.
struct Project {
    directory: &'static str,
    build: fn(&Places, &Path, &Path) -> Result<()>,
    /// Where the programs are, in the directory it is built in.
    bin: &'static str,
    programs: &'static [(&'static str, Has)],
}

const FIND_PACKAGE: Project = Project {
    directory: "find_package",
    build: find_package,
    bin: "bin",
    programs: &[
        ("populate_c", Shared),
        ("populate_c_static", Static),
        ("populate_cpp", Shared),
        ("populate_cpp_static", Static),
        ("without_threads_c", Shared),
        ("without_threads_c_static", Static),
        ("loaded", Loaded),
    ],
};

const PROJECTS: &[Project] = &[
    FIND_PACKAGE,
    Project {
        directory: "add_subdirectory",
        build: add_subdirectory,
        bin: "bin",
        programs: &[("populate_c", Shared), ("populate_c_static", Static)],
    },
    Project {
        directory: "fetch_content",
        build: fetch_content,
        bin: "bin",
        programs: &[("populate_c", Shared)],
    },
    Project {
        directory: "pkg_config",
        build: pkg_config,
        bin: "bin",
        programs: &[
            ("populate", Shared),
            ("populate_static", Static),
            ("populate_cpp", Shared),
            ("without_threads", Shared),
            ("loaded", Loaded),
            ("two_rusts", Shared),
            ("two_rusts_archive", Static),
            ("two_rusts_archive_last", Static),
        ],
    },
    Project { directory: "meson", build: meson, bin: "", programs: &[("populate", Shared)] },
];

/// What they need beside what the library is built with.
pub const PACKAGES: &[&str] = &["g++", "linux-libc-dev", "meson", "ninja-build", "pkg-config"];

/// Builds all and runs what they make.
pub fn check(lane: &mut Lane, places: &Places) {
    for project in PROJECTS {
        let from = places.projects.join(project.directory);
        let build = from.join("build");
        let built = (project.build)(places, &from, &build);
        let is_built = built.is_ok();
        lane.check(&format!("{} builds", project.directory), built);
        for (program, has) in project.programs.iter().filter(|_| is_built) {
            let path = build.join(project.bin).join(program);
            let what = format!("{}: {program}", project.directory);
            match has_library(&path, *has).and_then(|()| run(places, &path)) {
                Ok((counts, said)) => lane.add(&what, counts, &said),
                Err(error) => lane.check(&what, Err(error)),
            }
        }
    }
}

fn find_package(places: &Places, from: &Path, build: &Path) -> Result<()> {
    cmake(from, build, &[&define("CMAKE_PREFIX_PATH", &places.prefix)])
}

/// Fails when the CMake package of a tree without the archive is of no use to programs that do not ask for the
/// archive, or does not say what is missing to those that do.
pub fn check_without_archive(projects: &Path, prefix: &Path) -> Result<()> {
    let (from, build) = (projects.join(FIND_PACKAGE.directory), prefix.with_extension("shared"));
    let prefix = define("CMAKE_PREFIX_PATH", prefix);
    cmake(&from, &build, &[&prefix, OsStr::new("-DSTATIC=OFF")]).context("shared only")?;
    for (program, has) in FIND_PACKAGE.programs.iter().filter(|(_, has)| *has != Static) {
        has_library(&build.join(FIND_PACKAGE.bin).join(program), *has)?;
    }
    let refused = cmake(&from, &build.with_extension("static"), &[&prefix]);
    let said = refused.err().context("the component static was found")?.to_string();
    ensure!(said.contains("libkvmprep.a is not installed"), "{said}");
    Ok(())
}

/// Builds and runs a test suite that preloads the installed model, and has only what was installed to find it by.
pub fn check_with_model(lane: &mut Lane, places: &Places) {
    let from = places.projects.join("model");
    let (by_make, by_cmake) = (from.join("build"), from.join("build by cmake"));
    lane.check("model: make check, by pkg-config", make(places, &from, &by_make, "check"));
    lane.check(
        "model: ctest, on two kernels",
        find_package(places, &from, &by_cmake).and_then(|()| ctest(&by_cmake)),
    );
    lane.check(
        "model: the same program without it",
        skips_without_model(places, &by_make.join("bin/without_kvm")),
    );
}

fn ctest(build: &Path) -> Result<()> {
    let mut ctest = Command::new("ctest");
    ctest.current_dir(build).args(["--output-on-failure", "--no-tests=error", "--timeout", "300"]);
    project::run(&mut ctest).map(drop)
}

/// What the header declares is weak: a program that uses it runs where there is no model, and can tell.
fn skips_without_model(places: &Places, program: &Path) -> Result<()> {
    let (counts, said) = run(places, program)?;
    let is_told = counts.skipped == 1 && said.contains("the model is not preloaded");
    ensure!(is_told, "{said}");
    Ok(())
}

/// Fails when the CMake package does not say what is missing where no model is installed.
pub fn check_without_model(projects: &Path, prefix: &Path, build: &Path) -> Result<()> {
    let refused = cmake(&projects.join("model"), build, &[&define("CMAKE_PREFIX_PATH", prefix)]);
    let said = refused.err().context("the component model was found")?.to_string();
    ensure!(said.contains("libkvmprep-model.so is not installed"), "{said}");
    Ok(())
}

fn add_subdirectory(places: &Places, from: &Path, build: &Path) -> Result<()> {
    let inside = build.with_file_name("installed with it");
    let install = define("CMAKE_INSTALL_PREFIX", &inside);
    cmake(from, build, &[&define("KVMPREP_SOURCE", &places.source), &install])?;
    project::run(Command::new("cmake").arg("--install").arg(build))?;
    ensure!(
        !inside.join("include/kvmprep.h").exists(),
        "the library was installed where nobody asked for it"
    );
    Ok(())
}

fn fetch_content(places: &Places, from: &Path, build: &Path) -> Result<()> {
    let source = define("FETCHCONTENT_SOURCE_DIR_KVMPREP", &places.source);
    cmake(from, build, &[&source, OsStr::new("-DCMAKE_BUILD_TYPE=Debug")])
}

fn cmake(from: &Path, build: &Path, options: &[&OsStr]) -> Result<()> {
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(from).arg("-B").arg(build).args(options);
    project::run(&mut configure)?;
    project::run(Command::new("cmake").arg("--build").arg(build).args(["--parallel", "2"])).map(drop)
}

fn pkg_config(places: &Places, from: &Path, build: &Path) -> Result<()> {
    make(places, from, build, "all")
}

fn make(places: &Places, from: &Path, build: &Path, target: &str) -> Result<()> {
    let mut make = Command::new("make");
    make.env("PKG_CONFIG_PATH", places.prefix.join("lib/pkgconfig"));
    // make sees words where a path has a space, so it gets one that has none.
    let bin = build.join("bin");
    make.current_dir(from).arg(target).arg(format!("BIN={}", bin.strip_prefix(from)?.display()));
    project::run(&mut make).map(drop)
}

fn meson(places: &Places, from: &Path, build: &Path) -> Result<()> {
    let mut setup = Command::new("meson");
    setup.arg("setup").arg(build).arg(from).env("PKG_CONFIG_PATH", places.prefix.join("lib/pkgconfig"));
    project::run(&mut setup)?;
    project::run(Command::new("meson").args(["compile", "-C"]).arg(build)).map(drop)
}

/// A program that was to be static and is not would pass for the wrong reason.
fn has_library(program: &Path, has: Has) -> Result<()> {
    let dynamic = project::run(Command::new("readelf").args(["--dynamic", "--wide"]).arg(program))?;
    let needs_it = dynamic.contains("Shared library: [libkvmprep.so.0]");
    ensure!(needs_it == (has == Shared), "its libraries:\n{dynamic}");
    let symbols = project::run(Command::new("nm").arg("--defined-only").arg(program))?;
    let holds_it = symbols.contains(" T kvmprep_version\n");
    ensure!(holds_it == (has == Static), "kvmprep_version is {} it", if holds_it { "in" } else { "not in" });
    Ok(())
}

fn run(places: &Places, program: &Path) -> Result<(Counts, String)> {
    let libraries = places.prefix.join("lib");
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "300"]).arg(program).arg(libraries.join("libkvmprep.so.0"));
    command.env("LD_LIBRARY_PATH", &libraries);
    let output = command.output().with_context(|| format!("cannot start {}", program.display()))?;
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let mut counts = Counts::default();
    match output.status.code() {
        Some(0) => counts.passed = 1,
        Some(SKIPPED) => counts.skipped = 1,
        _ => counts.failed = 1,
    }
    Ok((counts, format!("{said}\nended: {}", output.status)))
}
