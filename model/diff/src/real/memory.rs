//! The process's own memory, as a VMM has it: mapped at the addresses that a program says, and nowhere else.
//!
//! A load or store goes through a file, so that what a process would die of is an answer. Nothing here knows KVM.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::sys;
use crate::operation::{
    AREA_SIZE, AREAS, Advice, Backing, FRAME, PAGE, POOL_PAGES, PROMISED_HVA, Protection, SPARE_HVA,
    ThpPolicy, area_of, area_start,
};

/// What a process has mapped.
pub struct Memory {
    /// The file of each area, where it has one of its own.
    files: [Option<OwnedFd>; AREAS],
    /// What loads and stores go through.
    scratch: OwnedFd,
    child: Option<Child>,
    has_forked: bool,
    /// Bytes of huge pages that nobody uses and nobody else gets.
    promised: u64,
}

struct Child {
    process: libc::pid_t,
    /// Closed, it ends the child.
    line: OwnedFd,
}

impl Memory {
    /// Nothing is mapped yet. So many huge pages of the pool are not for the program.
    pub fn new(promised_elsewhere: u64) -> Result<Self> {
        let scratch = sys::memfd(0, PAGE).map_err(failed).context("memfd_create")?;
        map_own(SPARE_HVA, &[1])?;
        let promised = promised_elsewhere * FRAME;
        if promised > 0 {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB;
            let done = map_fixed(PROMISED_HVA, promised, flags, -1, 0);
            ensure!(done == 0, "{promised_elsewhere} huge pages cannot be promised: {}", failed(done));
            // A child would only get copies of what is there, and nothing is.
            let done = advise(PROMISED_HVA, promised, Advice::DontFork);
            ensure!(done == 0, "MADV_DONTFORK: {}", failed(done));
        }
        Ok(Memory { files: [const { None }; AREAS], scratch, child: None, has_forked: false, promised })
    }

    /// Has the kernel let go of the pages that it holds to sort them later. Where a child has had a page, whether that is
    /// copied or written where it is depends on who else holds it.
    pub fn settle(&self) {
        if self.has_forked {
            // MADV_COLD does that first, whatever it is for.
            // SAFETY: no content is changed.
            unsafe { libc::madvise(SPARE_HVA as *mut libc::c_void, PAGE as usize, libc::MADV_COLD) };
        }
    }

    /// mmap, in place of all that the area had. `file` is the guest_memfd that is mapped, if one is.
    pub fn map(&mut self, at: u64, size: u64, backing: Backing, file: Option<&OwnedFd>) -> i64 {
        let Some(area) = area_of(at) else { return -i64::from(libc::EINVAL) };
        unmap(area_start(area), AREA_SIZE);
        let made = match backing {
            Backing::MemfdShared | Backing::MemfdPrivate => Some(sys::memfd(0, size)),
            Backing::HugetlbShared => Some(sys::memfd(libc::MFD_HUGETLB, size)),
            _ => None,
        };
        self.files[area] = match made.transpose() {
            Ok(file) => file,
            Err(error) => return error,
        };
        let (flags, offset) = match backing {
            Backing::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, 0),
            Backing::AnonymousShared => (libc::MAP_SHARED | libc::MAP_ANONYMOUS, 0),
            Backing::MemfdShared | Backing::HugetlbShared => (libc::MAP_SHARED, 0),
            Backing::MemfdPrivate => (libc::MAP_PRIVATE, 0),
            Backing::HugetlbPrivate => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB, 0),
            Backing::GuestMemfd { offset, .. } => (libc::MAP_SHARED, offset),
        };
        let fd = match backing {
            Backing::GuestMemfd { .. } => file.map_or(-1, AsRawFd::as_raw_fd),
            _ => self.files[area].as_ref().map_or(-1, AsRawFd::as_raw_fd),
        };
        map_fixed(at, size, flags, fd, offset)
    }

    /// fallocate of an area's file.
    pub fn fallocate(&self, area: usize, mode: i32, offset: u64, size: u64) -> i64 {
        match self.files.get(area) {
            Some(Some(file)) => sys::fallocate(file, mode, offset, size),
            _ => -i64::from(libc::EBADF),
        }
    }

    /// Writes a word as the process.
    pub fn store(&self, at: u64, word: u32) -> i64 {
        let bytes = word.to_ne_bytes();
        let fd = self.scratch.as_raw_fd();
        // SAFETY: the bytes are read.
        let put = unsafe { libc::pwrite(fd, bytes.as_ptr().cast(), bytes.len(), 0) };
        debug_assert_eq!(put, 4);
        // SAFETY: the kernel writes where the areas are, or answers with an error; nothing of this program's own is
        // there.
        size_done(sys::answer(unsafe { libc::pread(fd, at as *mut libc::c_void, bytes.len(), 0) as i64 }))
    }

    /// Reads a word as the process.
    pub fn load(&self, at: u64) -> Result<u32, i64> {
        let mut bytes = [0; 4];
        let fd = self.scratch.as_raw_fd();
        // SAFETY: the kernel reads there, or answers with an error.
        let done = unsafe { libc::pwrite(fd, at as *const libc::c_void, bytes.len(), 0) };
        match size_done(sys::answer(done as i64)) {
            0 => {
                // SAFETY: four bytes are written where there are four.
                let got = unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
                debug_assert_eq!(got, 4);
                Ok(u32::from_ne_bytes(bytes))
            }
            error => Err(error),
        }
    }

    /// Makes a child that has a copy of all memory, and no file that this process has.
    pub fn fork(&mut self) -> i64 {
        if self.child.is_some() {
            return -i64::from(libc::EBUSY);
        }
        let mut ends = [-1; 2];
        // SAFETY: two numbers are written where there are two.
        let made = sys::answer(i64::from(unsafe {
            libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr())
        }));
        if made < 0 {
            return made;
        }
        let (Ok(ours), Ok(theirs)) = (sys::owned(ends[0].into()), sys::owned(ends[1].into())) else {
            return made;
        };
        // SAFETY: the child makes system calls alone, whatever locks were held here.
        let process = unsafe { libc::fork() };
        match process {
            0 => wait_as_child(theirs.as_raw_fd()),
            -1 => sys::answer(-1),
            _ => {
                self.has_forked = true;
                drop(theirs);
                let mut byte = 0u8;
                // SAFETY: one byte is written where there is one.
                unsafe { libc::read(ours.as_raw_fd(), std::ptr::from_mut(&mut byte).cast(), 1) };
                self.child = Some(Child { process, line: ours });
                0
            }
        }
    }

    /// Ends the child.
    pub fn reap(&mut self) -> i64 {
        let Some(child) = self.child.take() else { return -i64::from(libc::ECHILD) };
        drop(child.line);
        // SAFETY: the status is not asked for.
        let reaped = unsafe { libc::waitpid(child.process, std::ptr::null_mut(), 0) };
        sys::answer(reaped.into()).min(0)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.reap();
        unmap(SPARE_HVA, PAGE);
        if self.promised > 0 {
            unmap(PROMISED_HVA, self.promised);
        }
        for area in 0..AREAS {
            unmap(area_start(area), AREA_SIZE);
        }
    }
}

/// In the child: lets go of every file, says so, and waits until the parent lets go of the line.
fn wait_as_child(line: i32) -> ! {
    let mut byte = 0u8;
    // SAFETY: system calls alone, on one byte of the child's own stack.
    unsafe {
        libc::dup2(line, 0);
        libc::syscall(libc::SYS_close_range, 1u32, u32::MAX, 0u32);
        libc::write(0, std::ptr::from_ref(&byte).cast(), 1);
        libc::read(0, std::ptr::from_mut(&mut byte).cast(), 1);
        libc::_exit(0)
    }
}

/// A transfer of a whole word is a success, one that ended before the word is a fault.
fn size_done(done: i64) -> i64 {
    match done {
        4 => 0,
        0.. => -i64::from(libc::EFAULT),
        error => error,
    }
}

fn map_fixed(at: u64, size: u64, flags: i32, fd: i32, offset: u64) -> i64 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: nothing that exists is replaced.
    let got =
        unsafe { libc::mmap(at as *mut libc::c_void, size as usize, protection, flags, fd, offset as i64) };
    if got == libc::MAP_FAILED { sys::answer(-1) } else { 0 }
}

/// Maps and writes memory that no program touches.
pub fn map_own(at: u64, bytes: &[u8]) -> Result<()> {
    let done = map_fixed(at, PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
    ensure!(done == 0, "mmap: {}", failed(done));
    ensure!(bytes.len() as u64 <= PAGE, "too much for a page");
    // SAFETY: a page was just mapped there, which nobody else knows.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    Ok(())
}

/// munmap. Only for the areas, and for what [`map_own`] has mapped.
pub fn unmap(at: u64, size: u64) -> i64 {
    // SAFETY: nothing of this program's own is at such addresses.
    sys::answer(i64::from(unsafe { libc::munmap(at as *mut libc::c_void, size as usize) }))
}

/// madvise.
pub fn advise(at: u64, size: u64, advice: Advice) -> i64 {
    let advice = match advice {
        Advice::DontNeed => libc::MADV_DONTNEED,
        Advice::Remove => libc::MADV_REMOVE,
        Advice::PopulateRead => libc::MADV_POPULATE_READ,
        Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
        Advice::HugePage => libc::MADV_HUGEPAGE,
        Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
        Advice::Collapse => libc::MADV_COLLAPSE,
        Advice::DontFork => libc::MADV_DONTFORK,
        Advice::DoFork => libc::MADV_DOFORK,
    };
    // SAFETY: only the areas are advised about, and what is promised to nobody.
    sys::answer(i64::from(unsafe { libc::madvise(at as *mut libc::c_void, size as usize, advice) }))
}

/// mprotect.
pub fn protect(at: u64, size: u64, protection: Protection) -> i64 {
    let protection = match protection {
        Protection::None => libc::PROT_NONE,
        Protection::Read => libc::PROT_READ,
        Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    };
    // SAFETY: only the areas are protected.
    sys::answer(i64::from(unsafe { libc::mprotect(at as *mut libc::c_void, size as usize, protection) }))
}

const THP: &str = "/sys/kernel/mm/transparent_hugepage";
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
/// Has the machine do nothing by itself to the memory of programs, and hold as many huge pages as they may take.
pub fn quieten() -> Result<()> {
    if Path::new(THP).exists() {
        set(&format!("{THP}/khugepaged/scan_sleep_millisecs"), "1000000000")?;
        set(&format!("{THP}/khugepaged/pages_to_scan"), "1")?;
        // A policy that allows huge pages again starts a new khugepaged, which looks around once, on a busy machine some
        // time later: then let it find nothing to do.
        for most in ["none", "swap", "shared"] {
            set(&format!("{THP}/khugepaged/max_ptes_{most}"), "0")?;
        }
        // A huge page that cannot be had at once is waited for.
        set(&format!("{THP}/defrag"), "always")?;
        set(&format!("{THP}/shmem_enabled"), "never")?;
        set(&format!("{THP}/enabled"), "madvise")?;
    }
    if Path::new(POOL).exists() {
        set(POOL, &POOL_PAGES.to_string())?;
        let had = std::fs::read_to_string(POOL)?;
        ensure!(had.trim() == POOL_PAGES.to_string(), "only {} huge pages could be had", had.trim());
    }
    Ok(())
}

/// Whether this kernel has transparent huge pages.
pub fn has_thp() -> bool {
    Path::new(THP).exists()
}

/// Sets the policy for transparent huge pages.
pub fn set_policy(policy: ThpPolicy) -> Result<()> {
    if has_thp() { set(&format!("{THP}/enabled"), policy.name()) } else { Ok(()) }
}

fn set(path: &str, value: &str) -> Result<()> {
    std::fs::write(path, value).with_context(|| format!("cannot write {value} to {path}"))
}

fn failed(answer: i64) -> std::io::Error {
    std::io::Error::from_raw_os_error(i32::try_from(-answer).unwrap_or(libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_where_it_was_asked_for_and_goes_with_its_owner() {
        let at = area_start(0) + PAGE;
        let mut memory = Memory::new(0).unwrap();
        assert_eq!(memory.map(at, 2 * PAGE, Backing::Anonymous, None), 0);
        assert_eq!(memory.load(at), Ok(0));
        assert_eq!(memory.store(at, 7), 0);
        assert_eq!(memory.load(at), Ok(7));
        assert_eq!(memory.load(at + 2 * PAGE), Err(-i64::from(libc::EFAULT)));
        assert_eq!(memory.store(area_start(0), 7), -i64::from(libc::EFAULT));
        assert_eq!(memory.map(at, PAGE, Backing::MemfdShared, None), 0);
        assert_eq!(memory.load(at), Ok(0));
        assert_eq!(memory.load(at + PAGE), Err(-i64::from(libc::EFAULT)));
        assert_eq!(memory.fork(), 0);
        assert_eq!(memory.reap(), 0);
        drop(memory);
        assert_eq!(Memory::new(0).unwrap().load(at), Err(-i64::from(libc::EFAULT)));
    }
}
