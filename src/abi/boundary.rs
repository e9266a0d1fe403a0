//! The one boundary that every entry point goes through: pointers and structs are checked here, panics end here.

use super::error::kvmprep_error;
use crate::error::{Error, Reason, Result};
use crate::panics::{catch, panicked};
use crate::range::{Range, is_page_aligned};
use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::panic::AssertUnwindSafe;

/// More than any struct of the interface will ever have; a size beyond it is an uninitialised field.
const LARGEST_STRUCT: usize = 4096;

/// Runs an entry point's body. Its error, or that there is none, is written to `err` where that is not NULL.
///
/// # Safety
/// `err` is NULL or points to memory of a `kvmprep_error`, which need not be initialised.
pub unsafe fn boundary(err: *mut kvmprep_error, body: impl FnOnce() -> Result<c_int>) -> c_int {
    if !err.is_aligned() {
        return -libc::EINVAL;
    }
    let result = catch(AssertUnwindSafe(body)).unwrap_or_else(|| Err(panicked()));
    let (code, report) = match &result {
        Ok(value) => (*value, kvmprep_error::none()),
        Err(error) => (-error.errno, kvmprep_error::from(error)),
    };
    if !err.is_null() {
        // SAFETY: not NULL, aligned, and memory of that type by the caller's word.
        unsafe { err.write(report) };
    }
    code
}

/// A struct that C passes in and that may grow: it begins with its size in bytes, a `uint32_t`.
///
/// # Safety
/// The type is `repr(C)`, valid for any bytes, all-zero included, without implicit padding, and its first field
/// is the size.
pub unsafe trait Growing: Copy {
    /// Size of the struct's first version, in bytes.
    const FIRST: usize;
}

fn null(name: &str) -> Error {
    Error::invalid(Reason::NullPointer, format!("{name} is NULL")).hint("pass a valid pointer")
}

/// Refuses NULL and misaligned pointers.
fn check_pointer<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(null(name));
    }
    if !pointer.is_aligned() {
        return Err(Error::invalid(Reason::MisalignedPointer, format!("{name} is not aligned for its type"))
            .hint("pass the address of a variable of that type"));
    }
    Ok(())
}

/// Decodes a struct that may be of an older or a newer caller.
///
/// # Safety
/// A pointer that is neither NULL nor misaligned points to a `uint32_t` and, behind it, as many bytes as it says.
pub unsafe fn read_growing<T: Growing>(pointer: *const T, name: &str) -> Result<T> {
    check_pointer(pointer, name)?;
    // SAFETY: checked above; the first field is there by the caller's word.
    let size = unsafe { pointer.cast::<u32>().read() } as usize;
    if !(T::FIRST..=LARGEST_STRUCT).contains(&size) {
        return Err(Error::invalid(
            Reason::StructSize,
            format!("{name}->struct_size is {size}, which no version has"),
        )
        .hint("initialise the struct with its _INIT macro"));
    }
    // SAFETY: the caller's struct has `size` bytes by its own word, and a growing T is valid for any.
    unsafe { decode_bytes(std::slice::from_raw_parts(pointer.cast::<u8>(), size), name) }
}

/// Decodes a struct that the library once wrote, of `size` bytes by the caller's word: no fewer than the first version
/// that could be passed in has, and what this version does not know is zero.
///
/// # Safety
/// A pointer that is neither NULL nor misaligned points to `size` readable bytes. The type is `repr(C)` and valid for any
/// bytes.
pub unsafe fn read_sized<T: Copy>(pointer: *const T, size: usize, first: usize, name: &str) -> Result<T> {
    check_pointer(pointer, name)?;
    if !(first..=LARGEST_STRUCT).contains(&size) {
        return Err(Error::invalid(Reason::StructSize, format!("the size passed for {name} is {size}"))
            .hint("pass sizeof of the struct"));
    }
    // SAFETY: `size` bytes by the caller's word, and T is valid for any.
    unsafe { decode_bytes(std::slice::from_raw_parts(pointer.cast::<u8>(), size), name) }
}

/// The struct in `bytes`, completed with zeroes.
///
/// # Safety
/// The type is `repr(C)` and valid for any bytes.
unsafe fn decode_bytes<T: Copy>(bytes: &[u8], name: &str) -> Result<T> {
    let known = bytes.len().min(size_of::<T>());
    if bytes[known..].iter().any(|byte| *byte != 0) {
        return Err(Error::new(
            libc::E2BIG,
            Reason::StructSize,
            format!("{name} asks for what this version does not know"),
        )
        .hint("use a newer libkvmprep, or leave the newer fields zero"));
    }
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: at most T's size is copied over zeroes, and T is valid for any bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast(), known);
        Ok(value.assume_init())
    }
}

/// Writes a struct whose caller may know less or more of it: no more than `size` bytes, the unknown ones zero.
///
/// # Safety
/// A pointer that is neither NULL nor misaligned points to `size` writable bytes.
pub unsafe fn write_sized<T: Copy>(pointer: *mut T, size: usize, value: &T, name: &str) -> Result<()> {
    check_sized_out(pointer, size, name)?;
    let known = size.min(size_of::<T>());
    // SAFETY: `size` writable bytes by the caller's word; `known` readable ones of a T.
    unsafe {
        std::ptr::copy_nonoverlapping(std::ptr::from_ref(value).cast::<u8>(), pointer.cast::<u8>(), known);
        std::ptr::write_bytes(pointer.cast::<u8>().add(known), 0, size - known);
    }
    Ok(())
}

/// Refuses an array that cannot be one, without a look at its elements, which need not be initialised. Of no
/// elements, its address does not matter.
pub fn check_array<T>(pointer: *const T, n: usize, name: &str) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    check_pointer(pointer, name)?;
    if n > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Error::invalid(Reason::BadValue, format!("{name} cannot have {n} elements"))
            .hint("check where the count comes from"));
    }
    Ok(())
}

/// An array that C passes in.
///
/// # Safety
/// A pointer that is neither NULL nor misaligned points to `n` initialised elements that live through the call.
pub unsafe fn slice<'a, T>(pointer: *const T, n: usize, name: &str) -> Result<&'a [T]> {
    check_array(pointer, n, name)?;
    if n == 0 {
        return Ok(&[]);
    }
    // SAFETY: not NULL, aligned, of a possible size; the rest by the caller's word.
    Ok(unsafe { std::slice::from_raw_parts(pointer, n) })
}

/// A struct or handle that C passes in.
///
/// # Safety
/// A pointer that is neither NULL nor misaligned points to an initialised `T` that lives through the call.
pub unsafe fn reference<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    check_pointer(pointer, name)?;
    // SAFETY: checked above; the rest by the caller's word.
    Ok(unsafe { &*pointer })
}

/// A place for a result.
///
/// # Safety
/// A pointer that is neither NULL nor misaligned points to writable memory of a `T`.
pub unsafe fn write<T>(pointer: *mut T, value: T, name: &str) -> Result<()> {
    check_pointer(pointer, name)?;
    // SAFETY: checked above; the rest by the caller's word.
    unsafe { pointer.write(value) };
    Ok(())
}

/// Refuses a place for a result that could not be written, before anything is done.
pub fn check_out<T>(pointer: *mut T, name: &str) -> Result<()> {
    check_pointer(pointer.cast_const(), name)
}

/// As [`check_out`], for a result whose caller says its size.
pub fn check_sized_out<T>(pointer: *mut T, size: usize, name: &str) -> Result<()> {
    check_out(pointer, name)?;
    if size == 0 || size > LARGEST_STRUCT {
        return Err(Error::invalid(Reason::StructSize, format!("the size passed for {name} is {size}"))
            .hint("pass sizeof of the struct"));
    }
    Ok(())
}

/// As [`check_sized_out`], for a result that may be left out with NULL.
pub fn check_optional_out<T>(pointer: *mut T, size: usize, name: &str) -> Result<()> {
    if pointer.is_null() { Ok(()) } else { check_sized_out(pointer, size, name) }
}

/// A descriptor, or `None` for -1 where one may be left out.
pub fn optional_fd(fd: c_int, name: &str) -> Result<Option<RawFd>> {
    match fd {
        -1 => Ok(None),
        ..-1 => Err(bad_fd(fd, name)),
        _ => Ok(Some(fd)),
    }
}

/// A descriptor.
pub fn required_fd(fd: c_int, name: &str) -> Result<RawFd> {
    if fd < 0 { Err(bad_fd(fd, name)) } else { Ok(fd) }
}

fn bad_fd(fd: c_int, name: &str) -> Error {
    Error::new(libc::EBADF, Reason::BadFd, format!("{name} is {fd}, which is no descriptor"))
        .hint("pass an open file descriptor")
}

/// Refuses flags that are not known.
pub fn check_flags(flags: u32, known: u32, name: &str) -> Result<()> {
    if flags & !known != 0 {
        return Err(Error::invalid(
            Reason::UnknownFlags,
            format!("{name} has unknown bits {:#x}", flags & !known),
        )
        .hint("pass only flags that kvmprep.h defines"));
    }
    Ok(())
}

/// Refuses reserved space that is not zero.
pub fn check_reserved(is_zero: bool, name: &str) -> Result<()> {
    if is_zero {
        return Ok(());
    }
    Err(Error::invalid(Reason::ReservedNotZero, format!("reserved space of {name} is not zero"))
        .hint("initialise the struct, with its _INIT macro or with zeroes"))
}

/// A guest range from its start and size in bytes.
pub fn range(gpa: u64, size: u64) -> Result<Range> {
    checked_range("guest", gpa, size)
}

/// Checks a range of this process's memory, by the same rules.
pub fn host_range(memory: *const c_void, size: usize) -> Result<Range> {
    checked_range("host", memory as u64, size as u64)
}

fn checked_range(whose: &str, start: u64, size: u64) -> Result<Range> {
    let wrong = |reason, message: String| Error::invalid(reason, message);
    if size == 0 {
        return Err(wrong(Reason::RangeEmpty, format!("the {whose} range at {start:#x} is empty"))
            .hint("leave empty ranges out"));
    }
    if !is_page_aligned(start | size) {
        return Err(wrong(
            Reason::RangeUnaligned,
            format!("the {whose} range at {start:#x} of {size:#x} bytes is not a multiple of 4096"),
        )
        .hint("align its start and size to 4096 bytes"));
    }
    Range::new(start, size).ok_or_else(|| {
        wrong(Reason::RangeOverflow, format!("the {whose} range at {start:#x} of {size:#x} bytes wraps"))
            .hint("check where the range comes from")
    })
}

/// An opaque pointer that travels with a callback of the caller's.
#[derive(Clone, Copy)]
pub struct Opaque(pub *mut c_void);

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Example {
        struct_size: u32,
        first: u32,
        added_later: u64,
    }

    // SAFETY: repr(C), integers only, no padding, the size first.
    unsafe impl Growing for Example {
        const FIRST: usize = 8;
    }

    fn decode(bytes: &[u64]) -> Result<Example> {
        // SAFETY: each test passes at least as many bytes as the size in them says.
        unsafe { read_growing(bytes.as_ptr().cast(), "example") }
    }

    fn first_word(size: u32, value: u32) -> u64 {
        u64::from(size) | u64::from(value) << 32
    }

    #[test]
    fn an_older_struct_is_completed_with_zeroes() {
        let example = decode(&[first_word(8, 7), 99]).unwrap();
        assert_eq!(example, Example { struct_size: 8, first: 7, added_later: 0 });
    }

    #[test]
    fn a_newer_struct_works_while_its_news_are_zero() {
        assert_eq!(decode(&[first_word(24, 7), 9, 0]).unwrap().added_later, 9);
        let error = decode(&[first_word(24, 7), 9, 1]).unwrap_err();
        assert_eq!((error.errno, error.reason), (libc::E2BIG, Reason::StructSize));
    }

    #[test]
    fn an_uninitialised_struct_is_refused() {
        for size in [0, 4, 5000, u32::MAX] {
            assert_eq!(decode(&[first_word(size, 0), 0]).unwrap_err().errno, libc::EINVAL, "size {size}");
        }
    }

    #[test]
    fn output_stays_within_its_size_and_is_zero_beyond_what_is_known() {
        let value = Example { struct_size: 1, first: 2, added_later: 3 };
        let mut buffer = [u64::MAX; 4];
        // SAFETY: the buffer has 32 bytes.
        unsafe { write_sized(buffer.as_mut_ptr().cast(), 8, &value, "example") }.unwrap();
        assert_eq!(buffer, [first_word(1, 2), u64::MAX, u64::MAX, u64::MAX]);
        // SAFETY: the buffer has 32 bytes.
        unsafe { write_sized(buffer.as_mut_ptr().cast(), 24, &value, "example") }.unwrap();
        assert_eq!(buffer, [first_word(1, 2), 3, 0, u64::MAX]);
    }

    #[test]
    fn a_panic_becomes_an_error() {
        let mut err = kvmprep_error::none();
        // SAFETY: err is a live kvmprep_error.
        let code = unsafe { boundary(&mut err, || panic!("caught")) };
        assert_eq!((code, err.reason), (-libc::ENOTRECOVERABLE, Reason::Panicked as u32));
    }
}
