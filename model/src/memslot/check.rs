//! What KVM refuses before it makes anything: `kvm_set_memory_region` down to the overlap of slots.
//!
//! Each rule is in the kernel's place, since a caller sees which of two comes first. Nothing here changes anything; what is
//! refused later is in [`prepare`](super::prepare).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{
    Change, GUEST_MEMFD, LOG_DIRTY_PAGES, Memslot, Memslots, READONLY, Region, SLOTS, USER_SLOTS,
    is_page_aligned,
};
use crate::errno::{Errno, Result};
use crate::mistake::{Mistake, mistaken};
use crate::personality::{Personality, VmType};
use crate::units::{Gfn, GfnRange, PAGE_SHIFT};

/// The most pages of a VMM's slot: bits of dirty logs are counted by an unsigned int.
const MOST_PAGES: u64 = (1 << 31) - 1;

/// Which VM a file or a call is of.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VmId(u64);

impl VmId {
    /// Of a new VM: another at each call.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        VmId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What the rules for slots and files go by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The kernel.
    pub personality: Personality,
    /// The VM's type.
    pub vm_type: VmType,
    /// TDX's shared bit as a bit of a frame number; 0 while there is none.
    pub shared_bit: Gfn,
    /// Which VM this is.
    pub vm: VmId,
}

/// What setting a region does, or why it is refused at once. `is_region2`: by `KVM_SET_USER_MEMORY_REGION2`.
///
/// `address_spaces` are all that the VM has. Of a slot to be created, [`prepare`](super::prepare) looks at the file.
pub fn check(
    rules: &Rules,
    address_spaces: &[Arc<Memslots>],
    region: &Region,
    is_region2: bool,
) -> Result<Change> {
    if is_region2 && !rules.personality.has_memory_region2() {
        return Err(Errno::ENOTTY);
    }
    if !is_region2 && region.flags & !(LOG_DIRTY_PAGES | READONLY) != 0 {
        return Err(Errno::EINVAL);
    }
    if number(region) >= USER_SLOTS {
        return Err(Errno::EINVAL);
    }
    check_internal(rules, address_spaces, region)
}

/// The same of a slot that KVM sets for itself, behind the VMM's.
pub fn check_internal(rules: &Rules, address_spaces: &[Arc<Memslots>], region: &Region) -> Result<Change> {
    check_flags(rules, region.flags)?;
    check_form(rules, region)?;
    let slots = address_spaces.get(region.slot as usize >> 16).ok_or(Errno::EINVAL)?;
    check_extent(region)?;
    let old = slots.by_id(number(region) as u16);
    let change = change(region, old.map(Arc::as_ref))?;
    if change == Change::Create && mistaken(Mistake::FilesAreLookedAtBeforeOtherSlots) {
        super::prepare::check_file(rules, region)?;
    }
    let is_unchecked = change == Change::Move && mistaken(Mistake::ASlotMayMoveOntoAnother);
    if matches!(change, Change::Create | Change::Move) && !is_unchecked {
        check_overlap(slots, region)?;
    }
    Ok(change)
}

fn number(region: &Region) -> u32 {
    region.slot & 0xffff
}

fn check_flags(rules: &Rules, flags: u32) -> Result<()> {
    let mut valid = LOG_DIRTY_PAGES;
    if rules.personality.has_read_only_slots(rules.vm_type) {
        valid |= READONLY;
    }
    // Neither logged nor read-only: KVM cannot emulate accesses to private memory.
    if flags & GUEST_MEMFD != 0 {
        valid = if rules.personality.takes_guest_memfd_slots(rules.vm_type) { GUEST_MEMFD } else { 0 };
    }
    if flags & !valid == 0 { Ok(()) } else { Err(Errno::EINVAL) }
}

fn check_form(rules: &Rules, region: &Region) -> Result<()> {
    let is_aligned = [region.size, region.gpa, region.userspace_addr].into_iter().all(is_page_aligned);
    let end = region.userspace_addr.checked_add(region.size);
    let is_user = end.is_some_and(|end| end <= rules.personality.user_address_end());
    let is_part_of_file = region.flags & GUEST_MEMFD == 0
        || is_page_aligned(region.guest_memfd_offset)
            && region.guest_memfd_offset.checked_add(region.size).is_some();
    if is_aligned && is_user && is_part_of_file { Ok(()) } else { Err(Errno::EINVAL) }
}

/// That the sum of all slots' pages fits 64 bits, which the kernel checks too, cannot fail: there are too few slots.
fn check_extent(region: &Region) -> Result<()> {
    let is_of_vmm = number(region) < USER_SLOTS;
    let fits = number(region) < SLOTS
        && region.gpa.checked_add(region.size).is_some()
        && (!is_of_vmm || region.size >> PAGE_SHIFT <= MOST_PAGES);
    if fits { Ok(()) } else { Err(Errno::EINVAL) }
}

fn change(region: &Region, old: Option<&Memslot>) -> Result<Change> {
    match old {
        None if region.size == 0 => Err(Errno::EINVAL),
        None => Ok(Change::Create),
        Some(_) if region.size == 0 => Ok(Change::Delete),
        Some(old) => alteration(region, old),
    }
}

fn alteration(region: &Region, old: &Memslot) -> Result<Change> {
    let toggled = region.flags ^ old.flags;
    let is_other = region.userspace_addr != old.hva.0 || region.size >> PAGE_SHIFT != old.pages;
    if region.flags & GUEST_MEMFD != 0 || is_other || toggled & (READONLY | GUEST_MEMFD) != 0 {
        return Err(Errno::EINVAL);
    }
    Ok(if Gfn::of_gpa(region.gpa) != old.base {
        Change::Move
    } else if toggled != 0 {
        Change::FlagsOnly
    } else {
        Change::Nothing
    })
}

fn check_overlap(slots: &Memslots, region: &Region) -> Result<()> {
    let range = GfnRange::new(Gfn::of_gpa(region.gpa), region.size >> PAGE_SHIFT);
    let is_itself = |slot: &Arc<Memslot>| u32::from(slot.id) == number(region);
    if slots.overlapping(range).all(is_itself) { Ok(()) } else { Err(Errno::EEXIST) }
}
