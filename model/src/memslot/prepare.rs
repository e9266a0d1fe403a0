//! Makes a slot of a region that was found good, with the checks that come late: the file, its bound parts, and the width of
//! guest addresses.
//!
//! Their order differs between kernels. What fails here fails after a slot to be moved was made invalid and zapped: the
//! caller puts the old one back. Only the part of the guest_memfd is taken here, and given back on failure.

use std::sync::Arc;

use super::{
    Change, DirtyBitmap, FileArgument, GUEST_MEMFD, GmemBinding, LOG_DIRTY_PAGES, Lpage, Memslot, Region,
    Rules,
};
use crate::attributes::Attributes;
use crate::errno::{Errno, Result};
use crate::mistake::{Mistake, mistaken};
use crate::units::{Gfn, Hva, PAGE_SHIFT};

/// How a VM logs the pages that its guest writes.
#[derive(Clone, Copy, Debug)]
pub struct DirtyLogging {
    /// By a bitmap; not so with a ring alone.
    pub has_bitmap: bool,
    /// `KVM_DIRTY_LOG_INITIALLY_SET`: every page counts as written when logging begins.
    pub is_initially_set: bool,
}

/// What a slot is made from.
#[derive(Clone, Copy)]
pub struct Making<'a> {
    /// What the VMM asked for, and [`check`](super::check) found good.
    pub region: &'a Region,
    /// [`Change::Create`], [`Change::Move`] or [`Change::FlagsOnly`].
    pub change: Change,
    /// The slot there was.
    pub old: Option<&'a Memslot>,
    /// How the VM logs.
    pub logging: DirtyLogging,
    /// Which pages are private.
    pub attributes: &'a Attributes,
}

/// Makes the slot; one with a guest_memfd is bound to it afterwards.
pub fn prepare(rules: &Rules, making: &Making<'_>) -> Result<Arc<Memslot>> {
    let slot = Arc::new(make(rules, making)?);
    let moves = matches!(making.change, Change::Create | Change::Move);
    let check_place = || if moves { check_place(rules, &slot) } else { Ok(()) };
    let bind = || bind(rules, &slot);
    if rules.personality.finds_bound_parts_last() {
        check_place()?;
        bind()?;
    } else {
        bind()?;
        check_place().inspect_err(|_| slot.unbind())?;
    }
    Ok(slot)
}

/// What is wrong with a region's file, if it has one.
pub(super) fn check_file(rules: &Rules, region: &Region) -> Result<()> {
    if region.flags & GUEST_MEMFD != 0 { part_of_file(rules, region).map(drop) } else { Ok(()) }
}

fn make(rules: &Rules, making: &Making<'_>) -> Result<Memslot> {
    let region = making.region;
    let (base, pages, hva) = (Gfn::of_gpa(region.gpa), region.size >> PAGE_SHIFT, Hva(region.userspace_addr));
    let gmem = if region.flags & GUEST_MEMFD != 0 { Some(part_of_file(rules, region)?) } else { None };
    let kept = making.old.filter(|_| making.change == Change::FlagsOnly);
    let slot = Memslot {
        as_id: (region.slot >> 16) as u16,
        id: region.slot as u16,
        base,
        pages,
        hva,
        flags: region.flags,
        gmem,
        lpage: kept.map_or_else(|| Arc::new(Lpage::new(base, pages, hva)), |old| old.lpage.clone()),
        dirty: dirty_bitmap(making, pages),
        is_invalid: false,
    };
    if kept.is_none() && !mistaken(Mistake::ANewSlotHasNoMixedFrames) {
        making.attributes.compute_mixed(&slot);
    }
    Ok(slot)
}

fn dirty_bitmap(making: &Making<'_>, pages: u64) -> Option<Arc<DirtyBitmap>> {
    let is_logged = making.region.flags & LOG_DIRTY_PAGES != 0;
    let new = || {
        let bitmap = DirtyBitmap::new(pages);
        if making.logging.is_initially_set {
            bitmap.mark_all();
        }
        Arc::new(bitmap)
    };
    let old = making.old.and_then(|old| old.dirty.clone());
    if is_logged { old.or_else(|| making.logging.has_bitmap.then(new)) } else { None }
}

/// `kvm_gmem_prepare_memory_region`: whether the file is one, this VM's, and large enough.
fn part_of_file(rules: &Rules, region: &Region) -> Result<GmemBinding> {
    let file = match &region.guest_memfd {
        FileArgument::BadFd => return Err(Errno::EBADF),
        FileArgument::NotGuestMemfd => return Err(Errno::EINVAL),
        FileArgument::File(file) => file,
    };
    if file.vm() != rules.vm || !fits(rules, region, file.size()) {
        return Err(Errno::EINVAL);
    }
    Ok(file.part(region.guest_memfd_offset >> PAGE_SHIFT))
}

fn fits(rules: &Rules, region: &Region, file_size: u64) -> bool {
    let end = region.guest_memfd_offset.wrapping_add(region.size);
    if rules.personality.adds_file_parts_with_sign() {
        return region.guest_memfd_offset as i64 >= 0 && end as i64 <= file_size as i64;
    }
    end <= file_size
}

fn bind(rules: &Rules, slot: &Arc<Memslot>) -> Result<()> {
    match slot.gmem.as_ref().and_then(|gmem| gmem.file.upgrade()) {
        Some(file) => file.bind(rules, slot),
        None => Ok(()),
    }
}

/// `kvm_arch_prepare_memory_region`: whether KVM can map the slot's last frame.
fn check_place(rules: &Rules, slot: &Memslot) -> Result<()> {
    let last = slot.range().end.0 - 1;
    if last <= rules.personality.last_gfn().0 && last & rules.shared_bit.0 == 0 {
        Ok(())
    } else {
        Err(Errno::EINVAL)
    }
}
