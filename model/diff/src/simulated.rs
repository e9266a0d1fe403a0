//! The machine that is the model, on a simulated host.
//!
//! It does what the real machine does, by the model's calls of the same names, and adds no rule of its own: a difference
//! is to be the model's.

use std::cell::OnceCell;
use std::sync::Arc;

use anyhow::{Context, Result};
use kvmprep_model::errno::Errno;
use kvmprep_model::gmem::GuestMemfd;
use kvmprep_model::host::MappableFile;
use kvmprep_model::host::simulated::{
    self, Child, File, HugeFile, Place, Protection as HostProtection, Settings, SimulatedHost, Source,
};
use kvmprep_model::memslot::{FileArgument, Region};
use kvmprep_model::personality::{Personality, Version, VmType};
use kvmprep_model::units::{Hva, Level, Pfn, Privacy, Width};
use kvmprep_model::vm::{self, Access, AttributesArgument, Exit, MemoryFault, Nested, PreFault, Vcpu, Vm};

use crate::generator::Abilities;
use crate::machine::{Machine, Maker, Outcome};
use crate::operation::{
    AREA_SIZE, AREAS, Advice, Backing, CODE_GPA, CODE_HVA, CODE_SLOT, FRAME, FileReference, MMIO_WORD,
    Operation, PAGE, POOL_PAGES, Protection, Setting, ThpPolicy, VCPUS, area_of, area_start,
};

const CAP_MANUAL_DIRTY_LOG_PROTECT2: u64 = 168;
const CAP_DISABLE_QUIRKS2: u64 = 213;
/// KVM's numbers of exits that the smallest guest can come out with.
const EXIT_UNKNOWN: i64 = 0;
const EXIT_INTR: i64 = 10;

/// The model of a kernel.
pub struct Simulated {
    personality: Personality,
    has_thp: bool,
}

impl Simulated {
    /// The model of the kernel and machine that this runs on.
    pub fn of_this_kernel(abilities: &Abilities) -> Result<Self> {
        Ok(Simulated {
            personality: Personality {
                version: this_version()?,
                has_sw_protected: abilities.has_sw_protected,
                has_attributes: abilities.has_attributes,
                has_accessed_dirty: true,
                address_bits: address_bits()?,
                user_address_bits: if has_five_levels()? { 56 } else { 47 },
                largest_page: Level::GIGANTIC,
            },
            has_thp: abilities.has_thp,
        })
    }
}

pub(crate) fn this_version() -> Result<Version> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok(Version(major, minor)),
        _ => anyhow::bail!("{release} is no version"),
    }
}

/// How many bits a physical address has.
fn address_bits() -> Result<u32> {
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let sizes =
        info.lines().find_map(|line| line.strip_prefix("address sizes")).context("no address sizes")?;
    let bits = sizes.trim_start_matches([':', ' ', '\t']).split(' ').next();
    bits.and_then(|bits| bits.parse().ok()).with_context(|| format!("no size in {sizes}"))
}

/// Whether the kernel uses page tables of five levels.
fn has_five_levels() -> Result<bool> {
    let text = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo cannot be read")?;
    Ok(text.split_whitespace().any(|word| word == "la57"))
}

impl Maker for Simulated {
    fn make(&self, setting: &Setting) -> Result<Box<dyn Machine + '_>> {
        let machine = SimulatedMachine::new(self, setting);
        Ok(Box::new(machine.map_err(|error| anyhow::anyhow!("the model: {error:?}"))?))
    }
}

/// The file that an area's memory is of.
enum AreaFile {
    Small(Arc<File>),
    Huge(Arc<HugeFile>),
}

/// What a file descriptor or a mapping holds of a guest_memfd: the last one that goes closes it.
struct OpenFile(Arc<GuestMemfd>);

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl MappableFile for OpenFile {
    fn host_fault(&self, index: u64) -> std::result::Result<Pfn, Errno> {
        self.0.host_fault(index)
    }

    fn punch(&self, index: u64, pages: u64) -> std::result::Result<(), Errno> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.0.fallocate(mode, (index * PAGE) as i64, (pages * PAGE) as i64)
    }
}

struct SimulatedMachine {
    vcpus: Vec<Arc<Vcpu>>,
    /// As they were created; None where that failed, or where it was closed.
    files: Vec<Option<Arc<OpenFile>>>,
    /// A guest_memfd of another VM's, once it was asked for.
    file_of_another_vm: OnceCell<Option<Arc<GuestMemfd>>>,
    vm: Arc<Vm>,
    machine: vm::Machine,
    vm_type: VmType,
    host: Arc<SimulatedHost>,
    area_files: [Option<AreaFile>; AREAS],
    child: Option<Child>,
}

/// What a call answers, as the kernel gives it.
fn answer(result: std::result::Result<(), Errno>) -> i64 {
    result.map_or_else(|error| -i64::from(error.0), |()| 0)
}

impl SimulatedMachine {
    fn new(kernel: &Simulated, setting: &Setting) -> std::result::Result<Self, Errno> {
        let host = SimulatedHost::new(Settings::new(kernel.personality.version));
        host.set_thp(match setting.thp {
            _ if !kernel.has_thp => simulated::ThpPolicy::Never,
            ThpPolicy::Always => simulated::ThpPolicy::Always,
            ThpPolicy::Advised => simulated::ThpPolicy::Madvise,
            ThpPolicy::Never => simulated::ThpPolicy::Never,
        });
        host.set_pool(Level::HUGE, POOL_PAGES - setting.promised_elsewhere)?;
        host.map(Place::At(Hva(CODE_HVA)), PAGE, HostProtection::READ_WRITE, Source::Anonymous)?;
        host.write(Hva(CODE_HVA), 1).map_err(|_| Errno::EFAULT)?;
        let machine = vm::Machine::new(kernel.personality, host.clone());
        let vm = Vm::new(&machine, setting.vm_type)?;
        for space in 0..u32::try_from(vm.memslots().len()).unwrap_or(1) {
            vm.set_user_memory_region(&Region {
                slot: CODE_SLOT | space << 16,
                flags: 0,
                gpa: CODE_GPA,
                size: PAGE,
                userspace_addr: CODE_HVA,
                guest_memfd: FileArgument::BadFd,
                guest_memfd_offset: 0,
            })?;
        }
        let vcpus = (0..VCPUS as u32).map(|id| vm.create_vcpu(id)).collect::<std::result::Result<_, _>>()?;
        Ok(SimulatedMachine {
            vcpus,
            files: Vec::new(),
            file_of_another_vm: OnceCell::new(),
            vm,
            machine,
            vm_type: setting.vm_type,
            host,
            area_files: [const { None }; AREAS],
            child: None,
        })
    }

    fn done(&mut self, operation: &Operation) -> Outcome {
        match *operation {
            Operation::Map { at, size, backing } => Outcome::of(answer(self.map(at, size, backing))),
            Operation::Unmap { at, size } => Outcome::of(answer(self.host.unmap(Hva(at), size))),
            Operation::Advise { at, size, advice } => {
                Outcome::of(answer(self.host.advise(Hva(at), size, host_advice(advice))))
            }
            Operation::Protect { at, size, protection } => {
                let protection = match protection {
                    Protection::None => HostProtection::NONE,
                    Protection::Read => HostProtection::READ,
                    Protection::ReadWrite => HostProtection::READ_WRITE,
                };
                Outcome::of(answer(self.host.protect(Hva(at), size, protection)))
            }
            Operation::Store { at, word } => {
                Outcome::of(answer(self.host.write(Hva(at), word.into()).map_err(|_| Errno::EFAULT)))
            }
            Operation::Load { at } => match self.host.read(Hva(at)) {
                Ok(word) => {
                    let mut outcome = Outcome::of(0);
                    outcome.add_unsigned("word", word);
                    outcome
                }
                Err(_) => Outcome::of(answer(Err(Errno::EFAULT))),
            },
            Operation::Punch { area, offset, size } => Outcome::of(answer(self.punch(area, offset, size))),
            Operation::Allocate { area, offset, size } => {
                Outcome::of(answer(self.allocate(area, offset, size)))
            }
            Operation::Fork => Outcome::of(answer(self.fork())),
            Operation::Reap => Outcome::of(self.child.take().map_or(-i64::from(libc::ECHILD), |_| 0)),
            Operation::SetRegion { .. } => Outcome::of(answer(self.set_region(operation))),
            Operation::GetDirtyLog { slot } => match self.vm.get_dirty_log(slot) {
                Ok(words) => {
                    let mut outcome = Outcome::of(0);
                    outcome.add_dirty(&words);
                    outcome
                }
                Err(error) => Outcome::of(answer(Err(error))),
            },
            Operation::ClearDirtyLog { slot, first_page, pages, bits } => {
                let bitmap = vec![bits; pages as usize / 64 + 1];
                Outcome::of(answer(self.vm.clear_dirty_log(slot, first_page, pages.into(), &bitmap)))
            }
            Operation::ProtectDirtyLog { how } => {
                Outcome::of(self.enable(CAP_MANUAL_DIRTY_LOG_PROTECT2, how))
            }
            Operation::CreateFile { size, flags } => {
                let created = self.vm.create_guest_memfd(size, flags);
                let outcome = Outcome::of(answer(created.as_ref().map(|_| ()).map_err(|error| *error)));
                self.files.push(created.ok().map(|file| Arc::new(OpenFile(file))));
                outcome
            }
            Operation::CloseFile { file } => {
                let closed = self.files.get_mut(file).and_then(Option::take);
                Outcome::of(answer(closed.map(drop).ok_or(Errno::EBADF)))
            }
            Operation::PunchFile { file, offset, size, keep_size } => {
                Outcome::of(self.fallocate(file, libc::FALLOC_FL_PUNCH_HOLE, keep_size, offset, size))
            }
            Operation::AllocateFile { file, offset, size, keep_size } => {
                Outcome::of(self.fallocate(file, 0, keep_size, offset, size))
            }
            Operation::SetAttributes { address, size, attributes, flags } => {
                let argument = AttributesArgument { address, size, attributes, flags };
                Outcome::of(answer(self.vm.set_memory_attributes(&argument)))
            }
            Operation::DisableQuirks { quirks } => Outcome::of(self.enable(CAP_DISABLE_QUIRKS2, quirks)),
            Operation::CheckExtension { cap } => Outcome::of(self.vm.check_extension(cap.into())),
            Operation::PreFault { vcpu, gpa, size, flags } => self.pre_fault(vcpu, gpa, size, flags),
            Operation::PreFaultNested { vcpu, has_tables, gpa, size } => {
                self.pre_fault_nested(vcpu, has_tables, gpa, size)
            }
            Operation::SetSmm { vcpu, is_in_smm } => {
                self.vcpus[vcpu].set_smm(is_in_smm);
                Outcome::of(0)
            }
            Operation::GuestRead { vcpu, gpa } => self.touch(vcpu, gpa, None),
            Operation::GuestWrite { vcpu, gpa, word } => self.touch(vcpu, gpa, Some(word)),
            Operation::GuestInterrupted { vcpu, gpa } => self.touch_with_signal(vcpu, gpa),
        }
    }

    fn enable(&self, capability: u64, argument: u64) -> i64 {
        answer(self.vm.enable_capability(capability, 0, [argument, 0, 0, 0]))
    }

    fn map(&mut self, at: u64, size: u64, backing: Backing) -> std::result::Result<(), Errno> {
        let area = area_of(at).ok_or(Errno::EINVAL)?;
        // Nothing may be mapped there, which munmap does not mind.
        self.host.unmap(Hva(area_start(area)), AREA_SIZE)?;
        let pages = size / PAGE;
        self.area_files[area] = match backing {
            Backing::MemfdShared | Backing::MemfdPrivate => Some(AreaFile::Small(self.host.memfd(pages))),
            Backing::HugetlbShared => {
                Some(AreaFile::Huge(self.host.huge_memfd(Level::HUGE, size.div_ceil(FRAME))?))
            }
            _ => None,
        };
        let is_shared = backing != Backing::MemfdPrivate;
        let source = match (backing, &self.area_files[area]) {
            (_, Some(AreaFile::Small(file))) => Source::File { file: file.clone(), first: 0, is_shared },
            (_, Some(AreaFile::Huge(file))) => {
                Source::HugeFile { file: file.clone(), first: 0, is_shared, is_reserved: true }
            }
            (Backing::AnonymousShared, None) => Source::SharedAnonymous,
            (Backing::HugetlbPrivate, None) => {
                Source::HugeAnonymous { level: Level::HUGE, is_shared: false, is_reserved: true }
            }
            (Backing::GuestMemfd { file, offset }, None) => {
                let file = self.files.get(file).and_then(Option::as_ref).ok_or(Errno::EBADF)?;
                file.0.check_mmap(true)?;
                Source::GuestMemfd { file: file.clone(), first: offset / PAGE }
            }
            _ => Source::Anonymous,
        };
        self.host.map(Place::At(Hva(at)), size, HostProtection::READ_WRITE, source).map(drop)
    }

    fn area_file(&self, area: usize) -> std::result::Result<&AreaFile, Errno> {
        self.area_files.get(area).and_then(Option::as_ref).ok_or(Errno::EBADF)
    }

    fn punch(&self, area: usize, offset: u64, size: u64) -> std::result::Result<(), Errno> {
        let (first, pages) = (offset / PAGE, size / PAGE);
        match self.area_file(area)? {
            AreaFile::Small(file) => self.host.punch(file, first, pages),
            AreaFile::Huge(file) => self.host.punch_huge(file, first, pages),
        }
    }

    fn allocate(&self, area: usize, offset: u64, size: u64) -> std::result::Result<(), Errno> {
        let (first, pages) = (offset / PAGE, size / PAGE);
        match self.area_file(area)? {
            AreaFile::Small(file) => self.host.allocate(file, first, pages),
            AreaFile::Huge(file) => self.host.allocate_huge(file, first, pages),
        }
    }

    fn fork(&mut self) -> std::result::Result<(), Errno> {
        if self.child.is_some() {
            return Err(Errno::EBUSY);
        }
        self.child = Some(self.host.fork());
        Ok(())
    }

    fn set_region(&self, operation: &Operation) -> std::result::Result<(), Errno> {
        let Operation::SetRegion { slot, flags, gpa, size, hva, file, offset, is_second } = *operation else {
            return Err(Errno::EINVAL);
        };
        let guest_memfd = match file {
            FileReference::Bad => FileArgument::BadFd,
            FileReference::Other => FileArgument::NotGuestMemfd,
            FileReference::OfAnotherVm => match self.file_of_another_vm() {
                Some(file) => FileArgument::File(file.clone()),
                None => FileArgument::BadFd,
            },
            FileReference::GuestMemfd(number) => match self.files.get(number) {
                Some(Some(file)) => FileArgument::File(file.0.clone()),
                _ => FileArgument::BadFd,
            },
        };
        let region =
            Region { slot, flags, gpa, size, userspace_addr: hva, guest_memfd, guest_memfd_offset: offset };
        if is_second {
            self.vm.set_user_memory_region2(&region)
        } else {
            self.vm.set_user_memory_region(&region)
        }
    }

    fn file_of_another_vm(&self) -> Option<&Arc<GuestMemfd>> {
        let make = || Vm::new(&self.machine, self.vm_type).ok()?.create_guest_memfd(AREA_SIZE, 0).ok();
        self.file_of_another_vm.get_or_init(make).as_ref()
    }

    fn fallocate(&self, number: usize, mode: i32, keep_size: bool, offset: u64, size: u64) -> i64 {
        let keep = if keep_size { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
        let Some(Some(file)) = self.files.get(number) else { return -i64::from(libc::EBADF) };
        answer(file.0.fallocate(mode | keep, offset as i64, size as i64))
    }

    fn pre_fault(&self, vcpu: usize, gpa: u64, size: u64, flags: u64) -> Outcome {
        let mut range = PreFault { gpa, size, flags };
        let done = self.vcpus[vcpu].pre_fault(&mut range);
        let mut outcome = Outcome::of(answer(done));
        outcome.add_unsigned("gpa", range.gpa);
        outcome.add_unsigned("size", range.size);
        if let Some(fault) = self.vcpus[vcpu].memory_fault_of_pre_fault() {
            add_memory_fault(&mut outcome, fault);
        }
        outcome
    }

    fn pre_fault_nested(&self, vcpu: usize, has_tables: bool, gpa: u64, size: u64) -> Outcome {
        let nested = if has_tables { Nested::WithTables } else { Nested::WithoutTables };
        if let Err(errno) = self.vcpus[vcpu].set_nested(Some(nested)) {
            self.vcpus[vcpu].renew_root();
            return Outcome::of(answer(Err(errno)));
        }
        let outcome = self.pre_fault(vcpu, gpa, size, 0);
        self.vcpus[vcpu].set_nested(None).expect("it may always stop");
        outcome
    }

    fn touch_with_signal(&self, vcpu: usize, gpa: u64) -> Outcome {
        self.vcpus[vcpu].send_signal();
        let outcome = self.touch(vcpu, gpa, None);
        self.vcpus[vcpu].take_signal();
        outcome
    }

    /// The guest fetches its code, does its access, and fetches what tells of its end.
    fn touch(&self, vcpu: usize, gpa: u64, word: Option<u32>) -> Outcome {
        let vcpu = &self.vcpus[vcpu];
        let operation = word.map_or(vm::Operation::Read, |word| vm::Operation::Write(word.into()));
        let fetch = Access {
            gpa: CODE_GPA,
            width: Width::Four,
            operation: vm::Operation::Fetch,
            privacy: Privacy::Shared,
        };
        vcpu.queue(fetch);
        vcpu.queue(Access { gpa, width: Width::Four, operation, privacy: Privacy::Shared });
        vcpu.queue(fetch);
        let mut run = vcpu.run();
        let mut seen = Vec::new();
        if let Exit::Mmio { gpa, written, .. } = run.exit {
            seen =
                vec![("mmio.gpa", gpa as i64), ("mmio.len", 4), ("mmio.is_write", written.is_some().into())];
            match written {
                Some(word) => seen.push(("mmio.word", word as i64)),
                None => run.read.push(MMIO_WORD.into()),
            }
            run.exit = vcpu.run().exit;
        }
        // What the guest could not do it is not to do later: the next access begins elsewhere.
        vcpu.forget_queue();
        let mut outcome = Outcome::of(match run.exit {
            Exit::MemoryFault(error, _) | Exit::Failed(error) => answer(Err(error)),
            _ => 0,
        });
        seen.into_iter().for_each(|(name, value)| outcome.add(name, value));
        match run.exit {
            Exit::Done => run.read.iter().for_each(|word| outcome.add_unsigned("word", *word)),
            Exit::MemoryFault(_, fault) => add_memory_fault(&mut outcome, fault),
            Exit::Failed(Errno::EINTR) => outcome.add("exit_reason", EXIT_INTR),
            _ => outcome.add("exit_reason", EXIT_UNKNOWN),
        }
        outcome
    }
}

fn add_memory_fault(outcome: &mut Outcome, fault: MemoryFault) {
    outcome.add_unsigned("memory_fault.flags", fault.flags);
    outcome.add_unsigned("memory_fault.gpa", fault.gpa);
    outcome.add_unsigned("memory_fault.size", fault.size);
}

fn host_advice(advice: Advice) -> simulated::Advice {
    match advice {
        Advice::DontNeed => simulated::Advice::DontNeed,
        Advice::Remove => simulated::Advice::Remove,
        Advice::PopulateRead => simulated::Advice::PopulateRead,
        Advice::PopulateWrite => simulated::Advice::PopulateWrite,
        Advice::HugePage => simulated::Advice::HugePage,
        Advice::NoHugePage => simulated::Advice::NoHugePage,
        Advice::Collapse => simulated::Advice::Collapse,
        Advice::DontFork => simulated::Advice::DontFork,
        Advice::DoFork => simulated::Advice::DoFork,
    }
}

impl Machine for SimulatedMachine {
    fn apply(&mut self, operation: &Operation) -> Outcome {
        let mut outcome = self.done(operation);
        let pages = self.vm.statistics();
        outcome.add_unsigned("pages_4k", pages.pages_4k);
        outcome.add_unsigned("pages_2m", pages.pages_2m);
        outcome.add_unsigned("pages_1g", pages.pages_1g);
        for vcpu in &self.vcpus {
            let counters = vcpu.statistics();
            outcome.add_unsigned("pf_taken", counters.pf_taken);
            outcome.add_unsigned("pf_fixed", counters.pf_fixed);
            outcome.add_unsigned("pf_emulate", counters.pf_emulate);
            outcome.add_unsigned("pf_spurious", counters.pf_spurious);
            outcome.add_unsigned("pf_fast", counters.pf_fast);
            outcome.add_unsigned("pf_mmio_spte_created", counters.pf_mmio_spte_created);
        }
        outcome
    }
}
