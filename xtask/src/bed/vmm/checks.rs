//! What QEMU's trace says of the checks of its memslots: each change before KVM was told of it, and the pages that were
//! predicted.
//!
//! Reads two trace events of `contrib/qemu`, a line each, the second right behind the first. It must never take a line
//! that it cannot read for one that says nothing.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

/// The trace events.
const CHECKED: &str = "kvm_prep_slot";
const PREDICTED: &str = "kvm_prep_slot_pages";

/// `KVMPREP_CHANGE_DELETE`.
const DELETE: u64 = 2;

/// A memslot by its address space and number.
type Id = (u64, u64);

/// Numbers of mappings by their size.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    pub small: u64,
    pub large: u64,
}

/// One check.
#[derive(Debug)]
struct Check {
    id: Id,
    change: u64,
    breaches: u64,
    /// The library's answer: 0, or an error.
    answer: i64,
    expected: Pages,
}

/// The checks of one QEMU, as they are being read.
#[derive(Debug, Default)]
pub struct Checks {
    checks: Vec<Check>,
    unreadable: Option<String>,
}

impl Checks {
    /// Takes in a line of the trace.
    pub fn take(&mut self, line: &str) {
        if self.parse(line).is_none() {
            self.unreadable.get_or_insert(line.to_string());
        }
    }

    fn parse(&mut self, line: &str) -> Option<()> {
        let (event, rest) = line.split_once(' ')?;
        match event {
            CHECKED => {
                let numbers = numbers::<8>(rest)?;
                let [space, slot, _gpa, _size, _hva, change, breaches, answer] = numbers;
                let id = (unsigned(space)?, unsigned(slot)?);
                let (change, breaches) = (unsigned(change)?, unsigned(breaches)?);
                self.checks.push(Check { id, change, breaches, answer, expected: Pages::default() });
            }
            PREDICTED => {
                let [space, slot, _, _, _, _huge, large, small, _, _] = numbers::<10>(rest)?;
                let check = self.checks.last_mut()?;
                check.expected = Pages { small: unsigned(small)?, large: unsigned(large)? };
                return (check.id == (unsigned(space)?, unsigned(slot)?)).then_some(());
            }
            _ => return None,
        }
        Some(())
    }

    /// Whether every line was understood.
    pub fn ensure_readable(&self) -> Result<()> {
        match &self.unreadable {
            None => Ok(()),
            Some(line) => bail!("a line of QEMU's trace is not understood: {line}"),
        }
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.checks.len() as u64
    }

    /// How many the library would not have given to KVM.
    pub fn refused(&self) -> u64 {
        self.checks.iter().filter(|check| check.answer != 0).count() as u64
    }

    /// How many break the rule of alignment.
    pub fn breaches(&self) -> u64 {
        self.checks.iter().filter(|check| check.breaches != 0).count() as u64
    }

    /// What was predicted of the slots that there are in the end, SMM's address space left out: it has the same memory.
    pub fn expected(&self) -> Pages {
        let mut slots = BTreeMap::new();
        for check in self.checks.iter().filter(|check| check.id.0 == 0) {
            match check.change {
                DELETE => slots.remove(&check.id),
                _ => slots.insert(check.id, check.expected),
            };
        }
        slots.values().fold(Pages::default(), |sum, pages| Pages {
            small: sum.small + pages.small,
            large: sum.large + pages.large,
        })
    }
}

/// The first numbers of a line of `NAME=NUMBER` and `NAME#NUMBER`, hexadecimal ones with 0x.
fn numbers<const N: usize>(text: &str) -> Option<[i64; N]> {
    let words = text.split_ascii_whitespace().filter_map(|word| word.split_once(['=', '#']));
    let values = words.take(N).map(|(_, value)| match value.strip_prefix("0x") {
        // Addresses of the kernel's half wrap; they are not looked at.
        Some(digits) => u64::from_str_radix(digits, 16).ok().map(|number| number as i64),
        None => value.parse().ok(),
    });
    values.collect::<Option<Vec<i64>>>()?.try_into().ok()
}

fn unsigned(number: i64) -> Option<u64> {
    u64::try_from(number).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checks(lines: &[&str]) -> Checks {
        let mut checks = Checks::default();
        lines.iter().for_each(|line| checks.take(line));
        checks
    }

    const CREATED: [&str; 2] = [
        "kvm_prep_slot AddrSpace#0 Slot#3 gpa=0x100000 size=0xff00000 ua=0x7f0000300000 change=1 breaches=0x0 ret=0 ",
        "kvm_prep_slot_pages AddrSpace#0 Slot#3 allowed 1G=0 2M=127 4K=256 expected 1G=0 2M=126 4K=768 limits 1G=1 2M=1",
    ];
    const DELETED: [&str; 2] = [
        "kvm_prep_slot AddrSpace#0 Slot#3 gpa=0x0 size=0x0 ua=0x7f0000300000 change=2 breaches=0x0 ret=0 ",
        "kvm_prep_slot_pages AddrSpace#0 Slot#3 allowed 1G=0 2M=0 4K=0 expected 1G=0 2M=0 4K=0 limits 1G=0 2M=0",
    ];

    #[test]
    fn what_is_predicted_is_that_of_the_slots_there_are() {
        let lines = [CREATED, DELETED, CREATED].concat();
        let made = checks(&lines);
        made.ensure_readable().unwrap();
        assert_eq!((made.count(), made.refused(), made.breaches()), (3, 0, 0));
        assert_eq!(made.expected(), Pages { small: 768, large: 126 });
        assert_eq!(checks(&lines[..4]).expected(), Pages::default());
    }

    #[test]
    fn smm_has_the_same_memory_once_more() {
        let in_smm = CREATED.map(|line| line.replace("AddrSpace#0", "AddrSpace#1"));
        let made = checks(&[&CREATED[..], &[&in_smm[0], &in_smm[1]]].concat());
        assert_eq!((made.count(), made.expected().large), (2, 126));
    }

    #[test]
    fn refusals_and_breaches_are_counted() {
        let refused = CREATED[0].replace("ret=0 ", "ret=-17 it overlaps memslot 0 at gpa=7#9");
        let breach = CREATED[0].replace("breaches=0x0", "breaches=0x1");
        let made = checks(&[&refused, CREATED[1], &breach, CREATED[1]]);
        made.ensure_readable().unwrap();
        assert_eq!((made.count(), made.refused(), made.breaches()), (2, 1, 1));
    }

    #[test]
    fn a_line_that_is_not_understood_is_not_passed_over() {
        for line in ["kvm_prep_slot AddrSpace#0 Slot#3", "kvm_prep_end ret 0", CREATED[1], "kvm_prep_slot"] {
            assert!(checks(&[line]).ensure_readable().is_err(), "{line}");
        }
        assert!(checks(&[CREATED[0], &CREATED[1].replace("Slot#3", "Slot#4")]).ensure_readable().is_err());
    }
}
