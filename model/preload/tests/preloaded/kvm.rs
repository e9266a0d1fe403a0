//! KVM as a program asks for it: each call once, with its structure, and the error as a number.

use kvm_bindings::*;
use std::ffi::{CStr, c_int, c_void};
use std::ptr;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;
/// Where tests put the guest's memory.
pub const GPA: u64 = 1 << 30;

pub const CREATE_VM: u64 = 0xae01;
pub const CHECK_EXTENSION: u64 = 0xae03;
pub const CREATE_VCPU: u64 = 0xae41;
pub const CREATE_IRQCHIP: u64 = 0xae60;
pub const RUN: u64 = 0xae80;
pub const GET_STATS_FD: u64 = 0xaece;
pub const SET_SIGNAL_MASK: u64 = 0x4004_ae8b;
pub const SET_MSRS: u64 = 0x4008_ae89;
pub const SET_REGION: u64 = 0x4020_ae46;
pub const SET_ATTRIBUTES: u64 = 0x4020_aed2;
pub const SET_EVENTS: u64 = 0x4040_aea0;
pub const ENABLE_CAP: u64 = 0x4068_aea3;
pub const SET_REGION2: u64 = 0x40a0_ae49;
pub const SET_SREGS: u64 = 0x4138_ae84;
pub const REGISTER_REGION: u64 = 0x8010_aebb;
pub const UNREGISTER_REGION: u64 = 0x8010_aebc;
pub const GET_EVENTS: u64 = 0x8040_ae9f;
pub const GET_REGS: u64 = 0x8090_ae81;
pub const GET_SREGS: u64 = 0x8138_ae83;
pub const GET_MSRS: u64 = 0xc008_ae88;
pub const ENCRYPT_OP: u64 = 0xc008_aeba;
pub const CREATE_GUEST_MEMFD: u64 = 0xc040_aed4;
pub const PRE_FAULT: u64 = 0xc040_aed5;

pub type Answer = Result<c_int, c_int>;

pub fn errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().expect("an error of the system's")
}

fn answer(value: c_int) -> Answer {
    if value < 0 { Err(errno()) } else { Ok(value) }
}

pub fn open(path: &CStr) -> Answer {
    // SAFETY: the path ends with a zero.
    answer(unsafe { libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) })
}

pub fn ioctl(fd: c_int, request: u64, argument: u64) -> Answer {
    // SAFETY: what tests give as an argument is a number, or the address of the structure that the request has.
    answer(unsafe { libc::ioctl(fd, request, argument) })
}

pub fn ioctl_with<T>(fd: c_int, request: u64, argument: &mut T) -> Answer {
    ioctl(fd, request, ptr::from_mut(argument) as u64)
}

pub fn close(fd: c_int) {
    // SAFETY: tests close what is theirs.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

/// A VM of a type.
pub struct Vm {
    pub kvm: c_int,
    pub fd: c_int,
}

impl Vm {
    pub fn of_type(number: u64) -> Self {
        let kvm = open(c"/dev/kvm").expect("the model is here");
        Vm { kvm, fd: ioctl(kvm, CREATE_VM, number).expect("the type is had") }
    }

    pub fn new() -> Self {
        Vm::of_type(0)
    }

    pub fn vcpu(&self, number: u64) -> Vcpu {
        let fd = ioctl(self.fd, CREATE_VCPU, number).expect("a vCPU");
        let page = map(3 * PAGE, libc::MAP_SHARED, fd).expect("the pages of a vCPU") as *mut kvm_run;
        Vcpu { fd, page }
    }

    pub fn set_region(&self, slot: u32, gpa: u64, memory: u64, size: u64) -> Answer {
        let mut region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: memory,
            ..Default::default()
        };
        ioctl_with(self.fd, SET_REGION, &mut region)
    }

    pub fn set_file_region(&self, slot: u32, gpa: u64, memory: u64, size: u64, file: c_int) -> Answer {
        let mut region = kvm_userspace_memory_region2 {
            slot,
            flags: KVM_MEM_GUEST_MEMFD,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: memory,
            guest_memfd: file as u32,
            ..Default::default()
        };
        ioctl_with(self.fd, SET_REGION2, &mut region)
    }

    pub fn set_private(&self, gpa: u64, size: u64, is_private: bool) -> Answer {
        let attributes = if is_private { u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) } else { 0 };
        let mut range = kvm_memory_attributes { address: gpa, size, attributes, flags: 0 };
        ioctl_with(self.fd, SET_ATTRIBUTES, &mut range)
    }

    pub fn guest_memfd(&self, size: u64, flags: u64) -> Answer {
        let mut wanted = kvm_create_guest_memfd { size, flags, ..Default::default() };
        ioctl_with(self.fd, CREATE_GUEST_MEMFD, &mut wanted)
    }

    pub fn statistic(&self, name: &str) -> u64 {
        statistic(self.fd, name)
    }
}

/// A vCPU, with its shared pages.
pub struct Vcpu {
    pub fd: c_int,
    pub page: *mut kvm_run,
}

impl Vcpu {
    /// Pre-faults, and answers what is left beside the answer.
    pub fn pre_fault(&self, gpa: u64, size: u64) -> (Answer, u64) {
        let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        let answer = ioctl_with(self.fd, PRE_FAULT, &mut range);
        assert_eq!(range.gpa + range.size, gpa + size);
        (answer, range.size)
    }

    pub fn run(&self) -> Answer {
        ioctl(self.fd, RUN, 0)
    }

    pub fn exit_reason(&self) -> u32 {
        // SAFETY: the pages are mapped as long as the test runs.
        unsafe { (&raw const (*self.page).exit_reason).read_volatile() }
    }

    pub fn exit(&self) -> kvm_run__bindgen_ty_1 {
        // SAFETY: the pages are mapped as long as the test runs.
        unsafe { (&raw const (*self.page).__bindgen_anon_1).read_volatile() }
    }

    pub fn set_immediate_exit(&self, immediate: bool) {
        // SAFETY: the pages are mapped as long as the test runs.
        unsafe { (&raw mut (*self.page).immediate_exit).write_volatile(immediate.into()) };
    }

    pub fn statistic(&self, name: &str) -> u64 {
        statistic(self.fd, name)
    }
}

pub fn map(size: u64, flags: c_int, fd: c_int) -> Result<u64, c_int> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping touches nothing.
    let start = unsafe { libc::mmap(ptr::null_mut(), size as usize, protection, flags, fd, 0) };
    if start == libc::MAP_FAILED { Err(errno()) } else { Ok(start as u64) }
}

/// Memory of small pages that nobody has touched.
pub fn memory(size: u64) -> u64 {
    let start = map(size, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).expect("memory");
    // Where there are no huge pages this fails, and nothing is lost.
    let _ = advise(start, size, libc::MADV_NOHUGEPAGE);
    start
}

pub fn advise(start: u64, size: u64, advice: c_int) -> Answer {
    // SAFETY: tests advise of memory that is theirs and that they have no references to.
    answer(unsafe { libc::madvise(start as *mut c_void, size as usize, advice) })
}

pub fn protect(start: u64, size: u64, rights: c_int) -> Answer {
    // SAFETY: tests change memory that is theirs and that they have no references to.
    answer(unsafe { libc::mprotect(start as *mut c_void, size as usize, rights) })
}

pub fn unmap(start: u64, size: u64) {
    // SAFETY: tests unmap what is theirs.
    assert_eq!(unsafe { libc::munmap(start as *mut c_void, size as usize) }, 0);
}

pub fn word(address: u64) -> u32 {
    // SAFETY: tests look at mapped memory of theirs.
    unsafe { (address as *const u32).read_volatile() }
}

pub fn set_word(address: u64, word: u32) {
    // SAFETY: tests write mapped memory of theirs.
    unsafe { (address as *mut u32).write_volatile(word) }
}

pub fn fallocate(fd: c_int, mode: c_int, offset: u64, length: u64) -> Answer {
    // SAFETY: nothing of ours is touched.
    answer(unsafe { libc::fallocate(fd, mode, offset as i64, length as i64) })
}

fn read_at(fd: c_int, bytes: &mut [u8], offset: usize) {
    // SAFETY: there is room for what is read.
    let read = unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), bytes.len(), offset as i64) };
    assert_eq!(read, bytes.len() as isize);
}

fn number(bytes: &[u8]) -> usize {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// A statistic by its name, read as the kernel's documentation has it.
pub fn statistic(fd: c_int, name: &str) -> u64 {
    let file = ioctl(fd, GET_STATS_FD, 0).expect("statistics");
    let mut header = [0; 24];
    read_at(file, &mut header, 0);
    let field = |nth: usize| number(&header[4 * nth..4 * nth + 4]);
    let (name_size, descriptors, first, data) = (field(1), field(2), field(4), field(5));
    let mut descriptor = vec![0; 16 + name_size];
    for nth in 0..descriptors {
        read_at(file, &mut descriptor, first + nth * (16 + name_size));
        if descriptor[16..].starts_with(name.as_bytes()) && descriptor[16 + name.len()] == 0 {
            let mut value = [0; 8];
            read_at(file, &mut value, data + number(&descriptor[8..12]));
            close(file);
            return u64::from_le_bytes(value);
        }
    }
    panic!("no statistic {name}");
}
