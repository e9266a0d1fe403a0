//! Makes a program that shows a difference as short as it will be while it still shows one of the kind.
//!
//! Operations are left out, many at once and then fewer, and what is left is run from the start on new machines: nothing
//! is assumed of which operation needs which.

use anyhow::Result;

use crate::operation::{Operation, Program};

/// Whether a program still shows what it is shrunk for.
pub type Shows<'a> = dyn FnMut(&Program) -> Result<bool> + 'a;

/// A program as short as can be.
pub fn shrink(program: &Program, shows: &mut Shows<'_>) -> Result<Program> {
    let mut shortest = program.clone();
    let mut length = shortest.operations.len().div_ceil(2).max(1);
    loop {
        let was = shortest.operations.len();
        let mut at = 0;
        while at < shortest.operations.len() {
            let candidate = without(&shortest, at, length);
            if !candidate.operations.is_empty() && shows(&candidate)? {
                shortest = candidate;
            } else {
                at += length;
            }
        }
        if length > 1 {
            length = length.div_ceil(2);
        } else if shortest.operations.len() == was {
            break;
        }
    }
    simplify(shortest, shows)
}

fn without(program: &Program, at: usize, length: usize) -> Program {
    let mut shorter = program.clone();
    let end = (at + length).min(shorter.operations.len());
    shorter.operations.drain(at..end);
    shorter
}

/// Has the operations that are left ask for less, where that shows the same.
fn simplify(program: Program, shows: &mut Shows<'_>) -> Result<Program> {
    let mut simplest = program;
    for at in 0..simplest.operations.len() {
        for simpler in simpler(simplest.operations[at]) {
            let mut candidate = simplest.clone();
            candidate.operations[at] = simpler;
            if shows(&candidate)? {
                simplest = candidate;
            }
        }
    }
    Ok(simplest)
}

fn simpler(operation: Operation) -> Vec<Operation> {
    match operation {
        Operation::SetRegion { slot, flags, gpa, size, hva, file, offset, .. } if flags != 0 => {
            vec![Operation::SetRegion {
                slot,
                flags: flags & 4,
                gpa,
                size,
                hva,
                file,
                offset,
                is_second: flags & 4 != 0,
            }]
        }
        Operation::PreFault { vcpu, gpa, flags, .. } => {
            vec![Operation::PreFault { vcpu, gpa, size: crate::operation::PAGE, flags }]
        }
        Operation::GuestWrite { vcpu, gpa, word } => {
            vec![Operation::GuestRead { vcpu, gpa }, Operation::GuestWrite { vcpu: 0, gpa, word }]
        }
        Operation::GuestRead { vcpu: 1, gpa } => vec![Operation::GuestRead { vcpu: 0, gpa }],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::{Setting, ThpPolicy};
    use kvmprep_model::personality::VmType;

    #[test]
    fn what_does_not_matter_is_left_out() {
        let read = |gpa| Operation::GuestRead { vcpu: 0, gpa };
        let operations = (0..40).map(read).collect();
        let setting = Setting { vm_type: VmType::Default, thp: ThpPolicy::Never, promised_elsewhere: 0 };
        let program = Program { setting, operations };
        let mut runs = 0;
        let shrunk = shrink(&program, &mut |candidate| {
            runs += 1;
            Ok(candidate.operations.contains(&read(7)) && candidate.operations.contains(&read(31)))
        });
        assert_eq!(shrunk.unwrap().operations, [read(7), read(31)]);
        assert!(runs < 100, "{runs}");
    }
}
