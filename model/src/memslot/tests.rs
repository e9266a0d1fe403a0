//! The rules of slots one by one, each beside those that come before and after it, and the books that slots keep.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::attributes::Attributes;
use crate::gmem::testing::{Fixture, rules};
use crate::gmem::{FLAG_INIT_SHARED, FLAG_MMAP};
use crate::personality::{Version, VmType};
use crate::units::{Level, PAGE_SIZE, Privacy};

const NEWEST: Version = Version(7, 3);
const HUGE: u64 = Level::HUGE.pages();
const GIGANTIC: u64 = Level::GIGANTIC.pages();

fn pages(pages: u64) -> u64 {
    pages * PAGE_SIZE
}

fn region(slot: u32, base: u64, count: u64) -> Region {
    Region {
        slot,
        flags: 0,
        gpa: pages(base),
        size: pages(count),
        userspace_addr: pages(0x10000 + base),
        guest_memfd: FileArgument::BadFd,
        guest_memfd_offset: 0,
    }
}

/// The slots of a VM, set as a VM sets them but for zapping.
struct Slots {
    rules: Rules,
    spaces: Vec<Arc<Memslots>>,
    attributes: Attributes,
    logging: DirtyLogging,
}

impl Slots {
    fn new(rules: Rules) -> Self {
        let spaces = vec![Arc::default(); rules.personality.address_spaces(rules.vm_type)];
        let logging = DirtyLogging { has_bitmap: true, is_initially_set: false };
        Slots { rules, spaces, attributes: Attributes::new(), logging }
    }

    fn newest(vm_type: VmType) -> Self {
        Slots::new(rules(NEWEST, vm_type))
    }

    fn check(&self, region: &Region) -> Result<Change> {
        check(&self.rules, &self.spaces, region, true)
    }

    fn set(&mut self, region: &Region) -> Result<Change> {
        let change = self.check(region)?;
        let (as_id, id) = (region.slot as usize >> 16, region.slot as u16);
        let old = self.spaces[as_id].by_id(id).cloned();
        let slots = match change {
            Change::Nothing => return Ok(change),
            Change::Delete => {
                old.iter().for_each(|old| old.unbind());
                self.spaces[as_id].without(id)
            }
            _ => {
                let (old, logging, attributes) = (old.as_deref(), self.logging, &self.attributes);
                let slot = prepare(&self.rules, &Making { region, change, old, logging, attributes })?;
                self.spaces[as_id].with(slot)
            }
        };
        self.spaces[as_id] = Arc::new(slots);
        Ok(change)
    }

    fn slot(&self, slot: u32) -> &Arc<Memslot> {
        self.spaces[slot as usize >> 16].by_id(slot as u16).expect("the slot was set")
    }
}

#[test]
fn the_second_call_moves_a_slot_or_toggles_its_log_and_nothing_else() {
    let mut slots = Slots::newest(VmType::Default);
    let first = region(3, 0x100, 16);
    assert_eq!(slots.set(&first), Ok(Change::Create));
    assert_eq!(slots.check(&first), Ok(Change::Nothing));
    let logged = Region { flags: LOG_DIRTY_PAGES, ..first.clone() };
    assert_eq!(slots.check(&logged), Ok(Change::FlagsOnly));
    let moved = Region { gpa: pages(0x108), ..logged.clone() };
    assert_eq!(slots.check(&moved), Ok(Change::Move));
    for other in [
        Region { size: pages(15), ..first.clone() },
        Region { userspace_addr: first.userspace_addr + PAGE_SIZE, ..first.clone() },
        Region { flags: READONLY, ..first.clone() },
        Region { flags: GUEST_MEMFD, ..first.clone() },
        // Wrong in this way before it would overlap.
        Region { size: pages(15), gpa: 0, ..first.clone() },
    ] {
        assert_eq!(slots.check(&other), Err(Errno::EINVAL), "{other:?}");
    }
    // Of a slot to be deleted the rest need only be well-formed.
    let delete = Region { size: 0, gpa: 0, userspace_addr: 0, flags: READONLY, ..first.clone() };
    assert_eq!(slots.set(&delete), Ok(Change::Delete));
    assert_eq!(slots.check(&delete), Err(Errno::EINVAL));
}

#[test]
fn regions_that_make_no_sense_are_refused() {
    let slots = Slots::newest(VmType::Default);
    let good = region(0, 0x100, 16);
    let user_end = (1 << 47) - PAGE_SIZE;
    for bad in [
        Region { flags: 1 << 3, ..good.clone() },
        Region { size: good.size + 1, ..good.clone() },
        Region { gpa: good.gpa + 1, ..good.clone() },
        Region { userspace_addr: good.userspace_addr + 1, ..good.clone() },
        Region { userspace_addr: user_end - pages(15), ..good.clone() },
        Region { userspace_addr: 0u64.wrapping_sub(pages(8)), ..good.clone() },
        Region { gpa: 0u64.wrapping_sub(pages(16)), ..good.clone() },
        Region { size: pages(1 << 31), userspace_addr: 0, ..good.clone() },
        Region { slot: USER_SLOTS, ..good.clone() },
        Region { slot: 2 << 16, ..good.clone() },
        Region { slot: 0xffff, ..good.clone() },
    ] {
        assert_eq!(slots.check(&bad), Err(Errno::EINVAL), "{bad:?}");
    }
    for allowed in [
        Region { userspace_addr: 0, ..good.clone() },
        Region { userspace_addr: user_end - pages(16), ..good.clone() },
        Region { size: pages((1 << 31) - 1), userspace_addr: 0, ..good.clone() },
        Region { slot: USER_SLOTS - 1, ..good.clone() },
        Region { slot: 1 << 16, ..good.clone() },
        // Whether KVM can map it is found later.
        Region { gpa: pages(1 << 51), ..good.clone() },
    ] {
        assert_eq!(slots.check(&allowed), Ok(Change::Create), "{allowed:?}");
    }
}

#[test]
fn kvm_s_own_slots_come_after_the_vmm_s_and_may_be_in_its_way() {
    let mut slots = Slots::newest(VmType::Default);
    let own = region(USER_SLOTS, 0x100, 1);
    assert_eq!(check_internal(&slots.rules, &slots.spaces, &own), Ok(Change::Create));
    let past = region(USER_SLOTS + INTERNAL_SLOTS, 0x100, 1);
    assert_eq!(check_internal(&slots.rules, &slots.spaces, &past), Err(Errno::EINVAL));
    let making = Making {
        region: &own,
        change: Change::Create,
        old: None,
        logging: slots.logging,
        attributes: &slots.attributes,
    };
    let slot = prepare(&slots.rules, &making).unwrap();
    slots.spaces[0] = Arc::new(slots.spaces[0].with(slot));
    assert_eq!(slots.check(&region(0, 0xff, 2)), Err(Errno::EEXIST));
    assert_eq!(slots.check(&region(1 << 16, 0xff, 2)), Ok(Change::Create));
}

#[test]
fn slots_of_one_address_space_do_not_overlap() {
    let mut slots = Slots::newest(VmType::Default);
    slots.set(&region(0, 0x100, 16)).unwrap();
    slots.set(&region(1, 0x200, 16)).unwrap();
    for (slot, base, count, expected) in [
        (2, 0x10f, 1, Err(Errno::EEXIST)),
        (2, 0xff, 2, Err(Errno::EEXIST)),
        (2, 0, 0x1000, Err(Errno::EEXIST)),
        (2, 0x110, 0xf0, Ok(Change::Create)),
        (2 | 1 << 16, 0x100, 16, Ok(Change::Create)),
        (0, 0x1f1, 16, Err(Errno::EEXIST)),
        // Only itself is in its way.
        (0, 0x108, 16, Ok(Change::Move)),
    ] {
        let mut region = region(slot, base, count);
        if slot == 0 {
            region.userspace_addr = slots.slot(0).hva.0;
        }
        assert_eq!(slots.check(&region), expected, "{slot} {base:#x} {count:#x}");
    }
}

#[test]
fn flags_depend_on_the_ioctl_the_kernel_and_the_type() {
    let old = Version(6, 12);
    let (log, ro, gmem) = (LOG_DIRTY_PAGES, READONLY, GUEST_MEMFD);
    let (default, private) = (VmType::Default, VmType::SwProtected);
    let refused = Err(Errno::EINVAL);
    for (version, vm_type, flags, is_region2, expected) in [
        (NEWEST, default, log | ro, false, Ok(Change::Create)),
        (NEWEST, default, gmem, false, refused),
        (NEWEST, default, gmem, true, Ok(Change::Create)),
        (NEWEST, private, gmem, true, Ok(Change::Create)),
        (NEWEST, private, gmem | log, true, refused),
        (NEWEST, private, gmem | ro, true, refused),
        (NEWEST, private, log | ro, true, Ok(Change::Create)),
        // A guest whose state is protected could not be shown what it reads.
        (NEWEST, VmType::Snp, ro, true, refused),
        (NEWEST, VmType::Tdx, ro, true, refused),
        (NEWEST, VmType::Snp, log, true, Ok(Change::Create)),
        (old, default, gmem, true, refused),
        (old, private, gmem, true, Ok(Change::Create)),
        (Version(6, 1), default, log | ro, false, Ok(Change::Create)),
        (Version(6, 1), default, 0, true, Err(Errno::ENOTTY)),
    ] {
        let slots = Slots::new(rules(version, vm_type));
        let region = Region { flags, ..region(0, 0x100, 16) };
        let answer = check(&slots.rules, &slots.spaces, &region, is_region2);
        assert_eq!(answer, expected, "{version:?} {vm_type:?} {flags} {is_region2}");
    }
}

#[test]
fn beside_private_memory_there_is_no_address_space_for_smm() {
    let slots = Slots::newest(VmType::SwProtected);
    assert_eq!(slots.check(&region(1 << 16, 0, 1)), Err(Errno::EINVAL));
}

/// A file of 16 pages, and a VM whose slot 0 is bound to its first four.
fn bound(version: Version, vm_type: VmType) -> (Fixture, Slots) {
    let fixture = Fixture::new(version, vm_type, pages(16), 0);
    let mut slots = Slots::new(fixture.rules);
    slots.set(&gmem_region(&fixture, 0, 0x100, 0, 4)).unwrap();
    (fixture, slots)
}

fn gmem_region(fixture: &Fixture, slot: u32, base: u64, index: u64, count: u64) -> Region {
    Region {
        flags: GUEST_MEMFD,
        guest_memfd: FileArgument::File(fixture.file.clone()),
        guest_memfd_offset: pages(index),
        ..region(slot, base, count)
    }
}

#[test]
fn a_file_must_be_one_of_this_vm_and_large_enough() {
    let (fixture, mut slots) = bound(NEWEST, VmType::SwProtected);
    let good = gmem_region(&fixture, 1, 0x200, 8, 8);
    let of_other_vm = Fixture::newest(pages(16), 0);
    for (bad, expected) in [
        (Region { guest_memfd: FileArgument::BadFd, ..good.clone() }, Errno::EBADF),
        (Region { guest_memfd: FileArgument::NotGuestMemfd, ..good.clone() }, Errno::EINVAL),
        (Region { guest_memfd: FileArgument::File(of_other_vm.file.clone()), ..good.clone() }, Errno::EINVAL),
        (Region { guest_memfd_offset: pages(9), ..good.clone() }, Errno::EINVAL),
        (Region { guest_memfd_offset: 1, ..good.clone() }, Errno::EINVAL),
        (Region { guest_memfd_offset: 0u64.wrapping_sub(pages(8)), ..good.clone() }, Errno::EINVAL),
        // Overlapping is found before the descriptor is looked at.
        (Region { guest_memfd: FileArgument::BadFd, gpa: pages(0x100), ..good.clone() }, Errno::EEXIST),
    ] {
        assert_eq!(slots.set(&bad), Err(expected), "{bad:?}");
    }
    assert_eq!(slots.set(&good), Ok(Change::Create));
    // Once there it can only go.
    assert_eq!(slots.set(&good), Err(Errno::EINVAL));
    assert_eq!(slots.set(&Region { flags: 0, ..good.clone() }), Err(Errno::EINVAL));
    assert_eq!(
        slots.set(&Region { size: 0, guest_memfd: FileArgument::BadFd, ..good.clone() }),
        Ok(Change::Delete)
    );
    assert_eq!(slots.set(&good), Ok(Change::Create));
}

#[test]
fn what_is_bound_is_refused_in_each_kernel_s_way() {
    for (version, expected) in [
        (Version(6, 12), Errno::EINVAL),
        (Version(6, 18), Errno::EINVAL),
        (Version(7, 2), Errno::EEXIST),
        (NEWEST, Errno::EEXIST),
    ] {
        let (fixture, mut slots) = bound(version, VmType::SwProtected);
        assert_eq!(slots.set(&gmem_region(&fixture, 1, 0x200, 3, 4)), Err(expected), "{version:?}");
        assert_eq!(fixture.file.bindings().len(), 1);
    }
}

#[test]
fn the_newest_kernel_looks_at_the_address_before_it_binds() {
    let beyond = 1 << (46 - PAGE_SHIFT);
    for (version, expected) in [(Version(7, 2), Errno::EEXIST), (NEWEST, Errno::EINVAL)] {
        let (fixture, mut slots) = bound(version, VmType::SwProtected);
        assert_eq!(slots.set(&gmem_region(&fixture, 1, beyond, 0, 4)), Err(expected), "{version:?}");
        // Bound or not before that is found: it is not afterwards.
        assert_eq!(slots.set(&gmem_region(&fixture, 1, beyond, 8, 4)), Err(Errno::EINVAL));
        assert_eq!(slots.set(&gmem_region(&fixture, 1, beyond - 4, 8, 4)), Ok(Change::Create));
    }
}

#[test]
fn old_kernels_take_a_part_whose_end_they_think_negative() {
    for (version, expected) in [(Version(6, 18), Ok(Change::Create)), (Version(7, 2), Err(Errno::EINVAL))] {
        let (fixture, mut slots) = bound(version, VmType::SwProtected);
        let offset = (1 << 63) - pages(4);
        let region = Region { guest_memfd_offset: offset, ..gmem_region(&fixture, 1, 0x200, 0, 8) };
        assert_eq!(slots.set(&region), expected, "{version:?}");
        if expected.is_ok() {
            assert!(slots.slot(1).gmem_pfn(Gfn(0x207)).is_ok());
        }
        let region =
            Region { guest_memfd_offset: (1 << 63) + pages(64), ..gmem_region(&fixture, 2, 0x300, 0, 8) };
        assert_eq!(slots.set(&region), Err(Errno::EINVAL), "{version:?}");
    }
}

#[test]
fn slots_end_where_the_host_s_addresses_do_and_below_the_shared_bit() {
    let mut slots = Slots::newest(VmType::Tdx);
    let last = (1 << (46 - PAGE_SHIFT)) - 1;
    assert_eq!(slots.set(&region(0, last, 2)), Err(Errno::EINVAL));
    assert_eq!(slots.set(&region(0, last, 1)), Ok(Change::Create));
    slots.rules.shared_bit = Gfn(1 << (45 - PAGE_SHIFT));
    assert_eq!(slots.set(&region(1, slots.rules.shared_bit.0 - 1, 2)), Err(Errno::EINVAL));
    assert_eq!(slots.set(&region(1, slots.rules.shared_bit.0 - 2, 2)), Ok(Change::Create));
    // What is there may stay and be logged; it may not move within.
    let there = Region { flags: LOG_DIRTY_PAGES, ..region(0, last, 1) };
    assert_eq!(slots.set(&there), Ok(Change::FlagsOnly));
    assert_eq!(slots.set(&Region { gpa: there.gpa - PAGE_SIZE, ..there }), Err(Errno::EINVAL));
    assert_eq!(slots.slot(0).base, Gfn(last));
}

#[test]
fn a_slot_keeps_its_log_and_its_marks_as_long_as_they_hold() {
    let mut slots = Slots::newest(VmType::SwProtected);
    let first = region(0, 0, 4 * HUGE);
    slots.set(&first).unwrap();
    slots.slot(0).lpage.disallow(Gfn(0), Level::HUGE);
    assert!(slots.slot(0).dirty.is_none());
    slots.attributes.set(GfnRange::new(Gfn(2 * HUGE), 1), Privacy::Private);
    slots.set(&Region { flags: LOG_DIRTY_PAGES, ..first.clone() }).unwrap();
    slots.slot(0).dirty.as_ref().unwrap().mark(7);
    assert!(!slots.slot(0).lpage.is_allowed(Gfn(0), Level::HUGE));
    // One that moves takes its log along, and starts anew in all that depends on its place.
    let moved = Region { flags: LOG_DIRTY_PAGES, gpa: pages(HUGE), ..first.clone() };
    assert_eq!(slots.set(&moved), Ok(Change::Move));
    let slot = slots.slot(0);
    assert!(slot.dirty.as_ref().unwrap().is_marked(7));
    let is_allowed: Vec<bool> =
        (1..5).map(|nth| slot.lpage.is_allowed(Gfn(nth * HUGE), Level::HUGE)).collect();
    assert_eq!(is_allowed, [true, false, true, true]);
    slots.set(&Region { flags: 0, ..moved.clone() }).unwrap();
    assert!(slots.slot(0).dirty.is_none());
    slots.logging.is_initially_set = true;
    slots.set(&moved).unwrap();
    assert!(slots.slot(0).dirty.as_ref().unwrap().is_marked(4 * HUGE - 1));
}

#[test]
fn where_accesses_go_depends_on_the_file() {
    for (flags, serves_all, privacy) in [
        (0, false, Privacy::Private),
        (FLAG_MMAP, true, Privacy::Private),
        (FLAG_INIT_SHARED, false, Privacy::Shared),
        (FLAG_MMAP | FLAG_INIT_SHARED, true, Privacy::Shared),
    ] {
        let fixture = Fixture::new(NEWEST, VmType::Default, pages(16), flags);
        let mut slots = Slots::new(fixture.rules);
        slots.set(&gmem_region(&fixture, 0, 0x100, 2, 4)).unwrap();
        let slot = slots.slot(0);
        assert!(slot.has_gmem());
        assert_eq!((slot.is_gmem_only(), slot.gmem.as_ref().unwrap().privacy), (serves_all, privacy));
        assert_eq!(slot.gmem_index(Gfn(0x101)), Some(3));
        assert_eq!(slot.gmem_pfn(Gfn(0x101)), fixture.file.pfn(3));
    }
    let mut slots = Slots::newest(VmType::Default);
    slots.set(&region(0, 0x100, 4)).unwrap();
    assert_eq!(slots.slot(0).gmem_pfn(Gfn(0x100)), Err(Errno::EFAULT));
    assert_eq!(slots.slot(0).hva_of(Gfn(0x103)), Hva(pages(0x10103)));
}

#[test]
fn the_largest_slots_cost_little_until_they_are_used() {
    let most = (1 << 31) - 1;
    let lpage = Lpage::new(Gfn(0), most, Hva(0));
    lpage.set_mixed(Gfn(most - HUGE), Level::HUGE, true);
    lpage.clear_mixed(GfnRange::new(Gfn(0), most), Level::HUGE);
    assert!(!lpage.mixed(Gfn(most - HUGE), Level::HUGE));
    let dirty = DirtyBitmap::new(most);
    dirty.mark(most - 1);
    assert_eq!(dirty.take((most - 1) / 64, u64::MAX), 1 << ((most - 1) % 64));
    assert!(!dirty.is_marked(most - 1));
}

/// `kvm_lpage_info` as an array, filled the way the rule is written.
fn forbidden(base: u64, count: u64, hva: u64, level: u64) -> Vec<bool> {
    let entries = ((base + count - 1) / level - base / level + 1) as usize;
    let mut forbidden = vec![(base ^ hva) % level != 0; entries];
    forbidden[0] |= base % level != 0;
    forbidden[entries - 1] |= (base + count) % level != 0;
    forbidden
}

fn edge() -> impl Strategy<Value = u64> {
    let near =
        |level: u64| (0..4u64, -2i64..=2).prop_map(move |(nth, by)| (nth * level).saturating_add_signed(by));
    prop_oneof![near(HUGE), near(GIGANTIC)]
}

/// The number, place and pages of a slot that is set, in so many of ten cases, or deleted.
fn step(set_of_ten: u32) -> impl Strategy<Value = (u16, u64, u64, bool)> {
    (0..700u16, 0..700u64, 1..4u64, prop::bool::weighted(f64::from(set_of_ten) / 10.0))
}

proptest! {
    #[test]
    fn large_pages_are_forbidden_by_place_and_by_count(base in edge(), count in edge(), askew in edge(),
                                                       counted in prop::collection::vec(any::<u16>(), 0..4)) {
        let count = count.max(1);
        let hva = base + askew;
        let lpage = Lpage::new(Gfn(base), count, Hva(pages(hva)));
        for level in [Level::HUGE, Level::GIGANTIC] {
            let mut forbidden = forbidden(base, count, hva, level.pages());
            let first = base / level.pages();
            let gfn = |index: usize| Gfn(((first + index as u64) * level.pages()).max(base));
            let all = |forbidden: &[bool], when: &str| {
                for (index, is_forbidden) in forbidden.iter().enumerate() {
                    assert_eq!(!lpage.is_allowed(gfn(index), level), *is_forbidden, "{level:?} {index} {when}");
                }
            };
            all(&forbidden, "at first");
            let before = forbidden.clone();
            let counted: Vec<usize> = counted.iter().map(|nth| usize::from(*nth) % forbidden.len()).collect();
            for index in &counted {
                lpage.disallow(gfn(*index), level);
                forbidden[*index] = true;
            }
            all(&forbidden, "counted");
            counted.iter().for_each(|index| lpage.allow(gfn(*index), level));
            all(&before, "counted back");
            for index in 0..before.len().min(3) {
                lpage.set_mixed(gfn(index), level, true);
                assert!(lpage.mixed(gfn(index), level) && !lpage.is_allowed(gfn(index), level));
            }
            lpage.clear_mixed(GfnRange::new(Gfn(base), count), level);
            all(&before, "mixed no more");
        }
        prop_assert!(lpage.is_allowed(Gfn(base), Level::SMALL));
    }

    // First mostly set, then mostly deleted: groups of slots are split and joined.
    #[test]
    fn a_snapshot_knows_what_a_plain_list_knows(
        growing in prop::collection::vec(step(9), 1..600),
        shrinking in prop::collection::vec(step(1), 0..900),
        asked in prop::collection::vec((0..3000u64, 1..300u64), 20),
    ) {
        let mut slots = Memslots::new();
        let mut plain: BTreeMap<u16, (u64, u64)> = BTreeMap::new();
        for (id, place, count, is_set) in growing.into_iter().chain(shrinking) {
            let base = place * 4;
            let is_free = plain.iter().all(|(other, (start, _))| *other == id || *start != base);
            if is_set && is_free {
                slots = slots.with(memslot(id, base, count));
                plain.insert(id, (base, count));
            } else if !is_set {
                slots = slots.without(id);
                plain.remove(&id);
            }
        }
        let mut by_base: Vec<(u64, u64, u16)> = plain.iter().map(|(id, (base, count))| (*base, *count, *id)).collect();
        by_base.sort_unstable();
        let seen: Vec<(u64, u64, u16)> = slots.iter().map(|slot| (slot.base.0, slot.pages, slot.id)).collect();
        prop_assert_eq!(&seen, &by_base);
        prop_assert_eq!(slots.check(), Ok(()));
        prop_assert_eq!((slots.len(), slots.is_empty()), (plain.len(), plain.is_empty()));
        for id in 0..700 {
            let base = slots.by_id(id).map(|slot| (slot.base.0, slot.pages));
            prop_assert_eq!(base.as_ref(), plain.get(&id));
        }
        for (gfn, count) in asked {
            let has = |(base, pages, _): &&(u64, u64, u16)| *base <= gfn && gfn < base + pages;
            let found = slots.find(Gfn(gfn)).map(|slot| slot.id);
            prop_assert_eq!(found, by_base.iter().find(has).map(|(_, _, id)| *id));
            let touches = |(base, pages, _): &&(u64, u64, u16)| *base < gfn + count && gfn < base + pages;
            let overlapping: Vec<u16> =
                slots.overlapping(GfnRange::new(Gfn(gfn), count)).map(|slot| slot.id).collect();
            let expected: Vec<u16> = by_base.iter().filter(touches).map(|(_, _, id)| *id).collect();
            prop_assert_eq!(overlapping, expected);
        }
    }

    #[test]
    fn a_log_has_the_bits_that_were_marked(count in 1..5000u64, marked in prop::collection::vec(any::<u64>(), 0..50),
                                           cleared in any::<u64>()) {
        let dirty = DirtyBitmap::new(count);
        let mut words = vec![0u64; count.div_ceil(64) as usize];
        for page in marked {
            let page = page % count;
            dirty.mark(page);
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
        prop_assert_eq!(&dirty.all(), &words);
        prop_assert_eq!(dirty.take(0, cleared), words[0] & cleared);
        words[0] &= !cleared;
        prop_assert_eq!(&dirty.take_all(), &words);
        prop_assert!(dirty.take_all().iter().all(|word| *word == 0));
        dirty.mark_all();
        let set: u64 = dirty.all().iter().map(|word| u64::from(word.count_ones())).sum();
        prop_assert_eq!(set, count);
    }
}

fn memslot(id: u16, base: u64, count: u64) -> Arc<Memslot> {
    let region = region(id.into(), base, count);
    let (attributes, logging) =
        (Attributes::new(), DirtyLogging { has_bitmap: true, is_initially_set: false });
    let making =
        Making { region: &region, change: Change::Create, old: None, logging, attributes: &attributes };
    prepare(&rules(NEWEST, VmType::Default), &making).expect("the region is good")
}

#[test]
fn all_the_slots_there_can_be_are_set_one_by_one() {
    let mut slots = Memslots::new();
    let old = slots.clone();
    // Neither in the order of their numbers nor of their places.
    for nth in 0..USER_SLOTS {
        let id = (nth * 5) % USER_SLOTS;
        slots = slots.with(memslot(id as u16, u64::from(id) * 3, 2));
    }
    assert_eq!((slots.len(), old.len()), (USER_SLOTS as usize, 0));
    for id in (0..USER_SLOTS as u16).step_by(97) {
        let base = u64::from(id) * 3;
        assert_eq!(slots.find(Gfn(base + 1)).map(|slot| slot.id), Some(id));
        assert!(slots.find(Gfn(base + 2)).is_none());
    }
}

#[test]
fn slots_that_overlap_do_not_go_unseen() {
    let apart = Memslots::new().with(memslot(0, 0, 4)).with(memslot(1, 4, 4));
    assert_eq!(apart.check(), Ok(()));
    assert!(apart.with(memslot(2, 7, 1)).check().is_err());
}

#[test]
fn each_written_page_is_taken_from_a_log_and_by_one_taker() {
    const PAGES: u64 = 64;
    let count = |words: Vec<u64>| words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
    for _ in 0..500 {
        let (dirty, start) = (DirtyBitmap::new(PAGES), Barrier::new(3));
        let take = || {
            start.wait();
            (0..50).map(|_| count(dirty.take_all())).sum::<u64>()
        };
        let taken: u64 = thread::scope(|scope| {
            let takers = [scope.spawn(take), scope.spawn(take)];
            start.wait();
            (0..PAGES).for_each(|page| dirty.mark(page));
            takers.into_iter().map(|taker| taker.join().unwrap()).sum()
        });
        assert_eq!(taken + count(dirty.take_all()), PAGES);
    }
}
