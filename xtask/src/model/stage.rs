//! Where a scenario is played: a machine that is all model, with what the scenario has made on it.
//!
//! Here names become what they are of, and frames get names again. A name that nothing has is an error of the scenario, and
//! says what is missing. What is done with it all stands in `deeds.rs`.

use super::calls::Call;
use super::language::{Failure, Operation, Place, Range, SlotNumber};
use anyhow::{Context, Result, anyhow};
use kvmprep_model::confidential::Stop;
use kvmprep_model::dump::{SlotDump, VmDump};
use kvmprep_model::gmem::GuestMemfd;
use kvmprep_model::host::simulated::{Mapped, Settings, SimulatedHost};
use kvmprep_model::invariants;
use kvmprep_model::memslot::Region;
use kvmprep_model::personality::{Personality, Version};
use kvmprep_model::snp::{Firmware, Rmp, RmpHost};
use kvmprep_model::tdx::Module;
use kvmprep_model::units::{Gfn, GfnRange, Hva, PAGE_SIZE, Pfn};
use kvmprep_model::vm::{Machine, Vcpu, Vm};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The machine, and what was made on it.
pub struct Stage {
    version: Version,
    pub(super) host: Arc<SimulatedHost>,
    module: Arc<Module>,
    firmware: Arc<Firmware>,
    pub(super) vm: Option<Arc<Vm>>,
    pub(super) vcpus: BTreeMap<u32, Arc<Vcpu>>,
    pub(super) memories: BTreeMap<String, Memory>,
    pub(super) files: BTreeMap<String, Arc<GuestMemfd>>,
    pub(super) slots: BTreeMap<SlotNumber, Slot>,
    /// What the guest writes next, so that it is seen which write was which.
    pub(super) next_word: u64,
}

/// Memory of the VMM's.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    pub(super) hva: Hva,
    pub(super) size: u64,
    /// Other mappings of it may be, so that giving it up takes more than forgetting this one.
    pub(super) is_shared: bool,
}

/// A slot as the scenario has asked for it.
#[derive(Clone)]
pub(super) struct Slot {
    pub(super) region: Region,
    pub(super) file: Option<Place>,
}

impl Memory {
    pub(super) fn contains(&self, hva: u64) -> bool {
        (self.hva.0..self.hva.0 + self.size).contains(&hva)
    }
}

impl Stage {
    /// A machine with this kernel, TDX and SNP, and nothing made on it.
    pub fn new(version: Version) -> Self {
        let host = SimulatedHost::new(Settings::new(version));
        let module = Module::new(host.clone(), 16);
        let firmware = Firmware::new(host.clone(), Arc::<Rmp>::default(), 16, u64::MAX);
        Stage {
            version,
            host,
            module,
            firmware,
            vm: None,
            vcpus: BTreeMap::new(),
            memories: BTreeMap::new(),
            files: BTreeMap::new(),
            slots: BTreeMap::new(),
            next_word: 1,
        }
    }

    /// Its kernel.
    pub fn version(&self) -> Version {
        self.version
    }

    pub fn vm(&self) -> Result<&Arc<Vm>> {
        self.vm.as_ref().context("there is no virtual machine yet: it begins with `vm TYPE`")
    }

    /// The machine as virtual machines are made on it.
    pub(super) fn machine(&self) -> Machine {
        let guarded = RmpHost::new(self.host.clone(), self.firmware.rmp().clone());
        let mut machine = Machine::new(Personality::with_everything(self.version), guarded);
        machine.module = Some(self.module.clone());
        machine.firmware = Some(self.firmware.clone());
        machine
    }

    pub fn fail(&self, call: Call, nth: u64, how: Failure) {
        call.fail(&self.module, &self.firmware, nth, how);
    }

    pub fn stop(&self, call: Call, nth: u64) -> Stop {
        call.stop(&self.module, &self.firmware, nth)
    }

    /// Everything that must be true of a virtual machine that nobody is at.
    pub fn check(&self) -> Result<()> {
        let Some(vm) = &self.vm else { return Ok(()) };
        let behind = |hva| self.host.view(hva).pfn;
        invariants::check(vm, &behind).map_err(|broken| anyhow!("the model is broken: {broken}"))
    }

    /// What to call a frame that is mapped at a guest frame.
    pub fn name_of_frame(&self, dump: &VmDump, gfn: Gfn, pfn: Pfn) -> String {
        if let Some((number, index)) = dump.frame(pfn).and_then(|frame| frame.file) {
            let is_it = |slot: &&SlotDump| slot.file.as_ref().is_some_and(|file| file.number == number);
            let slot = dump.slots.iter().find(is_it);
            let asked =
                slot.and_then(|slot| self.slots.get(&(u32::from(slot.as_id) << 16 | u32::from(slot.id))));
            let file = asked.and_then(|slot| slot.file.as_ref());
            return format!("{} page {index}", file.map_or("file", |file| &file.name));
        }
        let slot = dump.slots.iter().find(|slot| slot.range.contains(gfn));
        slot.map_or(String::new(), |slot| {
            self.name_of_hosts(slot.hva.plus_pages(gfn.0 - slot.range.start.0), pfn)
        })
    }

    /// What to call a frame of the VMM's own memory that should lie behind this address.
    fn name_of_hosts(&self, hva: Hva, pfn: Pfn) -> String {
        let view = self.host.view(hva);
        if view.mapped == Mapped::Zero {
            return "the zero page".into();
        }
        match self.memories.iter().find(|(_, memory)| memory.contains(hva.0)) {
            Some((name, memory)) if view.pfn == Some(pfn) => {
                format!("{name} page {}", (hva.0 - memory.hva.0) / PAGE_SIZE)
            }
            _ => String::new(),
        }
    }

    /// The guest's frames that an operation is about.
    pub fn ranges_of(&self, operation: &Operation) -> Vec<GfnRange> {
        let of = |range: &Range| GfnRange::new(Gfn::of_gpa(range.gpa), range.size.div_ceil(PAGE_SIZE));
        match operation {
            Operation::Attributes { range, .. }
            | Operation::Convert { range, .. }
            | Operation::Load { range, .. }
            | Operation::PreFault { range, .. } => vec![of(range)],
            Operation::Guest { gpa, .. } => vec![of(&Range { gpa: *gpa, size: PAGE_SIZE })],
            Operation::Punch { file, size } => self.behind(file, *size),
            Operation::Close { file } => self.behind(&Place { name: file.clone(), offset: 0 }, u64::MAX),
            Operation::Delete { slot } => {
                let region = self.slots.get(slot).map(|slot| &slot.region);
                region.iter().map(|region| of(&Range { gpa: region.gpa, size: region.size })).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Where slots have a part of a file.
    fn behind(&self, file: &Place, size: u64) -> Vec<GfnRange> {
        let part = |slot: &Slot| {
            let place = slot.file.as_ref().filter(|place| place.name == file.name)?;
            let start = file.offset.max(place.offset);
            let end = file.offset.saturating_add(size).min(place.offset + slot.region.size);
            let pages = end.checked_sub(start)?.div_ceil(PAGE_SIZE);
            Some(GfnRange::new(Gfn::of_gpa(slot.region.gpa + start - place.offset), pages))
        };
        self.slots.values().filter_map(part).collect()
    }

    pub(super) fn vcpu(&self, number: u32) -> Result<Arc<Vcpu>> {
        self.vm()?;
        self.vcpus
            .get(&number)
            .cloned()
            .with_context(|| format!("there is no vCPU {number}: `vcpu {number}`"))
    }

    pub(super) fn memory(&self, place: &Place) -> Result<Hva> {
        let memory = self.memories.get(&place.name);
        let missing = || format!("there is no memory {:?}: `memory NAME SIZE`", place.name);
        Ok(Hva(memory.with_context(missing)?.hva.0 + place.offset))
    }

    pub(super) fn file(&self, name: &str) -> Result<Arc<GuestMemfd>> {
        self.files.get(name).cloned().with_context(|| format!("there is no file {name:?}: `file NAME SIZE`"))
    }

    pub(super) fn known_slot(&mut self, slot: SlotNumber) -> Result<&mut Slot> {
        let known = self.slots.get_mut(&slot);
        known.with_context(|| format!("there has been no slot {} in that address space", slot & 0xffff))
    }
}
