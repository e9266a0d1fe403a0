//! Builds the C programs of `c-tests/` against the installed library, as a user's build would: the public header, the
//! shared library, a C compiler with every warning an error.

use crate::install;
use crate::project;
use crate::setup;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What every C program of ours is compiled with.
pub const C_FLAGS: &[&str] = &["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2", "-g"];

/// Whatever the distribution's own is: programs here are told where to look.
const LIBDIR: &str = "lib";

/// The library, installed, and the programs made with it.
pub struct Programs {
    headers: PathBuf,
    libraries: PathBuf,
    programs: PathBuf,
}

impl Programs {
    /// Builds and installs the library, as it is shipped.
    pub fn prepare() -> Result<Self> {
        setup::require_packages(&["gcc", "libc6-dev", "linux-libc-dev", "binutils"])?;
        let (prefix, programs) = (project::output()?.join("installed"), project::output()?.join("programs"));
        install::install(&prefix, None, Some(Path::new(LIBDIR)))?;
        std::fs::create_dir_all(&programs).with_context(|| format!("cannot make {}", programs.display()))?;
        Ok(Self { headers: prefix.join("include"), libraries: prefix.join(LIBDIR), programs })
    }

    /// Where the shared library is, under its soname.
    pub fn library_dir(&self) -> &Path {
        &self.libraries
    }

    /// The shared library.
    pub fn library(&self) -> PathBuf {
        self.libraries.join("libkvmprep.so.0")
    }

    /// Builds `c-tests/NAME.c`, with the files of `c-tests/NAME/` where it has such.
    pub fn build(&self, name: &str) -> Result<PathBuf> {
        let tests = project::root().join("c-tests");
        let program = self.programs.join(name);
        let mut compiler = self.compiler(&tests, name);
        compiler.args(support_sources(&tests.join("support"))?);
        let own = tests.join(name);
        if own.is_dir() {
            compiler.args(support_sources(&own)?);
        }
        compiler.arg("-L").arg(&self.libraries).args(["-lkvmprep", "-pthread", "-o"]).arg(&program);
        project::run(&mut compiler).with_context(|| format!("c-tests/{name}.c does not compile"))?;
        Ok(program)
    }

    /// Compiles `c-tests/NAME.c`, which is no program by itself.
    pub fn build_object(&self, name: &str) -> Result<PathBuf> {
        let object = self.programs.join(format!("{name}.o"));
        let mut compiler = self.compiler(&project::root().join("c-tests"), name);
        compiler.args(["-c", "-o"]).arg(&object);
        project::run(&mut compiler).with_context(|| format!("c-tests/{name}.c does not compile"))?;
        Ok(object)
    }

    fn compiler(&self, tests: &Path, name: &str) -> Command {
        let mut compiler = Command::new("cc");
        compiler.args(C_FLAGS).arg("-I").arg(&self.headers).arg("-I").arg(tests);
        compiler.arg(tests.join(format!("{name}.c")));
        compiler
    }
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

/// The C files of a directory: what the programs share, or what one of them is made of.
pub fn support_sources(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut sources = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "c"));
    sources.sort();
    Ok(sources)
}
