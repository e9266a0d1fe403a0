//! The real kernel: the library's only system calls.
//!
//! Each function is safe for any argument, since what the kernel does with a wrong descriptor or address is to
//! refuse it. Those that give memory up (discard, remove, punch) take the content of what they are told, which must be
//! guest memory that its VMM wants to be rid of, and the firmware may correct what it is to put into a guest's image;
//! nothing else here changes memory that is not the library's own.

use super::uapi::*;
use super::{
    Access, Errno, ExitRequest, FileId, FileKind, FileStatus, HugePagesDisabled, ImagePages, Kernel,
    Launched, MappedObject, Mapping, Region, Stats, Sys, caps, ioctls, maps,
};
use crate::range::{HUGE, PAGE, Range};
use libc::{c_int, c_void};
use once_cell::sync::OnceCell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

pub(super) fn last_errno() -> Errno {
    Errno(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

fn check(result: c_int) -> Sys<c_int> {
    if result < 0 { Err(last_errno()) } else { Ok(result) }
}

/// An ioctl that reads or writes one structure, in which there is no pointer.
#[cfg(target_arch = "x86_64")]
pub(super) fn ioctl<T>(fd: RawFd, request: libc::c_ulong, argument: &mut T) -> Sys<()> {
    ioctl_answer(fd, request, argument).map(drop)
}

/// The same, of one that answers with a number too.
#[cfg(target_arch = "x86_64")]
pub(super) fn ioctl_answer<T>(fd: RawFd, request: libc::c_ulong, argument: &mut T) -> Sys<c_int> {
    // SAFETY: the size encoded in each request that comes here is T's, and the kernel touches no more than that.
    check(unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) })
}

/// An ioctl whose argument and answer are numbers.
#[cfg(target_arch = "x86_64")]
pub(super) fn ioctl_value(fd: RawFd, request: libc::c_ulong, argument: libc::c_ulong) -> Sys<u32> {
    // SAFETY: no memory is passed.
    check(unsafe { libc::ioctl(fd, request, argument) }).map(|value| value as u32)
}

/// Blocks, for the calling thread, every signal but those a fault of its own raises. Returns a guard that puts
/// the old mask back: a thread started meanwhile is born with the signals blocked, without a gap.
pub fn block_asynchronous_signals() -> impl Drop {
    struct Restore(libc::sigset_t);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: the mask is one that the kernel gave.
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, std::ptr::null_mut()) };
        }
    }
    // SAFETY: both sets are initialised by sigfillset before use, or written by the kernel.
    unsafe {
        let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        for synchronous in
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS]
        {
            libc::sigdelset(&mut all, synchronous);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        Restore(old)
    }
}

/// The kernel this process runs on. Files of `/proc/self` are opened once, when first needed or before, and belong to
/// the handle; they are close-on-exec.
#[derive(Default)]
pub struct Linux {
    maps: OnceCell<File>,
    smaps: OnceCell<File>,
    pagemap: OnceCell<File>,
    /// Whether a mapping can be asked for.
    has_query: OnceCell<bool>,
    release: OnceCell<[u32; 3]>,
}

/// The release in which a write to the huge zero page began to make a huge page of its own.
const HUGE_ZERO_PAGE_BECOMES_HUGE: [u32; 3] = [6, 13, 0];
/// `PR_THP_DISABLE_EXCEPT_ADVISED`, as `PR_GET_THP_DISABLE` returns it.
const THP_DISABLED_EXCEPT_ADVISED: c_int = 3;

const MAPS: &str = "/proc/self/maps";
const SMAPS: &str = "/proc/self/smaps";
const PAGEMAP: &str = "/proc/self/pagemap";

/// `MADV_DONTNEED_LOCKED`, Linux 5.18.
const MADV_DONTNEED_LOCKED: c_int = 24;

/// Room for a mapping's name, in bytes.
const MAPPING_NAME: usize = 256;

fn open(path: &str) -> Sys<File> {
    File::open(path).map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))
}

/// Refuses what is no descriptor, or only names a file (O_PATH), which is none to KVM, nor to whatever files are for.
fn check_open(fd: RawFd) -> Sys<()> {
    // SAFETY: asks for flags.
    match check(unsafe { libc::fcntl(fd, libc::F_GETFL) })? & libc::O_PATH {
        0 => Ok(()),
        _ => Err(Errno(libc::EBADF)),
    }
}

/// The whole content of a file, of whose position nothing is known: many may read it at once.
fn read_from_start(file: &File) -> Sys<Vec<u8>> {
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    loop {
        match file.read_at(&mut part, bytes.len() as u64) {
            Ok(0) => return Ok(bytes),
            Ok(n) => bytes.extend_from_slice(&part[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Errno(error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }
}

/// Whether the kernel just said that it does not know this request.
fn is_unknown(errno: Errno) -> bool {
    matches!(errno.0, libc::ENOTTY | libc::EINVAL | libc::ENOSYS)
}

/// Where user addresses end, as the kernel's own check has it: below 2^47 or 2^56 by the page tables in use, and some
/// releases take more. The kernel is asked with a call that does nothing: mincore looks at its range by that very check
/// first, and at where to write, which is here no address at all, next.
fn user_addresses_end() -> u64 {
    let is_user = |end: u64| {
        // SAFETY: nothing is ever written to the last page of all, which no process has.
        let answer = unsafe { libc::mincore(std::ptr::null_mut(), end as usize, -4096isize as *mut u8) };
        check(answer) == Err(Errno(libc::EFAULT))
    };
    if !is_user(PAGE) {
        return super::USER_ADDRESSES_END;
    }
    // Pages: `user` is taken, `beyond` is not.
    let (mut user, mut beyond) = (1, u64::MAX / PAGE);
    while beyond - user > 1 {
        let middle = user + (beyond - user) / 2;
        if is_user(middle * PAGE) {
            user = middle;
        } else {
            beyond = middle;
        }
    }
    user * PAGE
}

impl Linux {
    /// With the files of `/proc/self` open already, where they can be: a VMM may lose the right to them, or the sight
    /// of them, when it drops its privileges.
    pub fn with_open_files() -> Self {
        let linux = Self::default();
        let _ = linux.maps.get_or_try_init(|| open(MAPS));
        let _ = linux.smaps.get_or_try_init(|| open(SMAPS));
        let _ = linux.pagemap.get_or_try_init(|| open(PAGEMAP));
        linux
    }

    fn release(&self) -> [u32; 3] {
        *self.release.get_or_init(|| caps::release(self))
    }

    fn mapping_by_query(&self, hva: u64) -> Sys<Option<Mapping>> {
        let file = self.maps.get_or_try_init(|| open(MAPS))?;
        let mut name = [0u8; MAPPING_NAME];
        let mut query = procmap_query {
            size: size_of::<procmap_query>() as u64,
            query_flags: PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
            query_addr: hva,
            vma_name_size: name.len() as u32,
            vma_name_addr: name.as_mut_ptr() as u64,
            ..Default::default()
        };
        let ask = |query: &mut procmap_query| {
            // SAFETY: the kernel writes the structure, and of `name`, which lives across the call, no more than
            // the size in it says.
            check(unsafe { libc::ioctl(file.as_raw_fd(), PROCMAP_QUERY, std::ptr::from_mut(query)) })
        };
        match ask(&mut query) {
            Err(Errno(libc::ENOENT)) => return Ok(None),
            Err(Errno(libc::ENAMETOOLONG)) => {
                // A name that long is some file's; none of the names looked for is.
                query.vma_name_size = 0;
                query.vma_name_addr = 0;
                ask(&mut query)?;
            }
            other => drop(other?),
        }
        let length = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        let name = String::from_utf8_lossy(&name[..length]);
        Ok(Some(Mapping {
            start: query.vma_start,
            end: query.vma_end,
            offset: query.vma_offset,
            inode: query.inode,
            readable: query.vma_flags & PROCMAP_QUERY_VMA_READABLE != 0,
            writable: query.vma_flags & PROCMAP_QUERY_VMA_WRITABLE != 0,
            shared: query.vma_flags & PROCMAP_QUERY_VMA_SHARED != 0,
            on_mount: maps::is_on_mount(&name, query.inode),
            page_size: query.vma_page_size,
            object: maps::object(&name, query.inode, query.vma_page_size),
        }))
    }

    fn read_mappings(&self) -> Sys<Vec<Mapping>> {
        Ok(maps::parse(&self.read_file(MAPS)?))
    }

    /// The first run of pages in `[start, end)` of those categories: all of `mask`, but none of `without`, which it
    /// holds too, and one of `any` at least.
    fn scan(&self, start: u64, end: u64, mask: u64, without: u64, any: u64) -> Sys<Option<(u64, u64)>> {
        let pagemap = self.pagemap.get_or_try_init(|| open(PAGEMAP))?;
        let mut region = page_region::default();
        let mut scan = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            start,
            end,
            vec: std::ptr::from_mut(&mut region) as u64,
            vec_len: 1,
            category_inverted: without,
            category_mask: mask,
            category_anyof_mask: any,
            return_mask: PAGE_IS_PRESENT,
            ..Default::default()
        };
        // SAFETY: the kernel writes at most one page_region to `vec`, which lives across the call.
        let found = check(unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &mut scan) })?;
        Ok((found > 0).then_some((region.start, region.end)))
    }

    /// The same, where not being able to tell is no error.
    fn scan_if_known(&self, start: u64, end: u64, without: u64, any: u64) -> Sys<Option<(u64, u64)>> {
        match self.scan(start, end, PAGE_IS_HUGE, without, any) {
            Err(errno) if is_unknown(errno) => Ok(None),
            answer => answer,
        }
    }

    fn resident_by_pagemap(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        let pagemap = self.pagemap.get_or_try_init(|| open(PAGEMAP))?;
        let mut run: Option<(u64, u64)> = None;
        let mut words = [0u64; 64];
        let mut at = start;
        while at < end {
            let count = ((end - at) / PAGE).min(words.len() as u64) as usize;
            // SAFETY: `words` has room for what is asked.
            let read = unsafe {
                libc::pread(
                    pagemap.as_raw_fd(),
                    words.as_mut_ptr() as *mut c_void,
                    count * 8,
                    (at / PAGE * 8) as i64,
                )
            };
            match read {
                ..0 => return Err(last_errno()),
                0..8 => break,
                _ => {}
            }
            for word in &words[..read as usize / 8] {
                match (&mut run, word & PAGEMAP_PRESENT != 0) {
                    (None, true) => run = Some((at, at + PAGE)),
                    (Some((_, end)), true) => *end = at + PAGE,
                    (Some(_), false) => return Ok(run),
                    (None, false) => {}
                }
                at += PAGE;
            }
        }
        Ok(run)
    }
}

impl Kernel for Linux {
    fn check_extension(&self, fd: RawFd, capability: u32) -> Sys<u32> {
        ioctls::check_extension(fd, capability)
    }

    fn disable_quirks(&self, vm: RawFd, mask: u64) -> Sys<()> {
        ioctls::disable_quirks(vm, mask)
    }

    fn set_region(&self, vm: RawFd, region: &Region) -> Sys<()> {
        ioctls::set_region(vm, region)
    }

    fn create_guest_memfd(&self, vm: RawFd, size: u64, flags: u64) -> Sys<OwnedFd> {
        ioctls::create_guest_memfd(vm, size, flags)
    }

    fn set_attributes(&self, vm: RawFd, range: Range, attributes: u64) -> Sys<()> {
        ioctls::set_attributes(vm, range, attributes)
    }

    fn pre_fault(&self, vcpu: RawFd, range: Range) -> Sys<Option<Range>> {
        // Before each, since a slot may have been deleted that nobody told of.
        if caps::roots_go_stale(self.release()) {
            ioctls::renew_root(vcpu);
        }
        ioctls::pre_fault(vcpu, range)
    }

    fn tdx_init_mem_region(&self, vcpu: RawFd, pages: &ImagePages, flags: u32) -> Launched {
        ioctls::tdx_init_mem_region(vcpu, pages, flags)
    }

    fn snp_launch_update(&self, vm: RawFd, sev: RawFd, pages: &ImagePages, page_type: u8) -> Launched {
        ioctls::snp_launch_update(vm, sev, pages, page_type)
    }

    fn uses_other_tables(&self, vcpu: RawFd) -> bool {
        ioctls::is_in_smm(vcpu) || ioctls::has_nested_guest(vcpu)
    }

    fn stats(&self, fd: RawFd) -> Sys<Stats> {
        let file = File::from(ioctls::stats_fd(fd)?);
        Stats::decode(|offset, buffer| {
            std::os::unix::fs::FileExt::read_exact_at(&file, buffer, offset)
                .map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EIO)))
        })
    }

    fn exit_request(&self, vcpu: RawFd) -> Sys<Box<dyn ExitRequest>> {
        ioctls::exit_request(vcpu)
    }

    fn populate(&self, hva: u64, size: u64, access: Access) -> Sys<()> {
        let advice = match access {
            Access::Read => libc::MADV_POPULATE_READ,
            Access::Write => libc::MADV_POPULATE_WRITE,
        };
        // SAFETY: populating changes no content; an address that is not mapped is refused.
        check(unsafe { libc::madvise(hva as *mut c_void, size as usize, advice) }).map(drop)
    }

    fn advise_huge(&self, hva: u64, size: u64) -> Sys<()> {
        // SAFETY: advice changes no content; an address that is not mapped is refused.
        check(unsafe { libc::madvise(hva as *mut c_void, size as usize, libc::MADV_HUGEPAGE) }).map(drop)
    }

    fn discard(&self, hva: u64, size: u64) -> Sys<()> {
        // SAFETY: the range lies in a memslot whose VMM has asked for its content to go; it is the guest's memory, to which
        // Rust has no reference, and the mapping stays. An address that is not mapped is refused.
        let advise = |advice| check(unsafe { libc::madvise(hva as *mut c_void, size as usize, advice) });
        match advise(libc::MADV_DONTNEED) {
            // So it answers of locked memory; kernels before 5.18 know no other way, and refuse.
            Err(Errno(libc::EINVAL)) => advise(MADV_DONTNEED_LOCKED).map(drop),
            answer => answer.map(drop),
        }
    }

    fn remove(&self, hva: u64, size: u64) -> Sys<()> {
        // SAFETY: as for `discard`.
        check(unsafe { libc::madvise(hva as *mut c_void, size as usize, libc::MADV_REMOVE) }).map(drop)
    }

    fn punch(&self, fd: RawFd, offset: u64, size: u64) -> Sys<()> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory is passed.
        check(unsafe { libc::fallocate(fd, mode, offset as i64, size as i64) }).map(drop)
    }

    fn close_on_exec(&self, fd: RawFd) -> Sys<()> {
        // SAFETY: no memory is passed.
        check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }).map(drop)
    }

    fn allocate(&self, fd: RawFd, offset: u64, size: u64) -> Sys<()> {
        // SAFETY: no memory is passed; allocating fills holes and changes no content.
        check(unsafe { libc::fallocate(fd, libc::FALLOC_FL_KEEP_SIZE, offset as i64, size as i64) }).map(drop)
    }

    fn file_kind(&self, fd: RawFd) -> Sys<FileKind> {
        // SAFETY: fstatfs fills the structure, or fails and it is not read.
        let stat = unsafe {
            let mut stat: libc::statfs = std::mem::zeroed();
            check(libc::fstatfs(fd, &mut stat))?;
            stat
        };
        Ok(match stat.f_type {
            libc::HUGETLBFS_MAGIC => {
                FileKind { object: MappedObject::Hugetlb, page_size: stat.f_bsize as u64 }
            }
            libc::TMPFS_MAGIC => FileKind { object: MappedObject::Shmem, page_size: PAGE },
            _ => FileKind { object: MappedObject::File, page_size: PAGE },
        })
    }

    fn file_status(&self, fd: RawFd) -> Sys<FileStatus> {
        check_open(fd)?;
        // SAFETY: fstat fills the structure, or fails and it is not read.
        let stat = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            check(libc::fstat(fd, &mut stat))?;
            stat
        };
        Ok(FileStatus {
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            length: stat.st_size as u64,
            allocated: stat.st_blocks as u64 * 512,
        })
    }

    fn is_guest_memfd(&self, fd: RawFd) -> Option<bool> {
        use std::io::Write;
        check_open(fd).ok()?;
        let mut path = [0u8; 32];
        write!(&mut path[..31], "/proc/self/fd/{fd}").ok()?;
        let mut name = [0u8; MAPPING_NAME];
        // SAFETY: `path` ends with a NUL, and `name` has room for what is asked.
        let length = check(unsafe {
            libc::readlink(path.as_ptr().cast(), name.as_mut_ptr().cast(), name.len()) as c_int
        });
        Some(maps::is_guest_memfd(&name[..length.ok()? as usize]))
    }

    fn mapping(&self, hva: u64) -> Sys<Option<Mapping>> {
        match self.mapping_by_query(hva) {
            Err(errno) if is_unknown(errno) => Ok(maps::find(&self.read_mappings()?, hva)),
            answer => answer,
        }
    }

    fn mappings(&self) -> Sys<Option<Vec<Mapping>>> {
        let has_query = *self.has_query.get_or_init(|| !self.mapping_by_query(0).is_err_and(is_unknown));
        if has_query { Ok(None) } else { self.read_mappings().map(Some) }
    }

    fn resident(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        match self.scan(start, end, PAGE_IS_PRESENT | PAGE_IS_PFNZERO, PAGE_IS_PFNZERO, 0) {
            Err(errno) if is_unknown(errno) => self.resident_by_pagemap(start, end),
            answer => answer,
        }
    }

    fn small_pages(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        let small = self.scan_if_known(start, end, PAGE_IS_HUGE, PAGE_IS_PRESENT | PAGE_IS_SWAPPED)?;
        if self.release() >= HUGE_ZERO_PAGE_BECOMES_HUGE {
            return Ok(small);
        }
        let end = small.map_or(end, |(start, _)| start);
        let zero = if start < end { self.scan_if_known(start, end, 0, PAGE_IS_PFNZERO)? } else { None };
        Ok(zero.or(small))
    }

    fn huge_pages(&self, start: u64, end: u64) -> Sys<Option<(u64, u64)>> {
        self.scan_if_known(start, end, 0, PAGE_IS_PRESENT)
    }

    fn huge_pages_disabled(&self) -> HugePagesDisabled {
        // SAFETY: no memory is passed.
        match unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) } {
            0 | ..0 => HugePagesDisabled::No,
            THP_DISABLED_EXCEPT_ADVISED => HugePagesDisabled::ExceptAdvised,
            _ => HugePagesDisabled::Yes,
        }
    }

    fn can_map_guest_memfd(&self, fd: RawFd) -> bool {
        // Where /proc is out of reach nobody has said that it is none.
        if self.is_guest_memfd(fd) == Some(false) {
            return false;
        }
        // SAFETY: a fresh mapping without access, at an address of the kernel's choice, that is taken away at once.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE as usize, libc::PROT_NONE, libc::MAP_SHARED, fd, 0)
        };
        if page == libc::MAP_FAILED {
            // Any other answer is this process's shortage and not the file's. Who takes a file that can be mapped for one that
            // cannot, gives up what the guest has in sight; who errs the other way keeps memory.
            return !matches!(last_errno().0, libc::ENODEV | libc::EBADF | libc::EINVAL | libc::EACCES);
        }
        // SAFETY: what was just mapped.
        unsafe { libc::munmap(page, PAGE as usize) };
        true
    }

    fn user_addresses_end(&self) -> u64 {
        user_addresses_end()
    }

    fn cached(&self, hva: u64, size: u64) -> Sys<u64> {
        let mut pages = [0u8; (HUGE / PAGE) as usize];
        let size = size.min(HUGE);
        // SAFETY: the kernel writes one byte a page of `size`, for which there is room.
        check(unsafe { libc::mincore(hva as *mut c_void, size as usize, pages.as_mut_ptr()) })?;
        Ok(pages.iter().filter(|page| **page & 1 != 0).count() as u64 * PAGE)
    }

    fn file_name(&self, fd: RawFd) -> Option<String> {
        let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).ok()?;
        Some(path.to_string_lossy().into_owned())
    }

    fn read_file(&self, path: &str) -> Sys<String> {
        let bytes = match path {
            MAPS => read_from_start(self.maps.get_or_try_init(|| open(MAPS))?)?,
            SMAPS => read_from_start(self.smaps.get_or_try_init(|| open(SMAPS))?)?,
            _ => read_from_start(&open(path)?)?,
        };
        // A mapped file may have any name.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn wait(&self, word: &AtomicU32, seen: u32, timeout: Duration) -> Sys<()> {
        let timeout = libc::timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: the word outlives the call; a futex only reads it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                seen,
                &timeout,
            )
        };
        match check(result as c_int) {
            Err(Errno(libc::EAGAIN | libc::ETIMEDOUT)) => Ok(()),
            other => other.map(drop),
        }
    }

    fn wake(&self, word: &AtomicU32) {
        // SAFETY: waking reads nothing from the word.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                c_int::MAX,
            )
        };
    }

    fn event(&self) -> Sys<OwnedFd> {
        // SAFETY: makes a descriptor, which becomes ours alone.
        unsafe {
            let fd = check(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | libc::EFD_SEMAPHORE))?;
            Ok(OwnedFd::from_raw_fd(fd))
        }
    }

    fn event_add(&self, event: &OwnedFd, count: u64) -> Sys<()> {
        // SAFETY: writes eight bytes from a live u64.
        let written =
            unsafe { libc::write(event.as_raw_fd(), std::ptr::from_ref(&count) as *const c_void, 8) };
        check(written as c_int).map(drop)
    }

    fn event_take(&self, event: &OwnedFd) -> Sys<()> {
        let mut count = 0u64;
        // SAFETY: reads eight bytes into a live u64.
        let read = unsafe { libc::read(event.as_raw_fd(), std::ptr::from_mut(&mut count) as *mut c_void, 8) };
        check(read as c_int).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_need_not_open_files_later() {
        let kernel = Linux::with_open_files();
        assert!(
            kernel.maps.get().is_some() && kernel.smaps.get().is_some() && kernel.pagemap.get().is_some()
        );
    }

    #[test]
    fn the_text_of_the_mappings_says_what_each_look_says() {
        let kernel = Linux::default();
        let value = Box::new([0u8; 1 << 20]);
        let hva = value.as_ptr() as u64;
        let (looked, read) =
            (kernel.mapping(hva).unwrap(), maps::find(&kernel.read_mappings().unwrap(), hva));
        let place =
            |m: Option<Mapping>| m.map(|m| (m.start, m.end, m.readable, m.writable, m.shared, m.object));
        assert!(looked.is_some());
        assert_eq!(place(looked), place(read));
    }
}
