//! `cargo xtask bed diff model --mistakes`: the model is made wrong on purpose, one rule at a time, and the comparison with a
//! real kernel must notice; and the program in C that it makes of each must show what the kernel really does.
//!
//! The search itself is `find_mistakes` of `model/diff`, in the bed. Its programs are compiled on this machine with
//! every warning an error, and run in a guest of their own, which knows nothing of the model. Nothing is repaired here, and a
//! mistake that was not found counts as failed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::{Bed, Guest, Kernel, ResolveError, ResolvedKernel};
use crate::lanes::{Kvm, Lane, case_counts};
use crate::{programs, project, setup};

/// Where the lane has all that there is to be wrong about: private memory too.
const KERNEL: Kernel = Kernel::Private;
/// Each mistake takes a few seconds to find, and several times as long to make a short program of, under emulation.
const TIME: Duration = Duration::from_secs(3600);

#[derive(Serialize)]
struct Figures {
    kernel: String,
    rows: Vec<Row>,
}

/// A mistake that was found.
#[derive(Serialize, Debug, PartialEq, Clone)]
struct Row {
    mistake: String,
    /// So many operations were done by then.
    operations: u64,
    /// By what, and in which field of its outcome.
    found_by: String,
}

/// A program in C, and what the kernel has done where it was made.
#[derive(Debug, PartialEq)]
struct Reproducer {
    source: String,
    prints: String,
}

/// The search as a lane of the tests.
pub fn lane(bed: &Bed, seed: Option<u64>) -> Result<Lane> {
    let kernel = match bed.resolve(&KERNEL) {
        Ok(kernel) => kernel,
        Err(ResolveError::Unavailable(why)) => return Ok(Lane::skipped("mistakes", &why)),
        Err(ResolveError::Failed(error)) => return Err(error),
    };
    setup::require_packages(&["gcc", "libc6-dev", "linux-libc-dev"])?;
    let mut lane = Lane::of_kernel("mistakes", &kernel.version, Kvm::Emulated);
    let output = search(bed, &kernel, seed)?;
    lane.add("mistakes of the model are found", case_counts(&output), &output);
    let figures = Figures { kernel: kernel.version.clone(), rows: rows(&output) };
    let path = project::write_figures("mistakes.json", &figures)?;
    println!("figures: {}", path.display());
    for (name, shown) in show_all(bed, &kernel, &reproducers(&output)?)? {
        lane.check(&format!("{name} in C"), shown);
    }
    Ok(lane)
}

fn search(bed: &Bed, kernel: &ResolvedKernel, seed: Option<u64>) -> Result<String> {
    let mut guest = Guest::new(["/find_mistakes", "--reproducers"]);
    guest.add(&programs::build_find_mistakes()?, "/find_mistakes", &[])?;
    guest.timeout = TIME;
    guest.env.extend(seed.map(|seed| ("KVMPREP_DIFF_SEED".to_string(), seed.to_string())));
    let is_result = |line: &str| ["ok ", "FAILED ", "skipped "].iter().any(|start| line.starts_with(start));
    let outcome = super::run(bed, kernel, &guest, &mut |line| {
        if is_result(line) {
            println!("  {line}");
        }
    })?;
    if let Some(line) = outcome.oops {
        bail!("the kernel reported trouble: {line}");
    }
    Ok(outcome.output)
}

fn rows(output: &str) -> Vec<Row> {
    let row = |line: &str| {
        let (mistake, rest) = line.strip_prefix("ok ")?.split_once(": found after ")?;
        let (operations, found_by) = rest.split_once(" operations by ")?;
        let operations = operations.parse().ok()?;
        Some(Row { mistake: mistake.into(), operations, found_by: found_by.into() })
    };
    output.lines().filter_map(row).collect()
}

/// The programs in the output, by the mistakes' names.
fn reproducers(output: &str) -> Result<BTreeMap<String, Reproducer>> {
    let mut found = BTreeMap::new();
    for part in output.split("\n---- program ").skip(1) {
        let (name, rest) = part.split_once('\n').context("a program without an end")?;
        let (source, rest) =
            rest.split_once(&format!("\n---- prints {name}\n")).context("a program prints nothing")?;
        let (prints, _) = rest.split_once("---- end").context("what a program prints has no end")?;
        found.insert(name.to_string(), Reproducer { source: source.into(), prints: prints.into() });
    }
    Ok(found)
}

/// Compiles and runs each program; says of each whether it shows what the kernel has done.
fn show_all(
    bed: &Bed,
    kernel: &ResolvedKernel,
    reproducers: &BTreeMap<String, Reproducer>,
) -> Result<Vec<(String, Result<()>)>> {
    let directory = project::output()?.join("reproducers");
    std::fs::create_dir_all(&directory)?;
    let mut guest = Guest::new([
        "sh",
        "-c",
        "for program in /reproducers/*; do echo \"== ${program##*/}\"; $program; done",
    ]);
    guest.timeout = TIME;
    let mut shown = Vec::new();
    for (name, reproducer) in reproducers {
        std::fs::write(directory.join(format!("{name}.prints")), &reproducer.prints)?;
        match compile(&directory, name, &reproducer.source) {
            Ok(program) => guest.add(&program, &format!("/reproducers/{name}"), &[])?,
            Err(error) => shown.push((name.clone(), Err(error))),
        }
    }
    ensure!(!guest.files.is_empty(), "there is no program in C");
    let output = super::run(bed, kernel, &guest, &mut |_| {})?.output;
    for part in format!("\n{output}").split("\n== ").skip(1) {
        let (name, printed) = part.split_once('\n').unwrap_or((part, ""));
        let expected = reproducers.get(name).map_or("", |reproducer| &reproducer.prints);
        shown.push((name.to_string(), compare(expected, printed)));
    }
    ensure!(shown.len() == reproducers.len(), "{} programs of {} ran", shown.len(), reproducers.len());
    Ok(shown)
}

fn compile(directory: &Path, name: &str, source: &str) -> Result<PathBuf> {
    let (file, program) = (directory.join(format!("{name}.c")), directory.join(name));
    std::fs::write(&file, source).with_context(|| format!("cannot write {}", file.display()))?;
    let mut cc = Command::new("cc");
    cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-o"]).args([&program, &file]);
    project::run(&mut cc)?;
    Ok(program)
}

fn compare(expected: &str, printed: &str) -> Result<()> {
    let (expected, printed) = (expected.trim(), printed.trim());
    ensure!(!expected.is_empty(), "nothing is known of what it should print");
    ensure!(expected == printed, "it printed\n{printed}\nwhere the kernel had done\n{expected}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "ok One: found after 84 operations by guest_write in pages_4k\n\
                          ---- program One\n#include <errno.h>\nint main(void) {}\n\
                          ---- prints One\n0: result=0\n1: result=-22\n---- end\n\
                          FAILED Two: not found in 10020 operations\ncases: 1 passed, 1 failed, 0 skipped\n";

    #[test]
    fn what_was_found_and_how_soon_is_read() {
        let row = Row { mistake: "One".into(), operations: 84, found_by: "guest_write in pages_4k".into() };
        assert_eq!(rows(OUTPUT), [row]);
    }

    #[test]
    fn a_program_is_read_with_what_it_prints() {
        let found = reproducers(OUTPUT).unwrap();
        let one = Reproducer {
            source: "#include <errno.h>\nint main(void) {}".into(),
            prints: "0: result=0\n1: result=-22\n".into(),
        };
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [("One".to_string(), one)]);
    }

    #[test]
    fn a_program_must_print_what_the_kernel_did() {
        assert!(compare("0: result=0\n", "0: result=0\n\n").is_ok());
        assert!(compare("0: result=0\n", "0: result=-22\n").is_err());
        assert!(compare("", "").is_err());
    }
}
