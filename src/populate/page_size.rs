//! Which memory is of huge pages, where the plan could not say.
//!
//! Before Linux 6.11 a mapping's page size is not in what the plan asks, and must be looked for in smaps: only by who
//! has failed already or must know beforehand.

use super::plan::Segment;
use crate::kvm::{Kernel, MappedObject, Smaps};
use crate::range::{PAGE, Range};

/// Page sizes as they are on this occasion; not to be kept, since mappings change.
pub struct PageSizes<'a>(Smaps<'a>);

impl<'a> PageSizes<'a> {
    /// Nothing is read yet.
    pub fn new(kernel: &'a dyn Kernel) -> Self {
        Self(Smaps::new(kernel))
    }

    /// Bytes in a page of the memory where `range`, a part of `segment`, begins; `None` where nobody can tell.
    pub fn of(&self, segment: &Segment, range: Range) -> Option<u64> {
        if segment.page_size != 0 {
            return Some(segment.page_size);
        }
        if !matches!(segment.backing.object, MappedObject::Hugetlb | MappedObject::File | MappedObject::Shmem)
        {
            return Some(PAGE);
        }
        self.0.at(segment.hva_of(range.start)?).map(|entry| entry.page_size)
    }
}
