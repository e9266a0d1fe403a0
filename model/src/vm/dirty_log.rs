//! The log of the pages that the guest has written, and what it costs: small pages, and a fault for each first write.

use super::Vm;
use super::capability::DIRTY_LOG_ENABLED;
use crate::errno::{Errno, Result};
use crate::memslot::{Memslot, USER_SLOTS};
use crate::mistake::{Mistake, mistaken};
use crate::units::{Gfn, GfnRange, Level};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `KVM_DIRTY_LOG_INITIALLY_SET`.
pub(super) const INITIALLY_SET: u64 = 1 << 1;

const BITS: u64 = u64::BITS as u64;

/// What begins, or ends, with the log of a slot that is not read-only.
pub(super) fn toggled(vm: &Vm, slot: &Memslot) {
    let (as_id, range) = (slot.as_id.into(), slot.range());
    let lock = vm.mmu.lock_shared();
    if !slot.logs_dirty() {
        if mistaken(Mistake::TheEndOfALogLeavesSmallPages) {
            return;
        }
        let max_level = |gfn: Gfn| vm.largest_level(slot, gfn, vm.largest_page());
        if vm.personality.puts_huge_pages_together() {
            lock.recover_huge_pages(as_id, range, max_level);
        } else {
            lock.zap_collapsible(as_id, range, max_level);
        }
        return;
    }
    // Where every page counts as written already, none need be noticed.
    if vm.dirty_log_protect.load(Ordering::Relaxed) & INITIALLY_SET == 0 {
        lock.split_huge_pages(as_id, range, Level::SMALL);
        lock.write_protect(as_id, range, Level::SMALL);
    }
}

impl Vm {
    /// KVM_GET_DIRTY_LOG: a bit for each page, in words of 64. Unless the VMM clears them itself, they are cleared.
    pub fn get_dirty_log(&self, slot: u32) -> Result<Vec<u64>> {
        self.check_alive()?;
        let _changing = self.slots.change();
        let slot = self.logged_slot(slot)?;
        let dirty = slot.dirty.as_ref().ok_or(Errno::ENOENT)?;
        if self.dirty_log_protect.load(Ordering::Relaxed) & DIRTY_LOG_ENABLED != 0 {
            return Ok(dirty.all());
        }
        let words = dirty.take_all();
        for (nth, word) in words.iter().enumerate() {
            self.notice_writes_again(&slot, nth as u64 * BITS, *word);
        }
        Ok(words)
    }

    /// KVM_CLEAR_DIRTY_LOG: clears the bits that are set in `bitmap`, whose first is that of `first_page`.
    pub fn clear_dirty_log(&self, slot: u32, first_page: u64, pages: u64, bitmap: &[u64]) -> Result<()> {
        self.check_alive()?;
        let _changing = self.slots.change();
        if first_page % BITS != 0 {
            return Err(Errno::EINVAL);
        }
        let slot = self.logged_slot(slot)?;
        let dirty = slot.dirty.as_ref().ok_or(Errno::ENOENT)?;
        let rest = slot.pages.checked_sub(first_page).ok_or(Errno::EINVAL)?;
        if pages > rest || (pages < rest && pages % BITS != 0) {
            return Err(Errno::EINVAL);
        }
        for nth in 0..pages.div_ceil(BITS) {
            let asked = *bitmap.get(nth as usize).ok_or(Errno::EFAULT)?;
            let cleared = dirty.take(first_page / BITS + nth, asked);
            self.notice_writes_again(&slot, first_page + nth * BITS, cleared);
        }
        Ok(())
    }

    fn logged_slot(&self, slot: u32) -> Result<Arc<Memslot>> {
        let all = self.slots.all();
        let (as_id, number) = (slot as usize >> 16, slot & 0xffff);
        let slots = all.get(as_id).filter(|_| number < USER_SLOTS).ok_or(Errno::EINVAL)?;
        slots.by_id(number as u16).cloned().ok_or(Errno::ENOENT)
    }

    /// The next write to each page whose bit is set must be noticed.
    fn notice_writes_again(&self, slot: &Memslot, first: u64, bits: u64) {
        if bits == 0 || mistaken(Mistake::ALogIsReadOnce) {
            return;
        }
        let (as_id, word) = (slot.as_id.into(), slot.base.plus(first));
        let mut lock = self.mmu.lock_exclusive();
        if self.dirty_log_protect.load(Ordering::Relaxed) & INITIALLY_SET != 0 {
            // They were not split when the log began.
            let start = word.plus(bits.trailing_zeros().into());
            let end = word.plus(BITS - u64::from(bits.leading_zeros()));
            lock.split_huge_pages(as_id, GfnRange { start, end }, Level::SMALL);
        }
        lock.clear_dirty_masked(as_id, word, bits, true);
    }
}
