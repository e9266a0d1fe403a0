//! `/proc/self/smaps`: what of a mapping no cheaper file tells.
//!
//! Reading it costs a walk of all page tables of the process, so it is read at most once on an occasion, and only when
//! asked for something. It must not be kept: mappings change.

use super::{Kernel, Sys};
use once_cell::unsync::OnceCell;

/// All mappings, with what smaps says of each.
pub struct Smaps<'a> {
    kernel: &'a dyn Kernel,
    entries: OnceCell<Vec<Entry>>,
}

/// One mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First byte.
    pub start: u64,
    /// One past the last byte.
    pub end: u64,
    /// Bytes in a page of it.
    pub page_size: u64,
    /// What `madvise` was told of huge pages: to use them, or not to.
    pub huge_advice: Option<bool>,
    /// Whether transparent huge pages of any size may come; `None` where the kernel does not say.
    pub may_be_huge: Option<bool>,
}

impl<'a> Smaps<'a> {
    /// Nothing is read yet.
    pub fn new(kernel: &'a dyn Kernel) -> Self {
        Self { kernel, entries: OnceCell::new() }
    }

    /// The mapping at `hva`; `None` where there is none, or smaps cannot be read.
    pub fn at(&self, hva: u64) -> Option<Entry> {
        self.look(hva).ok().flatten()
    }

    /// The mapping at `hva`, where there is one; for who must know whether that could be told.
    pub fn look(&self, hva: u64) -> Sys<Option<Entry>> {
        let read = || self.kernel.read_file("/proc/self/smaps").map(|smaps| parse(&smaps));
        let entries = self.entries.get_or_try_init(read)?;
        let at = entries.partition_point(|entry| entry.end <= hva);
        Ok(entries.get(at).filter(|entry| entry.start <= hva).copied())
    }
}

/// The mappings in the text: a line `start-end …` each, `KernelPageSize: … kB` some lines below, `VmFlags: …` at the end.
fn parse(smaps: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in smaps.lines() {
        if let Some((start, end)) = place(line) {
            entries.push(Entry { start, end, page_size: 0, huge_advice: None, may_be_huge: None });
        }
        let Some(entry) = entries.last_mut() else { continue };
        if let Some(bytes) = page_size(line) {
            entry.page_size = bytes;
        }
        if let Some(answer) = line.strip_prefix("THPeligible:") {
            entry.may_be_huge = Some(answer.trim() != "0");
        }
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let has = |flag| flags.split_ascii_whitespace().any(|known| known == flag);
            entry.huge_advice = if has("nh") { Some(false) } else { has("hg").then_some(true) };
        }
    }
    entries.retain(|entry| entry.page_size != 0);
    entries
}

fn place(line: &str) -> Option<(u64, u64)> {
    let (start, rest) = line.split_once('-')?;
    let end = rest.split(' ').next()?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

fn page_size(line: &str) -> Option<u64> {
    let kib = line.strip_prefix("KernelPageSize:")?.trim().strip_suffix(" kB")?;
    kib.parse::<u64>().ok()?.checked_mul(1 << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_each_mapping_s_page_size_and_advice() {
        let smaps = "\
1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nKernelPageSize:        4 kB\nTHPeligible:           1\nVmFlags: rd wr mr hg \n\
4000-5000 rw-p 00000000 00:00 0 [heap]\nKernelPageSize:        4 kB\nTHPeligible:    0\nVmFlags: rd nh\n\
200000-400000 rw-s 00000000 00:0f 9 /memfd:x\nSize: 2048 kB\nKernelPageSize:     2048 kB\n";
        let entry = |start, end, page_size, huge_advice, may_be_huge| Entry {
            start,
            end,
            page_size,
            huge_advice,
            may_be_huge,
        };
        assert_eq!(
            parse(smaps),
            [
                entry(0x1000, 0x3000, 4096, Some(true), Some(true)),
                entry(0x4000, 0x5000, 4096, Some(false), Some(false)),
                entry(0x20_0000, 0x40_0000, 2 << 20, None, None)
            ]
        );
    }
}
