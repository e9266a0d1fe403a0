//! What the process's page tables say: `/proc/self/pagemap`.
//!
//! Of each page it is known whether it is there, whether it is a file's, and whether this process alone maps it; which frame it
//! is only to whoever may see that (root). Whether an entry can be written it does not say: that is for others to conclude. The
//! file is opened once, as a program may leave no descriptor free for later. Nothing here changes anything.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::calls;
use super::smaps::Smaps;
use crate::own::OwnFd;
use kvmprep_model::units::{Level, PAGE_SHIFT, PAGE_SIZE};

const PRESENT: u64 = 1 << 63;
const WATCHED: u64 = 1 << 57;
const FILE: u64 = 1 << 61;
const ALONE: u64 = 1 << 56;
const FRAME: u64 = (1 << 55) - 1;

/// A page's entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Entry(u64);

impl Entry {
    /// As the kernel gives it.
    pub const fn of_bits(bits: u64) -> Self {
        Entry(bits)
    }

    /// The same.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Something is mapped.
    pub fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// It is a page of a file, or the huge zero page.
    pub fn is_of_file(self) -> bool {
        self.0 & FILE != 0
    }

    /// No other process maps it, and this one nowhere else.
    pub fn is_alone(self) -> bool {
        self.0 & ALONE != 0
    }

    /// Who writes it waits for somebody who watches (userfaultfd).
    pub fn is_watched(self) -> bool {
        self.0 & WATCHED != 0
    }

    /// The frame, where it is shown.
    pub fn frame(self) -> Option<u64> {
        Some(self.0 & FRAME).filter(|frame| *frame != 0)
    }
}

/// The page tables.
pub struct Pagemap {
    file: OwnFd,
    /// `PAGEMAP_SCAN`, since Linux 6.7.
    has_scan: bool,
    /// What of an entry is looked at.
    kept: u64,
    /// What older kernels say in its place.
    smaps: Smaps,
}

impl Pagemap {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        let file =
            OwnFd::new(File::open("/proc/self/pagemap")?.into()).map_err(|errno| errno_error(errno.0))?;
        let mut pagemap = Pagemap { file, has_scan: true, kept: u64::MAX, smaps: Smaps::open()? };
        let here = &raw const pagemap as u64 >> PAGE_SHIFT;
        pagemap.has_scan = pagemap.scan(here).is_ok();
        Ok(pagemap)
    }

    /// What else is said of the mappings.
    pub fn smaps(&self) -> &Smaps {
        &self.smaps
    }

    /// Does as if the kernel were an older one.
    #[cfg(test)]
    pub fn without_scan(self) -> Self {
        Pagemap { has_scan: false, ..self }
    }

    /// Does as if the process were not allowed to see frames.
    #[cfg(test)]
    pub fn without_frames(self) -> Self {
        Pagemap { kept: !FRAME, ..self }
    }

    /// A page's entry.
    pub fn entry(&self, page: u64) -> Entry {
        let mut entry = [Entry::default()];
        self.entries(page, &mut entry);
        entry[0]
    }

    /// Those of pages one after the other. Where there are no page tables nothing is mapped.
    pub fn entries(&self, first: u64, entries: &mut [Entry]) {
        let mut words = [0; 512];
        for (nth, part) in entries.chunks_mut(words.len()).enumerate() {
            let words = &mut words[..part.len()];
            words.fill(0);
            let from = first + (nth * 512) as u64;
            // What cannot be read lies beyond the process's addresses.
            let _ = calls::read_words(self.file.as_raw_fd(), from * 8, words);
            for (entry, word) in part.iter_mut().zip(words) {
                *entry = Entry(*word & self.kept);
            }
        }
    }

    /// The parts of a range in which there are pages that are no file's, where the kernel says that. What is said is as long as
    /// what is there, and not as the range, which may be most of the address space.
    pub fn parts_with_pages(&self, range: &Range<u64>) -> Option<Vec<Range<u64>>> {
        if self.has_scan { calls::anonymous_parts(self.file.as_raw_fd(), range).ok() } else { None }
    }

    /// Whether the kernel says at once that a page is mapped by an entry of the lowest level, or not at all.
    pub fn is_surely_small(&self, page: u64) -> bool {
        match self.has_scan {
            true => self.scan(page).is_ok_and(|is_huge| !is_huge),
            false => !self.entry(page).is_present(),
        }
    }

    /// The level of the entry that maps a page of a mapping of small pages.
    pub fn level(&self, page: u64) -> Level {
        let is_huge = if self.has_scan { self.scan(page).unwrap_or(false) } else { self.seems_huge(page) };
        if is_huge { Level::HUGE } else { Level::SMALL }
    }

    fn scan(&self, page: u64) -> io::Result<bool> {
        calls::is_mapped_huge(self.file.as_raw_fd(), page * PAGE_SIZE)
    }

    /// Of an older kernel: a frame is taken to be mapped by one entry where all of it is there, in order as far as that is
    /// shown, and its mapping has some that are. The huge zero page is not counted there, but known by being a file's.
    fn seems_huge(&self, page: u64) -> bool {
        let first = page & !(Level::HUGE.pages() - 1);
        let mut entries = [Entry::default(); 512];
        self.entries(first, &mut entries);
        let alike = |entry: &Entry| {
            let one = entries[0];
            entry.is_present() && entry.is_of_file() == one.is_of_file() && entry.is_alone() == one.is_alone()
        };
        if !entries.iter().all(alike) {
            return false;
        }
        let Some(huge) = self.smaps.huge_pages_around(page * PAGE_SIZE) else { return false };
        if entries[0].is_of_file() && !huge.is_of_file {
            return true;
        }
        let is_in_order = entries[0].frame().is_none_or(|frame| {
            let follows = |(nth, entry): (u64, &Entry)| entry.frame() == Some(frame + nth);
            frame % Level::HUGE.pages() == 0 && (0..).zip(&entries).all(follows)
        });
        huge.are_there && is_in_order
    }
}

pub(super) fn errno_error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}
