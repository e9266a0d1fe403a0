//! The functions of the C library that stand before the C library's own.
//!
//! Each first finds out, without a lock and at the cost of an `fstat` at most, whether the model has to do with the call at all,
//! and if not goes on to the next definition. So it is for whoever is inside the model, for a forked child, and as long as there
//! is no object. What is done where the model has to do with it is written elsewhere: this file only has the C faces.
//!
//! Those that take a variable number of arguments are written with all of them, which on x86-64 is the same call.

use crate::files::{self, Known};
use crate::guard::Guard;
use crate::host;
use crate::inside;
use crate::mappings;
use crate::memfd;
use crate::objects;
use crate::own;
use crate::real;
use crate::request;
use kvmprep_model::errno::Errno;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulong, c_void};
use std::ops::Range;

/// Whether the model has nothing to do with what the calling thread calls.
pub(crate) fn is_out_of_play() -> bool {
    inside::is_inside() || inside::is_forked()
}

/// Whether it also has no object.
pub(crate) fn has_nothing() -> bool {
    !objects::are_there_any() || is_out_of_play()
}

/// Whether a descriptor may be one of the model's.
pub(crate) fn may_be_ours(fd: c_int) -> bool {
    objects::may_be_ours(fd) && !inside::is_inside()
}

/// The file that the model answers for, if the path is one's.
///
/// # Safety
///
/// The path, if there is one, ends with a zero.
pub(crate) unsafe fn known(path: *const c_char) -> Option<Known> {
    if path.is_null() || inside::is_inside() {
        return None;
    }
    // SAFETY: the caller's.
    let known = files::known(unsafe { CStr::from_ptr(path) })?;
    // A forked child is told that it has no part in the model; it must not get another KVM in its place.
    (!inside::is_forked() || known.is_device()).then_some(known)
}

pub(crate) fn open_known(known: Known, flags: c_int) -> c_int {
    let guard = Guard::enter();
    let answer = files::open(known, flags);
    guard.answer(answer)
}

macro_rules! opening {
    ($($(#[$meta:meta])* fn $name:ident([$($before:ident: $type:ty)?] path, flags $(, $mode:ident)?);)*) => {
        $(
            $(#[$meta])*
            ///
            /// # Safety
            ///
            /// That of the C function of this name.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($before: $type,)? path: *const c_char, flags: c_int $(, $mode: c_uint)?) -> c_int {
                // SAFETY: the caller's.
                match unsafe { known(path) } {
                    Some(known) => open_known(known, flags),
                    // SAFETY: the caller's.
                    None => unsafe { real::$name($($before,)? path, flags $(, $mode)?) },
                }
            }
        )*
    };
}

opening! {
    /// `open`.
    fn open([] path, flags, mode);
    /// `open64`.
    fn open64([] path, flags, mode);
    /// `openat`.
    fn openat([directory: c_int] path, flags, mode);
    /// `openat64`.
    fn openat64([directory: c_int] path, flags, mode);
    /// `open` of programs that are compiled to be checked.
    fn __open_2([] path, flags);
    /// `open64` of such.
    fn __open64_2([] path, flags);
    /// `openat` of such.
    fn __openat_2([directory: c_int] path, flags);
    /// `openat64` of such.
    fn __openat64_2([directory: c_int] path, flags);
}

/// `uname`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn uname(name: *mut libc::utsname) -> c_int {
    // SAFETY: the caller's.
    let answer = unsafe { real::uname(name) };
    if answer == 0 && !is_out_of_play() {
        let guard = Guard::enter();
        let release = files::release();
        // SAFETY: the C library has just written to it.
        let room = unsafe { &mut (*name).release };
        for (to, from) in room.iter_mut().zip(release.bytes().chain([0])) {
            *to = from as c_char;
        }
        guard.pass(());
    }
    answer
}

/// `ioctl`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int {
    if may_be_ours(fd) {
        let guard = Guard::enter();
        if let Some(object) = objects::find(fd) {
            let answer = request::answer(&object, request as u32, argument);
            // What nobody else has any more goes while we are inside.
            drop(object);
            return guard.answer(answer.map(|value| value as c_int));
        }
        drop(guard);
    }
    // SAFETY: the caller's.
    let answer = unsafe { real::ioctl(fd, request, argument) };
    if answer == 0 && !has_nothing() {
        watch_userfaultfd(request as u32, argument);
    }
    answer
}

const UFFDIO_REGISTER: u32 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u32 = 0x8010_aa01;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// Somebody else is to bring pages, or no longer: whoever asks for one that is missing waits for them.
fn watch_userfaultfd(request: u32, argument: c_ulong) {
    if request != UFFDIO_REGISTER && request != UFFDIO_UNREGISTER {
        return;
    }
    let guard = Guard::enter();
    let mut range = [0u64; 2];
    if crate::user::read_all(argument, &mut range).is_ok() {
        let mode = crate::user::read::<u64>(argument + 16).unwrap_or(0);
        let waits = request == UFFDIO_REGISTER && mode & UFFDIO_REGISTER_MODE_MISSING != 0;
        host::process().waiting(range_of(range[0] as *mut c_void, range[1] as usize), waits);
    }
    guard.pass(());
}

fn range_of(address: *mut c_void, length: usize) -> Range<u64> {
    let start = address as u64;
    start..start.saturating_add(length as u64)
}

type Map = unsafe fn(*mut c_void, usize, c_int, c_int, c_int, i64) -> *mut c_void;

/// # Safety
///
/// That of `mmap`.
unsafe fn map(
    real: Map,
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    if has_nothing() {
        // SAFETY: the caller's.
        return unsafe { real(address, length, protection, flags, fd, offset) };
    }
    let guard = Guard::enter();
    let object = if flags & libc::MAP_ANONYMOUS == 0 { objects::find(fd) } else { None };
    let check = |object| mappings::check(&object, protection, flags, offset);
    let offset = match object.map_or(Ok(offset), check) {
        Ok(offset) => offset,
        Err(errno) => return guard.answer(Err(errno)),
    };
    // SAFETY: the caller's.
    let call = || unsafe { real(address, length, protection, flags, fd, offset) };
    let answer = if flags & libc::MAP_FIXED != 0 {
        mappings::changing(&[range_of(address, length)], call)
    } else {
        let answer = call();
        host::process().mapped();
        answer
    };
    guard.pass(answer)
}

/// `mmap`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { map(real::mmap, address, length, protection, flags, fd, offset) }
}

/// `mmap64`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { map(real::mmap64, address, length, protection, flags, fd, offset) }
}

/// Does something that changes mappings, with the model told where it has to do with it.
fn changing<T>(ranges: &[Range<u64>], call: impl FnOnce() -> T) -> T {
    if has_nothing() {
        return call();
    }
    let guard = Guard::enter();
    let answer = mappings::changing(ranges, call);
    guard.pass(answer)
}

/// `munmap`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(address: *mut c_void, length: usize) -> c_int {
    // SAFETY: the caller's.
    changing(&[range_of(address, length)], || unsafe { real::munmap(address, length) })
}

/// `mremap`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    address: *mut c_void,
    old: usize,
    new: usize,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    let place = if flags & libc::MREMAP_FIXED != 0 { range_of(to, new) } else { 0..0 };
    // SAFETY: the caller's.
    changing(&[range_of(address, old), place], || unsafe { real::mremap(address, old, new, flags, to) })
}

/// `mprotect`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(address: *mut c_void, length: usize, protection: c_int) -> c_int {
    let range = range_of(address, length);
    let end = if protection & libc::PROT_EXEC != 0 { executable_until(&range) } else { None };
    // What lies before it is changed all the same.
    let length = end.map_or(length, |end| (end - range.start) as usize);
    // SAFETY: the caller's.
    let answer =
        changing(&[range_of(address, length)], || unsafe { real::mprotect(address, length, protection) });
    if end.is_some() && answer == 0 {
        inside::set_errno(libc::EACCES);
        return -1;
    }
    answer
}

/// Where in a range the first of the model's files is mapped, if any is.
fn executable_until(range: &Range<u64>) -> Option<u64> {
    if has_nothing() {
        return None;
    }
    let guard = Guard::enter();
    let end = mappings::not_executable_from(range);
    guard.pass(end)
}

/// `madvise`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int {
    // SAFETY: the caller's.
    let call = || unsafe { real::madvise(address, length, advice) };
    if has_nothing() {
        return call();
    }
    let guard = Guard::enter();
    if advice == libc::MADV_REMOVE {
        if let Some(answer) = mappings::remove(address as u64, length as u64) {
            return guard.answer(answer.map(|()| 0));
        }
    }
    let answer = host::process().advising(address as u64, length as u64, advice, call);
    guard.pass(answer)
}

/// The file of a descriptor that is about to be closed, if it may be one of the model's.
fn about_to_close(fd: c_int) -> Option<u64> {
    if has_nothing() || fd < 0 {
        return None;
    }
    let errno = inside::errno();
    let inode = memfd::inode_of_memfd(fd);
    inside::set_errno(errno);
    inode
}

/// It has been closed, with that answer.
fn closed(inode: Option<u64>, answer: c_int) -> c_int {
    match inode {
        Some(inode) if answer >= 0 => {
            let guard = Guard::enter();
            objects::closed(inode);
            guard.pass(answer)
        }
        _ => answer,
    }
}

/// `close`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    if is_own(fd) {
        inside::set_errno(libc::EBADF);
        return -1;
    }
    let inode = about_to_close(fd);
    // SAFETY: the caller's.
    closed(inode, unsafe { real::close(fd) })
}

/// `close_range`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    // SAFETY: the caller's.
    let call = |first, last| unsafe { real::close_range(first, last, flags) };
    if first > last || is_out_of_play() {
        return call(first, last);
    }
    let guard = Guard::enter();
    let parts = own::others_in(first..=last);
    let answer = parts.into_iter().map(|part| call(*part.start(), *part.end())).find(|answer| *answer != 0);
    objects::many_closed();
    guard.pass(answer.unwrap_or(0))
}

/// Whether a descriptor is the model's own: to the program it is none.
fn is_own(fd: c_int) -> bool {
    if !own::may_be(fd) || is_out_of_play() {
        return false;
    }
    let guard = Guard::enter();
    let is_own = own::is(fd);
    guard.pass(is_own)
}

/// `closefrom`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: the caller's. As the C library does it, but for kernels that have no close_range.
    unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
}

/// `fclose`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fclose(file: *mut libc::FILE) -> c_int {
    // SAFETY: the caller's. Of what has no descriptor the number is -1.
    let inode = if has_nothing() { None } else { about_to_close(unsafe { libc::fileno(file) }) };
    // SAFETY: the caller's.
    closed(inode, unsafe { real::fclose(file) })
}

/// `dup2`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    if is_own(new) {
        inside::set_errno(libc::EBADF);
        return -1;
    }
    let inode = about_to_close(new);
    // SAFETY: the caller's.
    closed(inode, unsafe { real::dup2(old, new) })
}

/// `dup3`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    if is_own(new) {
        inside::set_errno(libc::EBADF);
        return -1;
    }
    let inode = about_to_close(new);
    // SAFETY: the caller's.
    closed(inode, unsafe { real::dup3(old, new, flags) })
}

/// Cuts or punches a file, with the model told if it is mapped.
fn change_file(
    fd: c_int,
    takes_pages: Option<(i64, i64)>,
    ours: impl FnOnce(&objects::Object) -> Result<(), Errno>,
    call: impl FnOnce() -> c_int,
) -> c_int {
    if has_nothing() {
        return call();
    }
    let guard = Guard::enter();
    if let Some(object) = objects::find(fd) {
        let answer = ours(&object);
        drop(object);
        return guard.answer(answer.map(|()| 0));
    }
    let answer = match takes_pages {
        Some((offset, length)) => host::process().file_changing(fd, offset as u64, length as u64, call),
        None => call(),
    };
    guard.pass(answer)
}

fn allocate(fd: c_int, mode: c_int, offset: i64, length: i64, call: impl FnOnce() -> c_int) -> c_int {
    let taken = mappings::takes_pages(mode).then_some((offset, length));
    change_file(fd, taken, |object| mappings::fallocate(object, mode, offset, length), call)
}

/// `fallocate`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, offset: i64, length: i64) -> c_int {
    // SAFETY: the caller's.
    allocate(fd, mode, offset, length, || unsafe { real::fallocate(fd, mode, offset, length) })
}

/// `fallocate64`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: i64, length: i64) -> c_int {
    // SAFETY: the caller's.
    allocate(fd, mode, offset, length, || unsafe { real::fallocate64(fd, mode, offset, length) })
}

/// `ftruncate`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, length: i64) -> c_int {
    // SAFETY: the caller's.
    change_file(fd, Some((length, -1)), |_| Err(Errno::EINVAL), || unsafe { real::ftruncate(fd, length) })
}

/// `ftruncate64`.
///
/// # Safety
///
/// That of the C function of this name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, length: i64) -> c_int {
    // SAFETY: the caller's.
    change_file(fd, Some((length, -1)), |_| Err(Errno::EINVAL), || unsafe { real::ftruncate64(fd, length) })
}
