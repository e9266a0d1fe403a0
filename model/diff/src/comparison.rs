//! One program on two machines: what differs, and where.
//!
//! A program is followed to its first difference only: what comes after would follow from it.

use std::fmt;

use anyhow::Result;

use crate::machine::{Maker, Outcome};
use crate::operation::{Operation, Program};

/// The first difference in a program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Difference {
    /// The number of the operation.
    pub step: usize,
    /// What was done.
    pub operation: Operation,
    /// What is different.
    pub fields: Vec<&'static str>,
    /// On the one machine, which is right.
    pub left: Outcome,
    /// On the other.
    pub right: Outcome,
}

impl Difference {
    /// What makes two differences look like one: the same operation showed another value at the same place first.
    pub fn kind(&self) -> (&'static str, &'static str) {
        (self.operation.name(), self.fields.first().copied().unwrap_or(""))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "step {}: {:x?}", self.step, self.operation)?;
        writeln!(f, "  differs in: {}", self.fields.join(", "))?;
        writeln!(f, "  kernel: {}", self.left)?;
        write!(f, "  other:  {}", self.right)
    }
}

/// What came of a program on two machines.
pub struct Compared {
    /// How many operations were done.
    pub operations: u64,
    /// Each operation's name and what it answered.
    pub met: Vec<(&'static str, i64)>,
    /// The difference at which it ended, if there was one.
    pub difference: Option<Difference>,
}

/// Runs a program on a new machine of each.
pub fn compare(program: &Program, left: &dyn Maker, right: &dyn Maker) -> Result<Compared> {
    let is_traced = std::env::var_os("KVMPREP_DIFF_TRACE").is_some();
    // One after the other: two VMs of one process would share its memory.
    let mut outcomes = Vec::with_capacity(program.operations.len());
    {
        let mut machine = left.make(&program.setting)?;
        for operation in &program.operations {
            // For a kernel that does not come back from one.
            if is_traced {
                println!("{operation:x?}");
            }
            outcomes.push(machine.apply(operation));
        }
    }
    let mut machine = right.make(&program.setting)?;
    let mut met = Vec::with_capacity(outcomes.len());
    for (step, (operation, left)) in program.operations.iter().zip(outcomes).enumerate() {
        let right = machine.apply(operation);
        met.push((operation.name(), left.get("result").unwrap_or(0).min(0)));
        let fields = left.differences(&right);
        if !fields.is_empty() {
            let difference = Difference { step, operation: *operation, fields, left, right };
            return Ok(Compared { operations: step as u64 + 1, met, difference: Some(difference) });
        }
    }
    Ok(Compared { operations: program.operations.len() as u64, met, difference: None })
}
