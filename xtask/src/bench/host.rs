//! The host stage on this machine, against a plain threaded prealloc: `c-tests/bench_host.c`.
//!
//! Needs no KVM. Memory is taken and given back before it is timed, since a machine may itself be a guest that
//! gets its memory only when it first touches it.

use super::rows::Row;
use super::samples::{Samples, slug};
use crate::programs::Programs;
use crate::project;
use anyhow::{Context, Result, ensure};
use std::process::Command;

/// MiB that are populated in each measurement, where the machine has several times as much.
const MEBIBYTES: u64 = 1024;
/// As fast as a plain prealloc, on a machine whose times vary by so much.
const AS_FAST: f64 = 1.03;
/// For shared memfd memory.
const MEMFD_SHARED: f64 = 0.65;

/// Measures every backing with one and two threads, and the methods for shared memfd memory.
pub fn measure(rounds: u32) -> Result<Vec<Row>> {
    let programs = Programs::prepare()?;
    let program = programs.build("bench_host")?;
    let mebibytes = MEBIBYTES.min(available_mebibytes()? / 4) & !3;
    let mut command = Command::new(program);
    command.args([rounds.to_string(), mebibytes.to_string()]).env("LD_LIBRARY_PATH", programs.library_dir());
    let said = project::run(&mut command)?;
    let mut samples = Samples::default();
    for line in said.lines().filter(|line| line.contains("skipped:") || line.contains('|')) {
        if !samples.take(line) {
            println!("{line}");
        }
    }
    ensure!(!samples.is_empty(), "bench_host measured nothing:\n{said}");
    rows(&samples)
}

fn available_mebibytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(kibibytes.context("/proc/meminfo does not say what is available")? >> 10)
}

fn rows(samples: &Samples) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for threads in ["1t", "2t"] {
        for backing in samples.comparisons(&format!(", {threads}")) {
            match backing.strip_suffix(", methods") {
                Some(backing) => rows.extend(methods(samples, backing, threads)?),
                None => rows.push(against_prealloc(samples, backing, threads)?),
            }
        }
    }
    // The comparisons that have bars first.
    rows.sort_by_key(|row| row.id.starts_with("method"));
    Ok(rows)
}

fn against_prealloc(samples: &Samples, backing: &str, threads: &str) -> Result<Row> {
    let what = format!("{backing}, {threads}");
    let (ours, theirs) = (samples.median(&what, "kvmprep")?, samples.median(&what, "prealloc")?);
    let bar = if backing == "memfd, shared" { MEMFD_SHARED } else { AS_FAST };
    Ok(Row::times(format!("host_{}_{threads}", slug(backing)), ours, theirs).ratio_at_most(bar))
}

/// What the library does against each other way of doing it.
fn methods(samples: &Samples, backing: &str, threads: &str) -> Result<Vec<Row>> {
    const OURS: &str = "allocate+populate, 2 MiB";
    let what = format!("{backing}, methods, {threads}");
    let ours = samples.median(&what, OURS)?;
    let others = samples.ways(&what).into_iter().filter(|way| *way != OURS);
    others
        .map(|way| {
            let id = format!("method_{}_{threads}/{}", slug(backing), slug(way));
            Ok(Row::times(id, ours, samples.median(&what, way)?))
        })
        .collect()
}
