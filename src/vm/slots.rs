//! A guest's slots change: announced, done, noted.
//!
//! This is where changes meet running work, which lets go of the memory first and loses what the change has cost. No lock
//! is held across a system call that can wait.

use super::conversion::would_deadlock;
use super::{Memory, Vm};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{Errno, FileId};
use crate::memslot::check::{self, Change, Descriptor, Verdict, check_overlap};
use crate::memslot::{Memslot, SlotId, SlotRecord, address_space, check_guest_width};
use crate::populate::coverage::Loss;
use crate::private::turns::OwnTurn;

/// Why KVM did not take a slot. What is known of any refusal of its own goes before what is known of slots.
fn refused_slot(slot: &Memslot, verdict: Verdict, errno: Errno) -> Error {
    if let (libc::EINVAL, Some(binding)) = (errno.0, verdict.binds) {
        let fd = slot.region.guest_memfd;
        let or_none = if binding.is_certain { "" } else { ", or none" };
        let error = Error::invalid(
            Reason::GmemOtherVm,
            format!(
                "KVM refused the memslot: guest_memfd {fd} is another VM's{or_none}, or there is a slot that the handle was \
                 not told of"
            ),
        );
        let error = error.hint(
            "use a guest_memfd made for this VM; tell the handle of each slot that has this number or part of the file",
        );
        return Error { range: slot.range(), ..error.stage(Stage::Memslot).slot(slot.id()) };
    }
    let mut error = Error::kernel(errno, "KVM_SET_USER_MEMORY_REGION").stage(Stage::Memslot).slot(slot.id());
    error.range = slot.range();
    if error.reason != Reason::KernelRefused {
        return error;
    }
    error.hint(match errno.0 {
        libc::EINVAL => {
            "tell the handle of every slot there is, and of each change: by those it was told of, this one is right"
        }
        libc::EEXIST => "tell the handle of every slot there is: KVM has one there already",
        libc::ENOTTY => "needs x86-64, and for a guest_memfd Linux 6.8",
        _ => "the slot is as it was before",
    })
}

impl Vm {
    /// Replaces the record by `slots`.
    pub fn set_memslots(&self, slots: &[Memslot]) -> Result<()> {
        let gpa_bits = self.memslot_gpa_bits()?;
        let mut fresh = SlotRecord::default();
        for slot in slots {
            slot.check(gpa_bits)?;
            let unusable = |message: &str| {
                Error::invalid(Reason::BadValue, message).stage(Stage::Memslot).slot(slot.id())
            };
            if slot.range().is_none() {
                return Err(
                    unusable("a slot in the list has size 0").hint("list the slots there are, not deletions")
                );
            }
            if fresh.get(slot.id()).is_some() {
                return Err(unusable("a slot number stands in the list twice").hint("list each slot once"));
            }
            check_overlap(&fresh, slot)?;
            fresh.replace(slot, self.guest_memfd_of(slot));
            if self.is_one_sided(slot) {
                fresh.set_one_sided(slot.id());
            }
        }
        let gone: Vec<Memslot> =
            self.memory().slots.iter().filter(|old| fresh.get(old.id()) != Some(old)).copied().collect();
        // Before any is announced: who is refused has changed nothing.
        for old in &gone {
            self.check_turn(old.id())?;
        }
        for (index, old) in gone.iter().enumerate() {
            // So it may still be, where another thread has come to wait for this one since.
            self.changing(old.id()).inspect_err(|_| {
                let mut memory = self.memory();
                gone[..index].iter().for_each(|announced| memory.slots.set_changing(announced.id(), false));
            })?;
        }
        let mut memory = self.memory();
        for old in &gone {
            self.note_loss(&mut memory, Some(old), fresh.get(old.id()));
        }
        memory.slots = fresh;
        memory.changes += 1;
        Ok(())
    }

    /// A slot is about to change: returns once nobody touches its memory.
    pub fn changing(&self, slot: SlotId) -> Result<()> {
        // Before anything is waited for: who waits may hold up those that it waits for.
        self.check_turn(slot)?;
        let range = {
            let mut memory = self.memory();
            memory.slots.set_changing(slot, true);
            memory.changes += 1;
            let range = memory.slots.get(slot).and_then(Memslot::range);
            if range.is_some() && !self.mappings_are_kept {
                memory.coverage.zap_may_come();
            }
            range
        };
        if range.is_some() {
            self.await_pre_faults();
        }
        // Population is of address space 0 alone; the others' slots are in no queue.
        if let (Some(range), 0) = (range, address_space(slot)) {
            self.withdraw(range);
            if let Err(OwnTurn) = self.turns.wait(range) {
                self.memory().slots.set_changing(slot, false);
                return Err(would_deadlock(range).stage(Stage::Memslot).slot(slot));
            }
        }
        Ok(())
    }

    /// Refuses the change of a slot whose memory the calling thread is converting.
    fn check_turn(&self, slot: SlotId) -> Result<()> {
        let place = self.memory().slots.get(slot).and_then(Memslot::range);
        let Some(place) = place.filter(|_| address_space(slot) == 0) else { return Ok(()) };
        let deadlock = |OwnTurn| would_deadlock(place).stage(Stage::Memslot).slot(slot);
        self.turns.check(place).map_err(deadlock)
    }

    /// A slot has changed.
    pub fn note(&self, slot: &Memslot) -> Result<()> {
        slot.check(self.memslot_gpa_bits()?)?;
        let (file, is_one_sided) = (self.guest_memfd_of(slot), self.is_one_sided(slot));
        let old = {
            let mut memory = self.memory();
            check_overlap(&memory.slots, slot)?;
            let old = memory.slots.replace(slot, file);
            if is_one_sided {
                memory.slots.set_one_sided(slot.id());
            }
            memory.changes += 1;
            self.note_loss(&mut memory, old.as_ref(), Some(slot));
            old
        };
        // Where the change was not announced, jobs still have the old slot in their queues.
        let gone = old.filter(|old| old != slot && address_space(old.id()) == 0).and_then(|old| old.range());
        if let Some(gone) = gone {
            self.work().iter().for_each(|queue| queue.take_away(gone));
        }
        Ok(())
    }

    /// Checks, announces, sets and notes a slot.
    pub fn set(&self, slot: &Memslot) -> Result<()> {
        let verdict = match self.check(slot) {
            Err(error) if error.reason == Reason::MemslotAbsent => return self.delete_unknown(slot, error),
            verdict => verdict?,
        };
        self.config.demand.check(&*self.kernel, self.caps()?, slot, verdict.change)?;
        if verdict.change == Change::None {
            return self.note(slot);
        }
        self.changing(slot.id())?;
        if let Err(errno) = self.kernel.set_region(self.fd(), &slot.region) {
            let mut memory = self.memory();
            memory.slots.set_changing(slot.id(), false);
            if verdict.change == Change::Move {
                // KVM drops the mappings first, and puts back the slot alone.
                self.note_unmapped(&mut memory, slot.id());
            }
            return Err(refused_slot(slot, verdict, errno));
        }
        self.note(slot)
    }

    /// Deletes a slot that the handle was not told of, if KVM has it.
    fn delete_unknown(&self, slot: &Memslot, unknown: Error) -> Result<()> {
        self.kernel.set_region(self.fd(), &slot.region).map_err(|errno| match errno.0 {
            libc::EINVAL => unknown,
            _ => Error::kernel(errno, "KVM_SET_USER_MEMORY_REGION").stage(Stage::Memslot).slot(slot.id()),
        })?;
        if !self.mappings_are_kept {
            self.memory().coverage.lost_all_stage2();
        }
        self.note(slot)
    }

    /// Whether KVM would take the slot, as far as the handle knows of others.
    pub fn check(&self, slot: &Memslot) -> Result<Verdict> {
        let caps = self.caps()?;
        let descriptor = check::look(&*self.kernel, slot);
        let verdict = check::check(caps, &self.memory().slots, slot, descriptor)?;
        if let (Some(range), Some(bits)) = (slot.range(), self.config.gpa_bits) {
            check_guest_width(range, bits).map_err(|e| e.stage(Stage::Memslot).slot(slot.id()))?;
        }
        Ok(verdict)
    }

    /// Which file the slot's guest_memfd is, where it has one.
    fn guest_memfd_of(&self, slot: &Memslot) -> Option<FileId> {
        match check::look(&*self.kernel, slot)? {
            Descriptor::Usable(binding) => Some(binding.file.id),
            Descriptor::Closed(_) | Descriptor::Foreign => None,
        }
    }

    /// Whether the slot's guest_memfd serves shared memory too.
    fn is_one_sided(&self, slot: &Memslot) -> bool {
        slot.has_guest_memfd() && self.kernel.can_map_guest_memfd(slot.region.guest_memfd)
    }

    /// A slot has stayed, and its stage-2 mappings have not.
    fn note_unmapped(&self, memory: &mut Memory, slot: SlotId) {
        let place = memory.slots.get(slot).and_then(Memslot::range).filter(|_| address_space(slot) == 0);
        if let Some(place) = place {
            memory.coverage.lost_stage2(place, Loss::SlotChanged);
        }
        if !self.mappings_are_kept {
            memory.coverage.zap_may_come();
            memory.coverage.lost_all_stage2();
        }
    }

    /// What the change from `old` to `new` has cost.
    fn note_loss(&self, memory: &mut Memory, old: Option<&Memslot>, new: Option<&Memslot>) {
        let Some((old, place)) = old.and_then(|old| Some((old, old.range()?))) else { return };
        let same_memory = new.is_some_and(|new| {
            (new.region.gpa, new.region.size, new.region.hva) == (place.start, place.size(), old.region.hva)
                && new.region.guest_memfd_offset == old.region.guest_memfd_offset
                && new.has_guest_memfd() == old.has_guest_memfd()
                && new.is_read_only() == old.is_read_only()
        });
        let in_space_0 = address_space(old.id()) == 0;
        if same_memory {
            if in_space_0 && new.is_some_and(Memslot::is_dirty_logged) && !old.is_dirty_logged() {
                memory.coverage.write_protected(place);
            }
            return;
        }
        if in_space_0 {
            memory.coverage.forget(place);
            self.visibility.forget_memory(place);
        }
        if !self.mappings_are_kept {
            memory.coverage.zap_may_come();
            memory.coverage.lost_all_stage2();
        }
    }
}
