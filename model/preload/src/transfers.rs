//! Reading, writing and seeking: the functions of the C library that stand before its own.
//!
//! Of the model's files only statistics can be read, and none can be written: what would go into the file that stands for one
//! would be said to be in the guest's memory. Everything else goes on to the C library untouched. `stdio` calls none of these: what
//! it reads of statistics is what they were when they were opened, or last read by a call.

use crate::guard::Guard;
use crate::inside;
use crate::interpose::may_be_ours;
use crate::mappings;
use crate::objects::{self, Object};
use crate::real;
use kvmprep_model::errno::Result;
use libc::iovec;
use std::ffi::{c_int, c_void};

/// Makes a call, unless the descriptor is one of the model's and that says no.
fn transfer(fd: c_int, before: impl FnOnce(&Object) -> Result<()>, call: impl FnOnce() -> isize) -> isize {
    if may_be_ours(fd) && !inside::is_forked() {
        let guard = Guard::enter();
        let answer = objects::find(fd).map_or(Ok(()), |object| before(&object));
        if answer.is_err() {
            return guard.answer(answer.map(|()| 0));
        }
        drop(guard);
    }
    call()
}

/// The faces: each says whether it reads or writes, and whether at an offset of the caller's.
macro_rules! transfers {
    ($($(#[$meta:meta])* fn $name:ident($($argument:ident: $type:ty),*) = $before:ident $at_offset:literal;)*) => {
        $(
            $(#[$meta])*
            ///
            /// # Safety
            ///
            /// That of the C function of this name.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(fd: c_int, $($argument: $type),*) -> isize {
                // SAFETY: the caller's.
                transfer(fd, |object| mappings::$before(object, $at_offset), || unsafe { real::$name(fd, $($argument),*) })
            }
        )*
    };
}

transfers! {
    /// `read`.
    fn read(buffer: *mut c_void, count: usize) = before_read false;
    /// `pread`.
    fn pread(buffer: *mut c_void, count: usize, offset: i64) = before_read true;
    /// `pread64`.
    fn pread64(buffer: *mut c_void, count: usize, offset: i64) = before_read true;
    /// `read` of programs that are compiled to be checked.
    fn __read_chk(buffer: *mut c_void, count: usize, size: usize) = before_read false;
    /// `pread` of such.
    fn __pread_chk(buffer: *mut c_void, count: usize, offset: i64, size: usize) = before_read true;
    /// `pread64` of such.
    fn __pread64_chk(buffer: *mut c_void, count: usize, offset: i64, size: usize) = before_read true;
    /// `readv`.
    fn readv(buffers: *const iovec, count: c_int) = before_read false;
    /// `preadv`.
    fn preadv(buffers: *const iovec, count: c_int, offset: i64) = before_read true;
    /// `preadv64`.
    fn preadv64(buffers: *const iovec, count: c_int, offset: i64) = before_read true;
    /// `write`.
    fn write(buffer: *const c_void, count: usize) = before_write false;
    /// `pwrite`.
    fn pwrite(buffer: *const c_void, count: usize, offset: i64) = before_write true;
    /// `pwrite64`.
    fn pwrite64(buffer: *const c_void, count: usize, offset: i64) = before_write true;
    /// `writev`.
    fn writev(buffers: *const iovec, count: c_int) = before_write false;
    /// `pwritev`.
    fn pwritev(buffers: *const iovec, count: c_int, offset: i64) = before_write true;
    /// `pwritev64`.
    fn pwritev64(buffers: *const iovec, count: c_int, offset: i64) = before_write true;
}

/// Seeks, where that can be done: of the model's files it moves nothing.
fn seek(fd: c_int, offset: i64, whence: c_int, call: unsafe fn(c_int, i64, c_int) -> i64) -> i64 {
    let (mut offset, mut whence) = (offset, whence);
    let answer = transfer(
        fd,
        |object| {
            (offset, whence) = (0, libc::SEEK_CUR);
            mappings::before_seek(object)
        },
        || 0,
    );
    if answer < 0 {
        return answer as i64;
    }
    // SAFETY: nothing is read or written.
    unsafe { call(fd, offset, whence) }
}

/// `lseek`.
#[unsafe(no_mangle)]
pub extern "C" fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64 {
    seek(fd, offset, whence, real::lseek)
}

/// `lseek64`.
#[unsafe(no_mangle)]
pub extern "C" fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64 {
    seek(fd, offset, whence, real::lseek64)
}
