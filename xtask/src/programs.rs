//! Builds the C programs of `c-tests/` against the library, as a user's build would: the public header, the shared
//! library, a C compiler with every warning an error.

use crate::project;
use crate::setup;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What every C program of ours is compiled with.
pub const C_FLAGS: &[&str] = &["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2", "-g"];

/// The library, laid out as if installed, and the programs made with it.
pub struct Programs {
    libraries: PathBuf,
    programs: PathBuf,
}

impl Programs {
    /// Builds the library in release mode.
    pub fn prepare() -> Result<Self> {
        setup::require_packages(&["gcc", "libc6-dev", "linux-libc-dev", "binutils"])?;
        project::run(project::cargo().args(["build", "--release", "--package", "kvmprep"]))?;
        let (libraries, programs) = (project::output()?.join("lib"), project::output()?.join("programs"));
        for directory in [&libraries, &programs] {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("cannot make {}", directory.display()))?;
        }
        std::fs::copy(project::target().join("release/libkvmprep.so"), libraries.join("libkvmprep.so.0"))
            .context("cannot copy the library")?;
        link("libkvmprep.so.0", &libraries.join("libkvmprep.so"))?;
        Ok(Self { libraries, programs })
    }

    /// Where the shared library is, under its soname.
    pub fn library_dir(&self) -> &Path {
        &self.libraries
    }

    /// The shared library.
    pub fn library(&self) -> PathBuf {
        self.libraries.join("libkvmprep.so.0")
    }

    /// Builds `c-tests/NAME.c`.
    pub fn build(&self, name: &str) -> Result<PathBuf> {
        let tests = project::root().join("c-tests");
        let program = self.programs.join(name);
        let mut compiler = compiler(&tests, name);
        compiler.args(support_sources(&tests.join("support"))?);
        compiler.arg("-L").arg(&self.libraries).args(["-lkvmprep", "-pthread", "-o"]).arg(&program);
        project::run(&mut compiler).with_context(|| format!("c-tests/{name}.c does not compile"))?;
        Ok(program)
    }

    /// Compiles `c-tests/NAME.c`, which is no program by itself.
    pub fn build_object(&self, name: &str) -> Result<PathBuf> {
        let object = self.programs.join(format!("{name}.o"));
        let mut compiler = compiler(&project::root().join("c-tests"), name);
        compiler.args(["-c", "-o"]).arg(&object);
        project::run(&mut compiler).with_context(|| format!("c-tests/{name}.c does not compile"))?;
        Ok(object)
    }
}

fn compiler(tests: &Path, name: &str) -> Command {
    let mut compiler = Command::new("cc");
    compiler.args(C_FLAGS).arg("-I").arg(project::root().join("include")).arg("-I").arg(tests);
    compiler.arg(tests.join(format!("{name}.c")));
    compiler
}

/// The names of all C tests: what lies in `c-tests/`, but for benchmarks and the demonstration.
pub fn test_names() -> Result<Vec<String>> {
    let directory = project::root().join("c-tests");
    let mut names = Vec::new();
    for entry in
        std::fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(name) = name.strip_suffix(".c") else { continue };
        if !name.starts_with("bench_") && !["demo", "example"].contains(&name) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// What the programs share.
fn support_sources(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut sources = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "c"));
    sources.sort();
    Ok(sources)
}

fn link(target: &str, at: &Path) -> Result<()> {
    if at.is_symlink() {
        std::fs::remove_file(at)?;
    }
    std::os::unix::fs::symlink(target, at).with_context(|| format!("cannot link {}", at.display()))
}
