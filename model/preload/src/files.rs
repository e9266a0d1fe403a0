//! Opening files: those that the model is, and those that say which kernel this is.
//!
//! A program chooses its way by the kernel's release, and asks whether KVM has nested paging: it is told what is modelled. Every
//! other path is the C library's business.

use crate::inside;
use crate::say;
use crate::settings;
use crate::system;
use kvmprep_model::errno::{Errno, Result};
use std::ffi::{CStr, c_int};
use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{FromRawFd, IntoRawFd, RawFd};

/// A file that the model answers for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Known {
    /// `/dev/kvm`.
    System,
    /// `/dev/sev`.
    Firmware,
    /// The kernel's release.
    Release,
    /// Whether KVM for AMD's processors has nested paging.
    NestedPaging,
    /// One that is not there: the module for Intel's.
    Nothing,
}

impl Known {
    /// Whether it is a device, behind which the model is, and no text.
    pub fn is_device(self) -> bool {
        matches!(self, Known::System | Known::Firmware)
    }
}

/// Which file that is, if it is one of them.
pub fn known(path: &CStr) -> Option<Known> {
    match path.to_bytes() {
        b"/dev/kvm" => Some(Known::System),
        b"/dev/sev" => Some(Known::Firmware),
        b"/proc/sys/kernel/osrelease" => Some(Known::Release),
        b"/sys/module/kvm_amd/parameters/npt" => Some(Known::NestedPaging),
        b"/sys/module/kvm_intel/parameters/ept" => Some(Known::Nothing),
        _ => None,
    }
}

/// Opens such a file.
pub fn open(known: Known, flags: c_int) -> Result<RawFd> {
    if inside::is_forked() {
        say::line(format_args!(
            "a device was opened in a forked child, whose parent the model is: answered with ENOSYS \
             (fork before /dev/kvm is first opened, or have the child execute a program)"
        ));
        return Err(Errno::ENOSYS);
    }
    match known {
        Known::System => system::open(flags),
        Known::Firmware => system::open_firmware(flags),
        Known::Release => text(c"osrelease", &format!("{}\n", release()), flags),
        Known::NestedPaging => text(c"npt", "1\n", flags),
        Known::Nothing => Err(Errno::ENOENT),
    }
}

/// The modelled kernel's release.
pub fn release() -> String {
    let version = settings::current().personality.version;
    format!("{}.{}.0-kvmprep-model", version.0, version.1)
}

fn text(name: &CStr, text: &str, flags: c_int) -> Result<RawFd> {
    let close_on_exec = if flags & libc::O_CLOEXEC != 0 { libc::MFD_CLOEXEC } else { 0 };
    // SAFETY: the name ends with a zero.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), close_on_exec) };
    if fd < 0 {
        return Err(crate::memfd::last_error());
    }
    // SAFETY: it was just opened, by us.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(text.as_bytes()).and_then(|()| file.rewind()).map_err(|_| Errno::EIO)?;
    Ok(file.into_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_these_paths_are_the_models() {
        assert_eq!(known(c"/dev/kvm"), Some(Known::System));
        assert_eq!(known(c"/dev/kvm2"), None);
        assert_eq!(known(c"dev/kvm"), None);
    }
}
