//! The MMU lock, and what holding it proves.
//!
//! Who maps holds it shared, who removes holds it exclusively. What may be done is done through the guards, so that nothing
//! can be done without. Walks need it too, in place of the kernel's RCU: a table that someone may walk is not used again.
//! The processor's own walks count as walks, in place of the TLB flush that the kernel waits for.
//!
//! The lock is not for one thread twice, not even shared: who waits for it exclusively comes first.

use super::{Mmu, Root, RootFilter};
use crate::sync::{ReadGuard, WriteGuard};

/// The MMU lock, held together with others who map.
pub struct Shared<'a> {
    mmu: &'a Mmu,
    _guard: ReadGuard<'a>,
}

/// The MMU lock, held by nobody else.
pub struct Exclusive<'a> {
    mmu: &'a Mmu,
    _guard: WriteGuard<'a>,
}

/// The MMU lock, held in either way: what tables can be read and walked through.
pub trait Held: sealed::Sealed {
    /// Of which MMU.
    fn mmu(&self) -> &Mmu;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Shared<'_> {}
    impl Sealed for super::Exclusive<'_> {}
}

impl Held for Shared<'_> {
    fn mmu(&self) -> &Mmu {
        self.mmu
    }
}

impl Held for Exclusive<'_> {
    fn mmu(&self) -> &Mmu {
        self.mmu
    }
}

impl Mmu {
    /// Waits until nobody holds the lock exclusively.
    pub fn lock_shared(&self) -> Shared<'_> {
        Shared { mmu: self, _guard: self.lock.read() }
    }

    /// Waits until nobody holds the lock.
    pub fn lock_exclusive(&self) -> Exclusive<'_> {
        let guard = self.lock.write();
        self.tables.reuse_retired();
        Exclusive { mmu: self, _guard: guard }
    }
}

impl<'a> Exclusive<'a> {
    /// The MMU, for as long as it is locked rather than for as long as the guard is looked at.
    pub(super) fn mmu_of(&self) -> &'a Mmu {
        self.mmu
    }

    /// The roots that a filter is for.
    pub(super) fn matching_roots(&self, filter: RootFilter) -> Vec<Root> {
        self.mmu.roots().into_iter().filter(|root| filter.is_for(root)).collect()
    }
}
