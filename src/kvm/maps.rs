//! This process's mappings: the text of `/proc/self/maps`, for kernels before 6.11, what a mapping's name says of
//! it, and looking up many of them.
//!
//! Who opens the file is not its business.

use super::{Kernel, MappedObject, Mapping, Sys};
use std::cell::Cell;

/// Mappings for one who looks up many at one time. Where each look would read all of `/proc/self/maps`, it is read
/// once, so this must not outlive the occasion: mappings change.
pub struct Mappings<'a> {
    kernel: &'a dyn Kernel,
    all: Option<Vec<Mapping>>,
    /// What was found last: the next look is often at the same.
    last: Cell<Option<Mapping>>,
}

impl<'a> Mappings<'a> {
    /// The mappings as they are now.
    pub fn now(kernel: &'a dyn Kernel) -> Sys<Self> {
        Ok(Self { kernel, all: kernel.mappings()?, last: Cell::new(None) })
    }

    /// The mapping at `hva`, or the next above it; `None` when there is none.
    pub fn at(&self, hva: u64) -> Sys<Option<Mapping>> {
        if let Some(all) = &self.all {
            return Ok(find(all, hva));
        }
        if let Some(last) = self.last.get().filter(|last| last.start <= hva && hva < last.end) {
            return Ok(Some(last));
        }
        let found = self.kernel.mapping(hva)?;
        self.last.set(found);
        Ok(found)
    }
}

/// What a mapping of this name, inode and page size is.
pub fn object(name: &str, inode: u64, page_size: u64) -> MappedObject {
    if page_size > crate::range::PAGE || name.starts_with("/anon_hugepage") {
        MappedObject::Hugetlb
    } else if is_guest_memfd(name.as_bytes()) {
        MappedObject::GuestMemfd
    } else if inode == 0 {
        MappedObject::Anonymous
    } else if !is_on_mount(name, inode) || name.starts_with("/dev/shm/") {
        MappedObject::Shmem
    } else {
        MappedObject::File
    }
}

/// Whether a mapping of that name and inode is of a file that somebody has put somewhere, and not of shared memory that
/// has no place in any file system.
pub fn is_on_mount(name: &str, inode: u64) -> bool {
    let placeless = ["/memfd:", "/dev/zero", "/SYSV", "[anon_shmem:"];
    inode != 0 && !placeless.iter().any(|start| name.starts_with(start))
}

/// Whether that is how the kernel names a guest_memfd.
pub fn is_guest_memfd(name: &[u8]) -> bool {
    name.windows(GUEST_MEMFD_NAME.len()).any(|part| part == GUEST_MEMFD_NAME)
}

const GUEST_MEMFD_NAME: &[u8] = b"[kvm-gmem]";

/// The mappings in the text of a maps file, in its order, which is that of their addresses.
pub fn parse(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(parse_line).collect()
}

/// The mapping at `hva`, or the next above it.
pub fn find(mappings: &[Mapping], hva: u64) -> Option<Mapping> {
    mappings.get(mappings.partition_point(|m| m.end <= hva)).copied()
}

/// One line: `start-end perms offset dev inode    name`.
fn parse_line(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    let name = fields.next().unwrap_or("");
    let page_size = 0;
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        offset,
        inode,
        readable: permissions.as_bytes().first() == Some(&b'r'),
        writable: permissions.as_bytes().get(1) == Some(&b'w'),
        shared: permissions.as_bytes().get(3) == Some(&b's'),
        on_mount: is_on_mount(name, inode),
        page_size,
        object: object(name, inode, page_size),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
7f0000000000-7f0000001000 r--p 00000000 00:00 0 \n\
7f0000002000-7f0000004000 rw-s 00000000 00:01 1034 /memfd:guest (deleted)\n\
7f0000200000-7f0000400000 rw-p 00000000 00:0f 20 /anon_hugepage (deleted)\n\
7f0000400000-7f0000401000 rw-p 00001000 08:01 20 /var/lib/snapshot\n\
7f0000401000-7f0000402000 rw-s 00000000 00:0e 9 anon_inode:[kvm-gmem]\n";

    #[test]
    fn finds_the_mapping_or_the_next() {
        let all = parse(TEXT);
        let at = |hva| find(&all, hva).unwrap();
        assert_eq!(at(0x7f00_0000_0fff).object, MappedObject::Anonymous);
        assert!(!at(0x7f00_0000_0000).writable);
        assert_eq!(at(0x7f00_0000_1000).start, 0x7f00_0000_2000);
        assert_eq!(at(0x7f00_0000_3fff).object, MappedObject::Shmem);
        assert!(at(0x7f00_0000_3fff).shared && at(0x7f00_0000_3fff).writable);
        assert_eq!(at(0x7f00_0020_0000).object, MappedObject::Hugetlb);
        assert_eq!(at(0x7f00_0040_0000).object, MappedObject::File);
        assert_eq!(at(0x7f00_0040_0000).offset, 0x1000);
        assert_eq!(at(0x7f00_0040_1000).object, MappedObject::GuestMemfd);
        assert!(at(0x7f00_0040_0000).on_mount && !at(0x7f00_0000_3fff).on_mount);
        assert_eq!(find(&all, 0x7f00_0040_2000), None);
    }
}
