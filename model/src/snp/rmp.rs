//! The table of whose each of the machine's frames is (RMP).
//!
//! The host changes entries, but not those that the firmware is at; the guest takes each frame by validating it; and the
//! processor asks on each access. Entries are of small pages: guest_memfd has no others. The table maps nothing, and knows
//! neither memslots nor attributes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use crate::confidential::Failures;
use crate::confidential::frames::FrameTable;
use crate::errno::{Errno, Result};
use crate::host::{FileFrames, HostLayer, HostMemory};
use crate::sync::plain::{Mutex, MutexGuard};
use crate::units::{Gfn, Pfn};

/// A frame that is not the host's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The guest, by its number.
    pub asid: u32,
    /// As what the guest has it.
    pub gfn: Gfn,
    /// It is the firmware's until that has given it to the guest or back.
    pub is_immutable: bool,
    /// The guest has taken it.
    pub is_validated: bool,
}

/// Why an access of a guest to private memory is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// The frame is the host's, another guest's, or of another address: the guest exits.
    NotTheGuests,
    /// The guest has not validated it, and gets an exception (#VC).
    NotValidated,
}

/// What can be made to fail: the instruction by which the host changes entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RmpUpdate;

/// The table.
#[derive(Default)]
pub struct Rmp {
    entries: FrameTable<Entry>,
    failures: Failures<RmpUpdate, ()>,
}

impl Rmp {
    /// Changes of entries that are to fail.
    pub fn failures(&self) -> &Failures<RmpUpdate, ()> {
        &self.failures
    }

    /// What stands there (`snp_lookup_rmpentry`): nothing for the host's frames.
    pub fn lookup(&self, pfn: Pfn) -> Option<Entry> {
        self.entries.get(pfn)
    }

    /// How many frames a guest has.
    pub fn frames_of(&self, asid: u32) -> u64 {
        self.entries.count(|_, entry| entry.asid == asid)
    }

    /// Gives a frame to a guest (`rmp_make_private`), or with `is_immutable` to the firmware on the way to it. A frame that
    /// the guest had has to be validated again.
    pub fn make_private(&self, pfn: Pfn, gfn: Gfn, asid: u32, is_immutable: bool) -> Result<()> {
        self.update(pfn, Some(Entry { asid, gfn, is_immutable, is_validated: false }))
    }

    /// Takes a frame back (`rmp_make_shared`).
    pub fn make_shared(&self, pfn: Pfn) -> Result<()> {
        self.update(pfn, None)
    }

    fn update(&self, pfn: Pfn, new: Option<Entry>) -> Result<()> {
        self.failures.check(RmpUpdate).map_err(|()| Errno::EFAULT)?;
        self.entries.with(pfn, |entry| {
            if entry.is_some_and(|entry| entry.is_immutable) {
                return Err(Errno::EFAULT);
            }
            *entry = new;
            Ok(())
        })
    }

    /// The firmware changes an entry, which nobody can keep it from.
    pub(super) fn by_firmware<R>(&self, pfn: Pfn, change: impl FnOnce(&mut Option<Entry>) -> R) -> R {
        self.entries.with(pfn, change)
    }

    /// The guest says that a frame is to be what it has there, or that it is not (PVALIDATE). Answers whether that was new.
    pub fn validate(
        &self,
        pfn: Pfn,
        gfn: Gfn,
        asid: u32,
        is_validated: bool,
    ) -> std::result::Result<bool, Refusal> {
        self.entries.with(pfn, |entry| match entry {
            Some(entry) if entry.is_of(gfn, asid) => {
                Ok(std::mem::replace(&mut entry.is_validated, is_validated) != is_validated)
            }
            _ => Err(Refusal::NotTheGuests),
        })
    }

    /// The guest accesses a frame that it means to be private.
    pub fn check_guest(&self, pfn: Pfn, gfn: Gfn, asid: u32) -> std::result::Result<(), Refusal> {
        match self.lookup(pfn) {
            Some(entry) if !entry.is_of(gfn, asid) => Err(Refusal::NotTheGuests),
            Some(entry) if !entry.is_validated => Err(Refusal::NotValidated),
            Some(_) => Ok(()),
            None => Err(Refusal::NotTheGuests),
        }
    }

    /// Whether the host may write to a frame.
    pub fn is_hosts(&self, pfn: Pfn) -> bool {
        self.lookup(pfn).is_none()
    }
}

impl Entry {
    fn is_of(&self, gfn: Gfn, asid: u32) -> bool {
        self.asid == asid && self.gfn == gfn && !self.is_immutable
    }
}

/// A host whose guest_memfds give frames back to it, and take them out of the table first (`sev_gmem_make_shared`).
pub struct RmpHost {
    host: Arc<dyn HostMemory>,
    rmp: Arc<Rmp>,
}

impl RmpHost {
    /// The machine that a host becomes with such a table.
    pub fn new(host: Arc<dyn HostMemory>, rmp: Arc<Rmp>) -> Arc<Self> {
        Arc::new(RmpHost { host, rmp })
    }
}

impl HostLayer for RmpHost {
    fn below(&self) -> &dyn HostMemory {
        &*self.host
    }

    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>> {
        let frames = self.host.new_file(pages)?;
        Ok(Box::new(RmpFrames { frames, rmp: Arc::clone(&self.rmp), allocated: Mutex::default() }))
    }
}

struct RmpFrames {
    frames: Box<dyn FileFrames>,
    rmp: Arc<Rmp>,
    allocated: Mutex<HashMap<u64, Pfn>>,
}

impl RmpFrames {
    fn allocated(&self) -> MutexGuard<'_, HashMap<u64, Pfn>> {
        self.allocated.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel too goes on when this fails: there is nothing else that it could do.
    fn take_back(&self, pfn: Pfn) {
        if !self.rmp.is_hosts(pfn) {
            let _ = self.rmp.make_shared(pfn);
        }
    }
}

impl FileFrames for RmpFrames {
    fn allocate(&self, index: u64) -> Result<Pfn> {
        let pfn = self.frames.allocate(index)?;
        self.allocated().insert(index, pfn);
        Ok(pfn)
    }

    fn is_signal_pending(&self) -> bool {
        self.frames.is_signal_pending()
    }

    fn touched(&self, indices: Range<u64>) -> Vec<Range<u64>> {
        self.frames.touched(indices)
    }

    fn release(&self, index: u64) {
        if let Some(pfn) = self.allocated().remove(&index) {
            self.take_back(pfn);
        }
        self.frames.release(index);
    }
}

impl Drop for RmpFrames {
    fn drop(&mut self) {
        for pfn in std::mem::take(&mut *self.allocated()).into_values() {
            self.take_back(pfn);
        }
    }
}
