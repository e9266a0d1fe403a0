//! `cargo xtask test --quick`: what can be judged on any machine within a minute.
//!
//! The library's own tests, and the C tests on the software model, as several kernels would have it: no bed, no root, no
//! network, no KVM. Several programs run at a time, so none of them may change the machine's settings; what cannot be done
//! without is skipped by the test itself, with its reason.

use crate::lanes::{self, Kvm, Lane};
use crate::programs;
use crate::project;
use crate::test::{BACKINGS, Tests, add_cargo_tests, add_program, check_backings};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// A kernel that the model is to be, and what VMs it has.
struct Personality {
    name: &'static str,
    kernel: &'static str,
    vm_types: &'static str,
    /// The backings that must be shown without a fault, those of a pool of huge pages apart.
    backings: u64,
    /// Which programs have something to do there.
    takes: fn(&str) -> bool,
}

const PERSONALITIES: [Personality; 6] = [
    Personality { name: "model 6.1", kernel: "6.1", vm_types: "default", backings: 5, takes: is_for_all },
    Personality { name: "model 6.12", kernel: "6.12", vm_types: "default", backings: 5, takes: is_for_all },
    Personality { name: "model newest", kernel: "7.3", vm_types: "default", backings: 6, takes: is_for_all },
    Personality {
        name: "model private",
        kernel: "7.3",
        vm_types: "default,sw_protected",
        backings: 7,
        takes: is_for_all,
    },
    Personality {
        name: "model 6.18 TDX, SNP",
        kernel: "6.18",
        vm_types: "default,tdx,snp",
        backings: 0,
        takes: is_for_the_model,
    },
    Personality {
        name: "model TDX, SNP",
        kernel: "7.3",
        vm_types: "default,tdx,snp",
        backings: 0,
        takes: is_for_the_model,
    },
];

fn is_for_the_model(program: &str) -> bool {
    program.starts_with(programs::OF_THE_MODEL)
}

fn is_for_all(program: &str) -> bool {
    !is_for_the_model(program) && program != programs::DIFF_MODEL
}

/// These take longest, so they begin first.
const LONGEST: [&str; 5] = [UNIT_TESTS, "conversions", "hostile_guest", "conversion_faults", "slot_race"];
const UNIT_TESTS: &str = "cargo test";

/// `cargo xtask test --quick`.
pub fn main(only: &[String]) -> Result<()> {
    let tests = Tests::build_c(only)?;
    let model = build_model()?;
    let mut unit_tests = None;
    if only.is_empty() {
        project::run(unit_test_command().arg("--no-run")).context("the library's tests do not compile")?;
        unit_tests = Some(Job { lane: 0, name: UNIT_TESTS.into(), command: unit_test_command() });
    }
    let started = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let jobs = unit_tests.into_iter().chain(model_jobs(&tests, &model, 1, threads)).collect();
    let done = run(jobs, threads);
    let lanes = std::iter::once(unit_lane(&done)).flatten().chain(model_lanes(&done, 1)).collect::<Vec<_>>();
    lanes::conclude("quick.json", started, &lanes)
}

/// The lanes of the model as one part of `cargo xtask test`: one program at a time, which may change the machine's settings.
pub fn lanes(tests: &Tests) -> Result<Vec<Lane>> {
    let model = build_model()?;
    let done = run(model_jobs(tests, &model, 0, 1), 1);
    Ok(model_lanes(&done, 0).collect())
}

/// Builds what is preloaded: fast, and with each check that Rust can make.
pub fn build_model() -> Result<PathBuf> {
    let mut cargo = project::cargo();
    cargo.args(["build", "--quiet", "--package", "kvmprep-model-preload", "--profile", "fuzz"]);
    project::run(&mut cargo).context("the preloaded model does not compile")?;
    let (built, model) = (
        project::target().join("fuzz/libkvmprep_model_preload.so"),
        project::output()?.join("libkvmprep-model.so"),
    );
    std::fs::copy(&built, &model).with_context(|| format!("cannot make {}", model.display()))?;
    Ok(model)
}

fn unit_test_command() -> Command {
    let mut cargo = project::cargo();
    cargo.args(["test", "--package", "kvmprep", "--lib", "--tests", "--no-fail-fast"]);
    cargo
}

// ---- Programs, several at a time ----

struct Job {
    lane: usize,
    name: String,
    command: Command,
}

struct Done {
    lane: usize,
    name: String,
    outcome: Result<Output>,
}

/// Runs all; `threads` at a time.
fn run(mut jobs: Vec<Job>, threads: usize) -> Vec<Done> {
    jobs.sort_by_key(|job| LONGEST.iter().position(|name| *name == job.name).unwrap_or(LONGEST.len()));
    let next = AtomicUsize::new(0);
    let jobs: Vec<Mutex<Job>> = jobs.into_iter().map(Mutex::new).collect();
    let done = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let mut job = job.lock().expect("taken once");
                    let outcome = job.command.output().with_context(|| format!("cannot start {}", job.name));
                    let (lane, name) = (job.lane, job.name.clone());
                    done.lock().expect("no thread has failed").push(Done { lane, name, outcome });
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no thread has failed");
    done.sort_by(|a, b| (a.lane, &a.name).cmp(&(b.lane, &b.name)));
    done
}

fn model_jobs(tests: &Tests, model: &Path, first_lane: usize, threads: usize) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (lane, personality) in (first_lane..).zip(&PERSONALITIES) {
        for (name, program) in tests.programs.iter().filter(|(name, _)| (personality.takes)(name)) {
            let command = command(personality, program, &tests.libraries, model, threads > 1);
            jobs.push(Job { lane, name: name.clone(), command });
        }
    }
    jobs
}

/// The program with the model before it, both of which `timeout` itself is kept from.
fn command(
    personality: &Personality,
    program: &Path,
    libraries: &Path,
    model: &Path,
    shares_machine: bool,
) -> Command {
    let mut preload = std::ffi::OsString::from("LD_PRELOAD=");
    preload.push(model);
    let mut command = programs::timed();
    command.arg("env").arg(preload).arg(program);
    command.env("LD_LIBRARY_PATH", libraries);
    command.env("KVMPREP_MODEL_KERNEL", personality.kernel);
    command.env("KVMPREP_MODEL_VM_TYPES", personality.vm_types);
    if shares_machine {
        command.env("KVMPREP_TEST_SHARES_MACHINE", "1");
    }
    command
}

// ---- What they came to ----

fn unit_lane(done: &[Done]) -> Option<Lane> {
    let unit = done.iter().find(|done| done.name == UNIT_TESTS)?;
    let mut lane = Lane::new("library");
    add_cargo_tests(&mut lane, UNIT_TESTS, &unit.outcome);
    Some(lane)
}

fn model_lanes(done: &[Done], first_lane: usize) -> impl Iterator<Item = Lane> {
    let numbered = (first_lane..).zip(&PERSONALITIES);
    numbered.filter_map(move |(number, personality)| {
        let own: Vec<&Done> =
            done.iter().filter(|done| done.lane == number && done.name != UNIT_TESTS).collect();
        (!own.is_empty()).then(|| model_lane(personality, &own))
    })
}

fn model_lane(personality: &Personality, done: &[&Done]) -> Lane {
    let mut lane = Lane::of_kernel(personality.name, personality.kernel, Kvm::Modelled);
    for Done { name, outcome, .. } in done {
        let output = match outcome {
            Ok(output) => output,
            Err(error) => {
                lane.check(name, Err(anyhow::anyhow!("{error:#}")));
                continue;
            }
        };
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let counts = add_program(&mut lane, name, output.status.code(), &said, "");
        if *name == BACKINGS {
            check_backings(&mut lane, counts, personality.backings.., &said);
        }
    }
    lane
}
