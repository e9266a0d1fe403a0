//! Memslots: what the VMM says of one, whether KVM would take it, and what page sizes it will have.

use super::boundary::*;
use super::caps::kvmprep_caps;
use super::error::{c_text, kvmprep_error};
use super::vm::{kvmprep_range, kvmprep_vm};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{FileId, Kernel, Linux, Region};
use crate::memslot::alignment::{Demand, Rule};
use crate::memslot::check::{self, Change, Descriptor, Verdict};
use crate::memslot::guest_memfd::Pitfall;
use crate::memslot::prediction::Counts;
use crate::memslot::report::{Report, report as report_on};
use crate::memslot::{Backing, Memslot, Nature, SlotId, Slots, address_space};
use crate::range::{PrivateMemory, Range, RangeSet};
use std::ffi::{c_char, c_int};

/// Find out from the kernel what lies behind the slot. What is said with another value is believed, for the method and for
/// the report; each mapping is looked up all the same, when a job is made.
///
/// What of a slot with a guest_memfd is private, in a VM with private memory (types SW_PROTECTED, SNP, TDX), the handle
/// knows from its conversions and from kvmprep_visibility_note(). Only while it was never told anything, the backing
/// decides for the whole slot: with this value it is taken to be private, unless the guest_memfd is mapped at the hva.
/// In other VMs such a guest_memfd is not what the guest sees, and the slot is populated by its hva.
pub const KVMPREP_BACKING_AUTO: u32 = 0;
/// Anonymous private memory; with or without transparent huge pages.
pub const KVMPREP_BACKING_ANONYMOUS: u32 = 1;
/// memfd, tmpfs or shared anonymous memory, MAP_SHARED.
pub const KVMPREP_BACKING_SHMEM_SHARED: u32 = 2;
/// memfd or tmpfs, MAP_PRIVATE.
pub const KVMPREP_BACKING_SHMEM_PRIVATE: u32 = 3;
/// Another file, MAP_SHARED.
pub const KVMPREP_BACKING_FILE_SHARED: u32 = 4;
/// Another file, MAP_PRIVATE: a snapshot.
pub const KVMPREP_BACKING_FILE_PRIVATE: u32 = 5;
/// Huge pages from a pool, MAP_SHARED.
pub const KVMPREP_BACKING_HUGETLB_SHARED: u32 = 6;
/// Huge pages from a pool, MAP_PRIVATE.
pub const KVMPREP_BACKING_HUGETLB_PRIVATE: u32 = 7;
/// guest_memfd that is mapped at the slot's hva and serves shared accesses too (Linux 6.18 or newer).
pub const KVMPREP_BACKING_GUEST_MEMFD_SHARED: u32 = 8;
/// guest_memfd whose pages the host cannot see (Linux 6.8). Once the handle was told of private memory it says no more than
/// KVMPREP_BACKING_AUTO.
pub const KVMPREP_BACKING_GUEST_MEMFD: u32 = 9;

/// Only parts of the slot are in use (virtio-mem): it is populated only where ranges name it.
pub const KVMPREP_MEMSLOT_SPARSE: u32 = 1;
/// The slot is a device's memory (a mapped BAR): it is never populated.
pub const KVMPREP_MEMSLOT_DEVICE: u32 = 2;
/// The slot's memory is, or may be, registered with userfaultfd: only KVMPREP_INTENT_RESIDENT touches it, since
/// anything else would wait for the handler, in places where no signal ends the wait.
pub const KVMPREP_MEMSLOT_USERFAULTFD: u32 = 4;
/// `memory_fd` and `memory_fd_offset` are set.
pub const KVMPREP_MEMSLOT_MEMORY_FD: u32 = 8;

/// A memslot: what KVM_SET_USER_MEMORY_REGION2 is told, in the kernel's encoding, and what the VMM knows beyond.
///
/// Its layout is fixed for ever. Start from KVMPREP_MEMSLOT_INIT or zeroes.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kvmprep_memslot {
    /// Slot number, its address space in the upper 16 bits (`slot | as_id << 16`).
    pub slot: u32,
    /// KVM_MEM_LOG_DIRTY_PAGES (1), KVM_MEM_READONLY (2), KVM_MEM_GUEST_MEMFD (4).
    pub flags: u32,
    /// Guest physical address in bytes; a multiple of 4096.
    pub gpa: u64,
    /// Bytes; a multiple of 4096. 0: the slot is deleted.
    pub size: u64,
    /// Address of the memory in this process, in bytes; a multiple of 4096.
    pub hva: u64,
    /// Offset of the slot's first byte in its guest_memfd, in bytes; a multiple of 4096. Read with
    /// KVM_MEM_GUEST_MEMFD only.
    pub guest_memfd_offset: u64,
    /// The guest_memfd; stays the caller's. Read with KVM_MEM_GUEST_MEMFD only.
    pub guest_memfd: i32,
    /// KVMPREP_BACKING_*: what lies behind the slot.
    pub backing: u32,
    /// KVMPREP_MEMSLOT_*.
    pub attributes: u32,
    /// With KVMPREP_MEMSLOT_MEMORY_FD: the file that is mapped at `hva`. It stays the caller's, and open
    /// as long as the handle knows the slot. With it, shared memfd memory is allocated before it is populated, which saves
    /// some percent, a shortage of huge pages can be told from a file that is too short, and locked memory can be given up
    /// by a conversion.
    pub memory_fd: i32,
    /// With KVMPREP_MEMSLOT_MEMORY_FD: the file offset that is mapped at `hva`, in bytes.
    pub memory_fd_offset: u64,
    /// Must be zero.
    pub reserved: [u64; 8],
}

const _: () = assert!(size_of::<kvmprep_memslot>() == 128);
const _: () = assert!(size_of::<kvmprep_page_counts>() == 32);
const _: () = assert!(size_of::<kvmprep_memslot_report>() == 640);

impl kvmprep_memslot {
    pub(super) fn decode(&self) -> Result<Memslot> {
        self.decode_fields().map_err(|error| error.stage(Stage::Memslot).slot(self.slot))
    }

    fn decode_fields(&self) -> Result<Memslot> {
        check_reserved(self.reserved == [0; 8], "kvmprep_memslot")?;
        let known = KVMPREP_MEMSLOT_SPARSE
            | KVMPREP_MEMSLOT_DEVICE
            | KVMPREP_MEMSLOT_USERFAULTFD
            | KVMPREP_MEMSLOT_MEMORY_FD;
        check_flags(self.attributes, known, "kvmprep_memslot.attributes")?;
        let has = |attribute| self.attributes & attribute != 0;
        let file = if has(KVMPREP_MEMSLOT_MEMORY_FD) {
            Some((required_fd(self.memory_fd, "kvmprep_memslot.memory_fd")?, self.memory_fd_offset))
        } else {
            None
        };
        if file.is_some_and(|(_, offset)| offset.checked_add(self.size).is_none()) {
            return Err(Error::invalid(
                Reason::RangeOverflow,
                "the slot's memory_fd_offset plus its size wraps",
            )
            .hint("pass the offset that is mapped at hva"));
        }
        Ok(Memslot {
            region: Region {
                slot: self.slot,
                flags: self.flags,
                gpa: self.gpa,
                size: self.size,
                hva: self.hva,
                guest_memfd: self.guest_memfd,
                guest_memfd_offset: self.guest_memfd_offset,
            },
            backing: decode_backing(self.backing)?,
            file,
            nature: Nature {
                sparse: has(KVMPREP_MEMSLOT_SPARSE),
                device: has(KVMPREP_MEMSLOT_DEVICE),
                userfaultfd: has(KVMPREP_MEMSLOT_USERFAULTFD),
            },
        })
    }
}

fn decode_backing(backing: u32) -> Result<Option<Backing>> {
    match (backing as usize).checked_sub(1) {
        None => Ok(None),
        Some(index) => Backing::ALL.get(index).copied().map(Some).ok_or_else(|| {
            Error::invalid(Reason::BadValue, format!("{backing} is no KVMPREP_BACKING_*"))
                .hint("pass KVMPREP_BACKING_AUTO if unsure")
        }),
    }
}

/// Hold gpa and hva equal modulo the largest page of which an aligned one lies in the slot and that its memory can give
/// (anonymous and shared memory 2 MiB, hugetlb its page size, other files 4 KiB; memory that is not mapped counts as
/// anonymous). KVM gives a slot no page of a size modulo which they differ: kvm_alloc_memslot_metadata() in
/// arch/x86/kvm/x86.c. The offset into a guest_memfd is held to the same with its own pages, which are of 4 KiB up to
/// Linux 7.3 at least.
pub const KVMPREP_ALIGN_CONGRUENT: u32 = 0;
/// What KVM enforces and no more: the offset into a guest_memfd is a multiple of 4096. That is checked in any case.
pub const KVMPREP_ALIGN_KERNEL: u32 = 1;
/// The offset into a guest_memfd is a multiple of the largest page that the slot's size allows: 1 GiB from 1 GiB on, 2 MiB
/// from 2 MiB on, else 4 KiB. For code that must run on a kernel that enforces it, as KVM's maintainer proposed
/// (linux-arch list, 2023-04-25). It says nothing of slots without a guest_memfd.
pub const KVMPREP_ALIGN_SIZE: u32 = 2;
/// The looser form that he allowed: the largest page that the slot as a whole allows, no larger than its size and
/// dividing its gpa.
pub const KVMPREP_ALIGN_SLOT: u32 = 3;
/// Or-ed to one of the above: a breach is an error, -EINVAL with reason MEMSLOT_MISALIGNED. Without it a breach is told
/// in the report.
pub const KVMPREP_ALIGN_STRICT: u32 = 0x100;

pub(super) fn decode_rule(value: u32, name: &str) -> Result<Demand> {
    let rule = match value & !KVMPREP_ALIGN_STRICT {
        KVMPREP_ALIGN_CONGRUENT => Rule::Congruent,
        KVMPREP_ALIGN_KERNEL => Rule::Kernel,
        KVMPREP_ALIGN_SIZE => Rule::Size,
        KVMPREP_ALIGN_SLOT => Rule::Slot,
        _ => {
            return Err(Error::invalid(
                Reason::BadValue,
                format!("{name} is {value:#x}, no KVMPREP_ALIGN_*"),
            )
            .hint("pass KVMPREP_ALIGN_CONGRUENT, _KERNEL, _SIZE or _SLOT, with _STRICT or without"));
        }
    };
    Ok(Demand { rule, strict: value & KVMPREP_ALIGN_STRICT != 0 })
}

/// Nothing: the slot is so already.
pub const KVMPREP_CHANGE_NONE: u32 = 0;
/// A slot is made.
pub const KVMPREP_CHANGE_CREATE: u32 = 1;
/// A slot is deleted.
pub const KVMPREP_CHANGE_DELETE: u32 = 2;
/// A slot comes to lie at another gpa.
pub const KVMPREP_CHANGE_MOVE: u32 = 3;
/// Dirty logging is turned on or off.
pub const KVMPREP_CHANGE_FLAGS: u32 = 4;

const _: () =
    assert!(Change::Flags as u32 == KVMPREP_CHANGE_FLAGS && Change::Create as u32 == KVMPREP_CHANGE_CREATE);

/// The hva breaks the alignment rule.
pub const KVMPREP_BREACH_HVA: u32 = 1;
/// The guest_memfd offset breaks it.
pub const KVMPREP_BREACH_OFFSET: u32 = 2;

/// Whether the guest_memfd was made for this VM: if not, KVM will answer EINVAL. No call tells it beforehand.
pub const KVMPREP_UNKNOWN_GMEM_OWNER: u32 = 1;
/// Whether the descriptor is a guest_memfd at all, since /proc/self/fd cannot be read: if not, KVM will answer EINVAL.
pub const KVMPREP_UNKNOWN_GMEM_KIND: u32 = 2;

/// KVM never uses the guest_memfd: the VM has no private memory, and the file was made without KVMPREP_GMEM_MMAP. With
/// KVMPREP_ALIGN_STRICT an error: GMEM_UNUSED. Since kvmprep 0.4.
pub const KVMPREP_WARNING_GMEM_UNUSED: u32 = 1;
/// The guest_memfd, made with KVMPREP_GMEM_MMAP, serves all of the guest's accesses, and the memory at `hva` is another: KVM's
/// own accesses (emulation, para-virtual clocks) and the VMM's go there. With KVMPREP_ALIGN_STRICT an error: GMEM_ELSEWHERE.
/// Since kvmprep 0.4.
pub const KVMPREP_WARNING_GMEM_ELSEWHERE: u32 = 2;

/// All of it is in pages of that size or larger.
pub const KVMPREP_LIMIT_NONE: u32 = 0;
/// The slot does not hold a whole page of that size there: its head and tail.
pub const KVMPREP_LIMIT_EDGES: u32 = 1;
/// The gpa and the hva differ modulo that size: see `hva_shift`.
pub const KVMPREP_LIMIT_CONGRUENCE: u32 = 2;
/// Writes are logged, page by page (KVM_MEM_LOG_DIRTY_PAGES).
pub const KVMPREP_LIMIT_DIRTY_LOGGING: u32 = 3;
/// A guest_memfd serves the memory, in pages of 4 KiB (up to Linux 7.3 at least).
pub const KVMPREP_LIMIT_GUEST_MEMFD: u32 = 4;
/// Private and shared memory lie in one page of that size.
pub const KVMPREP_LIMIT_ATTRIBUTES: u32 = 5;
/// What is mapped has no pages of that size: a file, anonymous memory beyond 2 MiB, a pool of smaller pages.
pub const KVMPREP_LIMIT_BACKING: u32 = 6;
/// Transparent huge pages come only where they are advised, and here they are not.
pub const KVMPREP_LIMIT_ADVICE: u32 = 7;
/// Transparent huge pages are off, or advised against.
pub const KVMPREP_LIMIT_NO_THP: u32 = 8;
/// The mapping does not hold a whole page of that size there.
pub const KVMPREP_LIMIT_MAPPING_EDGES: u32 = 9;
/// Smaller pages are in memory there already.
pub const KVMPREP_LIMIT_RESIDENT: u32 = 10;
/// Nothing is mapped behind the slot there.
pub const KVMPREP_LIMIT_NOT_MAPPED: u32 = 11;
/// The processor has no pages of that size.
pub const KVMPREP_LIMIT_CPU: u32 = 12;
/// Private memory of VMs of this type has pages of 4 KiB, even if its guest_memfd had larger: TDX's is added page by page,
/// SNP's is as the RMP has it.
pub const KVMPREP_LIMIT_VM_TYPE: u32 = 13;
/// Shared memory, of which the hva and the offset in the file mapped there differ modulo that size.
pub const KVMPREP_LIMIT_FILE_OFFSET: u32 = 14;

/// Numbers of stage-2 mappings, by their size. Its layout is fixed for ever.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct kvmprep_page_counts {
    /// Of 4 KiB.
    pub pages_4k: u64,
    /// Of 2 MiB.
    pub pages_2m: u64,
    /// Of 1 GiB.
    pub pages_1g: u64,
    /// Zero.
    pub reserved: u64,
}

impl From<Counts> for kvmprep_page_counts {
    fn from(counts: Counts) -> Self {
        Self { pages_4k: counts.k4, pages_2m: counts.m2, pages_1g: counts.g1, reserved: 0 }
    }
}

/// What there is to say of a memslot that KVM would take. An output that may grow: pass it with its sizeof.
///
/// For the deletion of a slot all but `change` is 0.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kvmprep_memslot_report {
    /// KVMPREP_CHANGE_*: what setting the slot would do.
    pub change: u32,
    /// KVMPREP_BREACH_*: what breaks the alignment rule.
    pub breaches: u32,
    /// What the rule holds the hva (KVMPREP_ALIGN_CONGRUENT) or the guest_memfd offset (the others) to, in bytes: 4096,
    /// 2 MiB or 1 GiB.
    pub alignment: u64,
    /// Map the memory this many bytes higher and it is congruent with the gpa, modulo the largest page that
    /// KVMPREP_ALIGN_CONGRUENT looks at, under every rule; 0: it is.
    pub hva_shift: u64,
    /// Use a guest_memfd offset this many bytes higher and it keeps the rule; 0: it does.
    pub offset_shift: u64,
    /// What KVM's rules allow, whatever is mapped behind the slot. A mapping that reaches beyond the range asked about
    /// counts as one.
    pub allowed: kvmprep_page_counts,
    /// What a population of the range, without KVMPREP_POPULATE_HUGE_ADVICE, will get by nested paging: what is in memory as
    /// it is, the rest as the kernel would allocate it. No promise: it may find no huge page free, and splits some later.
    /// Memory that is not mapped is in none of them; what a population would refuse (a mapping that cannot be written, a
    /// file that is too short) is. Not seen are small pages that are in memory already before Linux 6.7, those of a file's
    /// cache beyond the first 64 GiB, and huge pages in the cache of a file system other than tmpfs.
    pub expected: kvmprep_page_counts,
    /// KVMPREP_LIMIT_*: why not all is expected in pages of 2 MiB or more; of several reasons, the one for the most bytes.
    pub limit_2m: u32,
    /// KVMPREP_LIMIT_*: why not all is expected in pages of 1 GiB.
    pub limit_1g: u32,
    /// Bytes that are in smaller pages than 2 MiB for that reason.
    pub limited_2m: u64,
    /// Bytes that are in smaller pages than 1 GiB for that reason.
    pub limited_1g: u64,
    /// KVMPREP_UNKNOWN_*: what only the kernel can say.
    pub unknown: u32,
    /// KVMPREP_WARNING_*: what KVM would take and nobody means. Zero before kvmprep 0.4.
    pub warnings: u32,
    /// One sentence on a warning, on what breaks the alignment rule, else on the limit that costs most, NUL-terminated; empty when there is
    /// none that a change would lift.
    pub message: [c_char; 256],
    /// The smallest change that lifts it, NUL-terminated; empty when `message` is.
    pub hint: [c_char; 256],
}

impl kvmprep_memslot_report {
    fn new(verdict: Verdict, report: Option<&Report>) -> Self {
        let bit_if = |is: bool, bit| if is { bit } else { 0 };
        let mut c = Self {
            change: verdict.change as u32,
            breaches: 0,
            alignment: 0,
            hva_shift: 0,
            offset_shift: 0,
            allowed: kvmprep_page_counts::default(),
            expected: kvmprep_page_counts::default(),
            limit_2m: 0,
            limit_1g: 0,
            limited_2m: 0,
            limited_1g: 0,
            unknown: bit_if(verdict.binds.is_some(), KVMPREP_UNKNOWN_GMEM_OWNER)
                | bit_if(verdict.binds.is_some_and(|binds| !binds.is_certain), KVMPREP_UNKNOWN_GMEM_KIND),
            warnings: 0,
            message: [0; 256],
            hint: [0; 256],
        };
        let Some(report) = report else { return c };
        let (alignment, prediction) = (&report.alignment, &report.prediction);
        c.warnings = match report.pitfall {
            None => 0,
            Some(Pitfall::Unused) => KVMPREP_WARNING_GMEM_UNUSED,
            Some(Pitfall::Elsewhere) => KVMPREP_WARNING_GMEM_ELSEWHERE,
        };
        c.breaches = bit_if(alignment.hva_breach, KVMPREP_BREACH_HVA)
            | bit_if(alignment.offset_breach, KVMPREP_BREACH_OFFSET);
        c.alignment = alignment.level.bytes();
        c.hva_shift = alignment.hva_shift;
        c.offset_shift = alignment.offset_shift;
        c.allowed = prediction.allowed.into();
        c.expected = prediction.expected.into();
        c.limit_2m = prediction.below_2m.limit as u32;
        c.limit_1g = prediction.below_1g.limit as u32;
        c.limited_2m = prediction.below_2m.bytes;
        c.limited_1g = prediction.below_1g.bytes;
        c.message = c_text(&report.message);
        c.hint = c_text(&report.hint);
        c
    }
}

/// Slots as C lists them, in no order.
struct Listed<'a> {
    slots: &'a [kvmprep_memslot],
    kernel: &'a dyn Kernel,
}

impl Listed<'_> {
    /// All of them; what cannot be a slot was refused before.
    fn iter(&self) -> impl Iterator<Item = (Memslot, Range)> {
        self.slots.iter().filter_map(|c| {
            let slot = c.decode().ok()?;
            Some((slot, slot.range()?))
        })
    }
}

impl Slots for Listed<'_> {
    fn slot(&self, id: SlotId) -> Option<Memslot> {
        self.iter().find(|(slot, _)| slot.id() == id).map(|(slot, _)| slot)
    }

    fn overlapping(&self, range: Range, id: SlotId) -> Option<(SlotId, Range)> {
        let is_other = |slot: &Memslot| slot.id() != id && address_space(slot.id()) == address_space(id);
        self.iter()
            .find(|(slot, place)| is_other(slot) && place.overlaps(&range))
            .map(|(slot, place)| (slot.id(), place))
    }

    fn bound(&self, file: FileId, part: Range) -> Option<SlotId> {
        let is_of_file = |slot: &Memslot| match check::look(self.kernel, slot) {
            Some(Descriptor::Usable(binding)) => binding.file.id == file,
            _ => false,
        };
        let takes_part = |slot: &Memslot| {
            Range::new(slot.region.guest_memfd_offset, slot.region.size)
                .is_some_and(|bound| bound.overlaps(&part))
        };
        self.iter().find(|(slot, _)| takes_part(slot) && is_of_file(slot)).map(|(slot, _)| slot.id())
    }
}

/// Refuses a list that cannot be of a VM's slots, as far as `slot` depends on it.
fn check_existing(existing: &[kvmprep_memslot], slot: &Memslot) -> Result<()> {
    let unusable = |index: usize, error: Error| Error {
        message: format!("existing[{index}] is no memslot: {}", error.message),
        hint: "list the slots that KVM has taken, each once and as it has taken it".into(),
        ..error
    };
    let wrong = |message: &str| Err(Error::invalid(Reason::BadValue, message));
    let mut is_there = false;
    for (index, listed) in existing.iter().enumerate() {
        let usable = listed.decode().and_then(|listed| {
            listed.check_form()?;
            if listed.range().is_none() {
                return wrong("it has size 0");
            }
            if listed.id() == slot.id() && std::mem::replace(&mut is_there, true) {
                return wrong("its number stands in the list twice");
            }
            Ok(())
        });
        usable.map_err(|error| unusable(index, error))?;
    }
    Ok(())
}

/// What a check that KVM's rules let pass returns: holds the slot to the alignment rule, and reports where that is wanted.
///
/// # Safety
/// `report` is NULL or points to `report_size` writable bytes.
unsafe fn conclude(
    kernel: &dyn Kernel,
    caps: &Caps,
    slot: &Memslot,
    private: Option<&dyn PrivateMemory>,
    demand: Demand,
    verdict: Verdict,
    (report, report_size): (*mut kvmprep_memslot_report, usize),
) -> Result<c_int> {
    demand.check(kernel, caps, slot, verdict.change)?;
    if !report.is_null() {
        // A deletion leaves nothing to report on.
        let whole =
            slot.range().map(|range| report_on(kernel, caps, slot, range, private, demand)).transpose()?;
        let written = kvmprep_memslot_report::new(verdict, whole.as_ref());
        // SAFETY: passed on from the caller.
        unsafe { write_sized(report, report_size, &written, "report")? };
    }
    Ok(0)
}

/// Says whether KVM would take a memslot, before it is asked: as KVM_SET_USER_MEMORY_REGION, or its second version with
/// KVM_MEM_GUEST_MEMFD, would answer, with KVM's own errno, for the kernel and VM that `caps` were probed from; and what
/// pages the slot would have. No VM is needed and nothing is changed.
///
/// `caps` is what kvmprep_probe() wrote for the VM; the caller may have set `vm_type` and `gpa_shared_bit`. `existing`
/// are the slots there are, as KVM has taken them, each once, in any order; with a guest_memfd, any descriptor of it
/// that is still open, or -1 when all are closed. KVM's own may be among them, in each address space under the numbers
/// `caps->memslots` (APIC access page, at 0xfee00000), that plus 1 (task state segment, KVM_SET_TSS_ADDR) and plus 2
/// (identity map). Whether they overlap each other is not looked at. `slot` of size 0 is a deletion. `report` may be
/// NULL; it is written on success only. Where it is wanted, the mappings of this process behind the slot are looked at,
/// and /proc/self/smaps may be read, which takes some 10 to 20 ms for each GiB that the process, not the slot, has in
/// memory in pages of 4 KiB. For KVMPREP_ALIGN_CONGRUENT made strict one mapping is looked up.
///
/// Not foreseen are shortage of memory (-ENOMEM), a dead or another process's VM (-EIO), a guest_memfd of another VM's
/// (-EINVAL, see `unknown`), and moves while a device model tracks pages (-EINVAL; KVMGT only).
///
/// Threads: any. Takes time in proportion to `n_existing`; kvmprep_vm_check_memslot() does not. Returns 0, or -EINVAL
/// (NULL, misaligned, a bad size, value or list; or what KVM would refuse: reasons MEMSLOT_NUMBER, UNKNOWN_FLAGS,
/// FLAGS_UNSUPPORTED, RANGE_UNALIGNED, RANGE_OVERFLOW, HVA_NOT_USER, MEMSLOT_TOO_LARGE, MEMSLOT_ABSENT, MEMSLOT_FIXED,
/// MEMSLOT_BEYOND_HOST, SHARED_BIT, GMEM_NOT_ONE, GMEM_TOO_SHORT, before Linux 7.2 GMEM_BOUND; or, with
/// KVMPREP_ALIGN_STRICT, MEMSLOT_MISALIGNED), -EEXIST (it overlaps another slot, or its part of the guest_memfd is bound to
/// one; `err` names it), -EBADF (its guest_memfd is no descriptor), -ENOTTY (a guest_memfd on a kernel before Linux 6.8),
/// -E2BIG (newer `caps` than this library knows); where mappings are looked at, -EACCES, -ENOENT, -EMFILE or -ENFILE too
/// (/proc/self/maps cannot be opened). Since kvmprep 0.3.
///
/// # Safety
/// `caps` points to `caps_size` bytes, `existing` to `n_existing` elements, `slot` to a kvmprep_memslot, `report` to
/// `report_size` bytes or is NULL, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_memslot_check(
    caps: *const kvmprep_caps,
    caps_size: usize,
    existing: *const kvmprep_memslot,
    n_existing: usize,
    slot: *const kvmprep_memslot,
    alignment_rule: u32,
    report: *mut kvmprep_memslot_report,
    report_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let caps = read_sized(caps, caps_size, kvmprep_caps::FIRST_PASSED_IN, "caps")?.decode()?;
            let existing = slice(existing, n_existing, "existing")?;
            let slot = reference(slot, "slot")?.decode()?;
            check_existing(existing, &slot)?;
            let demand = decode_rule(alignment_rule, "alignment_rule")?;
            check_optional_out(report, report_size, "report")?;
            let kernel = Linux::default();
            let listed = Listed { slots: existing, kernel: &kernel };
            let verdict = check::check(&caps, &listed, &slot, check::look(&kernel, &slot))?;
            conclude(&kernel, &caps, &slot, None, demand, verdict, (report, report_size))
        })
    }
}

/// As kvmprep_memslot_check(), for the handle's VM and against the slots that the handle has been told of, in time that
/// grows with the logarithm of their number. Nothing is changed, no lock held across a wait, and nothing allocated when
/// the slot passes and `report` is NULL.
///
/// What of the slot is private, for the report, is what the handle did or was told (kvmprep_visibility_next()), once it was.
///
/// A slot beyond the width that the handle was given (`gpa_bits` in its config) is -EINVAL too, reason
/// RANGE_BEYOND_GUEST.
///
/// Threads: any. Returns what kvmprep_memslot_check() returns. Since kvmprep 0.3.
///
/// # Safety
/// `vm` is a handle, `slot` points to a kvmprep_memslot, `report` to `report_size` bytes or is NULL, `err` to a
/// kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_vm_check_memslot(
    vm: *const kvmprep_vm,
    slot: *const kvmprep_memslot,
    alignment_rule: u32,
    report: *mut kvmprep_memslot_report,
    report_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = &reference(vm, "vm")?.0;
            let slot = reference(slot, "slot")?.decode()?;
            let demand = decode_rule(alignment_rule, "alignment_rule")?;
            check_optional_out(report, report_size, "report")?;
            let verdict = vm.check(&slot)?;
            conclude(&*vm.kernel, vm.caps()?, &slot, vm.told(), demand, verdict, (report, report_size))
        })
    }
}

/// Predicts the page sizes of a memslot, or of a part of it: what KVM's rules allow, what a population will get, and
/// why no more. It speaks of nested paging; a host that shadows page tables maps by other rules. That the slot could be
/// set is not checked. `change` and `unknown` in the report are 0; the alignment is that of KVMPREP_ALIGN_CONGRUENT.
///
/// `range` is the part, or NULL for the whole slot. `private_memory` are the ranges of guest memory whose attribute is
/// KVM_MEMORY_ATTRIBUTE_PRIVATE, in any order, in the slot or not; NULL: what `slot->backing` says, so that with
/// KVMPREP_BACKING_AUTO a slot with a guest_memfd is all private in a VM that has private memory. For "none", pass any
/// pointer and 0.
///
/// Threads: any. Looks at mappings as kvmprep_memslot_check() does. Returns 0, or -EINVAL (a pointer NULL or
/// misaligned, a bad size or value, a slot that is malformed or has size 0, a range that is malformed or not in the
/// slot), -EBADF (a negative guest_memfd), -E2BIG (newer `caps`), -EACCES, -ENOENT, -EMFILE or -ENFILE (/proc/self/maps
/// cannot be opened). Since kvmprep 0.3.
///
/// # Safety
/// `caps` points to `caps_size` bytes, `slot` to a kvmprep_memslot, `range` to a kvmprep_range or is NULL,
/// `private_memory` to `n_private` elements or is NULL, `report` to `report_size` bytes, `err` to a kvmprep_error or is
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_memslot_predict(
    caps: *const kvmprep_caps,
    caps_size: usize,
    slot: *const kvmprep_memslot,
    range: *const kvmprep_range,
    private_memory: *const kvmprep_range,
    n_private: usize,
    report: *mut kvmprep_memslot_report,
    report_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let caps = read_sized(caps, caps_size, kvmprep_caps::FIRST_PASSED_IN, "caps")?.decode()?;
            let slot = reference(slot, "slot")?.decode()?;
            check_sized_out(report, report_size, "report")?;
            slot.check(64)?;
            check::check_page_count(&slot)?;
            let part = if range.is_null() { None } else { Some(reference(range, "range")?.decode()?) };
            let part = part_of(&slot, part)?;
            let private = if private_memory.is_null() {
                None
            } else {
                let private = slice(private_memory, n_private, "private_memory")?;
                let mut private = private.iter().map(kvmprep_range::decode).collect::<Result<Vec<_>>>()?;
                // In order, each is added at the end of the set, which costs nothing.
                private.sort_by_key(|range| range.start);
                Some(private.into_iter().collect::<RangeSet>())
            };
            let private = private.as_ref().map(|private| private as &dyn PrivateMemory);
            let found = report_on(&Linux::default(), &caps, &slot, part, private, Demand::default())?;
            let verdict = Verdict { change: Change::None, binds: None };
            write_sized(report, report_size, &kvmprep_memslot_report::new(verdict, Some(&found)), "report")?;
            Ok(0)
        })
    }
}

/// As kvmprep_memslot_predict(), of guest memory in one of the handle's slots of address space 0: for the handle's VM, and
/// with what the handle knows of private memory (kvmprep_visibility_next()). While memory is being converted it speaks of
/// no single moment.
///
/// Threads: any. Returns 0, or -EINVAL (a pointer NULL or misaligned, a bad size or range, a range that ends outside the slot
/// that it begins in), -ENOENT (NO_MEMSLOT: it begins where there is none), -EACCES, -ENOENT, -EMFILE or -ENFILE
/// (/proc/self/maps cannot be opened). Since kvmprep 0.4.
///
/// # Safety
/// `vm` is a handle, `range` points to a kvmprep_range, `report` to `report_size` bytes, `err` to a kvmprep_error or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_vm_predict(
    vm: *const kvmprep_vm,
    range: *const kvmprep_range,
    report: *mut kvmprep_memslot_report,
    report_size: usize,
    err: *mut kvmprep_error,
) -> c_int {
    // SAFETY: passed on from the caller.
    unsafe {
        boundary(err, || {
            let vm = &reference(vm, "vm")?.0;
            let range = reference(range, "range")?.decode()?;
            check_sized_out(report, report_size, "report")?;
            let slot = vm.slot_at(range)?;
            let part = part_of(&slot, Some(range))?;
            let found = report_on(&*vm.kernel, vm.caps()?, &slot, part, vm.told(), Demand::default())?;
            let verdict = Verdict { change: Change::None, binds: None };
            write_sized(report, report_size, &kvmprep_memslot_report::new(verdict, Some(&found)), "report")?;
            Ok(0)
        })
    }
}

/// The part of the slot that is meant.
fn part_of(slot: &Memslot, part: Option<Range>) -> Result<Range> {
    let wrong =
        |reason, message: String| Error::invalid(reason, message).stage(Stage::Memslot).slot(slot.id());
    let Some(whole) = slot.range() else {
        return Err(
            wrong(Reason::RangeEmpty, "the memslot has size 0".into()).hint("describe a slot that is there")
        );
    };
    match part {
        None => Ok(whole),
        Some(part) if whole.contains(&part) => Ok(part),
        Some(part) => Err(wrong(
            Reason::BadValue,
            format!("guest range {part} does not lie in memslot {:#x} at {whole}", slot.id()),
        )
        .range(part)
        .hint("pass a range inside the slot")),
    }
}
