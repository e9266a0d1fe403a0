//! The commands answer as the kernel's do, check after check; and the mirror and the secure EPT stay equal whatever fails.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::launch::{ATTRIBUTE_SEPT_VE_DISABLE, MEASURE_MEMORY_REGION};
use super::measurement::{CHUNK, Measurement};
use super::module::{Life, Module, Seamcall};
use super::status::Status;
use super::{
    Access, Call, Capabilities, Command, CpuidEntry, CpuidList, InitMemRegion, InitVm, SecureEpt, Tdx,
    TdxVcpu,
};
use crate::confidential::User;
use crate::confidential::testing::{self, BASE, Fake, PAGES, Setup};
use crate::errno::{Errno, Result};
use crate::host::HostMemory;
use crate::mmu::invariants::{self, Dump};
use crate::mmu::{MapResult, RootFilter};
use crate::units::{Gfn, GfnRange, PAGE_SIZE};

const FATAL: Status = Status::PAGE_METADATA_INCORRECT;
const BUSY: Status = Status::OPERAND_BUSY;

struct Guest {
    module: Arc<Module>,
    tdx: Arc<Tdx>,
    vm: Fake,
    is_dead: Arc<AtomicBool>,
}

impl Guest {
    fn new() -> Self {
        let host = testing::host();
        let module = Module::new(host.clone(), 1);
        let setup = Arc::new(Mutex::new(Setup::default()));
        let is_dead = Arc::new(AtomicBool::new(false));
        let dead = (Arc::clone(&is_dead), Arc::clone(&setup));
        let tdx = Tdx::new(module.clone(), move || {
            dead.0.store(true, Ordering::Relaxed);
            dead.1.lock().unwrap().is_dead = true;
        });
        let vm = Fake::new(host, setup, Some(SecureEpt::new(tdx.clone())));
        Guest { module, tdx, vm, is_dead }
    }

    /// With KVM_TDX_INIT_VM, and a vCPU with KVM_TDX_INIT_VCPU.
    fn with_vcpu() -> (Self, Arc<TdxVcpu>) {
        let guest = Guest::new();
        guest.init_vm(InitVm::default()).unwrap();
        let vcpu = guest.tdx.create_vcpu().unwrap();
        guest.vcpu_command(&vcpu, Call::InitVcpu.command(0)).unwrap();
        (guest, vcpu)
    }

    /// With an image of `pages` pages that is measured and finalized.
    fn runnable(pages: u64) -> (Self, Arc<TdxVcpu>) {
        let (guest, vcpu) = Guest::with_vcpu();
        guest.add(&vcpu, guest.region(0, pages), MEASURE_MEMORY_REGION).1.unwrap();
        guest.finalize().unwrap();
        (guest, vcpu)
    }

    fn init_vm(&self, parameters: InitVm) -> Result<()> {
        self.vm_command(Call::InitVm(User::new(parameters)).command(0)).0
    }

    fn finalize(&self) -> Result<()> {
        self.vm_command(Call::FinalizeVm.command(0)).0
    }

    fn vm_command(&self, command: Command) -> (Result<()>, u64) {
        let mut command = User::new(command);
        let answer = self.tdx.vm_command(&self.vm, &mut command);
        (answer, command.content.hw_error)
    }

    fn vcpu_command(&self, vcpu: &TdxVcpu, command: Command) -> Result<()> {
        self.tdx.vcpu_command(&self.vm, vcpu, &mut User::new(command))
    }

    /// KVM_TDX_INIT_MEM_REGION: what it leaves of the region, and what it answers.
    fn add(&self, vcpu: &TdxVcpu, region: InitMemRegion, flags: u32) -> (InitMemRegion, Result<()>) {
        let mut command = User::new(Call::InitMemRegion(User::new(region)).command(flags));
        let answer = self.tdx.vcpu_command(&self.vm, vcpu, &mut command);
        let Call::InitMemRegion(left) = command.content.call else { unreachable!() };
        (left.content, answer)
    }

    /// Pages of the slot, copied from the same pages of the VMM's memory.
    fn region(&self, first: u64, nr_pages: u64) -> InitMemRegion {
        InitMemRegion { source_addr: self.vm.source(first), gpa: BASE.plus(first).gpa(), nr_pages }
    }

    fn zap(&self, range: GfnRange) -> bool {
        self.vm.mmu.lock_exclusive().zap_leafs(RootFilter::mirror(0), range)
    }

    fn is_dead(&self) -> bool {
        self.is_dead.load(Ordering::Relaxed)
    }

    fn check(&self) {
        invariants::check(&self.vm.mmu).unwrap();
    }

    /// Ends it as a virtual machine ends.
    fn tear_down(&self) -> std::result::Result<(), Status> {
        self.zap(GfnRange::ALL);
        self.tdx.release_key();
        self.vm.mmu.destroy();
        self.tdx.destroy()
    }
}

fn page(nth: u64) -> Gfn {
    BASE.plus(nth)
}

#[test]
fn init_vm_checks_in_the_kernels_order() {
    let guest = Guest::new();
    let good = InitVm::default();
    let init = |command: Command| guest.vm_command(command).0;
    let bad = |change: fn(&mut InitVm)| {
        let mut parameters = InitVm::default();
        change(&mut parameters);
        guest.init_vm(parameters)
    };
    let mut unreadable = User::nowhere(Call::FinalizeVm.command(0));
    assert_eq!(guest.tdx.vm_command(&guest.vm, &mut unreadable), Err(Errno::EFAULT));
    guest.vm.setup().is_killed = true;
    assert_eq!(init(Command { hw_error: 1, ..Call::FinalizeVm.command(0) }), Err(Errno::EINVAL));
    assert_eq!(guest.init_vm(good.clone()), Err(Errno::EINTR));
    guest.vm.setup().is_killed = false;
    assert_eq!(init(Call::Other(9).command(0)), Err(Errno::EINVAL));
    assert_eq!(init(Call::InitVm(User::nowhere(good.clone())).command(1)), Err(Errno::EINVAL));
    assert_eq!(init(Call::InitVm(User::nowhere(good.clone())).command(0)), Err(Errno::EFAULT));
    assert_eq!(
        bad(|init| (init.cpuid, init.is_reserved_zero) = (vec![CpuidEntry::default(); 257], false)),
        Err(Errno::E2BIG),
        "the entries are counted before anything is looked at"
    );
    guest.vm.setup().vcpus = 1;
    assert_eq!(bad(|init| init.is_reserved_zero = false), Err(Errno::EINVAL));
    assert_eq!(bad(|init| init.attributes = 1), Err(Errno::EBUSY));
    guest.vm.setup().vcpus = 0;
    assert_eq!(bad(|init| init.attributes |= 1), Err(Errno::EINVAL));
    assert_eq!(bad(|init| init.xfam |= 1 << 9), Err(Errno::EINVAL));
    assert_eq!(bad(|init| init.cpuid.clear()), Err(Errno::EINVAL));
    assert_eq!(bad(|init| init.cpuid = vec![CpuidEntry::of_address_width(46)]), Err(Errno::EINVAL));
    let wide = |init: &mut InitVm| init.cpuid = vec![CpuidEntry::of_address_width(52)];
    assert_eq!(bad(wide), Err(Errno::EINVAL), "no five levels here");
    assert_eq!(guest.tdx.shared_bit(), None);
    assert_eq!(guest.tdx.create_vcpu().err(), Some(Errno::EIO));
    assert_eq!(guest.init_vm(good.clone()), Ok(()));
    assert_eq!(guest.tdx.shared_bit().map(Gfn::gpa), Some(1 << 47));
    assert_eq!(guest.init_vm(good), Err(Errno::EINVAL));
    assert!(!guest.is_dead());
}

/// A leaf of CPUID with one register set.
fn leaf(function: u32, index: u32, register: usize, value: u32) -> CpuidEntry {
    let mut registers = [0; 4];
    registers[register] = value;
    CpuidEntry { function, index, is_of_index: index != 0, registers }
}

#[test]
fn what_can_be_chosen_is_told_at_any_time() {
    let (guest, _) = Guest::runnable(1);
    // No lock is taken.
    guest.vm.setup().is_killed = true;
    let ask = |flags, told: User<Capabilities>| {
        let mut command = User::new(Call::Capabilities(told).command(flags));
        let answer = guest.tdx.vm_command(&guest.vm, &mut command);
        let Call::Capabilities(told) = command.content.call else { unreachable!() };
        (answer, told.content)
    };
    let room = |room| User::new(Capabilities { room, ..Capabilities::default() });
    assert_eq!(ask(1, User::nowhere(Capabilities::default())).0, Err(Errno::EINVAL));
    assert_eq!(ask(0, User::nowhere(Capabilities::default())).0, Err(Errno::EFAULT));
    assert_eq!(ask(0, room(8)), (Err(Errno::E2BIG), room(8).content));
    let (answer, told) = ask(0, room(100));
    assert_eq!((answer, told.room, told.cpuid.len()), (Ok(()), 9, 9));
    assert_eq!((told.attributes, told.xfam), (ATTRIBUTE_SEPT_VE_DISABLE, 7));
    let of = |function| told.cpuid.iter().find(|entry| entry.function == function).unwrap().registers;
    assert_eq!(of(0x8000_0008), [0xff << 16, 1 << 9, 0, 0], "the width of addresses is KVM's to offer");
    assert_eq!(of(7), [0, 1 << 3 | 1 << 8, 0, 0], "TSX and WAITPKG are taken back");
    assert!(told.cpuid.iter().all(|entry| !entry.is_of_index));
}

#[test]
fn init_vm_takes_of_cpuid_what_it_has_told_to_be_chosen() {
    let with = |entries: &[CpuidEntry]| {
        let guest = Guest::new();
        let cpuid = [&[CpuidEntry::of_address_width(48)], entries].concat();
        let command = Call::InitVm(User::new(InitVm { cpuid, ..InitVm::default() })).command(0);
        let answer = guest.vm_command(command);
        assert!(!guest.is_dead());
        (guest, answer)
    };
    let refused = (Err(Errno::EINVAL), 0);
    assert_eq!(with(&[leaf(2, 0, 0, 0)]).1, refused, "that leaf cannot be chosen");
    assert_eq!(with(&[leaf(4, 4, 0, 1)]).1, refused, "nor that subleaf");
    assert_eq!(with(&[leaf(1, 0, 0, 1), leaf(1, 0, 0, 1)]).1, refused, "each once");
    assert_eq!(with(&[leaf(7, 0, 1, 1 << 11)]).1, refused, "TSX");
    assert_eq!(with(&[leaf(7, 0, 2, 1 << 5)]).1, refused, "WAITPKG");
    let invalid = Status::OPERAND_INVALID.of(super::status::Operand::CpuidConfig);
    let (guest, answer) = with(&[leaf(7, 0, 1, 1 << 2)]);
    assert_eq!(answer, (Err(Errno::EINVAL), invalid.0), "the module says what KVM does not look at");
    assert!(guest.module.take_key(), "the key was given back");
    let (guest, answer) = with(&[leaf(1, 0, 0, 0x806f8), leaf(7, 0, 1, 1 << 3), leaf(4, 3, 1, 5)]);
    assert_eq!(answer, (Ok(()), 0));
    let answered = |function, index| guest.tdx.td().unwrap().mng_rd_cpuid(function, index).unwrap();
    assert_eq!(answered(1, None)[0], 0x806f8);
    assert_eq!(answered(4, Some(3)), [0, 5, 0, 0]);
    // What applies to every subleaf is taken for each.
    assert_eq!(with(&[leaf(4, 0, 0, 1)]).1, refused);
}

#[test]
fn the_guests_cpuid_is_told_while_it_is_made() {
    let guest = Guest::new();
    let vcpu = TdxVcpu::default();
    let ask = |flags, list: User<CpuidList>| {
        let mut command = User::new(Call::GetCpuid(list).command(flags));
        let answer = guest.tdx.vcpu_command(&guest.vm, &vcpu, &mut command);
        let Call::GetCpuid(list) = command.content.call else { unreachable!() };
        (answer, list.content)
    };
    let room = |room| User::new(CpuidList { room, entries: Vec::new() });
    assert_eq!(ask(0, room(256)).0, Err(Errno::EINVAL), "there is no key yet");
    guest.init_vm(InitVm { xfam: 7, ..InitVm::default() }).unwrap();
    // Before KVM_TDX_INIT_VCPU, and whatever the flags are.
    assert_eq!(ask(1, User::nowhere(CpuidList::default())).0, Err(Errno::EFAULT));
    assert_eq!(ask(1, room(14)), (Err(Errno::E2BIG), CpuidList { room: 15, entries: Vec::new() }));
    let (answer, CpuidList { room: told, entries }) = ask(1, room(15));
    assert_eq!((answer, told, entries.len()), (Ok(()), 15, 15));
    assert_eq!(entries[0].registers[0], 0x1f);
    assert_eq!(entries[14].registers[0] >> 16, 48, "{entries:x?}");
    let caches = |entry: &&CpuidEntry| entry.function == 4 && entry.is_of_index;
    assert_eq!(entries.iter().filter(caches).map(|entry| entry.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(guest.vm_command(Call::GetCpuid(room(256)).command(0)).0, Err(Errno::EINVAL), "of a vCPU");
    guest.vcpu_command(&vcpu, Call::InitVcpu.command(0)).unwrap();
    guest.finalize().unwrap();
    assert_eq!(ask(0, room(256)).0, Err(Errno::EINVAL), "it is finalized");
}

#[test]
fn what_the_module_refuses_at_init_vm_is_the_vmms_doing_or_a_bug() {
    let guest = Guest::new();
    let invalid = Status::OPERAND_INVALID.of(super::status::Operand::Rcx);
    let init = || guest.vm_command(Call::InitVm(User::new(InitVm::default())).command(0));
    guest.module.failures().fail(Seamcall::MngInit, 1, invalid);
    assert_eq!(init(), (Err(Errno::EINVAL), invalid.0));
    assert!(!guest.is_dead());
    // There is one key, and it was given back.
    assert!(guest.module.take_key());
    assert_eq!(init(), (Err(Errno::ENOSPC), 0));
    guest.module.give_key_back();
    guest.module.failures().fail(Seamcall::MngCreate, 1, Status::RND_NO_ENTROPY);
    assert_eq!(init(), (Err(Errno::EAGAIN), 0));
    assert!(!guest.is_dead() && guest.module.take_key());
    guest.module.give_key_back();
    // What is wrong with operands that are KVM's own is no fault of the VMM's.
    guest.module.failures().fail(Seamcall::MngCreate, 1, invalid);
    assert_eq!(init(), (Err(Errno::EIO), 0));
    assert!(guest.is_dead());
}

#[test]
fn init_vcpu_checks_in_the_kernels_order() {
    let guest = Guest::new();
    let vcpu = TdxVcpu::default();
    let init = |flags| guest.vcpu_command(&vcpu, Call::InitVcpu.command(flags));
    assert_eq!(init(0), Err(Errno::EINVAL), "there is no key yet");
    guest.init_vm(InitVm::default()).unwrap();
    assert_eq!(init(1), Err(Errno::EINVAL));
    guest.vm.setup().lacks_x2apic = true;
    assert_eq!(init(0), Err(Errno::EINVAL));
    guest.vm.setup().lacks_x2apic = false;
    assert_eq!(init(0), Ok(()));
    assert_eq!(init(0), Err(Errno::EINVAL), "once is enough");
    guest.module.failures().fail(Seamcall::VpInit, 1, FATAL);
    assert_eq!(guest.vcpu_command(&TdxVcpu::default(), Call::InitVcpu.command(0)), Err(Errno::EIO));
    assert!(guest.is_dead());
}

#[test]
fn init_mem_region_checks_in_the_kernels_order() {
    let (guest, vcpu) = Guest::with_vcpu();
    let good = guest.region(0, 2);
    let nowhere = Call::InitMemRegion(User::nowhere(good));
    assert_eq!(guest.add(&TdxVcpu::default(), good, 0).1, Err(Errno::EINVAL));
    assert_eq!(guest.vcpu_command(&vcpu, nowhere.clone().command(2)), Err(Errno::EINVAL));
    assert_eq!(guest.vcpu_command(&vcpu, nowhere.command(0)), Err(Errno::EFAULT));
    let shared = guest.tdx.shared_bit().unwrap().gpa();
    let bad = [
        InitMemRegion { source_addr: 0, ..good },
        InitMemRegion { source_addr: good.source_addr + 8, ..good },
        InitMemRegion { gpa: good.gpa + 8, ..good },
        InitMemRegion { nr_pages: 0, ..good },
        InitMemRegion { nr_pages: 1 << 52, ..good },
        InitMemRegion { gpa: 0u64.wrapping_sub(PAGE_SIZE), nr_pages: 2, ..good },
        InitMemRegion { gpa: shared | good.gpa, ..good },
        InitMemRegion { gpa: shared - PAGE_SIZE, nr_pages: 2, ..good },
    ];
    // Before anything is begun: a signal is not even looked for.
    guest.vm.setup().signal_after = Some(0);
    for region in bad {
        assert_eq!(guest.add(&vcpu, region, 0), (region, Err(Errno::EINVAL)), "{region:x?}");
    }
    guest.vm.setup().signal_after = None;
    assert_eq!(
        guest.add(&vcpu, InitMemRegion { gpa: 0, ..good }, 0).1,
        Err(Errno::EINVAL),
        "no slot is there"
    );
    assert_eq!(guest.vm.mmu.page_counts(), [0; 3]);
    guest.finalize().unwrap();
    assert_eq!(guest.add(&vcpu, good, 0).1, Err(Errno::EINVAL), "it is finalized");
    assert!(!guest.is_dead());
}

/// Whatever stops it, the region says how far it came, and the error is told all the same.
#[test]
fn what_was_added_before_an_error_stays_and_is_taken_off_the_region() {
    let stopped_by = |stop: fn(&Guest), error| {
        let (guest, vcpu) = Guest::with_vcpu();
        stop(&guest);
        assert_eq!(guest.add(&vcpu, guest.region(0, 5), 0), (guest.region(3, 2), Err(error)));
        assert_eq!(guest.vm.mmu.page_counts(), [3, 0, 0]);
        if !guest.is_dead() {
            guest.check();
        }
        (guest, vcpu)
    };
    let (guest, vcpu) = stopped_by(|guest| guest.vm.setup().shared.extend([page(3)]), Errno::EINVAL);
    guest.vm.setup().shared.clear();
    assert_eq!(guest.add(&vcpu, guest.region(3, 2), 0).1, Ok(()));
    // Two questions a page: of the command, and of populating.
    stopped_by(|guest| guest.vm.setup().signal_after = Some(6), Errno::EINTR);
    let unmap = |guest: &Guest| guest.vm.host.unmap(guest.vm.memory.plus_pages(3), PAGE_SIZE).unwrap();
    stopped_by(unmap, Errno::EFAULT);
    // Of memory that has failed nothing else is told.
    stopped_by(|guest| guest.vm.host.poison(guest.vm.memory.plus_pages(3)).unwrap(), Errno::EFAULT);
    let fail = |guest: &Guest| guest.module.failures().fail(Seamcall::MemPageAdd, 4, FATAL);
    assert!(stopped_by(fail, Errno::EIO).0.is_dead());

    let (guest, vcpu) = Guest::with_vcpu();
    assert_eq!(guest.add(&vcpu, guest.region(0, PAGES + 2), 0), (guest.region(PAGES, 2), Err(Errno::EINVAL)));
    guest.vm.setup().is_closed = true;
    assert_eq!(guest.add(&vcpu, guest.region(0, 1), 0).1, Err(Errno::EFAULT));
}

#[test]
fn a_region_that_cannot_be_written_back_was_added_all_the_same() {
    let (guest, vcpu) = Guest::with_vcpu();
    let command = Call::InitMemRegion(User::read_only(guest.region(0, 2))).command(0);
    assert_eq!(guest.vcpu_command(&vcpu, command), Err(Errno::EFAULT));
    assert_eq!(guest.vm.mmu.page_counts(), [2, 0, 0]);
}

#[test]
fn a_page_is_added_once() {
    let (guest, vcpu) = Guest::with_vcpu();
    assert_eq!(guest.add(&vcpu, guest.region(0, 2), 0).1, Ok(()));
    assert_eq!(guest.add(&vcpu, guest.region(1, 1), 0), (guest.region(1, 1), Err(Errno::EIO)));
    assert!(!guest.is_dead());
    // But a page that was removed meanwhile may be added again: it is another one.
    guest.zap(GfnRange::new(page(1), 1));
    assert_eq!(guest.add(&vcpu, guest.region(1, 1), 0).1, Ok(()));
    guest.check();
}

#[test]
fn the_image_is_copied_and_measured_in_order() {
    let (guest, vcpu) = Guest::with_vcpu();
    guest.add(&vcpu, guest.region(1, 2), MEASURE_MEMORY_REGION).1.unwrap();
    guest.add(&vcpu, guest.region(0, 1), 0).1.unwrap();
    let mut expected = Measurement::default();
    for nth in [1, 2] {
        expected.add_page(page(nth));
        for offset in (0..PAGE_SIZE).step_by(CHUNK as usize) {
            let mut chunk = [0; CHUNK as usize];
            chunk[0] = if offset == 0 { nth as u8 + 1 } else { 0 };
            expected.extend(page(nth).gpa() + offset, &chunk);
        }
    }
    expected.add_page(page(0));
    assert_eq!(guest.tdx.measurement(), Some(expected.value()));
    for nth in 0..3 {
        assert_eq!(guest.vm.host.load(guest.vm.frame(nth)), nth + 1);
    }
}

#[test]
fn what_cannot_be_measured_ends_the_virtual_machine() {
    let (guest, vcpu) = Guest::with_vcpu();
    guest.module.failures().fail(Seamcall::MrExtend, 17, FATAL);
    let answer = guest.add(&vcpu, guest.region(0, 3), MEASURE_MEMORY_REGION);
    assert_eq!(answer, (guest.region(1, 2), Err(Errno::EIO)));
    assert!(guest.is_dead());
    // It was mapped before it was to be measured.
    assert_eq!(guest.vm.mmu.page_counts(), [2, 0, 0]);
}

#[test]
fn finalize_says_what_the_module_said() {
    let guest = Guest::new();
    let finalize = |guest: &Guest| guest.vm_command(Call::FinalizeVm.command(0));
    assert_eq!(finalize(&guest), (Err(Errno::EINVAL), 0));
    let (guest, _) = Guest::with_vcpu();
    guest.module.failures().fail(Seamcall::MrFinalize, 1, BUSY);
    assert_eq!(finalize(&guest), (Err(Errno::EBUSY), BUSY.0));
    assert!(!guest.is_dead() && !guest.tdx.is_pre_fault_allowed());
    assert_eq!(finalize(&guest), (Ok(()), 0));
    assert!(guest.tdx.is_pre_fault_allowed());
    assert_eq!(finalize(&guest), (Err(Errno::EINVAL), 0));
    assert_eq!(guest.tdx.create_vcpu().err(), Some(Errno::EIO));

    let guest = Guest::new();
    guest.init_vm(InitVm::default()).unwrap();
    assert_eq!(finalize(&guest), (Err(Errno::EIO), Status::NO_VCPUS.0));
    assert!(
        guest.is_dead(),
        "a guest without vCPUs cannot be finalized, and KVM takes that for its own mistake"
    );
}

#[test]
fn pages_are_added_before_and_augmented_after() {
    let (guest, vcpu) = Guest::runnable(2);
    assert_eq!(guest.vm.map(page(2), guest.vm.frame(2)), MapResult::Fixed);
    let in_guest = guest.tdx.enter(&vcpu).unwrap().unwrap();
    assert_eq!(in_guest.access(page(0)), Access::Done(guest.vm.frame(0)));
    assert_eq!(in_guest.access(page(2)), Access::Pending);
    drop(in_guest);
    guest.check();
}

/// Without an image's page to copy, nothing can be mapped before the guest is finalized; KVM must not try.
#[test]
fn mapping_without_a_source_before_finalizing_is_a_bug() {
    let (guest, _) = Guest::with_vcpu();
    assert_eq!(guest.vm.map(page(0), guest.vm.frame(0)), MapResult::Bug);
    assert!(guest.is_dead());
}

#[test]
fn whatever_is_busy_while_a_page_is_put_in_is_tried_again_without_a_trace() {
    for seamcall in [Seamcall::MemSeptAdd, Seamcall::MemPageAug] {
        for nth in 1..=if seamcall == Seamcall::MemSeptAdd { 3 } else { 1 } {
            let (guest, _) = Guest::runnable(1);
            // Another gigabyte of another half a terabyte: nothing of its tables is there.
            let gfn = Gfn(1 << 27 | 1 << 18 | 1 << 9);
            guest.module.failures().fail(seamcall, nth, BUSY);
            let mut before = Dump::of(&guest.vm.mmu);
            assert_eq!(guest.vm.map(gfn, guest.vm.frame(9)), MapResult::Retry, "{seamcall:?} {nth}");
            if nth == 1 && seamcall == Seamcall::MemSeptAdd {
                invariants::nothing_changed(&before, &Dump::of(&guest.vm.mmu)).unwrap();
            }
            guest.check();
            before = Dump::of(&guest.vm.mmu);
            assert_eq!(guest.vm.map(gfn, guest.vm.frame(9)), MapResult::Fixed);
            assert!(invariants::nothing_changed(&before, &Dump::of(&guest.vm.mmu)).is_err());
            guest.check();
            assert!(!guest.is_dead());
            assert_eq!(guest.tear_down(), Ok(()));
        }
    }
}

#[test]
fn whatever_is_refused_while_a_page_is_put_in_ends_the_virtual_machine_and_leaves_tables_equal() {
    for seamcall in [Seamcall::MemSeptAdd, Seamcall::MemPageAug] {
        let (guest, _) = Guest::runnable(1);
        guest.module.failures().fail(seamcall, 1, FATAL);
        assert_ne!(guest.vm.map(Gfn(1 << 18), guest.vm.frame(9)), MapResult::Fixed);
        assert!(guest.is_dead());
        assert_eq!(guest.vm.mmu.page_counts(), [1, 0, 0]);
    }
}

#[test]
fn what_is_taken_away_is_tried_once_more_without_vcpus() {
    for seamcall in [Seamcall::MemRangeBlock, Seamcall::MemTrack, Seamcall::MemPageRemove] {
        let (guest, vcpu) = Guest::runnable(3);
        guest.module.failures().fail(seamcall, 1, BUSY);
        assert!(guest.zap(GfnRange::new(page(0), 3)));
        assert!(guest.module.failures().are_spent() && !guest.is_dead(), "{seamcall:?}");
        assert!(guest.tdx.enter(&vcpu).unwrap().is_some(), "vCPUs may enter again");
        assert_eq!(guest.module.frames_of(guest.tdx.td().unwrap()), 0);
        guest.check();
    }
}

/// A page that the module does not give back is never the host's again.
#[test]
fn what_cannot_be_taken_away_ends_the_virtual_machine_and_is_lost() {
    let failures = [
        (Seamcall::MemRangeBlock, FATAL, 1),
        (Seamcall::MemRangeBlock, BUSY, 2),
        (Seamcall::MemTrack, FATAL, 1),
        (Seamcall::MemTrack, BUSY, 2),
        (Seamcall::MemPageRemove, FATAL, 1),
        (Seamcall::MemPageRemove, BUSY, 2),
    ];
    for (seamcall, status, times) in failures {
        let (guest, _) = Guest::runnable(2);
        guest.module.failures().fail_times(seamcall, 1, times, status);
        guest.zap(GfnRange::new(page(0), 1));
        assert!(guest.is_dead() && guest.module.failures().are_spent(), "{seamcall:?} {status:?}");
        assert!(guest.module.owner(guest.vm.frame(0)).is_some());
        assert_eq!(guest.tear_down(), Err(Status::TD_ASSOCIATED_PAGES_EXIST));
    }
}

#[test]
fn a_page_that_cannot_be_flushed_from_caches_ends_the_virtual_machine() {
    let (guest, _) = Guest::runnable(1);
    guest.module.failures().fail(Seamcall::PhymemPageWbinvd, 1, FATAL);
    guest.zap(GfnRange::new(page(0), 1));
    assert!(guest.is_dead());
    assert_eq!(guest.tear_down(), Ok(()), "but the module has given it back");
}

#[test]
fn a_zap_keeps_tables_and_waits_for_vcpus() {
    let (guest, vcpu) = Guest::runnable(4);
    let before = Dump::of(&guest.vm.mmu);
    let td = guest.tdx.td().unwrap();
    let children = td.children();
    std::thread::scope(|scope| {
        let in_guest = guest.tdx.enter(&vcpu).unwrap().unwrap();
        let zap = scope.spawn(|| guest.zap(GfnRange::new(page(0), 4)));
        // It is blocked at once, but given back only when the vCPU has left.
        while in_guest.access(page(3)) != Access::Violation && in_guest.access(page(0)) != Access::Violation {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!zap.is_finished());
        assert_eq!(guest.module.frames_of(td), 4);
        drop(in_guest);
        assert!(zap.join().unwrap());
    });
    invariants::tables_are_kept(&before, &Dump::of(&guest.vm.mmu)).unwrap();
    assert_eq!(td.children(), children - 4);
    // And so no table is added for what is mapped again.
    guest.module.failures().fail(Seamcall::MemSeptAdd, 1, FATAL);
    assert_eq!(guest.vm.map(page(0), guest.vm.frame(0)), MapResult::Fixed);
    guest.check();
}

#[test]
fn everything_goes_with_the_guest_in_order() {
    let (guest, _) = Guest::runnable(PAGES);
    let td = Arc::clone(guest.tdx.td().unwrap());
    assert_eq!(guest.tear_down(), Ok(()));
    assert_eq!((td.life(), td.children()), (Life::Teardown, 0));
    assert_eq!(guest.module.frames_of(&td), 0);
    assert!(!guest.is_dead());
    assert!(guest.module.take_key(), "the key is free again");
}

/// Tables that go while the key is there would go with what is mapped by them.
#[test]
fn tables_that_are_freed_before_the_key_is_are_a_bug() {
    let (guest, _) = Guest::runnable(1);
    guest.vm.mmu.destroy();
    assert!(guest.is_dead());
}

#[test]
fn a_root_of_other_levels_than_init_vm_was_told_ends_the_virtual_machine() {
    let (guest, vcpu) = Guest::with_vcpu();
    guest.tdx.load_root(&vcpu, crate::units::Level::FOURTH);
    assert!(!guest.is_dead());
    guest.tdx.load_root(&vcpu, crate::units::Level::FIFTH);
    assert!(guest.is_dead());
}

#[test]
fn a_root_of_a_vcpu_that_the_module_does_not_know_ends_the_virtual_machine() {
    let (guest, _) = Guest::with_vcpu();
    guest.tdx.load_root(&guest.tdx.create_vcpu().unwrap(), crate::units::Level::FOURTH);
    assert!(guest.is_dead());
}

#[test]
fn the_attribute_decides_who_is_told_of_pending_pages() {
    for (attributes, access) in
        [(ATTRIBUTE_SEPT_VE_DISABLE, Access::Pending), (0, Access::VirtualizationException)]
    {
        let guest = Guest::new();
        guest.init_vm(InitVm { attributes, ..InitVm::default() }).unwrap();
        let vcpu = guest.tdx.create_vcpu().unwrap();
        guest.vcpu_command(&vcpu, Call::InitVcpu.command(0)).unwrap();
        guest.finalize().unwrap();
        assert_eq!(guest.vm.map(page(0), guest.vm.frame(0)), MapResult::Fixed);
        assert_eq!(guest.tdx.enter(&vcpu).unwrap().unwrap().access(page(0)), access);
    }
}
