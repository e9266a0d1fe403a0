//! A host that keeps all of its memory itself: one process with mappings, and the machine's frames.
//!
//! What the VMM does to its memory is done here by the calls of the kernel's names, and KVM sees what it would see: which
//! frame is behind an address, at which level, whether it can be written, and which ranges it is told to forget. Addresses
//! and lengths are bytes as in the kernel's calls; of a page only the first word has content.
//!
//! What is not kept, since it comes by itself and not by a call: swapping, KSM, migration, balancing and khugepaged.
//! Transparent huge pages are of anonymous memory only, and of 2 MiB.

mod advice;
mod entry;
mod fault;
mod file;
mod fork;
mod frames;
mod gmem;
mod hugetlb;
mod process;
mod settings;
mod table;
mod vma;
mod zap;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

pub use advice::Advice;
pub use fault::Refusal;
pub use file::File;
pub use fork::Child;
pub use hugetlb::{HugeFile, PoolState};
pub use settings::{Settings, ThpPolicy};
pub use vma::Protection;

use crate::errno::{Errno, Result};
use crate::host::{FileFrames, FollowError, HostMemory, HostPage, MappableFile, Notifier};
use crate::units::{Hva, Level, PAGE_SHIFT, PAGE_SIZE, Pfn};
use entry::Kind;
use hugetlb::Reserve;
use process::Process;
use table::USER_PAGES;
use vma::{Backing, Lineage, ThpAdvice, Vma, Vmas};

/// Where a mapping goes.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// There, in place of whatever is there: `MAP_FIXED`.
    At(Hva),
    /// Somewhere free, so many bytes after a boundary of such pages.
    Somewhere {
        /// Which boundary.
        boundary: Level,
        /// How far after it.
        offset: u64,
    },
}

/// What is mapped.
#[derive(Clone)]
pub enum Source {
    /// Private anonymous memory.
    Anonymous,
    /// Shared anonymous memory.
    SharedAnonymous,
    /// A memfd or a regular file, from a page on.
    File {
        /// The file.
        file: Arc<File>,
        /// The index of the first page.
        first: u64,
        /// `MAP_SHARED`.
        is_shared: bool,
    },
    /// Anonymous hugetlb.
    HugeAnonymous {
        /// The size of the pages.
        level: Level,
        /// `MAP_SHARED`.
        is_shared: bool,
        /// Not with `MAP_NORESERVE`.
        is_reserved: bool,
    },
    /// A file of hugetlb, from a small page's index on, which a huge page begins at.
    HugeFile {
        /// The file.
        file: Arc<HugeFile>,
        /// The index of the first page, counted in small ones.
        first: u64,
        /// `MAP_SHARED`.
        is_shared: bool,
        /// Not with `MAP_NORESERVE`.
        is_reserved: bool,
    },
    /// A guest_memfd, shared.
    GuestMemfd {
        /// The file.
        file: Arc<dyn MappableFile>,
        /// The index of the first page.
        first: u64,
    },
}

/// What a page's entry in the page table says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapped {
    /// Nothing.
    Nothing,
    /// The zero page.
    Zero,
    /// A page of the process's own.
    Anonymous,
    /// A page of a file.
    File,
}

/// A page's entry in the page table, for a test to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageView {
    /// What is mapped.
    pub mapped: Mapped,
    /// By an entry of which level.
    pub level: Level,
    /// Whether the process may read it without a fault.
    pub readable: bool,
    /// Whether it may write it without a fault.
    pub writable: bool,
    /// The frame.
    pub pfn: Option<Pfn>,
}

/// Where free addresses are looked for: as high as on a real machine, so that numbers overflow where they would there.
const FIRST_FREE: u64 = 0x7f00_0000_0000 >> PAGE_SHIFT;

/// The host.
pub struct SimulatedHost {
    process: Arc<Process>,
}

impl SimulatedHost {
    /// A process without any memory on a machine.
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(SimulatedHost { process: Arc::new(Process::new(settings)) })
    }

    /// `/sys/kernel/mm/transparent_hugepage/enabled`.
    pub fn set_thp(&self, policy: ThpPolicy) {
        self.process.set_thp(policy);
    }

    /// `nr_hugepages`: grows or shrinks a pool as far as can be.
    pub fn set_pool(&self, level: Level, pages: u64) -> Result<()> {
        self.process.pool(level).ok_or(Errno::ENOENT)?.resize(pages);
        Ok(())
    }

    /// How full a pool is.
    pub fn pool(&self, level: Level) -> Result<PoolState> {
        Ok(self.process.pool(level).ok_or(Errno::ENOENT)?.state())
    }

    /// `memfd_create` and `ftruncate` to so many pages.
    pub fn memfd(&self, pages: u64) -> Arc<File> {
        Arc::new(File::sparse(self.process.frames.clone(), pages))
    }

    /// A regular file of so many pages, each of which begins with `word`.
    pub fn regular_file(&self, pages: u64, word: u64) -> Arc<File> {
        Arc::new(File::filled(self.process.frames.clone(), pages, word))
    }

    /// `memfd_create` with `MFD_HUGETLB`, of so many huge pages.
    pub fn huge_memfd(&self, level: Level, pages: u64) -> Result<Arc<HugeFile>> {
        let pool = self.process.pool(level).ok_or(Errno::ENOENT)?;
        Ok(Arc::new(HugeFile::new(pool.clone(), pages)))
    }

    /// `mmap`.
    pub fn map(&self, place: Place, size: u64, protection: Protection, source: Source) -> Result<Hva> {
        let align = match &source {
            Source::HugeAnonymous { level, .. } => *level,
            Source::HugeFile { file, .. } => file.level(),
            _ => Level::SMALL,
        };
        if matches!(&source, Source::HugeFile { first, .. } if first % align.pages() != 0) {
            return Err(Errno::EINVAL);
        }
        let pages = size.div_ceil(PAGE_SIZE).next_multiple_of(align.pages());
        let process = &self.process;
        let mut vmas = process.mappings_for_change();
        let start = placed(&vmas, place, pages, align)?;
        let end = start + pages;
        // As in the kernel, what was there is gone even if the rest fails.
        let gone = process.unmap(&mut vmas, start, end)?;
        let backing = self.backing(source, pages, protection).inspect_err(|error| {
            // Promises that cannot be made are found out when the mapping is there already: it is taken back, and told of.
            if *error == Errno::ENOMEM {
                process.changing(start, end, || ());
            }
        });
        let (backing, first) = backing?;
        let mut vma = Vma {
            start,
            end,
            backing,
            first,
            protection: Protection::NONE,
            is_accounted: false,
            thp: ThpAdvice::Nothing,
            is_kept_from_children: false,
            waits: false,
            anonymous: Lineage::default(),
        };
        vma.set_protection(protection);
        vmas.insert(vma);
        vmas.join(start, end);
        process.note_guest_memfd_mappings(&vmas);
        drop(vmas);
        // The last user of a file may go, which may tell others.
        drop(gone);
        Ok(Hva(start << PAGE_SHIFT))
    }

    fn backing(&self, source: Source, pages: u64, protection: Protection) -> Result<(Backing, u64)> {
        Ok(match source {
            Source::Anonymous => (Backing::Anonymous, 0),
            Source::SharedAnonymous => (Backing::File { file: self.memfd(pages), is_shared: true }, 0),
            Source::File { file, first, is_shared } => (Backing::File { file, is_shared }, first),
            Source::HugeAnonymous { level, is_shared, is_reserved } => {
                let file = self.huge_memfd(level, pages.div_ceil(level.pages()))?;
                huge_backing(file, 0..pages, is_shared, is_reserved)?
            }
            Source::HugeFile { file, first, is_shared, is_reserved } => {
                let backing = huge_backing(file.clone(), first..first + pages, is_shared, is_reserved)?;
                if protection.write {
                    file.grow((first + pages) / file.level().pages());
                }
                backing
            }
            Source::GuestMemfd { file, first } => (Backing::GuestMemfd(file), first),
        })
    }

    /// `munmap`.
    pub fn unmap(&self, start: Hva, size: u64) -> Result<()> {
        let (start, end) = pages_of(start, size)?;
        if start == end {
            return Err(Errno::EINVAL);
        }
        let mut vmas = self.process.mappings_for_change();
        let gone = self.process.unmap(&mut vmas, start, end)?;
        drop(vmas);
        drop(gone);
        Ok(())
    }

    /// `mprotect`.
    pub fn protect(&self, start: Hva, size: u64, protection: Protection) -> Result<()> {
        let (start, end) = pages_of(start, size)?;
        self.process.set_protection(start, end, protection)
    }

    /// `madvise`.
    pub fn advise(&self, start: Hva, size: u64, advice: Advice) -> Result<()> {
        let (start, end) = pages_of(start, size)?;
        if start == end { Ok(()) } else { self.process.advise(start, end, advice) }
    }

    /// `fallocate` with `PUNCH_HOLE`, from a page on, so many pages.
    pub fn punch(&self, file: &Arc<File>, first: u64, pages: u64) -> Result<()> {
        self.process.punch(file, first, pages)
    }

    /// `fallocate` without flags.
    pub fn allocate(&self, file: &Arc<File>, first: u64, pages: u64) -> Result<()> {
        self.process.allocate(file, first, pages)
    }

    /// `fallocate` with `PUNCH_HOLE` of hugetlb, in small pages.
    pub fn punch_huge(&self, file: &Arc<HugeFile>, first: u64, pages: u64) -> Result<()> {
        self.process.punch_huge(file, first, pages)
    }

    /// `fallocate` of hugetlb within the file, in small pages.
    pub fn allocate_huge(&self, file: &Arc<HugeFile>, first: u64, pages: u64) -> Result<()> {
        self.process.allocate_huge(file, first, pages)
    }

    /// `fork`. The child holds what the process had until it is dropped.
    pub fn fork(&self) -> Child {
        Child::of(&self.process)
    }

    /// Registers addresses with userfaultfd for missing pages, which nobody will bring; or takes that back.
    ///
    /// Who waits for such a page is taken to be interrupted by a signal at once.
    pub fn set_waiting(&self, start: Hva, size: u64, waits: bool) -> Result<()> {
        let (start, end) = pages_of(start, size)?;
        self.process.mark(start, end, |vma| vma.waits = waits)
    }

    /// Lets the memory of a page of the process's own fail. Not of a huge page: EBUSY.
    pub fn poison(&self, hva: Hva) -> Result<()> {
        self.process.poison(hva.page())
    }

    /// The process reads the first word of a page.
    pub fn read(&self, hva: Hva) -> std::result::Result<u64, Refusal> {
        self.touch(hva, None)
    }

    /// The process writes the first word of a page.
    pub fn write(&self, hva: Hva, word: u64) -> std::result::Result<(), Refusal> {
        self.touch(hva, Some(word)).map(|_| ())
    }

    fn touch(&self, hva: Hva, word: Option<u64>) -> std::result::Result<u64, Refusal> {
        let process = &self.process;
        let page = hva.page();
        loop {
            let found = process.access(page, word.is_some())?;
            // The page stays until the access is done, as no processor uses what was taken from it.
            let _entries = process.lock_entries(page, found.level);
            if process.table.find(page).entry != found.entry {
                continue;
            }
            let pfn = found.pfn_of(page);
            if let Some(word) = word {
                process.frames.store(pfn, word);
            }
            return Ok(process.frames.load(pfn));
        }
    }

    /// How many page faults came to something, those of `get_user_pages` among them.
    pub fn faults(&self) -> u64 {
        self.process.faults.load(Ordering::Relaxed)
    }

    /// How many frames are in use.
    pub fn frames_in_use(&self) -> u64 {
        self.process.frames.in_use()
    }

    /// A page's entry in the page table.
    pub fn view(&self, hva: Hva) -> PageView {
        let found = self.process.table.find(hva.page());
        let entry = found.entry;
        let mapped = match (entry.has_frame(), entry.kind()) {
            (false, _) => Mapped::Nothing,
            (true, Kind::Zero) => Mapped::Zero,
            (true, Kind::Anonymous) => Mapped::Anonymous,
            (true, Kind::File) => Mapped::File,
        };
        PageView {
            mapped,
            level: if entry.has_frame() { found.level } else { Level::SMALL },
            readable: entry.allows(false),
            writable: entry.allows(true),
            pfn: entry.has_frame().then(|| found.pfn_of(hva.page())),
        }
    }
}

fn huge_backing(
    file: Arc<HugeFile>,
    range: Range<u64>,
    is_shared: bool,
    is_reserved: bool,
) -> Result<(Backing, u64)> {
    let size = file.level().pages();
    let indices = range.start / size..range.end / size;
    let reserve = match (is_reserved, is_shared) {
        (true, true) => {
            file.reserve(indices).then_some(()).ok_or(Errno::ENOMEM)?;
            None
        }
        (true, false) => Some(Arc::new(Reserve::new(&file.pool, indices).ok_or(Errno::ENOMEM)?)),
        (false, _) => None,
    };
    Ok((Backing::Hugetlb { file, is_shared, reserve }, range.start))
}

/// The first page of a new mapping.
fn placed(vmas: &Vmas, place: Place, pages: u64, align: Level) -> Result<u64> {
    if pages == 0 {
        return Err(Errno::EINVAL);
    }
    match place {
        Place::At(hva) if hva.0 % (align.pages() * PAGE_SIZE) != 0 => Err(Errno::EINVAL),
        Place::At(hva) if hva.page().checked_add(pages).is_none_or(|end| end > USER_PAGES) => {
            Err(Errno::ENOMEM)
        }
        Place::At(hva) => Ok(hva.page()),
        Place::Somewhere { boundary, offset } => {
            let boundary = boundary.max(align).pages();
            let offset = (offset >> PAGE_SHIFT) & !(align.pages() - 1);
            somewhere(vmas, pages, boundary, offset)
        }
    }
}

/// A free range, apart from others, so that only who asks for neighbours gets them.
fn somewhere(vmas: &Vmas, pages: u64, boundary: u64, offset: u64) -> Result<u64> {
    let mut start = FIRST_FREE.next_multiple_of(boundary) + offset;
    while start + pages < USER_PAGES {
        match vmas.overlapping(start - 1, start + pages + 1).last() {
            None => return Ok(start),
            Some(vma) => start = (vma.end + 1).next_multiple_of(boundary) + offset,
        }
    }
    Err(Errno::ENOMEM)
}

/// The pages of a range that a call names: its beginning at a page, its length rounded up.
fn pages_of(start: Hva, size: u64) -> Result<(u64, u64)> {
    let pages = size.div_ceil(PAGE_SIZE);
    let end = start.page().checked_add(pages).filter(|end| *end <= USER_PAGES);
    if start.0 % PAGE_SIZE != 0 {
        return Err(Errno::EINVAL);
    }
    Ok((start.page(), end.ok_or(Errno::EINVAL)?))
}

impl HostMemory for SimulatedHost {
    fn follow(&self, hva: Hva, write: bool) -> std::result::Result<HostPage, FollowError> {
        let page = hva.page();
        let found = self.process.access(page, write).map_err(|refusal| match refusal {
            Refusal::Segv | Refusal::Bus | Refusal::OutOfMemory => FollowError::NoMapping,
            Refusal::Poisoned => FollowError::Poisoned,
            Refusal::Waits => FollowError::Interrupted,
        })?;
        Ok(HostPage { pfn: found.pfn_of(page), writable: found.entry.is_writable() })
    }

    fn level(&self, hva: Hva) -> Level {
        let found = self.process.table.find(hva.page());
        if found.entry.is_present() { found.level } else { Level::SMALL }
    }

    fn read_frame(&self, pfn: Pfn, offset: usize, bytes: &mut [u8]) {
        let word = self.process.frames.load(pfn).to_le_bytes();
        for (at, byte) in (offset..).zip(bytes) {
            *byte = word.get(at).copied().unwrap_or(0);
        }
    }

    fn write_frame(&self, pfn: Pfn, offset: usize, bytes: &[u8]) {
        self.process.frames.change(pfn, |word| {
            let mut word = word.to_le_bytes();
            for (byte, new) in word.iter_mut().skip(offset).zip(bytes) {
                *byte = *new;
            }
            u64::from_le_bytes(word)
        });
    }

    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>> {
        Ok(Box::new(gmem::Frames::new(&self.process, pages)))
    }

    fn register(&self, notifier: Weak<dyn Notifier>) {
        self.process.register(notifier);
    }
}

#[cfg(test)]
mod tests;
