//! The system calls by which the model looks at the process that it is in, and touches its memory.
//!
//! This is the floor: what is unsafe about the host is here. Memory of the program's is touched through the kernel alone, so that
//! what is gone is an error and never a signal. Calls go to the kernel itself, never to a function that is interposed.

use std::ffi::{c_int, c_long, c_ulong, c_void};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::ops::Range;
use std::os::fd::RawFd;

use kvmprep_model::units::{Level, PAGE_SIZE};

/// `struct pm_scan_arg` (linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` (linux/fs.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `PAGE_IS_FILE`, `PAGE_IS_PRESENT` and `PAGE_IS_HUGE`.
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_HUGE: u64 = 1 << 6;
const PAGEMAP_SCAN: c_ulong = readwrite(16, size_of::<ScanArgument>());

/// `struct procmap_query` (linux/fs.h).
#[repr(C)]
#[derive(Default)]
pub struct MappingQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    /// The first address.
    pub vma_start: u64,
    /// The one after the last.
    pub vma_end: u64,
    /// `PROCMAP_QUERY_VMA_*`: readable, writable, executable, shared.
    pub vma_flags: u64,
    /// The size of its pages.
    pub vma_page_size: u64,
    /// Where in its file it begins.
    pub vma_offset: u64,
    /// The file's number.
    pub inode: u64,
    /// Its device.
    pub dev_major: u32,
    /// Its device.
    pub dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const PROCMAP_QUERY: c_ulong = readwrite(17, size_of::<MappingQuery>());

/// `_IOWR('f', number, ...)`.
const fn readwrite(number: c_ulong, size: usize) -> c_ulong {
    3 << 30 | (size as c_ulong) << 16 | (b'f' as c_ulong) << 8 | number
}

fn answer(result: c_long) -> io::Result<c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Reads words of a file, as many as there are; says how many.
pub fn read_words(fd: RawFd, offset: u64, words: &mut [u64]) -> io::Result<usize> {
    let size = size_of_val(words);
    // SAFETY: there is room for that many bytes, and any are words.
    let read = answer(unsafe { libc::syscall(libc::SYS_pread64, fd, words.as_mut_ptr(), size, offset) })?;
    Ok(read as usize / size_of::<u64>())
}

/// Reads a file of /proc from its beginning.
pub fn read_text(fd: RawFd) -> io::Result<String> {
    let mut text = Vec::new();
    loop {
        text.reserve(64 << 10);
        let room = text.spare_capacity_mut();
        let (to, size) = (room.as_mut_ptr(), room.len());
        // SAFETY: there is room for that many bytes.
        let read = answer(unsafe { libc::syscall(libc::SYS_pread64, fd, to, size, text.len()) })? as usize;
        if read == 0 {
            return Ok(String::from_utf8_lossy(&text).into_owned());
        }
        // SAFETY: so many were just written.
        unsafe { text.set_len(text.len() + read) };
    }
}

/// Whether the page at an address is mapped by an entry of a higher level. Fails before Linux 6.7.
pub fn is_mapped_huge(pagemap: RawFd, address: u64) -> io::Result<bool> {
    let mut region = Region::default();
    let mut argument = ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        start: address,
        end: address + PAGE_SIZE,
        vec: &raw mut region as u64,
        vec_len: 1,
        category_mask: PAGE_IS_PRESENT,
        return_mask: PAGE_IS_HUGE,
        ..ScanArgument::default()
    };
    // SAFETY: the argument is as the kernel wants it, and there is room for one region.
    answer(unsafe { libc::syscall(libc::SYS_ioctl, pagemap, PAGEMAP_SCAN, &raw mut argument) })?;
    Ok(region.categories & PAGE_IS_HUGE != 0)
}

/// The parts of a range in which pages are present that are no file's. Fails before Linux 6.7.
pub fn anonymous_parts(pagemap: RawFd, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut parts = Vec::new();
    let mut start = range.start;
    while start < range.end {
        let mut regions = [Region::default(); 64];
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start,
            end: range.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: PAGE_IS_FILE,
            category_mask: PAGE_IS_PRESENT | PAGE_IS_FILE,
            return_mask: PAGE_IS_PRESENT,
            ..ScanArgument::default()
        };
        // SAFETY: the argument is as the kernel wants it, and there is room for as many regions as it says.
        let found =
            answer(unsafe { libc::syscall(libc::SYS_ioctl, pagemap, PAGEMAP_SCAN, &raw mut argument) })?;
        parts.extend(regions[..found as usize].iter().map(|region| region.start..region.end));
        start = argument.walk_end;
    }
    Ok(parts)
}

/// The mapping around an address; ENOENT where there is none. Fails before Linux 6.11.
pub fn query_mapping(maps: RawFd, address: u64) -> io::Result<MappingQuery> {
    let mut query = MappingQuery {
        size: size_of::<MappingQuery>() as u64,
        query_addr: address,
        ..MappingQuery::default()
    };
    // SAFETY: the argument is as the kernel wants it, and asks for nothing that is written elsewhere.
    answer(unsafe { libc::syscall(libc::SYS_ioctl, maps, PROCMAP_QUERY, &raw mut query) })?;
    Ok(query)
}

/// The devices of memfds, with the sizes of their pages.
pub fn devices_of_memfds() -> Vec<((u32, u32), u64)> {
    let sizes = [(0, Level::SMALL), (21 << 26, Level::HUGE), (30 << 26, Level::GIGANTIC)];
    let device = |(size_flag, level): (u32, Level)| {
        let kind = if level == Level::SMALL { 0 } else { libc::MFD_HUGETLB | size_flag };
        let flags = libc::MFD_CLOEXEC | kind;
        // SAFETY: the name ends with a zero.
        let fd = answer(unsafe { libc::syscall(libc::SYS_memfd_create, c"kvmprep".as_ptr(), flags) }).ok()?;
        let file = device_and_inode(fd as RawFd);
        // SAFETY: it was just opened, by us.
        unsafe { libc::syscall(libc::SYS_close, fd) };
        Some((file.ok()?.0, level.pages() * PAGE_SIZE))
    };
    sizes.into_iter().filter_map(device).collect()
}

/// Of what a descriptor is open to, the device and number.
pub fn device_and_inode(fd: RawFd) -> io::Result<((u32, u32), u64)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: there is room for what is written.
    answer(unsafe { libc::syscall(libc::SYS_fstat, fd, stat.as_mut_ptr()) })?;
    // SAFETY: it was just written.
    let stat = unsafe { stat.assume_init() };
    Ok(((libc::major(stat.st_dev), libc::minor(stat.st_dev)), stat.st_ino))
}

/// Whether addresses up to this one are a process's. Asked with a call that looks at that first, and then fails.
pub fn is_user_range(end: u64) -> bool {
    // SAFETY: nothing is ever written to the last page of all, which no process has.
    let answer = answer(unsafe { libc::syscall(libc::SYS_mincore, 0u64, end, -4096i64) });
    answer.is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT))
}

/// Has the kernel fault a page of the program's in (`MADV_POPULATE_*`).
pub fn populate(address: u64, write: bool) -> io::Result<()> {
    let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    // SAFETY: what is there already is left as it is, and nobody relies on there being nothing.
    answer(unsafe { libc::syscall(libc::SYS_madvise, address, PAGE_SIZE, advice) }).map(drop)
}

/// Reads the program's memory.
pub fn read_memory(address: u64, bytes: &mut [u8]) -> io::Result<()> {
    let ours = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let theirs = libc::iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: there is room for what is read, and the kernel looks whether it is there.
    let copied =
        unsafe { libc::process_vm_readv(libc::getpid(), &raw const ours, 1, &raw const theirs, 1, 0) };
    whole(copied, bytes.len())
}

/// Writes the program's memory, as a device of the guest's would.
pub fn write_memory(address: u64, bytes: &[u8]) -> io::Result<()> {
    let ours = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let theirs = libc::iovec { iov_base: address as *mut c_void, iov_len: bytes.len() };
    // SAFETY: ours is only read. Theirs is the guest's as much as the program's: what is written there, the program has
    // given the guest to write.
    let copied =
        unsafe { libc::process_vm_writev(libc::getpid(), &raw const ours, 1, &raw const theirs, 1, 0) };
    whole(copied, bytes.len())
}

fn whole(copied: isize, size: usize) -> io::Result<()> {
    match answer(copied as c_long)? as usize {
        copied if copied == size => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

/// Reads a file of the model's own. What is a hole is zero.
pub fn read_file(fd: RawFd, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: there is room for that many bytes.
    answer(unsafe { libc::syscall(libc::SYS_pread64, fd, bytes.as_mut_ptr(), bytes.len(), offset) }).map(drop)
}

/// Writes a file of the model's own.
pub fn write_file(fd: RawFd, offset: u64, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: that many bytes are there.
    answer(unsafe { libc::syscall(libc::SYS_pwrite64, fd, bytes.as_ptr(), bytes.len(), offset) }).map(drop)
}

/// The parts of a file of the model's own in which there is anything.
pub fn parts_of_file(fd: RawFd, bytes: &Range<u64>) -> Vec<Range<u64>> {
    let mut parts = Vec::new();
    let mut at = bytes.start;
    // SAFETY: nothing is read or written, and nobody uses where the file stands.
    let seek = |from: u64, whence: c_int| answer(unsafe { libc::syscall(libc::SYS_lseek, fd, from, whence) });
    while at < bytes.end {
        // Behind the last there is no other.
        let Ok(start) = seek(at, libc::SEEK_DATA) else { break };
        let Ok(end) = seek(start as u64, libc::SEEK_HOLE) else { break };
        let part = start as u64..bytes.end.min(end as u64);
        if !part.is_empty() {
            parts.push(part);
        }
        at = end as u64;
    }
    parts
}

/// Gives a part of a file of the model's own back.
pub fn punch(fd: RawFd, offset: u64, length: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: whoever has it mapped is told by the caller.
    answer(unsafe { libc::syscall(libc::SYS_fallocate, fd, mode, offset, length) }).map(drop)
}

/// Changes which signals the thread lets through (`SIG_BLOCK`, `SIG_SETMASK`); answers with those that it held back before.
pub fn change_signal_mask(how: c_int, mask: u64) -> u64 {
    let mut before = 0u64;
    let (new, old) = (&raw const mask, &raw mut before);
    // SAFETY: both are masks of the size that is said.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, new, old, size_of::<u64>()) };
    before
}

/// The signals that are held back.
pub fn pending_signals() -> u64 {
    let mut pending = 0u64;
    // SAFETY: there is room for a mask of the size that is said.
    unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut pending, size_of::<u64>()) };
    pending
}

/// What happens at a signal: a handler's address, `SIG_DFL` or `SIG_IGN`.
pub fn disposition(signal: c_int) -> usize {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: nothing is changed, and there is room for what is written.
    unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: it was written, or is zeroes, which is an action too.
    unsafe { action.assume_init() }.sa_sigaction
}

/// `siginfo_t` of memory that has failed.
#[repr(C)]
struct MemoryFailed {
    signal: c_int,
    errno: c_int,
    code: c_int,
    address: u64,
    address_bits: u16,
    _rest: [u64; 12],
}

/// Sends the calling thread what the kernel sends to who uses memory that has failed (`BUS_MCEERR_AR`).
pub fn send_memory_failed(address: u64) {
    let info = MemoryFailed {
        signal: libc::SIGBUS,
        errno: 0,
        code: libc::BUS_MCEERR_AR,
        address,
        address_bits: PAGE_SIZE.trailing_zeros() as u16,
        _rest: [0; 12],
    };
    // SAFETY: it is as large as the kernel's. A thread may send itself what it likes.
    unsafe {
        let thread = libc::syscall(libc::SYS_gettid);
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, libc::getpid(), thread, libc::SIGBUS, &raw const info);
    }
}
