//! `cargo xtask test`: everything that judges a change, from a bare machine.
//!
//! Sources first, then the C tests on this machine's KVM and on every kernel of the bed. It judges and counts; it
//! never repairs, and never repeats what failed until it passes.

use crate::abi;
use crate::bed::{self, Bed, Guest, Kernel, ResolveError};
use crate::bench;
use crate::fuzz;
use crate::install;
use crate::lanes::{self, Counts, Lane, cargo_counts, case_counts};
use crate::man;
use crate::msrv;
use crate::programs::{self, Programs};
use crate::project;
use crate::setup;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub struct Cli {
    /// Only these lanes: source, msrv, install, native, 6.1, 6.12, newest, private; qemu must be named.
    #[arg(long = "lane", value_name = "LANE")]
    lanes: Vec<String>,
    /// Only these C tests.
    #[arg(long = "program", value_name = "NAME")]
    programs: Vec<String>,
}

/// How long one C test may take in the bed, booting included.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(240);

/// The kernels of the bed, with the backings that each must show without a fault: one that is skipped there by
/// mistake would otherwise go unseen.
pub const KERNELS: [(&str, u64); 4] = [("6.1", 7), ("6.12", 7), ("newest", 8), ("private", 9)];

pub fn main(cli: Cli) -> Result<()> {
    let started = Instant::now();
    let wants = |name: &str| cli.lanes.is_empty() || cli.lanes.iter().any(|lane| lane == name);
    let bed = Bed::open()?;
    let mut lanes = Vec::new();
    if wants("source") {
        lanes.push(source_lane(&bed)?);
    }
    if wants("msrv") {
        lanes.push(msrv::lane(&bed)?);
    }
    if wants("install") {
        lanes.push(install::lane()?);
    }
    let tests = Tests::build(&cli.programs)?;
    if wants("native") {
        lanes.push(native_lane(&tests)?);
    }
    for (name, backings) in KERNELS.into_iter().filter(|(name, _)| wants(name)) {
        lanes.push(kernel_lane(&bed, name, backings, &tests, 1)?);
    }
    // Only where it is named, and in the soak: the bed's emulator loses an interrupt of a nested guest's once in
    // some fifty cases, which says nothing of a change.
    if cli.lanes.iter().any(|lane| lane == "qemu") {
        lanes.push(bed::qemu_lane(&bed)?);
    }
    lanes::conclude("test.json", started, &lanes)
}

/// The C tests, built.
pub struct Tests {
    pub programs: Vec<(String, PathBuf)>,
    libraries: PathBuf,
}

impl Tests {
    /// Builds all, or those named.
    pub fn build(only: &[String]) -> Result<Self> {
        let build = Programs::prepare()?;
        let mut programs = Vec::new();
        for name in programs::test_names()? {
            if only.is_empty() || only.contains(&name) {
                let program =
                    if name == abi::CALLERS { abi::build_callers(&build)? } else { build.build(&name)? };
                programs.push((name, program));
            }
        }
        ensure!(!programs.is_empty(), "no C test of that name");
        Ok(Self { programs, libraries: build.library_dir().to_path_buf() })
    }
}

/// What the sources say of themselves: format, lints, unit tests, the interface.
fn source_lane(bed: &Bed) -> Result<Lane> {
    setup::require_packages(&["abigail-tools", "clang-format-19", "clang-19", "g++"])?;
    let mut lane = Lane::new("source", "");
    lane.check("rustfmt", cargo_check(&["fmt", "--all", "--", "--check"]));
    lane.check("clang-format", clang_format());
    lane.check(
        "clippy",
        cargo_check(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]),
    );
    lane.check("rustdoc", rustdoc());
    cargo_tests(&mut lane, "cargo test", &["test", "--workspace", "--no-fail-fast"], &[]);
    cargo_tests(&mut lane, "cargo test, AddressSanitizer", SANITIZED, &sanitizer_environment());
    lane.check("fuzzing, the fixed programs", fuzz::check_seeds());
    let built = Programs::prepare()?;
    abi::check(&mut lane, &built, bed);
    lane.check("the README's example", readme_example(&built));
    man::check(&mut lane, &built);
    lane.check("what a chunk costs", bench::check_counts());
    Ok(lane)
}

/// The library's tests once more, every access to memory checked. (ThreadSanitizer is of no use here: std's own
/// locks are not instrumented, and it takes every contended one for a race.)
const SANITIZED: &[&str] =
    &["test", "--package", "kvmprep", "--lib", "--tests", "--target", "x86_64-unknown-linux-gnu"];

/// What has rustc put AddressSanitizer in.
pub const ADDRESS_SANITIZER: &str = "-Zsanitizer=address -Cunsafe-allow-abi-mismatch=sanitizer";

fn sanitizer_environment() -> [(&'static str, &'static str); 3] {
    [
        // The sanitizer's switch is not stable, its runtime comes with the stable toolchain all the same.
        ("RUSTC_BOOTSTRAP", "1"),
        ("RUSTFLAGS", ADDRESS_SANITIZER),
        ("CARGO_TARGET_DIR", "target/kvmprep/sanitized"),
    ]
}

fn cargo_check(arguments: &[&str]) -> Result<()> {
    project::run(project::cargo().args(arguments)).map(drop)
}

fn rustdoc() -> Result<()> {
    let mut cargo = project::cargo();
    cargo.args(["doc", "--no-deps", "--package", "kvmprep"]).env("RUSTDOCFLAGS", "--deny warnings");
    project::run(&mut cargo).map(drop)
}

/// Runs a `cargo test` and adds its counts.
fn cargo_tests(lane: &mut Lane, what: &str, arguments: &[&str], environment: &[(&str, &str)]) {
    let mut cargo = project::cargo();
    cargo.args(arguments).envs(environment.iter().copied());
    match cargo.output().context("cannot start cargo") {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            let mut counts = cargo_counts(&text);
            // A crash of the test program counts no test as failed.
            counts.failed = counts.failed.max(u64::from(!output.status.success()));
            lane.add(what, counts, &text);
        }
        Err(error) => lane.check(what, Err(error)),
    }
}

fn c_sources() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for directory in ["c-tests", "c-tests/diff_memslots", "c-tests/support", "consumers/src"] {
        for entry in std::fs::read_dir(project::root().join(directory))? {
            let path = entry?.path();
            let extension = path.extension().unwrap_or_default();
            if ["c", "h", "cpp", "hpp"].iter().any(|known| extension == *known) {
                files.push(path);
            }
        }
    }
    Ok(files)
}

fn clang_format() -> Result<()> {
    let mut command = Command::new("clang-format-19");
    command.current_dir(project::root()).args(["--dry-run", "--Werror"]).args(c_sources()?);
    project::run(&mut command).map(drop)
}

/// The C example in the README is what c-tests/example.c holds, which is compiled and linked here.
fn readme_example(programs: &Programs) -> Result<()> {
    let readme =
        std::fs::read_to_string(project::root().join("README.md")).context("cannot read README.md")?;
    let source = std::fs::read_to_string(project::root().join("c-tests/example.c"))
        .context("cannot read c-tests/example.c")?;
    let code = &source[source.find("#include").unwrap_or(0)..];
    ensure!(readme.contains(code.trim()), "README.md does not show c-tests/example.c");
    programs.build_object("example").map(drop)
}

/// The C tests on this machine's own KVM, whatever it is.
fn native_lane(tests: &Tests) -> Result<Lane> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Ok(Lane::skipped("native", &format!("/dev/kvm cannot be opened: {error}")));
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut lane = Lane::new("native", release.trim());
    for (name, program) in &tests.programs {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "240"]).arg(program).env("LD_LIBRARY_PATH", &tests.libraries);
        let output = command.output().with_context(|| format!("cannot start {name}"))?;
        add_program(&mut lane, name, output.status.code(), &String::from_utf8_lossy(&output.stdout), "");
    }
    Ok(lane)
}

/// The C tests on one kernel of the bed, each in a guest of its own, so that none sees what another left.
pub fn kernel_lane(bed: &Bed, name: &str, backings: u64, tests: &Tests, scale: u32) -> Result<Lane> {
    let kernel = match bed.resolve(&Kernel::named(name)?) {
        Ok(kernel) => kernel,
        Err(ResolveError::Unavailable(why)) => return Ok(Lane::skipped(name, &why)),
        Err(ResolveError::Failed(error)) => {
            let mut lane = Lane::new(name, "");
            lane.check("getting the kernel", Err(error));
            return Ok(lane);
        }
    };
    let mut lane = Lane::new(name, &kernel.version);
    for (test, program) in &tests.programs {
        match run_in_bed(bed, &kernel, program, &tests.libraries, scale) {
            Ok(outcome) => {
                let trouble = outcome.oops.as_deref().unwrap_or("");
                let counts = add_program(&mut lane, test, Some(outcome.status), &outcome.output, trouble);
                if test == "backings" {
                    let enough = if counts.passed == backings {
                        Ok(())
                    } else {
                        Err(anyhow::anyhow!("{} of {backings}:\n{}", counts.passed, outcome.output))
                    };
                    lane.check("every backing that this kernel has", enough);
                }
            }
            Err(error) => lane.check(test, Err(error)),
        }
    }
    Ok(lane)
}

fn run_in_bed(
    bed: &Bed,
    kernel: &bed::ResolvedKernel,
    program: &Path,
    libraries: &Path,
    scale: u32,
) -> Result<bed::Outcome> {
    let mut guest = Guest::new(["/test"]);
    guest.add(program, "/test", &[libraries])?;
    guest.timeout = PROGRAM_TIMEOUT * scale;
    guest.env.push(("KVMPREP_TEST_SCALE".into(), scale.to_string()));
    if scale > 1 {
        // Tests do the same each time; a soak looks for what they have not met.
        guest.env.push(("KVMPREP_DIFF_SEED".into(), bed::seed_of_the_day().to_string()));
    }
    bed::run(bed, kernel, &guest, &mut |_| {})
}

/// Adds what a C test printed. Its status must agree with its counts, and the kernel must not have complained.
fn add_program(lane: &mut Lane, name: &str, status: Option<i32>, output: &str, trouble: &str) -> Counts {
    let mut counts = case_counts(output);
    let is_consistent = status == Some(i32::from(counts.failed > 0));
    if !is_consistent || !trouble.is_empty() {
        counts.failed += 1;
    }
    let ended =
        status.map_or("by a signal or the time limit".to_string(), |status| format!("with status {status}"));
    lane.add(name, counts, &format!("{output}\nended {ended}\n{trouble}"));
    counts
}
