//! The commands answer as the kernel's do, check after check, and frames end up whose they should be.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::firmware::{Firmware, FirmwareError, Operation, PageType, SECRETS, page_of};
use super::launch::{Call, Command, IdBlock, Init2, LaunchFinish, LaunchStart, LaunchUpdate, Snp};
use super::measurement::LaunchDigest;
use super::rmp::{Refusal, Rmp, RmpHost, RmpUpdate};
use crate::confidential::User;
use crate::confidential::testing::{self, BASE, Fake, PAGES, Setup};
use crate::errno::{Errno, Result};
use crate::host::HostMemory;
use crate::host::simulated::Protection;
use crate::personality::Version;
use crate::units::{Gfn, PAGE_SIZE, Pfn};

const POLICY: u64 = 3 << 16;
/// The bits that the firmware allows of a CPUID page.
const CPUID: u64 = 0xff;
const REFUSED: FirmwareError = FirmwareError::POLICY_FAILURE;

struct Guest {
    firmware: Arc<Firmware>,
    snp: Arc<Snp>,
    vm: Fake,
    is_dead: Arc<AtomicBool>,
}

impl Guest {
    fn of_version(version: Version) -> Self {
        let host = testing::host();
        let rmp = Arc::<Rmp>::default();
        let firmware = Firmware::new(host.clone(), rmp, 1, CPUID);
        let is_dead = Arc::new(AtomicBool::new(false));
        let dead = Arc::clone(&is_dead);
        let snp = Snp::new(firmware.clone(), move || dead.store(true, Ordering::Relaxed));
        let setup = Setup { version: Some(version), ..Setup::default() };
        let vm = Fake::new(host, Arc::new(Mutex::new(setup)), None);
        Guest { firmware, snp, vm, is_dead }
    }

    /// With KVM_SEV_INIT2 and LAUNCH_START.
    fn launching() -> Self {
        Guest::launching_of_version(testing::NEWEST)
    }

    fn launching_of_version(version: Version) -> Self {
        let guest = Guest::of_version(version);
        guest.command(Call::Init2(User::new(Init2::default()))).unwrap();
        guest.start(POLICY).unwrap();
        guest
    }

    fn command(&self, call: Call) -> Result<()> {
        self.issue(call.command()).0
    }

    fn issue(&self, command: Command) -> (Result<()>, Command) {
        let mut command = User::new(command);
        let answer = self.snp.command(&self.vm, Some(&mut command));
        (answer, command.content)
    }

    fn start(&self, policy: u64) -> Result<()> {
        self.command(Call::LaunchStart(User::new(LaunchStart { policy, flags: 0 })))
    }

    /// LAUNCH_UPDATE: what it leaves of the range, what it answers, and what the firmware said.
    fn update(&self, update: LaunchUpdate) -> (LaunchUpdate, Result<()>, FirmwareError) {
        let (answer, command) = self.issue(Call::LaunchUpdate(User::new(update)).command());
        let Call::LaunchUpdate(left) = command.call else { unreachable!() };
        (left.content, answer, FirmwareError(command.error))
    }

    fn finish(&self, finish: LaunchFinish) -> (Result<()>, FirmwareError) {
        let (answer, command) = self.issue(Call::LaunchFinish(User::new(finish)).command());
        (answer, FirmwareError(command.error))
    }

    /// Pages of the slot, copied from the same pages of the VMM's memory.
    fn range(&self, first: u64, pages: u64, kind: PageType) -> LaunchUpdate {
        let uaddr = if kind == PageType::Zero { 0 } else { self.vm.source(first) };
        LaunchUpdate {
            gfn_start: page(first).0,
            uaddr,
            len: pages * PAGE_SIZE,
            page_type: kind as u8,
            flags: 0,
        }
    }

    fn rmp(&self) -> &Rmp {
        self.firmware.rmp()
    }

    fn asid(&self) -> u32 {
        self.snp.asid().unwrap()
    }

    fn word(&self, nth: u64) -> u64 {
        self.vm.host.load(self.vm.frame(nth))
    }
}

fn page(nth: u64) -> Gfn {
    BASE.plus(nth)
}

#[test]
fn init2_and_launch_start_check_in_the_kernels_order() {
    let guest = Guest::of_version(testing::NEWEST);
    assert_eq!(guest.snp.command(&guest.vm, None), Ok(()), "so it is asked whether there is SEV");
    let mut unreadable = User::nowhere(Call::Other(7).command());
    assert_eq!(guest.snp.command(&guest.vm, Some(&mut unreadable)), Err(Errno::EFAULT));
    assert_eq!(guest.command(Call::Other(104)), Err(Errno::EINVAL));
    assert_eq!(guest.command(Call::Older(0)), Err(Errno::EINVAL));
    assert_eq!(guest.command(Call::Older(2)), Err(Errno::ENOTTY));
    assert_eq!(guest.command(Call::Older(21)), Err(Errno::ENOTTY));
    for nothing in [10, 14, 19, 23, 99] {
        assert_eq!(guest.command(Call::Older(nothing)), Err(Errno::EINVAL), "{nothing}");
    }
    assert_eq!(guest.start(POLICY), Err(Errno::ENOTTY), "it is no SNP guest yet");
    assert_eq!(guest.update(guest.range(0, 1, PageType::Normal)).1, Err(Errno::EINVAL));
    assert_eq!(guest.finish(LaunchFinish::default()).0, Err(Errno::ENOTTY));

    let init = |init| guest.command(Call::Init2(User::new(init)));
    assert_eq!(guest.command(Call::Init2(User::nowhere(Init2::default()))), Err(Errno::EFAULT));
    assert_eq!(init(Init2 { flags: 1, ..Init2::default() }), Err(Errno::EINVAL));
    assert_eq!(init(Init2 { vmsa_features: 1, ..Init2::default() }), Err(Errno::EINVAL));
    assert_eq!(init(Init2 { ghcb_version: 1, ..Init2::default() }), Err(Errno::EINVAL));
    assert_eq!(init(Init2 { ghcb_version: 3, ..Init2::default() }), Err(Errno::EINVAL));
    guest.vm.setup().vcpus = 1;
    assert_eq!(init(Init2::default()), Err(Errno::EINVAL));
    guest.vm.setup().vcpus = 0;
    assert_eq!(init(Init2 { ghcb_version: 2, ..Init2::default() }), Ok(()));
    assert_eq!(init(Init2::default()), Err(Errno::EPERM));
    assert_eq!(guest.command(Call::Older(2)), Err(Errno::EPERM));
    assert_eq!(guest.command(Call::Older(99)), Err(Errno::EPERM));
    assert_eq!(guest.command(Call::Other(104)), Err(Errno::EINVAL));

    assert_eq!(guest.update(guest.range(0, 1, PageType::Normal)).1, Err(Errno::EINVAL));
    assert_eq!(guest.finish(LaunchFinish::default()).0, Err(Errno::EINVAL));
    assert_eq!(guest.command(Call::LaunchStart(User::nowhere(LaunchStart::default()))), Err(Errno::EFAULT));
    let flags = Call::LaunchStart(User::new(LaunchStart { flags: 1, ..LaunchStart::default() }));
    assert_eq!(guest.command(flags), Err(Errno::EINVAL));
    assert_eq!(guest.start(POLICY | 1 << 63), Err(Errno::EINVAL));
    assert_eq!(guest.start(1 << 16), Err(Errno::EINVAL));
    assert_eq!(guest.start(1 << 17), Ok(()));
    assert_eq!(guest.start(POLICY), Err(Errno::EINVAL), "one context is enough");

    let older = Guest::of_version(Version(6, 12));
    let first = Init2 { ghcb_version: 1, ..Init2::default() };
    assert_eq!(older.command(Call::Init2(User::new(first))), Ok(()));
    assert_eq!(older.start(1 << 17), Err(Errno::EINVAL));
    assert_eq!(older.start(POLICY | 1 << 20), Err(Errno::EINVAL));
    assert_eq!(older.start(POLICY), Ok(()));
}

#[test]
fn numbers_of_guests_run_out() {
    let guest = Guest::launching();
    let other = Snp::new(guest.firmware.clone(), || ());
    let mut init = User::new(Call::Init2(User::new(Init2::default())).command());
    assert_eq!(other.command(&guest.vm, Some(&mut init)), Err(Errno::EBUSY));
    let Guest { snp, vm, .. } = guest;
    drop(snp);
    assert_eq!(other.command(&vm, Some(&mut init)), Ok(()), "one has gone");
}

#[test]
fn what_the_firmware_refuses_at_launch_start_leaves_no_context() {
    for (operation, error) in [
        (Operation::GctxCreate, Errno::ENOTTY),
        (Operation::LaunchStart, Errno::EIO),
        (Operation::Activate, Errno::EIO),
    ] {
        let guest = Guest::of_version(testing::NEWEST);
        guest.command(Call::Init2(User::new(Init2::default()))).unwrap();
        guest.firmware.failures().fail(operation, 1, REFUSED);
        let start = || guest.issue(Call::LaunchStart(User::new(LaunchStart::default())).command());
        let (answer, command) = start();
        assert_eq!((answer, FirmwareError(command.error)), (Err(error), REFUSED), "{operation:?}");
        assert_eq!(start().0, Ok(()));
    }
    let guest = Guest::of_version(testing::NEWEST);
    guest.command(Call::Init2(User::new(Init2::default()))).unwrap();
    let start = Call::LaunchStart(User::new(LaunchStart::default()));
    let (answer, _) = guest.issue(Command { is_firmware_fd: false, ..start.command() });
    assert_eq!(answer, Err(Errno::ENOTTY), "whatever it is that the context cannot be made for");
}

#[test]
fn launch_update_checks_in_the_kernels_order() {
    let guest = Guest::launching();
    let good = guest.range(0, 2, PageType::Normal);
    assert_eq!(guest.command(Call::LaunchUpdate(User::nowhere(good))), Err(Errno::EFAULT));
    let bad = [
        LaunchUpdate { len: 0, ..good },
        LaunchUpdate { len: 8, ..good },
        LaunchUpdate { flags: 1, ..good },
        LaunchUpdate { page_type: 2, ..good },
        LaunchUpdate { page_type: 0, ..good },
        LaunchUpdate { page_type: 7, ..good },
        LaunchUpdate { uaddr: 0, ..good },
        LaunchUpdate { uaddr: good.uaddr + 8, ..good },
        LaunchUpdate { gfn_start: 0, ..good },
    ];
    for update in bad {
        let nothing = FirmwareError(0);
        assert_eq!(guest.update(update), (update, Err(Errno::EINVAL), nothing), "{update:x?}");
    }
    assert_eq!(guest.rmp().frames_of(guest.asid()), 0);
    assert_eq!(guest.update(good).1, Ok(()));
}

#[test]
fn an_older_kernel_takes_odd_ranges() {
    let guest = Guest::launching_of_version(Version(6, 12));
    let good = guest.range(0, 2, PageType::Normal);
    let nothing = LaunchUpdate { len: 0, ..good };
    assert_eq!(guest.update(nothing), (nothing, Ok(()), FirmwareError(0)));
    guest.vm.host.write(guest.vm.memory.plus_pages(1), 42).unwrap();
    assert_eq!(guest.update(LaunchUpdate { uaddr: good.uaddr + PAGE_SIZE - 4, ..good }).1, Ok(()));
    assert_eq!(guest.word(0), 42 << 32, "the end of one page and the beginning of the next");
    assert_eq!(guest.update(LaunchUpdate { uaddr: 0, gfn_start: page(4).0, ..good }).1, Err(Errno::EIO));
}

#[test]
fn each_kind_of_page_is_filled_and_measured_in_its_way() {
    let guest = Guest::launching();
    let mut expected = LaunchDigest::default();
    for (nth, kind, word) in [
        (2, PageType::Normal, 3),
        (3, PageType::Zero, 0),
        (4, PageType::Unmeasured, 5),
        (5, PageType::Secrets, SECRETS),
        (6, PageType::Cpuid, 7),
        (0, PageType::Normal, 1),
    ] {
        guest.vm.host.store(guest.vm.frame(nth), 123);
        let update = guest.range(nth, 1, kind);
        let uaddr = if kind == PageType::Zero { 0 } else { update.uaddr + PAGE_SIZE };
        let left = LaunchUpdate { gfn_start: page(nth + 1).0, uaddr, len: 0, ..update };
        assert_eq!(guest.update(update), (left, Ok(()), FirmwareError(0)), "{kind:?}");
        assert_eq!(guest.word(nth), word, "{kind:?}");
        expected.add_page(kind, page(nth).gpa(), &page_of(word));
        assert_eq!(guest.rmp().check_guest(guest.vm.frame(nth), page(nth), guest.asid()), Ok(()));
    }
    assert_eq!(guest.snp.digest(), Some(expected.0));
    assert_eq!(guest.rmp().frames_of(guest.asid()), 6);
}

/// Whatever stops it is told only if nothing was done; otherwise only the range says it.
#[test]
fn what_was_added_before_an_error_stays_and_is_taken_off_the_range() {
    let stopped_by = |stop: fn(&Guest)| {
        let guest = Guest::launching();
        stop(&guest);
        let whole = guest.range(0, 5, PageType::Normal);
        let left = guest.range(3, 2, PageType::Normal);
        assert_eq!(guest.update(whole), (left, Ok(()), FirmwareError(0)));
        assert_eq!(guest.rmp().frames_of(guest.asid()), 3);
        guest
    };
    let again = |guest: &Guest| guest.update(guest.range(3, 2, PageType::Normal));
    let nothing_said = FirmwareError(0);
    let guest = stopped_by(|guest| guest.vm.setup().shared.extend([page(3)]));
    assert_eq!(again(&guest), (guest.range(3, 2, PageType::Normal), Err(Errno::EIO), nothing_said));
    guest.vm.setup().shared.clear();
    assert_eq!(again(&guest).1, Ok(()));
    let guest = stopped_by(|guest| guest.vm.setup().signal_after = Some(3));
    assert_eq!(again(&guest).1, Err(Errno::EIO));
    let guest = stopped_by(|guest| guest.vm.host.unmap(guest.vm.memory.plus_pages(3), PAGE_SIZE).unwrap());
    assert_eq!(again(&guest).1, Err(Errno::EIO));
    let guest =
        stopped_by(|guest| guest.firmware.failures().fail_times(Operation::LaunchUpdate, 4, 2, REFUSED));
    assert_eq!(again(&guest), (guest.range(3, 2, PageType::Normal), Err(Errno::EIO), REFUSED));
    assert_eq!(again(&guest).1, Ok(()));
    stopped_by(|guest| guest.rmp().failures().fail(RmpUpdate, 4, ()));

    let guest = Guest::launching();
    let (left, answer, _) = guest.update(guest.range(PAGES - 1, 3, PageType::Zero));
    assert_eq!((left, answer), (guest.range(PAGES, 2, PageType::Zero), Ok(())), "it ends with the slot");
    assert_eq!(guest.update(left).1, Err(Errno::EINVAL));
    guest.vm.setup().is_closed = true;
    assert_eq!(guest.update(guest.range(0, 1, PageType::Zero)).1, Err(Errno::EIO));
}

#[test]
fn a_page_is_added_once() {
    let guest = Guest::launching();
    assert_eq!(guest.update(guest.range(0, 2, PageType::Normal)).1, Ok(()));
    assert_eq!(guest.update(guest.range(1, 1, PageType::Normal)).1, Err(Errno::EIO));
    assert_eq!(guest.word(1), 2, "it is as it was added");
    assert_eq!(guest.rmp().check_guest(guest.vm.frame(1), page(1), guest.asid()), Ok(()));
}

#[test]
fn a_page_that_the_firmware_refuses_is_the_hosts_again_as_it_was() {
    let guest = Guest::launching();
    guest.vm.host.store(guest.vm.frame(0), 77);
    guest.firmware.failures().fail(Operation::LaunchUpdate, 1, REFUSED);
    assert_eq!(guest.update(guest.range(0, 1, PageType::Normal)).1, Err(Errno::EIO));
    assert!(guest.rmp().is_hosts(guest.vm.frame(0)));
    assert_eq!(guest.word(0), 77);
    assert!(!guest.is_dead.load(Ordering::Relaxed));

    guest.firmware.failures().fail(Operation::LaunchUpdate, 1, REFUSED);
    guest.firmware.failures().fail(Operation::PageReclaim, 1, REFUSED);
    assert_eq!(guest.update(guest.range(0, 1, PageType::Normal)).1, Err(Errno::EIO));
    assert!(guest.is_dead.load(Ordering::Relaxed), "a frame that the firmware keeps is lost");
    assert!(!guest.rmp().is_hosts(guest.vm.frame(0)));
}

#[test]
fn a_cpuid_page_that_is_wrong_is_corrected_in_the_vmms_memory() {
    for version in [testing::NEWEST, Version(6, 12)] {
        let guest = Guest::launching_of_version(version);
        let source = guest.vm.memory.plus_pages(1);
        guest.vm.host.write(source, 0xf0f).unwrap();
        let update = guest.range(1, 1, PageType::Cpuid);
        assert_eq!(guest.update(update), (update, Err(Errno::EIO), FirmwareError::INVALID_PARAM));
        assert_eq!(guest.vm.host.read(source), Ok(0x0f));
        assert!(guest.rmp().is_hosts(guest.vm.frame(1)));
        assert_eq!(guest.update(update).1, Ok(()), "the same page again");
        assert_eq!(guest.word(1), 0x0f);
    }
}

#[test]
fn a_cpuid_page_that_cannot_be_corrected_is_not_even_taken_by_newer_kernels() {
    let added = |version, word| {
        let guest = Guest::launching_of_version(version);
        let source = guest.vm.memory.plus_pages(1);
        guest.vm.host.write(source, word).unwrap();
        guest.vm.host.protect(source, PAGE_SIZE, Protection::READ).unwrap();
        let (_, answer, said) = guest.update(guest.range(1, 1, PageType::Cpuid));
        assert_eq!(guest.vm.host.read(source), Ok(word));
        (answer, said)
    };
    assert_eq!(added(testing::NEWEST, 1), (Err(Errno::EIO), FirmwareError(0)));
    assert_eq!(added(Version(6, 12), 1), (Ok(()), FirmwareError(0)));
    assert_eq!(added(Version(6, 12), 0xf0f), (Err(Errno::EIO), FirmwareError::INVALID_PARAM));
}

#[test]
fn launch_finish_measures_vcpus_and_checks_what_the_owner_signed() {
    let guest = Guest::launching();
    guest.vm.setup().vcpus = 2;
    guest.update(guest.range(0, 1, PageType::Normal)).1.unwrap();
    let finish = |id_block| guest.finish(LaunchFinish { id_block, flags: 0 });
    assert_eq!(guest.finish(LaunchFinish { flags: 1, ..LaunchFinish::default() }).0, Err(Errno::EINVAL));
    guest.vm.setup().is_killed = true;
    assert_eq!(finish(None).0, Err(Errno::EINTR));
    guest.vm.setup().is_killed = false;
    let mut expected = LaunchDigest::default();
    expected.add_page(PageType::Normal, page(0).gpa(), &page_of(1));
    expected.add_vcpu();
    expected.add_vcpu();
    let signed = |digest| IdBlock { digest: Some(User::new(digest)), signature: Some(User::new(())) };
    let before = expected.0;
    assert_eq!(finish(Some(signed(before))), (Ok(()), FirmwareError(0)));
    assert!(guest.snp.is_pre_fault_allowed());
    assert_eq!(finish(None), (Err(Errno::EINVAL), FirmwareError(0)), "no vCPU can be measured again");
    let late = guest.update(guest.range(1, 1, PageType::Normal));
    assert_eq!((late.1, late.2), (Err(Errno::EIO), FirmwareError::INVALID_GUEST_STATE));
    assert!(guest.rmp().is_hosts(guest.vm.frame(1)));
}

/// vCPUs are measured before anything is looked at, and once only (`sev_es_sync_vmsa`).
#[test]
fn a_launch_that_failed_with_its_vcpus_measured_cannot_be_finished() {
    let guest = Guest::launching();
    guest.vm.setup().vcpus = 2;
    let finish = |id_block| guest.finish(LaunchFinish { id_block, flags: 0 });
    guest.firmware.failures().fail(Operation::LaunchUpdate, 1, REFUSED);
    assert_eq!(finish(None), (Err(Errno::EIO), REFUSED));
    assert!(!guest.snp.has_measured(0));
    let wrong = IdBlock { digest: Some(User::new([1; 48])), signature: Some(User::new(())) };
    assert_eq!(
        finish(Some(wrong)),
        (Err(Errno::EIO), FirmwareError::BAD_MEASUREMENT),
        "the first is tried again"
    );
    assert!(guest.snp.has_measured(1) && !guest.snp.has_measured(2));
    let digest = guest.snp.digest();
    assert_eq!(finish(None), (Err(Errno::EINVAL), FirmwareError(0)));
    assert_eq!(guest.snp.digest(), digest);
    assert!(!guest.snp.is_pre_fault_allowed());

    let guest = Guest::launching();
    let finish = || guest.finish(LaunchFinish::default());
    assert_eq!(finish(), (Ok(()), FirmwareError(0)));
    assert_eq!(
        finish(),
        (Err(Errno::EIO), FirmwareError::INVALID_GUEST_STATE),
        "without vCPUs the firmware says it"
    );
}

#[test]
fn what_the_owner_signed_must_be_readable() {
    let guest = Guest::launching();
    let id_block = Some(IdBlock { digest: Some(User::nowhere([0; 48])), signature: Some(User::new(())) });
    assert_eq!(guest.finish(LaunchFinish { id_block, flags: 0 }).0, Err(Errno::EFAULT));
    let id_block = Some(IdBlock { digest: Some(User::new([0; 48])), signature: Some(User::nowhere(())) });
    assert_eq!(guest.finish(LaunchFinish { id_block, flags: 0 }).0, Err(Errno::EFAULT));
}

#[test]
fn after_the_launch_frames_are_given_to_the_guest_who_validates_them() {
    let guest = Guest::launching();
    guest.update(guest.range(0, 1, PageType::Normal)).1.unwrap();
    guest.finish(LaunchFinish::default()).0.unwrap();
    let (pfn, gfn, asid) = (guest.vm.frame(1), page(1), guest.asid());
    let rmp = guest.rmp();
    assert_eq!(rmp.check_guest(pfn, gfn, asid), Err(Refusal::NotTheGuests));
    guest.rmp().failures().fail(RmpUpdate, 1, ());
    assert_eq!(guest.snp.make_private(gfn, pfn), Err(Errno::EINVAL));
    assert_eq!(guest.snp.make_private(gfn, pfn), Ok(()));
    assert_eq!(rmp.check_guest(pfn, gfn, asid), Err(Refusal::NotValidated));
    assert_eq!(rmp.validate(pfn, gfn.plus(1), asid, true), Err(Refusal::NotTheGuests));
    assert_eq!(rmp.validate(pfn, gfn, asid, true), Ok(true));
    assert_eq!(rmp.validate(pfn, gfn, asid, true), Ok(false));
    assert_eq!(rmp.check_guest(pfn, gfn, asid), Ok(()));
    assert_eq!(rmp.check_guest(pfn, gfn, asid + 1), Err(Refusal::NotTheGuests));
    assert_eq!(rmp.check_guest(pfn, gfn.plus(1), asid), Err(Refusal::NotTheGuests));
    // What is the guest's already is left alone.
    guest.rmp().failures().fail(RmpUpdate, 1, ());
    assert_eq!(guest.snp.make_private(gfn, pfn), Ok(()));
    assert_eq!(rmp.check_guest(pfn, gfn, asid), Ok(()));
}

#[test]
fn frames_leave_the_table_when_the_file_frees_them() {
    let rmp = Arc::<Rmp>::default();
    let host = RmpHost::new(testing::host(), rmp.clone());
    let frames = host.new_file(4).unwrap();
    let used: Vec<Pfn> = (0..4).map(|index| frames.allocate(index).unwrap()).collect();
    for pfn in &used {
        rmp.make_private(*pfn, Gfn(pfn.0), 1, false).unwrap();
    }
    frames.release(2);
    assert!(rmp.is_hosts(used[2]));
    assert_eq!(rmp.frames_of(1), 3);
    drop(frames);
    assert_eq!(rmp.frames_of(1), 0);
}

#[test]
fn the_host_cannot_take_what_the_firmware_has() {
    let rmp = Rmp::default();
    rmp.make_private(Pfn(1), Gfn(1), 1, true).unwrap();
    assert_eq!(rmp.make_shared(Pfn(1)), Err(Errno::EFAULT));
    assert_eq!(rmp.make_private(Pfn(1), Gfn(2), 1, false), Err(Errno::EFAULT));
    assert_eq!(rmp.validate(Pfn(1), Gfn(1), 1, true), Err(Refusal::NotTheGuests));
    rmp.make_private(Pfn(2), Gfn(2), 1, false).unwrap();
    assert_eq!(rmp.make_shared(Pfn(2)), Ok(()));
}
