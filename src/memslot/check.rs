//! Whether KVM would take a memslot: its own checks, in its own order, with its own errno.
//!
//! The source is `kvm_set_memory_region` and what it calls (virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c,
//! arch/x86/kvm/x86.c). Checks that answer with the same errno and follow each other are in the order in which they are
//! best explained, since nobody can tell. What only the kernel knows is left to it and named in the verdict; memory
//! shortage is not foreseen. Nothing here changes anything.

use super::{Memslot, SlotId, Slots, address_space, slot_number};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{FileStatus, Kernel, MEM_GUEST_MEMFD, MEM_LOG_DIRTY_PAGES, MEM_READONLY};
use crate::range::{PAGE, Range};

/// What setting a slot would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Change {
    /// Nothing: all is so already.
    None = 0,
    /// A new slot.
    Create = 1,
    /// The slot goes.
    Delete = 2,
    /// It comes to lie at another gpa.
    Move = 3,
    /// Dirty logging goes on or off.
    Flags = 4,
}

/// What can be said of a slot that passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What setting it would do.
    pub change: Change,
    /// Whether the descriptor could not be seen to be a guest_memfd.
    pub gmem_kind_unknown: bool,
    /// Whether it remains to be seen if the guest_memfd is this VM's.
    pub gmem_owner_unknown: bool,
}

/// The most pages of a slot (`KVM_MEM_MAX_NR_PAGES`).
const MOST_PAGES: u64 = (1 << 31) - 1;
/// Since this release a range of a guest_memfd that is bound already is `EEXIST`, as an overlap is.
const BOUND_IS_EEXIST: [u32; 3] = [7, 2, 0];
/// And since this one that is found last of all.
const BOUND_IS_FOUND_LAST: [u32; 3] = [7, 3, 0];

/// One slot about to be set in one VM.
struct Check<'a> {
    kernel: &'a dyn Kernel,
    caps: &'a Caps,
    slots: &'a dyn Slots,
    slot: &'a Memslot,
}

/// Holds `slot` against the rules of the kernel that `caps` were asked of, beside `slots`.
pub fn check(kernel: &dyn Kernel, caps: &Caps, slots: &dyn Slots, slot: &Memslot) -> Result<Verdict> {
    Check { kernel, caps, slots, slot }.run().map_err(|error| {
        let error = error.stage(Stage::Memslot).slot(slot.id());
        match slot.range() {
            Some(range) if error.range.is_none() => error.range(range),
            _ => error,
        }
    })
}

impl Check<'_> {
    fn run(&self) -> Result<Verdict> {
        self.request_is_known()?;
        self.number()?;
        self.flags()?;
        self.slot.check_form()?;
        self.host_addresses()?;
        self.address_space()?;
        check_page_count(self.slot)?;
        let change = self.change()?;
        if matches!(change, Change::Create | Change::Move) {
            check_overlap(self.slots, self.slot).map_err(|error| self.explain_internal(error))?;
        }
        let mut verdict = Verdict { change, gmem_kind_unknown: false, gmem_owner_unknown: false };
        let binding = if change == Change::Create && self.slot.has_guest_memfd() {
            verdict.gmem_owner_unknown = true;
            let (file, is_certain) = self.guest_memfd()?;
            verdict.gmem_kind_unknown = !is_certain;
            Some(file)
        } else {
            None
        };
        if self.caps.release < BOUND_IS_FOUND_LAST {
            self.binding(binding)?;
        }
        if matches!(change, Change::Create | Change::Move) {
            self.guest_addresses()?;
        }
        self.binding(binding)?;
        Ok(verdict)
    }

    /// A guest_memfd needs the second version of the ioctl.
    fn request_is_known(&self) -> Result<()> {
        if !self.slot.has_guest_memfd() || self.caps.user_memory2 {
            return Ok(());
        }
        Err(Error::new(
            libc::ENOTTY,
            Reason::FlagsUnsupported,
            "KVM_MEM_GUEST_MEMFD needs KVM_SET_USER_MEMORY_REGION2, which this kernel has not",
        )
        .hint("needs Linux 6.8; without private memory leave the flag out"))
    }

    fn number(&self) -> Result<()> {
        let number = slot_number(self.slot.id());
        if number < self.caps.memslots {
            return Ok(());
        }
        Err(Error::invalid(
            Reason::MemslotNumber,
            format!("memslot number {number} is not below {}, what this kernel has", self.caps.memslots),
        )
        .hint("use numbers below kvmprep_caps.memslots; the address space goes into the upper 16 bits"))
    }

    fn flags(&self) -> Result<()> {
        let flags = self.slot.region.flags;
        self.slot.check_flags()?;
        let unsupported = |message: &str, hint| {
            Err(Error::invalid(Reason::FlagsUnsupported, format!("memslot flags {flags:#x}: {message}"))
                .hint(hint))
        };
        if flags & MEM_GUEST_MEMFD != 0 && !self.caps.guest_memfd {
            return unsupported(
                "this VM has no guest_memfd",
                "before Linux 6.18 only VMs with private memory have (kvmprep_caps.guest_memfd)",
            );
        }
        if flags & MEM_GUEST_MEMFD != 0 && flags & (MEM_READONLY | MEM_LOG_DIRTY_PAGES) != 0 {
            return unsupported(
                "a slot with a guest_memfd can be neither read-only nor dirty-logged",
                "leave KVM_MEM_READONLY and KVM_MEM_LOG_DIRTY_PAGES out",
            );
        }
        if flags & MEM_READONLY != 0 && !self.caps.read_only {
            return unsupported(
                "this VM has no read-only slots",
                "VMs with protected state have none (kvmprep_caps.read_only_memslots)",
            );
        }
        Ok(())
    }

    fn host_addresses(&self) -> Result<()> {
        let region = &self.slot.region;
        if region.hva.checked_add(region.size).is_some_and(|end| end <= self.caps.hva_end) {
            return Ok(());
        }
        Err(Error::invalid(
            Reason::HvaNotUser,
            format!(
                "memslot memory at hva {:#x} of {:#x} bytes ends beyond {:#x}, where user addresses end",
                region.hva, region.size, self.caps.hva_end
            ),
        )
        .hint("pass an address that mmap returned"))
    }

    fn address_space(&self) -> Result<()> {
        let space = address_space(self.slot.id());
        if space < self.caps.address_spaces {
            return Ok(());
        }
        Err(Error::invalid(
            Reason::MemslotNumber,
            format!("address space {space} is not below {}, what this VM has", self.caps.address_spaces),
        )
        .hint("VMs with private memory have no SMM and so one address space (kvmprep_caps.address_spaces)"))
    }

    /// What would happen to the slot of that number, which must exist to go and may change in few things.
    fn change(&self) -> Result<Change> {
        let new = &self.slot.region;
        let Some(old) = self.slots.slot(self.slot.id()) else {
            return if new.size == 0 { Err(absent(new.slot)) } else { Ok(Change::Create) };
        };
        let old = &old.region;
        if new.size == 0 {
            return Ok(Change::Delete);
        }
        let toggled = new.flags ^ old.flags;
        let what = if new.flags & old.flags & MEM_GUEST_MEMFD != 0 {
            "a slot with a guest_memfd cannot change at all".to_string()
        } else if new.flags & MEM_GUEST_MEMFD != 0 {
            "it has no guest_memfd and cannot be given one".to_string()
        } else if new.hva != old.hva {
            format!("its hva {:#x} cannot become {:#x}", old.hva, new.hva)
        } else if new.size != old.size {
            format!("its size {:#x} cannot become {:#x}", old.size, new.size)
        } else if toggled & MEM_READONLY != 0 {
            "KVM_MEM_READONLY cannot change".to_string()
        } else if toggled & MEM_GUEST_MEMFD != 0 {
            "it has a guest_memfd and cannot lose it".to_string()
        } else if new.gpa != old.gpa {
            return Ok(Change::Move);
        } else if toggled != 0 {
            return Ok(Change::Flags);
        } else {
            return Ok(Change::None);
        };
        Err(Error::invalid(Reason::MemslotFixed, format!("memslot {:#x} is there already: {what}", new.slot))
            .hint("delete the slot first (size 0), then create it anew"))
    }

    /// What KVM can map: below the host's width, without the bit that is no address.
    fn guest_addresses(&self) -> Result<()> {
        let Some(range) = self.slot.range() else { return Ok(()) };
        let last = range.end - PAGE;
        let bits = self.caps.memslot_gpa_bits();
        if bits < 64 && last >> bits != 0 {
            return Err(Error::invalid(
                Reason::MemslotBeyondHost,
                format!(
                    "the memslot ends at gpa {:#x}, beyond the {bits} bits that KVM can map here",
                    range.end
                ),
            )
            .hint("keep guest memory below the host's physical address width (kvmprep_caps.gpa_bits)"));
        }
        if last & self.caps.gpa_shared_bit != 0 {
            return Err(Error::invalid(
                Reason::SharedBit,
                format!(
                    "the memslot's last page {last:#x} has the shared bit {:#x}",
                    self.caps.gpa_shared_bit
                ),
            )
            .hint("describe slots by addresses without the shared bit"));
        }
        Ok(())
    }

    /// KVM's own slots have no names that a VMM would know.
    fn explain_internal(&self, error: Error) -> Error {
        match error.other_slot.and_then(|other| internal_name(self.caps, other)) {
            Some(name) => error.hint(format!(
                "{name} is there: keep clear of it, or move it (KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR)"
            )),
            None => error,
        }
    }

    /// The file to be bound, and whether it was seen to be a guest_memfd.
    fn guest_memfd(&self) -> Result<(FileStatus, bool)> {
        let region = &self.slot.region;
        let fd = region.guest_memfd;
        let status = self.kernel.file_status(fd).map_err(|errno| {
            Error::new(
                libc::EBADF,
                Reason::BadFd,
                format!("guest_memfd is {fd}, which is no descriptor: {errno}"),
            )
            .hint("pass what KVM_CREATE_GUEST_MEMFD returned, while it is open")
        })?;
        let is_one = self.kernel.is_guest_memfd(fd);
        if is_one == Some(false) {
            return Err(Error::invalid(Reason::GmemNotOne, format!("descriptor {fd} is not a guest_memfd"))
                .hint("pass what KVM_CREATE_GUEST_MEMFD returned"));
        }
        let end = region.guest_memfd_offset.saturating_add(region.size);
        // Before Linux 7.2 the kernel's own sum wraps where it comes to 2^63, and it binds what no file has. Not here.
        if end > status.length {
            return Err(Error::invalid(
                Reason::GmemTooShort,
                format!(
                    "the memslot needs guest_memfd {fd} up to {end:#x}, and it has {:#x} bytes",
                    status.length
                ),
            )
            .hint("make the guest_memfd larger, or check the offset"));
        }
        Ok((status, is_one.is_some()))
    }

    /// No byte of a guest_memfd is in two slots.
    fn binding(&self, file: Option<FileStatus>) -> Result<()> {
        let errno = if self.caps.release < BOUND_IS_EEXIST { libc::EINVAL } else { libc::EEXIST };
        let Some(file) = file else { return Ok(()) };
        let region = &self.slot.region;
        let Some(part) = Range::new(region.guest_memfd_offset, region.size) else { return Ok(()) };
        let Some(other) = self.slots.bound(self.kernel, file.id, part) else { return Ok(()) };
        Err(Error::new(
            errno,
            Reason::GmemBound,
            format!("bytes {part} of guest_memfd {} are bound to memslot {other:#x}", region.guest_memfd),
        )
        .other_slot(other)
        .hint("use another part of the file, or delete the other slot first"))
    }
}

/// No slot has more pages than KVM can count.
pub fn check_page_count(slot: &Memslot) -> Result<()> {
    let pages = slot.region.size / PAGE;
    if pages <= MOST_PAGES {
        return Ok(());
    }
    Err(Error::invalid(
        Reason::MemslotTooLarge,
        format!("the memslot has {pages} pages, and KVM takes {MOST_PAGES} at most"),
    )
    .stage(Stage::Memslot)
    .slot(slot.id())
    .hint("split it in two"))
}

fn absent(slot: SlotId) -> Error {
    Error::invalid(Reason::MemslotAbsent, format!("there is no memslot {slot:#x} to delete"))
        .hint("check the number; a handle must be told of every slot there is (kvmprep_memslot_note)")
}

/// No two slots of an address space overlap: an error names the other slot.
pub fn check_overlap(slots: &dyn Slots, slot: &Memslot) -> Result<()> {
    let Some(range) = slot.range() else { return Ok(()) };
    let Some((other, place)) = slots.overlapping(range, slot.id()) else { return Ok(()) };
    Err(Error::new(
        libc::EEXIST,
        Reason::MemslotOverlap,
        format!("memslot {:#x} at {range} overlaps memslot {other:#x} at {place}", slot.id()),
    )
    .stage(Stage::Memslot)
    .slot(slot.id())
    .other_slot(other)
    .range(range)
    .hint("delete or move the other slot first, and note it (kvmprep_memslot_note)"))
}

/// The slots that KVM makes for itself have the numbers behind the last.
fn internal_name(caps: &Caps, slot: SlotId) -> Option<&'static str> {
    match slot_number(slot).checked_sub(caps.memslots)? {
        0 => Some("KVM's APIC access page"),
        1 => Some("KVM's task state segment"),
        2 => Some("KVM's identity map"),
        _ => None,
    }
}
