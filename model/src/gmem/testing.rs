//! A host that has frames for guest_memfds and nothing else, and a VM that writes down what it is told.
//!
//! For tests of slots and files. Frames are numbered as they are handed out, so that two uses of one page can be told apart.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::thread;

use super::{FLAG_MMAP, GmemUser, GuestMemfd};
use crate::errno::{Errno, Result};
use crate::host::{FileFrames, FollowError, HostMemory, HostPage, Notifier};
use crate::memslot::{Memslot, Rules, VmId};
use crate::personality::{Personality, Version, VmType};
use crate::units::{Gfn, GfnRange, Hva, Level, Pfn};

/// The frames that are handed out, by page, and how many ever were.
#[derive(Default)]
pub(crate) struct Frames {
    pub(crate) live: HashMap<u64, Pfn>,
    count: u64,
    /// No more than so many live at once.
    pub(crate) limit: Option<usize>,
}

#[derive(Clone, Default)]
pub(crate) struct Host(pub(crate) Arc<Mutex<Frames>>);

impl FileFrames for Host {
    fn allocate(&self, index: u64) -> Result<Pfn> {
        // Lets others come in between, as a host that must find memory does.
        thread::yield_now();
        let mut frames = self.0.lock().unwrap();
        assert!(!frames.live.contains_key(&index), "page {index:#x} was allocated twice");
        if frames.limit.is_some_and(|limit| frames.live.len() >= limit) {
            return Err(Errno::ENOMEM);
        }
        frames.count += 1;
        let pfn = Pfn(frames.count);
        frames.live.insert(index, pfn);
        Ok(pfn)
    }

    fn release(&self, index: u64) {
        thread::yield_now();
        let had = self.0.lock().unwrap().live.remove(&index);
        assert!(had.is_some(), "page {index:#x} was released and had no frame");
    }
}

impl HostMemory for Host {
    fn follow(&self, _: Hva, _: bool) -> std::result::Result<HostPage, FollowError> {
        Err(FollowError::NoMapping)
    }

    fn level(&self, _: Hva) -> Level {
        Level::SMALL
    }

    fn read_frame(&self, _: Pfn, _: usize, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn write_frame(&self, _: Pfn, _: usize, _: &[u8]) {}

    fn new_file(&self, _: u64) -> Result<Box<dyn FileFrames>> {
        Ok(Box::new(self.clone()))
    }

    fn register(&self, _: Weak<dyn Notifier>) {}
}

/// What a VM is told, in order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Told {
    Start(u16, GfnRange),
    End(u16, GfnRange),
}

#[derive(Default)]
pub(crate) struct Listener(pub(crate) Mutex<Vec<Told>>);

impl Listener {
    pub(crate) fn take(&self) -> Vec<Told> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl GmemUser for Listener {
    fn gmem_invalidate_start(&self, slot: &Arc<Memslot>, range: GfnRange) {
        self.0.lock().unwrap().push(Told::Start(slot.id, range));
    }

    fn gmem_invalidate_end(&self, slot: &Arc<Memslot>, range: GfnRange) {
        self.0.lock().unwrap().push(Told::End(slot.id, range));
    }
}

pub(crate) fn rules(version: Version, vm_type: VmType) -> Rules {
    Rules { personality: Personality::with_everything(version), vm_type, shared_bit: Gfn(0), vm: VmId::new() }
}

/// A file of a VM, with those whom it gets its frames from and tells of changes.
pub(crate) struct Fixture {
    pub(crate) rules: Rules,
    pub(crate) host: Host,
    pub(crate) listener: Arc<Listener>,
    pub(crate) file: Arc<GuestMemfd>,
}

impl Fixture {
    pub(crate) fn new(version: Version, vm_type: VmType, size: u64, flags: u64) -> Self {
        let rules = rules(version, vm_type);
        let (host, listener) = (Host::default(), Arc::new(Listener::default()));
        let user = Arc::downgrade(&listener);
        let file =
            GuestMemfd::create(&rules, size, flags, &host, user).expect("the file is as the kernel wants it");
        Fixture { rules, host, listener, file }
    }

    /// Of the newest kernel, and mappable where `flags` say so.
    pub(crate) fn newest(size: u64, flags: u64) -> Self {
        let vm_type = if flags & FLAG_MMAP == 0 { VmType::SwProtected } else { VmType::Default };
        Self::new(Version(7, 3), vm_type, size, flags)
    }
}

impl GuestMemfd {
    /// Binds a slot from a page on, whatever is bound there.
    pub(crate) fn bind_regardless(&self, first_index: u64, slot: &Arc<Memslot>) {
        self.invalidate_lock().insert(first_index, slot.clone());
    }
}
