//! One entry of the process's page table, as a value.
//!
//! Only what decides about a fault or is seen by KVM is kept: no accessed and no dirty bit. An entry says nothing of who
//! else has the frame; that is the frame's own business ([`frames`](super::frames)).

use crate::units::Pfn;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
/// Points to a table of smaller entries.
const TABLE: u64 = 1 << 2;
/// Keeps its frame while the protection lets nobody use it.
const NO_ACCESS: u64 = 1 << 3;
/// Stands for memory that has failed.
const POISONED: u64 = 1 << 4;
const KIND_SHIFT: u32 = 5;
const KIND_MASK: u64 = 3 << KIND_SHIFT;
const PFN_SHIFT: u32 = 12;

/// What kind of frame an entry maps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The zero page, or the huge one.
    Zero,
    /// The process's own.
    Anonymous,
    /// A file's.
    File,
}

/// An entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(u64);

impl Entry {
    pub const EMPTY: Entry = Entry(0);
    pub const TO_TABLE: Entry = Entry(TABLE);
    pub const FAILED: Entry = Entry(POISONED);

    pub const fn of_bits(bits: u64) -> Self {
        Entry(bits)
    }

    pub const fn bits(self) -> u64 {
        self.0
    }

    pub const fn page(pfn: Pfn, kind: Kind, writable: bool) -> Self {
        let writable = if writable { WRITABLE } else { 0 };
        Entry(pfn.0 << PFN_SHIFT | (kind as u64) << KIND_SHIFT | PRESENT | writable)
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub const fn is_table(self) -> bool {
        self.0 & TABLE != 0
    }

    /// Whether it maps a frame, be it one that nobody may use.
    pub const fn has_frame(self) -> bool {
        self.0 & (PRESENT | NO_ACCESS) != 0
    }

    pub const fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    pub const fn is_writable(self) -> bool {
        self.0 & WRITABLE != 0
    }

    pub const fn is_failed(self) -> bool {
        self.0 & POISONED != 0
    }

    /// Whether the processor, and `get_user_pages` without a fault, would take it for this access.
    pub const fn allows(self, write: bool) -> bool {
        let needed = if write { PRESENT | WRITABLE } else { PRESENT };
        self.0 & needed == needed
    }

    pub const fn pfn(self) -> Pfn {
        Pfn(self.0 >> PFN_SHIFT)
    }

    pub const fn kind(self) -> Kind {
        match (self.0 & KIND_MASK) >> KIND_SHIFT {
            0 => Kind::Zero,
            1 => Kind::Anonymous,
            _ => Kind::File,
        }
    }

    pub fn is_anonymous(self) -> bool {
        self.has_frame() && self.kind() == Kind::Anonymous
    }

    /// The same frame, open for reading and, if so, for writing.
    pub const fn opened(self, writable: bool) -> Self {
        Entry::page(self.pfn(), self.kind(), writable)
    }

    /// The same frame, closed to everybody.
    pub const fn closed(self) -> Self {
        Entry((self.0 & !(PRESENT | WRITABLE)) | NO_ACCESS)
    }

    /// Like it in all but the frame.
    pub const fn with_frame(self, pfn: Pfn) -> Self {
        Entry(self.0 & ((1 << PFN_SHIFT) - 1) | pfn.0 << PFN_SHIFT)
    }
}
