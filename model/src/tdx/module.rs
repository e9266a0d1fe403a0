//! The TDX module as KVM sees it: the SEAMCALLs of memory, and what it answers to each.
//!
//! It trusts KVM in nothing. Every call is checked against the guest's life, the secure EPT and the owner of the frame, and
//! each wrong order is refused with the module's own status. It knows nothing of memslots, attributes or mirrors. Where the
//! real module answers that someone else holds a lock, this one waits; the answer is had by asking for it
//! ([`Module::failures`]).

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use super::config::{self, Chosen, Registers};
use super::measurement::{CHUNK, Measurement};
use super::sept::{Entry, PageState, SeptPage, Table};
use super::status::{Operand, Status};
use crate::confidential::frames::FrameTable;
use crate::confidential::{Digest, Failures};
use crate::host::HostMemory;
use crate::sync::plain::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
use crate::units::{Gfn, Level, PAGE_SIZE, Pfn};

/// What the module answers.
pub type Answer<T> = Result<T, Status>;

/// The calls, by their names.
#[allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Seamcall {
    MngCreate,
    MngInit,
    MngKeyFreeid,
    VpCreate,
    VpInit,
    VpEnter,
    MemSeptAdd,
    MemSeptRemove,
    MemPageAdd,
    MemPageAug,
    MemPageRemove,
    MemRangeBlock,
    MemTrack,
    MrExtend,
    MrFinalize,
    PhymemPageReclaim,
    PhymemPageWbinvd,
}

/// The module of one machine.
pub struct Module {
    host: Arc<dyn HostMemory>,
    /// Whose each frame is.
    frames: FrameTable<Owner>,
    /// How many guests can still be made, each having a key of its own.
    free_keys: Mutex<u32>,
    next_guest: AtomicU64,
    failures: Failures<Seamcall, Status>,
}

/// Whose a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// The guest, by its number.
    pub guest: u64,
    /// As what the guest has it.
    pub gfn: Gfn,
}

/// A guest as the module keeps it.
pub struct Td {
    module: Arc<Module>,
    id: u64,
    life: RwLock<Life>,
    root: Arc<Table>,
    shared_bit: Gfn,
    is_pending_reported: bool,
    xfam: u64,
    cpuid: Chosen,
    /// The tables' pages. What a page was used for before it was reclaimed does not matter.
    sept_pages: Mutex<HashSet<SeptPage>>,
    measurement: Mutex<Measurement>,
    vcpus: AtomicU64,
    epochs: Mutex<Epochs>,
    /// Frames and tables that belong to the guest.
    children: AtomicU64,
}

/// The times of a guest's life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Life {
    /// Its image is loaded.
    Initialized,
    /// It can run.
    Runnable,
    /// Its key is gone.
    Teardown,
}

/// How the module knows that no vCPU uses a translation that was blocked.
#[derive(Debug)]
struct Epochs {
    /// Flushes so far.
    current: u64,
    /// How many vCPUs run that entered in an even, and in an odd epoch. There is never one that entered two epochs ago.
    running: [u64; 2],
}

/// What kind of a guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TdParams {
    /// Levels of its page tables, 4 or 5: where its shared bit is.
    pub levels: Level,
    /// An access to a page that is pending exits to KVM (`SEPT_VE_DISABLE`); otherwise the guest gets #VE.
    pub is_pending_reported: bool,
    /// The state that is saved for it, by the bits of XCR0 and XSS.
    pub xfam: u64,
    /// What was chosen of its CPUID.
    pub cpuid: Chosen,
}

impl TdParams {
    /// A guest with the least state, of whose CPUID nothing was chosen.
    pub const fn least(levels: Level) -> Self {
        let cpuid = [[0; 4]; config::CONFIGURABLE];
        TdParams { levels, is_pending_reported: true, xfam: config::REQUIRED_XFAM, cpuid }
    }

    fn check(&self) -> Answer<()> {
        if self.xfam & !config::ALLOWED_XFAM != 0
            || self.xfam & config::REQUIRED_XFAM != config::REQUIRED_XFAM
        {
            return Err(Status::OPERAND_INVALID.of(Operand::Xfam));
        }
        if !config::is_choice_allowed(&self.cpuid) {
            return Err(Status::OPERAND_INVALID.of(Operand::CpuidConfig));
        }
        Ok(())
    }
}

/// How an access of the guest to private memory ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// It is done to this frame.
    Done(Pfn),
    /// Nothing is mapped: the guest exits, to be run again once something is.
    Violation,
    /// The page is pending, and the guest exits with that said.
    Pending,
    /// The page is pending, and the guest gets #VE.
    VirtualizationException,
}

/// How the guest's TDG.MEM.PAGE.ACCEPT ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Accept {
    /// The page is the guest's, and zeroed.
    Done(Pfn),
    /// Nothing is mapped: the guest exits, to be run again once something is.
    Violation,
    /// It goes on with a status.
    Refused(Status),
}

impl Module {
    /// The module of a machine that has keys for so many guests.
    pub fn new(host: Arc<dyn HostMemory>, keys: u32) -> Arc<Self> {
        Arc::new(Module {
            host,
            frames: FrameTable::default(),
            free_keys: Mutex::new(keys),
            next_guest: AtomicU64::new(1),
            failures: Failures::default(),
        })
    }

    /// Calls that are to fail. Removing and teardown are tried once more by KVM when busy; nothing else in them may fail.
    pub fn failures(&self) -> &Failures<Seamcall, Status> {
        &self.failures
    }

    /// Whose a frame is, if a guest's. The host must not use it then.
    pub fn owner(&self, pfn: Pfn) -> Option<Owner> {
        self.frames.get(pfn)
    }

    /// How many frames are a guest's.
    pub fn frames_of(&self, td: &Td) -> u64 {
        self.frames.count(|_, owner| owner.guest == td.id)
    }

    /// Takes a key, if there is one.
    pub fn take_key(&self) -> bool {
        let mut free = lock(&self.free_keys);
        let is_free = *free > 0;
        *free -= u32::from(is_free);
        is_free
    }

    /// Gives a key back.
    pub fn give_key_back(&self) {
        *lock(&self.free_keys) += 1;
    }

    /// TDH.MNG.CREATE: the guest has a page and a key. (What is kept of it begins with [`mng_init`](Self::mng_init).)
    pub fn mng_create(&self) -> Answer<()> {
        self.failures.check(Seamcall::MngCreate)
    }

    /// TDH.MNG.INIT, and what is before it.
    pub fn mng_init(self: &Arc<Self>, params: TdParams) -> Answer<Arc<Td>> {
        self.failures.check(Seamcall::MngInit)?;
        params.check()?;
        let bits = params.levels.number() as u32 * crate::mmu::INDEX_BITS;
        // The highest bit of a guest's address is the shared one: bit 47 with four levels, bit 51 with five.
        let shared_bit = if params.levels == Level::FIFTH { bits - 6 } else { bits - 1 };
        Ok(Arc::new(Td {
            module: Arc::clone(self),
            id: self.next_guest.fetch_add(1, Ordering::Relaxed),
            life: RwLock::new(Life::Initialized),
            root: Arc::new(Table::new(params.levels)),
            shared_bit: Gfn(1 << shared_bit),
            is_pending_reported: params.is_pending_reported,
            xfam: params.xfam,
            cpuid: params.cpuid,
            sept_pages: Mutex::default(),
            measurement: Mutex::default(),
            vcpus: AtomicU64::new(0),
            epochs: Mutex::new(Epochs { current: 1, running: [0, 0] }),
            children: AtomicU64::new(0),
        }))
    }

    /// TDH.PHYMEM.PAGE.WBINVD: what the guest left in caches goes.
    pub fn phymem_page_wbinvd(&self, _pfn: Pfn) -> Answer<()> {
        self.failures.check(Seamcall::PhymemPageWbinvd)
    }

    /// A frame becomes a guest's.
    fn take(&self, td: &Td, gfn: Gfn, pfn: Pfn) -> Answer<()> {
        self.frames.with(pfn, |owner| match owner {
            Some(_) => Err(Status::PAGE_METADATA_INCORRECT.of(Operand::R8)),
            None => {
                *owner = Some(Owner { guest: td.id, gfn });
                td.children.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
        })
    }
}

impl Td {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The bit of an address by which it says that it means shared memory.
    pub fn shared_bit(&self) -> Gfn {
        self.shared_bit
    }

    /// Levels of its page tables.
    pub fn levels(&self) -> Level {
        self.root.level()
    }

    /// TDH.MNG.RD of what CPUID answers to it.
    pub fn mng_rd_cpuid(&self, function: u32, index: Option<u32>) -> Answer<Registers> {
        config::answer(function, index, self.xfam, &self.cpuid).ok_or(Status::METADATA_FIELD_ID_INCORRECT)
    }

    /// What time of its life it is.
    pub fn life(&self) -> Life {
        *self.life.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Frames and tables that belong to it.
    pub fn children(&self) -> u64 {
        self.children.load(Ordering::Relaxed)
    }

    /// What was measured so far; once it is finalized, that is what it is known by.
    pub fn measurement(&self) -> Digest {
        lock(&self.measurement).value()
    }

    /// Calls with every entry of its secure EPT that is not free, in the order of addresses, parents first.
    pub fn visit(&self, seen: &mut dyn FnMut(Gfn, Level, &Entry)) {
        self.root.visit(Gfn(0), seen);
    }

    /// TDH.VP.CREATE and TDH.VP.INIT, and what is between.
    pub fn vp_init(&self) -> Answer<()> {
        self.module.failures.check(Seamcall::VpCreate)?;
        let _life = self.live_only(&[Life::Initialized])?;
        self.module.failures.check(Seamcall::VpInit)?;
        self.vcpus.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// TDH.MEM.SEPT.ADD: a table for what is below an entry of `level`.
    pub fn mem_sept_add(&self, gfn: Gfn, level: Level, page: SeptPage) -> Answer<()> {
        self.module.failures.check(Seamcall::MemSeptAdd)?;
        let _life = self.live()?;
        if level == Level::SMALL || level > self.root.level() {
            return Err(Status::OPERAND_INVALID.of(Operand::Rcx));
        }
        let parent = self.walk(gfn, level)?;
        parent.with_entry(gfn, |entry| {
            if !matches!(entry, Entry::Free) {
                return Err(Status::EPT_ENTRY_STATE_INCORRECT.of(Operand::Rcx));
            }
            if !lock(&self.sept_pages).insert(page) {
                return Err(Status::PAGE_METADATA_INCORRECT.of(Operand::R8));
            }
            self.children.fetch_add(1, Ordering::Relaxed);
            *entry = Entry::Table { table: Arc::new(Table::new(level.below())), page, blocked_at: None };
            Ok(())
        })
    }

    /// TDH.MEM.SEPT.REMOVE: takes away a table that has nothing in it. KVM never does.
    pub fn mem_sept_remove(&self, gfn: Gfn, level: Level) -> Answer<SeptPage> {
        self.module.failures.check(Seamcall::MemSeptRemove)?;
        let life = self.live()?;
        let parent = self.walk(gfn, level)?;
        parent.with_entry(gfn, |entry| {
            let Entry::Table { table, page, blocked_at } = entry else {
                return Err(Status::EPT_ENTRY_STATE_INCORRECT.of(Operand::Rcx));
            };
            self.check_flushed(*life, *blocked_at)?;
            if !table.is_free() {
                return Err(Status::EPT_PAGE_NOT_FREE.of(Operand::Rcx));
            }
            let page = *page;
            lock(&self.sept_pages).remove(&page);
            self.children.fetch_sub(1, Ordering::Relaxed);
            *entry = Entry::Free;
            Ok(page)
        })
    }

    /// TDH.MEM.PAGE.ADD: a page of the image, copied from another frame.
    pub fn mem_page_add(&self, gfn: Gfn, pfn: Pfn, source: Pfn) -> Answer<()> {
        self.module.failures.check(Seamcall::MemPageAdd)?;
        let _life = self.live_only(&[Life::Initialized])?;
        self.put_page(gfn, pfn, PageState::Mapped)?;
        self.module.host.set_page(pfn, &self.module.host.page(source));
        lock(&self.measurement).add_page(gfn);
        Ok(())
    }

    /// TDH.MEM.PAGE.AUG: a page that the guest is to accept.
    pub fn mem_page_aug(&self, gfn: Gfn, pfn: Pfn) -> Answer<()> {
        self.module.failures.check(Seamcall::MemPageAug)?;
        let _life = self.live()?;
        self.put_page(gfn, pfn, PageState::Pending)
    }

    /// TDH.MR.EXTEND: measures 256 bytes of a page of the image.
    pub fn mr_extend(&self, gpa: u64) -> Answer<()> {
        self.module.failures.check(Seamcall::MrExtend)?;
        let _life = self.live_only(&[Life::Initialized])?;
        if gpa % CHUNK != 0 {
            return Err(Status::OPERAND_INVALID.of(Operand::Rcx));
        }
        let gfn = Gfn::of_gpa(gpa);
        let entry = self.walk(gfn, Level::SMALL).map(|table| table.entry(gfn));
        let Ok(Entry::Page { pfn, state: PageState::Mapped, blocked_at: None }) = entry else {
            return Err(Status::EPT_ENTRY_NOT_PRESENT.of(Operand::Rcx));
        };
        let mut chunk = [0; CHUNK as usize];
        self.module.host.read_frame(pfn, (gpa % PAGE_SIZE) as usize, &mut chunk);
        lock(&self.measurement).extend(gpa, &chunk);
        Ok(())
    }

    /// TDH.MR.FINALIZE: the image is complete, and the guest can run.
    pub fn mr_finalize(&self) -> Answer<()> {
        self.module.failures.check(Seamcall::MrFinalize)?;
        let mut life = self.life.write().unwrap_or_else(PoisonError::into_inner);
        if *life != Life::Initialized {
            return Err(Status::OP_STATE_INCORRECT);
        }
        if self.vcpus.load(Ordering::Relaxed) == 0 {
            return Err(Status::NO_VCPUS);
        }
        *life = Life::Runnable;
        Ok(())
    }

    /// TDH.MEM.RANGE.BLOCK: no new translation is made from an entry.
    pub fn mem_range_block(&self, gfn: Gfn, level: Level) -> Answer<()> {
        self.module.failures.check(Seamcall::MemRangeBlock)?;
        let _life = self.live()?;
        let parent = self.walk(gfn, level)?;
        parent.with_entry(gfn, |entry| match entry {
            Entry::Free => Err(Status::EPT_ENTRY_STATE_INCORRECT.of(Operand::Rcx)),
            Entry::Page { blocked_at, .. } | Entry::Table { blocked_at, .. } => {
                if blocked_at.is_some() {
                    return Err(Status::GPA_RANGE_ALREADY_BLOCKED.of(Operand::Rcx));
                }
                *blocked_at = Some(lock(&self.epochs).current);
                Ok(())
            }
        })
    }

    /// TDH.MEM.TRACK: vCPUs that enter from now on have flushed what was blocked before. Not for a guest that none can enter yet.
    pub fn mem_track(&self) -> Answer<()> {
        self.module.failures.check(Seamcall::MemTrack)?;
        let _life = self.live_only(&[Life::Runnable])?;
        let mut epochs = lock(&self.epochs);
        if epochs.running[epochs.other()] != 0 {
            return Err(Status::PREVIOUS_TLB_EPOCH_BUSY);
        }
        epochs.current += 1;
        Ok(())
    }

    /// TDH.MEM.PAGE.REMOVE: the page is the host's again, once no vCPU can use it.
    pub fn mem_page_remove(&self, gfn: Gfn, level: Level) -> Answer<Pfn> {
        self.module.failures.check(Seamcall::MemPageRemove)?;
        let life = self.live()?;
        let parent = self.walk(gfn, level)?;
        parent.with_entry(gfn, |entry| {
            let &mut Entry::Page { pfn, blocked_at, .. } = entry else {
                return Err(Status::EPT_ENTRY_STATE_INCORRECT.of(Operand::Rcx));
            };
            self.check_flushed(*life, blocked_at)?;
            self.module.frames.with(pfn, Option::take);
            self.children.fetch_sub(1, Ordering::Relaxed);
            *entry = Entry::Free;
            Ok(pfn)
        })
    }

    /// TDH.MNG.VPFLUSHDONE and TDH.MNG.KEY.FREEID: the guest's key is given up, and nothing of it can be read any more.
    pub fn mng_key_freeid(&self) -> Answer<()> {
        self.module.failures.check(Seamcall::MngKeyFreeid)?;
        let mut life = self.life.write().unwrap_or_else(PoisonError::into_inner);
        if *life == Life::Teardown {
            return Err(Status::LIFECYCLE_STATE_INCORRECT);
        }
        *life = Life::Teardown;
        self.module.give_key_back();
        Ok(())
    }

    /// TDH.PHYMEM.PAGE.RECLAIM of the table below an entry of `level`: its page is the host's again.
    pub fn phymem_page_reclaim(&self, gfn: Gfn, level: Level) -> Answer<SeptPage> {
        self.module.failures.check(Seamcall::PhymemPageReclaim)?;
        if self.life() != Life::Teardown {
            return Err(Status::LIFECYCLE_STATE_INCORRECT);
        }
        let Entry::Table { page, .. } = self.walk(gfn, level)?.entry(gfn) else {
            return Err(Status::PAGE_METADATA_INCORRECT.of(Operand::Rcx));
        };
        if !lock(&self.sept_pages).remove(&page) {
            return Err(Status::PAGE_METADATA_INCORRECT.of(Operand::Rcx));
        }
        self.children.fetch_sub(1, Ordering::Relaxed);
        Ok(page)
    }

    /// TDH.PHYMEM.PAGE.RECLAIM of the guest's own page, the last of it.
    pub fn phymem_page_reclaim_td(&self) -> Answer<()> {
        self.module.failures.check(Seamcall::PhymemPageReclaim)?;
        if self.life() != Life::Teardown {
            return Err(Status::LIFECYCLE_STATE_INCORRECT);
        }
        if self.children() != 0 {
            return Err(Status::TD_ASSOCIATED_PAGES_EXIST);
        }
        Ok(())
    }

    /// TDH.VP.ENTER: a vCPU runs until the answer is dropped.
    ///
    /// Whoever holds it must not take the MMU lock, nor wait for anyone who has: removing a page waits for it.
    pub fn vp_enter(&self) -> Answer<Entered<'_>> {
        self.module.failures.check(Seamcall::VpEnter)?;
        let _life = self.live_only(&[Life::Runnable])?;
        let mut epochs = lock(&self.epochs);
        let epoch = epochs.current;
        epochs.running[(epoch & 1) as usize] += 1;
        Ok(Entered { td: self, epoch })
    }

    /// Whether no vCPU can use what was blocked then. Before the guest can run, there is none.
    fn check_flushed(&self, life: Life, blocked_at: Option<u64>) -> Answer<()> {
        match blocked_at {
            _ if life != Life::Runnable => Ok(()),
            None => Err(Status::GPA_RANGE_NOT_BLOCKED.of(Operand::Rcx)),
            Some(epoch) if lock(&self.epochs).are_flushed_since(epoch) => Ok(()),
            Some(_) => Err(Status::TLB_TRACKING_NOT_DONE.of(Operand::Rcx)),
        }
    }

    fn put_page(&self, gfn: Gfn, pfn: Pfn, state: PageState) -> Answer<()> {
        let table = self.walk(gfn, Level::SMALL)?;
        table.with_entry(gfn, |entry| {
            if !matches!(entry, Entry::Free) {
                return Err(Status::EPT_ENTRY_STATE_INCORRECT.of(Operand::Rcx));
            }
            self.module.take(self, gfn, pfn)?;
            *entry = Entry::Page { pfn, state, blocked_at: None };
            Ok(())
        })
    }

    /// The table with the entry of a level for a frame.
    fn walk(&self, gfn: Gfn, level: Level) -> Answer<Arc<Table>> {
        if gfn.0 & !(self.shared_bit.0 - 1) != 0 || gfn != gfn.rounded_down(level) {
            return Err(Status::OPERAND_INVALID.of(Operand::Rcx));
        }
        Ok(self.root.walk(gfn, level)?)
    }

    fn live(&self) -> Answer<RwLockReadGuard<'_, Life>> {
        self.live_only(&[Life::Initialized, Life::Runnable])
    }

    /// What time it is stays as it is while the answer is held.
    fn live_only(&self, allowed: &[Life]) -> Answer<RwLockReadGuard<'_, Life>> {
        let life = self.life.read().unwrap_or_else(PoisonError::into_inner);
        match *life {
            now if allowed.contains(&now) => Ok(life),
            Life::Teardown => Err(Status::LIFECYCLE_STATE_INCORRECT),
            _ => Err(Status::OP_STATE_INCORRECT),
        }
    }
}

impl Epochs {
    /// The one of the two counters that is not the current epoch's.
    fn other(&self) -> usize {
        1 - (self.current & 1) as usize
    }

    /// Whether every vCPU that runs entered after this epoch.
    fn are_flushed_since(&self, epoch: u64) -> bool {
        epoch + 1 < self.current || (epoch + 1 == self.current && self.running[self.other()] == 0)
    }
}

/// A vCPU of a TDX guest, running.
pub struct Entered<'a> {
    td: &'a Td,
    epoch: u64,
}

impl Entered<'_> {
    /// The guest reads, writes or fetches at a private address.
    pub fn access(&self, gfn: Gfn) -> Access {
        if gfn.0 & !(self.td.shared_bit.0 - 1) != 0 {
            // The secure EPT is for no such address.
            return Access::Violation;
        }
        match self.td.root.translate(gfn) {
            Some((pfn, PageState::Mapped)) => Access::Done(pfn),
            Some((_, PageState::Pending)) if self.td.is_pending_reported => Access::Pending,
            Some((_, PageState::Pending)) => Access::VirtualizationException,
            None => Access::Violation,
        }
    }

    /// The guest takes a page: TDG.MEM.PAGE.ACCEPT.
    pub fn accept(&self, gfn: Gfn, level: Level) -> Accept {
        if gfn != gfn.rounded_down(level) || level > Level::HUGE || gfn.0 & !(self.td.shared_bit.0 - 1) != 0 {
            return Accept::Refused(Status::OPERAND_INVALID.of(Operand::Rcx));
        }
        let Ok(table) = self.td.root.walk(gfn, level) else { return Accept::Violation };
        table.with_entry(gfn, |entry| match entry {
            Entry::Page { pfn, state: state @ PageState::Pending, blocked_at: None } => {
                self.td.module.host.set_page(*pfn, &[0; PAGE_SIZE as usize]);
                *state = PageState::Mapped;
                Accept::Done(*pfn)
            }
            Entry::Page { state: PageState::Mapped, blocked_at: None, .. } => {
                Accept::Refused(Status::PAGE_ALREADY_ACCEPTED)
            }
            Entry::Table { blocked_at: None, .. } => Accept::Refused(Status::PAGE_SIZE_MISMATCH),
            _ => Accept::Violation,
        })
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        lock(&self.td.epochs).running[(self.epoch & 1) as usize] -= 1;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
