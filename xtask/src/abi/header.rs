//! `include/kvmprep.h`: made of `src/abi` by cbindgen, and current.
//!
//! What cbindgen cannot be told to write is put right here; what C programmers read is written in the Rust sources.

use super::promise;
use crate::project;
use anyhow::{Context, Result, bail};
use std::path::PathBuf;

pub fn path() -> PathBuf {
    project::root().join("include/kvmprep.h")
}

/// The header as the sources have it.
pub fn generate() -> Result<String> {
    let config = cbindgen::Config::from_file(project::root().join("cbindgen.toml"))
        .map_err(|error| anyhow::anyhow!("cbindgen.toml: {error}"))?;
    // File by file, in the order of reading; what else the crate holds is not C's.
    let sections = ["error", "caps", "vm", "memslot", "populate", "job", "private", "image", "launch"];
    let files = sections.map(|name| project::root().join(format!("src/abi/{name}.rs")));
    let builder = files.iter().fold(cbindgen::Builder::new().with_config(config), |b, file| b.with_src(file));
    let bindings = builder.generate()?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    let header = guarded(&unsigned(&without_rust_sections(&String::from_utf8(text)?)));
    Ok(promise::merged(&header))
}

/// Gives numbers that no int holds an unsigned type: as they come they are a long, on any 64-bit machine. And the one
/// comment that C90 has not is written as it has them.
fn unsigned(header: &str) -> String {
    let is_long = |line: &str| {
        let number = line.strip_prefix("#define ").and_then(|define| define.split(' ').nth(1));
        number
            .and_then(|number| number.parse::<u32>().ok())
            .is_some_and(|number| i32::try_from(number).is_err())
    };
    header
        .replace("// __cplusplus", "/* __cplusplus */")
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
pub fn check() -> Result<()> {
    let path = path();
    let committed =
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let current = generate()?;
    if committed == current {
        return Ok(());
    }
    let line = committed.lines().zip(current.lines()).take_while(|(a, b)| a == b).count() + 1;
    bail!("include/kvmprep.h differs from src/abi at line {line}: run `cargo xtask abi header` and commit it")
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
}
