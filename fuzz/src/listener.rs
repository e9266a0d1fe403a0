//! The function that a conversion tells of changes, as a VMM may have it: it listens, fails, or calls back into the library
//! where that must be refused.

use crate::call::call_with;
use crate::heap::{Block, Passed, bytes_of};
use crate::input::Input;
use crate::oracle::demand;
use kvmprep::abi::*;
use std::ffi::{c_int, c_void};

/// The largest piece that is told of, which its multiples cut.
pub const PIECE: u64 = 64 << 20;

const NAME: &str = "kvmprep_changed_fn";

/// Who listens.
pub struct Listener {
    vm: *mut kvmprep_vm,
    /// A slot of the guest's, with its range.
    slot: Option<(u32, u64, u64)>,
    habit: usize,
    /// Fails in the call of that number, with that errno.
    fails: Option<(usize, c_int)>,
    /// What it was told of.
    pub told: Vec<(u64, u64)>,
    /// Whether it has failed.
    pub has_failed: bool,
}

impl Listener {
    pub fn new(input: &mut Input, vm: *mut kvmprep_vm, slots: &[kvmprep_memslot]) -> Self {
        let errno = input.pick(&[libc::EIO, libc::ENOMEM, libc::EBUSY, libc::EINVAL, 4095]);
        let fails = input.rarely(4).then(|| (input.below(3), errno));
        let slot = (!slots.is_empty()).then(|| slots[input.below(slots.len())]);
        let slot = slot.map(|slot| (slot.slot, slot.gpa, slot.size));
        Self { vm, slot, habit: input.below(16), fails, told: Vec::new(), has_failed: false }
    }

    /// The errno that it returned, if any.
    pub fn errno(&self) -> Option<c_int> {
        self.fails.filter(|_| self.has_failed).map(|(_, errno)| errno)
    }

    /// Whether it makes no calls of its own.
    pub fn is_quiet(&self) -> bool {
        self.habit < 10
    }

    /// It listens, and no more.
    pub fn calm_down(&mut self) {
        (self.habit, self.fails, self.has_failed) = (0, None, false);
        self.told.clear();
    }

    fn hear(&mut self, range: &kvmprep_range, to: u32) -> c_int {
        let (start, end) = (range.gpa, range.gpa + range.size);
        demand(range.reserved == [0; 2] && range.size > 0, NAME, "a range");
        demand(!self.has_failed, NAME, "the end, once it has failed");
        demand(start / PIECE == (end - 1) / PIECE, NAME, "pieces that are cut at multiples of 64 MiB");
        let is_news = self.told.iter().all(|(gpa, size)| gpa + size <= start || end <= *gpa);
        demand(is_news, NAME, "each page once");
        let mut run = kvmprep_visibility_run::default();
        // SAFETY: the handle lives, the run too.
        let code = unsafe { kvmprep_visibility_next(self.vm, start, &mut run, std::ptr::null_mut()) };
        let is_so = code == 0 && run.visibility == to && run.gpa + run.size >= end;
        demand(is_so, NAME, "what it is told is in the record");
        self.call_back(range, to);
        let number = self.told.len();
        self.told.push((range.gpa, range.size));
        match self.fails {
            Some((call, errno)) if call == number => {
                self.has_failed = true;
                -errno
            }
            _ => 0,
        }
    }

    /// Calls that would wait for themselves, each a habit of one listener in many.
    fn call_back(&self, range: &kvmprep_range, to: u32) {
        let vm = self.vm;
        let wider = kvmprep_range { size: range.size + 4096, ..*range };
        let args = [range.gpa, 1, u64::from(to) << 4];
        let mut ret = 99;
        match self.habit {
            // SAFETY: the handle lives, and so do the arguments; here and below.
            10 => self.refused("kvmprep_convert", |err| unsafe {
                kvmprep_convert(vm, range, 1 - to, std::ptr::null(), err)
            }),
            11 => self.refused("kvmprep_visibility_note", |err| {
                // SAFETY: as above.
                unsafe { kvmprep_visibility_note(vm, &wider, to, err) }
            }),
            12 => self.refused("kvmprep_handle_memory_fault", |err| {
                let flags = u64::from(to) << 3;
                // SAFETY: as above.
                unsafe { kvmprep_handle_memory_fault(vm, range.gpa, 4096, flags, std::ptr::null(), err) }
            }),
            13 => {
                self.refused("kvmprep_handle_map_gpa_range", |err| {
                    // SAFETY: as above.
                    unsafe {
                        kvmprep_handle_map_gpa_range(vm, args.as_ptr(), std::ptr::null(), &mut ret, err)
                    }
                });
                demand(ret == libc::EINVAL as u64, NAME, "the guest is told EINVAL");
            }
            14 => self.change_slot(range),
            15 => self.populate(range),
            _ => {}
        }
    }

    /// Who would wait for itself is told, first of all. Only a note may reach beyond the guest's addresses.
    fn refused(&self, name: &'static str, function: impl FnOnce(*mut kvmprep_error) -> c_int) {
        let answer = call_with(Passed::Right, name, &"by the listener", function);
        let is_beyond = self.habit == 11 && answer.code == -libc::EINVAL;
        demand(answer.code == -libc::EDEADLK || is_beyond, NAME, "who would wait for itself is told");
    }

    /// Announces a slot's change, which must not wait for this very conversion.
    fn change_slot(&self, range: &kvmprep_range) {
        let Some((slot, gpa, size)) = self.slot.filter(|(slot, ..)| slot >> 16 == 0) else { return };
        let overlaps = gpa < range.gpa + range.size && range.gpa < gpa.saturating_add(size);
        if overlaps {
            self.refused("kvmprep_memslot_changing", |err| {
                // SAFETY: the handle lives.
                unsafe { kvmprep_memslot_changing(self.vm, slot, err) }
            });
        }
    }

    /// Populates what is being converted; whatever comes of it, it ends.
    fn populate(&self, range: &kvmprep_range) {
        let first = kvmprep_range { size: 4096, ..*range };
        let block = Block::new(&bytes_of(&first), Passed::Right);
        let none: *mut kvmprep_error = std::ptr::null_mut();
        // SAFETY: the handle lives, and the block is a range.
        unsafe {
            kvmprep_populate(self.vm, block.pointer(), 1, std::ptr::null(), none.cast(), 0, none);
            kvmprep_range_discarded(self.vm, block.pointer(), none);
        }
    }
}

/// What `opts->changed` is, with a listener for its `opaque`.
pub unsafe extern "C" fn changed(range: *const kvmprep_range, to: u32, listener: *mut c_void) -> c_int {
    // SAFETY: the library passes a range, and the listener that it was given, which nobody else uses meanwhile.
    unsafe { (*listener.cast::<Listener>()).hear(&*range, to) }
}
