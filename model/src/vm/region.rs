//! KVM_SET_USER_MEMORY_REGION and its successor: slots come, go, move, and begin or cease to be logged.
//!
//! A slot that goes or moves is made invalid first: once nobody can map anything of it any more, what is mapped is zapped,
//! and only then does it go. If a move fails after that, the slot is back where it was, without its mappings.

use super::capability::SLOT_ZAP_ALL;
use super::slots::Changing;
use super::{Vm, dirty_log};
use crate::errno::{Errno, Result};
use crate::memslot::{self, Change, DirtyLogging, FileArgument, Making, Memslot, Memslots, Region};
use crate::mistake::{Mistake, mistaken};
use crate::mmu::RootFilter;
use crate::personality::VmType;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Vm {
    /// KVM_SET_USER_MEMORY_REGION. The region's file is not looked at.
    pub fn set_user_memory_region(&self, region: &Region) -> Result<()> {
        let region = Region { guest_memfd: FileArgument::BadFd, guest_memfd_offset: 0, ..region.clone() };
        self.check_alive()?;
        self.set_region(&region, false)
    }

    /// KVM_SET_USER_MEMORY_REGION2.
    pub fn set_user_memory_region2(&self, region: &Region) -> Result<()> {
        self.check_alive()?;
        if !self.personality.has_memory_region2() {
            return Err(Errno::ENOTTY);
        }
        self.set_region(region, true)
    }

    fn set_region(&self, region: &Region, is_region2: bool) -> Result<()> {
        let changing = self.slots.change();
        let change = memslot::check(&self.rules(), &self.slots.all(), region, is_region2)?;
        let as_id = (region.slot >> 16) as usize;
        let now = self.slots.of(as_id);
        let old = now.by_id(region.slot as u16);
        match (change, old) {
            (Change::Nothing, _) => Ok(()),
            (Change::Create, _) => self.create(&changing, region, &now),
            (Change::Delete, Some(old)) => {
                self.invalidate(&changing, old, &now);
                self.slots.install(&changing, as_id, now.without(old.id));
                old.unbind();
                Ok(())
            }
            (Change::Move, Some(old)) => self.move_slot(&changing, region, old, &now),
            (Change::FlagsOnly, Some(old)) => self.change_flags(&changing, region, old, &now),
            (_, None) => unreachable!("a slot that is not there is only created"),
        }
    }

    fn create(&self, changing: &Changing<'_>, region: &Region, now: &Memslots) -> Result<()> {
        let slot = self.prepare(region, Change::Create, None)?;
        self.slots.install(changing, slot.as_id.into(), now.with(slot));
        Ok(())
    }

    fn move_slot(
        &self,
        changing: &Changing<'_>,
        region: &Region,
        old: &Arc<Memslot>,
        now: &Memslots,
    ) -> Result<()> {
        self.invalidate(changing, old, now);
        let slot = self.prepare(region, Change::Move, Some(old));
        // Without the new one the old one is back.
        let kept = slot.as_ref().unwrap_or(old).clone();
        self.slots.install(changing, old.as_id.into(), now.without(old.id).with(kept));
        slot.map(drop)
    }

    fn change_flags(
        &self,
        changing: &Changing<'_>,
        region: &Region,
        old: &Arc<Memslot>,
        now: &Memslots,
    ) -> Result<()> {
        let slot = self.prepare(region, Change::FlagsOnly, Some(old))?;
        self.slots.install(changing, old.as_id.into(), now.with(slot.clone()));
        if !slot.is_read_only() {
            dirty_log::toggled(self, &slot);
        }
        Ok(())
    }

    fn prepare(&self, region: &Region, change: Change, old: Option<&Memslot>) -> Result<Arc<Memslot>> {
        let is_initially_set = self.dirty_log_protect.load(Ordering::Relaxed) & dirty_log::INITIALLY_SET != 0;
        let logging = DirtyLogging { has_bitmap: true, is_initially_set };
        let making = Making { region, change, old, logging, attributes: &self.attributes };
        memslot::prepare(&self.rules(), &making)
    }

    /// Keeps everyone from mapping anything of a slot, and zaps what is mapped. Of an ordinary VM that is all there is in
    /// any slot, unless the VMM has asked for better.
    fn invalidate(&self, changing: &Changing<'_>, slot: &Arc<Memslot>, now: &Memslots) {
        self.slots.install(changing, slot.as_id.into(), now.with(slot.invalid()));
        let mut lock = self.mmu.lock_exclusive();
        if self.zaps_all_with_a_slot() {
            lock.invalidate_all_direct_roots();
            drop(lock);
            self.mmu.zap_invalidated_roots();
        } else {
            lock.zap_leafs(RootFilter::both(slot.as_id.into()), slot.range());
        }
    }

    /// Before it was a quirk, it was so for all types.
    fn zaps_all_with_a_slot(&self) -> bool {
        if mistaken(Mistake::ADeletedSlotTakesItsOwnMappingsAlone) {
            return false;
        }
        let is_quirk = self.personality.memory_quirks() & SLOT_ZAP_ALL != 0;
        !is_quirk || (self.vm_type == VmType::Default && self.has_quirk(SLOT_ZAP_ALL))
    }
}
