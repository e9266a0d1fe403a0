//! A virtual machine as its descriptor has it: which request is which of the model's calls.
//!
//! The structures of each request are read here, and only here; what they mean is the model's. Nothing here decides about memory.

use crate::clock::Clock;
use crate::host;
use crate::ioctls::*;
use crate::memfd::Memfd;
use crate::objects::{self, Object};
use crate::refuse;
use crate::snp;
use crate::stats::{Of, StatisticsObject};
use crate::system::{self, MOST_VCPU_NUMBERS};
use crate::tdx;
use crate::user::{self, ClearDirtyLog, DirtyLog};
use crate::vcpu::VcpuObject;
use kvm_bindings::*;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::memslot::{FileArgument, Region};
use kvmprep_model::personality::VmType;
use kvmprep_model::vm::{AttributesArgument, Vm};
use std::ffi::c_int;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// `KVM_HC_MAP_GPA_RANGE`, the one hypercall that KVM hands on.
const HYPERCALLS: u64 = 1 << 12;
/// Three pages below 4 GiB are the last place for the task state segment.
const LAST_TSS: u64 = u32::MAX as u64 + 1 - 3 * 4096;

/// A virtual machine.
pub struct VmObject {
    model: Arc<Vm>,
    /// Which hypercalls the program wants to see (`KVM_CAP_EXIT_HYPERCALL`).
    hypercalls: AtomicU64,
    /// Numbers of vCPUs are less than this (`KVM_CAP_MAX_VCPU_ID`), once it is said.
    vcpu_numbers: OnceLock<u64>,
    clock: Clock,
    /// Registered memory of an SNP guest (KVM_MEMORY_ENCRYPT_REG_REGION): where, and how many bytes.
    registered: Mutex<Vec<(u64, u64)>>,
}

impl VmObject {
    /// KVM_CREATE_VM: a descriptor of a new one.
    pub fn create(vm_type: u64) -> Result<RawFd> {
        let model = system::create_vm(vm_type)?;
        let vm = Arc::new(VmObject {
            model,
            hypercalls: AtomicU64::new(0),
            vcpu_numbers: OnceLock::new(),
            clock: Clock::new(),
            registered: Mutex::default(),
        });
        let file = Arc::new(Memfd::new(c"kvm-vm", 0)?);
        objects::add(file, libc::O_RDWR | libc::O_CLOEXEC, Object::Vm(vm))
    }

    /// The model's.
    pub fn model(&self) -> &Arc<Vm> {
        &self.model
    }

    /// Whether a hypercall is handed on to the program.
    pub fn exits_on_hypercall(&self, number: u64) -> bool {
        self.hypercalls.load(Ordering::Relaxed) & 1 << number != 0
    }

    /// Whether a vCPU may have this number.
    pub fn takes_vcpu(&self, number: u64) -> bool {
        number < *self.vcpu_numbers.get().unwrap_or(&MOST_VCPU_NUMBERS)
    }

    /// Answers a request.
    pub fn ioctl(self: &Arc<Self>, request: u32, argument: u64) -> Result<i64> {
        if self.model.is_dead() {
            return Err(Errno::EIO);
        }
        let personality = self.model.personality();
        let is_unknown = match request {
            KVM_SET_USER_MEMORY_REGION2 => !personality.has_memory_region2(),
            KVM_SET_MEMORY_ATTRIBUTES => !personality.has_memory_attributes(),
            KVM_CREATE_GUEST_MEMFD => !personality.has_guest_memfd(),
            _ => false,
        };
        if is_unknown {
            return Err(Errno::ENOTTY);
        }
        match request {
            KVM_CHECK_EXTENSION => Ok(system::check_extension(Some(&self.model), argument)),
            KVM_CREATE_VCPU => VcpuObject::create(self, argument).map(i64::from),
            KVM_GET_STATS_FD => StatisticsObject::open(Of::Vm(self.clone())).map(i64::from),
            KVM_CREATE_GUEST_MEMFD => self.create_guest_memfd(argument).map(i64::from),
            _ => self.change(request, argument).map(|()| 0),
        }
    }

    /// Those that answer 0.
    fn change(&self, request: u32, argument: u64) -> Result<()> {
        match request {
            KVM_SET_USER_MEMORY_REGION => {
                let region: kvm_userspace_memory_region = user::read(argument)?;
                self.model.set_user_memory_region(&Region {
                    slot: region.slot,
                    flags: region.flags,
                    gpa: region.guest_phys_addr,
                    size: region.memory_size,
                    userspace_addr: region.userspace_addr,
                    guest_memfd: FileArgument::BadFd,
                    guest_memfd_offset: 0,
                })
            }
            KVM_SET_USER_MEMORY_REGION2 => {
                let region: kvm_userspace_memory_region2 = user::read(argument)?;
                self.model.set_user_memory_region2(&Region {
                    slot: region.slot,
                    flags: region.flags,
                    gpa: region.guest_phys_addr,
                    size: region.memory_size,
                    userspace_addr: region.userspace_addr,
                    guest_memfd: file_argument(region.guest_memfd as c_int),
                    guest_memfd_offset: region.guest_memfd_offset,
                })
            }
            KVM_SET_MEMORY_ATTRIBUTES => {
                let range: kvm_memory_attributes = user::read(argument)?;
                let (address, size) = (range.address, range.size);
                let (attributes, flags) = (range.attributes, range.flags);
                self.model.set_memory_attributes(&AttributesArgument { address, size, attributes, flags })
            }
            KVM_ENABLE_CAP => self.enable_capability(argument),
            KVM_GET_DIRTY_LOG => {
                let log: DirtyLog = user::read(argument)?;
                user::write_all(log.bitmap, &self.model.get_dirty_log(log.slot)?)
            }
            KVM_CLEAR_DIRTY_LOG => self.clear_dirty_log(argument),
            KVM_SET_TSS_ADDR if argument > LAST_TSS => Err(Errno::EINVAL),
            // As on AMD's processors, which need no memory for them.
            KVM_SET_TSS_ADDR => Ok(()),
            KVM_SET_IDENTITY_MAP_ADDR if self.model.has_vcpus() => Err(Errno::EINVAL),
            KVM_SET_IDENTITY_MAP_ADDR => user::read::<u64>(argument).map(drop),
            KVM_GET_CLOCK => self.clock.get(argument),
            KVM_SET_CLOCK => self.clock.set(argument),
            KVM_MEMORY_ENCRYPT_OP => match self.model.vm_type() {
                VmType::Tdx => tdx::vm_command(self, argument),
                VmType::Snp => snp::command(self, argument),
                _ => Err(Errno::ENOTTY),
            },
            KVM_MEMORY_ENCRYPT_REG_REGION => self.register_region(argument, true),
            KVM_MEMORY_ENCRYPT_UNREG_REGION => self.register_region(argument, false),
            _ => Err(refuse::request(ObjectKind::Vm, request)),
        }
    }

    fn create_guest_memfd(self: &Arc<Self>, argument: u64) -> Result<RawFd> {
        let wanted: kvm_create_guest_memfd = user::read(argument)?;
        let model = self.model.create_guest_memfd(wanted.size, wanted.flags)?;
        let frames = host::process().take_new_file().expect("a guest_memfd was just made of it");
        // As the kernel makes it: not closed by exec.
        objects::add(Arc::new(Memfd::of(frames)), libc::O_RDWR, Object::GuestMemfd(model, self.clone()))
    }

    /// An SNP guest's frames are its own by other means; the kernel keeps these, too, from being moved.
    fn register_region(&self, argument: u64, is_new: bool) -> Result<()> {
        let kvm_enc_region { addr, size } = user::read(argument)?;
        if self.model.snp().is_none_or(|snp| snp.asid().is_none()) {
            return Err(Errno::ENOTTY);
        }
        let mut registered = self.registered.lock().unwrap_or_else(PoisonError::into_inner);
        if is_new {
            if size == 0 || addr.checked_add(size).is_none() {
                return Err(Errno::EINVAL);
            }
            registered.push((addr, size));
            return Ok(());
        }
        let place = registered.iter().position(|region| *region == (addr, size)).ok_or(Errno::EINVAL)?;
        registered.remove(place);
        Ok(())
    }

    fn enable_capability(&self, argument: u64) -> Result<()> {
        let capability: kvm_enable_cap = user::read(argument)?;
        match capability.cap {
            KVM_CAP_EXIT_HYPERCALL if capability.flags != 0 || capability.args[0] & !HYPERCALLS != 0 => {
                Err(Errno::EINVAL)
            }
            KVM_CAP_EXIT_HYPERCALL => {
                self.hypercalls.store(capability.args[0], Ordering::Relaxed);
                Ok(())
            }
            KVM_CAP_MAX_VCPU_ID => {
                let [most, ..] = capability.args;
                let is_free = capability.flags == 0 && (1..=MOST_VCPU_NUMBERS).contains(&most);
                if is_free && *self.vcpu_numbers.get_or_init(|| most) == most {
                    Ok(())
                } else {
                    Err(Errno::EINVAL)
                }
            }
            number if system::is_enabled_by_model(number) => {
                self.model.enable_capability(number.into(), capability.flags, capability.args)
            }
            number => Err(refuse::capability("a VM", number)),
        }
    }

    fn clear_dirty_log(&self, argument: u64) -> Result<()> {
        let log: ClearDirtyLog = user::read(argument)?;
        // What cannot be read is found where the model looks at it, behind what it checks first.
        let mut words = vec![0u64; log.pages.div_ceil(u64::BITS) as usize];
        if user::read_all(log.bitmap, &mut words).is_err() {
            words.clear();
        }
        self.model.clear_dirty_log(log.slot, log.first_page, log.pages.into(), &words)
    }
}

/// What a descriptor is that should be a guest_memfd's. One that only names a file (O_PATH) is none.
fn file_argument(fd: c_int) -> FileArgument {
    // SAFETY: nothing is written.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 || flags & libc::O_PATH != 0 {
        return FileArgument::BadFd;
    }
    objects::guest_memfd(fd).map_or(FileArgument::NotGuestMemfd, FileArgument::File)
}
