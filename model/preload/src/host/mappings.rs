//! What the process has mapped where: `/proc/self/maps`.
//!
//! One mapping is asked for by its address (Linux 6.11), without which the whole list is read, and kept as long as no call that
//! changes mappings is seen. The file is opened once. Nothing here knows what is mapped of the pages.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::calls;
use super::pagemap::errno_error;
use crate::own::OwnFd;
use kvmprep_model::units::{Level, PAGE_SIZE};

/// A device, by major and minor number.
type Device = (u32, u32);

/// A mapping.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// Its addresses.
    pub range: Range<u64>,
    /// `PROT_READ`.
    pub is_readable: bool,
    /// `PROT_WRITE`.
    pub is_writable: bool,
    /// `MAP_SHARED`.
    pub is_shared: bool,
    /// Where in the file it begins.
    pub offset: u64,
    /// The file's device and number; of no file if that is 0.
    pub file: (Device, u64),
    /// The size of its pages, if that is known.
    page_size: Option<u64>,
}

impl Mapping {
    /// Of a line of `/proc/self/maps`.
    pub fn of_line(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
        let (start, end) = fields.next()?.split_once('-')?;
        let range = hexadecimal(start)?..hexadecimal(end)?;
        let rights = fields.next()?.as_bytes();
        let offset = hexadecimal(fields.next()?)?;
        let (major, minor) = fields.next()?.split_once(':')?;
        let device = (hexadecimal(major)? as u32, hexadecimal(minor)? as u32);
        let inode = fields.next()?.parse().ok()?;
        let has = |nth: usize, right| rights.get(nth) == Some(&right);
        Some(Mapping {
            range,
            is_readable: has(0, b'r'),
            is_writable: has(1, b'w'),
            is_shared: has(3, b's'),
            offset,
            file: (device, inode),
            page_size: None,
        })
    }

    /// The addresses at which it has these bytes of its file.
    pub fn addresses_of(&self, bytes: &Range<u64>) -> Option<Range<u64>> {
        let size = self.range.end - self.range.start;
        let from = bytes.start.saturating_sub(self.offset).min(size);
        let to = bytes.end.saturating_sub(self.offset).min(size);
        (from < to).then(|| self.range.start + from..self.range.start + to)
    }
}

/// All of them.
pub struct Mappings {
    file: OwnFd,
    /// `PROCMAP_QUERY`.
    has_query: bool,
    /// Counts the changes that were seen.
    changes: AtomicU64,
    /// The list, and how many changes there had been.
    kept: Mutex<Option<(u64, Vec<Mapping>)>>,
    /// Of files that are memory and nothing else, the devices, with the size of their pages where those are huge.
    memory: Vec<(Device, u64)>,
}

impl Mappings {
    /// Opens the file.
    pub fn open() -> io::Result<Self> {
        let file = OwnFd::new(File::open("/proc/self/maps")?.into()).map_err(|errno| errno_error(errno.0))?;
        let has_query = calls::query_mapping(file.as_raw_fd(), &raw const file as u64).is_ok();
        let memory = calls::devices_of_memfds().into_iter().chain(mounted_memory()).collect();
        Ok(Mappings { file, has_query, changes: AtomicU64::new(0), kept: Mutex::default(), memory })
    }

    /// Does as if the kernel were an older one.
    #[cfg(test)]
    pub fn without_query(self) -> Self {
        Mappings { has_query: false, ..self }
    }

    /// A call was seen that changes mappings.
    pub fn changed(&self) {
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// How many such calls were seen.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The one around an address.
    pub fn at(&self, address: u64) -> Option<Mapping> {
        if !self.has_query {
            return self.listed(address);
        }
        let found = calls::query_mapping(self.file.as_raw_fd(), address).ok()?;
        Some(Mapping {
            range: found.vma_start..found.vma_end,
            is_readable: found.vma_flags & 1 != 0,
            is_writable: found.vma_flags & 2 != 0,
            is_shared: found.vma_flags & 8 != 0,
            offset: found.vma_offset,
            file: ((found.dev_major, found.dev_minor), found.inode),
            page_size: Some(found.vma_page_size),
        })
    }

    fn listed(&self, address: u64) -> Option<Mapping> {
        let find = |all: &[Mapping]| all.iter().find(|mapping| mapping.range.contains(&address)).cloned();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let changes = self.changes();
        if let Some((_, all)) = kept.as_ref().filter(|(then, _)| *then == changes) {
            if let Some(mapping) = find(all) {
                return Some(mapping);
            }
        }
        let all = self.all();
        let found = find(&all);
        *kept = Some((changes, all));
        found
    }

    /// All, as they are now.
    pub fn all(&self) -> Vec<Mapping> {
        let text = calls::read_text(self.file.as_raw_fd()).unwrap_or_default();
        text.lines().filter_map(Mapping::of_line).collect()
    }

    /// The level of a mapping's pages: above that of small ones for hugetlb.
    pub fn level(&self, mapping: &Mapping) -> Level {
        let by_device =
            || self.memory.iter().find(|(device, _)| *device == mapping.file.0).map(|(_, size)| *size);
        let size = mapping.page_size.or_else(by_device).unwrap_or(PAGE_SIZE);
        let is_of_size = |level: &Level| level.pages() * PAGE_SIZE == size;
        Level::OF_PAGES.into_iter().find(is_of_size).unwrap_or(Level::SMALL)
    }

    /// Whether what is mapped is memory and nothing else: nobody need know when it is first written.
    pub fn is_memory(&self, mapping: &Mapping) -> bool {
        let (device, inode) = mapping.file;
        inode == 0 || self.memory.iter().any(|(memory, _)| *memory == device)
    }
}

/// The file systems that are memory.
fn mounted_memory() -> Vec<(Device, u64)> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let device_of = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let kind = after.next()?;
        let options = after.nth(1).unwrap_or_default();
        let size = match kind {
            "tmpfs" | "ramfs" => PAGE_SIZE,
            "hugetlbfs" => page_size_of(options),
            _ => return None,
        };
        let (major, minor) = before.split(' ').nth(2)?.split_once(':')?;
        Some(((major.parse().ok()?, minor.parse().ok()?), size))
    };
    text.lines().filter_map(device_of).collect()
}

fn page_size_of(options: &str) -> u64 {
    let size = options.split(',').find_map(|option| option.strip_prefix("pagesize="));
    if size.is_some_and(|size| size.starts_with('1')) { 1 << 30 } else { 2 << 20 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = "7f0000000000-7f0000200000 rw-s 00001000 00:01 84272   /memfd:x (deleted)";
        let mapping = Mapping::of_line(line).unwrap();
        assert_eq!(mapping.range, 0x7f00_0000_0000..0x7f00_0020_0000);
        assert_eq!((mapping.is_readable, mapping.is_writable, mapping.is_shared), (true, true, true));
        assert_eq!((mapping.offset, mapping.file), (0x1000, ((0, 1), 84272)));
        assert_eq!(Mapping::of_line("Size:               2048 kB"), None);
    }

    #[test]
    fn the_bytes_of_a_file_are_found_at_their_addresses() {
        let line = "10000-14000 rw-s 00002000 00:01 7 /memfd:x (deleted)";
        let mapping = Mapping::of_line(line).unwrap();
        assert_eq!(mapping.addresses_of(&(0..0x3000)), Some(0x10000..0x11000));
        assert_eq!(mapping.addresses_of(&(0x3000..u64::MAX)), Some(0x11000..0x14000));
        assert_eq!(mapping.addresses_of(&(0..0x2000)), None);
        assert_eq!(mapping.addresses_of(&(0x6000..0x7000)), None);
    }

    #[test]
    fn both_ways_of_asking_say_the_same() {
        let asked = Mappings::open().unwrap();
        let listed = Mappings::open().unwrap().without_query();
        let local = 0u8;
        for address in
            [&raw const local as u64, a_line_is_read as fn() as usize as u64, &raw const LEVELS as u64]
        {
            let (mut one, other) = (asked.at(address).unwrap(), listed.at(address).unwrap());
            one.page_size = None;
            assert_eq!(one, other);
        }
        assert_eq!(asked.at(0), None);
        assert_eq!(listed.at(0), None);
    }

    static LEVELS: u8 = 0;
}
