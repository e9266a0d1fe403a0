//! What a guest of the model does: steps that the test has queued, in place of a real guest's code.
//!
//! A step is one act, or the same one at each of many addresses. It is done from where it was left: an access that the VMM has to
//! see to is made again at the next KVM_RUN, and what was done of a step is not done twice. How KVM_RUN ends is decided in
//! [`run`](crate::run), not here.

use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::units::{Privacy, Width};

/// What a step does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Reads words; with an address, they are written there, one after the other, each as 8 bytes of the program's memory.
    Read {
        /// Where the words go.
        values: Option<u64>,
    },
    /// Writes words.
    Write {
        /// The first.
        value: u64,
        /// What is added for each further one.
        stride: u64,
    },
    /// Executes from the page.
    Fetch,
    /// Reads words, and writes each elsewhere.
    Copy {
        /// Where the first goes.
        to: u64,
        /// How far apart.
        stride: u64,
    },
    /// Accepts the page.
    Accept,
    /// Puts a word out on a port.
    Out {
        /// The port.
        port: u16,
        /// The word; none for what the last hypercall was answered.
        value: Option<u32>,
    },
    /// Calls KVM, with these registers. The answer is in RAX, as KVM_GET_REGS says it.
    Hypercall {
        /// Which call.
        number: u64,
        /// Its arguments.
        args: [u64; 4],
        /// Whether it is made again as long as it is answered with EAGAIN.
        is_repeated: bool,
    },
    /// Halts.
    Halt,
    /// Runs on until it is interrupted.
    Loop,
}

/// A step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// What it does.
    pub kind: Kind,
    /// How the guest addresses the memory.
    pub privacy: Privacy,
    /// The first address, without a shared bit.
    pub gpa: u64,
    /// How often.
    pub count: u64,
    /// How far apart.
    pub stride: u64,
    /// How many bytes each word has.
    pub width: Width,
}

impl Step {
    /// A step that is done once, of words of 4 bytes.
    pub fn once(kind: Kind, gpa: u64) -> Self {
        Step { kind, privacy: Privacy::Shared, gpa, count: 1, stride: 0, width: Width::Four }
    }

    /// Whether it makes sense: EINVAL if not.
    pub fn check(&self) -> Result<()> {
        let width = self.width.bytes() as u64;
        let is_aligned =
            |address: u64, stride: u64| address % width == 0 && (self.count == 1 || stride % width == 0);
        let makes_sense = self.count != 0
            && match self.kind {
                Kind::Read { .. } | Kind::Write { .. } => is_aligned(self.gpa, self.stride),
                Kind::Copy { to, stride } => is_aligned(self.gpa, self.stride) && is_aligned(to, stride),
                Kind::Out { .. } => self.width != Width::Eight,
                _ => true,
            };
        if makes_sense { Ok(()) } else { Err(Errno::EINVAL) }
    }

    /// The address of the nth.
    pub fn address(&self, nth: u64) -> u64 {
        self.gpa.wrapping_add(nth.wrapping_mul(self.stride))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_lie_at_multiples_of_their_width() {
        let copy = |gpa, to| Step::once(Kind::Copy { to, stride: 0 }, gpa).check();
        assert_eq!(copy(4, 8), Ok(()));
        assert_eq!(copy(2, 8), Err(Errno::EINVAL));
        assert_eq!(copy(4, 6), Err(Errno::EINVAL));
        let wide = Step { width: Width::Eight, ..Step::once(Kind::Out { port: 1, value: Some(2) }, 0) };
        assert_eq!(wide.check(), Err(Errno::EINVAL));
    }
}
