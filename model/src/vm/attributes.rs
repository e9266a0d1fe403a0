//! KVM_SET_MEMORY_ATTRIBUTES: which frames are private.
//!
//! All of a range changes at once: what was mapped of the other kind goes, huge pages across its ends go whole, and no fault
//! that began before sees its mapping through. What lies behind the frames, in the guest_memfd or the process, is not
//! touched.

use super::Vm;
use crate::attributes::{self, KVM_MEMORY_ATTRIBUTE_PRIVATE};
use crate::errno::{Errno, Result};
use crate::memslot::Memslot;
use crate::mistake::{Mistake, mistaken};
use crate::mmu::{Exclusive, RootFilter};
use crate::units::{Gfn, GfnRange, Level, PAGE_SHIFT, Privacy};

/// `struct kvm_memory_attributes`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AttributesArgument {
    /// The first byte.
    pub address: u64,
    /// How many bytes.
    pub size: u64,
    /// `KVM_MEMORY_ATTRIBUTE_PRIVATE`, or none.
    pub attributes: u64,
    /// None are known.
    pub flags: u64,
}

impl Vm {
    /// KVM_SET_MEMORY_ATTRIBUTES.
    pub fn set_memory_attributes(&self, argument: &AttributesArgument) -> Result<()> {
        self.check_alive()?;
        if !self.personality.has_memory_attributes() {
            return Err(Errno::ENOTTY);
        }
        let supported = self.personality.memory_attributes(self.vm_type);
        attributes::check(supported, argument.address, argument.size, argument.attributes, argument.flags)?;
        let range = GfnRange::new(Gfn::of_gpa(argument.address), argument.size >> PAGE_SHIFT);
        let is_private = argument.attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0;
        self.convert(range, if is_private { Privacy::Private } else { Privacy::Shared });
        Ok(())
    }

    fn convert(&self, range: GfnRange, to: Privacy) {
        let _changing = self.slots.change();
        if self.attributes.is_uniform(range, to) && !mistaken(Mistake::AttributesAreSetAgain) {
            return;
        }
        let all = self.slots.all();
        let parts: Vec<(&Memslot, GfnRange)> = all
            .iter()
            .flat_map(|slots| slots.overlapping(range))
            .filter_map(|slot| Some((&**slot, slot.range().intersection(range)?)))
            .collect();
        let mut lock = self.mmu.lock_exclusive();
        lock.begin_invalidation(range);
        for (slot, part) in &parts {
            widen_to_frames(&mut lock, slot, *part);
            lock.zap_leafs(self.old_kind(slot, to), *part);
        }
        drop(lock);
        self.attributes.set(range, to);
        let mut lock = self.mmu.lock_exclusive();
        for (slot, part) in &parts {
            self.attributes.recompute_mixed(slot, *part);
        }
        lock.end_invalidation();
    }

    /// The roots that what becomes `to` was mapped in. Without a mirror both kinds are in one.
    fn old_kind(&self, slot: &Memslot, to: Privacy) -> RootFilter {
        let as_id = slot.as_id.into();
        match to {
            Privacy::Shared if self.mmu.has_external() => RootFilter::mirror(as_id),
            _ => RootFilter::direct(as_id),
        }
    }
}

/// A frame that the range shares with others must not be mapped as a whole meanwhile, even for a fault elsewhere in it.
fn widen_to_frames(lock: &mut Exclusive<'_>, slot: &Memslot, part: GfnRange) {
    for level in [Level::HUGE, Level::GIGANTIC] {
        for gfn in [part.start, Gfn(part.end.0 - 1)] {
            let frame = GfnRange::of_page(gfn, level);
            if !part.covers(frame) && slot.range().covers(frame) && !slot.lpage.mixed(frame.start, level) {
                lock.widen_invalidation(frame);
            }
        }
    }
}
