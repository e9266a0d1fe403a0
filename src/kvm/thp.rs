//! Transparent huge pages: what this machine, and this process, would make of memory that is not there yet.
//!
//! The policies are files of /sys/kernel/mm/transparent_hugepage (Documentation/admin-guide/mm/transhuge.rst). They say
//! what may come; that a huge page is free when it is wanted nobody says.

use super::{HugePagesDisabled, Kernel};

/// For which memory huge pages of 2 MiB come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// For all.
    Always,
    /// For what was advised.
    Advised,
    /// For none.
    Never,
}

/// The policy for anonymous memory.
pub fn anonymous(kernel: &dyn Kernel) -> Policy {
    let policy = match for_2m(kernel, "enabled").as_deref() {
        Some("always") => Policy::Always,
        Some("madvise") => Policy::Advised,
        _ => Policy::Never,
    };
    for_this_process(kernel, policy)
}

/// The policy for shared memory and memfds.
pub fn shmem(kernel: &dyn Kernel) -> Policy {
    let policy = match above_all(kernel) {
        Some(policy) => policy,
        None => match for_2m(kernel, "shmem_enabled").as_deref() {
            Some("always" | "within_size") => Policy::Always,
            Some("advise") => Policy::Advised,
            _ => Policy::Never,
        },
    };
    for_this_process(kernel, policy)
}

/// The policy for files on a tmpfs mount: the mount's own, which is known by its effect alone. `is_eligible`: whether the
/// kernel says of a mapping that it may have huge pages.
pub fn tmpfs(kernel: &dyn Kernel, is_eligible: bool) -> Policy {
    let of_mount = if is_eligible { Policy::Always } else { Policy::Never };
    for_this_process(kernel, above_all(kernel).unwrap_or(of_mount))
}

/// The settings that are above those of sizes and mounts.
fn above_all(kernel: &dyn Kernel) -> Option<Policy> {
    match setting(kernel, "shmem_enabled").as_deref() {
        Some("deny") => Some(Policy::Never),
        Some("force") => Some(Policy::Always),
        _ => None,
    }
}

fn for_this_process(kernel: &dyn Kernel, policy: Policy) -> Policy {
    match (policy, kernel.huge_pages_disabled()) {
        (Policy::Never, _) | (_, HugePagesDisabled::Yes) => Policy::Never,
        (_, HugePagesDisabled::ExceptAdvised) => Policy::Advised,
        (policy, HugePagesDisabled::No) => policy,
    }
}

/// The setting for pages of 2 MiB: their own since Linux 6.8, unless that is to follow the one for all.
fn for_2m(kernel: &dyn Kernel, name: &str) -> Option<String> {
    let own = setting(kernel, &format!("hugepages-2048kB/{name}"));
    own.filter(|own| own != "inherit").or_else(|| setting(kernel, name))
}

/// The chosen one of a setting's words, which stands in brackets.
fn setting(kernel: &dyn Kernel, name: &str) -> Option<String> {
    let text = kernel.read_file(&format!("/sys/kernel/mm/transparent_hugepage/{name}")).ok()?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_string())
}
