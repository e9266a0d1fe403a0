//! What only `/proc/self/smaps` says of the process's mappings: which are not a child's, and which have huge pages.
//!
//! Reading it makes the kernel walk all page tables. So it is asked on a fork, and of older kernels what newer ones say
//! otherwise. The file is opened once.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use super::calls;
use super::mappings::Mapping;
use super::pagemap::errno_error;
use crate::own::OwnFd;

/// The file.
pub struct Smaps(OwnFd);

/// Of one mapping.
pub struct HugePages {
    /// Whether there are any.
    pub are_there: bool,
    /// The mapping is of a file.
    pub is_of_file: bool,
}

/// What is said of one mapping.
struct Described {
    mapping: Mapping,
    has_huge: bool,
    /// The process has pages of its own in it.
    has_own: bool,
    /// `MADV_DONTFORK` or `MADV_WIPEONFORK`.
    is_kept_from_children: bool,
}

impl Smaps {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        let file = File::open("/proc/self/smaps")?;
        OwnFd::new(file.into()).map(Smaps).map_err(|errno| errno_error(errno.0))
    }

    /// Where a child gets its own view of the process's pages, and both lose the right to write them. Mappings in which the
    /// process never had any are left alone; those in which it has none any more are taken for such.
    pub fn copied_by_fork(&self) -> Vec<Range<u64>> {
        let is_copied = |described: &Described| {
            !described.mapping.is_shared && described.has_own && !described.is_kept_from_children
        };
        self.read().into_iter().filter(is_copied).map(|described| described.mapping.range).collect()
    }

    /// Of the mapping around an address.
    pub fn huge_pages_around(&self, address: u64) -> Option<HugePages> {
        let described =
            self.read().into_iter().find(|described| described.mapping.range.contains(&address))?;
        Some(HugePages { are_there: described.has_huge, is_of_file: described.mapping.file.1 != 0 })
    }

    fn read(&self) -> Vec<Described> {
        let text = calls::read_text(self.0.as_raw_fd()).unwrap_or_default();
        let mut all: Vec<Described> = Vec::new();
        for line in text.lines() {
            if let Some(mapping) = Mapping::of_line(line) {
                all.push(Described {
                    mapping,
                    has_huge: false,
                    has_own: false,
                    is_kept_from_children: false,
                });
                continue;
            }
            let Some((last, (name, value))) = all.last_mut().zip(line.split_once(':')) else { continue };
            let is_any = value.trim() != "0 kB";
            match name {
                "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => last.has_huge |= is_any,
                "Anonymous" | "Swap" | "Private_Hugetlb" | "Shared_Hugetlb" => last.has_own |= is_any,
                "VmFlags" => {
                    last.is_kept_from_children = value.split(' ').any(|flag| flag == "dc" || flag == "wf");
                }
                _ => {}
            }
        }
        all
    }
}
