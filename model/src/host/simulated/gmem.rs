//! Frames of guest_memfds, and their pages in the process's mappings.
//!
//! Whether the process may map a page is the guest_memfd's to say. Here its frames come from and go to, and what is mapped of
//! a frame goes before the frame does. A frame may be released by who keeps faults on the file waiting, so nothing here waits
//! for the lock of the mappings.

use std::sync::{Arc, PoisonError, Weak};

use super::entry::Entry;
use super::process::{GmemMapping, Process};
use super::table::PageCache;
use super::vma::{Backing, Vmas};
use crate::errno::Errno;
use crate::host::FileFrames;
use crate::sync::plain::RwLock;
use crate::units::{Level, Pfn};

/// The frames of one file.
pub(super) struct FileCore {
    cache: PageCache,
    pages: u64,
    /// Taken shared to map a page, exclusively to take one from the file.
    mapping: RwLock<()>,
}

/// The same, as the guest_memfd has it.
pub(super) struct Frames {
    process: Arc<Process>,
    core: Arc<FileCore>,
}

impl Frames {
    pub fn new(process: &Arc<Process>, pages: u64) -> Self {
        let core = Arc::new(FileCore { cache: PageCache::new(pages), pages, mapping: RwLock::new(()) });
        let mut files = process.gmem_files.lock().unwrap();
        files.retain(|file| file.strong_count() > 0);
        files.push(Arc::downgrade(&core));
        drop(files);
        Frames { process: process.clone(), core }
    }
}

impl FileFrames for Frames {
    fn allocate(&self, index: u64) -> Result<Pfn, Errno> {
        if let Some(pfn) = self.core.cache.get(index) {
            return Ok(pfn);
        }
        if index >= self.core.pages {
            return Err(Errno::EINVAL);
        }
        let new = self.process.frames.allocate(Level::SMALL).ok_or(Errno::ENOMEM)?;
        match self.core.cache.insert(index, new) {
            Ok(()) => Ok(new),
            Err(there) => {
                self.process.frames.free(new);
                Ok(there)
            }
        }
    }

    fn release(&self, index: u64) {
        let taken = {
            let _nobody_maps = self.core.mapping.write().unwrap_or_else(PoisonError::into_inner);
            self.core.cache.remove(index)
        };
        if let Some(pfn) = taken {
            self.process.unmap_guest_memfd_page(index, pfn);
            self.process.frames.free(pfn);
        }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        for index in self.core.cache.present(0, self.core.pages) {
            self.release(index);
        }
    }
}

impl Process {
    /// Notes where guest_memfds are mapped, after a change of the mappings.
    pub fn note_guest_memfd_mappings(&self, vmas: &Vmas) {
        let mapped = vmas.iter().filter(|vma| matches!(vma.backing, Backing::GuestMemfd(_)));
        let mapped = mapped.map(|vma| GmemMapping { start: vma.start, end: vma.end, first: vma.first });
        *self.gmem_mappings.write().unwrap() = mapped.collect();
    }

    /// Maps a page by `install`, unless its file has lost the frame meanwhile.
    pub fn map_guest_memfd_page(&self, index: u64, pfn: Pfn, install: impl FnOnce(Pfn)) {
        let files: Vec<Arc<FileCore>> =
            self.gmem_files.lock().unwrap().iter().filter_map(Weak::upgrade).collect();
        let Some(file) = files.iter().find(|file| file.cache.get(index) == Some(pfn)) else { return };
        let _kept = file.mapping.read().unwrap_or_else(PoisonError::into_inner);
        if file.cache.get(index) == Some(pfn) {
            install(pfn);
        }
    }

    fn unmap_guest_memfd_page(&self, index: u64, pfn: Pfn) {
        let mappings = self.gmem_mappings.read().unwrap().clone();
        for mapping in mappings {
            let Some(page) = index.checked_sub(mapping.first).map(|at| mapping.start + at) else { continue };
            let is_mapped = || {
                let found = self.table.find(page);
                found.level == Level::SMALL && found.entry.has_frame() && found.entry.pfn() == pfn
            };
            if page >= mapping.end || !is_mapped() {
                continue;
            }
            self.changing(page, page + 1, || {
                let _entries = self.lock_entries(page, Level::SMALL);
                if let Some(slot) = self.table.slot(page, Level::SMALL).filter(|_| is_mapped()) {
                    slot.set(Entry::EMPTY);
                }
            });
        }
    }
}
