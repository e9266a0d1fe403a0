//! A host that is another one, but for some of what it does.
//!
//! Whoever stands between KVM and its host, to watch, to refuse or to keep a table of its own, says only what it does
//! differently; all else goes through to the host below. Nothing is decided here.

use std::sync::Weak;

use super::{FileFrames, FollowError, HostMemory, HostPage, Notifier};
use crate::errno::Errno;
use crate::units::{Hva, Level, Pfn};

/// What is put over a host, which makes it a [`HostMemory`] in turn. The methods are that one's.
#[allow(missing_docs)]
pub trait HostLayer: Send + Sync {
    /// The host that it is put over.
    fn below(&self) -> &dyn HostMemory;

    fn follow(&self, hva: Hva, write: bool) -> Result<HostPage, FollowError> {
        self.below().follow(hva, write)
    }

    fn read_frame(&self, pfn: Pfn, offset: usize, bytes: &mut [u8]) {
        self.below().read_frame(pfn, offset, bytes);
    }

    fn write_frame(&self, pfn: Pfn, offset: usize, bytes: &[u8]) {
        self.below().write_frame(pfn, offset, bytes);
    }

    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>, Errno> {
        self.below().new_file(pages)
    }
}

impl<L: HostLayer> HostMemory for L {
    fn follow(&self, hva: Hva, write: bool) -> Result<HostPage, FollowError> {
        HostLayer::follow(self, hva, write)
    }

    fn level(&self, hva: Hva) -> Level {
        self.below().level(hva)
    }

    fn read_frame(&self, pfn: Pfn, offset: usize, bytes: &mut [u8]) {
        HostLayer::read_frame(self, pfn, offset, bytes);
    }

    fn write_frame(&self, pfn: Pfn, offset: usize, bytes: &[u8]) {
        HostLayer::write_frame(self, pfn, offset, bytes);
    }

    fn settle(&self, start: Hva, end: Hva) {
        self.below().settle(start, end);
    }

    fn is_signal_pending(&self) -> bool {
        self.below().is_signal_pending()
    }

    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>, Errno> {
        HostLayer::new_file(self, pages)
    }

    fn register(&self, notifier: Weak<dyn Notifier>) {
        self.below().register(notifier);
    }
}
