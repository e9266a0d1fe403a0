//! How changes of the mirror become SEAMCALLs.
//!
//! A table is added, a page is added while the image is loaded and augmented afterwards, and a page is taken away in three
//! steps: its entry is blocked, the vCPUs are made to flush, and only then it is removed. It is not told, and must not ask,
//! what access or which call a change is for: some have none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::guest::{State, Tdx};
use super::module::{Answer, Td};
use super::sept::{Entry, SeptPage};
use crate::mmu::{Change, Contents, ExternalError, ExternalTable, Request};
use crate::units::{Gfn, Level, Pfn};

/// The external side of a TDX guest's mirrored tables.
pub struct SecureEpt {
    tdx: Arc<Tdx>,
    /// So many pages were taken for tables of the secure EPT. A mirrored table that could not be put in is made anew, with
    /// another page.
    used_pages: AtomicU64,
}

impl SecureEpt {
    /// The external side for a guest.
    pub fn new(tdx: Arc<Tdx>) -> Arc<Self> {
        Arc::new(SecureEpt { tdx, used_pages: AtomicU64::new(0) })
    }

    fn td(&self) -> Result<&Td, ExternalError> {
        match self.tdx.td() {
            Some(td) => Ok(td),
            None => Err(self.bug()),
        }
    }

    fn add_table(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        let page = SeptPage(self.used_pages.fetch_add(1, Ordering::Relaxed));
        self.put_in(self.td()?.mem_sept_add(gfn, level, page))
    }

    fn map_page(&self, gfn: Gfn, level: Level, pfn: Pfn) -> Result<(), ExternalError> {
        let td = self.td()?;
        if level != Level::SMALL {
            return Err(self.bug());
        }
        if self.tdx.state() == State::Runnable {
            return self.put_in(td.mem_page_aug(gfn, pfn));
        }
        match self.tdx.page_add_source() {
            Some(source) if !self.tdx.is_pre_fault_allowed() => {
                self.put_in(td.mem_page_add(gfn, pfn, source))
            }
            _ => Err(self.bug()),
        }
    }

    fn remove_page(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        let td = self.td()?;
        if !self.tdx.has_key() || level != Level::SMALL {
            return Err(self.bug());
        }
        self.take_away(self.tdx.without_vcpus(|| td.mem_range_block(gfn, level)))?;
        self.track(td)?;
        let pfn = self.take_away(self.tdx.without_vcpus(|| td.mem_page_remove(gfn, level)))?;
        self.take_away(self.tdx.module().phymem_page_wbinvd(pfn))
    }

    /// Makes every vCPU flush. Before the guest is runnable there is none that runs.
    fn track(&self, td: &Td) -> Result<(), ExternalError> {
        if self.tdx.state() == State::Runnable {
            self.take_away(self.tdx.without_vcpus(|| td.mem_track()))?;
            self.tdx.kick_all();
        }
        Ok(())
    }

    /// What is put in may be put in later.
    fn put_in<T>(&self, answer: Answer<T>) -> Result<T, ExternalError> {
        match answer {
            Err(status) if status.is_busy() => Err(ExternalError::Busy),
            answer => self.take_away(answer),
        }
    }

    /// What is taken away must not fail.
    fn take_away<T>(&self, answer: Answer<T>) -> Result<T, ExternalError> {
        self.tdx.ok(answer).map_err(|_| ExternalError::Fatal)
    }

    fn bug(&self) -> ExternalError {
        self.tdx.bug();
        ExternalError::Fatal
    }
}

impl ExternalTable for SecureEpt {
    fn set(&self, change: &Change) -> Result<(), ExternalError> {
        let Change { gfn, level, .. } = *change;
        match change.request() {
            Request::AddTable { .. } => self.add_table(gfn, level),
            Request::MapPage { pfn } => self.map_page(gfn, level, pfn),
            Request::RemovePage { .. } => self.remove_page(gfn, level),
            // Nothing of a mirrored page ever changes but that it goes: the kernel's call takes such a change for a removal,
            // which would be one that the mirror does not know of.
            Request::ChangePage => Err(self.bug()),
        }
    }

    fn free(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        let td = self.td()?;
        // Of the root nothing is heard: its other side is the guest's own. While there is a key, the module refuses.
        self.take_away(td.phymem_page_reclaim(gfn, level.above()))?;
        Ok(())
    }

    fn contents(&self) -> Option<Contents> {
        let td = self.tdx.td().filter(|_| self.tdx.has_key())?;
        let mut contents = Contents::default();
        td.visit(&mut |gfn, level, entry| match entry {
            Entry::Page { pfn, .. } => {
                contents.pages.insert(gfn, *pfn);
            }
            Entry::Table { .. } => {
                contents.tables.insert((gfn, level.below()));
            }
            Entry::Free => {}
        });
        Some(contents)
    }
}
