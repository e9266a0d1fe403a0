//! The cases: which machine, with which pages, in which way, booted or restored, and the options that make it so.
//!
//! The one place that knows how the patched QEMU is told to use the library.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

/// How much memory every guest has; drive.sh knows it too.
pub const MEMORY_MIB: u64 = 256;

/// The options of `contrib/qemu` that switch the library on, and what pc and q35 need besides, since their firmware
/// deletes and recreates memslots.
const PREPARED: &str = "kvm,prep=on";
const PREPARED_AND_KEPT: &str = "kvm,prep=on,prep-keep-mappings=on";

/// The one program or the other, by its path in the outer guest.
pub const PLAIN: &str = "/plain";
pub const PATCHED: &str = "/patched";

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
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Nothing, in a QEMU without the patches.
    Plain,
    /// What that QEMU calls prealloc.
    Prealloc,
    /// Nothing, in the patched one.
    Off,
    /// The library's work.
    Kvmprep,
}

/// How the guest comes to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// From its firmware on.
    Boot,
    /// From a file that another QEMU left: the target of a migration.
    Restore,
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
                    cases.extend(Way::value_variants().iter().map(of));
                }
            }
        }
        cases
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
        let (backend, more) = match self.way {
            Way::Prealloc => (
                ",memory-backend=ram",
                format!(" -object memory-backend-ram,id=ram,size={MEMORY_MIB}M,prealloc=on"),
            ),
            _ => ("", String::new()),
        };
        let (phase, accelerator) = (name(&self.phase), self.accelerator());
        format!("{self} {phase} {huge_pages} {machine}{backend} {program} -accel {accelerator}{more}\n")
    }

    fn program(&self) -> &'static str {
        match self.way {
            Way::Plain | Way::Prealloc => PLAIN,
            Way::Off | Way::Kvmprep => PATCHED,
        }
    }

    fn accelerator(&self) -> &'static str {
        match (self.way, self.machine) {
            (Way::Plain | Way::Prealloc, _) => "kvm",
            (Way::Off, _) => "kvm,prep=off",
            (Way::Kvmprep, Machine::Microvm) => PREPARED,
            (Way::Kvmprep, _) => PREPARED_AND_KEPT,
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
        assert_eq!((names.len(), count), (48, 48));
    }

    #[test]
    fn only_the_patched_program_is_told_of_the_library() {
        for case in Case::all() {
            let line = case.line();
            assert_eq!(line.contains("prep="), line.contains(PATCHED), "{line}");
            assert_eq!(line.contains("prep=on"), case.way == Way::Kvmprep, "{line}");
        }
    }
}
