//! Exchanges about a confidential guest's initial image, as a kernel on the right hardware would have them.
//!
//! They are written down call by call: what is answered, and what the firmware puts into the source. What was asked is
//! kept, for the test to hold against what should have been. Of images it knows nothing.

use kvmprep::kvm::{Errno, ImagePages, Launched};
use kvmprep::range::{PAGE, Range};
use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

/// A call that puts pages into the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Tdx { vcpu: RawFd, pages: ImagePages, flags: u32 },
    Snp { vm: RawFd, sev: RawFd, pages: ImagePages, page_type: u8 },
}

impl Asked {
    pub fn pages(&self) -> ImagePages {
        let (Asked::Tdx { pages, .. } | Asked::Snp { pages, .. }) = self;
        *pages
    }
}

/// What is answered to one call.
#[derive(Clone, Copy, Debug, Default)]
pub struct Answer {
    /// Pages that are taken before it ends.
    pub taken: u64,
    /// The errno, or 0.
    pub errno: i32,
    /// The firmware's code.
    pub firmware: u64,
    /// The firmware fills the first page that it does not take with this byte, in the source.
    pub correction: Option<u8>,
}

/// What is to come, and what has been.
#[derive(Default)]
pub struct Launches {
    /// Each is used once, but for the last, which is repeated.
    pub answers: Mutex<VecDeque<Answer>>,
    pub asked: Mutex<Vec<Asked>>,
    /// Whether a signal ends each wait.
    pub is_interrupted: AtomicBool,
}

impl Launches {
    pub fn answer(&self, asked: Asked) -> Launched {
        self.asked.lock().unwrap().push(asked);
        let pages = asked.pages();
        let mut answers = self.answers.lock().unwrap();
        let next = if answers.len() > 1 { answers.pop_front() } else { answers.front().copied() };
        let Some(answer) = next else { return Launched::refused(&pages, Errno(libc::ENOTTY)) };
        let left = Range::between(pages.range.start + answer.taken * PAGE, pages.range.end);
        if let (Some(byte), Some(source)) = (answer.correction, left.and_then(|left| pages.part(left).source))
        {
            // SAFETY: the test passes memory of its own, as large as the range, to which nobody has a reference now.
            unsafe { std::ptr::write_bytes(source as *mut u8, byte, PAGE as usize) };
        }
        let errno = Some(answer.errno).filter(|errno| *errno != 0);
        Launched { left, answer: errno.map_or(Ok(()), |errno| Err(Errno(errno))), firmware: answer.firmware }
    }
}
