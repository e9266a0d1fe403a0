//! `cargo xtask bed diff`: random operations, put to the library or the model and to real kernels, which must agree.
//!
//! A program of `c-tests/`, or for the model `model/diff`, does the operations and judges the answers; here it is run on
//! every kernel with a seed of the day, and what it reports is kept. A run with a mismatch, or with fewer operations than
//! were asked for, has failed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{Bed, Guest, Kernel, ResolveError, mistakes};
use crate::lanes::{self, case_counts};
use crate::programs::{self, Programs};
use crate::{project, test};

/// The arguments of `cargo xtask bed diff`.
#[derive(Args)]
pub struct Cli {
    /// What is compared.
    what: What,
    /// Only on these kernels: 6.1, 6.12, newest, private, native (this machine's own).
    #[arg(long = "kernel", value_name = "NAME")]
    kernels: Vec<String>,
    /// How many operations on each kernel.
    #[arg(long, value_name = "N")]
    operations: Option<u64>,
    /// The seed; from the clock when there is none. The same seed does the same on the same kernel.
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Has the model make mistakes, each of which must be found.
    #[arg(long, conflicts_with_all = ["kernels", "operations"])]
    mistakes: bool,
}

/// What can be compared.
#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// The check of memslots, with what KVM_SET_USER_MEMORY_REGION answers.
    Memslots,
    /// The prediction of page sizes, with what KVM has mapped after a population.
    Prediction,
    /// The model, with all of KVM's memory side that it is of.
    Model,
}

/// What a comparison needs.
struct Needs {
    program: &'static str,
    figures: &'static str,
    operations: u64,
    memory_mib: u64,
    cpus: u32,
    /// For the kernel's command line.
    kernel_args: &'static [&'static str],
    /// Has the kernel that is built here make memslots of its own.
    internal_slots: bool,
    /// For booting and setting up.
    time: Duration,
    time_per_operation: Duration,
}

impl What {
    fn needs(self) -> Needs {
        match self {
            What::Memslots => Needs {
                program: "diff_memslots",
                figures: "diff-memslots.json",
                operations: 100_000,
                memory_mib: 1024,
                cpus: 2,
                internal_slots: true,
                kernel_args: &[],
                time: Duration::from_secs(60),
                time_per_operation: Duration::from_millis(10),
            },
            What::Prediction => Needs {
                program: "diff_prediction",
                figures: "diff-prediction.json",
                operations: 400,
                // Room for a page of 1 GiB, which the kernel finds for sure only while it boots.
                memory_mib: 4096,
                cpus: 2,
                kernel_args: &["hugepagesz=1G", "hugepages=1"],
                internal_slots: false,
                time: Duration::from_secs(120),
                time_per_operation: Duration::from_secs(1),
            },
            What::Model => Needs {
                program: programs::DIFF_MODEL,
                figures: "diff-model.json",
                operations: 1_000_000,
                memory_mib: 1024,
                cpus: programs::DIFF_MODEL_CPUS,
                kernel_args: &[],
                internal_slots: false,
                time: Duration::from_secs(120),
                time_per_operation: Duration::from_millis(10),
            },
        }
    }
}

/// Has KVM take the CPU for one with AVIC, where it makes a memslot for the APIC's page. Only where KVM is built in do
/// its parameters come from the command line; and no vCPU may run, since there is no AVIC.
const PRETENDED_AVIC: [&str; 2] = ["kvm_amd.avic=1", "kvm_amd.force_avic=1"];

/// This machine's own kernel, by the name it has here.
const NATIVE: &str = "native";

#[derive(Serialize)]
struct Figures {
    rows: Vec<Row>,
}

/// What came of one kernel.
#[derive(Serialize)]
struct Row {
    kernel: String,
    release: String,
    #[serde(flatten)]
    report: Report,
}

/// What a program reports of itself.
#[derive(Serialize, Debug, Default, PartialEq, Clone, Copy)]
struct Report {
    seed: u64,
    operations: u64,
    mismatches: u64,
}

/// A program that was run to its end.
struct Ran {
    release: String,
    output: String,
    /// Why it counts as failed by itself, whatever it reports.
    trouble: Option<String>,
}

/// A comparison under way.
struct Comparison<'a> {
    bed: &'a Bed,
    programs: Programs,
    needs: Needs,
    program: PathBuf,
    operations: u64,
    seed: u64,
}

/// Carries out the command.
pub fn main(bed: &Bed, cli: &Cli) -> Result<()> {
    if cli.mistakes {
        ensure!(matches!(cli.what, What::Model), "only the model makes mistakes");
        return lanes::conclude("mistakes-lane.json", Instant::now(), &[mistakes::lane(bed, cli.seed)?]);
    }
    let needs = cli.what.needs();
    let programs = Programs::prepare()?;
    let comparison = Comparison {
        bed,
        program: match cli.what {
            What::Model => programs::build_diff_model()?,
            What::Memslots | What::Prediction => programs.build(needs.program)?,
        },
        programs,
        operations: cli.operations.unwrap_or(needs.operations),
        seed: cli.seed.unwrap_or_else(seed_of_the_day),
        needs,
    };
    println!("seed {}, {} operations on each kernel", comparison.seed, comparison.operations);
    let (rows, failed) = comparison.on_all(&cli.kernels)?;
    ensure!(!rows.is_empty() || !failed.is_empty(), "no kernel could be had");
    let path = project::write_figures(comparison.needs.figures, &Figures { rows })?;
    println!("\nFigures: {}", path.display());
    ensure!(failed.is_empty(), "failed on {}", failed.join(", "));
    Ok(())
}

/// A seed that is another each time, for runs that are to find what none has found yet.
pub fn seed_of_the_day() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Comparison<'_> {
    /// On the kernels named, or on all that there are; answers with the names of those on which it failed as well.
    fn on_all(&self, named: &[String]) -> Result<(Vec<Row>, Vec<String>)> {
        // The comparison with the model must have a machine for itself.
        let native = (self.needs.program != programs::DIFF_MODEL).then(|| NATIVE.to_string());
        let all = || test::KERNELS.iter().map(|(name, _)| name.to_string()).chain(native.clone());
        let kernels = if named.is_empty() { all().collect() } else { named.to_vec() };
        let (mut rows, mut failed) = (Vec::new(), Vec::new());
        for name in kernels {
            println!("\n== {name}");
            let ran = match self.on(&name) {
                Ok(ran) => ran,
                Err(ResolveError::Unavailable(why)) if named.is_empty() => {
                    println!("SKIPPED: {why}");
                    continue;
                }
                Err(error) => return Err(error).with_context(|| format!("kernel {name}")),
            };
            let report = report_of(&ran.output);
            if let Err(error) = self.judge(&ran, &report) {
                println!("FAILED: {error:#}");
                failed.push(name.clone());
            }
            rows.push(Row { kernel: name, release: ran.release, report });
        }
        Ok((rows, failed))
    }

    fn on(&self, name: &str) -> Result<Ran, ResolveError> {
        if name == NATIVE {
            return self.natively();
        }
        let kernel = self.bed.resolve(&Kernel::named(name)?)?;
        let mut guest = Guest::new(["/diff"]);
        guest.add(&self.program, "/diff", &[self.programs.library_dir()])?;
        guest.memory_mib = self.needs.memory_mib;
        guest.cpus = self.needs.cpus;
        guest.kernel_args = self.needs.kernel_args.iter().map(|arg| arg.to_string()).collect();
        guest.timeout = self.time();
        guest.env = self.environment().into();
        if self.needs.internal_slots && name == Kernel::Private.name() {
            guest.kernel_args.extend(PRETENDED_AVIC.map(String::from));
            guest.env.push(("KVMPREP_DIFF_INTERNAL_SLOTS".into(), "1".into()));
        }
        let outcome = super::run(self.bed, &kernel, &guest, &mut |line| println!("{line}"))?;
        let trouble = outcome
            .oops
            .map(|line| format!("the kernel reported trouble: {line}"))
            .or((outcome.status != 0).then(|| format!("it ended with status {}", outcome.status)));
        Ok(Ran { release: kernel.version.clone(), output: outcome.output, trouble })
    }

    fn natively(&self) -> Result<Ran, ResolveError> {
        if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            return Err(ResolveError::Unavailable(format!("/dev/kvm cannot be opened: {error}")));
        }
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let output = limited(&self.program, self.time())
            .envs(self.environment())
            .env("LD_LIBRARY_PATH", self.programs.library_dir())
            .output()
            .context("cannot start the program")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        print!("{text}");
        let counts = case_counts(&text);
        if counts.skipped > 0 && counts.passed + counts.failed == 0 {
            return Err(ResolveError::Unavailable("every case was skipped, see above".into()));
        }
        let trouble = (!output.status.success()).then(|| format!("it ended with {}", output.status));
        Ok(Ran { release: release.trim().into(), output: text, trouble })
    }

    fn environment(&self) -> [(String, String); 2] {
        [
            ("KVMPREP_DIFF_SEED".into(), self.seed.to_string()),
            ("KVMPREP_DIFF_OPERATIONS".into(), self.operations.to_string()),
        ]
    }

    fn time(&self) -> Duration {
        let operations = u32::try_from(self.operations).unwrap_or(u32::MAX);
        self.needs.time + self.needs.time_per_operation * operations
    }

    fn judge(&self, ran: &Ran, report: &Report) -> Result<()> {
        if report.mismatches > 0 {
            bail!("{} mismatches", report.mismatches);
        }
        ensure!(
            report.operations >= self.operations,
            "{} operations were done of {}",
            report.operations,
            self.operations
        );
        ensure!(report.seed == self.seed, "seed {} was used, not {}", report.seed, self.seed);
        ran.trouble.as_ref().map_or(Ok(()), |trouble| bail!("{trouble}"))
    }
}

/// A program that is ended when it takes too long.
fn limited(program: &Path, time: Duration) -> Command {
    let mut command = Command::new("timeout");
    command.arg("--kill-after=5").arg(time.as_secs().to_string()).arg(program);
    command
}

/// Adds up what the program has reported, which may be in parts.
fn report_of(output: &str) -> Report {
    let parts = output.lines().filter_map(report_line);
    parts.fold(Report::default(), |sum, part| Report {
        seed: part.seed,
        operations: sum.operations + part.operations,
        mismatches: sum.mismatches + part.mismatches,
    })
}

fn report_line(line: &str) -> Option<Report> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["diff:", "seed", seed, "operations", operations, "mismatches", mismatches] = words[..] else {
        return None;
    };
    Some(Report {
        seed: seed.parse().ok()?,
        operations: operations.parse().ok()?,
        mismatches: mismatches.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reported_in_parts_is_added_up() {
        let output = "ok something\ndiff: seed 7 operations 100 mismatches 0\n\
                      diff: seed 7 operations 20 mismatches 3\ncases: 2 passed, 0 failed, 0 skipped\n";
        assert_eq!(report_of(output), Report { seed: 7, operations: 120, mismatches: 3 });
    }

    #[test]
    fn what_is_no_report_counts_nothing() {
        assert_eq!(report_of("diff: seed 7 operations many mismatches 0\ndiff: seed 7\n"), Report::default());
    }
}
