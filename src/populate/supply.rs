//! Whether a population can fit what the machine has free (`CHECK_FREE`).
//!
//! It refuses only what surely cannot fit: need is counted low and supply high, so a refusal is never wrong, and
//! a pass is no promise.

use super::page_size::PageSizes;
use super::plan::{HostMethod, Plan, Segment};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::{Access, Kernel, MappedObject};
use crate::range::{HUGE, PAGE, PrivateMemory};
use std::collections::BTreeMap;

/// Refuses a plan that needs more than there is.
pub fn check(kernel: &dyn Kernel, plan: &Plan, told: Option<&dyn PrivateMemory>) -> Result<()> {
    for (page_size, need) in needs(kernel, plan, told) {
        let supply = if page_size > PAGE { pool(kernel, page_size) } else { memory(kernel) };
        let Some((supply, whose)) = supply else { continue };
        if need > supply {
            let reason = if page_size > PAGE { Reason::HugetlbShortage } else { Reason::MemoryShortage };
            return Err(Error::new(
                libc::ENOMEM,
                reason,
                format!(
                    "populating needs {} MiB more, and {whose} has {} MiB free",
                    need >> 20,
                    supply >> 20
                ),
            )
            .stage(Stage::Host)
            .hint("free memory, raise the limit named, or populate less"));
        }
    }
    Ok(())
}

/// Bytes to be allocated, by page size.
fn needs(kernel: &dyn Kernel, plan: &Plan, told: Option<&dyn PrivateMemory>) -> BTreeMap<u64, u64> {
    let mut needs = BTreeMap::new();
    let page_sizes = PageSizes::new(kernel);
    let mut hidden = 0;
    for segment in &plan.segments {
        let private = segment.private_size(told);
        if segment.host != HostMethod::Nothing {
            hidden += private;
        }
        let shared = segment.range.size() - private;
        if shared == 0 || !allocates(segment) {
            continue;
        }
        // From which pool this comes is not known: count it nowhere.
        let Some(page_size) = page_sizes.of(segment, segment.range) else { continue };
        let missing = shared.saturating_sub(present(kernel, segment));
        *needs.entry(page_size).or_default() += missing;
    }
    // What of a guest_memfd is there cannot be asked: as much as the machine has in use, at most.
    let missing = hidden.saturating_sub(if hidden > 0 { in_use(kernel) } else { 0 });
    if missing > 0 {
        *needs.entry(PAGE).or_default() += missing;
    }
    needs
}

/// Bytes of memory that the machine has in use and cannot reclaim; all there could be, where it does not tell.
fn in_use(kernel: &dyn Kernel) -> u64 {
    let used = || {
        let meminfo = kernel.read_file("/proc/meminfo").ok()?;
        Some(field(&meminfo, "MemTotal:")?.saturating_sub(field(&meminfo, "MemAvailable:")?) << 10)
    };
    used().unwrap_or(u64::MAX)
}

/// Whether populating this takes memory that cannot be reclaimed at once, as a file's cached pages can.
fn allocates(segment: &Segment) -> bool {
    match segment.host {
        HostMethod::Nothing => false,
        HostMethod::Allocate | HostMethod::AllocateAndPopulate => true,
        HostMethod::PopulateRead | HostMethod::PopulateWrite => match segment.backing.object {
            MappedObject::File => !segment.backing.shared && segment.access == Access::Write,
            MappedObject::Anonymous => segment.access == Access::Write,
            _ => true,
        },
    }
}

/// Bytes that are there already, at most. What cannot be known counts as there.
fn present(kernel: &dyn Kernel, segment: &Segment) -> u64 {
    let Some(start) = segment.hva else { return 0 };
    let end = start + segment.range.size();
    let is_of_file = segment.backing.shared || segment.access == Access::Read;
    if is_of_file && segment.backing.object == MappedObject::Hugetlb {
        // What another process or an fallocate has filled, only the file can tell: mincore looks at page tables.
        let size = segment.offset_of(segment.range.start).and_then(|(fd, _)| kernel.file_status(fd).ok());
        return size.map_or(segment.range.size(), |size| size.allocated);
    }
    // A read maps what the file has in memory; only a write makes a private copy.
    if is_of_file {
        let parts = (start..end).step_by(HUGE as usize);
        return parts
            .map(|at| {
                let size = HUGE.min(end - at);
                kernel.cached(at, size).unwrap_or(size)
            })
            .sum();
    }
    let (mut at, mut sum) = (start, 0);
    loop {
        match kernel.resident(at, end) {
            Ok(Some((first, last))) => {
                sum += last - first;
                at = last;
            }
            Ok(None) => return sum,
            Err(_) => return segment.range.size(),
        }
    }
}

/// What a pool of huge pages can still give: its free pages, and those it may still be grown by.
fn pool(kernel: &dyn Kernel, size: u64) -> Option<(u64, String)> {
    let directory = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10);
    let count = |name: &str| number(&kernel.read_file(&format!("{directory}/{name}")).ok()?);
    let growth = count("nr_overcommit_hugepages")?.saturating_sub(count("surplus_hugepages")?);
    Some(((count("free_hugepages")? + growth) * size, format!("the pool {directory}")))
}

/// What the machine and every cgroup above this process have free, swap included, whichever is least. In a cgroup
/// namespace the process may be at what looks like the root and has limits all the same.
fn memory(kernel: &dyn Kernel) -> Option<(u64, String)> {
    let meminfo = kernel.read_file("/proc/meminfo").ok()?;
    let swap = field(&meminfo, "SwapFree:").unwrap_or(0) << 10;
    let mut least = ((field(&meminfo, "MemAvailable:")? << 10) + swap, "the machine".to_string());
    let groups = kernel.read_file("/proc/self/cgroup").unwrap_or_default();
    let path = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    let mut path = path.trim_end_matches('/');
    loop {
        let directory = format!("/sys/fs/cgroup{path}");
        if let Some(free) = cgroup_free(kernel, &directory, swap).filter(|free| *free < least.0) {
            least = (free, format!("the cgroup {directory}"));
        }
        match path.rsplit_once('/') {
            Some((parent, _)) => path = parent,
            None => return Some(least),
        }
    }
}

/// Limit less use, what can be reclaimed counted as free, and what of the machine's free swap it may take.
fn cgroup_free(kernel: &dyn Kernel, directory: &str, swap: u64) -> Option<u64> {
    let read = |name: &str| kernel.read_file(&format!("{directory}/{name}")).ok();
    let limit = number(&read("memory.max")?)?;
    let used = number(&read("memory.current")?)?;
    let stat = read("memory.stat")?;
    let cache =
        field(&stat, "inactive_file")? + field(&stat, "active_file")? + field(&stat, "slab_reclaimable")?;
    let swap_limit = read("memory.swap.max").and_then(|text| number(&text)).unwrap_or(u64::MAX);
    let swap_used = read("memory.swap.current").and_then(|text| number(&text)).unwrap_or(0);
    let swap = swap.min(swap_limit.saturating_sub(swap_used));
    Some(limit.saturating_sub(used.saturating_sub(cache)).saturating_add(swap))
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number behind a name in a file of names and numbers.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some(name)).then(|| words.next()?.parse().ok())?
    })
}
