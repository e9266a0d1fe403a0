//! Has the oldest Rust that the project claims to build with: Debian 13's compiler and cargo.
//!
//! They are unpacked with their libraries and loader, and with the standard libraries of two architectures, to run
//! beside whatever Rust the machine has. They must never be installed, never run with the machine's libraries, and
//! never lend theirs to the programs that cargo builds and runs.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::apt::Apt;
use super::cache::Cache;
use super::{guest, process, progress};

/// The release whose Rust this is.
const SUITES: &[&str] = &["trixie"];

const ENTRY: &str = "rust";
/// Changes whenever an entry is laid out differently.
const RECIPE: &str = "rustc and cargo of Debian 13, two targets, layout 1";

/// What it checks for without being able to link, by the names of Debian and of Rust.
const FOREIGN: (&str, &str) = ("arm64", "aarch64-unknown-linux-gnu");
const NATIVE: &str = "x86_64-unknown-linux-gnu";

/// An unpacked compiler and cargo.
pub struct Rust {
    dir: PathBuf,
}

impl Rust {
    /// The target other than x86-64.
    pub const FOREIGN_TARGET: &str = FOREIGN.1;

    /// The one in the cache, fetched first when there is none.
    pub fn obtain<'a>(cache: &Cache, apt: impl FnOnce() -> Result<Apt<'a>>) -> Result<Self> {
        let dir = cache.get_or_make(ENTRY, RECIPE, |into| fetch(&apt()?, into))?;
        Ok(Rust { dir })
    }

    /// The compiler's version, as it says itself.
    pub fn version(&self) -> Result<String> {
        let said = process::capture(Command::new(self.program("rustc")).arg("--version"))?.or_fail()?.stdout;
        Ok(said.split_whitespace().nth(1).context("rustc does not say its version")?.to_string())
    }

    /// A command that runs its cargo with its compiler; arguments are the caller's.
    pub fn cargo(&self) -> Command {
        let mut command = Command::new(self.program("cargo"));
        // Cargo would otherwise take the loader that runs it for itself.
        command.env("CARGO", self.program("cargo")).env("RUSTC", self.program("rustc"));
        command.env_remove("LD_LIBRARY_PATH").env_remove("LD_PRELOAD");
        command
    }

    fn program(&self, name: &str) -> PathBuf {
        self.dir.join("bin").join(name)
    }
}

fn fetch(apt: &Apt<'_>, into: &Path) -> Result<()> {
    // Cargo's build scripts are linked with gcc; ar takes a standard library apart.
    crate::setup::require_packages(&["binutils", "gcc", "libc6-dev"])?;
    let _step = progress::step("fetching Debian 13's Rust");
    let root = tempfile::tempdir_in(into)?;
    let (native, foreign) = (root.path().join("native"), root.path().join("foreign"));
    apt.unpack_with_dependencies(SUITES, &["cargo".to_string()], &native)?;
    apt.unpack_foreign(FOREIGN.0, SUITES, &["libstd-rust-dev".to_string()], &foreign)?;
    for dir in ["bin", "runtime", "lib/rustlib"] {
        fs::create_dir_all(into.join(dir))?;
    }
    programs(&native, into)?;
    for (root, target) in [(&native, NATIVE), (&foreign, FOREIGN.1)] {
        let from = root.join("usr/lib/rustlib").join(target);
        fs::rename(&from, into.join("lib/rustlib").join(target))
            .with_context(|| format!("the packages do not hold {}", from.display()))?;
    }
    keep_metadata(&into.join("lib/rustlib").join(FOREIGN.1).join("lib"))?;
    check(&Rust { dir: into.to_path_buf() }, root.path())
}

/// Takes over the programs, with the libraries that they are linked against. These lie where the compiler does not
/// look, since cargo lets the programs that it runs have the compiler's library directory.
fn programs(root: &Path, into: &Path) -> Result<()> {
    let runtime = into.join("runtime");
    let loader = root.join("usr/lib64/ld-linux-x86-64.so.2");
    copy(&loader, &runtime.join("ld.so"))?;
    for name in ["rustc", "cargo"] {
        let program = root.join("usr/bin").join(name);
        let mut list = Command::new(&loader);
        list.arg("--library-path").arg(root.join("usr/lib/x86_64-linux-gnu")).arg("--list").arg(&program);
        for library in guest::parse_ldd(&process::capture(&mut list)?.or_fail()?.stdout)? {
            copy(&library.path, &runtime.join(&library.name))?;
        }
        copy(&program, &runtime.join(name))?;
        let wrapper = into.join("bin").join(name);
        fs::write(&wrapper, wrapper_script(name))?;
        fs::set_permissions(&wrapper, Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// Cargo wants a program for a compiler. This one finds the entry wherever it is, and is named by its full path.
fn wrapper_script(program: &str) -> String {
    // Left to itself, the compiler looks for its standard library beside the loader.
    let sysroot = if program == "rustc" { r#" --sysroot "$entry""# } else { "" };
    format!(
        r#"#!/bin/sh
entry=${{0%/bin/*}}
exec "$entry/runtime/ld.so" --library-path "$entry/runtime" "$entry/runtime/{program}"{sysroot} "$@"
"#
    )
}

/// Leaves of each library what checking reads, which is less than half.
fn keep_metadata(dir: &Path) -> Result<()> {
    const METADATA: &str = "lib.rmeta";
    let archiver = |operation: &str, library: &Path| {
        let mut ar = Command::new("ar");
        ar.current_dir(dir).arg(operation).arg(library).arg(METADATA);
        process::capture(&mut ar)?.or_fail().map(drop)
    };
    let libraries: Vec<PathBuf> = fs::read_dir(dir)?.flatten().map(|entry| entry.path()).collect();
    for library in libraries.iter().filter(|path| path.extension().is_some_and(|suffix| suffix == "rlib")) {
        archiver("x", library)?;
        fs::remove_file(library)?;
        archiver("qcS", library)?;
        fs::remove_file(dir.join(METADATA))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).with_context(|| format!("the packages do not hold {}", from.display()))
}

/// An entry enters the cache only when both programs start and both standard libraries are of this compiler.
fn check(rust: &Rust, work: &Path) -> Result<()> {
    process::capture(rust.cargo().arg("--version"))?.or_fail()?;
    let source = work.join("empty.rs");
    fs::write(&source, "")?;
    for target in [NATIVE, FOREIGN.1] {
        let mut rustc = Command::new(rust.program("rustc"));
        rustc.args(["--target", target, "--crate-type", "lib", "--emit", "metadata"]).arg(&source);
        // Into a directory of ours: the compiler renames onto its output, be that a device of the machine.
        rustc.arg("--out-dir").arg(work);
        process::capture(&mut rustc)?.or_fail().with_context(|| format!("no usable Rust for {target}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_run_by_its_own_loader_and_the_compiler_told_its_place() {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["bin", "runtime"] {
            fs::create_dir(dir.path().join(sub)).unwrap();
        }
        // A loader that only says how it was called.
        fs::write(dir.path().join("runtime/ld.so"), "#!/bin/sh\necho \"$@\"\n").unwrap();
        for name in ["rustc", "cargo"] {
            fs::write(dir.path().join("bin").join(name), wrapper_script(name)).unwrap();
        }
        for path in ["bin/rustc", "bin/cargo", "runtime/ld.so"] {
            fs::set_permissions(dir.path().join(path), Permissions::from_mode(0o755)).unwrap();
        }
        let said = |name: &str| {
            let mut command = Command::new("sh");
            command.arg(dir.path().join("bin").join(name)).arg("last");
            let said = process::capture(&mut command).unwrap().or_fail().unwrap().stdout;
            said.replace(&dir.path().display().to_string(), "@")
        };
        assert_eq!(said("rustc"), "--library-path @/runtime @/runtime/rustc --sysroot @ last\n");
        assert_eq!(said("cargo"), "--library-path @/runtime @/runtime/cargo last\n");
    }
}
