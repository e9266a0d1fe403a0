//! The host stage: the VMM's own page tables.
//!
//! One chunk in, populated or an error that says whose fault it is. It never touches memory itself: the kernel
//! is asked to, so that a shortage is an answer and not a SIGBUS.

use super::plan::{HostMethod, Segment};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{Access, Errno, Kernel, MappedObject, Sys};
use crate::range::{PAGE, Range};

/// Populates `range`, which lies in `segment`.
pub fn populate(kernel: &dyn Kernel, segment: &Segment, range: Range) -> Result<()> {
    attempt(kernel, segment, range).map_err(|errno| explain(kernel, segment, range, errno))
}

fn attempt(kernel: &dyn Kernel, segment: &Segment, range: Range) -> Sys<()> {
    let populate = |access| match segment.hva_of(range.start) {
        Some(hva) => kernel.populate(hva, range.size(), access),
        None => Ok(()),
    };
    match segment.host {
        HostMethod::Nothing => Ok(()),
        HostMethod::PopulateRead => populate(Access::Read),
        HostMethod::PopulateWrite => populate(Access::Write),
        HostMethod::AllocateAndPopulate => {
            // Allocating first is only the faster way. A file that does not let itself be allocated (sealed, or
            // opened for reading) is populated all the same; and so is one that a signal has interrupted, since
            // older kernels (6.1) then take back what they had allocated: where signals come often nothing would
            // ever be done.
            match allocate(kernel, segment, range) {
                Err(Errno(libc::EPERM | libc::EBADF | libc::EOPNOTSUPP | libc::EINVAL | libc::EINTR)) => {}
                other => other?,
            }
            populate(Access::Write)
        }
        HostMethod::Allocate => allocate(kernel, segment, range),
    }
}

fn allocate(kernel: &dyn Kernel, segment: &Segment, range: Range) -> Sys<()> {
    let Some((fd, offset)) = segment.offset_of(range.start) else { return Ok(()) };
    kernel.allocate(fd, offset, range.size())
}

fn explain(kernel: &dyn Kernel, segment: &Segment, range: Range, errno: Errno) -> Error {
    let error = |errno, reason, message: String| {
        Error::new(errno, reason, message).stage(Stage::Host).slot(segment.slot).range(range)
    };
    let hugetlb = hugetlb_page_size(kernel, segment, range);
    match errno.0 {
        libc::EINTR => error(libc::EINTR, Reason::Interrupted, format!("interrupted at guest {range}")),
        // An empty pool is EFAULT, ENOMEM or, for a file, ENOSPC.
        libc::EFAULT | libc::ENOMEM | libc::ENOSPC if hugetlb.is_some() => {
            let size = hugetlb.unwrap_or(PAGE);
            error(
                libc::ENOMEM,
                Reason::HugetlbShortage,
                format!("the pool of {} has no page for guest {range}{}", page_name(size), pool_state(kernel, size)),
            )
            .hint(format!(
                "add pages: /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages, or the cgroup's hugetlb limit",
                size >> 10
            ))
        }
        libc::ENOMEM | libc::ENOSPC => {
            error(libc::ENOMEM, Reason::MemoryShortage, format!("no memory for guest {range}: {errno}"))
                .hint("free memory on the host, raise the cgroup's or the file system's limit, or make the guest smaller")
        }
        libc::EFAULT => error(
            libc::EFAULT,
            Reason::NoHostMapping,
            format!("the memory behind guest {range} cannot be touched: it was unmapped, or its file is too short"),
        )
        .hint("check the mapping and the file's size; announce a change before an munmap or ftruncate"),
        libc::EHWPOISON => error(errno.0, Reason::Poisoned, format!("a page behind guest {range} is broken hardware"))
            .hint("discard the page, or give the guest other memory"),
        libc::EINVAL if segment.hva.is_some() => error(
            libc::EOPNOTSUPP,
            Reason::KernelRefused,
            format!("the kernel cannot populate the memory behind guest {range}"),
        )
        .hint("needs Linux 5.14 (MADV_POPULATE_WRITE) and a mapping that allows the access"),
        _ => error(errno.0, Reason::KernelRefused, format!("populating the memory behind guest {range}: {errno}")),
    }
}

/// The page size, where the segment is of huge pages. Before Linux 6.11 a mapping's page size is not in what the
/// plan asks, so here, where something has failed already or is to be known beforehand, the costlier file is read.
pub fn hugetlb_page_size(kernel: &dyn Kernel, segment: &Segment, range: Range) -> Option<u64> {
    if segment.page_size > PAGE {
        return Some(segment.page_size);
    }
    if segment.page_size == PAGE
        || !matches!(segment.backing.object, MappedObject::Hugetlb | MappedObject::File | MappedObject::Shmem)
    {
        return None;
    }
    let smaps = kernel.read_file("/proc/self/smaps").ok()?;
    kernel_page_size(&smaps, segment.hva_of(range.start)?).filter(|size| *size > PAGE)
}

/// `KernelPageSize` of the mapping that holds `hva`, in the text of a smaps file.
fn kernel_page_size(smaps: &str, hva: u64) -> Option<u64> {
    let holds = |line: &str| {
        let (start, rest) = line.split_once('-')?;
        let end = rest.split(' ').next()?;
        let bounds = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        Some(bounds.0 <= hva && hva < bounds.1)
    };
    let mut lines = smaps.lines().skip_while(|line| holds(line) != Some(true));
    let size = lines.find_map(|line| line.strip_prefix("KernelPageSize:"))?;
    Some(size.trim().strip_suffix(" kB")?.parse::<u64>().ok()? << 10)
}

fn page_name(size: u64) -> String {
    if size % (1 << 30) == 0 {
        format!("{} GiB pages", size >> 30)
    } else {
        format!("{} MiB pages", size >> 20)
    }
}

fn pool_state(kernel: &dyn Kernel, size: u64) -> String {
    let count = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", size >> 10);
        kernel.read_file(&path).ok().and_then(|text| text.trim().parse::<u64>().ok())
    };
    match (count("free_hugepages"), count("resv_hugepages"), count("nr_hugepages")) {
        (Some(free), Some(reserved), Some(all)) => {
            format!(" ({free} of {all} pages free, {reserved} of these reserved)")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_page_size_of_the_right_mapping() {
        let smaps = "\
1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nKernelPageSize:        4 kB\nVmFlags: rd\n\
200000-400000 rw-s 00000000 00:0f 9 /memfd:x\nSize: 2048 kB\nKernelPageSize:     2048 kB\n";
        assert_eq!(kernel_page_size(smaps, 0x2fff), Some(4096));
        assert_eq!(kernel_page_size(smaps, 0x200000), Some(2 << 20));
        assert_eq!(kernel_page_size(smaps, 0x3000), None);
    }
}
