//! guest_memfd: files whose pages the guest has and the host cannot reach, or not without being allowed to.
//!
//! As in the kernel there are two parts: the inode has the pages, the file is one VM's view and has the bindings to its slots.
//! Slots hold on to the inode alone, so that closing the file takes the pages from them. What is mapped from the pages is
//! zapped by the VM, which is told before pages go ([`GmemUser`]); nothing here takes the MMU lock, and nothing here is to
//! be called with it held.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use libc::{
    FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_UNSHARE_RANGE, FALLOC_FL_ZERO_RANGE,
};

use crate::errno::{Errno, Result};
use crate::host::{FileFrames, HostMemory, MappableFile};
use crate::memslot::{GmemBinding, Memslot, Rules, VmId};
use crate::mistake::{Mistake, mistaken};
use crate::sync::plain::{Mutex, MutexGuard, RwLock, RwLockWriteGuard};
use crate::sync::sharded::ShardedLock;
use crate::units::{GfnRange, PAGE_SIZE, Pfn, Privacy};

/// `GUEST_MEMFD_FLAG_MMAP`: the file can be mapped.
pub const FLAG_MMAP: u64 = 1 << 0;
/// `GUEST_MEMFD_FLAG_INIT_SHARED`: its pages are shared with the host.
pub const FLAG_INIT_SHARED: u64 = 1 << 1;

/// Of Linux 6.17; earlier kernels refuse it all the same.
const FALLOC_FL_WRITE_ZEROES: i32 = 1 << 7;

/// A lock cannot be had once a thread has panicked with it.
const NO_PANIC: &str = "no thread has panicked";

/// Who has mapped pages of a file for a guest: the VM.
///
/// Called with the file's bindings locked, and on [`GuestMemfd::close`] with the VM's slots_lock: takes the MMU lock, no
/// other. The calls for one slot are balanced; those for several slots of one range nest.
pub trait GmemUser: Send + Sync {
    /// The pages behind `range` of `slot` are about to go. What was mapped from them is gone on return, as far as it was
    /// mapped by accesses of the kind that the file's pages have ([`GmemBinding::privacy`]).
    fn gmem_invalidate_start(&self, slot: &Arc<Memslot>, range: GfnRange);

    /// They have gone.
    fn gmem_invalidate_end(&self, slot: &Arc<Memslot>, range: GfnRange);
}

/// One guest_memfd: a VM's view of its pages.
pub struct GuestMemfd {
    itself: Weak<GuestMemfd>,
    inode: Arc<Inode>,
    vm: VmId,
    user: Weak<dyn GmemUser>,
    /// The lock is the inode's invalidate lock.
    bindings: RwLock<Bindings>,
}

impl GuestMemfd {
    /// `KVM_CREATE_GUEST_MEMFD`: a file with frames of `host`, whose VM is `user`.
    pub fn create(
        rules: &Rules,
        size: u64,
        flags: u64,
        host: &dyn HostMemory,
        user: Weak<dyn GmemUser>,
    ) -> Result<Arc<Self>> {
        check_creation(rules, size, flags)?;
        let inode = Arc::new(Inode::new(size, flags, host.new_file(size / PAGE_SIZE)?));
        Ok(Arc::new_cyclic(|itself| GuestMemfd {
            itself: itself.clone(),
            inode,
            vm: rules.vm,
            user,
            bindings: RwLock::default(),
        }))
    }

    /// The VM that made it.
    pub fn vm(&self) -> VmId {
        self.vm
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.inode.size
    }

    /// `GUEST_MEMFD_FLAG_*`.
    pub fn flags(&self) -> u64 {
        self.inode.flags
    }

    /// Whether it can be mapped (`kvm_gmem_supports_mmap`).
    pub fn can_be_mapped(&self) -> bool {
        self.flags() & FLAG_MMAP != 0
    }

    /// What its pages are: private, unless it was made with INIT_SHARED (`kvm_gmem_is_private_mem`).
    pub fn privacy(&self) -> Privacy {
        if self.flags() & FLAG_INIT_SHARED != 0 { Privacy::Shared } else { Privacy::Private }
    }

    /// The frame of a page, as [`Inode::pfn`].
    pub fn pfn(&self, index: u64) -> Result<Pfn> {
        self.inode.pfn(index)
    }

    /// Whether a page has a frame.
    pub fn is_present(&self, index: u64) -> bool {
        self.inode.is_present(index)
    }

    /// How many pages have a frame.
    pub fn present_pages(&self) -> u64 {
        self.inode.present(0..u64::MAX).len() as u64
    }

    /// What a slot is given that begins at a page.
    pub(crate) fn part(&self, first_index: u64) -> GmemBinding {
        GmemBinding {
            file: self.itself.clone(),
            first_index,
            privacy: self.privacy(),
            serves_all: self.can_be_mapped(),
            inode: self.inode.clone(),
        }
    }

    /// Binds a slot to its part of the file (`kvm_gmem_commit_memory_region`). No page may be in two slots.
    pub fn bind(&self, rules: &Rules, slot: &Arc<Memslot>) -> Result<()> {
        let first = slot.gmem.as_ref().ok_or(Errno::EINVAL)?.first_index;
        let mut bindings = self.invalidate_lock();
        let is_bound = overlapping(&bindings, first..first + slot.pages).next().is_some();
        if is_bound && !mistaken(Mistake::APartOfAFileMayBeBoundTwice) {
            return Err(rules.personality.part_is_bound());
        }
        bindings.insert(first, slot.clone());
        Ok(())
    }

    /// Takes back the binding that begins at a page (`kvm_gmem_unbind`).
    pub fn unbind(&self, first_index: u64) {
        self.invalidate_lock().remove(&first_index);
    }

    /// The slots that are bound to it, by the first pages of their parts.
    pub fn bindings(&self) -> Vec<(u64, Arc<Memslot>)> {
        self.bindings.read().expect(NO_PANIC).iter().map(|(first, slot)| (*first, slot.clone())).collect()
    }

    /// Whether the bindings are those of its slots, and no page is in two.
    pub fn check_bindings(&self) -> std::result::Result<(), String> {
        let bindings = self.bindings();
        if let Some((first, slot)) =
            bindings.iter().find(|(first, slot)| slot.gmem_index(slot.base) != Some(*first))
        {
            return Err(format!("{slot:?} is bound at page {first:#x}"));
        }
        match bindings.windows(2).find(|pair| pair[0].0 + pair[0].1.pages > pair[1].0) {
            Some(pair) => Err(format!("{:?} and {:?} have the same pages of a file", pair[0].1, pair[1].1)),
            None => Ok(()),
        }
    }

    /// `fallocate(2)`: punches a hole, or allocates.
    pub fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Result<()> {
        check_fallocate(mode, offset, len)?;
        let (start, end) = (offset as u64, (offset + len) as u64);
        if mode & FALLOC_FL_PUNCH_HOLE != 0 {
            self.punch_hole(start / PAGE_SIZE..end / PAGE_SIZE);
            return Ok(());
        }
        if end > self.size() {
            return Err(Errno::EINVAL);
        }
        let _bindings = self.bindings.read().expect(NO_PANIC);
        // What was allocated before a signal stays.
        (start / PAGE_SIZE..end / PAGE_SIZE).try_for_each(|index| {
            if self.inode.frames.is_signal_pending() {
                return Err(Errno::EINTR);
            }
            self.inode.page(index, PRESENT).map(drop)
        })
    }

    /// What `mmap(2)` refuses of this file alone. (Before that the kernel refuses PROT_EXEC, with EPERM.)
    pub fn check_mmap(&self, is_shared: bool) -> Result<()> {
        match (self.can_be_mapped(), is_shared) {
            (false, _) => Err(Errno::ENODEV),
            (true, false) => Err(Errno::EINVAL),
            (true, true) => Ok(()),
        }
    }

    /// A fault of the process in a mapping of the file (`kvm_gmem_fault_user_mapping`).
    ///
    /// EFAULT stands for SIGBUS, EHWPOISON for the SIGBUS of failed memory. The caller holds no lock that the file's
    /// [`FileFrames`] take.
    pub fn host_fault(&self, index: u64) -> Result<Pfn> {
        if index >= self.size() / PAGE_SIZE || self.privacy() == Privacy::Private {
            return Err(Errno::EFAULT);
        }
        self.inode.page(index, PRESENT | USED)?.pfn()
    }

    /// Adds one page to a confidential guest's initial image (`__kvm_gmem_populate`): asks whether it is private, then gives
    /// the frame to `fill`, both while no page can go. A `fill` that fails has written nothing into the frame.
    ///
    /// EEXIST where this kernel fills only unused pages, EINVAL for a page that is not private.
    pub fn populate(
        &self,
        rules: &Rules,
        index: u64,
        is_private: impl FnOnce() -> bool,
        fill: impl FnOnce(Pfn) -> Result<()>,
    ) -> Result<()> {
        let _bindings = self.invalidate_lock();
        self.inode.check_open()?;
        let page = self.inode.page(index, PRESENT)?;
        let pfn = page.pfn()?;
        if page.is_used() && !rules.personality.populates_used_pages() {
            return Err(Errno::EEXIST);
        }
        if !is_private() {
            return Err(Errno::EINVAL);
        }
        fill(pfn)?;
        self.inode.page(index, PRESENT | USED).map(drop)
    }

    /// The memory of a page fails (`kvm_gmem_error_folio`). The page stays; nobody gets it any more.
    pub fn poison(&self, index: u64) {
        let bindings = self.invalidate_lock();
        if self.is_present(index) {
            self.invalidating(&bindings, index..index + 1, || self.inode.pages.mark(index, POISONED));
        }
    }

    /// The last descriptor and the last mapping are gone (`kvm_gmem_release`): so are the pages, and what was mapped from
    /// them. The caller holds the VM's slots_lock. Dropping the file does the same.
    pub fn close(&self) {
        if self.inode.is_closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut bindings = self.invalidate_lock();
        self.invalidating(&bindings, 0..u64::MAX, || self.inode.release(0..u64::MAX));
        bindings.clear();
    }

    fn punch_hole(&self, indices: Range<u64>) {
        let bindings = self.invalidate_lock();
        let left = u64::from(mistaken(Mistake::AHoleLeavesItsLastPageMapped));
        self.invalidating(&bindings, indices.start..indices.end - left, || self.inode.release(indices));
    }

    /// For whoever changes bindings, takes pages away, or fills them: meanwhile nobody else does.
    fn invalidate_lock(&self) -> RwLockWriteGuard<'_, Bindings> {
        self.bindings.write().expect(NO_PANIC)
    }

    /// Does something to pages while nothing is mapped from them.
    fn invalidating(&self, bindings: &Bindings, indices: Range<u64>, act: impl FnOnce()) {
        let user = self.user.upgrade();
        let bound: Vec<_> = overlapping(bindings, indices).collect();
        for (slot, range) in &bound {
            if let Some(user) = &user {
                user.gmem_invalidate_start(slot, *range);
            }
        }
        act();
        for (slot, range) in &bound {
            if let Some(user) = &user {
                user.gmem_invalidate_end(slot, *range);
            }
        }
    }
}

impl MappableFile for GuestMemfd {
    fn host_fault(&self, index: u64) -> Result<Pfn> {
        GuestMemfd::host_fault(self, index)
    }

    fn punch(&self, index: u64, pages: u64) -> Result<()> {
        let [offset, len] = [index, pages].map(|pages| (pages * PAGE_SIZE) as i64);
        self.fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, len)
    }
}

impl Drop for GuestMemfd {
    fn drop(&mut self) {
        self.close();
    }
}

/// By the first page of the file.
type Bindings = BTreeMap<u64, Arc<Memslot>>;

/// The slots that have some of these pages, with the frames at which they have them.
fn overlapping(bindings: &Bindings, indices: Range<u64>) -> impl Iterator<Item = (Arc<Memslot>, GfnRange)> {
    let before_end = bindings.range(..indices.end).rev();
    let touched = before_end.take_while(move |(first, slot)| *first + slot.pages > indices.start);
    touched.map(move |(first, slot)| {
        let start = indices.start.max(*first) - first;
        let end = indices.end.min(first + slot.pages) - first;
        (slot.clone(), GfnRange { start: slot.base.plus(start), end: slot.base.plus(end) })
    })
}

fn check_creation(rules: &Rules, size: u64, flags: u64) -> Result<()> {
    if !rules.personality.has_guest_memfd() {
        return Err(Errno::ENOTTY);
    }
    let is_known = flags & !rules.personality.guest_memfd_flags(rules.vm_type) == 0;
    let is_size = size as i64 > 0 && size % PAGE_SIZE == 0;
    if is_known && is_size { Ok(()) } else { Err(Errno::EINVAL) }
}

/// What `vfs_fallocate` and `kvm_gmem_fallocate` refuse whatever the file.
fn check_fallocate(mode: i32, offset: i64, len: i64) -> Result<()> {
    if offset < 0 || len <= 0 {
        return Err(Errno::EINVAL);
    }
    // Known to the VFS alone: it wants KEEP_SIZE with a hole, and none of the modes beside each other.
    let kind = mode & !FALLOC_FL_KEEP_SIZE;
    let keeps_size = mode & FALLOC_FL_KEEP_SIZE != 0;
    let is_known = match kind {
        0 | FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_ZERO_RANGE => true,
        FALLOC_FL_PUNCH_HOLE => keeps_size,
        FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE | FALLOC_FL_WRITE_ZEROES => !keeps_size,
        _ => false,
    };
    if !is_known {
        return Err(Errno::EOPNOTSUPP);
    }
    if offset.checked_add(len).is_none() {
        return Err(Errno::EFBIG);
    }
    if !keeps_size || !matches!(kind, 0 | FALLOC_FL_PUNCH_HOLE) {
        return Err(Errno::EOPNOTSUPP);
    }
    let is_aligned = offset as u64 % PAGE_SIZE == 0 && len as u64 % PAGE_SIZE == 0;
    if is_aligned { Ok(()) } else { Err(Errno::EINVAL) }
}

/// What lies behind a file: its size, flags and pages.
pub struct Inode {
    size: u64,
    flags: u64,
    is_closed: AtomicBool,
    pages: Pages,
    frames: Box<dyn FileFrames>,
}

impl Inode {
    fn new(size: u64, flags: u64, frames: Box<dyn FileFrames>) -> Self {
        Inode { size, flags, is_closed: AtomicBool::new(false), pages: Pages::default(), frames }
    }

    /// Whether a page has a frame.
    pub fn is_present(&self, index: u64) -> bool {
        self.pages.state(index).is_present()
    }

    /// The frame of a page (`kvm_gmem_get_pfn`), allocated and zeroed at the first use.
    ///
    /// EFAULT when the file was closed, EHWPOISON where the memory has failed. That a page lies within the file is checked
    /// when a slot is bound, and not here.
    pub fn pfn(&self, index: u64) -> Result<Pfn> {
        self.check_open()?;
        self.page(index, PRESENT | USED)?.pfn()
    }

    /// Whether the file was closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Those of these pages that have a frame, with the frame. Looking at them is no use of them.
    pub(crate) fn frames(&self, indices: Range<u64>) -> Vec<(u64, Pfn)> {
        let states = self.pages.present(indices).into_iter().map(|index| (index, self.pages.state(index)));
        // One may have gone meanwhile.
        let there = states.filter(|(_, state)| state.is_present());
        there.filter_map(|(index, state)| Some((index, state.pfn().ok()?))).collect()
    }

    fn check_open(&self) -> Result<()> {
        let is_closed = self.is_closed() && !mistaken(Mistake::AClosedFileHasPages);
        if is_closed { Err(Errno::EFAULT) } else { Ok(()) }
    }

    /// A page in a state that has these bits.
    fn page(&self, index: u64, bits: u64) -> Result<PageState> {
        let state = self.pages.state(index);
        if state.0 & bits == bits {
            return Ok(state);
        }
        let _turn = self.pages.turn(index);
        if !self.pages.state(index).is_present() {
            let pfn = self.frames.allocate(index)?;
            self.pages.set(index, PageState(pfn.0 << PFN_SHIFT | PRESENT));
        }
        self.pages.mark(index, bits);
        Ok(self.pages.state(index))
    }

    /// Those of these pages that have a frame, by whomever they were first used.
    fn present(&self, indices: Range<u64>) -> Vec<u64> {
        let mut present = self.pages.present(indices.clone());
        if self.flags & FLAG_INIT_SHARED != 0 {
            let end = indices.end.min(self.size / PAGE_SIZE);
            present.extend(self.frames.touched(indices.start.min(end)..end).into_iter().flatten());
            present.sort_unstable();
            present.dedup();
        }
        present
    }

    fn release(&self, indices: Range<u64>) {
        for index in self.present(indices) {
            let _turn = self.pages.turn(index);
            self.pages.set(index, PageState(0));
            self.frames.release(index);
        }
    }
}

/// The page has a frame.
const PRESENT: u64 = 1 << 0;
/// It was zeroed, or filled with an initial image: the folio is up to date.
const USED: u64 = 1 << 1;
/// Its memory has failed.
const POISONED: u64 = 1 << 2;
/// Where in a state the frame's number begins.
const PFN_SHIFT: u32 = 3;

/// A page's frame, and what has happened to it.
#[derive(Clone, Copy)]
struct PageState(u64);

impl PageState {
    fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    fn is_used(self) -> bool {
        self.0 & USED != 0
    }

    fn pfn(self) -> Result<Pfn> {
        if self.0 & POISONED != 0 { Err(Errno::EHWPOISON) } else { Ok(Pfn(self.0 >> PFN_SHIFT)) }
    }
}

/// The states of a file's pages, which may be very many. Looked up on each fault, so that readers must not meet.
struct Pages {
    chunks: ShardedLock<BTreeMap<u64, Arc<Chunk>>>,
    /// Taken by index to change a state to present or back.
    turns: [Mutex<()>; 16],
}

type Chunk = [AtomicU64; CHUNK as usize];

const CHUNK: u64 = 512;

impl Default for Pages {
    fn default() -> Self {
        Pages { chunks: ShardedLock::default(), turns: [const { Mutex::new(()) }; 16] }
    }
}

impl Pages {
    fn state(&self, index: u64) -> PageState {
        let chunks = self.chunks.read();
        let chunk = chunks.get(&(index / CHUNK));
        PageState(chunk.map_or(0, |chunk| chunk[(index % CHUNK) as usize].load(Ordering::Acquire)))
    }

    fn set(&self, index: u64, state: PageState) {
        self.chunk(index)[(index % CHUNK) as usize].store(state.0, Ordering::Release);
    }

    fn mark(&self, index: u64, bits: u64) {
        self.chunk(index)[(index % CHUNK) as usize].fetch_or(bits, Ordering::AcqRel);
    }

    fn turn(&self, index: u64) -> MutexGuard<'_, ()> {
        self.turns[index as usize % self.turns.len()].lock().expect(NO_PANIC)
    }

    fn chunk(&self, index: u64) -> Arc<Chunk> {
        let key = index / CHUNK;
        if let Some(chunk) = self.chunks.read().get(&key) {
            return chunk.clone();
        }
        let zeroes = || Arc::new([const { AtomicU64::new(0) }; CHUNK as usize]);
        self.chunks.write().entry(key).or_insert_with(zeroes).clone()
    }

    /// Those of these pages that have a frame. No lock is held while the caller looks at them.
    fn present(&self, indices: Range<u64>) -> Vec<u64> {
        let chunks = self.chunks.read();
        let touched = chunks.range(indices.start / CHUNK..indices.end.div_ceil(CHUNK));
        let all = touched.flat_map(|(key, chunk)| (key * CHUNK..).zip(chunk.iter()));
        let present = all.filter(|(_, state)| PageState(state.load(Ordering::Acquire)).is_present());
        present.map(|(index, _)| index).filter(|index| indices.contains(index)).collect()
    }
}

#[cfg(all(test, not(loom)))]
pub(crate) mod testing;
#[cfg(all(test, not(loom)))]
mod tests;
