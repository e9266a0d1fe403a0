//! Holds the figures against what the library promises for QEMU.
//!
//! A bar whose figures were not asked for is not judged, and never counts as met.

use super::case::{Case, Machine, Memory, Phase, Way, name};
use super::observed::Figures;
use super::run::Done;

/// How far two runs of the same thing may lie apart, in hundredths and in faults: timers and interrupts fall as they
/// like, and with huge pages there are few faults in all.
const NOISE_PERCENT: u64 = 5;
const NOISE_FAULTS: u64 = 16;

/// Pages that a restored guest walks: 32 files of 2 MiB, at the least.
const WALKED: u64 = 32 * 512;

/// One thing promised.
#[derive(Debug, PartialEq)]
pub struct Bar {
    pub what: String,
    pub met: bool,
}

/// Every bar that can be judged.
pub fn judge(done: &[Done]) -> Vec<Bar> {
    let mut bars = Vec::new();
    for Done { case, result } in done {
        match result {
            Err(error) => bars.push(Bar { what: format!("{case}: {error:#}"), met: false }),
            Ok(figures) => {
                let plain = figures_of(done, case.in_way(Way::Plain));
                bars.extend(judge_one(*case, figures, plain));
            }
        }
    }
    bars
}

fn figures_of(done: &[Done], case: Case) -> Option<&Figures> {
    done.iter().find(|done| done.case == case)?.result.as_ref().ok()
}

fn judge_one(case: Case, figures: &Figures, plain: Option<&Figures>) -> Vec<Bar> {
    match (case.way, case.phase) {
        (Way::Kvmprep, Phase::Boot) => {
            let share = plain.zip(share_allowed(case)).map(|(plain, percent)| {
                let what = format!("{} of {} faults left, at most {percent} %", figures.faults, plain.faults);
                bar(case, &what, figures.faults * 100 <= plain.faults * percent)
            });
            share.into_iter().chain([no_late_fault(case, figures)]).collect()
        }
        (Way::Kvmprep, Phase::Restore) => vec![no_fault_on_restored(case, figures)],
        (Way::Off, _) => plain.map(|plain| same_as_plain(case, figures, plain)).into_iter().collect(),
        (Way::Plain, Phase::Restore) => vec![walk_is_seen(case, figures)],
        (Way::Plain | Way::Prealloc, _) => Vec::new(),
    }
}

/// What share of plain's faults may be left, in hundredths, where one was promised.
fn share_allowed(case: Case) -> Option<u64> {
    match (case.machine, case.memory) {
        (Machine::Microvm, Memory::Small) => Some(1),
        (Machine::Microvm, Memory::Huge) => None,
        (Machine::Pc | Machine::Q35, Memory::Small) => Some(3),
        (Machine::Pc | Machine::Q35, Memory::Huge) => Some(12),
    }
}

fn no_late_fault(case: Case, figures: &Figures) -> Bar {
    let late = figures.after_last_slot_change;
    bar(case, &format!("{late} faults on RAM after the last slot change{}", examples(figures)), late == 0)
}

fn no_fault_on_restored(case: Case, figures: &Figures) -> Bar {
    let what = match figures.on_restored {
        Some(count) => format!("{count} faults on restored RAM{}", examples(figures)),
        None => "nothing is known of the restored RAM".to_string(),
    };
    bar(case, &what, figures.on_restored == Some(0))
}

fn same_as_plain(case: Case, figures: &Figures, plain: &Figures) -> Bar {
    let what = format!("{} faults, plain {}", figures.faults, plain.faults);
    let apart = figures.faults.abs_diff(plain.faults);
    bar(case, &what, apart <= NOISE_FAULTS + plain.faults * NOISE_PERCENT / 100)
}

/// The control: where nothing is prepared, the walk over the restored memory shows.
fn walk_is_seen(case: Case, figures: &Figures) -> Bar {
    let expected = match case.memory {
        Memory::Small => WALKED,
        Memory::Huge => WALKED / 512,
    };
    let seen = figures.on_restored.unwrap_or(0);
    bar(
        case,
        &format!("{seen} faults on restored RAM, as many as are walked ({expected}) or more"),
        seen >= expected,
    )
}

fn examples(figures: &Figures) -> String {
    let addresses: Vec<String> = figures.examples.iter().map(|address| format!("{address:#x}")).collect();
    if addresses.is_empty() { String::new() } else { format!(" (at {} …)", addresses.join(" ")) }
}

fn bar(case: Case, what: &str, met: bool) -> Bar {
    let Case { machine, memory, way, phase } = case;
    let case = format!("{} {} {} {}", name(&phase), name(&machine), name(&memory), name(&way));
    Bar { what: format!("{case}: {what}"), met }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(machine: Machine, memory: Memory, way: Way, phase: Phase, figures: Figures) -> Done {
        Done { case: Case { machine, memory, way, phase }, result: Ok(figures) }
    }

    fn faults(faults: u64) -> Figures {
        Figures { faults, ..Figures::default() }
    }

    fn verdicts(done: &[Done]) -> Vec<bool> {
        judge(done).iter().map(|bar| bar.met).collect()
    }

    #[test]
    fn a_boot_is_held_against_plain_and_a_late_fault_is_one_too_many() {
        let boot = |way, figures| done(Machine::Pc, Memory::Small, way, Phase::Boot, figures);
        assert_eq!(verdicts(&[boot(Way::Plain, faults(1000)), boot(Way::Kvmprep, faults(30))]), [true, true]);
        assert_eq!(
            verdicts(&[boot(Way::Plain, faults(1000)), boot(Way::Kvmprep, faults(31))]),
            [false, true]
        );
        let late = Figures { after_last_slot_change: 1, ..faults(30) };
        assert_eq!(verdicts(&[boot(Way::Plain, faults(1000)), boot(Way::Kvmprep, late)]), [true, false]);
        // Without plain there is nothing to hold it against.
        assert_eq!(verdicts(&[boot(Way::Kvmprep, faults(31))]), [true]);
    }

    #[test]
    fn a_restore_may_not_fault_where_there_was_content_and_the_control_must() {
        let restore = |way, on_restored| {
            let figures = Figures { on_restored, ..faults(20000) };
            done(Machine::Q35, Memory::Small, way, Phase::Restore, figures)
        };
        assert_eq!(
            verdicts(&[restore(Way::Kvmprep, Some(0)), restore(Way::Plain, Some(WALKED))]),
            [true, true]
        );
        assert_eq!(verdicts(&[restore(Way::Kvmprep, Some(1)), restore(Way::Plain, Some(5))]), [false, false]);
        assert_eq!(verdicts(&[restore(Way::Kvmprep, None)]), [false]);
    }

    #[test]
    fn switched_off_it_is_as_plain() {
        let boot = |way, count| done(Machine::Pc, Memory::Huge, way, Phase::Boot, faults(count));
        assert_eq!(verdicts(&[boot(Way::Plain, 1000), boot(Way::Off, 1066)]), [true]);
        assert_eq!(verdicts(&[boot(Way::Plain, 1000), boot(Way::Off, 933)]), [false]);
    }

    #[test]
    fn a_guest_that_failed_is_a_bar_missed() {
        let case = Case::all()[0];
        assert_eq!(verdicts(&[Done { case, result: Err(anyhow::anyhow!("did not boot")) }]), [false]);
    }
}
