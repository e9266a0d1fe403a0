//! Whether KVM would take a memslot: its own checks, in its own order, with its own errno.
//!
//! The source is `kvm_set_memory_region` and what it calls (virt/kvm/kvm_main.c, virt/kvm/guest_memfd.c,
//! arch/x86/kvm/x86.c). Checks that answer with the same errno and follow each other are in the order in which they are
//! best explained, since nobody can tell. What only the kernel knows is left to it and named in the verdict; memory
//! shortage is not foreseen. Nothing here changes anything.

use super::{Memslot, SlotId, Slots, address_space, slot_number};
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::Caps;
use crate::kvm::{Errno, FileStatus, Kernel, MEM_GUEST_MEMFD, MEM_LOG_DIRTY_PAGES, MEM_READONLY};
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
    /// The guest_memfd that it would be bound to. Whether that is this VM's remains to be seen.
    pub binds: Option<Binding>,
}

/// A guest_memfd that a slot would be bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Which file, and how large.
    pub file: FileStatus,
    /// Whether it was seen to be a guest_memfd.
    pub is_certain: bool,
}

/// What a slot's descriptor turned out to be.
#[derive(Clone, Copy, Debug)]
pub enum Descriptor {
    /// None that is open.
    Closed(Errno),
    /// Of another kind of file.
    Foreign,
    /// A guest_memfd, as far as can be seen.
    Usable(Binding),
}

/// Looks at the descriptor of a slot with a guest_memfd. Of another kind of file it asks nothing that could wait.
pub fn look(kernel: &dyn Kernel, slot: &Memslot) -> Option<Descriptor> {
    let fd = (slot.has_guest_memfd() && slot.region.size != 0).then_some(slot.region.guest_memfd)?;
    let is_one = kernel.is_guest_memfd(fd);
    if is_one == Some(false) {
        return Some(Descriptor::Foreign);
    }
    Some(match kernel.file_status(fd) {
        Ok(file) => Descriptor::Usable(Binding { file, is_certain: is_one.is_some() }),
        Err(errno) => Descriptor::Closed(errno),
    })
}

/// The most pages of a slot (`KVM_MEM_MAX_NR_PAGES`).
const MOST_PAGES: u64 = (1 << 31) - 1;
/// Since this release a range of a guest_memfd that is bound already is `EEXIST`, as an overlap is.
const BOUND_IS_EEXIST: [u32; 3] = [7, 2, 0];
/// And since this one that is found last of all.
const BOUND_IS_FOUND_LAST: [u32; 3] = [7, 3, 0];

/// One slot about to be set in one VM.
struct Check<'a> {
    caps: &'a Caps,
    slots: &'a dyn Slots,
    slot: &'a Memslot,
    descriptor: Option<Descriptor>,
}

/// Holds `slot`, whose descriptor was looked at, against the rules of the kernel that `caps` were asked of, beside `slots`.
pub fn check(
    caps: &Caps,
    slots: &dyn Slots,
    slot: &Memslot,
    descriptor: Option<Descriptor>,
) -> Result<Verdict> {
    Check { caps, slots, slot, descriptor }.run().map_err(|error| {
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
        let binds = if change == Change::Create { self.guest_memfd()? } else { None };
        if self.caps.release < BOUND_IS_FOUND_LAST {
            self.is_bound(binds)?;
            self.guest_addresses(change)?;
        } else {
            self.guest_addresses(change)?;
            self.is_bound(binds)?;
        }
        Ok(Verdict { change, binds })
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
            format!(
                "memslot number {number:#x} is too large: numbers end below {:#x} here",
                self.caps.memslots
            ),
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
            format!("address space {space} is none of the {} that this VM has", self.caps.address_spaces),
        )
        .hint("use one below kvmprep_caps.address_spaces: 1 is SMM's, which VMs with private memory do not have"))
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
    fn guest_addresses(&self, change: Change) -> Result<()> {
        let places = matches!(change, Change::Create | Change::Move);
        let Some(range) = self.slot.range().filter(|_| places) else { return Ok(()) };
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
            .hint(format!("keep guest memory below {:#x}", 1u64 << bits)));
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
            Some((name, remedy)) => error.hint(format!("{name} is there: {remedy}")),
            None => error,
        }
    }

    /// The file to be bound.
    fn guest_memfd(&self) -> Result<Option<Binding>> {
        let region = &self.slot.region;
        let fd = region.guest_memfd;
        let binding = match self.descriptor {
            None => return Ok(None),
            Some(Descriptor::Usable(binding)) => binding,
            Some(Descriptor::Closed(errno)) if errno.0 == libc::EBADF => {
                return Err(Error::new(
                    libc::EBADF,
                    Reason::BadFd,
                    format!("guest_memfd is {fd}, which is no open descriptor"),
                )
                .hint("pass what KVM_CREATE_GUEST_MEMFD returned, while it is open"));
            }
            Some(Descriptor::Closed(errno)) => {
                return Err(Error::system(errno, "looking at the guest_memfd"));
            }
            Some(Descriptor::Foreign) => {
                return Err(Error::invalid(
                    Reason::GmemNotOne,
                    format!("descriptor {fd} is not a guest_memfd"),
                )
                .hint("pass what KVM_CREATE_GUEST_MEMFD returned"));
            }
        };
        let (end, length) = (region.guest_memfd_offset.saturating_add(region.size), binding.file.length);
        // Before Linux 7.2 the kernel's own sum wraps where it comes to 2^63, and it binds what no file has. Not here.
        if end > length {
            return Err(Error::invalid(
                Reason::GmemTooShort,
                format!("the memslot needs guest_memfd {fd} up to {end:#x}, and it has {length:#x} bytes"),
            )
            .hint(format!(
                "make a new guest_memfd of {end:#x} bytes at least (none can grow), or check the offset"
            )));
        }
        Ok(Some(binding))
    }

    /// No byte of a guest_memfd is in two slots.
    fn is_bound(&self, binds: Option<Binding>) -> Result<()> {
        let errno = if self.caps.release < BOUND_IS_EEXIST { libc::EINVAL } else { libc::EEXIST };
        let Some(Binding { file, .. }) = binds else { return Ok(()) };
        let region = &self.slot.region;
        let Some(part) = Range::new(region.guest_memfd_offset, region.size) else { return Ok(()) };
        let Some(other) = self.slots.bound(file.id, part) else { return Ok(()) };
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
        .hint("check the number, and that the slot was listed, or noted (kvmprep_memslot_note)")
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
    .hint("delete or move the other slot first; a handle must be told of it (kvmprep_memslot_note)"))
}

/// The slots that KVM makes for itself have the numbers behind the last.
fn internal_name(caps: &Caps, slot: SlotId) -> Option<(&'static str, &'static str)> {
    match slot_number(slot).checked_sub(caps.memslots)? {
        0 => Some(("KVM's APIC access page", "keep clear of it")),
        1 => Some(("KVM's task state segment", "keep clear of it, or move it (KVM_SET_TSS_ADDR)")),
        2 => Some(("KVM's identity map", "keep clear of it, or move it (KVM_SET_IDENTITY_MAP_ADDR)")),
        _ => None,
    }
}
