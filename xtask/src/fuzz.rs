//! `cargo xtask fuzz`: has libFuzzer choose what the C interface is called with, under AddressSanitizer.
//!
//! The calls, and what must hold of their answers, are in `fuzz/`. It takes the stable toolchain and a C++ compiler, and
//! nothing of cargo-fuzz: that would be one more tool to build and to pin, for the flags in [`COVERAGE`]. A run that did
//! not reach the rules is no success, however quiet it was.

use crate::lanes::Lane;
use crate::project;
use crate::setup;
use crate::test::ADDRESS_SANITIZER;
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

#[derive(clap::Args)]
pub struct Cli {
    /// How long, in seconds.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Where libFuzzer's chances begin.
    #[arg(long, default_value_t = 1)]
    seed: u32,
    /// Run this input once, and print each call.
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
}

/// What tells libFuzzer where a program has been.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The programs that each run begins with. They are random, which reaches most of what there is at once, and the same
/// everywhere.
const SEEDS: u64 = 4096;
const SEED_BYTES: usize = 768;

pub fn main(cli: Cli) -> Result<()> {
    if let Some(input) = cli.replay {
        return replay(&input);
    }
    let figures = run(cli.seconds, cli.seed, true)?;
    let path = project::write_figures("fuzz.json", &figures)?;
    show(&figures);
    println!("{}", path.display());
    Ok(())
}

fn show(figures: &Figures) {
    for (function, [calls, successes]) in &figures.functions {
        println!("{calls:10} calls, {successes:9} of them successes: {function}");
    }
    for (reason, count) in &figures.reasons {
        println!("{count:10} times {reason}");
    }
    let calls: u64 = figures.functions.values().map(|[calls, _]| calls).sum();
    let seen = figures.reasons.values().filter(|count| **count > 0).count();
    let Figures { executions, edges, .. } = figures;
    println!("no finding in {executions} programs of {calls} calls, which reached {edges} edges");
    println!("and {seen} of {} reasons", figures.reasons.len());
}

/// A lane of its own, for as many seconds.
pub fn lane(seconds: u64) -> Lane {
    let mut lane = Lane::new("fuzz");
    lane.check(&format!("the C interface, {seconds} s"), run(seconds, 1, false).map(drop));
    lane
}

/// No finding in the programs that each run begins with. What libFuzzer makes of them is another thing on each machine,
/// and would fail a change for what was there before it.
pub fn check_seeds() -> Result<()> {
    run(ONLY_SEEDS, 1, false).map(drop)
}

/// In place of a time.
const ONLY_SEEDS: u64 = 0;

/// What a run came to.
#[derive(Serialize, Default, Debug, PartialEq)]
struct Figures {
    seconds: u64,
    seed: u32,
    executions: u64,
    edges: u64,
    /// How often each function was called, and did what was asked.
    functions: BTreeMap<String, [u64; 2]>,
    /// How often each reason was given.
    reasons: BTreeMap<String, u64>,
    /// Those that arguments bring about and did not.
    unseen: Vec<String>,
}

/// Fuzzes; an error where there is a finding. A run of its own shows how far it is, and goes on from what the last has
/// collected.
fn run(seconds: u64, seed: u32, is_alone: bool) -> Result<Figures> {
    let program = build()?;
    let directory = directory()?;
    let fresh = tempfile::tempdir_in(&directory)?;
    let corpus = if is_alone { directory.join("corpus") } else { fresh.path().join("corpus") };
    let seeds = fresh.path().join("seeds");
    std::fs::create_dir_all(&corpus)?;
    write_seeds(&seeds)?;
    let mut command = Command::new(&program);
    command
        .arg(if seconds == ONLY_SEEDS { "-runs=0".into() } else { format!("-max_total_time={seconds}") })
        .arg(format!("-seed={seed}"))
        .arg(format!("-artifact_prefix={}/", directory.display()))
        // A program of some thousand bytes makes all the calls that one may.
        .args(["-max_len=2048", "-len_control=0", "-timeout=30", "-print_final_stats=1"])
        .args([corpus, seeds]);
    // The library reads /proc/self/smaps, which takes the longer the more memory is waiting to be freed.
    command.env("ASAN_OPTIONS", "quarantine_size_mb=16");
    let log = directory.join("log");
    let is_without_finding = watch(&mut command, &log, is_alone)?;
    let said = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
    if !is_without_finding {
        bail!("{}\nall of it: {}", finding(&said), log.display());
    }
    let figures = Figures { seconds, seed, ..figures(&said) };
    ensure!(figures.executions >= SEEDS, "only {} programs were run; {}", figures.executions, log.display());
    ensure!(
        figures.unseen.is_empty(),
        "reasons that should have been seen and were not: {:?}",
        figures.unseen
    );
    Ok(figures)
}

fn directory() -> Result<PathBuf> {
    let directory = project::output()?.join("fuzz");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// Builds the program, optimised, with every check that Rust makes and AddressSanitizer.
fn build() -> Result<PathBuf> {
    setup::require_packages(&["g++"])?;
    let target = directory()?.join("build");
    let mut cargo = project::cargo();
    cargo
        .args(["build", "--package", "kvmprep-fuzz", "--features", "libfuzzer", "--profile", "fuzz"])
        .args(["--target", TARGET])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", format!("{ADDRESS_SANITIZER} {COVERAGE}"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", &target);
    project::run(&mut cargo)?;
    Ok(target.join(TARGET).join("fuzz/kvmprep-fuzz"))
}

fn write_seeds(directory: &Path) -> Result<()> {
    std::fs::create_dir(directory)?;
    let mut state = 0;
    for number in 0..SEEDS {
        let words = std::iter::repeat_with(|| next_random(&mut state).to_le_bytes());
        let bytes: Vec<u8> = words.flatten().take(SEED_BYTES).collect();
        std::fs::write(directory.join(number.to_string()), bytes)?;
    }
    Ok(())
}

/// SplitMix64.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Runs libFuzzer, writes what it says to a file, and may show how far it is. Returns whether it ended well.
fn watch(command: &mut Command, log: &Path, shows: bool) -> Result<bool> {
    let mut file = std::fs::File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let lines = BufReader::new(child.stderr.take().context("no pipe")?);
    for line in lines.split(b'\n') {
        let line = line?;
        file.write_all(&line)?;
        file.write_all(b"\n")?;
        let line = String::from_utf8_lossy(&line);
        if shows
            && line.starts_with('#')
            && ["INITED", "pulse", "DONE"].iter().any(|word| line.contains(word))
        {
            println!("{line}");
        }
    }
    Ok(child.wait()?.success())
}

/// The part that says what was found.
fn finding(said: &str) -> String {
    let beginnings = ["finding:", "==ERROR", "ERROR:", "==WARNING"];
    let is_beginning = |line: &&str| beginnings.iter().any(|word| line.contains(word));
    let start =
        said.lines().position(|line| is_beginning(&line)).unwrap_or(said.lines().count().saturating_sub(30));
    // What lies beneath the program in a stack is the same each time.
    let is_ours = |line: &&str| !line.contains("rust_fuzzer_test_input");
    let mut text: Vec<&str> = said.lines().skip(start).take(60).take_while(is_ours).collect();
    let written = said.lines().find(|line| line.contains("Test unit written to"));
    text.extend(written);
    text.join("\n") + "\ncargo xtask fuzz --replay FILE prints each call of it"
}

/// Reads what libFuzzer and the program have printed.
fn figures(said: &str) -> Figures {
    let mut figures = Figures::default();
    for line in said.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |text: &str| text.parse().unwrap_or(0);
        match words[..] {
            ["stat::number_of_executed_units:", n] => figures.executions = number(n),
            ["seen:", "function", name, calls, "calls", successes, "successes"] => {
                figures.functions.insert(name.into(), [number(calls), number(successes)]);
            }
            ["seen:", "reason", name, n, "by", how] => {
                figures.reasons.insert(name.into(), number(n));
                if how == "arguments" && number(n) == 0 {
                    figures.unseen.push(name.into());
                }
            }
            [_, "DONE", "cov:", n, ..] => figures.edges = number(n),
            _ => {}
        }
    }
    figures
}

fn replay(input: &Path) -> Result<()> {
    ensure!(input.is_file(), "{} is no file", input.display());
    let status = Command::new(build()?)
        .arg(input)
        .env("KVMPREP_FUZZ_TRACE", "1")
        .status()
        .context("cannot start the fuzz target")?;
    ensure!(status.success(), "the input is a finding");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_what_is_printed() {
        let said = "#7\tDONE   cov: 1234 ft: 99 corp: 3/4b lim: 4 exec/s: 7 rss: 50Mb\n\
                    stat::number_of_executed_units: 7\nseen: function kvmprep_probe 70 calls 60 successes\n\
                    seen: reason none 5 by arguments\nseen: reason poisoned 0 by chance\n\
                    seen: reason bad-fd 0 by arguments\n";
        let figures = figures(said);
        assert_eq!((figures.executions, figures.edges), (7, 1234));
        assert_eq!(figures.functions["kvmprep_probe"], [70, 60]);
        assert_eq!((figures.reasons["none"], figures.reasons.len()), (5, 3));
        assert_eq!(figures.unseen, ["bad-fd"]);
    }

    #[test]
    fn a_finding_is_shown_from_its_first_line() {
        let said = "#1 NEW\nfinding: panicked at x\nstack\n 9: rust_fuzzer_test_input\n 10: main\n\
                    Test unit written to /crash-1\n";
        let shown = finding(said);
        assert!(shown.starts_with("finding: panicked at x\nstack"), "{shown}");
        assert!(shown.contains("/crash-1") && !shown.contains("main"));
    }
}
