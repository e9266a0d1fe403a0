//! What kind of machine is simulated, and what differs between its kernels.
//!
//! Everything that differs by version is a question here.

use crate::personality::Version;

/// When a fault may bring a transparent huge page: `/sys/kernel/mm/transparent_hugepage/enabled`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ThpPolicy {
    /// Everywhere but where it was advised against.
    Always,
    /// Where it was advised.
    Madvise,
    /// Nowhere.
    Never,
}

/// A machine.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The kernel's version.
    pub version: Version,
    /// Where transparent huge pages come by themselves.
    pub thp: ThpPolicy,
    /// Frames of memory that it has.
    pub frames: u64,
}

impl Settings {
    /// A machine with memory for everybody, where transparent huge pages are for those who ask.
    pub fn new(version: Version) -> Self {
        Settings { version, thp: ThpPolicy::Madvise, frames: 1 << 30 }
    }

    /// A write to the huge zero page gets a huge page at once. Before, the zero page was broken into small ones, and each
    /// was copied by itself.
    pub(super) fn huge_zero_page_is_copied_whole(&self) -> bool {
        self.version >= Version(6, 13)
    }

    /// `MADV_DONTNEED` of all that a table of small entries maps takes the table as well, so that a huge page may follow.
    pub(super) fn discard_frees_tables(&self) -> bool {
        self.version >= Version(6, 14)
    }

    /// A part of a huge page that nobody else has is written where it is, though the rest of that page is there too.
    pub(super) fn parts_of_huge_pages_are_reused(&self) -> bool {
        self.version >= Version(6, 15)
    }

    /// So is the last part of a huge page of which nothing else is mapped. (It was in 6.1; in 6.12 no part ever is.)
    pub(super) fn last_parts_of_huge_pages_are_reused(&self) -> bool {
        self.version < Version(6, 8)
    }

    /// `mprotect` tells of all from the first gigabyte that has tables to the end; before, of each gigabyte by itself.
    pub(super) fn protection_is_told_at_once(&self) -> bool {
        self.version >= Version(6, 12)
    }

    /// `mprotect` that allows writing opens huge pages as it does small ones; before, the first write did.
    pub(super) fn protection_opens_huge_pages(&self) -> bool {
        self.version >= Version(6, 2)
    }

    /// A private mapping's page of hugetlb that is discarded becomes a reserved one again.
    pub(super) fn discarded_huge_pages_stay_reserved(&self) -> bool {
        self.version >= Version(6, 9)
    }

    /// `MADV_COLLAPSE` takes pages of which the process can write none.
    pub(super) fn collapse_takes_read_only_pages(&self) -> bool {
        self.version >= Version(6, 18)
    }

    /// `MADV_COLLAPSE` of less than a whole huge page has nothing to do; before, it fails unless the range ends where it
    /// would begin.
    pub(super) fn collapse_of_a_part_is_nothing(&self) -> bool {
        self.version >= Version(7, 0)
    }

    /// `MADV_POPULATE_*` goes on after a hole, and tells of it at the end.
    pub(super) fn populate_passes_over_holes(&self) -> bool {
        self.version < Version(6, 9)
    }

    /// `MADV_REMOVE` asks only whether the mapping could be made writable: since 6.7, and in the 6.1 that
    /// distributions have.
    pub(super) fn remove_works_on_read_only_mappings(&self) -> bool {
        self.version >= Version(6, 1)
    }

    /// `MADV_COLLAPSE` goes on after 2 MiB without a page. Before, it stopped there.
    pub(super) fn collapse_passes_over_nothing(&self) -> bool {
        self.version >= Version(7, 0)
    }

    /// A mapping that is changed and has pages of its own is joined to a neighbour that has none. (It was not in 6.12, it is
    /// in 7.3.)
    pub(super) fn own_pages_are_shared_with_neighbours(&self) -> bool {
        self.version >= Version(6, 16)
    }

    /// `MADV_DOFORK` refuses hugetlb. (It did not in 6.18, it does in 7.3.)
    pub(super) fn hugetlb_is_always_given_to_children(&self) -> bool {
        self.version >= Version(7, 0)
    }
}
