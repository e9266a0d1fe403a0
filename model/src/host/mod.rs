//! The host's memory as KVM sees it: frames behind addresses, and word of every change.
//!
//! KVM knows the VMM's memory in two ways only: it asks for the frame behind an address (`get_user_pages`), and it is told
//! before and after entries of the process's page tables change (MMU notifiers). The traits here are these two ways, and the
//! third by which a guest_memfd gets its frames. Nothing here knows of a guest, and nobody outside may rely on how a host
//! keeps its memory: [`simulated`] keeps all of it itself, another host may be the process in which the model runs.

use std::ops::Range;
use std::sync::Weak;

use crate::errno::Errno;
use crate::units::{Hva, Level, PAGE_SIZE, Pfn};

mod layer;
pub mod simulated;

pub use layer::HostLayer;

/// What `get_user_pages` found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostPage {
    /// The frame.
    pub pfn: Pfn,
    /// The host's own entry lets the process write, now.
    pub writable: bool,
}

/// What a page holds.
pub type Page = [u8; PAGE_SIZE as usize];

/// Why `get_user_pages` found nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FollowError {
    /// Nothing is mapped there, the mapping does not allow the access, or no page is to be had (the file has ended, a pool
    /// of huge pages is empty): what the kernel answers with EFAULT.
    NoMapping,
    /// A signal came while the page was waited for.
    Interrupted,
    /// The page's memory has failed.
    Poisoned,
}

/// The memory of the process that the VMM is.
pub trait HostMemory: Send + Sync {
    /// `get_user_pages` of one page, for writing or for reading.
    ///
    /// Faults it in, and breaks copy-on-write when writing. That calls the notifiers: the caller holds no MMU lock. The
    /// answer after a read also says whether the page could be written at once.
    fn follow(&self, hva: Hva, write: bool) -> Result<HostPage, FollowError>;

    /// The level of the leaf entry in the host's own page table; that of a small page where there is none.
    ///
    /// A huge page that is mapped by small entries is small here. May be called under the MMU lock: takes no lock that is
    /// held while a notifier is called.
    fn level(&self, hva: Hva) -> Level;

    /// Reads bytes of a frame, from an offset on. What a host does not keep is zero.
    fn read_frame(&self, pfn: Pfn, offset: usize, bytes: &mut [u8]);

    /// Writes bytes of a frame, from an offset on.
    fn write_frame(&self, pfn: Pfn, offset: usize, bytes: &[u8]);

    /// The first word of a frame.
    fn load(&self, pfn: Pfn) -> u64 {
        let mut word = [0; 8];
        self.read_frame(pfn, 0, &mut word);
        u64::from_le_bytes(word)
    }

    /// Writes the first word of a frame.
    fn store(&self, pfn: Pfn, word: u64) {
        self.write_frame(pfn, 0, &word.to_le_bytes());
    }

    /// All of a frame.
    fn page(&self, pfn: Pfn) -> Page {
        let mut page = [0; PAGE_SIZE as usize];
        self.read_frame(pfn, 0, &mut page);
        page
    }

    /// Writes all of a frame.
    fn set_page(&self, pfn: Pfn, page: &Page) {
        self.write_frame(pfn, 0, page);
    }

    /// Calls the notifiers for what has changed between two addresses since [`follow`](Self::follow) was asked, of which
    /// KVM would know at once. For hosts who come to know of it only when they look. The caller holds no MMU lock.
    fn settle(&self, _start: Hva, _end: Hva) {}

    /// Whether the calling thread has a signal to handle, as far as the host knows.
    fn is_signal_pending(&self) -> bool {
        false
    }

    /// Frames for a new guest_memfd of so many pages.
    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>, Errno>;

    /// Whom to tell before and after entries of the host's page tables change. Forgotten when it has gone.
    fn register(&self, notifier: Weak<dyn Notifier>);
}

/// The frames of one guest_memfd. All are released when it is dropped.
pub trait FileFrames: Send + Sync {
    /// The frame of a page: a zeroed one at the first call, afterwards the same one.
    fn allocate(&self, index: u64) -> Result<Pfn, Errno>;

    /// Whether the calling thread has a signal to handle, as far as the host knows.
    fn is_signal_pending(&self) -> bool {
        false
    }

    /// Those of these pages that the process has by its own mapping of the file, as far as nobody was asked for them
    /// ([`MappableFile::host_fault`]): for hosts whose processes fault without asking.
    fn touched(&self, _indices: Range<u64>) -> Vec<Range<u64>> {
        Vec::new()
    }

    /// Gives a frame back, if there is one. Where the process has mapped it, that mapping goes first and notifiers are
    /// called: the caller holds no MMU lock.
    fn release(&self, index: u64);
}

/// A guest_memfd that the process can map.
pub trait MappableFile: Send + Sync {
    /// What the process gets that touches page `index` of its mapping: the frame, or SIGBUS for whatever error.
    fn host_fault(&self, index: u64) -> Result<Pfn, Errno>;

    /// `MADV_REMOVE` through a mapping: `fallocate` with PUNCH_HOLE of so many pages.
    fn punch(&self, index: u64, pages: u64) -> Result<(), Errno>;
}

/// Who keeps mappings made from the host's: KVM.
///
/// Between the two calls nothing that [`HostMemory::follow`] said before may be relied on, and what it says meanwhile may
/// not be kept.
pub trait Notifier: Send + Sync {
    /// Entries for addresses from `start` up to `end` are about to change. What was made from them is gone on return.
    fn invalidate_start(&self, start: Hva, end: Hva);

    /// They have changed.
    fn invalidate_end(&self, start: Hva, end: Hva);
}
