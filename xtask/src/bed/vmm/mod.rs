//! QEMU as a user of the library: `cargo xtask bed qemu`.
//!
//! Debian's QEMU is built as it is and with the patches of `contrib/qemu`, and both boot and restore a Linux guest in
//! the bed, on real KVM; the guest's stage-2 faults are counted and held against what is promised. This is the emulator
//! within the bed; the one that makes the bed is in ../qemu.rs, and they share nothing but ROMs.

mod bars;
mod build;
mod case;
mod checks;
mod converter;
mod observed;
mod run;
mod series;
mod source;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde::Serialize;

use self::bars::Bar;
use self::build::Built;
use self::case::{Case, Machine, Memory, Phase, Way, name};
use self::observed::Figures;
use self::run::{Done, Kernels};
use self::source::Source;
use super::{Bed, ResolveError};
use crate::lanes::{Kvm, Lane};
use crate::project;

/// The arguments of `cargo xtask bed qemu`; each narrows what is run.
#[derive(clap::Args)]
pub struct Cli {
    /// Only these machines.
    #[arg(long = "machine", value_name = "MACHINE")]
    machines: Vec<Machine>,
    /// Only with these pages.
    #[arg(long = "memory", value_name = "PAGES")]
    memories: Vec<Memory>,
    /// Only in these ways.
    #[arg(long = "way", value_name = "WAY")]
    ways: Vec<Way>,
    /// Only booted, only restored, or only converting its memory.
    #[arg(long = "phase", value_name = "PHASE")]
    phases: Vec<Phase>,
}

impl Cli {
    fn wants(&self, case: &Case) -> bool {
        fn wanted<T: PartialEq>(only: &[T], value: &T) -> bool {
            only.is_empty() || only.contains(value)
        }
        wanted(&self.machines, &case.machine)
            && wanted(&self.memories, &case.memory)
            && wanted(&self.ways, &case.way)
            && wanted(&self.phases, &case.phase)
    }
}

/// What `qemu.json` holds.
#[derive(Serialize)]
struct Report<'a> {
    qemu: &'a str,
    kernel: &'a str,
    rows: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    case: Case,
    #[serde(flatten)]
    figures: &'a Figures,
}

/// Runs what is asked for, shows it, and says whether it is what was promised.
pub fn main(bed: &Bed, cli: &Cli) -> Result<()> {
    let cases: Vec<Case> = Case::all().into_iter().filter(|case| cli.wants(case)).collect();
    let (kernels, built) = prepare(bed)?;
    let done = run::run(bed, &kernels, &built, &cases)?;
    println!(
        "Debian's QEMU {}, Linux {}, real KVM on an emulated CPU.",
        built.version,
        kernels.outer_version()
    );
    println!("Stage-2 faults and exits of a guest of {} MiB until it runs its init, or,", case::MEMORY_MIB);
    println!("restored, until it has walked over {} MiB of what it had in memory.\n", 64);
    print_table(&done);
    print_conversions(&done);
    let path = write_figures(&done, &kernels, &built)?;
    println!("\nFigures: {}\n", path.display());
    let bars = bars::judge(&done);
    for Bar { what, met } in &bars {
        println!("{} {what}", if *met { "met   " } else { "MISSED" });
    }
    let missed = bars.iter().filter(|bar| !bar.met).count();
    ensure!(missed == 0, "{missed} of {} bars missed", bars.len());
    Ok(())
}

fn prepare(bed: &Bed) -> Result<(Kernels, Built), ResolveError> {
    let kernels = Kernels::resolve(bed)?;
    let source = Source::obtain(&bed.cache, || bed.apt())?;
    Ok((kernels, build::obtain(&bed.cache, &source)?))
}

fn write_figures(done: &[Done], kernels: &Kernels, built: &Built) -> Result<PathBuf> {
    let rows =
        done.iter().filter_map(|done| Some(Row { case: done.case, figures: done.result.as_ref().ok()? }));
    let report = Report { qemu: &built.version, kernel: kernels.outer_version(), rows: rows.collect() };
    project::write_figures("qemu.json", &report)
}

fn print_table(done: &[Done]) {
    println!(
        "{:8} {:8} {:5} {:14} {:>7} {:>6} {:>11} {:>11} {:>8} {:>7}",
        "phase",
        "machine",
        "pages",
        "way",
        "faults",
        "MMIO",
        "after slots",
        "on restored",
        "exits",
        "checked"
    );
    for Done { case, result } in done {
        let Case { machine, memory, way, phase } = case;
        print!("{:8} {:8} {:5} {:14} ", name(phase), name(machine), name(memory), name(way));
        match result {
            Ok(Figures { faults, exits, mmio, after_last_slot_change, on_restored, slots, .. }) => {
                let on_restored = on_restored.map_or("-".to_string(), |count| count.to_string());
                print!("{faults:>7} {mmio:>6} {after_last_slot_change:>11} {on_restored:>11} {exits:>8} ");
                println!("{:>7}", slots.checked);
            }
            Err(_) => println!("failed"),
        }
    }
}

/// What the guests that convert their memory did, step by step.
fn print_conversions(done: &[Done]) {
    let of = |done: &'_ Done| Some((done.case, done.result.as_ref().ok()?.conversion.clone()?));
    for (Case { memory, way, .. }, conversion) in done.iter().filter_map(of) {
        println!("\nconverting {} pages, {}: faults and exits of each step", name(&memory), name(&way));
        for observed::Step { name, faults, exits, .. } in &conversion.steps {
            println!("    {name:8} {faults:>7} {exits:>7}");
        }
        if let Some(step) = &conversion.stopped_at {
            println!("    {step:8} QEMU stops the VM");
        }
    }
}

/// The lane's share of the cases: each promise once.
fn cases_of_lane() -> Vec<Case> {
    let case = |machine, phase, way| Case { machine, memory: Memory::Small, way, phase };
    let converting_huge =
        |way| Case { machine: Machine::Microvm, memory: Memory::Huge, way, phase: Phase::Convert };
    let huge = |machine, way| Case { machine, memory: Memory::Huge, way, phase: Phase::Boot };
    vec![
        case(Machine::Microvm, Phase::Boot, Way::Plain),
        case(Machine::Microvm, Phase::Boot, Way::Off),
        case(Machine::Microvm, Phase::Boot, Way::Kvmprep),
        case(Machine::Pc, Phase::Boot, Way::Plain),
        case(Machine::Pc, Phase::Boot, Way::Kvmprep),
        huge(Machine::Microvm, Way::Strict),
        huge(Machine::Pc, Way::Strict),
        huge(Machine::Pc, Way::MisfitWarned),
        huge(Machine::Pc, Way::MisfitRefused),
        huge(Machine::Q35, Way::Strict),
        case(Machine::Pc, Phase::Boot, Way::Convert),
        case(Machine::Microvm, Phase::Restore, Way::Plain),
        case(Machine::Microvm, Phase::Restore, Way::Kvmprep),
        case(Machine::Microvm, Phase::Convert, Way::Off),
        case(Machine::Microvm, Phase::Convert, Way::Convert),
        converting_huge(Way::Off),
        converting_huge(Way::Convert),
    ]
}

/// The bars of those, as a lane of `cargo xtask test`.
pub fn lane(bed: &Bed) -> Result<Lane> {
    const NAME: &str = "qemu";
    let (kernels, built) = match prepare(bed) {
        Ok(prepared) => prepared,
        Err(ResolveError::Unavailable(why)) => return Ok(Lane::skipped(NAME, &why)),
        Err(ResolveError::Failed(error)) => {
            let mut lane = Lane::new(NAME);
            lane.check("building QEMU, plain and patched", Err(error));
            return Ok(lane);
        }
    };
    let mut lane = Lane::of_kernel(NAME, kernels.outer_version(), Kvm::Emulated);
    match run::run(bed, &kernels, &built, &cases_of_lane()) {
        Ok(done) => {
            for Bar { what, met } in bars::judge(&done) {
                lane.check(&what, if met { Ok(()) } else { Err(anyhow::anyhow!("missed")) });
            }
        }
        Err(error) => lane.check("running QEMU in the bed", Err(error)),
    }
    Ok(lane)
}
