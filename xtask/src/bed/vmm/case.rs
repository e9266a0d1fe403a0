//! The cases: which machine, with which pages, in which way, booted, restored or converting its memory, and the options
//! that make it so.
//!
//! The one place that knows how the patched QEMU is told to use the library.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use super::converter;

/// How much memory every guest has; drive.sh knows it too.
pub const MEMORY_MIB: u64 = 256;

/// The options of `contrib/qemu` that switch the library on, and what pc and q35 need besides, since their firmware
/// deletes and recreates memslots.
const PREPARED: &str = "kvm,prep=on";
const PREPARED_AND_KEPT: &str = "kvm,prep=on,prep-keep-mappings=on";

/// The option that has memory converted through the library.
const CONVERTING: &str = "kvm,prep-convert=on";

/// What makes a microvm with private memory of two blocks, whose firmware is the guest of converter.rs. A VM with private
/// memory has no SMM in KVM.
const PRIVATE_MEMORY: &str = ",smm=off,confidential-guest-support=protected";
const PRIVATE_MEMORY_PARTS: &str = " -object sw-protected-guest,id=protected \
     -object memory-backend-ram,id=low,size=128M -object memory-backend-ram,id=high,size=128M \
     -numa node,memdev=low -numa node,memdev=high -bios";

/// The option that has memslots checked, and what makes QEMU tell of each.
const WARN: &str = "prep-check=warn";
const STRICT: &str = "prep-check=strict";
const TRACED: &str = " -trace kvm_prep_slot -trace kvm_prep_slot_pages -D /tmp/trace";

/// What makes QEMU put the guest's memory above 4 GiB at an odd MiB of its block, and so where no page of 2 MiB fits.
const MISFIT: &str = ",max-ram-below-4g=129M";

/// The one program or the other, by its path in the outer guest.
pub const PLAIN: &str = "/plain";
pub const PATCHED: &str = "/patched";
pub const PRIVATE: &str = "/private";

/// A machine of QEMU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    Microvm,
    Pc,
    Q35,
}

/// The pages that QEMU's memory consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
pub enum Memory {
    /// Small ones only.
    #[value(name = "4k")]
    #[serde(rename = "4k")]
    Small,
    /// Transparent huge pages.
    #[value(name = "thp")]
    #[serde(rename = "thp")]
    Huge,
}

/// What is done about the guest's memory before it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Nothing, in a QEMU without the patches.
    Plain,
    /// What that QEMU calls prealloc.
    Prealloc,
    /// Nothing, in the patched one.
    Off,
    /// The library's work.
    Kvmprep,
    /// The same, and QEMU is to end if it finds a memslot that is not as it should be.
    Strict,
    /// Memory laid out so that huge pages do not fit; memslots are checked, and QEMU is to warn.
    MisfitWarned,
    /// The same, and QEMU is to end.
    MisfitRefused,
    /// The library is to convert private memory, where the guest has any.
    Convert,
}

/// How the guest comes to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// From its firmware on.
    Boot,
    /// From a file that another QEMU left: the target of a migration.
    Restore,
    /// From firmware that converts memory between private and shared.
    Convert,
}

/// One guest to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Case {
    pub machine: Machine,
    pub memory: Memory,
    pub way: Way,
    pub phase: Phase,
}

impl Case {
    /// Every case there is.
    pub fn all() -> Vec<Case> {
        let mut cases = Vec::new();
        for &phase in Phase::value_variants() {
            for &machine in Machine::value_variants() {
                for &memory in Memory::value_variants() {
                    let of = |way: &Way| Case { machine, memory, way: *way, phase };
                    cases.extend(Way::value_variants().iter().map(of).filter(Case::exists));
                }
            }
        }
        cases
    }

    /// Memslots are checked alike when a guest is restored; and only with a split at 4 GiB, and where there are huge
    /// pages at all, can memory be laid out so that they do not fit. Private memory is had on the smallest machine alone,
    /// where the library converts it, or QEMU's own code.
    fn exists(&self) -> bool {
        if self.phase == Phase::Convert {
            return self.machine == Machine::Microvm && matches!(self.way, Way::Off | Way::Convert);
        }
        match self.way {
            Way::Strict | Way::Convert => self.phase == Phase::Boot,
            Way::MisfitWarned | Way::MisfitRefused => {
                let has_split = matches!(self.machine, Machine::Pc | Machine::Q35);
                has_split && (self.phase, self.memory) == (Phase::Boot, Memory::Huge)
            }
            _ => true,
        }
    }

    /// The same guest in another way.
    pub fn in_way(self, way: Way) -> Case {
        Case { way, ..self }
    }

    /// The case as a line of drive.sh's.
    pub fn line(&self) -> String {
        let (machine, program) = (name(&self.machine), self.program());
        let huge_pages = match self.memory {
            Memory::Small => "never",
            Memory::Huge => "always",
        };
        let (property, more) = match self.way {
            Way::Plain | Way::Off | Way::Kvmprep => ("", String::new()),
            Way::Prealloc => (
                ",memory-backend=ram",
                format!(" -object memory-backend-ram,id=ram,size={MEMORY_MIB}M,prealloc=on"),
            ),
            Way::Strict => ("", TRACED.to_string()),
            Way::MisfitWarned | Way::MisfitRefused => (MISFIT, TRACED.to_string()),
            Way::Convert => ("", String::new()),
        };
        let (property, more) = match self.phase {
            Phase::Convert => (PRIVATE_MEMORY, format!("{PRIVATE_MEMORY_PARTS} {}", converter::INSIDE)),
            Phase::Boot | Phase::Restore => (property, more),
        };
        let phase = if self.way == Way::MisfitRefused { "refuse".to_string() } else { name(&self.phase) };
        let accelerator = self.accelerator();
        format!("{self} {phase} {huge_pages} {machine}{property} {program} -accel {accelerator}{more}\n")
    }

    fn program(&self) -> &'static str {
        match self.way {
            _ if self.phase == Phase::Convert => PRIVATE,
            Way::Plain | Way::Prealloc => PLAIN,
            _ => PATCHED,
        }
    }

    fn accelerator(&self) -> String {
        let prepared = match self.machine {
            Machine::Microvm => PREPARED,
            Machine::Pc | Machine::Q35 => PREPARED_AND_KEPT,
        };
        match self.way {
            Way::Plain | Way::Prealloc => "kvm".to_string(),
            Way::Off => "kvm,prep=off".to_string(),
            Way::Kvmprep => prepared.to_string(),
            Way::Strict => format!("{prepared},{STRICT}"),
            // Checking is of use alone.
            Way::MisfitWarned => format!("kvm,{WARN}"),
            Way::MisfitRefused => format!("kvm,{STRICT}"),
            Way::Convert => CONVERTING.to_string(),
        }
    }
}

/// The name by which one of the above is asked for.
pub fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_string()).unwrap_or_default()
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { machine, memory, way, phase } = self;
        write!(f, "{}-{}-{}-{}", name(phase), name(machine), name(memory), name(way))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let mut names: Vec<String> = Case::all().iter().map(Case::to_string).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!((names.len(), count), (68, 68));
    }

    #[test]
    fn only_the_patched_program_is_told_of_the_library() {
        for case in Case::all() {
            let line = case.line();
            assert_eq!(line.contains("prep"), !line.contains(PLAIN), "{line}");
            let is_prepared = matches!(case.way, Way::Kvmprep | Way::Strict);
            assert_eq!(line.contains("prep=on"), is_prepared, "{line}");
        }
    }
}
