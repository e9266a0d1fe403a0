//! The frames of guest_memfds: pages of memfds, which the program may have mapped as well.
//!
//! Their numbers begin where those of the process's own pages have ended, and are given out by the frame of 2 MiB of a file. The
//! model reads and writes the file and does not map it, so that the program's memory is no larger for it. What the program
//! has mapped of a page goes before the page does.

use std::cell::Cell;
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use super::{ProcessHost, calls};
use crate::memfd::Memfd;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::host::FileFrames;
use kvmprep_model::units::{PAGE_SIZE, Pfn};

/// The first frame. Those below are pages of the process's addresses.
const FIRST: u64 = 1 << 39;
const BLOCK: u64 = 512;

/// A file, and a page or byte of it.
type Place = (Arc<Memfd>, u64);

/// Whose frames are whose.
#[derive(Default)]
pub struct Blocks {
    /// The file of each block of frames, and the first page that it is of the file. None when the file has gone.
    used: RwLock<Vec<Option<Place>>>,
    free: Mutex<Vec<u64>>,
}

impl Blocks {
    fn take(&self, file: &Arc<Memfd>, first_page: u64) -> u64 {
        let block = Some((file.clone(), first_page));
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut used = self.used.write().unwrap_or_else(PoisonError::into_inner);
        match free {
            Some(number) => {
                used[number as usize] = block;
                number
            }
            None => {
                used.push(block);
                used.len() as u64 - 1
            }
        }
    }

    /// The smallest number is taken first again.
    fn give_back(&self, mut numbers: Vec<u64>) {
        numbers.sort_unstable_by_key(|number| std::cmp::Reverse(*number));
        for number in numbers {
            self.used.write().unwrap_or_else(PoisonError::into_inner)[number as usize] = None;
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(number);
        }
    }

    /// The file that a frame is of, and where in it. None for a frame that is of no file (any more).
    pub fn place(&self, pfn: Pfn) -> Option<Place> {
        let nth = pfn.0.checked_sub(FIRST)?;
        let used = self.used.read().unwrap_or_else(PoisonError::into_inner);
        let (file, first_page) = used.get((nth / BLOCK) as usize)?.as_ref()?;
        Some((file.clone(), (first_page + nth % BLOCK) * PAGE_SIZE))
    }
}

/// Whether a frame is one of a guest_memfd.
pub fn is_of_file(pfn: Pfn) -> bool {
    pfn.0 >= FIRST
}

/// The frames of one file.
pub struct Frames {
    host: Weak<ProcessHost>,
    file: Arc<Memfd>,
    /// By the nth 2 MiB of the file.
    blocks: RwLock<HashMap<u64, u64>>,
    /// Whether the program has mapped it, and how many changes of mappings had been seen then.
    is_mapped: Mutex<Option<(u64, bool)>>,
}

impl Frames {
    /// A new file of so many pages.
    pub fn new(host: &Weak<ProcessHost>, pages: u64) -> Result<Self> {
        let file = Arc::new(Memfd::new(c"[kvm-gmem]", pages * PAGE_SIZE)?);
        Ok(Frames { host: host.clone(), file, blocks: RwLock::default(), is_mapped: Mutex::default() })
    }

    /// The model's descriptor of the file.
    pub fn fd(&self) -> RawFd {
        self.file.fd()
    }

    fn block(&self, host: &ProcessHost, key: u64) -> u64 {
        if let Some(number) = self.blocks.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return *number;
        }
        let mut blocks = self.blocks.write().unwrap_or_else(PoisonError::into_inner);
        *blocks.entry(key).or_insert_with(|| host.blocks.take(&self.file, key * BLOCK))
    }

    fn is_mapped(&self, host: &ProcessHost) -> bool {
        let changes = host.mappings.changes();
        let mut known = self.is_mapped.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, is_mapped)) = known.filter(|(then, _)| *then == changes) {
            return is_mapped;
        }
        let is_mapped = !host.mapped_parts(self.fd(), 0..u64::MAX).is_empty();
        *known = Some((changes, is_mapped));
        is_mapped
    }
}

impl FileFrames for Frames {
    fn allocate(&self, index: u64) -> Result<Pfn> {
        let host = self.host.upgrade().ok_or(Errno::ENOMEM)?;
        Ok(Pfn(FIRST + self.block(&host, index / BLOCK) * BLOCK + index % BLOCK))
    }

    fn is_signal_pending(&self) -> bool {
        super::signals::is_pending()
    }

    fn touched(&self, indices: Range<u64>) -> Vec<Range<u64>> {
        let bytes = indices.start * PAGE_SIZE..indices.end * PAGE_SIZE;
        let parts = calls::parts_of_file(self.fd(), &bytes).into_iter();
        parts.map(|part| part.start / PAGE_SIZE..part.end.div_ceil(PAGE_SIZE)).collect()
    }

    fn release(&self, index: u64) {
        let Some(host) = self.host.upgrade() else { return };
        let punch = || {
            // A hole is always to be had in a file of the model's own.
            let _ = calls::punch(self.fd(), index * PAGE_SIZE, PAGE_SIZE);
        };
        if self.is_mapped(&host) {
            host.file_changing(self.fd(), index * PAGE_SIZE, PAGE_SIZE, punch);
        } else {
            punch();
        }
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        if let Some(host) = self.host.upgrade() {
            let blocks = self.blocks.get_mut().unwrap_or_else(PoisonError::into_inner);
            host.blocks.give_back(blocks.drain().map(|(_, number)| number).collect());
        }
    }
}

thread_local! {
    static NEWEST: Cell<Option<RawFd>> = const { Cell::new(None) };
}

/// Remembers the file that the thread has made last.
pub fn note_newest(fd: RawFd) {
    NEWEST.set(Some(fd));
}

/// That file's descriptor, once.
pub fn take_newest() -> Option<RawFd> {
    NEWEST.take()
}
