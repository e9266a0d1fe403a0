//! The twenty invariants, all of them looked at after each step of random programs, for each type of virtual machine, while
//! calls to the host, the TDX module, the SNP firmware and the table of frames fail: at random, and each call in turn.
//!
//! `KVMPREP_MODEL_STEPS` says how many steps of each type are taken, in place of a number for a test among others, and
//! `KVMPREP_MODEL_SEED` which programs. A failed run prints both.

mod chance;
mod failing;
mod world;

use failing::Failure;
use kvmprep_model::personality::VmType;
use world::World;

const USUAL_STEPS: u64 = 6_000;
/// Steps after which a VM is torn down, and what was mapped must be gone with it.
const LIFE: u64 = 1_000;
/// From so many steps on no kind of failure can have been missed but by mistake.
const MANY_STEPS: u64 = 500_000;
/// How long a program is in which each call fails in turn.
const SHORT: u64 = 50;
/// How many programs may be looked at for one in which a kind of call is made.
const SEEDS: u64 = 200;

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn steps() -> u64 {
    from_environment("KVMPREP_MODEL_STEPS").unwrap_or(USUAL_STEPS)
}

fn seed() -> u64 {
    from_environment("KVMPREP_MODEL_SEED").unwrap_or(1)
}

fn explore(vm_type: VmType) {
    let mut world = World::new(vm_type, seed(), None);
    for number in 0..steps() {
        world.plan_failure();
        if number % LIFE == LIFE - 1 || (world.is_dead() && world.chance.one_in(8)) {
            world.start_again();
        }
        if let Err(what) = world.step() {
            panic!("{vm_type:?}, seed {}, step {number}: {what}", seed());
        }
    }
    let World { died, effective, strikes, .. } = &world;
    let failures: u64 = strikes.iter().map(|(_, times)| times).sum();
    println!("{vm_type:?}: {} steps, {effective} with effect; {failures} failures, {died} VMs died", steps());
    strikes.iter().for_each(|(failure, times)| println!("{times:>9} {failure:?}"));
    assert!(*effective > steps() / 3, "most of it was refused: only {effective}");
    assert!(failures > steps() / 100, "only {failures} failures");
    let missed: Vec<_> = strikes.iter().filter(|(_, times)| *times == 0).collect();
    assert!(steps() < MANY_STEPS || missed.is_empty(), "never happened: {missed:?}");
}

/// The same short program again and again, and in it one call after the other fails, of each kind and in each way.
fn fail_each_call(vm_type: VmType) {
    let (mut programs, all) = (0, Failure::all_of(vm_type));
    for failure in &all {
        // Not every program makes every kind of call.
        let seed = (seed()..seed() + SEEDS).find(|seed| run_short(vm_type, *seed, *failure, 1));
        let seed = seed.unwrap_or_else(|| panic!("{vm_type:?}: {failure:?} cannot happen"));
        let mut nth = 2;
        while run_short(vm_type, seed, *failure, nth) {
            programs += 1;
            // There are thousands of some calls.
            nth += if steps() < MANY_STEPS { 1 + nth / 2 } else { 1 };
        }
    }
    println!(
        "{vm_type:?}: {programs} programs of {SHORT} steps, in each a call that fails, of {} kinds",
        all.len()
    );
}

/// Answers whether there was such a call.
fn run_short(vm_type: VmType, seed: u64, failure: Failure, nth: u64) -> bool {
    let mut world = World::new(vm_type, seed, Some((failure, nth)));
    for number in 0..SHORT {
        if let Err(what) = world.step() {
            panic!("{vm_type:?}, seed {seed}, {failure:?} at call {nth}, step {number}: {what}");
        }
    }
    world.start_again();
    world.was_struck_by(failure)
}

#[test]
fn of_an_ordinary_vm() {
    explore(VmType::Default);
}

#[test]
fn of_a_software_protected_vm() {
    explore(VmType::SwProtected);
}

#[test]
fn of_an_snp_guest() {
    explore(VmType::Snp);
}

#[test]
fn of_a_tdx_guest() {
    explore(VmType::Tdx);
}

#[test]
fn with_each_call_failing_in_turn_of_an_ordinary_vm() {
    fail_each_call(VmType::Default);
}

#[test]
fn with_each_call_failing_in_turn_of_a_software_protected_vm() {
    fail_each_call(VmType::SwProtected);
}

#[test]
fn with_each_call_failing_in_turn_of_an_snp_guest() {
    fail_each_call(VmType::Snp);
}

#[test]
fn with_each_call_failing_in_turn_of_a_tdx_guest() {
    fail_each_call(VmType::Tdx);
}
