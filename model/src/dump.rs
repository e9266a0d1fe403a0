//! A virtual machine's memory side at one moment, as plain data: to be shown, drawn or compared.
//!
//! It is what a person who wants to understand a state asks for: the slots and attributes that the VMM has set, the tables
//! with their frozen entries, what an external table has beside them, and whose the frames are. Nothing is judged here, no
//! page is allocated or marked used by being looked at, and nothing knows how it will be shown.

pub mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::gmem::Inode;
use crate::memslot::{GmemBinding, Memslot};
use crate::mmu::{Contents, Mirroring, RootDump};
use crate::personality::VmType;
use crate::tdx::sept::{Entry, PageState};
use crate::units::{Gfn, GfnRange, Hva, Level, Pfn, Privacy};
use crate::vm::Vm;

/// A virtual machine at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmDump {
    /// Its type.
    pub vm_type: VmType,
    /// Whether it is dead.
    pub is_dead: bool,
    /// Whether its image is complete, so that memory may be pre-faulted. Always so of a VM that has no image.
    pub is_sealed: bool,
    /// The bit of a frame number that a shared access of the guest has set; 0 where there is none.
    pub shared_bit: Gfn,
    /// The memslots, by address space and address.
    pub slots: Vec<SlotDump>,
    /// The frames with the private attribute, in runs that do not touch. Not only those of slots.
    pub private: Vec<GfnRange>,
    /// The page tables that KVM can walk: direct roots and mirrors.
    pub roots: Vec<RootDump>,
    /// The external table that mirrors are kept equal to, by addresses, each table before what is in it. None of a VM that
    /// has no such table, or whose table cannot be asked any more.
    pub external: Option<Vec<ExternalEntry>>,
    /// Every frame that a table maps or a slot's file has, by number.
    pub frames: Vec<FrameDump>,
    /// Pages of 4 KiB, 2 MiB and 1 GiB that are mapped, as KVM counts them.
    pub page_counts: [u64; 3],
}

/// A memslot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlotDump {
    /// Its address space: 1 is that of SMM.
    pub as_id: u16,
    /// Its number there.
    pub id: u16,
    /// Its frames.
    pub range: GfnRange,
    /// Where its shared memory is in the VMM's process.
    pub hva: Hva,
    /// `KVM_MEM_*`.
    pub flags: u32,
    /// Whether it is about to be deleted or moved.
    pub is_invalid: bool,
    /// Its part of a guest_memfd.
    pub file: Option<FileDump>,
}

/// The part of a guest_memfd that a slot has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FileDump {
    /// Which file: equal numbers are one file. Counted from 0 over the slots.
    pub number: usize,
    /// The page of the file at which the slot begins.
    pub first_index: u64,
    /// What its pages are.
    pub privacy: Privacy,
    /// Whether shared accesses go to it too.
    pub serves_all: bool,
    /// Whether it was closed, so that there are no pages to be had from it.
    pub is_closed: bool,
    /// The slot's pages that have a frame: by index in the file.
    pub pages: Vec<(u64, Pfn)>,
}

/// An entry of an external table that is not free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExternalEntry {
    /// The first frame that it is for.
    pub gfn: Gfn,
    /// The level of the table that it stands in.
    pub level: Level,
    /// What it leads to.
    pub target: ExternalTarget,
    /// Whether the guest is kept from using it, because it is about to go.
    pub is_blocked: bool,
}

/// What an external entry leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExternalTarget {
    /// A table of the level below.
    Table,
    /// A page.
    Page {
        /// Its frame.
        pfn: Pfn,
        /// Whether the guest has yet to accept it.
        is_pending: bool,
    },
}

/// A frame of the host's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameDump {
    /// Its number.
    pub pfn: Pfn,
    /// The guest_memfd that has it, by [`FileDump::number`], and the page of it. None of other memory of the VMM's.
    pub file: Option<(usize, u64)>,
    /// Whose it is to TDX's module or SNP's table of frames.
    pub owner: FrameOwner,
}

/// Whose a frame is, to those who guard frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameOwner {
    /// The host's.
    Host,
    /// The firmware's, on the way to a guest.
    Firmware,
    /// A guest's.
    Guest {
        /// As what the guest has it.
        gfn: Gfn,
        /// Whether the guest has taken it. (Of TDX the external entry says so, and this is always set.)
        is_accepted: bool,
    },
}

impl ExternalEntry {
    /// The entries of an external table that only says what it has.
    pub fn of_contents(contents: &Contents) -> Vec<ExternalEntry> {
        let tables = contents.tables.iter().map(|(gfn, level)| (*gfn, level.above(), ExternalTarget::Table));
        let page = |pfn| ExternalTarget::Page { pfn, is_pending: false };
        let pages = contents.pages.iter().map(|(gfn, pfn)| (*gfn, Level::SMALL, page(*pfn)));
        let entry = |(gfn, level, target)| ExternalEntry { gfn, level, target, is_blocked: false };
        let mut entries: Vec<_> = tables.chain(pages).map(entry).collect();
        entries.sort_by_key(|entry| (entry.gfn, std::cmp::Reverse(entry.level)));
        entries
    }
}

impl VmDump {
    /// How it is now. Waits for whoever takes mappings away; what others map meanwhile may be in it or not.
    pub fn of(vm: &Vm) -> Self {
        VmDump::with_tables(vm, vm.mmu().dump())
    }

    /// The same without waiting for anyone: also in the middle of a change. Only while everyone who is in it is stopped.
    pub fn of_stopped(vm: &Vm) -> Self {
        VmDump::with_tables(vm, vm.mmu().dump_of_stopped())
    }

    fn with_tables(vm: &Vm, roots: Vec<RootDump>) -> Self {
        let slots = slots_of(vm);
        let external = external_of(vm);
        let frames = frames_of(vm, &slots, &roots, external.as_deref());
        VmDump {
            vm_type: vm.vm_type(),
            is_dead: vm.is_dead(),
            is_sealed: is_sealed(vm),
            shared_bit: vm.shared_bit(),
            slots,
            private: vm.attributes().private_runs(),
            roots,
            external,
            frames,
            page_counts: vm.mmu().page_counts(),
        }
    }

    /// The roots that are mirrors, or those that are not.
    pub fn roots(&self, mirroring: Mirroring) -> impl Iterator<Item = &RootDump> {
        self.roots.iter().filter(move |root| root.role.mirroring == mirroring)
    }

    /// What is known of a frame.
    pub fn frame(&self, pfn: Pfn) -> Option<&FrameDump> {
        let at = self.frames.binary_search_by_key(&pfn, |frame| frame.pfn).ok()?;
        Some(&self.frames[at])
    }

    /// What KVM was told of a frame of the guest.
    pub fn privacy(&self, gfn: Gfn) -> Privacy {
        let is_private = self.private.iter().any(|run| run.contains(gfn));
        if is_private { Privacy::Private } else { Privacy::Shared }
    }
}

fn is_sealed(vm: &Vm) -> bool {
    vm.tdx().is_none_or(|tdx| tdx.is_pre_fault_allowed())
        && vm.snp().is_none_or(|snp| snp.is_pre_fault_allowed())
}

fn slots_of(vm: &Vm) -> Vec<SlotDump> {
    let mut files = Vec::new();
    let all = vm.memslots();
    all.iter().flat_map(|slots| slots.iter()).map(|slot| slot_dump(slot, &mut files)).collect()
}

fn slot_dump(slot: &Memslot, files: &mut Vec<Arc<Inode>>) -> SlotDump {
    SlotDump {
        as_id: slot.as_id,
        id: slot.id,
        range: slot.range(),
        hva: slot.hva,
        flags: slot.flags,
        is_invalid: slot.is_invalid,
        file: slot.gmem.as_ref().map(|gmem| file_dump(gmem, slot.pages, files)),
    }
}

fn file_dump(gmem: &GmemBinding, pages: u64, files: &mut Vec<Arc<Inode>>) -> FileDump {
    let known = files.iter().position(|inode| Arc::ptr_eq(inode, &gmem.inode));
    let number = known.unwrap_or(files.len());
    if known.is_none() {
        files.push(Arc::clone(&gmem.inode));
    }
    FileDump {
        number,
        first_index: gmem.first_index,
        privacy: gmem.privacy,
        serves_all: gmem.serves_all,
        is_closed: gmem.inode.is_closed(),
        pages: gmem.inode.frames(gmem.first_index..gmem.first_index + pages),
    }
}

fn external_of(vm: &Vm) -> Option<Vec<ExternalEntry>> {
    let tdx = vm.tdx().filter(|tdx| tdx.has_key())?;
    let mut entries = Vec::new();
    tdx.td()?.visit(&mut |gfn, level, entry| {
        let (target, blocked_at) = match *entry {
            Entry::Free => return,
            Entry::Table { blocked_at, .. } => (ExternalTarget::Table, blocked_at),
            Entry::Page { pfn, state, blocked_at } => {
                (ExternalTarget::Page { pfn, is_pending: state == PageState::Pending }, blocked_at)
            }
        };
        entries.push(ExternalEntry { gfn, level, target, is_blocked: blocked_at.is_some() });
    });
    Some(entries)
}

fn frames_of(
    vm: &Vm,
    slots: &[SlotDump],
    roots: &[RootDump],
    external: Option<&[ExternalEntry]>,
) -> Vec<FrameDump> {
    let entries = roots.iter().flat_map(|root| &root.entries);
    let leafs = entries.filter(|entry| entry.spte.is_leaf(entry.level)).map(|entry| entry.spte.pfn());
    let pages = external.unwrap_or_default().iter().filter_map(|entry| match entry.target {
        ExternalTarget::Page { pfn, .. } => Some(pfn),
        ExternalTarget::Table => None,
    });
    let places: BTreeMap<Pfn, (usize, u64)> = slots
        .iter()
        .filter_map(|slot| slot.file.as_ref())
        .flat_map(|file| file.pages.iter().map(|(index, pfn)| (*pfn, (file.number, *index))))
        .collect();
    let all: BTreeSet<Pfn> = leafs.chain(pages).chain(places.keys().copied()).collect();
    let frame = |pfn| FrameDump { pfn, file: places.get(&pfn).copied(), owner: owner_of(vm, pfn) };
    all.into_iter().map(frame).collect()
}

fn owner_of(vm: &Vm, pfn: Pfn) -> FrameOwner {
    if let Some(tdx) = vm.tdx() {
        let guests = |gfn| FrameOwner::Guest { gfn, is_accepted: true };
        return tdx.module().owner(pfn).map_or(FrameOwner::Host, |owner| guests(owner.gfn));
    }
    match vm.snp().and_then(|snp| snp.firmware().rmp().lookup(pfn)) {
        None => FrameOwner::Host,
        Some(entry) if entry.is_immutable => FrameOwner::Firmware,
        Some(entry) => FrameOwner::Guest { gfn: entry.gfn, is_accepted: entry.is_validated },
    }
}
