//! What is to run in a guest: a program, its files, its surroundings.
//!
//! A program of the host is taken in together with the shared libraries and the loader it needs, so that it
//! runs inside as it was built. Nothing else of the host is visible inside.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::process;

/// A guest to boot.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Files to take in, and their absolute paths inside. Modes are kept.
    pub files: Vec<(PathBuf, String)>,
    /// The program, by its path inside or its name in busybox, and its arguments.
    pub argv: Vec<String>,
    /// Its environment, on top of `PATH` and `HOME`.
    pub env: Vec<(String, String)>,
    /// How much memory the guest has.
    pub memory_mib: u64,
    /// How many CPUs.
    pub cpus: u32,
    /// How long booting and running may take together.
    pub timeout: Duration,
    /// More for the kernel's command line.
    pub kernel_args: Vec<String>,
    /// Functions of the kernel whose warnings the program is known to bring about: they are no trouble.
    pub known_warnings: &'static [&'static str],
}

impl Guest {
    /// A guest that runs `argv`, with 1 GiB, two CPUs and ten minutes, since a busy machine may need one to boot it.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Guest {
            files: Vec::new(),
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            memory_mib: 1024,
            cpus: 2,
            timeout: Duration::from_secs(600),
            kernel_args: Vec::new(),
            known_warnings: &[],
        }
    }

    /// Takes in the file `host` as `inside`. When it is a program or library, whatever it is linked against
    /// comes along, into `/lib`; `library_dirs` are looked through before the host's own directories.
    pub fn add(&mut self, host: &Path, inside: &str, library_dirs: &[&Path]) -> Result<()> {
        if !inside.starts_with('/') || inside.split('/').any(|part| part == "..") {
            bail!("{inside} is no absolute path inside the guest");
        }
        self.push(host.to_path_buf(), inside.to_string());
        if !is_elf(host)? {
            return Ok(());
        }
        for library in libraries(host, library_dirs)? {
            let inside = match library.name.starts_with('/') {
                true => library.name,
                false => format!("/lib/{}", library.name),
            };
            self.push(library.path, inside);
        }
        Ok(())
    }

    fn push(&mut self, host: PathBuf, inside: String) {
        if !self.files.iter().any(|(_, taken)| *taken == inside) {
            self.files.push((host, inside));
        }
    }
}

/// A shared library, by the name it is asked for and where the host has it. The loader's name is its path.
#[derive(Debug, PartialEq, Eq)]
pub struct Library {
    pub name: String,
    pub path: PathBuf,
}

fn is_elf(path: &Path) -> Result<bool> {
    let mut magic = Vec::new();
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    file.take(4).read_to_end(&mut magic).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(magic == b"\x7fELF")
}

fn libraries(program: &Path, dirs: &[&Path]) -> Result<Vec<Library>> {
    // ldd takes a name without a slash for one in the current directory, and warns about the mode of a
    // library.
    let program = std::path::absolute(program)?;
    let mut command = Command::new("ldd");
    command.arg(&program).env("LC_ALL", "C");
    if !dirs.is_empty() {
        let inherited = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let dirs = dirs.iter().map(|dir| std::path::absolute(dir).map(OsString::from));
        let mut all = dirs.collect::<Result<Vec<OsString>, _>>()?;
        all.extend(std::env::split_paths(&inherited).filter(|dir| dir.is_absolute()).map(OsString::from));
        command.env("LD_LIBRARY_PATH", std::env::join_paths(all)?);
    }
    let listed = process::capture(&mut command)?;
    if listed.stdout.contains("statically linked") || listed.stderr.contains("not a dynamic executable") {
        return Ok(Vec::new());
    }
    parse_ldd(&listed.or_fail()?.stdout)
        .with_context(|| format!("cannot run {} in a guest", program.display()))
}

/// Reads what `ldd` or the loader's `--list` prints. A line is `name => path (address)`, or `path (address)`
/// for the loader and for what the kernel provides.
pub fn parse_ldd(listing: &str) -> Result<Vec<Library>> {
    let mut libraries = Vec::new();
    for line in listing.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let line = line.rsplit_once(" (0x").map_or(line, |(before, _)| before);
        match line.split_once(" => ") {
            Some((name, "not found")) => bail!("the library {name} is not found on this machine"),
            // The loader, named by path, has another copy of itself under the library path.
            Some((name, path)) if !name.contains("vdso") => {
                let name = match name.starts_with('/') {
                    true => name.rsplit('/').next().unwrap_or(name),
                    false => name,
                };
                libraries.push(Library { name: name.into(), path: path.into() });
            }
            None if line.starts_with('/') => {
                libraries.push(Library { name: line.into(), path: line.into() });
            }
            _ => {}
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_gives_libraries_and_loader() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\
                       \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f00)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f01)\n";
        let libraries = parse_ldd(listing).unwrap();
        assert_eq!(libraries.len(), 2);
        assert_eq!(libraries[0].name, "libc.so.6");
        assert_eq!(libraries[0].path, Path::new("/lib/x86_64-linux-gnu/libc.so.6"));
        assert_eq!(libraries[1].name, "/lib64/ld-linux-x86-64.so.2");
    }

    #[test]
    fn a_missing_library_is_named() {
        let error = parse_ldd("\tlibkvmprep.so.0 => not found\n").unwrap_err().to_string();
        assert!(error.contains("libkvmprep.so.0"), "{error}");
    }

    #[test]
    fn a_path_inside_must_be_absolute_and_stay_inside() {
        let mut guest = Guest::new(["true"]);
        assert!(guest.add(Path::new("/dev/null"), "relative", &[]).is_err());
        assert!(guest.add(Path::new("/dev/null"), "/a/../../b", &[]).is_err());
        assert!(guest.add(Path::new("/dev/null"), "/a/b", &[]).is_ok());
    }

    #[test]
    fn a_program_brings_its_loader() {
        let mut guest = Guest::new(["/self"]);
        guest.add(&std::env::current_exe().unwrap(), "/self", &[]).unwrap();
        assert!(guest.files.iter().any(|(_, inside)| inside.contains("ld-linux")), "{:?}", guest.files);
        assert!(guest.files.iter().any(|(_, inside)| inside == "/lib/libc.so.6"), "{:?}", guest.files);
    }
}
