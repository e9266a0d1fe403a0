//! What calls refer to and this process has: memory of several kinds, descriptors of many, a VM where there can be one.
//!
//! Made once. Calls that touch memory may touch this alone, since to populate whatever lies at some address, the
//! sanitizer's own shadow say, would fill the machine.

use crate::call::call_with;
use crate::heap::{Block, Passed};
use crate::input::{GIANT, HUGE};
use crate::oracle::demand;
use kvmprep::abi::{kvmprep_caps, kvmprep_keep_mappings, kvmprep_probe};
use std::ffi::{CStr, c_int, c_void};
use std::os::fd::RawFd;
use std::sync::OnceLock;

/// Bytes of addresses that are ours.
const RESERVED: u64 = 64 * GIANT;
/// Bytes at their start that are memory: one kind after another, 2 MiB of each.
const MEMORY: u64 = 7 * HUGE;

const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_SET_USER_MEMORY_REGION: libc::c_ulong = 0x4020_ae46;
const KVM_CREATE_GUEST_MEMFD: libc::c_ulong = 0xc040_aed4;

/// What there is.
pub struct World {
    /// The start of our addresses, a multiple of 1 GiB.
    pub memory: u64,
    /// A VM and what it offers, where this machine has any.
    pub vm: Option<(RawFd, kvmprep_caps)>,
    /// Descriptors to choose from, good and bad, the guest_memfds first.
    pub descriptors: Vec<RawFd>,
    /// How many of them are guest_memfds, or look like some.
    pub guest_memfds: usize,
    shared: RawFd,
}

impl World {
    pub fn get() -> &'static World {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(World::new)
    }

    fn new() -> Self {
        // A file that cannot grow: the library may be asked to allocate any part of it.
        let shared = memory_file(c"guest", 2 * HUGE);
        let memory = map_memory(shared);
        let kvm = open(c"/dev/kvm", libc::O_RDWR);
        let vm = kvm.and_then(|kvm| ioctl(kvm, KVM_CREATE_VM, std::ptr::null_mut()));
        if vm.is_none() {
            eprintln!("no VM can be made here: handles over a real one are left out");
        }
        let sizes = [4 * HUGE, HUGE + 4096];
        let mut descriptors: Vec<RawFd> = sizes
            .iter()
            .map(|size| {
                vm.and_then(|vm| guest_memfd(vm, *size)).unwrap_or_else(|| memory_file(c"[kvm-gmem]", *size))
            })
            .collect();
        // Another VM's, and another descriptor of the first.
        let another = kvm.and_then(|kvm| ioctl(kvm, KVM_CREATE_VM, std::ptr::null_mut()));
        descriptors.extend(another.and_then(|vm| guest_memfd(vm, HUGE)));
        // SAFETY: copies a descriptor.
        descriptors.push(unsafe { libc::dup(descriptors[0]) });
        let guest_memfds = descriptors.len();
        descriptors.extend([shared, -1, 1 << 20, c_int::MAX, c_int::MIN, -2]);
        descriptors.extend(kvm.into_iter().chain(vm));
        descriptors.extend(open(c"/dev/null", libc::O_RDWR));
        descriptors.extend(open(c"/proc", libc::O_RDONLY));
        let vm = vm.map(|vm| (vm, caps_of(vm)));
        World { memory, vm, descriptors, guest_memfds, shared }
    }

    /// Whether all of it is ours, and so mapped.
    pub fn is_ours(&self, hva: u64, size: u64) -> bool {
        hva >= self.memory && hva.checked_add(size).is_some_and(|end| end <= self.memory + RESERVED)
    }

    /// Whether memory may be populated there: ours, or nothing at all.
    pub fn is_harmless(&self, hva: u64, size: u64) -> bool {
        let is_nothing = hva.checked_add(size).is_none_or(|end| end <= 0x1_0000) || hva >= 1 << 47;
        is_nothing || self.is_ours(hva, size)
    }

    /// Deletes a slot of the VM's, behind the library's back; one that is not there is none.
    pub fn delete_slot(&self, slot: u32) {
        if let Some((vm, _)) = self.vm {
            // Slot and flags, gpa, size, hva.
            let mut region = [slot.into(), 0, 0, 0];
            ioctl(vm, KVM_SET_USER_MEMORY_REGION, region.as_mut_ptr());
        }
    }

    /// Gives back what was populated, so that each program finds the same memory.
    pub fn clear(&self) {
        // SAFETY: the memory is mapped for this, and nobody has its content in use.
        unsafe {
            libc::madvise(self.memory as *mut c_void, MEMORY as usize, libc::MADV_DONTNEED);
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            libc::fallocate(self.shared, punch, 0, 2 * HUGE as i64);
        }
    }
}

/// What the VM offers. Its mappings are kept: some handles ask for that, and it cannot be taken back.
fn caps_of(vm: RawFd) -> kvmprep_caps {
    let caps = Block::output(size_of::<kvmprep_caps>(), Passed::Right);
    call_with(Passed::Right, "kvmprep_keep_mappings", &vm, |err| {
        // SAFETY: no memory but err's is passed.
        unsafe { kvmprep_keep_mappings(vm, err) }
    });
    let answer = call_with(Passed::Right, "kvmprep_probe", &vm, |err| {
        // SAFETY: the block has that many bytes.
        unsafe { kvmprep_probe(-1, vm, caps.pointer(), size_of::<kvmprep_caps>(), err) }
    });
    demand(answer.is_success(), "kvmprep_probe", "a VM can be asked");
    caps.read()
}

/// Nothing in here has a value to go on without.
fn made(value: i64, what: &str) -> i64 {
    assert!(value >= 0, "{what}: {}", std::io::Error::last_os_error());
    value
}

fn memory_file(name: &CStr, size: u64) -> RawFd {
    // SAFETY: system calls on a new descriptor and a text that outlives them.
    unsafe {
        let file =
            made(libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING).into(), "memfd_create") as RawFd;
        made(libc::ftruncate(file, size as i64).into(), "ftruncate");
        let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
        made(libc::fcntl(file, libc::F_ADD_SEALS, seals).into(), "F_ADD_SEALS");
        file
    }
}

fn open(path: &CStr, flags: c_int) -> Option<RawFd> {
    // SAFETY: the text outlives the call.
    let file = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
    (file >= 0).then_some(file)
}

fn ioctl(file: RawFd, request: libc::c_ulong, argument: *mut u64) -> Option<RawFd> {
    // SAFETY: the argument is NULL or what the request takes.
    let made = unsafe { libc::ioctl(file, request, argument) };
    (made >= 0).then_some(made)
}

fn guest_memfd(vm: RawFd, size: u64) -> Option<RawFd> {
    // Size, flags and six words of reserved space.
    let mut request = [size, 0, 0, 0, 0, 0, 0, 0];
    ioctl(vm, KVM_CREATE_GUEST_MEMFD, request.as_mut_ptr())
}

/// Reserves our addresses and maps memory of each kind at their start.
fn map_memory(shared: RawFd) -> u64 {
    let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let whole = map(0, RESERVED + GIANT, libc::PROT_NONE, private | libc::MAP_NORESERVE, -1);
    let start = whole.next_multiple_of(GIANT);
    let write = libc::PROT_READ | libc::PROT_WRITE;
    let kinds = [
        (write, private, -1),
        (write, private, -1),
        (libc::PROT_READ, private, -1),
        (libc::PROT_NONE, private, -1),
        (write, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1),
        (write, libc::MAP_SHARED, shared),
        (write, libc::MAP_PRIVATE, shared),
    ];
    let mut at = start;
    for (protection, flags, file) in kinds {
        map(at, HUGE, protection, flags | libc::MAP_FIXED, file);
        at += HUGE;
    }
    assert_eq!(at, start + MEMORY);
    // SAFETY: advice for memory that was mapped just now.
    unsafe { libc::madvise((start + HUGE) as *mut c_void, HUGE as usize, libc::MADV_HUGEPAGE) };
    start
}

fn map(at: u64, size: u64, protection: c_int, flags: c_int, file: RawFd) -> u64 {
    // SAFETY: either new memory, or, with MAP_FIXED, in what was reserved for it.
    let start = unsafe { libc::mmap(at as *mut c_void, size as usize, protection, flags, file, 0) };
    made(start as i64, "mmap") as u64
}
