//! Files and their pages: what is refused, what a hole takes, what closing takes, and who is told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::testing::{Fixture, Told, rules};
use super::*;
use crate::attributes::Attributes;
use crate::memslot::{self, Change, DirtyLogging, FileArgument, Making, Region};
use crate::personality::{Personality, Version, VmType};
use crate::units::Gfn;

const PUNCH: i32 = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
const ALLOCATE: i32 = FALLOC_FL_KEEP_SIZE;
const NEWEST: Version = Version(7, 3);

fn pages(pages: u64) -> u64 {
    pages * PAGE_SIZE
}

/// Slot `id` of `count` pages at frame `base`, bound from page `index` of the file.
fn slot(fixture: &Fixture, id: u32, base: u64, index: u64, count: u64) -> Result<Arc<Memslot>> {
    let region = Region {
        slot: id,
        flags: memslot::GUEST_MEMFD,
        gpa: pages(base),
        size: pages(count),
        userspace_addr: 0,
        guest_memfd: FileArgument::File(fixture.file.clone()),
        guest_memfd_offset: pages(index),
    };
    let logging = DirtyLogging { has_bitmap: true, is_initially_set: false };
    let attributes = Attributes::new();
    let making =
        Making { region: &region, change: Change::Create, old: None, logging, attributes: &attributes };
    memslot::prepare(&fixture.rules, &making)
}

fn frames(start: u64, end: u64) -> GfnRange {
    GfnRange { start: Gfn(start), end: Gfn(end) }
}

#[test]
fn a_file_is_made_only_with_flags_and_sizes_that_its_vm_may_have() {
    let create = |version, vm_type, size, flags| {
        let host = testing::Host::default();
        let listener: Arc<dyn GmemUser> = Arc::new(testing::Listener::default());
        GuestMemfd::create(&rules(version, vm_type), size, flags, &host, Arc::downgrade(&listener)).map(drop)
    };
    let both = FLAG_MMAP | FLAG_INIT_SHARED;
    let (old, private, default) = (Version(6, 12), VmType::SwProtected, VmType::Default);
    for (version, vm_type, size, flags, expected) in [
        (NEWEST, default, pages(1), both, Ok(())),
        // Useless, and allowed.
        (NEWEST, default, pages(1), FLAG_INIT_SHARED, Ok(())),
        (NEWEST, default, i64::MAX as u64 - 4095, 0, Ok(())),
        (NEWEST, private, pages(1), FLAG_MMAP, Ok(())),
        (NEWEST, private, pages(1), both, Err(Errno::EINVAL)),
        (NEWEST, default, pages(1), 4, Err(Errno::EINVAL)),
        (NEWEST, default, 0, 0, Err(Errno::EINVAL)),
        (NEWEST, default, 4095, 0, Err(Errno::EINVAL)),
        (NEWEST, default, 1 << 63, 0, Err(Errno::EINVAL)),
        // Any VM may make one, though only those with private memory could use it.
        (old, default, pages(1), 0, Ok(())),
        (old, private, pages(1), FLAG_MMAP, Err(Errno::EINVAL)),
        (Version(6, 1), default, pages(1), 0, Err(Errno::ENOTTY)),
    ] {
        assert_eq!(
            create(version, vm_type, size, flags),
            expected,
            "{version:?} {vm_type:?} {size:#x} {flags}"
        );
    }
}

#[test]
fn files_and_slots_with_them_came_with_attributes_and_stayed_without() {
    for (version, has_attributes, vm_type, has_file, has_slot) in [
        (Version(6, 12), true, VmType::Default, true, false),
        (Version(6, 12), true, VmType::SwProtected, true, true),
        (Version(6, 12), false, VmType::Default, false, false),
        (Version(6, 18), false, VmType::Default, true, true),
        (NEWEST, true, VmType::SwProtected, true, true),
        (Version(6, 1), true, VmType::Default, false, false),
    ] {
        let kernel = Personality { has_attributes, ..Personality::with_everything(version) };
        let answers = (kernel.has_guest_memfd(), kernel.takes_guest_memfd_slots(vm_type));
        assert_eq!(answers, (has_file, has_slot), "{version:?} {has_attributes} {vm_type:?}");
        let private = if has_attributes && has_slot && vm_type == VmType::SwProtected { 8 } else { 0 };
        assert_eq!(kernel.memory_attributes(vm_type), private);
    }
}

#[test]
fn a_page_keeps_its_frame_until_a_hole_takes_it() {
    let fixture = Fixture::newest(pages(2048), 0);
    let file = &fixture.file;
    let first = file.pfn(600).unwrap();
    assert_eq!(file.pfn(600), Ok(first));
    file.pfn(599).unwrap();
    file.pfn(601).unwrap();
    assert_eq!(file.present_pages(), 3);
    file.fallocate(PUNCH, pages(600) as i64, pages(1) as i64).unwrap();
    assert!(file.is_present(599) && !file.is_present(600) && file.is_present(601));
    assert_ne!(file.pfn(600), Ok(first));
    // Beyond the end there is nothing to take, and nothing wrong with it.
    file.fallocate(PUNCH, 0, pages(1 << 40) as i64).unwrap();
    assert_eq!(file.present_pages(), 0);
    assert!(fixture.host.0.lock().unwrap().live.is_empty());
}

#[test]
fn allocation_goes_no_further_than_the_file_and_keeps_what_it_got() {
    let fixture = Fixture::newest(pages(8), 0);
    assert_eq!(fixture.file.fallocate(ALLOCATE, pages(4) as i64, pages(5) as i64), Err(Errno::EINVAL));
    assert_eq!(fixture.file.present_pages(), 0);
    fixture.host.0.lock().unwrap().limit = Some(3);
    assert_eq!(fixture.file.fallocate(ALLOCATE, 0, pages(8) as i64), Err(Errno::ENOMEM));
    assert_eq!(fixture.file.present_pages(), 3);
    assert_eq!(fixture.file.pfn(3), Err(Errno::ENOMEM));
    assert!(fixture.file.pfn(2).is_ok());
}

#[test]
fn fallocate_refuses_in_the_order_of_vfs_and_kvm() {
    let file = Fixture::newest(pages(8), 0).file;
    let page = PAGE_SIZE as i64;
    let most = i64::MAX - (page - 1);
    for (mode, offset, len, expected) in [
        (0, -page, page, Errno::EINVAL),
        (PUNCH, 0, 0, Errno::EINVAL),
        (0, 0, page, Errno::EOPNOTSUPP),
        (FALLOC_FL_PUNCH_HOLE, 0, page, Errno::EOPNOTSUPP),
        (FALLOC_FL_ZERO_RANGE | ALLOCATE, 0, page, Errno::EOPNOTSUPP),
        (FALLOC_FL_COLLAPSE_RANGE, 0, page, Errno::EOPNOTSUPP),
        (FALLOC_FL_UNSHARE_RANGE | ALLOCATE, 0, page, Errno::EOPNOTSUPP),
        (1 << 20, 0, page, Errno::EOPNOTSUPP),
        // The VFS knows this mode and finds the sum too large before KVM finds the mode wrong.
        (0, most, most, Errno::EFBIG),
        (FALLOC_FL_WRITE_ZEROES, most, most, Errno::EFBIG),
        (FALLOC_FL_WRITE_ZEROES | ALLOCATE, most, most, Errno::EOPNOTSUPP),
        (FALLOC_FL_COLLAPSE_RANGE, most, most, Errno::EFBIG),
        (FALLOC_FL_PUNCH_HOLE, most, most, Errno::EOPNOTSUPP),
        (PUNCH, most, page, Errno::EFBIG),
        (PUNCH, 1, page, Errno::EINVAL),
        (PUNCH, 0, page + 1, Errno::EINVAL),
    ] {
        assert_eq!(file.fallocate(mode, offset, len), Err(expected), "{mode:#x} {offset:#x} {len:#x}");
    }
}

#[test]
fn only_a_file_that_says_so_is_mapped_and_only_shared_pages_are_seen() {
    let (hidden, mapped) = (Fixture::newest(pages(2), 0).file, Fixture::newest(pages(2), FLAG_MMAP).file);
    let shared = Fixture::newest(pages(2), FLAG_MMAP | FLAG_INIT_SHARED).file;
    assert_eq!(hidden.check_mmap(true), Err(Errno::ENODEV));
    assert_eq!(hidden.check_mmap(false), Err(Errno::ENODEV));
    assert_eq!(mapped.check_mmap(false), Err(Errno::EINVAL));
    assert_eq!(mapped.check_mmap(true), Ok(()));
    assert_eq!(mapped.host_fault(0), Err(Errno::EFAULT));
    assert_eq!(shared.host_fault(0), shared.pfn(0));
    assert_eq!(shared.host_fault(2), Err(Errno::EFAULT));
    assert_eq!(mapped.present_pages(), 0);
}

#[test]
fn a_hole_is_told_to_each_slot_in_its_own_frames() {
    let fixture = Fixture::newest(pages(64), 0);
    slot(&fixture, 1, 0x100, 8, 8).unwrap();
    slot(&fixture, 2, 0x200, 16, 8).unwrap();
    slot(&fixture, 3, 0x300, 32, 8).unwrap();
    fixture.file.fallocate(PUNCH, pages(12) as i64, pages(6) as i64).unwrap();
    let mut told = fixture.listener.take();
    let expected =
        |tell: fn(u16, GfnRange) -> Told| [tell(1, frames(0x104, 0x108)), tell(2, frames(0x200, 0x202))];
    told[..2].sort_by_key(|told| format!("{told:?}"));
    told[2..].sort_by_key(|told| format!("{told:?}"));
    assert_eq!(told[..2], expected(Told::Start));
    assert_eq!(told[2..], expected(Told::End));
    // Where no slot is bound, nobody is told; allocating tells nobody.
    fixture.file.fallocate(PUNCH, pages(24) as i64, pages(8) as i64).unwrap();
    fixture.file.fallocate(ALLOCATE, 0, pages(64) as i64).unwrap();
    assert_eq!(fixture.listener.take(), []);
}

#[test]
fn frames_are_given_back_between_the_start_and_the_end() {
    /// Notes, when told, whether the page still has its frame.
    #[derive(Default)]
    struct Looks {
        host: testing::Host,
        seen: Mutex<Vec<bool>>,
    }
    impl Looks {
        fn look(&self) {
            let is_live = self.host.0.lock().unwrap().live.contains_key(&0);
            self.seen.lock().unwrap().push(is_live);
        }
    }
    impl GmemUser for Looks {
        fn gmem_invalidate_start(&self, _: &Arc<Memslot>, _: GfnRange) {
            self.look();
        }
        fn gmem_invalidate_end(&self, _: &Arc<Memslot>, _: GfnRange) {
            self.look();
        }
    }
    let looks = Arc::new(Looks::default());
    let user: Arc<dyn GmemUser> = looks.clone();
    let mut fixture = Fixture::newest(pages(1), 0);
    fixture.file =
        GuestMemfd::create(&fixture.rules, pages(1), 0, &looks.host, Arc::downgrade(&user)).unwrap();
    let bound = slot(&fixture, 1, 0, 0, 1).unwrap();
    bound.gmem_pfn(Gfn(0)).unwrap();
    fixture.file.fallocate(PUNCH, 0, pages(1) as i64).unwrap();
    bound.gmem_pfn(Gfn(0)).unwrap();
    fixture.file.close();
    assert_eq!(*looks.seen.lock().unwrap(), [true, false, true, false]);
}

#[test]
fn closing_takes_the_pages_from_the_slots() {
    let fixture = Fixture::newest(pages(8), 0);
    let bound = slot(&fixture, 1, 0x10, 2, 4).unwrap();
    assert_eq!(bound.gmem_pfn(Gfn(0x12)), fixture.file.pfn(4));
    fixture.file.close();
    assert_eq!(bound.gmem_pfn(Gfn(0x12)), Err(Errno::EFAULT));
    assert_eq!(
        fixture.listener.take(),
        [Told::Start(1, frames(0x10, 0x14)), Told::End(1, frames(0x10, 0x14))]
    );
    assert!(fixture.host.0.lock().unwrap().live.is_empty());
    assert!(fixture.file.bindings().is_empty());
    fixture.file.close();
    assert_eq!(fixture.listener.take(), []);
}

#[test]
fn whoever_drops_the_last_reference_closes() {
    let Fixture { rules, host, listener, file } = Fixture::newest(pages(8), 0);
    let fixture = Fixture { rules, host: host.clone(), listener: listener.clone(), file };
    let bound = slot(&fixture, 1, 0x10, 0, 4).unwrap();
    bound.gmem_pfn(Gfn(0x10)).unwrap();
    drop(fixture);
    assert_eq!(bound.gmem_pfn(Gfn(0x10)), Err(Errno::EFAULT));
    assert_eq!(listener.take().len(), 2);
    assert!(host.0.lock().unwrap().live.is_empty());
    // The slot of a file that is gone can still be deleted.
    bound.unbind();
}

#[test]
fn no_page_is_in_two_slots() {
    let fixture = Fixture::newest(pages(16), 0);
    let bound = slot(&fixture, 1, 0x100, 4, 4).unwrap();
    for (index, count) in [(4, 4), (0, 5), (7, 1), (0, 16), (5, 2)] {
        assert_eq!(slot(&fixture, 2, 0x200, index, count).map(drop), Err(Errno::EEXIST), "{index} {count}");
    }
    slot(&fixture, 2, 0x200, 0, 4).unwrap();
    slot(&fixture, 3, 0x300, 8, 8).unwrap();
    bound.unbind();
    slot(&fixture, 4, 0x400, 5, 2).unwrap();
    let firsts: Vec<u64> = fixture.file.bindings().iter().map(|(first, _)| *first).collect();
    assert_eq!(firsts, [0, 5, 8]);
    assert_eq!(fixture.file.check_bindings(), Ok(()));
    // The slot that was unbound, behind the check's back.
    fixture.file.invalidate_lock().insert(4, bound);
    assert!(fixture.file.check_bindings().is_err());
}

#[test]
fn failed_memory_stays_and_is_given_to_nobody() {
    let fixture = Fixture::newest(pages(8), FLAG_MMAP | FLAG_INIT_SHARED);
    slot(&fixture, 1, 0, 0, 8).unwrap();
    fixture.file.pfn(3).unwrap();
    fixture.file.poison(3);
    // What was never there cannot fail.
    fixture.file.poison(4);
    assert_eq!(fixture.listener.take(), [Told::Start(1, frames(3, 4)), Told::End(1, frames(3, 4))]);
    assert_eq!(fixture.file.pfn(3), Err(Errno::EHWPOISON));
    assert_eq!(fixture.file.host_fault(3), Err(Errno::EHWPOISON));
    assert!(fixture.file.is_present(3));
    fixture.file.fallocate(PUNCH, pages(3) as i64, pages(1) as i64).unwrap();
    assert!(fixture.file.pfn(3).is_ok());
}

#[test]
fn an_initial_image_goes_into_private_pages_that_old_kernels_want_unused() {
    for (version, again) in [(Version(6, 12), Err(Errno::EEXIST)), (NEWEST, Ok(()))] {
        let fixture = Fixture::new(version, VmType::SwProtected, pages(8), 0);
        let filled = Mutex::new(Vec::new());
        let fill = |index, is_private| {
            let note = |pfn| {
                filled.lock().unwrap().push(pfn);
                Ok(())
            };
            fixture.file.populate(&fixture.rules, index, || is_private, note)
        };
        assert_eq!(fill(0, false), Err(Errno::EINVAL));
        // Allocated is not used: neither by fallocate nor by the attempt before.
        fixture.file.fallocate(ALLOCATE, 0, pages(2) as i64).unwrap();
        assert_eq!(fill(0, true), Ok(()));
        assert_eq!(fill(0, true), again);
        assert_eq!(filled.lock().unwrap()[0], fixture.file.pfn(0).unwrap());
        fixture.file.pfn(1).unwrap();
        assert_eq!(fill(1, true), again);
        let failed = fixture.file.populate(&fixture.rules, 2, || true, |_| Err(Errno::EIO));
        assert_eq!(failed, Err(Errno::EIO));
        assert_eq!(fill(2, true), Ok(()));
        fixture.file.close();
        assert_eq!(fill(3, true), Err(Errno::EFAULT));
    }
}

/// The host's frames say when a page is allocated twice or given back without being there.
#[test]
fn threads_that_fault_and_punch_agree_on_the_frames() {
    const PAGES: u64 = 8;
    const PASSES: u64 = 2000;
    let fixture = Fixture::newest(pages(PAGES), 0);
    let (file, running) = (&fixture.file, AtomicU64::new(3));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let indices = (0..PASSES).flat_map(|_| 0..PAGES);
                let has_failed = indices.map(|index| file.pfn(index)).any(|pfn| pfn.is_err());
                running.fetch_sub(1, Ordering::Relaxed);
                assert!(!has_failed);
            });
        }
        for round in (0..).take_while(|_| running.load(Ordering::Relaxed) > 0) {
            file.fallocate(PUNCH, pages(round % PAGES) as i64, pages(1 + round % 3) as i64).unwrap();
        }
    });
    let live = &fixture.host.0.lock().unwrap().live;
    assert_eq!(live.len() as u64, file.present_pages());
    live.iter().for_each(|(index, pfn)| assert_eq!(file.pfn(*index), Ok(*pfn)));
}
