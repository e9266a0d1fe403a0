//! What operations do: each becomes a deed, with what it is done to looked up, which any thread can do.
//!
//! What a deed answers is part of the story, whatever it is: only what cannot be begun is an error. Nothing here knows of
//! threads, and no rule of KVM's stands here.

use super::language::{Action, HostAction, Mode, Operation, Place, Range};
use super::stage::{Memory, Slot, Stage};
use anyhow::{Context, Result, bail};
use kvmprep_model::attributes::KVM_MEMORY_ATTRIBUTE_PRIVATE;
use kvmprep_model::confidential::User;
use kvmprep_model::dump::text::size;
use kvmprep_model::errno::Result as Answered;
use kvmprep_model::host::simulated::{Advice, Protection, SimulatedHost};
use kvmprep_model::memslot::{FileArgument, LOG_DIRTY_PAGES, Region};
use kvmprep_model::snp::{self, PageType};
use kvmprep_model::tdx;
use kvmprep_model::units::{Gfn, Hva, PAGE_SIZE, Privacy, Width};
use kvmprep_model::vm::{Access, AttributesArgument, Exit, Operation as Does, PreFault, Vcpu, Vm};
use rustix::fs::FallocateFlags;
use std::sync::Arc;

/// `KVM_CAP_DISABLE_QUIRKS2`, and the quirk that is of memory.
const CAP_DISABLE_QUIRKS2: u64 = 213;
const QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;

/// What came of a deed.
#[derive(Clone, PartialEq, Debug)]
pub struct Answer {
    pub text: String,
    pub is_success: bool,
}

/// Something to be done, by any thread.
pub type Deed = Box<dyn FnOnce() -> Answer + Send>;

impl Answer {
    pub fn ok() -> Self {
        Answer { text: "0".into(), is_success: true }
    }

    pub fn told(text: impl Into<String>, is_success: bool) -> Self {
        Answer { text: text.into(), is_success }
    }

    pub fn of(result: Answered<()>) -> Self {
        match result {
            Ok(()) => Answer::ok(),
            Err(errno) => Answer::told(format!("{errno:?}"), false),
        }
    }

    fn of_left(result: Answered<()>, left: u64) -> Self {
        match result {
            Ok(()) if left > 0 => Answer::told(format!("0, {} left", size(left)), false),
            result => Answer::of(result),
        }
    }
}

impl Stage {
    /// What an operation is to do. Names are looked up now.
    pub fn deed(&mut self, operation: &Operation) -> Result<Deed> {
        match operation {
            Operation::Slot { .. }
            | Operation::Move { .. }
            | Operation::Delete { .. }
            | Operation::Log { .. } => self.set_region(operation),
            Operation::DirtyLog { slot } => {
                let (vm, slot) = (Arc::clone(self.vm()?), *slot);
                Ok(Box::new(move || dirty_log(&vm, slot)))
            }
            Operation::Attributes { range, to } => self.attributes(*range, *to),
            Operation::Convert { range, to } => self.convert(*range, *to),
            Operation::Load { range, is_measured } => self.load(*range, *is_measured),
            Operation::Seal => self.seal(),
            Operation::PreFault { range, vcpu } => self.pre_fault(*range, *vcpu),
            Operation::Guest { action, gpa, privacy, vcpu } => self.guest(*action, *gpa, *privacy, *vcpu),
            Operation::Run { vcpu } => Ok(Box::new(run(self.vcpu(*vcpu)?))),
            Operation::Punch { file, size } => self.fallocate(file, *size, true),
            Operation::Allocate { file, size } => self.fallocate(file, *size, false),
            Operation::Close { file } => self.close(file),
            Operation::Host { action, memory, size } => self.host_does(*action, memory, *size),
            Operation::Mode { .. } | Operation::Signal { .. } | Operation::Forget { .. } => {
                self.set_vcpu(operation)
            }
            Operation::DisableQuirk => {
                let vm = Arc::clone(self.vm()?);
                let quirks = [QUIRK_SLOT_ZAP_ALL, 0, 0, 0];
                Ok(Box::new(move || Answer::of(vm.enable_capability(CAP_DISABLE_QUIRKS2, 0, quirks))))
            }
            _ => bail!("that is nothing for a virtual machine"),
        }
    }

    fn set_region(&mut self, operation: &Operation) -> Result<Deed> {
        let vm = Arc::clone(self.vm()?);
        let region = self.region(operation)?;
        let is_old = !vm.personality().has_memory_region2();
        Ok(Box::new(move || {
            let set = if is_old { Vm::set_user_memory_region } else { Vm::set_user_memory_region2 };
            Answer::of(set(&vm, &region))
        }))
    }

    /// What the ioctl is given.
    fn region(&mut self, operation: &Operation) -> Result<Region> {
        match operation {
            Operation::Slot { slot, at, memory, file, flags } => {
                let guest_memfd = match file {
                    Some(file) => FileArgument::File(self.file(&file.name)?),
                    None => FileArgument::BadFd,
                };
                let region = Region {
                    slot: *slot,
                    flags: *flags,
                    gpa: at.gpa,
                    size: at.size,
                    userspace_addr: self.memory(memory)?.0,
                    guest_memfd,
                    guest_memfd_offset: file.as_ref().map_or(0, |file| file.offset),
                };
                self.slots.insert(*slot, Slot { region: region.clone(), file: file.clone() });
                Ok(region)
            }
            Operation::Move { slot, gpa } => {
                let region = &mut self.known_slot(*slot)?.region;
                region.gpa = *gpa;
                Ok(region.clone())
            }
            Operation::Log { slot, is_on } => {
                let region = &mut self.known_slot(*slot)?.region;
                region.flags &= !LOG_DIRTY_PAGES;
                region.flags |= if *is_on { LOG_DIRTY_PAGES } else { 0 };
                Ok(region.clone())
            }
            Operation::Delete { slot } => {
                let region = self.known_slot(*slot)?.region.clone();
                Ok(Region { size: 0, flags: 0, guest_memfd: FileArgument::BadFd, ..region })
            }
            _ => bail!("that sets no slot"),
        }
    }

    fn attributes(&self, range: Range, to: Privacy) -> Result<Deed> {
        let vm = Arc::clone(self.vm()?);
        let argument = attributes_argument(range, to);
        Ok(Box::new(move || Answer::of(vm.set_memory_attributes(&argument))))
    }

    /// As the library does it: the attributes first, then what has gone out of sight is given up.
    fn convert(&self, range: Range, to: Privacy) -> Result<Deed> {
        let vm = Arc::clone(self.vm()?);
        let host = self.host.clone();
        let argument = attributes_argument(range, to);
        let mut private = Vec::new();
        let mut shared = Vec::new();
        for Slot { region, file } in self.slots.values() {
            let start = range.gpa.max(region.gpa);
            let end = range.gpa.saturating_add(range.size).min(region.gpa.saturating_add(region.size));
            let Some(size) = end.checked_sub(start).filter(|size| *size > 0) else { continue };
            let offset = start - region.gpa;
            if let Some(place) = file {
                private.push((self.file(&place.name)?, place.offset + offset, size));
            }
            let is_it = |memory: &&Memory| memory.contains(region.userspace_addr);
            let is_shared = self.memories.values().find(is_it).is_some_and(|memory| memory.is_shared);
            let advice = if is_shared { Advice::Remove } else { Advice::DontNeed };
            shared.push((Hva(region.userspace_addr + offset), size, advice));
        }
        Ok(Box::new(move || {
            Answer::of(vm.set_memory_attributes(&argument).and_then(|()| match to {
                Privacy::Shared => private.iter().try_for_each(|(file, offset, size)| {
                    file.fallocate(punch_hole(), *offset as i64, *size as i64)
                }),
                Privacy::Private => {
                    shared.iter().try_for_each(|(hva, size, advice)| host.advise(*hva, *size, *advice))
                }
            }))
        }))
    }

    fn load(&self, range: Range, is_measured: bool) -> Result<Deed> {
        let vm = Arc::clone(self.vm()?);
        let vcpu = self.vcpu(0)?;
        let is_in = |region: &Region| (region.gpa..region.gpa + region.size).contains(&range.gpa);
        let slot = self.slots.values().find(|slot| is_in(&slot.region));
        let slot = slot.with_context(|| {
            format!("no slot has {:#x}, whose memory the image is to come from", range.gpa)
        })?;
        let source = slot.region.userspace_addr + (range.gpa - slot.region.gpa);
        if vm.snp().is_some() {
            let update = snp::LaunchUpdate {
                gfn_start: range.gpa / PAGE_SIZE,
                uaddr: source,
                len: range.size,
                page_type: (if is_measured { PageType::Normal } else { PageType::Unmeasured }) as u8,
                flags: 0,
            };
            return Ok(Box::new(move || {
                let mut command = User::new(snp::Call::LaunchUpdate(User::new(update)).command());
                let result = vm.snp_command(Some(&mut command));
                let snp::Call::LaunchUpdate(left) = command.content.call else { return Answer::of(result) };
                Answer::of_left(result, left.content.len)
            }));
        }
        let region =
            tdx::InitMemRegion { source_addr: source, gpa: range.gpa, nr_pages: range.size / PAGE_SIZE };
        let flags = if is_measured { tdx::launch::MEASURE_MEMORY_REGION } else { 0 };
        Ok(Box::new(move || {
            let call = tdx::Call::InitMemRegion(User::new(region));
            Answer::of(vcpu.tdx_command(&mut User::new(call.command(flags))))
        }))
    }

    fn seal(&self) -> Result<Deed> {
        let vm = Arc::clone(self.vm()?);
        Ok(Box::new(move || {
            Answer::of(if vm.snp().is_some() {
                let call = snp::Call::LaunchFinish(User::new(snp::LaunchFinish::default()));
                vm.snp_command(Some(&mut User::new(call.command())))
            } else {
                vm.tdx_command(&mut User::new(tdx::Call::FinalizeVm.command(0)))
            })
        }))
    }

    fn pre_fault(&self, range: Range, vcpu: u32) -> Result<Deed> {
        let vcpu = self.vcpu(vcpu)?;
        Ok(Box::new(move || {
            let mut range = PreFault { gpa: range.gpa, size: range.size, flags: 0 };
            let result = vcpu.pre_fault(&mut range);
            Answer::of_left(result, range.size)
        }))
    }

    fn guest(&mut self, action: Action, gpa: u64, privacy: Option<Privacy>, vcpu: u32) -> Result<Deed> {
        let vcpu = self.vcpu(vcpu)?;
        let known = vcpu.vm().attributes().privacy(Gfn::of_gpa(gpa));
        let operation = match action {
            Action::Read => Does::Read,
            Action::Write => {
                self.next_word += 1;
                Does::Write(self.next_word - 1)
            }
            Action::Fetch => Does::Fetch,
            Action::Accept => Does::Accept,
            Action::GiveUp => Does::GiveUp,
        };
        let access = Access { gpa, width: Width::Eight, operation, privacy: privacy.unwrap_or(known) };
        let run = run(Arc::clone(&vcpu));
        Ok(Box::new(move || {
            vcpu.queue(access);
            run()
        }))
    }

    fn fallocate(&self, place: &Place, size: u64, is_hole: bool) -> Result<Deed> {
        let file = self.file(&place.name)?;
        let mode = if is_hole { punch_hole() } else { FallocateFlags::KEEP_SIZE.bits() as i32 };
        let offset = place.offset as i64;
        Ok(Box::new(move || Answer::of(file.fallocate(mode, offset, size as i64))))
    }

    fn close(&mut self, name: &str) -> Result<Deed> {
        let file = self.file(name)?;
        self.files.remove(name);
        Ok(Box::new(move || {
            file.close();
            Answer::ok()
        }))
    }

    fn host_does(&self, action: HostAction, memory: &Place, size: u64) -> Result<Deed> {
        let hva = self.memory(memory)?;
        let host = self.host.clone();
        let word = self.next_word;
        Ok(Box::new(move || host_deed(&host, action, hva, size, word)))
    }

    fn set_vcpu(&self, operation: &Operation) -> Result<Deed> {
        match *operation {
            Operation::Mode { mode, vcpu } => {
                let vcpu = self.vcpu(vcpu)?;
                Ok(Box::new(move || match mode {
                    Mode::Smm(is_in_smm) => {
                        vcpu.set_smm(is_in_smm);
                        Answer::ok()
                    }
                    Mode::Nested(nested) => Answer::of(vcpu.set_nested(nested)),
                }))
            }
            Operation::Signal { vcpu } => {
                let vcpu = self.vcpu(vcpu)?;
                Ok(Box::new(move || {
                    vcpu.send_signal();
                    Answer::ok()
                }))
            }
            Operation::Forget { vcpu } => {
                let vcpu = self.vcpu(vcpu)?;
                Ok(Box::new(move || {
                    vcpu.forget_queue();
                    vcpu.take_signal();
                    Answer::ok()
                }))
            }
            _ => bail!("that is not about a vCPU"),
        }
    }
}

fn attributes_argument(range: Range, to: Privacy) -> AttributesArgument {
    AttributesArgument {
        address: range.gpa,
        size: range.size,
        attributes: if to == Privacy::Private { KVM_MEMORY_ATTRIBUTE_PRIVATE } else { 0 },
        flags: 0,
    }
}

fn punch_hole() -> i32 {
    (FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE).bits() as i32
}

fn dirty_log(vm: &Vm, slot: u32) -> Answer {
    match vm.get_dirty_log(slot) {
        Ok(words) => {
            let is_set = |page: &usize| words[page / 64] >> (page % 64) & 1 != 0;
            let pages: Vec<_> = (0..words.len() * 64).filter(is_set).map(|page| page.to_string()).collect();
            Answer::told(if pages.is_empty() { "no page".into() } else { pages.join(" ") }, true)
        }
        Err(errno) => Answer::of(Err(errno)),
    }
}

/// Has a vCPU do what its guest is to do, and says how that ended and how many faults it took.
fn run(vcpu: Arc<Vcpu>) -> impl FnOnce() -> Answer + Send {
    move || {
        let before = vcpu.statistics().pf_taken;
        let run = vcpu.run();
        let faults = match vcpu.statistics().pf_taken - before {
            0 => "no fault".to_string(),
            1 => "1 fault".to_string(),
            many => format!("{many} faults"),
        };
        let exit = match run.exit {
            Exit::Done => {
                let read: String = run.read.iter().map(|word| format!(", reads {word}")).collect();
                return Answer::told(format!("done, {faults}{read}"), true);
            }
            Exit::Mmio { gpa, .. } => format!("MMIO at {gpa:#x}"),
            Exit::EmulationFailed { gpa } => format!("no instruction at {gpa:#x}"),
            Exit::GuestException { gpa } => format!("exception in the guest at {gpa:#x}"),
            Exit::MemoryFault(errno, fault) => {
                let privacy = if fault.flags == 0 { "shared" } else { "private" };
                format!("{errno:?}, memory fault: {:#x}, {privacy}", fault.gpa)
            }
            Exit::Failed(errno) => format!("{errno:?}"),
            Exit::NotEntered { exit_reason } => format!("not let into the guest (exit reason {exit_reason})"),
        };
        Answer::told(format!("{exit}, {faults}"), false)
    }
}

fn host_deed(host: &SimulatedHost, action: HostAction, hva: Hva, size: u64, word: u64) -> Answer {
    let advice = match action {
        HostAction::Discard => Advice::DontNeed,
        HostAction::Remove => Advice::Remove,
        HostAction::PopulateRead => Advice::PopulateRead,
        HostAction::PopulateWrite => Advice::PopulateWrite,
        HostAction::Collapse => Advice::Collapse,
        HostAction::Protect => return Answer::of(host.protect(hva, size, Protection::READ)),
        HostAction::Unprotect => return Answer::of(host.protect(hva, size, Protection::READ_WRITE)),
        HostAction::Unmap => return Answer::of(host.unmap(hva, size)),
        HostAction::Poison => return Answer::of(host.poison(hva)),
        HostAction::Read | HostAction::Write => {
            for page in 0..size.div_ceil(PAGE_SIZE) {
                let hva = hva.plus_pages(page);
                let touched = match action {
                    HostAction::Write => host.write(hva, word),
                    _ => host.read(hva).map(drop),
                };
                if let Err(refusal) = touched {
                    return Answer::told(format!("{refusal:?} at page {page}"), false);
                }
            }
            return Answer::ok();
        }
    };
    Answer::of(host.advise(hva, size, advice))
}
