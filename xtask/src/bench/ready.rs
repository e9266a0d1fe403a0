//! The whole job in the bed, for every backing: `c-tests/bench_ready.c` on the newest kernel, and for private
//! guest_memfd on the one built for it.
//!
//! Faults are exact. Times under emulation mean something only against each other, within one comparison.

use super::rows::{Row, worst};
use super::samples::{Samples, slug};
use crate::bed::{self, Bed, Guest, Kernel};
use crate::programs::Programs;
use anyhow::{Result, ensure};
use std::path::Path;
use std::time::Duration;

/// MiB that are made ready in each measurement.
const MEBIBYTES: u64 = 256;
/// Two vCPUs against one.
const TWO_AGAINST_ONE: f64 = 0.62;
/// Two vCPUs against what is written by hand for one.
const AGAINST_HAND: f64 = 0.65;

/// The comparisons' suffixes, and the ways, as the program names them.
pub const FAULTS: &str = ", faults left";
pub const TIME: &str = ", time to ready";
pub const NOTHING: &str = "nothing";
pub const IOCTL_ONLY: &str = "ioctl only";
pub const PREALLOC_ONLY: &str = "prealloc only";
pub const BY_HAND: &str = "by hand";
pub const ONE_VCPU: &str = "kvmprep, 1 vCPU";
pub const TWO_VCPUS: &str = "kvmprep, 2 vCPUs";

/// Runs the program on both kernels.
pub fn measure(rounds: u32) -> Result<Samples> {
    let programs = Programs::prepare()?;
    let program = programs.build("bench_ready")?;
    let bed = Bed::open()?;
    let mut samples = Samples::default();
    let private: &[&str] = &["ready_gmem_private", "methods_gmem_private"];
    for (kernel, cases) in [(Kernel::named("newest")?, &[][..]), (Kernel::Private, private)] {
        run(&bed, &kernel, &program, programs.library_dir(), rounds, cases, &mut samples)?;
    }
    Ok(samples)
}

fn run(
    bed: &Bed,
    kernel: &Kernel,
    program: &Path,
    libraries: &Path,
    rounds: u32,
    cases: &[&str],
    samples: &mut Samples,
) -> Result<()> {
    let kernel = bed.resolve(kernel)?;
    eprintln!("measuring on Linux {}, in the bed: this takes minutes", kernel.version);
    let mut arguments = vec!["/bench_ready".to_string(), rounds.to_string(), MEBIBYTES.to_string()];
    arguments.extend(cases.iter().map(ToString::to_string));
    let mut guest = Guest::new(arguments);
    guest.add(program, "/bench_ready", &[libraries])?;
    guest.memory_mib = 1024 + 4 * MEBIBYTES;
    guest.timeout = Duration::from_secs(600 + 240 * u64::from(rounds));
    let outcome = bed::run(bed, &kernel, &guest, &mut |line| {
        samples.take(line);
    })?;
    ensure!(outcome.status == 0, "bench_ready failed on Linux {}:\n{}", kernel.version, outcome.output);
    Ok(())
}

/// All rows: those with bars first, the worst backing under the plain id.
pub fn rows(samples: &Samples) -> Result<Vec<Row>> {
    let mut rows = compare(samples, "ready_2v1", ONE_VCPU, TWO_AGAINST_ONE)?;
    rows.extend(compare(samples, "ready_vs_hand", BY_HAND, AGAINST_HAND)?);
    rows.extend(faults_left(samples)?);
    for backing in samples.comparisons(", methods") {
        rows.extend(methods(samples, backing)?);
    }
    Ok(rows)
}

/// Two vCPUs with the library against another way.
fn compare(samples: &Samples, id: &str, theirs: &str, bar: f64) -> Result<Vec<Row>> {
    let row = |backing: &str| {
        let what = format!("{backing}{TIME}");
        let (ours, theirs) = (samples.median(&what, TWO_VCPUS)?, samples.median(&what, theirs)?);
        Ok(Row::times(format!("{id}/{}", slug(backing)), ours, theirs).ratio_at_most(bar))
    };
    let mut rows = samples.comparisons(TIME).into_iter().map(row).collect::<Result<Vec<_>>>()?;
    let worst = worst(&rows).map(|row| row.under(id));
    rows.splice(0..0, worst);
    Ok(rows)
}

/// Faults left with the library against each other way.
fn faults_left(samples: &Samples) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for backing in samples.comparisons(FAULTS) {
        let what = format!("{backing}{FAULTS}");
        let ours = samples.median(&what, TWO_VCPUS)?.max(samples.median(&what, ONE_VCPU)?);
        let is_ours = |way: &str| [ONE_VCPU, TWO_VCPUS].contains(&way);
        for way in samples.ways(&what).into_iter().filter(|way| !is_ours(way)) {
            let id = format!("faults_left/{}/{}", slug(backing), slug(way));
            rows.push(Row::counts(id, ours, samples.median(&what, way)?, "faults").count_at_most(0.0));
        }
    }
    Ok(rows)
}

/// What the library does with guest_memfd against each other way of doing it.
fn methods(samples: &Samples, backing: &str) -> Result<Vec<Row>> {
    let what = format!("{backing}, methods");
    let ways = samples.ways(&what);
    // A mapped one has the VMM's page tables to be filled too, a private one only pages to be allocated.
    let populates = ways.iter().copied().find(|way| way.starts_with("populate"));
    let ours = populates.unwrap_or("allocate, then stage 2");
    let median = samples.median(&what, ours)?;
    let row = |way: &str| {
        Ok(Row::times(format!("method_{}/{}", slug(backing), slug(way)), median, samples.median(&what, way)?))
    };
    ways.into_iter().filter(|way| *way != ours).map(row).collect()
}
