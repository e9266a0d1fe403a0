//! KVM_PRE_FAULT_MEMORY.
//!
//! Page by page, of whatever size each turns out to have, until the range is done or something is in the way. What was
//! done stays done and is taken off the range; an error is told only if nothing was.

use super::fault::{Fault, FaultError, Outcome};
use super::slots::Reader;
use super::vcpu::{Nested, State, Vcpu};
use crate::errno::{Errno, Result};
use crate::mistake::{Mistake, mistaken};
use crate::mmu::AccessKind;
use crate::units::{Gfn, GfnRange, Level, PAGE_SIZE};

/// `struct kvm_pre_fault_memory`. What is left of the range is in it afterwards, whatever the answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PreFault {
    /// The first byte.
    pub gpa: u64,
    /// How many bytes.
    pub size: u64,
    /// None are known.
    pub flags: u64,
}

/// A fault of KVM's own that `struct kvm_run` tells of, beside the error (`KVM_EXIT_MEMORY_FAULT`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryFault {
    /// The first byte of the page, without the shared bit.
    pub gpa: u64,
    /// Always that of a page.
    pub size: u64,
    /// `KVM_MEMORY_EXIT_FLAG_PRIVATE`, or none.
    pub flags: u64,
}

impl Vcpu {
    /// KVM_PRE_FAULT_MEMORY.
    pub fn pre_fault(&self, range: &mut PreFault) -> Result<()> {
        self.vm.check_alive()?;
        if !self.vm.personality.has_pre_fault() {
            // Of an ioctl that it does not know, a vCPU says so.
            return Err(Errno::EINVAL);
        }
        let mut state = self.enter();
        (state.told, state.is_interrupted) = (None, false);
        let is_aligned = (range.gpa | range.size) % PAGE_SIZE == 0;
        let end = range.gpa.wrapping_add(range.size);
        if range.flags != 0 || !is_aligned || end <= range.gpa {
            return Err(Errno::EINVAL);
        }
        self.vm.settle(state.as_id(), GfnRange { start: Gfn::of_gpa(range.gpa), end: Gfn::of_gpa(end) });
        let slots = self.vm.slots.read();
        let whole = range.size;
        while range.size > 0 {
            match self.pre_fault_page(&mut state, &slots, *range) {
                Ok(done) => {
                    range.gpa += done;
                    range.size -= done;
                }
                Err(errno) if range.size == whole || mistaken(Mistake::APartlyDonePreFaultFails) => {
                    return Err(errno);
                }
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// Pre-faults the page at the start of the range; answers with how many bytes of the range it is.
    fn pre_fault_page(&self, state: &mut State, slots: &Reader<'_>, range: PreFault) -> Result<u64> {
        let vm = &self.vm;
        if self.is_signal_pending() {
            return Err(Errno::EINTR);
        }
        if !vm.confidential.allows_pre_fault() {
            return Err(Errno::EOPNOTSUPP);
        }
        let gfn = Gfn::of_gpa(range.gpa);
        if gfn.0 & vm.shared_bit().0 != 0 {
            return Err(Errno::EINVAL);
        }
        if state.nested == Some(Nested::WithTables) {
            return Err(Errno::EOPNOTSUPP);
        }
        let slots = slots.of(state.as_id());
        let privacy = vm.privacy(gfn);
        let mut fault = Fault::new(gfn, privacy, AccessKind::Read).by_pre_fault();
        let root = match vm.personality.pre_fault_lets_go_of_obsolete_roots() {
            true => state.root(self, privacy),
            false => state.root_if_none(self, privacy),
        };
        let level = loop {
            if self.is_signal_pending() {
                return Err(Errno::EINTR);
            }
            // Also of having been given that root.
            vm.check_alive()?;
            match self.handle_fault(&root, &slots, &mut fault) {
                // It would never end: no kernel looks for another root before the next page (`kvm_tdp_page_prefault`). Nobody
                // waits for that: the signal comes at once.
                Ok(Outcome::Retry) if root.is_invalid() => return Err(Errno::EINTR),
                Ok(Outcome::Fixed | Outcome::Spurious) => break fault.goal_level,
                Ok(Outcome::Retry) => {}
                Ok(Outcome::Emulate) => return Err(Errno::ENOENT),
                Err(FaultError { errno, exit, is_interrupted }) => {
                    (state.told, state.is_interrupted) = (exit, is_interrupted);
                    return Err(errno);
                }
            }
        };
        let end = page_end(gfn, level);
        Ok(range.size.min(end - range.gpa))
    }
}

fn page_end(gfn: Gfn, level: Level) -> u64 {
    GfnRange::of_page(gfn, level).end.gpa()
}
