//! `cargo xtask demo`: the main job, shown. A C program runs a real guest for every backing and four ways of
//! getting its memory ready, and the faults that are left are put side by side.
//!
//! It runs on the machine's own KVM where that can pre-fault, else in the bed, and says which.

use crate::bed::{self, Bed, Guest, Kernel};
use crate::programs::Programs;
use crate::project;
use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

#[derive(clap::Args)]
pub struct Cli {
    /// MiB of guest memory in each run.
    #[arg(long, default_value_t = 64)]
    mebibytes: u64,
    /// Show guest_memfd's private memory too: in the bed, on a kernel built for it.
    #[arg(long)]
    private: bool,
    /// In the bed even where this machine's KVM could do it.
    #[arg(long)]
    bed: bool,
}

/// The four ways, as the program and the figures call them, and as people do.
const WAYS: [(&str, &str); 4] =
    [("nothing", "nothing"), ("ioctl", "ioctl only"), ("prealloc", "prealloc only"), ("kvmprep", "kvmprep")];

#[derive(Serialize)]
struct Figures {
    host: Host,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Host {
    kernel: String,
    kvm: &'static str,
}

#[derive(Serialize, Debug, PartialEq)]
struct Row {
    backing: String,
    way: String,
    faults_left: u64,
    guest_ms: f64,
    populate_ms: f64,
}

pub fn main(cli: Cli) -> Result<()> {
    let programs = Programs::prepare()?;
    let program = programs.build("demo")?;
    let mut lines = Lines::new();
    let in_bed = cli.private || cli.bed || !hardware_can_pre_fault(&program, programs.library_dir());
    let host = if in_bed {
        run_in_bed(&cli, &program, programs.library_dir(), &mut lines)?
    } else {
        run_here(&cli, &program, programs.library_dir(), &mut lines)?
    };
    let Lines { rows, without, bar, .. } = lines;
    bar.finish_and_clear();
    ensure!(!rows.is_empty(), "the demonstration printed no figures");
    print_table(&host, cli.mebibytes, &rows, &without);
    let left: u64 = rows.iter().filter(|row| row.way == "kvmprep").map(|row| row.faults_left).sum();
    let path = project::write_figures("demo.json", &Figures { host, rows })?;
    println!("\nFigures: {}", path.display());
    ensure!(left == 0, "kvmprep left {left} faults: that is a defect, please report it");
    Ok(())
}

fn native(program: &Path, libraries: &Path, argument: &str) -> Command {
    let mut command = Command::new(program);
    command.arg(argument).env("LD_LIBRARY_PATH", libraries);
    command
}

/// Whether this machine's own KVM has the ioctl. Anything short of a clear yes is a no: there is the bed.
fn hardware_can_pre_fault(program: &Path, libraries: &Path) -> bool {
    project::run(&mut native(program, libraries, "probe")).is_ok_and(|said| said.contains("pre_fault|1"))
}

fn run_here(cli: &Cli, program: &Path, libraries: &Path, lines: &mut Lines) -> Result<Host> {
    let mut command = native(program, libraries, &cli.mebibytes.to_string());
    let mut child = command.stdout(Stdio::piped()).spawn().context("cannot start the demonstration")?;
    let output = child.stdout.take().context("the demonstration has no output")?;
    for line in BufReader::new(output).lines() {
        lines.take(&line?);
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("the demonstration failed ({status}):\n{}", lines.rest.join("\n"));
    }
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(Host { kernel: kernel.trim().into(), kvm: "hardware" })
}

fn run_in_bed(cli: &Cli, program: &Path, libraries: &Path, lines: &mut Lines) -> Result<Host> {
    let bed = Bed::open()?;
    let kernel = if cli.private { Kernel::Private } else { Kernel::named("newest")? };
    let kernel = bed.resolve(&kernel)?;
    let mut guest = Guest::new(["/demo".to_string(), cli.mebibytes.to_string()]);
    guest.add(program, "/demo", &[libraries])?;
    guest.memory_mib = 768 + 4 * cli.mebibytes;
    guest.timeout = Duration::from_secs(600 + 10 * cli.mebibytes);
    let outcome = bed::run(&bed, &kernel, &guest, &mut |line| lines.take(line))?;
    ensure!(outcome.status == 0, "the demonstration failed:\n{}", outcome.output);
    Ok(Host { kernel: kernel.version.clone(), kvm: "emulated" })
}

/// What the program prints, line by line.
struct Lines {
    rows: Vec<Row>,
    without: Vec<(String, String)>,
    rest: Vec<String>,
    bar: ProgressBar,
}

impl Lines {
    fn new() -> Self {
        // Nine backings at most, four ways; those that this kernel lacks are taken off as they are named.
        let bar = ProgressBar::new(9 * WAYS.len() as u64);
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message("starting the guest");
        bar.tick();
        Self { rows: Vec::new(), without: Vec::new(), rest: Vec::new(), bar }
    }

    fn take(&mut self, line: &str) {
        let fields: Vec<&str> = line.trim_end().split('|').collect();
        match fields[..] {
            ["next", backing, way] => self.bar.set_message(format!("{backing}: {way}")),
            ["without", backing, why] => {
                self.without.push((backing.into(), why.into()));
                self.bar.dec_length(WAYS.len() as u64);
            }
            ["row", ..] => match parse_row(&fields[1..]) {
                Some(row) => {
                    self.rows.push(row);
                    self.bar.inc(1);
                }
                None => self.rest.push(line.into()),
            },
            _ => self.rest.push(line.into()),
        }
    }
}

fn parse_row(fields: &[&str]) -> Option<Row> {
    let [backing, way, faults, guest, populate] = fields else { return None };
    Some(Row {
        backing: (*backing).into(),
        way: (*way).into(),
        faults_left: faults.parse().ok()?,
        guest_ms: guest.parse().ok()?,
        populate_ms: populate.parse().ok()?,
    })
}

fn print_table(host: &Host, mebibytes: u64, rows: &[Row], without: &[(String, String)]) {
    println!(
        "A guest writes one word to each 4 KiB page of {mebibytes} MiB. Linux {}, KVM: {}.",
        host.kernel, host.kvm
    );
    if host.kvm == "emulated" {
        println!(
            "(Real kernel, real KVM, emulated CPU: the faults are exact, times compare within a row only.)"
        );
    }
    println!(
        "For each way of preparing its memory: stage-2 faults left, guest time, population time (ms).\n"
    );
    print!("{:22}", "backing");
    for (_, title) in WAYS {
        print!(" | {title:^25}");
    }
    print!("\n{:22}", "");
    for _ in WAYS {
        print!(" | {:>7} {:>8} {:>8}", "faults", "guest", "populate");
    }
    println!("\n{}", "-".repeat(22 + WAYS.len() * 28));
    let mut backings: Vec<&str> = rows.iter().map(|row| row.backing.as_str()).collect();
    backings.dedup();
    for backing in backings {
        print!("{backing:22}");
        for (way, _) in WAYS {
            match rows.iter().find(|row| row.backing == backing && row.way == way) {
                Some(row) => {
                    print!(" | {:>7} {:>8.1} {:>8.1}", row.faults_left, row.guest_ms, row.populate_ms)
                }
                None => print!(" | {:>25}", "-"),
            }
        }
        println!();
    }
    for (backing, why) in without {
        println!("{backing:22} | not here: {why}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_and_a_broken_one_is_not() {
        let row = parse_row(&["memfd, shared", "kvmprep", "0", "1.5", "20.25"]).unwrap();
        assert_eq!((row.faults_left, row.guest_ms, row.populate_ms), (0, 1.5, 20.25));
        assert_eq!(parse_row(&["memfd, shared", "kvmprep", "none", "1.5", "20.25"]), None);
        assert_eq!(parse_row(&["memfd, shared"]), None);
    }
}
