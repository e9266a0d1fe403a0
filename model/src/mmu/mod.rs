//! The TDP MMU: the page tables that translate a guest's physical addresses.
//!
//! An [`Mmu`] has roots, one for each [`Role`]; vCPUs of equal role share one. Pages are mapped under the lock held
//! [shared](Mmu::lock_shared), by as many threads as there are, and taken away under the lock held
//! [exclusively](Mmu::lock_exclusive). Tables of some roots are [mirrors](Mirroring) of an [`ExternalTable`].
//!
//! Nothing here knows of memslots, of the host, or of what is private. *Mirrored* is a property of a page table, *private*
//! one of an access: the caller chooses the root, and from then on the tables themselves say what has to be kept equal to
//! what. `comparison.rs` shows what goes wrong otherwise.

mod change;
#[cfg(not(loom))]
pub mod comparison;
mod counts;
mod dirty;
mod dump;
mod external;
mod hardware;
mod invalidation;
pub mod invariants;
mod lock;
mod map;
mod plain_copy;
#[cfg(all(test, loom))]
mod races;
mod spte;
mod table;
mod walk;
mod zap;

pub use dump::RootDump;
pub use external::{Change, Contents, ExternalError, ExternalTable, Request};
pub use hardware::{FastFault, Translation, Violation};
pub use invalidation::InvalidationSnapshot;
pub use lock::{Exclusive, Held, Shared};
pub use map::{DirtyLog, MapResult, Mapping, NoMemory};
pub use plain_copy::{Calls, PlainCopy};
pub use spte::{AccessKind, Spte};
pub use table::TableId;
pub use walk::{EntryView, Walk};

use crate::personality::{Personality, Version};
use crate::sync::plain::OnceLock;
use crate::sync::{Mutex, ReadersLock};
use crate::units::{Gfn, Level};
use counts::PageCounts;
use invalidation::Invalidation;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use table::{Retired, Tables, lock};

/// Bits of a guest frame number that select an entry of one table. (Where all orders of threads are tried, tables of two
/// entries have all that is needed.)
pub const INDEX_BITS: u32 = if cfg!(loom) { 1 } else { 9 };
/// Entries of a table.
pub const ENTRIES: usize = 1 << INDEX_BITS;

/// Whether a page table is kept equal to an external one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Mirroring {
    /// The processor walks this table itself.
    Direct,
    /// An external table, which the processor walks, is kept equal to this one.
    Mirror,
}

/// What distinguishes the tables of one vCPU from those of another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Role {
    /// Whether the vCPU is in system management mode, which has an address space of its own.
    pub smm: bool,
    /// Whether a nested guest runs.
    pub guest_mode: bool,
    /// Whether the processor keeps accessed and dirty bits.
    pub accessed_dirty: bool,
    /// Levels of tables: 4 or 5.
    pub levels: u8,
    /// Whether these tables are mirrored.
    pub mirroring: Mirroring,
    /// A bit of addresses only, if there is one: what is mapped at a frame stands in the tables at the frame and this bit.
    /// (Of a guest whose addresses say by a bit that they are shared.)
    pub gfn_bits: Gfn,
}

impl Role {
    /// That of a vCPU whose guest's addresses have this bit if they are shared, or none.
    pub const fn new(personality: &Personality, smm: bool, mirroring: Mirroring, shared_bit: Gfn) -> Self {
        let needs_fifth = personality.address_bits > 48 || shared_bit.gpa() >> 48 != 0;
        Role {
            smm,
            guest_mode: false,
            accessed_dirty: personality.has_accessed_dirty,
            levels: if needs_fifth { 5 } else { 4 },
            mirroring,
            gfn_bits: match mirroring {
                Mirroring::Direct => shared_bit,
                Mirroring::Mirror => Gfn(0),
            },
        }
    }

    /// The number of its address space.
    pub const fn as_id(self) -> usize {
        self.smm as usize
    }
}

/// What is the same for all tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Whether a fault leaves a leaf alone that suffices already (since 6.13), in place of making it anew.
    pub keeps_present_leafs: bool,
}

impl Settings {
    /// Those of a kernel.
    pub fn of(personality: &Personality) -> Self {
        Settings { keeps_present_leafs: personality.version > Version(6, 12) }
    }
}

/// Which roots an operation is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RootFilter {
    /// Those that mirror nothing.
    pub direct: bool,
    /// Those that are mirrors.
    pub mirror: bool,
    /// Also those that are invalid, and not yet zapped.
    pub invalid: bool,
    /// Only those of this address space.
    pub as_id: Option<usize>,
}

impl RootFilter {
    /// All roots there are.
    pub const EVERYTHING: RootFilter = RootFilter { direct: true, mirror: true, invalid: true, as_id: None };
    /// All roots that mirror nothing.
    pub const EVERYTHING_DIRECT: RootFilter = RootFilter { mirror: false, ..RootFilter::EVERYTHING };
    /// All roots that are in use.
    pub const VALID: RootFilter = RootFilter { invalid: false, ..RootFilter::EVERYTHING };

    /// Roots of an address space that mirror nothing.
    pub const fn direct(as_id: usize) -> Self {
        RootFilter { mirror: false, as_id: Some(as_id), ..RootFilter::EVERYTHING }
    }

    /// Roots of an address space that are mirrors.
    pub const fn mirror(as_id: usize) -> Self {
        RootFilter { direct: false, as_id: Some(as_id), ..RootFilter::EVERYTHING }
    }

    /// All roots of an address space.
    pub const fn both(as_id: usize) -> Self {
        RootFilter { as_id: Some(as_id), ..RootFilter::EVERYTHING }
    }

    /// Whether a root is one of them.
    pub fn is_for(self, root: &Root) -> bool {
        (match root.mirroring() {
            Mirroring::Direct => self.direct,
            Mirroring::Mirror => self.mirror,
        }) && (self.invalid || !root.is_invalid())
            && self.as_id.is_none_or(|as_id| as_id == root.role().as_id())
    }
}

/// The highest table of a role, for as long as someone has it.
///
/// Every vCPU gets one of its own from [`Mmu::root`], so that copies of it are counted where no other vCPU counts.
#[derive(Clone)]
pub struct Root(Arc<RootHolder>);

struct RootHolder {
    role: Role,
    level: Level,
    table: TableId,
    held: Arc<RootTable>,
}

struct RootTable {
    table: TableId,
    is_invalid: AtomicBool,
    retired: Retired,
}

impl Root {
    /// Its role.
    pub fn role(&self) -> Role {
        self.0.role
    }

    /// Whether it is out of use: nothing is mapped in it any more, or soon, and a vCPU gets a new one.
    ///
    /// Changes only under the exclusive lock.
    pub fn is_invalid(&self) -> bool {
        self.0.held.is_invalid.load(Relaxed)
    }

    /// Whether its tables are mirrored.
    pub fn mirroring(&self) -> Mirroring {
        self.0.role.mirroring
    }

    /// The level of its table.
    pub fn level(&self) -> Level {
        self.0.level
    }

    /// Its table.
    pub fn table(&self) -> TableId {
        self.0.table
    }

    /// Bits that are set in every frame number by which its tables are indexed.
    fn gfn_bits(&self) -> u64 {
        self.0.role.gfn_bits.0
    }

    /// The same, counted apart.
    fn held_apart(&self) -> Root {
        let RootHolder { role, level, table, ref held } = *self.0;
        Root(Arc::new(RootHolder { role, level, table, held: Arc::clone(held) }))
    }

    fn invalidate(&self) {
        self.0.held.is_invalid.store(true, Relaxed);
    }
}

impl PartialEq for Root {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0.held, &other.0.held)
    }
}

impl Eq for Root {}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Root")
            .field("role", &self.0.role)
            .field("table", &self.0.table)
            .field("is_invalid", &self.is_invalid())
            .finish()
    }
}

impl Drop for RootTable {
    fn drop(&mut self) {
        // Another vCPU may just be walking it.
        lock(&self.retired).push(self.table);
    }
}

/// All tables of one virtual machine.
pub struct Mmu {
    settings: Settings,
    lock: ReadersLock,
    tables: Tables,
    roots: Mutex<Vec<Root>>,
    counts: PageCounts,
    invalidation: Invalidation,
    external: Option<Arc<dyn ExternalTable>>,
    bug: OnceLock<String>,
}

impl Mmu {
    /// One without tables. Mirrors are for who has an external table.
    pub fn new(settings: Settings, external: Option<Arc<dyn ExternalTable>>) -> Self {
        Self {
            settings,
            lock: ReadersLock::default(),
            tables: Tables::new(),
            roots: Mutex::new(Vec::new()),
            counts: PageCounts::default(),
            invalidation: Invalidation::new(),
            external,
            bug: OnceLock::new(),
        }
    }

    /// The root of a role.
    pub fn root(&self, role: Role) -> Root {
        assert!(role.mirroring == Mirroring::Direct || self.external.is_some(), "a mirror of nothing");
        let mut roots = lock(&self.roots);
        if let Some(root) = roots.iter().find(|root| root.role() == role && !root.is_invalid()) {
            return root.held_apart();
        }
        let level = Level::new(role.levels);
        let table = self.tables.allocate(Gfn(0), level);
        let retired = Arc::clone(self.tables.retired());
        let held = Arc::new(RootTable { table, is_invalid: AtomicBool::new(false), retired });
        let root = Root(Arc::new(RootHolder { role, level, table, held }));
        roots.push(root.held_apart());
        root
    }

    /// All roots, also those that are invalid and not yet zapped.
    pub fn roots(&self) -> Vec<Root> {
        lock(&self.roots).clone()
    }

    fn forget(&self, root: &Root) {
        lock(&self.roots).retain(|other| other != root);
    }

    /// How many pages of 4 KiB, 2 MiB and 1 GiB are mapped, in all roots together.
    pub fn page_counts(&self) -> [u64; 3] {
        self.counts.sum().map(|pages| pages.max(0) as u64)
    }

    /// To be taken before a frame is looked up.
    pub fn snapshot(&self) -> InvalidationSnapshot {
        self.invalidation.snapshot()
    }

    /// Whether a frame that was looked up after `snapshot` is surely out of date. Without the lock it may be so without
    /// this saying so: only [`Shared::is_stale`] allows a frame to be used.
    pub fn is_stale_unlocked(&self, snapshot: InvalidationSnapshot, gfn: Gfn) -> bool {
        self.invalidation.is_stale(snapshot, gfn)
    }

    /// Whether there are external tables, which mirrors are for.
    pub fn has_external(&self) -> bool {
        self.external.is_some()
    }

    /// Whether something happened that cannot happen, after which the virtual machine is dead.
    pub fn has_bug(&self) -> bool {
        self.bug().is_some()
    }

    /// What happened that cannot happen, after which the virtual machine is dead.
    pub fn bug(&self) -> Option<&str> {
        self.bug.get().map(String::as_str)
    }

    fn report_bug(&self, what: impl FnOnce() -> String) {
        self.bug.get_or_init(what);
    }

    fn external(&self) -> &dyn ExternalTable {
        self.external.as_deref().expect("mirrors are made only where there is an external table")
    }
}

impl Shared<'_> {
    /// Whether a frame that was looked up after `snapshot` may be wrong by now. If so the fault is to be retried.
    pub fn is_stale(&self, snapshot: InvalidationSnapshot, gfn: Gfn) -> bool {
        self.mmu().invalidation.is_stale(snapshot, gfn)
    }
}
