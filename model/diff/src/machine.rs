//! What a machine is, and what it shows after each operation.
//!
//! All that can be seen of KVM is in an outcome: what the call answered, what it wrote back, and the counters. Nothing in
//! it may depend on time or on what ran before, or two runs of one kernel would differ.

use std::fmt;

use kvmprep_model::errno::Errno;

use crate::operation::{Operation, Setting};

/// Something that carries out operations.
pub trait Machine {
    /// Carries one out.
    fn apply(&mut self, operation: &Operation) -> Outcome;
}

/// Something that makes machines, each as if none had been before.
pub trait Maker {
    /// Makes one.
    fn make(&self, setting: &Setting) -> anyhow::Result<Box<dyn Machine + '_>>;
}

/// What came of an operation.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    fields: Vec<(&'static str, i64)>,
}

impl Outcome {
    /// Of a call that answers so: a negative number is an error's.
    pub fn of(result: i64) -> Self {
        Outcome { fields: vec![("result", result)] }
    }

    /// Adds something that is seen.
    pub fn add(&mut self, name: &'static str, value: i64) {
        self.fields.push((name, value));
    }

    /// Adds a number without sign.
    pub fn add_unsigned(&mut self, name: &'static str, value: u64) {
        self.add(name, value as i64);
    }

    /// Adds a dirty bitmap: where in it there are bits, and which.
    pub fn add_dirty(&mut self, words: &[u64]) {
        for (place, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
            self.add("dirty.at", i64::try_from(place).unwrap_or(-1));
            self.add_unsigned("dirty", *word);
        }
    }

    /// The first of that name.
    pub fn get(&self, name: &str) -> Option<i64> {
        self.fields.iter().find(|(other, _)| *other == name).map(|(_, value)| *value)
    }

    /// All of it in plain numbers, for who has no names for them.
    pub fn figures(&self) -> String {
        let fields: Vec<String> = self.fields.iter().map(|(name, value)| format!("{name}={value}")).collect();
        fields.join(" ")
    }

    /// Names of what differs from another, each once.
    pub fn differences(&self, other: &Outcome) -> Vec<&'static str> {
        let mut names: Vec<&'static str> = Vec::new();
        let longest = self.fields.len().max(other.fields.len());
        for at in 0..longest {
            let (ours, theirs) = (self.fields.get(at), other.fields.get(at));
            if ours != theirs {
                names.extend(ours.or(theirs).map(|(name, _)| *name));
                // From where the shapes differ on there is nothing to hold against each other.
                if ours.map(|field| field.0) != theirs.map(|field| field.0) {
                    break;
                }
            }
        }
        names.dedup();
        names
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (name, value)) in self.fields.iter().enumerate() {
            let space = if place == 0 { "" } else { " " };
            match *name {
                "result" if *value < 0 => write!(f, "{space}{name}={:?}", errno(*value))?,
                "gpa" | "size" | "word" | "dirty" => write!(f, "{space}{name}={value:#x}")?,
                _ => write!(f, "{space}{name}={value}")?,
            }
        }
        Ok(())
    }
}

/// The error that a call answered with, as a negative number.
pub fn errno(result: i64) -> Errno {
    Errno(i32::try_from(-result).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let mut left = Outcome::of(0);
        let mut right = Outcome::of(0);
        left.add("pages_4k", 1);
        right.add("pages_4k", 2);
        left.add("pf_taken", 1);
        right.add("pf_taken", 1);
        assert_eq!(left.differences(&right), ["pages_4k"]);
        assert!(left.differences(&left.clone()).is_empty());
    }

    #[test]
    fn what_one_has_alone_differs() {
        let mut left = Outcome::of(0);
        left.add("mmio", 1);
        assert_eq!(left.differences(&Outcome::of(0)), ["mmio"]);
        assert_eq!(Outcome::of(0).differences(&left), ["mmio"]);
    }
}
