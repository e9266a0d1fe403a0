//! Has the model make each of its mistakes, which the comparison with the kernel that it runs on must find.
//!
//! What is printed of each is for a script too: how soon it was found, and a program in C that shows it, with what this
//! kernel does there. The model's own mistakes, which nobody knows of, are not looked for here.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use kvmprep_model::mistake::Mistake;

use kvmprep_model_diff::campaign::{self, Found, Plan};
use kvmprep_model_diff::generator::Abilities;
use kvmprep_model_diff::real::RealKvm;
use kvmprep_model_diff::reproducer;
use kvmprep_model_diff::simulated::Simulated;

/// So soon each mistake must be found.
const FOUND_WITHIN: u64 = 10_000;

#[derive(Parser)]
struct Arguments {
    /// From which all random choices follow.
    #[arg(long, env = "KVMPREP_DIFF_SEED", default_value_t = 1)]
    seed: u64,
    /// How many operations a program has.
    #[arg(long, env = "KVMPREP_DIFF_LENGTH", default_value_t = 60)]
    length: usize,
    /// Also prints programs in C that show them.
    #[arg(long)]
    reproducers: bool,
    /// Only this one.
    #[arg(long)]
    only: Option<String>,
}

/// Whether a mistake can be seen on a kernel without private memory.
fn needs_private_memory(mistake: Mistake) -> bool {
    matches!(
        mistake,
        Mistake::AMixedFrameAtTheHeadIsForgotten
            | Mistake::AMixedFrameAtTheTailIsForgotten
            | Mistake::ANewSlotHasNoMixedFrames
            | Mistake::AttributesMayEndWithinAPage
            | Mistake::AttributesAreSetAgain
    )
}

fn show(kvm: &RealKvm, model: &Simulated, mistake: Mistake, found: &Found) -> Result<()> {
    let (program, difference) =
        campaign::shrunk(found, kvm, model)?.with_context(|| format!("{mistake:?} is not seen again"))?;
    let remarks = [(difference.step, format!("with {mistake:?} the model says: {}", difference.right))];
    println!("---- program {mistake:?}\n{}", reproducer::print(&program, &remarks));
    println!("---- prints {mistake:?}\n{}---- end", reproducer::prints(&campaign::outcomes(&program, kvm)?));
    Ok(())
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let kvm = RealKvm::open()?;
    let abilities: Abilities = kvm.abilities()?;
    let model = Simulated::of_this_kernel(&abilities)?;
    let plan = Plan {
        seed: arguments.seed,
        operations: FOUND_WITHIN,
        length: arguments.length,
        skip: 0,
        most_shown: 0,
    };
    let (mut passed, mut missed, mut skipped) = (0, 0, 0);
    for &mistake in Mistake::ALL {
        if arguments.only.as_ref().is_some_and(|only| *only != format!("{mistake:?}")) {
            continue;
        }
        if needs_private_memory(mistake) && !abilities.has_sw_protected {
            skipped += 1;
            println!("skipped {mistake:?}: there is no private memory");
            continue;
        }
        Mistake::make(Some(mistake));
        let (done, found) = campaign::first_difference(&plan, &abilities, &kvm, &model)?;
        match found {
            Some(found) => {
                passed += 1;
                let (operation, field) = found.difference.kind();
                println!("ok {mistake:?}: found after {done} operations by {operation} in {field}");
                if arguments.reproducers {
                    show(&kvm, &model, mistake, &found)?;
                }
            }
            None => {
                missed += 1;
                println!("FAILED {mistake:?}: not found in {done} operations");
            }
        }
    }
    println!("cases: {passed} passed, {missed} failed, {skipped} skipped");
    Ok(ExitCode::from(u8::from(missed > 0)))
}
