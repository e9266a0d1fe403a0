//! The model's own descriptors: out of the program's way, and out of its reach.
//!
//! They have high numbers, for programs that count on the lowest being given. A program that closes whatever it does not know leaves
//! them open, as it leaves the kernel alone with a KVM; otherwise the model would go on with whatever gets their numbers next.

use crate::memfd::owned;
use kvmprep_model::errno::Result;
use std::collections::BTreeSet;
use std::ffi::c_uint;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where their numbers begin, if that many are allowed.
const FIRST: u64 = 512;

static NUMBERS: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());
/// None was ever below this: for who has no time to lock.
static LOWEST: AtomicI32 = AtomicI32::new(RawFd::MAX);

/// One of them.
#[derive(Debug)]
pub struct OwnFd(OwnedFd);

impl OwnFd {
    /// The same as a descriptor that was just opened.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: there is room for what is written.
        unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
        let first = FIRST.min(limit.rlim_cur / 2) as RawFd;
        // SAFETY: it is a descriptor of ours.
        let fd = owned(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, first) })?;
        LOWEST.fetch_min(fd.as_raw_fd(), Ordering::Relaxed);
        numbers().insert(fd.as_raw_fd());
        Ok(OwnFd(fd))
    }
}

impl AsRawFd for OwnFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Drop for OwnFd {
    fn drop(&mut self) {
        numbers().remove(&self.0.as_raw_fd());
    }
}

/// Whether a number may be that of one. Takes no lock.
pub fn may_be(fd: RawFd) -> bool {
    fd >= LOWEST.load(Ordering::Relaxed)
}

/// Whether a number is that of one.
pub fn is(fd: RawFd) -> bool {
    numbers().contains(&fd)
}

/// The numbers of a range without these.
pub fn others_in(range: RangeInclusive<c_uint>) -> Vec<RangeInclusive<c_uint>> {
    let own: Vec<_> = numbers().iter().map(|own| *own as c_uint).filter(|own| range.contains(own)).collect();
    let (mut first, last) = range.into_inner();
    let mut others = Vec::new();
    for own in own {
        others.push(first..=own - 1);
        first = own + 1;
    }
    others.push(first..=last);
    others.retain(|part| part.start() <= part.end());
    others
}

fn numbers() -> MutexGuard<'static, BTreeSet<RawFd>> {
    NUMBERS.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn ranges_leave_them_out_as_long_as_they_are_open() {
        let open = || OwnFd::new(File::open("/dev/null").unwrap().into()).unwrap();
        let (one, other) = (open(), open());
        let number = |own: &OwnFd| own.as_raw_fd() as c_uint;
        assert!(may_be(one.as_raw_fd()) && is(one.as_raw_fd()) && !is(2));
        let (low, high) = (number(&one).min(number(&other)), number(&one).max(number(&other)));
        let is_in = |fd: c_uint| others_in(low..=high + 1).iter().any(|part| part.contains(&fd));
        assert!(!is_in(low) && !is_in(high) && is_in(high + 1));
        assert_eq!(others_in(low..=low), []);
        assert_eq!(others_in(3..=5), [3..=5]);
        let raw = one.as_raw_fd();
        drop(one);
        assert!(!is(raw));
    }
}
