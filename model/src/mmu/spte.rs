//! One entry of a page table, bit by bit as in Intel's EPT.
//!
//! The bits that the processor reads are where it wants them, and those that it ignores are where KVM keeps its own. Here
//! entries are only made and read: nothing here stores one in a table, and nothing knows which table it is for.

use super::table::TableId;
use crate::units::{Gfn, Level, PAGE_SHIFT, Pfn};
use std::fmt;

const READABLE: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const EXECUTABLE: u64 = 1 << 2;
const PERMISSIONS: u64 = READABLE | WRITABLE | EXECUTABLE;
const PAGE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const MMU_PRESENT: u64 = 1 << 11;
const FRAME: u64 = ((1 << 52) - 1) & !((1 << PAGE_SHIFT) - 1);
/// Where an access-tracked entry keeps what it may do.
const SAVED_SHIFT: u32 = 52;
const SAVED: u64 = (READABLE | EXECUTABLE) << SAVED_SHIFT;
const HOST_WRITABLE: u64 = 1 << 53;
const MMU_WRITABLE: u64 = 1 << 55;
const WITHOUT_ACCESSED_DIRTY: u64 = 1 << 60;
/// Without it the processor would tell the guest, not the host, of what is not mapped.
const SUPPRESS_EXCEPTION: u64 = 1 << 63;

/// What an access does with a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AccessKind {
    /// Reads it.
    Read,
    /// Writes it.
    Write,
    /// Executes it.
    Fetch,
}

/// One entry of a page table ("shadow page table entry").
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Spte(u64);

/// What a new leaf is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaf {
    pub(super) pfn: Pfn,
    pub(super) level: Level,
    pub(super) is_writable: bool,
    pub(super) is_accessed: bool,
    /// Whether the processor keeps accessed and dirty bits in it.
    pub(super) accessed_dirty: bool,
}

impl Spte {
    /// Nothing is mapped.
    pub const EMPTY: Spte = Spte(SUPPRESS_EXCEPTION);
    /// Someone is about to change it and nobody else may. Never left in a table that can be reached.
    pub const FROZEN: Spte = Spte(SUPPRESS_EXCEPTION | 0x1a0);

    /// As it is in memory.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// As read from memory.
    pub(super) const fn of_bits(bits: u64) -> Self {
        Spte(bits)
    }

    /// A leaf. It counts as dirty from the start if it can be written.
    pub(super) fn leaf(leaf: Leaf) -> Self {
        let mut bits = MMU_PRESENT | READABLE | EXECUTABLE | ACCESSED | leaf.pfn.0 << PAGE_SHIFT;
        if leaf.is_writable {
            bits |= WRITABLE | HOST_WRITABLE | MMU_WRITABLE | DIRTY;
        }
        if leaf.level > Level::SMALL {
            bits |= PAGE;
        }
        if !leaf.accessed_dirty {
            bits |= WITHOUT_ACCESSED_DIRTY;
        }
        let spte = Spte(bits);
        if leaf.is_accessed { spte } else { spte.not_accessed() }
    }

    /// An entry that leads to another table.
    pub(super) const fn table(child: TableId, accessed_dirty: bool) -> Self {
        let how = if accessed_dirty { ACCESSED } else { WITHOUT_ACCESSED_DIRTY };
        Spte(MMU_PRESENT | PERMISSIONS | child.frame() << PAGE_SHIFT | how)
    }

    /// Remembers that there is no memory. The processor takes it for a mistake ("misconfiguration") and asks.
    pub(super) const fn mmio(gfn: Gfn, generation: u64) -> Self {
        let (low, high) = (generation & 0x7f, (generation >> 7) & 0x7ff);
        Spte((gfn.gpa() & FRAME) | WRITABLE | EXECUTABLE | low << 3 | high << 52)
    }

    /// The generation of memslots that an entry for what is no memory was made in, cut to 18 bits.
    pub const fn mmio_generation(self) -> Option<u64> {
        if self.is_mmio() { Some((self.0 >> 3 & 0x7f) | (self.0 >> 52 & 0x7ff) << 7) } else { None }
    }

    /// Whether it says that there is no memory.
    pub const fn is_mmio(self) -> bool {
        self.0 & (PERMISSIONS | SUPPRESS_EXCEPTION | MMU_PRESENT) == WRITABLE | EXECUTABLE
    }

    /// Whether someone is about to change it.
    pub const fn is_frozen(self) -> bool {
        self.0 == Spte::FROZEN.0
    }

    /// Whether it leads anywhere: to a page or to another table. (The processor may all the same be kept from using it,
    /// to learn of the next access.)
    pub const fn is_present(self) -> bool {
        self.0 & MMU_PRESENT != 0
    }

    /// Whether it maps a page, if it stands in a table of this level.
    pub fn is_leaf(self, level: Level) -> bool {
        self.is_present() && (level == Level::SMALL || self.0 & PAGE != 0)
    }

    /// The table that it leads to.
    pub fn child(self, level: Level) -> Option<TableId> {
        (self.is_present() && !self.is_leaf(level)).then(|| TableId::of_frame(self.pfn().0))
    }

    /// The frame that it maps, or that its table is in.
    pub const fn pfn(self) -> Pfn {
        Pfn((self.0 & FRAME) >> PAGE_SHIFT)
    }

    /// Whether the processor may write.
    pub const fn is_writable(self) -> bool {
        self.0 & WRITABLE != 0
    }

    /// Whether the processor may read.
    pub const fn is_readable(self) -> bool {
        self.0 & READABLE != 0
    }

    /// Whether the processor may execute.
    pub const fn is_executable(self) -> bool {
        self.0 & EXECUTABLE != 0
    }

    /// Whether the host's own entry allowed writing when it was made.
    pub const fn is_host_writable(self) -> bool {
        self.0 & HOST_WRITABLE != 0
    }

    /// Whether it can be made writable at once, without looking at the host again.
    pub const fn is_mmu_writable(self) -> bool {
        self.0 & MMU_WRITABLE != 0
    }

    /// Whether the page was accessed.
    pub const fn is_accessed(self) -> bool {
        self.0 & ACCESSED != 0
    }

    /// Whether the page was written, or might have been.
    pub const fn is_dirty(self) -> bool {
        self.0 & DIRTY != 0
    }

    /// Whether the processor keeps accessed and dirty bits in it.
    pub const fn has_accessed_dirty(self) -> bool {
        self.0 & WITHOUT_ACCESSED_DIRTY == 0
    }

    /// Whether all permissions are withheld, so that the next access is noticed.
    pub const fn is_access_tracked(self) -> bool {
        self.is_present() && !self.has_accessed_dirty() && self.0 & PERMISSIONS == 0
    }

    /// Whether the processor's walk ends here for want of any permission.
    pub const fn is_not_present_for_hardware(self) -> bool {
        self.0 & PERMISSIONS == 0
    }

    /// Whether this access is allowed.
    pub const fn allows(self, kind: AccessKind) -> bool {
        self.is_present()
            && match kind {
                AccessKind::Read => self.is_readable(),
                AccessKind::Write => self.is_writable(),
                AccessKind::Fetch => self.is_executable(),
            }
    }

    /// The same after such an access, as the processor leaves it.
    pub(super) const fn after(self, kind: AccessKind) -> Self {
        match (self.has_accessed_dirty(), kind) {
            (false, _) => self,
            (true, AccessKind::Write) => Spte(self.0 | ACCESSED | DIRTY),
            (true, _) => Spte(self.0 | ACCESSED),
        }
    }

    /// The same, so that the next access is noticed. Without accessed bits that is by withholding all permissions.
    pub(super) const fn not_accessed(self) -> Self {
        if self.has_accessed_dirty() {
            return Spte(self.0 & !ACCESSED);
        }
        if self.is_access_tracked() {
            return self;
        }
        let saved = (self.0 & (READABLE | EXECUTABLE)) << SAVED_SHIFT;
        Spte((self.0 & !(PERMISSIONS | ACCESSED)) | saved)
    }

    /// The same with the permissions that were withheld. Writing stays withheld: that it is written must be noticed too.
    pub(super) const fn restored(self) -> Self {
        let saved = (self.0 & SAVED) >> SAVED_SHIFT;
        Spte((self.0 & !(SAVED | PERMISSIONS)) | saved | ACCESSED)
    }

    /// The same, writable.
    pub(super) const fn made_writable(self) -> Self {
        Spte(self.0 | WRITABLE)
    }

    /// The same, so that the next write is noticed, which may then make it writable at once.
    pub(super) const fn write_protected(self) -> Self {
        Spte(self.0 & !WRITABLE)
    }

    /// The same, not to be made writable without the slow path.
    pub(super) const fn write_tracked(self) -> Self {
        Spte(self.0 & !(WRITABLE | MMU_WRITABLE))
    }

    /// The same, clean.
    pub(super) const fn clean(self) -> Self {
        Spte(self.0 & !DIRTY)
    }

    /// The part of a huge leaf that entry `index` of a table of `level` is to map.
    pub(super) fn small_part(self, level: Level, index: u64) -> Self {
        let part = Spte(self.0 | (index * level.pages()) << PAGE_SHIFT);
        if level == Level::SMALL { Spte(part.0 & !PAGE) } else { part }
    }

    /// The huge leaf of `level` that this leaf is a part of.
    pub(super) const fn made_huge(self, level: Level) -> Self {
        Spte((self.0 & !FRAME) | self.pfn().rounded_down(level).0 << PAGE_SHIFT | PAGE)
    }
}

impl fmt::Debug for Spte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Spte::EMPTY {
            return f.write_str("empty");
        }
        if self.is_frozen() {
            return f.write_str("frozen");
        }
        if let Some(generation) = self.mmio_generation() {
            return write!(f, "no memory (generation {generation})");
        }
        let flags = [
            (self.is_readable(), 'R'),
            (self.is_writable(), 'W'),
            (self.is_executable(), 'X'),
            (self.is_accessed(), 'A'),
            (self.is_dirty(), 'D'),
            (self.0 & PAGE != 0, 'P'),
            (self.is_host_writable(), 'h'),
            (self.is_mmu_writable(), 'm'),
        ];
        let flags: String = flags.iter().map(|(is_set, name)| if *is_set { *name } else { '-' }).collect();
        write!(f, "{:#x} {flags}", self.pfn().0)
    }
}
