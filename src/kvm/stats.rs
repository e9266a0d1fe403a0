//! KVM's binary statistics, decoded.
//!
//! The layout is the kernel's (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD; Linux 5.14): a header, an
//! array of descriptors with names, and the data. Only single counters are kept; histograms are passed over.

use super::{Errno, Sys};

/// Names and values of one vCPU's or VM's counters.
#[derive(Debug, Default)]
pub struct Stats(Vec<(String, u64)>);

/// Bytes of `struct kvm_stats_header` and of `struct kvm_stats_desc` before its name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;
/// More than any kernel has; a bound against a file that is not what it seems.
const MOST_DESCRIPTORS: usize = 4096;

impl Stats {
    /// The counter of that name.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| *value)
    }

    /// Decodes a statistics file, read through `read_at(offset, buffer)`.
    pub fn decode(read_at: impl Fn(u64, &mut [u8]) -> Sys<()>) -> Sys<Self> {
        let mut header = [0; HEADER];
        read_at(0, &mut header)?;
        let field = |at: usize| u32_at(&header, at) as usize;
        let (name_size, count, descriptors, data) = (field(4), field(8), field(16) as u64, field(20) as u64);
        if name_size == 0 || name_size > 1024 || count > MOST_DESCRIPTORS {
            return Err(Errno(libc::EPROTO));
        }
        let stride = DESCRIPTOR + name_size;
        let mut table = vec![0; stride * count];
        read_at(descriptors, &mut table)?;
        let mut stats = Vec::with_capacity(count);
        for descriptor in table.chunks_exact(stride) {
            let values = u16::from_ne_bytes([descriptor[6], descriptor[7]]);
            if values != 1 {
                continue;
            }
            let name = &descriptor[DESCRIPTOR..];
            let length = name.iter().position(|b| *b == 0).unwrap_or(name.len());
            let mut value = [0; 8];
            read_at(data + u32_at(descriptor, 8) as u64, &mut value)?;
            stats.push((String::from_utf8_lossy(&name[..length]).into_owned(), u64::from_ne_bytes(value)));
        }
        Ok(Self(stats))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A statistics file with one counter and one histogram of two buckets.
    fn file() -> Vec<u8> {
        let mut file = vec![0; HEADER];
        for (at, value) in [(4, 16u32), (8, 2), (16, 24), (20, 88)] {
            file[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        for (name, size, offset) in [("histogram", 2u16, 0u32), ("pf_taken", 1, 16)] {
            let mut descriptor = vec![0; DESCRIPTOR + 16];
            descriptor[6..8].copy_from_slice(&size.to_ne_bytes());
            descriptor[8..12].copy_from_slice(&offset.to_ne_bytes());
            descriptor[16..16 + name.len()].copy_from_slice(name.as_bytes());
            file.extend(descriptor);
        }
        for value in [1u64, 2, 77] {
            file.extend(value.to_ne_bytes());
        }
        file
    }

    fn decode(file: &[u8]) -> Sys<Stats> {
        Stats::decode(|offset, buffer| {
            let from = offset as usize;
            let part = file.get(from..from + buffer.len()).ok_or(Errno(libc::EIO))?;
            buffer.copy_from_slice(part);
            Ok(())
        })
    }

    #[test]
    fn finds_counters_and_passes_over_histograms() {
        let stats = decode(&file()).unwrap();
        assert_eq!(stats.get("pf_taken"), Some(77));
        assert_eq!(stats.get("histogram"), None);
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let file = file();
        for length in 0..file.len() {
            assert!(decode(&file[..length]).is_err(), "{length} bytes");
        }
    }
}
