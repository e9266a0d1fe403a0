//! What others tell a VM of memory that it may have mapped: the host of its page tables, a guest_memfd of its pages.
//!
//! Between the start and the end of an invalidation no mapping of that memory is made, and at its start all there are go.
//! Of mirrored tables the host's page tables say nothing: what they map is a guest_memfd's.

use super::Vm;
use crate::gmem::GmemUser;
use crate::host::Notifier;
use crate::memslot::Memslot;
use crate::mmu::RootFilter;
use crate::units::{GfnRange, Hva, PAGE_SIZE, Privacy};
use std::sync::{Arc, Weak};

impl Vm {
    pub(super) fn notifier(&self) -> Weak<dyn Notifier> {
        self.me.clone()
    }

    pub(super) fn gmem_user(&self) -> Weak<dyn GmemUser> {
        self.me.clone()
    }

    /// Has the host tell now of what it has not told yet of these frames' memory.
    pub(super) fn settle(&self, as_id: usize, range: GfnRange) {
        for slot in self.slots.of(as_id).overlapping(range) {
            if let Some(part) = slot.range().intersection(range).filter(|_| !slot.is_gmem_only()) {
                let start = slot.hva_of(part.start);
                self.host.settle(start, start.plus_pages(part.pages()));
            }
        }
    }

    /// The frames of every slot whose memory lies between two addresses of the process.
    fn frames_between(&self, start: Hva, end: Hva) -> Vec<(usize, GfnRange)> {
        let mut frames = Vec::new();
        for (as_id, slots) in self.slots.all().iter().enumerate() {
            for slot in slots.iter() {
                let from = start.0.max(slot.hva.0);
                let to = end.0.min(slot.hva.plus_pages(slot.pages).0);
                if from < to {
                    let first = slot.base.plus((from - slot.hva.0) / PAGE_SIZE);
                    let after = slot.base.plus((to - slot.hva.0).div_ceil(PAGE_SIZE));
                    frames.push((as_id, GfnRange { start: first, end: after }));
                }
            }
        }
        frames
    }
}

impl Notifier for Vm {
    fn invalidate_start(&self, start: Hva, end: Hva) {
        self.slots.begin_invalidation();
        let frames = self.frames_between(start, end);
        if frames.is_empty() {
            return;
        }
        let mut lock = self.mmu.lock_exclusive();
        for (nth, (_, range)) in frames.iter().enumerate() {
            if nth == 0 { lock.begin_invalidation(*range) } else { lock.widen_invalidation(*range) }
        }
        for (as_id, range) in frames {
            lock.zap_leafs(RootFilter::direct(as_id), range);
        }
    }

    fn invalidate_end(&self, start: Hva, end: Hva) {
        if !self.frames_between(start, end).is_empty() {
            self.mmu.lock_exclusive().end_invalidation();
        }
        self.slots.end_invalidation();
    }
}

impl GmemUser for Vm {
    fn gmem_invalidate_start(&self, slot: &Arc<Memslot>, range: GfnRange) {
        // The kernel goes by what the file was made as, not by how it was mapped. A file that can be mapped and was not made
        // shared serves shared accesses too: with mirrored tables, those mappings it would miss.
        let is_private = slot.gmem.as_ref().is_some_and(|gmem| gmem.privacy == Privacy::Private);
        let as_id = slot.as_id.into();
        let filter = if is_private && self.mmu.has_external() {
            RootFilter::mirror(as_id)
        } else {
            RootFilter::direct(as_id)
        };
        let mut lock = self.mmu.lock_exclusive();
        lock.begin_invalidation(range);
        lock.zap_leafs(filter, range);
    }

    fn gmem_invalidate_end(&self, _slot: &Arc<Memslot>, _range: GfnRange) {
        self.mmu.lock_exclusive().end_invalidation();
    }
}
