//! The functions that the model stands in front of: each by its next definition in the program, the C library's own as a rule.
//!
//! They are looked up once, when the library is loaded, since looking up is nothing for a signal handler to do. Nothing here
//! asks whether a descriptor is one of the model's.

use std::ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// The next definition of a function; ends the program where there is none, which cannot be if somebody calls it.
fn next(name: &'static CStr) -> *mut c_void {
    // SAFETY: the name ends with a zero.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    if found.is_null() {
        crate::say::end(format_args!("the C library has no {}", name.to_string_lossy()));
    }
    found
}

macro_rules! next_definitions {
    ($($(#[$meta:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $answer:ty;)*) => {
        $(
            $(#[$meta])*
            ///
            /// # Safety
            ///
            /// That of the C function of this name.
            pub unsafe fn $name($($argument: $type),*) -> $answer {
                static NEXT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
                let mut function = NEXT.load(Ordering::Relaxed);
                if function.is_null() {
                    const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => panic!("a name with a zero in it"),
                    };
                    function = next(NAME);
                    NEXT.store(function, Ordering::Relaxed);
                }
                // SAFETY: the C function of this name has this type; on x86-64 that is so too of those that take more or
                // fewer arguments as they are called.
                let function: unsafe extern "C" fn($($type),*) -> $answer = unsafe { std::mem::transmute(function) };
                // SAFETY: the caller's.
                unsafe { function($($argument),*) }
            }
        )*
    };
}

next_definitions! {
    /// `open`.
    fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    /// `open64`.
    fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    /// `openat`.
    fn openat(directory: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    /// `openat64`.
    fn openat64(directory: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    /// `open` of programs that are compiled to be checked.
    fn __open_2(path: *const c_char, flags: c_int) -> c_int;
    /// `open64` of such.
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int;
    /// `openat` of such.
    fn __openat_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int;
    /// `openat64` of such.
    fn __openat64_2(directory: c_int, path: *const c_char, flags: c_int) -> c_int;
    /// `ioctl`.
    fn ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int;
    /// `mmap`.
    fn mmap(address: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    /// `mmap64`.
    fn mmap64(address: *mut c_void, length: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    /// `munmap`.
    fn munmap(address: *mut c_void, length: usize) -> c_int;
    /// `mremap`.
    fn mremap(address: *mut c_void, old: usize, new: usize, flags: c_int, to: *mut c_void) -> *mut c_void;
    /// `madvise`.
    fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
    /// `mprotect`.
    fn mprotect(address: *mut c_void, length: usize, protection: c_int) -> c_int;
    /// `close`.
    fn close(fd: c_int) -> c_int;
    /// `close_range`.
    fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int;
    /// `dup2`.
    fn dup2(old: c_int, new: c_int) -> c_int;
    /// `dup3`.
    fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int;
    /// `fallocate`.
    fn fallocate(fd: c_int, mode: c_int, offset: i64, length: i64) -> c_int;
    /// `fallocate64`.
    fn fallocate64(fd: c_int, mode: c_int, offset: i64, length: i64) -> c_int;
    /// `ftruncate`.
    fn ftruncate(fd: c_int, length: i64) -> c_int;
    /// `ftruncate64`.
    fn ftruncate64(fd: c_int, length: i64) -> c_int;
    /// `read`.
    fn read(fd: c_int, buffer: *mut c_void, count: usize) -> isize;
    /// `pread`.
    fn pread(fd: c_int, buffer: *mut c_void, count: usize, offset: i64) -> isize;
    /// `pread64`.
    fn pread64(fd: c_int, buffer: *mut c_void, count: usize, offset: i64) -> isize;
    /// `read` of programs that are compiled to be checked.
    fn __read_chk(fd: c_int, buffer: *mut c_void, count: usize, size: usize) -> isize;
    /// `pread` of such.
    fn __pread_chk(fd: c_int, buffer: *mut c_void, count: usize, offset: i64, size: usize) -> isize;
    /// `pread64` of such.
    fn __pread64_chk(fd: c_int, buffer: *mut c_void, count: usize, offset: i64, size: usize) -> isize;
    /// `readv`.
    fn readv(fd: c_int, buffers: *const libc::iovec, count: c_int) -> isize;
    /// `preadv`.
    fn preadv(fd: c_int, buffers: *const libc::iovec, count: c_int, offset: i64) -> isize;
    /// `preadv64`.
    fn preadv64(fd: c_int, buffers: *const libc::iovec, count: c_int, offset: i64) -> isize;
    /// `write`.
    fn write(fd: c_int, buffer: *const c_void, count: usize) -> isize;
    /// `pwrite`.
    fn pwrite(fd: c_int, buffer: *const c_void, count: usize, offset: i64) -> isize;
    /// `pwrite64`.
    fn pwrite64(fd: c_int, buffer: *const c_void, count: usize, offset: i64) -> isize;
    /// `writev`.
    fn writev(fd: c_int, buffers: *const libc::iovec, count: c_int) -> isize;
    /// `pwritev`.
    fn pwritev(fd: c_int, buffers: *const libc::iovec, count: c_int, offset: i64) -> isize;
    /// `pwritev64`.
    fn pwritev64(fd: c_int, buffers: *const libc::iovec, count: c_int, offset: i64) -> isize;
    /// `lseek`.
    fn lseek(fd: c_int, offset: i64, whence: c_int) -> i64;
    /// `lseek64`.
    fn lseek64(fd: c_int, offset: i64, whence: c_int) -> i64;
    /// `access`.
    fn access(path: *const c_char, mode: c_int) -> c_int;
    /// `eaccess`.
    fn eaccess(path: *const c_char, mode: c_int) -> c_int;
    /// `euidaccess`.
    fn euidaccess(path: *const c_char, mode: c_int) -> c_int;
    /// `faccessat`.
    fn faccessat(directory: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int;
    /// `stat`.
    fn stat(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// `stat64`.
    fn stat64(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// `lstat`.
    fn lstat(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// `lstat64`.
    fn lstat64(path: *const c_char, status: *mut libc::stat) -> c_int;
    /// `fstatat`.
    fn fstatat(directory: c_int, path: *const c_char, status: *mut libc::stat, flags: c_int) -> c_int;
    /// `fstatat64`.
    fn fstatat64(directory: c_int, path: *const c_char, status: *mut libc::stat, flags: c_int) -> c_int;
    /// `statx`.
    fn statx(directory: c_int, path: *const c_char, flags: c_int, mask: c_uint, status: *mut libc::statx) -> c_int;
    /// `fopen`.
    fn fopen(path: *const c_char, mode: *const c_char) -> *mut libc::FILE;
    /// `fopen64`.
    fn fopen64(path: *const c_char, mode: *const c_char) -> *mut libc::FILE;
    /// `fclose`.
    fn fclose(file: *mut libc::FILE) -> c_int;
    /// `uname`.
    fn uname(name: *mut libc::utsname) -> c_int;
    /// `syscall`, which is never interposed.
    fn syscall(number: c_long, a: c_ulong, b: c_ulong, c: c_ulong) -> c_long;
}

/// Looks the functions up that are called in signal handlers, too.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_UP: extern "C" fn() = {
    extern "C" fn look_up() {
        // SAFETY: none of these does anything but fail.
        unsafe {
            close(-1);
            read(-1, std::ptr::null_mut(), 0);
            write(-1, std::ptr::null(), 0);
            lseek(-1, 0, 0);
            access(c"".as_ptr(), 0);
            stat(c"".as_ptr(), std::ptr::null_mut());
            dup2(-1, -1);
        }
    }
    look_up
};
