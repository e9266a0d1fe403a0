//! Where the guest of the fake kernel has its memory: in this process and in files.
//!
//! Plain shifts from one to the other, written apart from the library's own, whose mistakes they are to show.

use kvmprep::range::Range;
use std::os::fd::RawFd;

/// Memory of one slot.
#[derive(Clone, Copy, Debug)]
pub struct Ram {
    pub gpa: u64,
    pub size: u64,
    pub hva: u64,
    /// The guest_memfd, and where in it the memory begins.
    pub guest_memfd: (RawFd, u64),
    /// The file that is mapped at the hva, likewise, where there is one.
    pub file: Option<(RawFd, u64)>,
}

/// What of `part` lies in `size` bytes at `from`, as seen from `to`.
fn shifted(part: Range, from: u64, size: u64, to: u64) -> Option<Range> {
    let (start, end) = (part.start.max(from), part.end.min(from + size));
    (start < end).then(|| Range { start: start - from + to, end: end - from + to })
}

impl Ram {
    /// What it has of a part of the guest, in this process.
    pub fn hvas(&self, gpas: Range) -> Option<Range> {
        shifted(gpas, self.gpa, self.size, self.hva)
    }

    /// The same in its guest_memfd.
    pub fn private(&self, gpas: Range) -> Option<Range> {
        shifted(gpas, self.gpa, self.size, self.guest_memfd.1)
    }

    /// What of the guest lies at addresses of this process.
    pub fn gpas(&self, hvas: Range) -> Option<Range> {
        shifted(hvas, self.hva, self.size, self.gpa)
    }

    /// What of the guest's private memory lies in that part of a file.
    pub fn gpas_of_private(&self, fd: RawFd, part: Range) -> Option<Range> {
        (fd == self.guest_memfd.0).then(|| shifted(part, self.guest_memfd.1, self.size, self.gpa))?
    }

    /// What of its memory in this process lies in that part of a file.
    pub fn hvas_of_file(&self, fd: RawFd, part: Range) -> Option<Range> {
        let (file, offset) = self.file?;
        (fd == file).then(|| shifted(part, offset, self.size, self.hva))?
    }

    /// What of addresses of this process lies in its file, and where.
    pub fn in_file(&self, hvas: Range) -> Option<(RawFd, Range)> {
        let (file, offset) = self.file?;
        Some((file, shifted(hvas, self.hva, self.size, offset)?))
    }
}
