//! The C interface as files: the header that cbindgen makes of `src/abi`, and the symbols that are exported.
//!
//! What cbindgen cannot be told to write is put right here; what C programmers read is written in the Rust sources.

use crate::programs::Programs;
use crate::project;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
pub struct Cli {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Write include/kvmprep.h anew.
    Header,
    /// Fail when the header is not current, or is not what the library exports.
    Check,
}

pub fn main(cli: Cli) -> Result<()> {
    match cli.action {
        Action::Header => std::fs::write(header_path(), generate()?).context("cannot write the header"),
        Action::Check => {
            check_header()?;
            check_symbols(&Programs::prepare()?.library())
        }
    }
}

pub fn header_path() -> PathBuf {
    project::root().join("include/kvmprep.h")
}

/// The header as the sources have it.
fn generate() -> Result<String> {
    let config = cbindgen::Config::from_file(project::root().join("cbindgen.toml"))
        .map_err(|error| anyhow::anyhow!("cbindgen.toml: {error}"))?;
    // File by file, in the order of reading; what else the crate holds is not C's.
    let sections = ["error", "caps", "vm", "populate", "job"];
    let files = sections.map(|name| project::root().join(format!("src/abi/{name}.rs")));
    let builder = files.iter().fold(cbindgen::Builder::new().with_config(config), |b, file| b.with_src(file));
    let bindings = builder.generate()?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    Ok(guarded(&unsigned(&without_rust_sections(&String::from_utf8(text)?))))
}

/// Gives numbers that no int holds an unsigned type: as they come they are a long, on any 64-bit machine.
fn unsigned(header: &str) -> String {
    let is_long = |line: &str| {
        let number = line.strip_prefix("#define ").and_then(|define| define.split(' ').nth(1));
        number
            .and_then(|number| number.parse::<u32>().ok())
            .is_some_and(|number| i32::try_from(number).is_err())
    };
    header
        .lines()
        .map(|line| if is_long(line) { format!("{line}u\n") } else { format!("{line}\n") })
        .collect()
}

/// Moves the end of the include guard behind what cbindgen writes after it.
fn guarded(header: &str) -> String {
    let is_end = |line: &&str| line.starts_with("#endif") && line.contains("KVMPREP_H");
    let (ends, lines): (Vec<_>, Vec<_>) = header.lines().partition(is_end);
    lines.join("\n").trim_end().to_string() + "\n\n" + &ends.join("\n") + "\n"
}

/// Takes the "# Safety" sections out: they repeat, for Rust's readers, what C's take for granted.
fn without_rust_sections(header: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut inside = false;
    for line in header.lines() {
        if line.trim_start() == "* # Safety" {
            inside = true;
            while kept.last().is_some_and(|last| last.trim() == "*") {
                kept.pop();
            }
        } else if inside && line.trim() == "*/" {
            inside = false;
        }
        if !inside {
            kept.push(line);
        }
    }
    kept.join("\n") + "\n"
}

/// Fails when the committed header is not what the sources say.
pub fn check_header() -> Result<()> {
    let path = header_path();
    let committed =
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let current = generate()?;
    if committed == current {
        return Ok(());
    }
    let line = committed.lines().zip(current.lines()).take_while(|(a, b)| a == b).count() + 1;
    bail!("include/kvmprep.h differs from src/abi at line {line}: run `cargo xtask abi header` and commit it")
}

/// Fails when the library exports anything but the header's functions, or not all of them.
pub fn check_symbols(library: &Path) -> Result<()> {
    let header = std::fs::read_to_string(header_path()).context("cannot read the header")?;
    let (declared, exported) = (declared_functions(&header), exported_symbols(library)?);
    ensure!(!declared.is_empty(), "no function found in the header: the check is broken");
    let missing: Vec<_> = declared.difference(&exported).collect();
    let extra: Vec<_> = exported.difference(&declared).collect();
    ensure!(
        missing.is_empty() && extra.is_empty(),
        "{}: declared but not exported {missing:?}, exported but not declared {extra:?}",
        library.display()
    );
    Ok(())
}

/// Fails when programs linked against the library would not ask for its ABI.
pub fn check_soname(library: &Path) -> Result<()> {
    let dynamic = project::run(Command::new("readelf").args(["--dynamic", "--wide"]).arg(library))?;
    let soname = "Library soname: [libkvmprep.so.0]";
    ensure!(dynamic.contains(soname), "{}: no {soname}", library.display());
    Ok(())
}

/// Names before a `(` at the start of a declaration: in the header, comments apart, only functions have one.
pub(crate) fn declared_functions(header: &str) -> BTreeSet<String> {
    let declarations = header.lines().filter(|line| !line.trim_start().starts_with(['*', '/', '#', ' ']));
    declarations
        .filter_map(|line| line.split_once('('))
        .filter_map(|(before, _)| before.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("kvmprep_"))
        .map(str::to_owned)
        .collect()
}

fn exported_symbols(library: &Path) -> Result<BTreeSet<String>> {
    let text = project::run(
        Command::new("nm").args(["--dynamic", "--defined-only", "--format=posix"]).arg(library),
    )?;
    // NAME@@VERSION, and the versions themselves, which are absolute.
    let symbols = text.lines().filter(|line| !line.contains(" A "));
    Ok(symbols.filter_map(|line| line.split([' ', '@']).next()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn safety_sections_vanish_with_the_line_before() {
        let header = "/**\n * Does it.\n *\n * # Safety\n * `a` is good.\n */\nint f(void);\n";
        assert_eq!(without_rust_sections(header), "/**\n * Does it.\n */\nint f(void);\n");
    }

    #[test]
    fn large_numbers_are_unsigned_and_all_stands_inside_the_guard() {
        let header =
            "#define KVMPREP_A 4294967295\n#define KVMPREP_B 7\n#endif\n#endif  /* KVMPREP_H */\n\nassert;\n";
        assert_eq!(
            guarded(&unsigned(header)),
            "#define KVMPREP_A 4294967295u\n#define KVMPREP_B 7\n#endif\n\nassert;\n\n#endif  /* KVMPREP_H */\n"
        );
    }

    #[test]
    fn functions_are_found_and_types_are_not() {
        let header = "/* kvmprep_no(x) */\nint kvmprep_a(int x,\n              int y);\nconst char *kvmprep_b(void);\n\
                      typedef int (*kvmprep_fn)(int);\nstruct kvmprep_s {\n    int x;\n};\n";
        let names: Vec<_> = declared_functions(header).into_iter().collect();
        assert_eq!(names, ["kvmprep_a", "kvmprep_b"]);
    }
}
