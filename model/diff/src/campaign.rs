//! Many programs, one after the other, until enough operations were done; and what came of them.
//!
//! Differences of one kind are counted, and the first of each is shrunk and shown. A run that met no such thing says
//! how often it did what, since a run that never forked says nothing of forks.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::comparison::{Difference, compare};
use crate::generator::{self, Abilities};
use crate::machine::{Maker, Outcome};
use crate::operation::Program;
use crate::{reproducer, shrinker};

/// So often it is said how far a run is.
const SHOWN_EVERY: u64 = 20_000;

/// How much is done, and how.
pub struct Plan {
    /// From which all random choices follow.
    pub seed: u64,
    /// At least so many operations.
    pub operations: u64,
    /// Operations in a program.
    pub length: usize,
    /// Programs before the first, for one that is to be run again.
    pub skip: u64,
    /// Differences of so many kinds are shrunk and shown; at one more it ends.
    pub most_shown: usize,
}

/// A program that shows a difference.
pub struct Found {
    /// The program.
    pub program: Program,
    /// What it shows first.
    pub difference: Difference,
}

/// What came of it.
#[derive(Default)]
pub struct Report {
    /// Operations that were done on both machines.
    pub operations: u64,
    /// Programs that ended with a difference.
    pub mismatches: u64,
    kinds: BTreeMap<(&'static str, &'static str), u64>,
    met: BTreeMap<(&'static str, i64), u64>,
}

/// Runs programs on a machine of each.
pub fn run(plan: &Plan, abilities: &Abilities, left: &dyn Maker, right: &dyn Maker) -> Result<Report> {
    let mut report = Report::default();
    let (mut number, mut shown) = (plan.skip, 0);
    while report.operations < plan.operations && report.kinds.len() <= plan.most_shown {
        let program = generator::program(plan.seed, number, plan.length, abilities);
        let compared = compare(&program, left, right)?;
        report.operations += compared.operations;
        compared.met.iter().for_each(|met| *report.met.entry(*met).or_default() += 1);
        if let Some(difference) = compared.difference {
            let found = Found { program, difference };
            report.mismatches += 1;
            let count = report.kinds.entry(found.difference.kind()).or_default();
            *count += 1;
            if *count == 1 {
                println!("\n---- program {number} of seed {} ----", plan.seed);
                show(&found, left, right)?;
            }
        }
        number += 1;
        if report.operations / SHOWN_EVERY > shown {
            shown = report.operations / SHOWN_EVERY;
            println!("... {} operations, {} mismatches", report.operations, report.mismatches);
        }
    }
    Ok(report)
}

/// Runs programs until one shows a difference; says how many operations that took.
pub fn first_difference(
    plan: &Plan,
    abilities: &Abilities,
    left: &dyn Maker,
    right: &dyn Maker,
) -> Result<(u64, Option<Found>)> {
    let mut done = 0;
    for number in plan.skip.. {
        let program = generator::program(plan.seed, number, plan.length, abilities);
        let compared = compare(&program, left, right)?;
        done += compared.operations;
        if compared.difference.is_some() || done >= plan.operations {
            return Ok((done, compared.difference.map(|difference| Found { program, difference })));
        }
    }
    Ok((done, None))
}

/// The shortest program that shows a difference of the same kind, and what it shows; none if it was not seen again.
pub fn shrunk(found: &Found, left: &dyn Maker, right: &dyn Maker) -> Result<Option<(Program, Difference)>> {
    let mut same_kind = |candidate: &Program| -> Result<bool> {
        let difference = compare(candidate, left, right)?.difference;
        Ok(difference.is_some_and(|other| other.kind() == found.difference.kind()))
    };
    if !same_kind(&found.program)? {
        return Ok(None);
    }
    let mut shortest = found.program.clone();
    shortest.operations.truncate(found.difference.step + 1);
    let shortest = shrinker::shrink(&shortest, &mut same_kind)?;
    let difference = compare(&shortest, left, right)?.difference;
    Ok(difference.map(|difference| (shortest, difference)))
}

/// What comes of each operation of a program.
pub fn outcomes(program: &Program, maker: &dyn Maker) -> Result<Vec<Outcome>> {
    let mut machine = maker.make(&program.setting)?;
    Ok(program.operations.iter().map(|operation| machine.apply(operation)).collect())
}

/// Prints a difference, and the shortest program that shows it.
fn show(found: &Found, left: &dyn Maker, right: &dyn Maker) -> Result<()> {
    println!("{}", found.difference);
    let Some((shortest, difference)) = shrunk(found, left, right)? else {
        println!("  not seen again when the program was run again");
        return Ok(());
    };
    println!("  shrunk to {} operations: {:?}", shortest.operations.len(), shortest.setting);
    for operation in &shortest.operations {
        println!("    {operation:x?}");
    }
    println!("  kernel: {}\n  other:  {}", difference.left, difference.right);
    if std::env::var_os("KVMPREP_DIFF_C").is_some() {
        let remarks = [
            (difference.step, format!("kernel: {}", difference.left)),
            (difference.step, format!("model:  {}", difference.right)),
        ];
        println!("{}", reproducer::print(&shortest, &remarks));
    }
    Ok(())
}

impl Report {
    /// Prints the counts.
    pub fn print(&self) {
        println!("\nmet (operation, result: times):");
        let mut line = String::new();
        for ((name, result), count) in &self.met {
            line += &match *result {
                0.. => format!("{name}: {count}  "),
                error => format!("{name} {:?}: {count}  ", crate::machine::errno(error)),
            };
        }
        println!("{line}");
        for ((operation, field), count) in &self.kinds {
            println!("difference: {operation} in {field}: {count}");
        }
    }
}
