//! Asking of a file by its path, and opening one for `stdio`: the functions of the C library that stand before its own.
//!
//! A program may look whether `/dev/kvm` is there, and may be used, before it opens it. Where the model is, it is: what is said of it
//! is what is said of a device that every machine has and everybody may use, but for its number. Of no other file is anything said.

use crate::files::Known;
use crate::interpose::{known, open_known};
use crate::real;
use libc::{FILE, stat as Stat, statx as Statx};
use std::ffi::{CStr, c_char, c_int, c_uint};

/// The device of which is said what is said of `/dev/kvm`.
const STAND_IN: &CStr = c"/dev/null";
/// `/dev/kvm`'s number.
const DEVICE: (u32, u32) = (10, 232);

/// Whether a path is `/dev/kvm`'s.
///
/// # Safety
///
/// The path, if there is one, ends with a zero.
unsafe fn is_kvm(path: *const c_char) -> bool {
    // SAFETY: the caller's.
    unsafe { known(path) == Some(Known::System) }
}

/// What has a number of a device in it.
trait Status {
    fn set_device(&mut self, major: u32, minor: u32);
}

impl Status for Stat {
    fn set_device(&mut self, major: u32, minor: u32) {
        self.st_rdev = libc::makedev(major, minor);
    }
}

impl Status for Statx {
    fn set_device(&mut self, major: u32, minor: u32) {
        (self.stx_rdev_major, self.stx_rdev_minor) = (major, minor);
    }
}

macro_rules! asking {
    ($(fn $name:ident([$($before:ident: $type:ty)?] path $(, $after:ident: $after_type:ty)* $(; $status:ident: $status_type:ty $(, $flags:ident: $flags_type:ty)?)?);)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`.")]
            ///
            /// # Safety
            ///
            /// That of the C function of this name.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(
                $($before: $type,)?
                path: *const c_char
                $(, $after: $after_type)*
                $(, $status: *mut $status_type $(, $flags: $flags_type)?)?
            ) -> c_int {
                // SAFETY: the caller's.
                unsafe {
                    let is_kvm = is_kvm(path);
                    let path = if is_kvm { STAND_IN.as_ptr() } else { path };
                    let answer = real::$name($($before,)? path $(, $after)* $(, $status $(, $flags)?)?);
                    $(
                        if is_kvm && answer == 0 {
                            (*$status).set_device(DEVICE.0, DEVICE.1);
                        }
                    )?
                    answer
                }
            }
        )*
    };
}

asking! {
    fn access([] path, mode: c_int);
    fn eaccess([] path, mode: c_int);
    fn euidaccess([] path, mode: c_int);
    fn faccessat([directory: c_int] path, mode: c_int, flags: c_int);
    fn stat([] path; status: Stat);
    fn stat64([] path; status: Stat);
    fn lstat([] path; status: Stat);
    fn lstat64([] path; status: Stat);
    fn fstatat([directory: c_int] path; status: Stat, flags: c_int);
    fn fstatat64([directory: c_int] path; status: Stat, flags: c_int);
    fn statx([directory: c_int] path, flags: c_int, mask: c_uint; status: Statx);
}

/// # Safety
///
/// That of `fopen`.
unsafe fn open_stream(
    path: *const c_char,
    mode: *const c_char,
    call: unsafe fn(*const c_char, *const c_char) -> *mut FILE,
) -> *mut FILE {
    // SAFETY: the caller's.
    unsafe {
        let Some(known) = known(path) else { return call(path, mode) };
        let close_on_exec = if CStr::from_ptr(mode).to_bytes().contains(&b'e') { libc::O_CLOEXEC } else { 0 };
        match open_known(known, libc::O_RDWR | close_on_exec) {
            -1 => std::ptr::null_mut(),
            fd => libc::fdopen(fd, mode),
        }
    }
}

/// `fopen`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE {
    // SAFETY: the caller's.
    unsafe { open_stream(path, mode, real::fopen) }
}

/// `fopen64`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE {
    // SAFETY: the caller's.
    unsafe { open_stream(path, mode, real::fopen64) }
}
