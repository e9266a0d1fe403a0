//! Holds the figures against what the library promises for QEMU.
//!
//! A bar whose figures were not asked for is not judged, and never counts as met.

use super::case::{Case, Machine, Memory, Phase, Way, name};
use super::observed::{Conversion, Figures, Slots};
use super::run::Done;

/// How far two runs of the same thing may lie apart, in hundredths and in faults: timers and interrupts fall as they
/// like, and with huge pages there are few faults in all.
const NOISE_PERCENT: u64 = 5;
const NOISE_FAULTS: u64 = 16;

/// How QEMU begins what it has to say of a slot: as an error, or as a warning.
const ERROR: &str = "kvmprep: ";
const WARNING: &str = "warning: kvmprep: ";

/// What a guest that converts memory does, all of it.
const STEPS: [&str; 7] = ["random", "break", "walk", "show", "span", "across", "beyond"];

/// What it writes to a page that is shared, and that the host finds in one that is private.
const SHOWN: [u32; 2] = [0x5a5a_5a5a, 0];

/// Frames of 2 MiB that it breaks up by the conversion of a page, in each of three kinds.
const BROKEN: u64 = 8;

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
                // What has no private memory cannot convert any.
                let plain = if case.phase == Phase::Convert { Way::Off } else { Way::Plain };
                bars.extend(judge_one(*case, figures, figures_of(done, case.in_way(plain))));
            }
        }
    }
    bars
}

fn figures_of(done: &[Done], case: Case) -> Option<&Figures> {
    done.iter().find(|done| done.case == case)?.result.as_ref().ok()
}

/// A guest that converts its memory; `own` is the same, its memory converted by QEMU's own code.
fn converting(case: Case, figures: &Figures, own: Option<&Figures>) -> Vec<Bar> {
    let Some(conversion) = &figures.conversion else {
        return vec![bar(case, "nothing is known of its conversions", false)];
    };
    let host = bar(case, &format!("the host sees {:x?}", conversion.seen), conversion.seen == SHOWN);
    if case.way == Way::Off {
        return vec![walk_after_conversion_is_seen(case, conversion), host];
    }
    let mut bars = vec![every_step_is_done(case, conversion), host, qemu_is_content(case, figures)];
    bars.extend(["across", "walk", "span"].map(|step| no_fault_in(case, conversion, step)));
    let own = own.and_then(|own| own.conversion.as_ref());
    bars.extend(own.map(|own| same_content(case, conversion, own)));
    bars
}

fn every_step_is_done(case: Case, conversion: &Conversion) -> Bar {
    let done: Vec<&str> = conversion.steps.iter().map(|step| step.name.as_str()).collect();
    let stopped = conversion.stopped_at.as_ref().map_or(String::new(), |at| format!(", stopped at {at}"));
    let is_all = STEPS.iter().all(|step| done.contains(step)) && conversion.stopped_at.is_none();
    bar(case, &format!("did {}{stopped}", done.join(" ")), is_all)
}

fn no_fault_in(case: Case, conversion: &Conversion, step: &str) -> Bar {
    let faults = conversion.faults(step);
    let count = faults.map_or("unknown".to_string(), |count| count.to_string());
    bar(
        case,
        &format!("{step}: {count} faults on memory that was converted, or beside it"),
        faults == Some(0),
    )
}

/// The control: who maps nothing leaves a fault on each page that was converted, and with huge pages on all beside it.
fn walk_after_conversion_is_seen(case: Case, conversion: &Conversion) -> Bar {
    let expected = match case.memory {
        Memory::Small => 3 * BROKEN,
        Memory::Huge => (512 + 1 + 256) * BROKEN,
    };
    let seen = conversion.faults("walk").unwrap_or(0);
    bar(case, &format!("walk: {seen} faults, {expected} or more"), seen >= expected)
}

/// The same conversions leave the same content, whoever makes them.
fn same_content(case: Case, conversion: &Conversion, own: &Conversion) -> Bar {
    let sum = |of: &Conversion| of.steps.iter().find(|step| step.name == "random").map(|step| step.sum);
    let (ours, theirs) = (sum(conversion), sum(own));
    bar(case, &format!("content {ours:x?}, by QEMU's own code {theirs:x?}"), ours.is_some() && ours == theirs)
}

fn judge_one(case: Case, figures: &Figures, plain: Option<&Figures>) -> Vec<Bar> {
    match (case.way, case.phase) {
        (_, Phase::Convert) => converting(case, figures, plain),
        (Way::Kvmprep, Phase::Boot) => prepared(case, figures, plain),
        (Way::Strict, _) => {
            let mut bars = prepared(case, figures, plain);
            bars.push(every_slot_is_checked(case, figures, figures.slots.changes));
            bars.push(no_slot_is_wrong(case, figures));
            bars.push(pages_are_as_predicted(case, figures));
            bars
        }
        (Way::MisfitWarned, _) => {
            vec![
                every_slot_is_checked(case, figures, figures.slots.changes),
                misfit_is_warned_of(case, figures),
            ]
        }
        // What was refused, KVM was not told of.
        (Way::MisfitRefused, _) => {
            vec![
                every_slot_is_checked(case, figures, figures.slots.changes + 1),
                misfit_is_refused(case, figures),
            ]
        }
        (Way::Kvmprep, Phase::Restore) => vec![no_fault_on_restored(case, figures)],
        // Where there is no private memory, converting it is nothing.
        (Way::Off | Way::Convert, _) => {
            plain.map(|plain| same_as_plain(case, figures, plain)).into_iter().collect()
        }
        (Way::Plain, Phase::Restore) => vec![walk_is_seen(case, figures)],
        (Way::Plain | Way::Prealloc, _) => Vec::new(),
    }
}

fn prepared(case: Case, figures: &Figures, plain: Option<&Figures>) -> Vec<Bar> {
    let share = plain.zip(share_allowed(case)).map(|(plain, percent)| {
        let what = format!("{} of {} faults left, at most {percent} %", figures.faults, plain.faults);
        bar(case, &what, figures.faults * 100 <= plain.faults * percent)
    });
    share.into_iter().chain([no_late_fault(case, figures), qemu_is_content(case, figures)]).collect()
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

fn qemu_is_content(case: Case, figures: &Figures) -> Bar {
    bar(case, &format!("QEMU has nothing to say{}", words(figures)), figures.said.is_empty())
}

fn every_slot_is_checked(case: Case, figures: &Figures, expected: u64) -> Bar {
    let checked = figures.slots.checked;
    bar(
        case,
        &format!("{checked} changes of memslots were checked, of {expected}"),
        checked > 0 && checked == expected,
    )
}

fn no_slot_is_wrong(case: Case, figures: &Figures) -> Bar {
    let Slots { refused, breaches, .. } = figures.slots;
    bar(case, &format!("{refused} memslots refused, {breaches} misaligned"), refused + breaches == 0)
}

/// All memory is populated, by vCPUs outside SMM: KVM has exactly what was predicted.
fn pages_are_as_predicted(case: Case, figures: &Figures) -> Bar {
    let Slots { expected_4k, expected_2m, mapped_4k, mapped_2m, .. } = figures.slots;
    let what = format!(
        "{expected_2m} pages of 2 MiB and {expected_4k} of 4 KiB predicted, KVM has {mapped_2m} and {mapped_4k}"
    );
    let is_of_its_kind = (expected_2m > 0) == (case.memory == Memory::Huge);
    bar(case, &what, is_of_its_kind && (expected_4k, expected_2m) == (mapped_4k, mapped_2m))
}

/// Once, and the guest runs all the same.
fn misfit_is_warned_of(case: Case, figures: &Figures) -> Bar {
    let warnings = figures.said.iter().filter(|line| line.contains(WARNING)).count();
    let what = format!("{warnings} warning of a misfit{}", words(figures));
    bar(case, &what, warnings == 1 && figures.slots.breaches > 0 && figures.slots.refused == 0)
}

fn misfit_is_refused(case: Case, figures: &Figures) -> Bar {
    let ended =
        figures.ended.map_or("has not ended".to_string(), |status| format!("ended with status {status}"));
    let is_told = figures.said.iter().any(|line| line.contains(ERROR) && !line.contains(WARNING));
    let what = format!("QEMU {ended} on a misfit{}", words(figures));
    let is_last = figures.slots.breaches == 1;
    bar(case, &what, figures.ended.is_some_and(|status| status != 0) && is_told && is_last)
}

fn words(figures: &Figures) -> String {
    if figures.said.is_empty() { String::new() } else { format!(": {}", figures.said.join(" | ")) }
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
    use super::super::observed::Step;
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
        let against_plain =
            |figures| verdicts(&[boot(Way::Plain, faults(1000)), boot(Way::Kvmprep, figures)]);
        assert_eq!(against_plain(faults(30)), [true, true, true]);
        assert_eq!(against_plain(faults(31)), [false, true, true]);
        let late = Figures { after_last_slot_change: 1, ..faults(30) };
        assert_eq!(against_plain(late), [true, false, true]);
        let complains = Figures { said: vec!["warning: it cannot".into()], ..faults(30) };
        assert_eq!(against_plain(complains), [true, true, false]);
        // Without plain there is nothing to hold it against.
        assert_eq!(verdicts(&[boot(Way::Kvmprep, faults(31))]), [true, true]);
    }

    /// A strict boot in which all is as it should be.
    const STRICT: Slots = Slots {
        changes: 20,
        checked: 20,
        refused: 0,
        breaches: 0,
        expected_4k: 480,
        expected_2m: 127,
        mapped_4k: 480,
        mapped_2m: 127,
    };

    fn verdicts_of_strict(memory: Memory, slots: Slots) -> Vec<bool> {
        let figures = Figures { slots, ..Figures::default() };
        verdicts(&[done(Machine::Q35, memory, Way::Strict, Phase::Boot, figures)]).split_off(2)
    }

    #[test]
    fn a_strict_boot_checks_every_slot_and_predicts_its_pages() {
        let huge = |slots| verdicts_of_strict(Memory::Huge, slots);
        assert_eq!(huge(STRICT), [true, true, true]);
        assert_eq!(huge(Slots { checked: 19, ..STRICT }), [false, true, true]);
        assert_eq!(huge(Slots { changes: 0, checked: 0, ..STRICT }), [false, true, true]);
        assert_eq!(huge(Slots { refused: 1, ..STRICT }), [true, false, true]);
        assert_eq!(huge(Slots { breaches: 1, ..STRICT }), [true, false, true]);
        assert_eq!(huge(Slots { mapped_2m: 126, ..STRICT }), [true, true, false]);
        assert_eq!(huge(Slots { mapped_4k: 481, ..STRICT }), [true, true, false]);
        assert_eq!(verdicts_of_strict(Memory::Small, STRICT), [true, true, false]);
        let small = Slots { expected_2m: 0, mapped_2m: 0, ..STRICT };
        assert_eq!(huge(small), [true, true, false]);
    }

    #[test]
    fn a_misfit_is_warned_of_once_and_the_guest_runs() {
        let slots = Slots { breaches: 2, ..STRICT };
        let boot = |said: &[&str], slots| {
            let said = said.iter().map(|line| (*line).to_string()).collect();
            let figures = Figures { said, slots, ..Figures::default() };
            verdicts(&[done(Machine::Pc, Memory::Huge, Way::MisfitWarned, Phase::Boot, figures)])
        };
        let warning = "qemu-system-x86_64: warning: kvmprep: gpa and hva differ";
        assert_eq!(boot(&["warning: of something else", warning, "map it higher"], slots), [true, true]);
        assert_eq!(boot(&[], slots), [true, false]);
        assert_eq!(boot(&[warning, warning], slots), [true, false]);
        assert_eq!(boot(&[warning], STRICT), [true, false]);
    }

    #[test]
    fn a_misfit_is_refused_before_kvm_is_told() {
        let slots = Slots { changes: 7, checked: 8, breaches: 1, ..STRICT };
        let boot = |said: &str, ended, slots| {
            let figures = Figures { said: vec![said.into()], ended, slots, ..Figures::default() };
            verdicts(&[done(Machine::Pc, Memory::Huge, Way::MisfitRefused, Phase::Boot, figures)])
        };
        let error = "qemu-system-x86_64: kvmprep: gpa and hva differ";
        assert_eq!(boot(error, Some(134), slots), [true, true]);
        assert_eq!(boot(error, Some(134), Slots { changes: 8, ..slots }), [false, true]);
        assert_eq!(boot(error, Some(0), slots), [true, false]);
        assert_eq!(boot(error, None, slots), [true, false]);
        assert_eq!(boot("warning: kvmprep: gpa and hva differ", Some(134), slots), [true, false]);
        assert_eq!(boot(error, Some(134), Slots { breaches: 0, ..slots }), [true, false]);
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

    fn converts(way: Way, memory: Memory, conversion: Conversion) -> Done {
        let figures = Figures { conversion: Some(conversion), ..Figures::default() };
        done(Machine::Microvm, memory, way, Phase::Convert, figures)
    }

    fn all_steps() -> Conversion {
        let step = |name: &str| Step { name: name.into(), sum: 7, faults: 0, exits: 9 };
        Conversion { steps: STEPS.map(step).to_vec(), stopped_at: None, seen: SHOWN.to_vec() }
    }

    #[test]
    fn memory_is_converted_without_a_fault_afterwards() {
        let verdicts_of = |change: &dyn Fn(&mut Conversion)| {
            let mut conversion = all_steps();
            change(&mut conversion);
            verdicts(&[converts(Way::Convert, Memory::Huge, conversion)])
        };
        assert_eq!(verdicts_of(&|_| {}), [true; 6]);
        let steps_missed = [false, true, true, true, true, true];
        assert_eq!(verdicts_of(&|made| made.stopped_at = Some("beyond".into())), steps_missed);
        assert_eq!(verdicts_of(&|made| drop(made.steps.pop())), steps_missed);
        assert_eq!(verdicts_of(&|made| made.seen[1] = 1), [true, false, true, true, true, true]);
        assert_eq!(verdicts_of(&|made| made.seen.clear()), [true, false, true, true, true, true]);
        assert_eq!(verdicts_of(&|made| made.steps[2].faults = 1), [true, true, true, true, false, true]);
        assert_eq!(verdicts_of(&|made| drop(made.steps.remove(4))), [false, true, true, true, true, false]);
        let unknown = done(Machine::Microvm, Memory::Huge, Way::Convert, Phase::Convert, faults(3));
        assert_eq!(verdicts(&[unknown]), [false]);
    }

    #[test]
    fn the_library_s_conversions_leave_what_qemu_s_own_leave_and_the_control_faults() {
        let verdicts_of = |own_faults, own_sum| {
            let mut own = all_steps();
            own.stopped_at = Some("span".into());
            (own.steps[2].faults, own.steps[0].sum) = (own_faults, own_sum);
            let ours = converts(Way::Convert, Memory::Small, all_steps());
            verdicts(&[ours, converts(Way::Off, Memory::Small, own)]).split_off(6)
        };
        assert_eq!(verdicts_of(3 * BROKEN, 7), [true, true, true]);
        assert_eq!(verdicts_of(3 * BROKEN, 8), [false, true, true]);
        assert_eq!(verdicts_of(3 * BROKEN - 1, 7), [true, false, true]);
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
