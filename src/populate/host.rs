//! The host stage: the VMM's own page tables.
//!
//! One chunk in, populated or an error that says whose fault it is. It never touches memory itself: the kernel
//! is asked to, so that a shortage is an answer and not a SIGBUS.

use super::page_size::PageSizes;
use super::plan::{HostMethod, Segment};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{Access, Errno, Kernel, Mappings, Sys, caps};
use crate::range::{PAGE, Range};

/// Populates `range`, which lies in `segment`; `private` are those parts of it that are private now.
pub fn populate(kernel: &dyn Kernel, segment: &Segment, range: Range, private: &[Range]) -> Result<()> {
    if segment.host == HostMethod::Nothing {
        return Ok(());
    }
    let mut at = range.start;
    for part in private {
        if let Some(shared) = Range::between(at, part.start) {
            populate_side(kernel, segment, shared)?;
        }
        if let Some(side) = segment.private_side(*part) {
            populate_side(kernel, &side, *part)?;
        }
        at = part.end;
    }
    Range::between(at, range.end).map_or(Ok(()), |rest| populate_side(kernel, segment, rest))
}

fn populate_side(kernel: &dyn Kernel, segment: &Segment, range: Range) -> Result<()> {
    if segment.hva.is_none() && segment.host != HostMethod::Allocate {
        return Err(Error::new(
            libc::EFAULT,
            Reason::NoHostMapping,
            format!("guest {range} is shared, and nothing that can be written is mapped behind it"),
        )
        .stage(Stage::Host)
        .slot(segment.slot)
        .range(range)
        .hint("map the slot's memory, or tell what is private (kvmprep_visibility_note)"));
    }
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
    let no_mapping = |message: String| error(libc::EFAULT, Reason::NoHostMapping, message);
    // The kernel says ENOMEM of a hole as it does of a shortage.
    let may_be_hole = matches!(errno.0, libc::ENOMEM | libc::EFAULT);
    if let Some(hva) = may_be_hole.then(|| hole(kernel, segment, range)).flatten() {
        return no_mapping(format!("nothing is mapped at {hva:#x} any more, behind guest {range}"))
            .hint("announce a slot's change before its memory is unmapped");
    }
    match errno.0 {
        libc::EINTR => error(libc::EINTR, Reason::Interrupted, format!("interrupted at guest {range}")),
        libc::ENOMEM | libc::ENOSPC | libc::EFAULT => match HugePages::behind(kernel, segment, range) {
            Some(pages) if errno.0 != libc::EFAULT || pages.are_short(kernel, segment, range) => error(
                libc::ENOMEM,
                Reason::HugetlbShortage,
                format!("the pool of {} has no page for guest {range}{}", pages.name(), pages.state()),
            )
            .hint(format!(
                "add pages: /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages, or the cgroup's hugetlb limit",
                pages.size >> 10
            )),
            pages if errno.0 == libc::EFAULT => {
                let other = if pages.is_some() { "its NUMA node or cgroup" } else { "its file system" };
                no_mapping(format!(
                    "the memory behind guest {range} cannot be touched: its file is too short, or {other} is full"
                ))
                .hint(format!("check the file's size and what {other} has free; announce a change before an ftruncate"))
            }
            _ => error(libc::ENOMEM, Reason::MemoryShortage, format!("no memory for guest {range}: {errno}")).hint(
                "free memory on the host, raise the cgroup's or the file system's limit, or make the guest smaller",
            ),
        },
        libc::EHWPOISON => error(errno.0, Reason::Poisoned, format!("a page behind guest {range} is broken hardware"))
            .hint("discard the page, or give the guest other memory"),
        libc::EINVAL if segment.hva.is_some() => {
            let error = error(
                libc::EOPNOTSUPP,
                Reason::KernelRefused,
                format!("the kernel cannot populate the memory behind guest {range}"),
            );
            if knows_populate(kernel) {
                error.hint(
                    "a device's memory (VM_PFNMAP, VM_IO): mark its slot KVMPREP_MEMSLOT_DEVICE; a PROT_NONE page: \
                     keep it out of slots and ranges",
                )
            } else {
                error.hint("needs Linux 5.14 (MADV_POPULATE_WRITE)")
            }
        }
        _ => error(errno.0, Reason::KernelRefused, format!("populating the memory behind guest {range}: {errno}"))
            .hint("see the kernel's log, remove the cause, and call again"),
    }
}

/// The first address behind `range` at which nothing is mapped.
fn hole(kernel: &dyn Kernel, segment: &Segment, range: Range) -> Option<u64> {
    let mut at = segment.hva_of(range.start)?;
    let end = at + range.size();
    let mappings = Mappings::now(kernel).ok()?;
    while at < end {
        match mappings.at(at).ok()? {
            Some(mapping) if mapping.start <= at => at = mapping.end,
            _ => return Some(at),
        }
    }
    None
}

/// Whether the kernel has MADV_POPULATE; so it is taken where the release cannot be read.
fn knows_populate(kernel: &dyn Kernel) -> bool {
    let [major, minor, _] = caps::release(kernel);
    major == 0 || (5, 14) <= (major, minor)
}

/// Huge pages of one size, with their pool's counts where these can be read.
struct HugePages {
    size: u64,
    all: Option<u64>,
    free: Option<u64>,
    reserved: Option<u64>,
}

impl HugePages {
    /// Those behind `range`, if any.
    fn behind(kernel: &dyn Kernel, segment: &Segment, range: Range) -> Option<Self> {
        let size = PageSizes::new(kernel).of(segment, range).filter(|size| *size > PAGE)?;
        let count = |name: &str| {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", size >> 10);
            kernel.read_file(&path).ok().and_then(|text| text.trim().parse().ok())
        };
        Some(Self {
            size,
            all: count("nr_hugepages"),
            free: count("free_hugepages"),
            reserved: count("resv_hugepages"),
        })
    }

    /// Whether an EFAULT at `range` is for want of pages. It comes of a file that is too short, too: the file's
    /// size decides where there is a descriptor, else whether the pool has a page that nobody has reserved.
    fn are_short(&self, kernel: &dyn Kernel, segment: &Segment, range: Range) -> bool {
        let file =
            segment.offset_of(range.start).and_then(|(fd, at)| Some((kernel.file_status(fd).ok()?, at)));
        match file {
            Some((file, at)) => at.saturating_add(range.size()) <= file.length,
            None => self.free.zip(self.reserved).is_none_or(|(free, reserved)| free <= reserved),
        }
    }

    fn name(&self) -> String {
        if self.size % (1 << 30) == 0 {
            format!("{} GiB pages", self.size >> 30)
        } else {
            format!("{} MiB pages", self.size >> 20)
        }
    }

    fn state(&self) -> String {
        match (self.free, self.reserved, self.all) {
            (Some(free), Some(reserved), Some(all)) => {
                format!(" ({free} of {all} pages free, {reserved} of these reserved)")
            }
            _ => String::new(),
        }
    }
}
