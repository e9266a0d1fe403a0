//! Children of the process, which hold its pages until they exit.
//!
//! A child never runs here. What it holds makes the process copy a page before it writes to it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::entry::Entry;
use super::process::Process;
use super::table::Slot;
use super::vma::{Backing, Vma};
use super::zap::pieces;
use crate::host::MappableFile;
use crate::sync::plain::{Mutex, MutexGuard};
use crate::units::{Level, Pfn};

/// Mappings that each child holds, by frame.
#[derive(Default)]
pub(super) struct Children(Mutex<State>);

#[derive(Default)]
struct State {
    next: u64,
    held: BTreeMap<u64, HashMap<u64, u64>>,
}

impl Children {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

/// A child of the process. It exits when dropped.
pub struct Child {
    process: Arc<Process>,
    number: u64,
    /// What it has mapped of guest_memfds, which are not closed while it does.
    _files: Vec<Arc<dyn MappableFile>>,
}

impl Child {
    pub(super) fn of(process: &Arc<Process>) -> Self {
        // The mappings stay as they are until all are gone through.
        let vmas = process.mappings_for_change();
        let mut held = HashMap::new();
        let mut files = Vec::new();
        for vma in vmas.iter().filter(|vma| !vma.is_kept_from_children) {
            if let Backing::GuestMemfd(file) = &vma.backing {
                files.push(file.clone());
            }
            // What a fault would bring anew is not copied to a child.
            if !vma.is_shared() && vma.has_anonymous() {
                process.changing(vma.start, vma.end, || process.lend(vma, &mut held));
            }
        }
        let mut state = process.children.state();
        state.next += 1;
        let number = state.next;
        state.held.insert(number, held);
        drop(state);
        Child { process: process.clone(), number, _files: files }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let held = self.process.children.state().held.remove(&self.number).unwrap_or_default();
        for (pfn, count) in held {
            self.process.take_back(Pfn(pfn), count);
        }
    }
}

impl Process {
    fn lend(&self, vma: &Vma, held: &mut HashMap<u64, u64>) {
        let huge = if vma.granularity() == Level::GIGANTIC { Level::GIGANTIC } else { Level::HUGE };
        for (from, to) in pieces(vma.start, vma.end, huge.pages()) {
            let _entries = self.lock_entries(from, huge);
            let Some(slot) = self.table.slot(from, huge) else { continue };
            if !slot.get().is_table() {
                self.lend_entry(slot, held);
                continue;
            }
            for (page, small) in self.table.small_entries(from) {
                if (from..to).contains(&page) {
                    self.lend_entry(small, held);
                }
            }
        }
    }

    fn lend_entry(&self, slot: Slot<'_>, held: &mut HashMap<u64, u64>) {
        let entry: Entry = slot.get();
        if !entry.is_anonymous() {
            return;
        }
        self.frames.lend(entry.pfn());
        self.frames.set_exclusive(entry.pfn(), false);
        *held.entry(entry.pfn().0).or_default() += 1;
        if entry.is_writable() {
            slot.set(entry.opened(false));
        }
    }

    /// A child lets go of so many mappings of a page.
    fn take_back(&self, pfn: Pfn, count: u64) {
        for _ in 0..count {
            if self.frames.take_back(pfn) {
                self.free_wherever_it_came_from(pfn);
            }
        }
    }

    fn free_wherever_it_came_from(&self, pfn: Pfn) {
        let head = self.frames.head(pfn);
        match self.pool(self.frames.level(head)).filter(|pool| pool.owns(head)) {
            Some(pool) => pool.give(head, false),
            None => self.frames.free(head),
        }
    }

    /// Takes a page away from all children that hold it. Whether any did.
    pub fn take_from_children(&self, pfn: Pfn) -> bool {
        let counts: Vec<u64> =
            self.children.state().held.values_mut().filter_map(|held| held.remove(&pfn.0)).collect();
        counts.iter().for_each(|count| self.take_back(pfn, *count));
        !counts.is_empty()
    }
}
