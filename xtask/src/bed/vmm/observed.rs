//! What was seen of one guest: KVM's counters, its faults one by one, the changes of memslots between them, QEMU's own
//! words and checks, on a migration target what memory QEMU had before the guest ran, and of a guest that converts memory
//! what each step cost.
//!
//! Reads the lines that drive.sh prints, and tells faults on RAM from the first touches of MMIO. It must never let a
//! trace that lost events, that disagrees with KVM's own counter, or that nobody made, pass for evidence.

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::checks::Checks;

const PAGE: u64 = 4096;

/// Below and above these, what the guest sees at an address need not be the RAM of that offset: ROMs and shadowed ROMs.
const LEGACY: std::ops::Range<u64> = 0xa0000..0x10_0000;

/// What QEMU says of every guest here, since run.rs gives the outer one a single CPU.
const OWN_DOING: &str = "exceeds the recommended cpus supported by KVM (1)";

/// The state of one page of QEMU's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    /// QEMU has none.
    Absent,
    /// The page of zeros that all share; the first write to it faults, wherever it is mapped.
    Zeros,
    /// A page of QEMU's own.
    Own,
}

/// One guest, as it is being read.
#[derive(Debug, Default)]
pub struct Observed {
    counters: Vec<(String, u64)>,
    faults: Vec<Fault>,
    slot_changes: u64,
    lost: u64,
    /// Lines of QEMU's standard error.
    said: Vec<String>,
    checks: Checks,
    /// The status with which QEMU ended of itself.
    ended: Option<i32>,
    /// There was no trace.
    untraced: bool,
    conversion: Option<Conversion>,
    /// Runs of pages from guest address 0; empty where the guest was not restored.
    pages: Vec<(Page, u64)>,
}

#[derive(Debug)]
struct Fault {
    address: u64,
    mmio: bool,
    /// Changes of memslots that came before it.
    slot_changes: u64,
}

/// The figures of one guest.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Figures {
    /// Stage-2 faults, MMIO included, as KVM counts them.
    pub faults: u64,
    pub exits: u64,
    /// First touches of MMIO among the faults.
    pub mmio: u64,
    /// Faults on RAM and ROM after the last change of a memslot.
    pub after_last_slot_change: u64,
    /// Faults on pages that QEMU had, with content, before the guest ran; of a restored guest only.
    pub on_restored: Option<u64>,
    /// Where the first of those that should not be were: guest addresses.
    pub examples: Vec<u64>,
    /// What QEMU said: warnings and errors.
    pub said: Vec<String>,
    /// The status with which QEMU ended, where it was not told to.
    pub ended: Option<i32>,
    pub slots: Slots,
    /// Of a guest that converts its memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub conversion: Option<Conversion>,
}

/// What a guest did that converts its memory.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Conversion {
    /// What it has answered to, as it must be.
    pub steps: Vec<Step>,
    /// What QEMU has stopped the VM at.
    pub stopped_at: Option<String>,
    /// What the host finds in a page that is shared, and in one that is private.
    pub seen: Vec<u32>,
}

/// One step of such a guest's.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    pub name: String,
    /// What stands for the content of all memory that it has converted.
    pub sum: u32,
    pub faults: u64,
    pub exits: u64,
}

impl Conversion {
    /// The faults of a step that was done.
    pub fn faults(&self, name: &str) -> Option<u64> {
        self.steps.iter().find(|step| step.name == name).map(|step| step.faults)
    }
}

/// The changes of memslots, and what QEMU's checks said of them where it made any.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Slots {
    /// Times that KVM was told of a change.
    pub changes: u64,
    pub checked: u64,
    /// Of these: what the library would not have given to KVM, and what breaks the rule of alignment.
    pub refused: u64,
    pub breaches: u64,
    /// Mappings of 4 KiB and of 2 MiB that were predicted of the slots there are in the end.
    pub expected_4k: u64,
    pub expected_2m: u64,
    /// Those that KVM has; 0 where the guest is gone.
    pub mapped_4k: u64,
    pub mapped_2m: u64,
}

impl Observed {
    /// Takes in a line of drive.sh's; answers whether it was one.
    pub fn take(&mut self, line: &str) -> bool {
        self.parse(line).is_some()
    }

    fn parse(&mut self, line: &str) -> Option<()> {
        match line.split_once(' ') {
            Some(("said", text)) => {
                if !text.contains(OWN_DOING) {
                    self.said.push(text.into());
                }
                return Some(());
            }
            Some(("trace", text)) => {
                self.checks.take(text);
                return Some(());
            }
            _ => {}
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["counter", name, value] => self.counters.push((name.into(), value.parse().ok()?)),
            ["fault", address] => {
                let address = u64::from_str_radix(address, 16).ok()?;
                self.faults.push(Fault { address, mmio: false, slot_changes: self.slot_changes });
            }
            ["mmio", gfn] => {
                let gfn = u64::from_str_radix(gfn, 16).ok()?;
                // The fault that found it was the last there: it is marked while that is being handled.
                let fault = self.faults.iter_mut().rev().find(|fault| fault.address / PAGE == gfn);
                fault?.mmio = true;
            }
            ["slot"] => self.slot_changes += 1,
            ["ended", status] => self.ended = Some(status.parse().ok()?),
            ["lost", count] => self.lost = count.parse().ok()?,
            ["untraced"] => self.untraced = true,
            ["step", name, sum, faults, exits] => {
                let sum = u32::from_str_radix(sum, 16).ok()?;
                let (faults, exits) = (faults.parse().ok()?, exits.parse().ok()?);
                let step = Step { name: name.into(), sum, faults, exits };
                self.conversion.get_or_insert_default().steps.push(step);
            }
            ["stopped", name] => {
                self.conversion.get_or_insert_default().stopped_at = Some(name.into());
            }
            ["seen", _, word] => {
                let word = u32::from_str_radix(word, 16).ok()?;
                self.conversion.get_or_insert_default().seen.push(word);
            }
            ["pages", kind, count] => {
                let kind = match kind {
                    "none" => Page::Absent,
                    "zero" => Page::Zeros,
                    "memory" => Page::Own,
                    _ => return None,
                };
                self.pages.push((kind, count.parse().ok()?));
            }
            _ => return None,
        }
        Some(())
    }

    /// What it comes to.
    pub fn figures(&self) -> Result<Figures> {
        ensure!(self.lost == 0, "the trace lost {} events", self.lost);
        self.checks.ensure_readable()?;
        let traced = self.faults.len() as u64;
        if let Some(status) = self.ended {
            // The counters are gone with the VM.
            let (ended, said) = (Some(status), self.said.clone());
            return Ok(Figures {
                faults: traced,
                ended,
                said,
                slots: self.slots(0, 0),
                ..Figures::default()
            });
        }
        let faults = self.counter("pf_taken")?;
        if let Some(conversion) = &self.conversion {
            let (exits, said) = (self.counter("exits")?, self.said.clone());
            return Ok(Figures {
                faults,
                exits,
                said,
                conversion: Some(conversion.clone()),
                ..Figures::default()
            });
        }
        ensure!(!self.untraced, "the kernel has no tracing");
        ensure!(traced == faults, "KVM counted {faults} faults, but {traced} were traced");
        let real: Vec<&Fault> = self.faults.iter().filter(|fault| !fault.mmio).collect();
        let late: Vec<&&Fault> =
            real.iter().filter(|fault| fault.slot_changes == self.slot_changes).collect();
        let restored: Vec<&&Fault> = real.iter().filter(|fault| self.was_restored(fault.address)).collect();
        let is_restored = !self.pages.is_empty();
        let examples = if is_restored { &restored } else { &late };
        Ok(Figures {
            faults,
            exits: self.counter("exits")?,
            mmio: traced - real.len() as u64,
            after_last_slot_change: late.len() as u64,
            on_restored: is_restored.then_some(restored.len() as u64),
            examples: examples.iter().take(8).map(|fault| fault.address).collect(),
            said: self.said.clone(),
            ended: None,
            slots: self.slots(self.counter("pages_4k")?, self.counter("pages_2m")?),
            conversion: None,
        })
    }

    fn slots(&self, mapped_4k: u64, mapped_2m: u64) -> Slots {
        let expected = self.checks.expected();
        Slots {
            changes: self.slot_changes,
            checked: self.checks.count(),
            refused: self.checks.refused(),
            breaches: self.checks.breaches(),
            expected_4k: expected.small,
            expected_2m: expected.large,
            mapped_4k,
            mapped_2m,
        }
    }

    fn counter(&self, name: &str) -> Result<u64> {
        let counter = self.counters.iter().find(|(known, _)| known == name);
        Ok(counter.with_context(|| format!("KVM's counter {name} was not printed"))?.1)
    }

    /// Whether a guest address had content before the guest ran. What cannot be looked up counts as if it had.
    fn was_restored(&self, address: u64) -> bool {
        self.page(address).is_none_or(|page| page == Page::Own)
    }

    fn page(&self, address: u64) -> Option<Page> {
        let mut end = 0;
        let run = self.pages.iter().find(|(_, count)| {
            end += count * PAGE;
            address < end
        });
        run.filter(|_| !LEGACY.contains(&address)).map(|(page, _)| *page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(lines: &str) -> Observed {
        let mut observed = Observed::default();
        for line in lines.lines() {
            assert!(observed.take(line), "{line}");
        }
        observed
    }

    #[test]
    fn first_touches_of_mmio_and_what_came_before_a_slot_change_are_told_apart() {
        let figures = observed(
            "counter pf_taken 4\ncounter exits 9\ncounter pages_4k 7\ncounter pages_2m 1\nlost 0\nslot\nfault 1000\n\
             slot\nfault fee000f0\nmmio fee00\nfault 2000\nfault fec00000\nmmio fec00",
        );
        let figures = figures.figures().unwrap();
        assert_eq!((figures.faults, figures.exits, figures.mmio), (4, 9, 2));
        assert_eq!((figures.after_last_slot_change, figures.on_restored), (1, None));
        assert_eq!(figures.examples, [0x2000]);
    }

    #[test]
    fn a_fault_counts_against_a_restore_only_where_there_was_content() {
        let figures = observed(
            "counter pf_taken 6\ncounter exits 9\ncounter pages_4k 7\ncounter pages_2m 1\nlost 0\npages memory 512\n\
             pages zero 1\npages none 511\nfault 1000\nfault 200000\nfault 201000\nfault c0000\nfault fffff000\nfault 1ff000",
        );
        let figures = figures.figures().unwrap();
        assert_eq!(figures.on_restored, Some(4));
        assert_eq!(figures.examples, [0x1000, 0xc0000, 0xffff_f000, 0x1f_f000]);
    }

    #[test]
    fn a_guest_that_converts_memory_has_steps_and_no_trace() {
        let lines = "step random c0d22786 3 564\nseen 1000000 5a5a5a5a\nstopped span\n\
                     counter pf_taken 9\ncounter exits 700\nuntraced";
        let figures = observed(lines).figures().unwrap();
        let conversion = figures.conversion.unwrap();
        assert_eq!(
            (figures.faults, conversion.faults("random"), conversion.faults("span")),
            (9, Some(3), None)
        );
        assert_eq!((conversion.steps[0].sum, &conversion.seen[..]), (0xc0d2_2786, &[0x5a5a_5a5a][..]));
        assert_eq!(conversion.stopped_at.as_deref(), Some("span"));
        assert!(observed("counter pf_taken 0\ncounter exits 7\nuntraced").figures().is_err());
    }

    #[test]
    fn a_trace_that_is_not_whole_is_no_evidence() {
        let lost = observed("counter pf_taken 1\ncounter exits 1\nfault 0\nlost 3");
        assert!(lost.figures().unwrap_err().to_string().contains("lost 3"));
        let disagrees = observed("counter pf_taken 2\ncounter exits 1\nfault 0\nlost 0");
        assert!(disagrees.figures().unwrap_err().to_string().contains("2 faults, but 1"));
    }

    #[test]
    fn a_qemu_that_ended_has_no_counters_and_its_words_are_kept() {
        let figures = observed(
            "said qemu: cpus requested (2) exceeds the recommended cpus supported by KVM (1)\n\
             said qemu: it is misaligned\nsaid map it higher\nended 134\nslot\nlost 0",
        );
        let figures = figures.figures().unwrap();
        assert_eq!((figures.ended, figures.slots.changes), (Some(134), 1));
        assert_eq!(figures.said, ["qemu: it is misaligned", "map it higher"]);
    }

    #[test]
    fn a_trace_of_checks_that_is_not_understood_is_no_evidence() {
        let odd = observed("counter pf_taken 0\ncounter exits 1\nlost 0\ntrace kvm_prep_slot Slot#zero");
        assert!(odd.figures().unwrap_err().to_string().contains("Slot#zero"));
    }

    #[test]
    fn a_line_of_somebody_elses_is_not_taken() {
        assert!(!Observed::default().take("Killed"));
        assert!(!Observed::default().take("fault xyz"));
    }
}
