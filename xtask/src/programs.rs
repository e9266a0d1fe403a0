//! Builds the C programs of `c-tests/` against the installed library, as a user's build would: the public header, the
//! shared library, a C compiler with every warning an error. It also says how long one may run.

use crate::install;
use crate::project;
use crate::setup;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What every C program of ours is compiled with.
pub const C_FLAGS: &[&str] = &["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-O2", "-g"];

/// Whatever the distribution's own is: programs here are told where to look.
const LIBDIR: &str = "lib";

/// How long one program may take, booting included, before it counts as hanging. The longest, the comparison with the model,
/// takes about a minute on a quiet machine; on one that is busy, many times that. A C test says by itself which of its cases
/// hangs, before that.
const TIMEOUT: Duration = Duration::from_secs(1800);

/// [`TIMEOUT`], of a program that is to repeat itself `scale` times.
pub fn timeout(scale: u32) -> Duration {
    TIMEOUT * scale
}

/// `timeout`, to which the program is to be added that it ends where it hangs, on this machine.
pub fn timed() -> Command {
    let mut command = Command::new("timeout");
    command.arg("--kill-after=5").arg(TIMEOUT.as_secs().to_string());
    command
}

/// Where the software model's header is, whose functions a program has once the model is preloaded.
pub fn model_headers() -> PathBuf {
    project::root().join("model/preload/include")
}

/// How the names of those C tests begin that are about what only the model has.
pub const OF_THE_MODEL: &str = "model_";

/// The library, installed, and the programs made with it.
pub struct Programs {
    headers: PathBuf,
    libraries: PathBuf,
    programs: PathBuf,
    /// What the programs share, compiled.
    support: Vec<PathBuf>,
}

impl Programs {
    /// Builds and installs the library, as it is shipped.
    pub fn prepare() -> Result<Self> {
        setup::require_packages(&["gcc", "libc6-dev", "linux-libc-dev", "binutils"])?;
        let (prefix, programs) = (project::output()?.join("installed"), project::output()?.join("programs"));
        install::install(&prefix, None, Some(Path::new(LIBDIR)))?;
        std::fs::create_dir_all(&programs).with_context(|| format!("cannot make {}", programs.display()))?;
        let (headers, libraries) = (prefix.join("include"), prefix.join(LIBDIR));
        let mut built = Self { headers, libraries, programs, support: Vec::new() };
        for source in support_sources(&project::root().join("c-tests/support"))? {
            let object = built.compile(&source)?;
            built.support.push(object);
        }
        Ok(built)
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
        let mut compiler = self.compiler();
        compiler.arg(tests.join(format!("{name}.c"))).args(&self.support);
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
        self.compile(&project::root().join(format!("c-tests/{name}.c")))
    }

    fn compile(&self, source: &Path) -> Result<PathBuf> {
        let name = source.file_stem().context("a source has a name")?;
        let object = self.programs.join(name).with_extension("o");
        project::run(self.compiler().arg("-c").arg(source).arg("-o").arg(&object))
            .with_context(|| format!("{} does not compile", source.display()))?;
        Ok(object)
    }

    fn compiler(&self) -> Command {
        let mut compiler = Command::new("cc");
        compiler.args(C_FLAGS);
        for directory in [&self.headers, &project::root().join("c-tests"), &model_headers()] {
            compiler.arg("-I").arg(directory);
        }
        compiler
    }
}

/// The comparison of the model with a kernel: a Rust program, which sets the machine's policies for huge pages and is for the
/// bed alone.
pub const DIFF_MODEL: &str = "diff_model";

/// It uses one, and would wait for others to be told of what it does. With two a busy machine once showed a page less than
/// there were, which was not seen again; with one that was not seen in millions of operations.
pub const DIFF_MODEL_CPUS: u32 = 1;

/// Builds it as what is fuzzed: fast, since it runs under emulation, and with each check that Rust can make.
pub fn build_diff_model() -> Result<PathBuf> {
    let mut cargo = project::cargo();
    cargo.args(["build", "--quiet", "--package", "kvmprep-model-diff", "--profile", "fuzz"]);
    cargo.args(["--bin", DIFF_MODEL]);
    project::run(&mut cargo).context("the comparison with the model does not compile")?;
    Ok(project::target().join("fuzz").join(DIFF_MODEL))
}

/// Builds the search for mistakes of the model, with a model that can make them.
pub fn build_find_mistakes() -> Result<PathBuf> {
    const NAME: &str = "find_mistakes";
    let mut cargo = project::cargo();
    cargo.args(["build", "--quiet", "--package", "kvmprep-model-diff", "--profile", "fuzz"]);
    cargo.args(["--features", "mistakes", "--bin", NAME]);
    project::run(&mut cargo).context("the search for mistakes does not compile")?;
    Ok(project::target().join("fuzz").join(NAME))
}

/// The names of all C tests: what lies in `c-tests/`, but for benchmarks, the demonstration and examples.
pub fn test_names() -> Result<Vec<String>> {
    let directory = project::root().join("c-tests");
    let mut names = Vec::new();
    for entry in
        std::fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?
    {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let Some(name) = name.strip_suffix(".c") else { continue };
        if !["bench_", "example"].iter().any(|other| name.starts_with(other)) && name != "demo" {
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
