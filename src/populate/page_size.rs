//! Which memory is of huge pages, where the plan could not say.
//!
//! Before Linux 6.11 a mapping's page size is not in what the plan asks. It is in `/proc/self/smaps`, which costs a
//! walk of all page tables: read at most once, by who has failed already or must know beforehand.

use super::plan::Segment;
use crate::kvm::{Kernel, MappedObject};
use crate::range::{PAGE, Range};
use once_cell::unsync::OnceCell;

/// Page sizes as they are on this occasion; not to be kept, since mappings change.
pub struct PageSizes<'a> {
    kernel: &'a dyn Kernel,
    smaps: OnceCell<Vec<Entry>>,
}

/// A mapping's first byte, one past its last, and the bytes in a page of it.
type Entry = (u64, u64, u64);

impl<'a> PageSizes<'a> {
    /// Nothing is read yet.
    pub fn new(kernel: &'a dyn Kernel) -> Self {
        Self { kernel, smaps: OnceCell::new() }
    }

    /// Bytes in a page of the memory where `range`, a part of `segment`, begins; `None` where nobody can tell.
    pub fn of(&self, segment: &Segment, range: Range) -> Option<u64> {
        if segment.page_size != 0 {
            return Some(segment.page_size);
        }
        if !matches!(segment.backing.object, MappedObject::Hugetlb | MappedObject::File | MappedObject::Shmem)
        {
            return Some(PAGE);
        }
        let hva = segment.hva_of(range.start)?;
        let entries =
            self.smaps.get_or_init(|| parse(&self.kernel.read_file("/proc/self/smaps").unwrap_or_default()));
        let at = entries.partition_point(|(_, end, _)| *end <= hva);
        entries.get(at).filter(|(start, ..)| *start <= hva).map(|(.., size)| *size)
    }
}

/// The mappings in the text of a smaps file: a line `start-end …` each, and `KernelPageSize: … kB` some lines below.
fn parse(smaps: &str) -> Vec<Entry> {
    let place = |line: &str| {
        let (start, rest) = line.split_once('-')?;
        let end = rest.split(' ').next()?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    let size = |line: &str| {
        let kib = line.strip_prefix("KernelPageSize:")?.trim().strip_suffix(" kB")?;
        kib.parse::<u64>().ok()?.checked_mul(1 << 10)
    };
    let (mut entries, mut here) = (Vec::new(), None);
    for line in smaps.lines() {
        if let Some(bytes) = size(line) {
            entries.extend(here.take().map(|(start, end)| (start, end, bytes)));
        } else if let Some(place) = place(line) {
            here = Some(place);
        }
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_mapping_s_page_size() {
        let smaps = "\
1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nKernelPageSize:        4 kB\nVmFlags: rd\n\
200000-400000 rw-s 00000000 00:0f 9 /memfd:x\nSize: 2048 kB\nKernelPageSize:     2048 kB\n";
        assert_eq!(parse(smaps), [(0x1000, 0x3000, 4096), (0x20_0000, 0x40_0000, 2 << 20)]);
    }
}
