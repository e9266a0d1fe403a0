//! The initial image: how pages of it come from the VMM's memory into private memory.
//!
//! This is `kvm_gmem_populate`, with what it asks of the virtual machine as a trait. What is done with each page, which is
//! where TDX and SNP part, is the caller's. Nothing is undone here: pages that went in stay in when a later one does not.

use crate::errno::{Errno, Result};
use crate::host::{FollowError, HostMemory};
use crate::units::{Gfn, Hva, Pfn};

/// A structure in the VMM's memory that a call names by its address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct User<T> {
    /// What stands there.
    pub content: T,
    /// It can be read.
    pub is_readable: bool,
    /// It can be written.
    pub is_writable: bool,
}

impl<T> User<T> {
    /// Memory as any other.
    pub const fn new(content: T) -> Self {
        User { content, is_readable: true, is_writable: true }
    }

    /// Memory that cannot be written.
    pub const fn read_only(content: T) -> Self {
        User { content, is_readable: true, is_writable: false }
    }

    /// No memory.
    pub const fn nowhere(content: T) -> Self {
        User { content, is_readable: false, is_writable: false }
    }
}

impl<T: Clone> User<T> {
    /// `copy_from_user`.
    pub fn copy_in(&self) -> Result<T> {
        if self.is_readable { Ok(self.content.clone()) } else { Err(Errno::EFAULT) }
    }

    /// `copy_to_user`.
    pub fn copy_out(&mut self, content: T) -> Result<()> {
        if !self.is_writable {
            return Err(Errno::EFAULT);
        }
        self.content = content;
        Ok(())
    }
}

/// A lock that is held until this is dropped.
pub trait Held {}
impl<T> Held for T {}

/// What loading an image asks of the virtual machine.
pub trait ImageTarget {
    /// The VMM's memory.
    fn host(&self) -> &dyn HostMemory;

    /// A signal is pending for the calling thread.
    fn is_signal_pending(&self) -> bool;

    /// How many pages the slot has from this frame on. EINVAL where no slot is, or one without a guest_memfd; EFAULT where
    /// the file has been closed.
    fn backed_pages(&self, gfn: Gfn) -> Result<u64>;

    /// Fills the page of a guest frame, if the frame is private
    /// ([`GuestMemfd::populate`](crate::gmem::GuestMemfd::populate)). A `fill` that fails has written nothing.
    fn fill_page(&self, gfn: Gfn, fill: &mut dyn FnMut(Pfn) -> Result<()>) -> Result<()>;
}

/// Where an image's pages come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Source {
    /// The first page.
    pub hva: Hva,
    /// What is read may have to be written back.
    pub may_be_written: bool,
}

/// `kvm_gmem_populate`: gives each page to `place`, with the frame of its source, until one fails or the slot ends.
///
/// The slots_lock is held. Answers how many pages went in, and an error only if none did.
pub fn populate<T: ImageTarget + ?Sized>(
    target: &T,
    start: Gfn,
    source: Option<Source>,
    pages: u64,
    place: &mut dyn FnMut(Gfn, Pfn, Option<Pfn>) -> Result<()>,
) -> Result<u64> {
    let pages = pages.min(target.backed_pages(start)?);
    for done in 0..pages {
        if let Err(error) =
            populate_page(target, start.plus(done), source.map(|source| source.page(done)), place)
        {
            return if done == 0 { Err(error) } else { Ok(done) };
        }
    }
    Ok(pages)
}

fn populate_page<T: ImageTarget + ?Sized>(
    target: &T,
    gfn: Gfn,
    source: Option<Source>,
    place: &mut dyn FnMut(Gfn, Pfn, Option<Pfn>) -> Result<()>,
) -> Result<()> {
    if target.is_signal_pending() {
        return Err(Errno::EINTR);
    }
    let source = source.map(|source| source.frame(target.host())).transpose()?;
    target.fill_page(gfn, &mut |pfn| place(gfn, pfn, source))
}

impl Source {
    fn page(self, index: u64) -> Self {
        Source { hva: self.hva.plus_pages(index), ..self }
    }

    fn frame(self, host: &dyn HostMemory) -> Result<Pfn> {
        match host.follow(self.hva, self.may_be_written) {
            Ok(page) => Ok(page.pfn),
            // Memory that has failed is told as such only to who asks for that, and `kvm_gmem_populate` does not.
            Err(FollowError::NoMapping | FollowError::Poisoned) => Err(Errno::EFAULT),
            Err(FollowError::Interrupted) => Err(Errno::EINTR),
        }
    }
}
