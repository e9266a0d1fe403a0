//! `cargo xtask test`: everything that judges a change, from a bare machine.
//!
//! Sources first, then the C tests on this machine's KVM and on every kernel of the bed. It judges and counts; it
//! never repairs, and never repeats what failed until it passes.

use crate::abi;
use crate::bed::{self, Bed, Guest, Kernel, ResolveError};
use crate::bench;
use crate::failing_calls;
use crate::fuzz;
use crate::install;
use crate::lanes::{self, Counts, Kvm, Lane, cargo_counts, case_counts};
use crate::launches;
use crate::man;
use crate::model;
use crate::msrv;
use crate::programs::{self, Programs};
use crate::project;
use crate::quick;
use crate::setup;
use crate::stock_qemu;
use anyhow::{Context, Result, anyhow, ensure};
use std::fmt::Debug;
use std::ops::RangeBounds;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

#[derive(clap::Args)]
pub struct Cli {
    /// What can be judged on any machine within a minute: the C tests on the software model. No bed, root, network or KVM.
    #[arg(long, conflicts_with = "lanes")]
    quick: bool,
    /// Only these lanes: source, msrv, install, model, model-qemu, native, 6.1, 6.12, newest, private; qemu must be
    /// named.
    #[arg(long = "lane", value_name = "LANE")]
    lanes: Vec<String>,
    /// Only these C tests.
    #[arg(long = "program", value_name = "NAME")]
    programs: Vec<String>,
}

/// The kernels of the bed, with the backings that each must show without a fault: one that is skipped there by
/// mistake would otherwise go unseen.
pub const KERNELS: [(&str, u64); 4] = [("6.1", 7), ("6.12", 7), ("newest", 8), ("private", 9)];

pub fn main(cli: Cli) -> Result<()> {
    if cli.quick {
        return quick::main(&cli.programs);
    }
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
    if wants("model") {
        lanes.extend(quick::lanes(&tests)?);
    }
    if wants("model-qemu") {
        lanes.push(stock_qemu::lane(&bed, &quick::build_model()?));
    }
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

/// The C tests, built, and the comparison with the model.
pub struct Tests {
    pub programs: Vec<(String, PathBuf)>,
    pub libraries: PathBuf,
}

impl Tests {
    /// Builds all, or those named.
    pub fn build(only: &[String]) -> Result<Self> {
        let mut tests = Self::build_c(only)?;
        if only.is_empty() || only.iter().any(|name| name == programs::DIFF_MODEL) {
            tests.programs.push((programs::DIFF_MODEL.into(), programs::build_diff_model()?));
        }
        ensure!(!tests.programs.is_empty(), "no C test of that name");
        Ok(tests)
    }

    /// The C tests alone.
    pub fn build_c(only: &[String]) -> Result<Self> {
        let build = Programs::prepare()?;
        let mut programs = Vec::new();
        for name in programs::test_names()? {
            if only.is_empty() || only.contains(&name) {
                let program =
                    if name == abi::CALLERS { abi::build_callers(&build)? } else { build.build(&name)? };
                programs.push((name, program));
            }
        }
        Ok(Self { programs, libraries: build.library_dir().to_path_buf() })
    }

    /// Those that have something to do on a real KVM.
    fn for_kvm(&self) -> impl Iterator<Item = &(String, PathBuf)> {
        self.programs.iter().filter(|(name, _)| !name.starts_with(programs::OF_THE_MODEL))
    }
}

/// What the sources say of themselves: format, lints, unit tests, the interface.
fn source_lane(bed: &Bed) -> Result<Lane> {
    setup::require_packages(&["abigail-tools", "clang-format-19", "clang-19", "g++"])?;
    let mut lane = Lane::new("source");
    lane.check("rustfmt", cargo_check(&["fmt", "--all", "--", "--check"]));
    lane.check("clang-format", clang_format());
    lane.check(
        "clippy",
        cargo_check(&["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]),
    );
    lane.check("rustdoc", rustdoc());
    cargo_tests(&mut lane, "cargo test", &["test", "--workspace", "--no-fail-fast"], &[]);
    cargo_tests(&mut lane, "cargo test, AddressSanitizer", SANITIZED, &sanitizer_environment());
    launches::TABLE.check(&mut lane);
    failing_calls::TABLE.check(&mut lane);
    cargo_tests(&mut lane, "conversions that race, in every order", RACES, &RACES_ENVIRONMENT);
    cargo_tests(&mut lane, "mappings that race, in every order", MODEL_RACES, &MODEL_RACES_ENVIRONMENT);
    cargo_tests(&mut lane, "threads at a virtual machine, ThreadSanitizer", THREADS, &THREADS_ENVIRONMENT);
    lane.check("fuzzing, the fixed programs", fuzz::check_seeds());
    let built = Programs::prepare()?;
    abi::check(&mut lane, &built, bed);
    lane.check("the README's examples", readme_examples(&built));
    man::check(&mut lane, &built);
    lane.check("the drawings of the model", model::check());
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

/// src/private/races.rs. Nothing else can run where locks are loom's.
const RACES: &[&str] = &["test", "--package", "kvmprep", "--lib", "private::races"];

const RACES_ENVIRONMENT: [(&str, &str); 4] = [
    ("RUSTFLAGS", "--cfg loom"),
    ("CARGO_TARGET_DIR", "target/kvmprep/races"),
    // Half of the time goes into debug information that nobody reads.
    ("CARGO_PROFILE_DEV_DEBUG", "0"),
    ("CARGO_INCREMENTAL", "0"),
];

/// model/src/mmu/races.rs, of which there are more orders: it takes the optimizer less time than it saves.
const MODEL_RACES: &[&str] = &["test", "--package", "kvmprep-model", "--lib", "mmu::races"];

const MODEL_RACES_ENVIRONMENT: [(&str, &str); 5] = [
    ("RUSTFLAGS", "--cfg loom"),
    ("CARGO_TARGET_DIR", "target/kvmprep/races"),
    ("CARGO_PROFILE_DEV_DEBUG", "0"),
    ("CARGO_PROFILE_DEV_OPT_LEVEL", "1"),
    ("CARGO_INCREMENTAL", "0"),
];

/// model/tests/threads.rs, with locks that ThreadSanitizer sees through.
const THREADS: &[&str] =
    &["test", "--package", "kvmprep-model", "--test", "threads", "--target", "x86_64-unknown-linux-gnu"];

const THREADS_ENVIRONMENT: [(&str, &str); 6] = [
    ("RUSTC_BOOTSTRAP", "1"),
    ("RUSTFLAGS", "--cfg tsan -Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer"),
    ("CARGO_TARGET_DIR", "target/kvmprep/threads"),
    ("CARGO_PROFILE_DEV_DEBUG", "0"),
    ("CARGO_PROFILE_DEV_OPT_LEVEL", "1"),
    ("CARGO_INCREMENTAL", "0"),
];

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
    add_cargo_tests(lane, what, &cargo.output().context("cannot start cargo"));
}

/// Adds what a `cargo test` came to.
pub fn add_cargo_tests(lane: &mut Lane, what: &str, outcome: &Result<Output>) {
    match outcome {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            let mut counts = cargo_counts(&text);
            // A crash of the test program counts no test as failed.
            counts.failed = counts.failed.max(u64::from(!output.status.success()));
            lane.add(what, counts, &text);
        }
        Err(error) => lane.check(what, Err(anyhow!("{error:#}"))),
    }
}

fn c_sources() -> Result<Vec<PathBuf>> {
    const DIRECTORIES: [&str; 7] = [
        "c-tests",
        "c-tests/diff_memslots",
        "c-tests/support",
        "consumers/src",
        "model/diff/src",
        "xtask/src/bed",
        "xtask/src/bed/vmm/converter",
    ];
    let mut files = Vec::new();
    for directory in DIRECTORIES {
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

/// The C examples in the README are what these files of c-tests/ hold from there on, which are compiled here.
fn readme_examples(programs: &Programs) -> Result<()> {
    let readme =
        std::fs::read_to_string(project::root().join("README.md")).context("cannot read README.md")?;
    for (name, start) in [("example", "#include"), ("example_private", "/*\n * After KVM_RUN")] {
        let source = std::fs::read_to_string(project::root().join(format!("c-tests/{name}.c")))
            .with_context(|| format!("cannot read c-tests/{name}.c"))?;
        let code = source.find(start).map(|at| source[at..].trim());
        let is_shown = code.is_some_and(|code| readme.contains(code));
        ensure!(is_shown, "README.md does not show c-tests/{name}.c from \"{start}\" on");
        programs.build_object(name)?;
    }
    Ok(())
}

/// The C tests on this machine's own KVM, whatever it is.
fn native_lane(tests: &Tests) -> Result<Lane> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Ok(Lane::skipped("native", &format!("/dev/kvm cannot be opened: {error}")));
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut lane = Lane::of_kernel("native", release.trim(), Kvm::Native);
    for (name, program) in tests.for_kvm().filter(|(name, _)| name != programs::DIFF_MODEL) {
        let mut command = programs::timed();
        command.arg(program).env("LD_LIBRARY_PATH", &tests.libraries);
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
            let mut lane = Lane::new(name);
            lane.check("getting the kernel", Err(error));
            return Ok(lane);
        }
    };
    let mut lane = Lane::of_kernel(name, &kernel.version, Kvm::Emulated);
    lane.check("VMs are kept, for the emulator's sake", check_kept_vms(bed, &kernel));
    for (test, program) in tests.for_kvm() {
        match run_in_bed(bed, &kernel, (test, program), &tests.libraries, scale) {
            Ok(outcome) => {
                let trouble = outcome.oops.as_deref().unwrap_or("");
                let counts = add_program(&mut lane, test, Some(outcome.status), &outcome.output, trouble);
                if test == BACKINGS {
                    check_backings(&mut lane, counts, backings..=backings, &outcome.output);
                }
            }
            Err(error) => lane.check(test, Err(error)),
        }
    }
    Ok(lane)
}

/// Without them a kernel dies now and then, and nothing would say why.
fn check_kept_vms(bed: &Bed, kernel: &bed::ResolvedKernel) -> Result<()> {
    let guest = Guest::new(["sh", "-c", "ls -1d /sys/kernel/debug/kvm/*-*"]);
    let outcome = bed::run(bed, kernel, &guest, &mut |_| {})?;
    let kept = outcome.output.lines().filter(|line| line.starts_with("/sys")).count();
    ensure!(outcome.status == 0 && kept == 2, "{kept} VMs are kept:\n{}", outcome.output);
    Ok(())
}

/// The C test that shows each backing, those skipped that are not to be had.
pub const BACKINGS: &str = "backings";

/// It must have shown so many: one that is skipped by mistake would otherwise go unseen.
pub fn check_backings(lane: &mut Lane, counts: Counts, expected: impl RangeBounds<u64> + Debug, said: &str) {
    let enough = if expected.contains(&counts.passed) {
        Ok(())
    } else {
        Err(anyhow!("{} of {expected:?}:\n{said}", counts.passed))
    };
    lane.check("every backing that this kernel has", enough);
}

fn run_in_bed(
    bed: &Bed,
    kernel: &bed::ResolvedKernel,
    (name, program): (&str, &Path),
    libraries: &Path,
    scale: u32,
) -> Result<bed::Outcome> {
    let mut guest = Guest::new(["/test"]);
    guest.add(program, "/test", &[libraries])?;
    guest.timeout = programs::timeout(scale);
    if name == programs::DIFF_MODEL {
        guest.cpus = programs::DIFF_MODEL_CPUS;
    }
    if name == "slot_race" {
        // See "A pre-fault that saw no memslot" in docs/kernel-behaviour.md.
        guest.known_warnings = &["kvm_tdp_mmu_map"];
    }
    guest.env.push(("KVMPREP_TEST_SCALE".into(), scale.to_string()));
    if scale > 1 {
        // Tests do the same each time; a soak looks for what they have not met.
        guest.env.push(("KVMPREP_DIFF_SEED".into(), bed::seed_of_the_day().to_string()));
    }
    bed::run(bed, kernel, &guest, &mut |_| {})
}

/// Adds what a C test printed. Its status must agree with its counts, and the kernel must not have complained.
pub fn add_program(lane: &mut Lane, name: &str, status: Option<i32>, output: &str, trouble: &str) -> Counts {
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
