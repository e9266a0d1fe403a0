//! What must be true after every step.
//!
//! The list, with its numbers, is that of the project's reference on KVM's semantics. A [`Watch`] is shown a virtual machine
//! after each step that was taken with it, and told what the step was; it says which of the list no longer holds. What
//! concerns tables alone is checked by [`mmu::invariants`](crate::mmu::invariants), and of that what needs threads beside each
//! other (5, and 3 and 10 while a change is under way) where they are raced. Some cannot be broken here, since the code that
//! could does not compile (7), or stops (6): they are named all the same, with where they are kept.
//!
//! Nothing here changes anything, and all of a VM's tables are looked at each time. That is done by the ten million, so each
//! thing is asked for once, and nothing is put into words but what does not hold.

use crate::errno::Errno;
use crate::memslot::{Memslot, Memslots};
use crate::mmu::invariants::{self as of_tables, Dump};
use crate::mmu::{EntryView, Mirroring, Root};
use crate::personality::{Version, VmType};
use crate::units::{Gfn, GfnRange, Hva, Level, Pfn, Privacy};
use crate::vm::{PreFault, Vm};
use std::fmt;
use std::sync::Arc;

#[cfg(all(test, not(loom)))]
mod broken;

/// The list: each with where it is checked.
pub const NAMES: [&str; 20] = [
    "mirror and external table agree",                      // tables, each step
    "external tables have their parents",                   // tables, each step
    "nothing stays frozen",                                 // tables, each step; races
    "what failed left no trace",                            // Watch, failed steps
    "one of those who map a page at the same time does it", // races
    "no page takes another's place", // asserted in mmu::change; Watch: frames are current
    "who maps holds the lock shared, who removes exclusively", // types of mmu::lock; removal that fails is a bug
    "mirrored pages are small and permit everything",          // tables, each step
    "each page is mapped as what it is",                       // Watch, each step
    "what is mapped is what is there",                         // Watch, each step; races
    "a page is blocked, tracked, and then removed",            // tdx::module refuses any other order
    "a zap keeps the tables",                                  // Watch, each step of a VM that lives
    "the counts count the leafs",                              // tables, each step
    "huge pages keep to all limits",                           // tables and Watch, each step
    "a pre-fault leaves alone what was mapped",                // Watch, pre-faults
    "nothing of the old kind is left",                         // Watch, each step (with 9)
    "a pre-fault that succeeds leaves less to do, and loses none", // Watch, pre-faults
    "tables hang together",                                    // tables, each step
    "no page of a file is in two slots",                       // Watch, each step
    "a dead VM answers EIO",                                   // Watch, each step after death
];

/// One of the list that does not hold.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Broken {
    /// Its number, from 1; 0 for what is in no list.
    pub number: usize,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.number.checked_sub(1).map_or("slots hang together", |at| NAMES[at]);
        write!(f, "{}: {name}: {}", self.number, self.what)
    }
}

/// What a step was, as far as the list asks.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// A pre-fault: what was asked for, what is left, and the answer.
    PreFault(PreFault, PreFault, Result<(), Errno>),
    /// An ioctl of any other kind, with its answer.
    Ioctl(Result<(), Errno>),
    /// What the guest or the host did.
    Other,
}

/// What lies behind an address of the process now, without it being touched.
pub type Behind<'a> = &'a dyn Fn(Hva) -> Option<Pfn>;

/// Looks at a VM after each step.
pub struct Watch {
    before: Dump,
    was_dead: bool,
}

impl Watch {
    /// Begins with the VM as it is.
    pub fn new(vm: &Vm) -> Self {
        Watch { before: Dump::of(vm.mmu()), was_dead: vm.is_dead() }
    }

    /// A step has been taken. That the VM is dead since then is for the caller to have expected.
    pub fn after(&mut self, vm: &Vm, step: &Step, behind: Behind<'_>) -> Result<(), Broken> {
        let was_dead = std::mem::replace(&mut self.was_dead, vm.is_dead());
        if was_dead {
            return dead_vms_answer_eio(step);
        }
        if self.was_dead {
            // Whatever killed it may have been half done.
            return Ok(());
        }
        let dump = Dump::of(vm.mmu());
        for (name, check) in of_tables::STATE {
            check(&dump).map_err(|what| broken(number_of(name), what))?;
        }
        let now = Now::of(vm, behind);
        now.check_pages(&dump)?;
        now.check_slots()?;
        bindings_are_disjoint(vm)?;
        self.check_step(vm, &dump, step)?;
        self.before = dump;
        Ok(())
    }

    /// All tables as they were after the last step of a VM that lived.
    pub fn before(&self) -> &Dump {
        &self.before
    }

    fn check_step(&self, vm: &Vm, now: &Dump, step: &Step) -> Result<(), Broken> {
        if vm.mmu().has_external() {
            of_tables::mirrors_are_kept(&self.before, now).map_err(|what| broken(12, what))?;
        }
        let Step::PreFault(asked, left, answer) = step else { return Ok(()) };
        let is_kept = asked.gpa.wrapping_add(asked.size) == left.gpa.wrapping_add(left.size);
        let is_less = left.size < asked.size;
        if !is_kept || answer.is_ok() != is_less {
            return Err(broken(17, format!("{asked:?} became {left:?}: {answer:?}")));
        }
        if vm.personality().version > Version(6, 12) {
            of_tables::leafs_are_left_alone(&self.before, now).map_err(|what| broken(15, what))?;
        }
        Ok(())
    }
}

/// Checks all that can be seen from a VM as it is.
pub fn check(vm: &Vm, behind: Behind<'_>) -> Result<(), Broken> {
    Watch::new(vm).after(vm, &Step::Other, behind)
}

/// What was made to fail has left the tables as they were, but for tables on the way to it.
pub fn failure_left_no_trace(before: &Dump, after: &Dump) -> Result<(), Broken> {
    of_tables::leafs_are_the_same(before, after).map_err(|what| broken(4, what))
}

fn broken(number: usize, what: String) -> Broken {
    Broken { number, what }
}

fn number_of(name: &str) -> usize {
    name.split(':').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn dead_vms_answer_eio(step: &Step) -> Result<(), Broken> {
    match step {
        Step::PreFault(_, _, answer) | Step::Ioctl(answer) if *answer != Err(Errno::EIO) => {
            Err(broken(20, format!("{step:?}")))
        }
        _ => Ok(()),
    }
}

/// A VM as it is, and what is behind the addresses of its process.
struct Now<'a> {
    vm: &'a Vm,
    slots: Vec<Arc<Memslots>>,
    /// In order, and apart from each other.
    private: Vec<GfnRange>,
    behind: Behind<'a>,
}

impl<'a> Now<'a> {
    fn of(vm: &'a Vm, behind: Behind<'a>) -> Self {
        Now { vm, slots: vm.memslots(), private: vm.attributes().private_runs(), behind }
    }

    /// What all frames of a range are, if they are of one kind.
    fn privacy(&self, range: GfnRange) -> Option<Privacy> {
        let next = self.private.partition_point(|run| run.end <= range.start);
        match self.private.get(next) {
            Some(run) if run.covers(range) => Some(Privacy::Private),
            Some(run) if run.intersection(range).is_some() => None,
            _ => Some(Privacy::Shared),
        }
    }

    /// 9, 10, 14 and 16: each leaf maps what its slot has there now, of the kind that it is now, no larger than it may.
    fn check_pages(&self, dump: &Dump) -> Result<(), Broken> {
        let mut last = None;
        for (root, leaf) in dump.leafs().filter(|(root, _)| !root.is_invalid()) {
            let as_id = root.role().as_id();
            let range = GfnRange::of_page(leaf.gfn, leaf.level);
            let is_of = |(of, slot): &(usize, &Arc<Memslot>)| *of == as_id && slot.range().covers(range);
            let slot = match last.filter(is_of) {
                Some((_, slot)) => slot,
                None => self
                    .slots
                    .get(as_id)
                    .and_then(|slots| slots.find(leaf.gfn))
                    .ok_or_else(|| broken(16, format!("{leaf:?} is in no slot")))?,
            };
            last = Some((as_id, slot));
            if !slot.range().covers(range) {
                return Err(broken(14, format!("{leaf:?} is larger than {slot:?}")));
            }
            let privacy = self.check_kind(root, leaf, slot)?;
            self.check_level(leaf, slot, privacy)?;
            self.check_frame(leaf, slot, privacy)?;
        }
        Ok(())
    }

    /// 9 and 16. Answers with what the page is.
    fn check_kind(&self, root: &Root, leaf: &EntryView, slot: &Memslot) -> Result<Privacy, Broken> {
        let is_tdx = self.vm.vm_type() == VmType::Tdx;
        let is_so = |privacy| match (root.mirroring(), privacy) {
            (Mirroring::Mirror, Privacy::Shared) => false,
            (Mirroring::Direct, Privacy::Private) => !is_tdx && slot.has_gmem(),
            (Mirroring::Mirror, Privacy::Private) => slot.has_gmem(),
            (Mirroring::Direct, Privacy::Shared) => true,
        };
        let privacy = self.privacy(GfnRange::of_page(leaf.gfn, leaf.level));
        let privacy = privacy
            .filter(|privacy| is_so(*privacy))
            .ok_or_else(|| broken(9, format!("{leaf:?} of {root:?}, {privacy:?} in {slot:?}")))?;
        let snp = self.vm.snp().filter(|snp| privacy == Privacy::Private && snp.asid().is_some());
        if snp.is_some_and(|snp| snp.rmp().is_hosts(leaf.spte.pfn())) {
            return Err(broken(
                9,
                format!("{leaf:?} of {root:?} maps a private page with a frame of the host's"),
            ));
        }
        Ok(privacy)
    }

    /// 14.
    fn check_level(&self, leaf: &EntryView, slot: &Memslot, privacy: Privacy) -> Result<(), Broken> {
        if leaf.level == Level::SMALL {
            return Ok(());
        }
        let is_small = slot.is_gmem_only() || privacy == Privacy::Private;
        let may_be =
            slot.lpage.is_allowed(leaf.gfn, leaf.level) && leaf.level <= self.vm.personality().largest_page;
        if may_be && !is_small { Ok(()) } else { Err(broken(14, format!("{leaf:?} in {slot:?}"))) }
    }

    /// 10: no frame that was given back is mapped, nor one that another page has got.
    fn check_frame(&self, leaf: &EntryView, slot: &Memslot, privacy: Privacy) -> Result<(), Broken> {
        let is_of_file = privacy == Privacy::Private || slot.is_gmem_only();
        for page in 0..leaf.level.pages() {
            let gfn = Gfn(leaf.gfn.0 + page);
            let there = if is_of_file { slot.gmem_page_there(gfn) } else { (self.behind)(slot.hva_of(gfn)) };
            if there != Some(leaf.spte.pfn().plus(page)) {
                return Err(broken(
                    10,
                    format!("{leaf:?} maps another frame than {there:?} at {gfn:?} of {slot:?}"),
                ));
            }
        }
        Ok(())
    }

    /// Slots are found by their frames and by their numbers, and know their mixed frames (14).
    fn check_slots(&self) -> Result<(), Broken> {
        for slots in &self.slots {
            slots.check().map_err(|what| broken(0, what))?;
            for slot in slots.iter() {
                self.vm.attributes().check_mixed(slot).map_err(|what| broken(14, what))?;
            }
        }
        Ok(())
    }
}

/// 19.
fn bindings_are_disjoint(vm: &Vm) -> Result<(), Broken> {
    vm.guest_memfds().iter().try_for_each(|file| file.check_bindings().map_err(|what| broken(19, what)))
}
