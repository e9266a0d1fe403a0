//! Confidential guests are launched by the commands that a VMM gives.

use crate::harness::{preloaded, run};
use crate::kvm::*;
use kvm_bindings::*;
use std::ffi::{c_char, c_int};
use std::ptr;

const PAGES: u64 = 4;
const SIZE: u64 = MIB;

/// A slot of private memory, and a page of content that is not the guest's.
fn private_memory(vm: &Vm) -> u64 {
    let file = vm.guest_memfd(SIZE, 0).expect("a file");
    assert_eq!(vm.set_file_region(1, GPA, memory(SIZE), SIZE, file), Ok(0));
    assert_eq!(vm.set_private(GPA, SIZE, true), Ok(0));
    let image = memory(SIZE);
    (0..PAGES).for_each(|page| set_word(image + page * PAGE, page as u32 + 1));
    image
}

/// `struct kvm_tdx_cmd`.
#[repr(C)]
struct TdxCommand {
    id: u32,
    flags: u32,
    data: u64,
    hw_error: u64,
}

fn tdx(fd: c_int, id: u32, flags: u32, data: u64) -> Answer {
    ioctl_with(fd, ENCRYPT_OP, &mut TdxCommand { id, flags, data, hw_error: 0 })
}

/// `struct kvm_tdx_init_vm` with one entry of CPUID: addresses of 48 bits.
fn tdx_init_vm() -> Vec<u64> {
    let mut words = vec![0u64; 33 + 5];
    words[0] = 1 << 28;
    words[32] = 1;
    words[33] = 0x8000_0008;
    words[34] = (48u64 << 16) << 32;
    words
}

/// `struct kvm_tdx_capabilities` with room for so many entries of CPUID, all ones where nothing was told.
struct Capabilities(Vec<u64>);

impl Capabilities {
    /// Words before the entries, and words of an entry.
    const HEAD: usize = 257;
    const ENTRY: usize = 5;

    fn with_room(entries: usize) -> Self {
        let mut words = vec![u64::MAX; Self::HEAD + entries * Self::ENTRY];
        words[Self::HEAD - 1] = entries as u64;
        Capabilities(words)
    }

    fn ask(&mut self, vm: &Vm) -> Answer {
        tdx(vm.fd, 0, 0, self.0.as_mut_ptr() as u64)
    }

    /// EAX to EDX of what can be chosen of a leaf, as halves of words.
    fn of_leaf(&self, function: u64) -> Option<[u64; 2]> {
        let mut entries = self.0[Self::HEAD..].chunks(Self::ENTRY).take(self.0[Self::HEAD - 1] as usize);
        entries
            .find(|entry| entry[0] == function)
            .map(|entry| [entry[1] >> 32 | entry[2] << 32, entry[2] >> 32])
    }
}

/// `struct kvm_cpuid2` with room for so many entries.
fn cpuid_list(room: usize) -> Vec<u64> {
    let mut words = vec![0u64; 1 + room * 5];
    words[0] = room as u64;
    words
}

/// `SEV_ISSUE_CMD`.
const ISSUE_COMMAND: u64 = 0xc010_5300;

#[test]
fn what_is_not_modelled_of_sev_is_named() {
    let said = run(concat!(module_path!(), "::what_is_not_modelled_of_sev_is_named"), &[], || {
        let vm = Vm::of_type(4);
        let firmware = open(c"/dev/sev").expect("a machine with SNP");
        let sev = |id: u32| ioctl_with(vm.fd, ENCRYPT_OP, &mut kvm_sev_cmd { id, ..Default::default() });
        assert_eq!(sev(103), Err(libc::ENOSYS));
        let issue = |number: u32| ioctl_with(firmware, ISSUE_COMMAND, &mut [number, 0, 0, 0]);
        assert_eq!(issue(9), Err(libc::ENOSYS));
        // What the kernel has not either.
        assert_eq!(sev(104), Err(libc::EINVAL));
        assert_eq!(sev(50), Err(libc::EINVAL));
        assert_eq!(issue(13), Err(libc::EINVAL));
        assert_eq!(ioctl(firmware, ISSUE_COMMAND, 8), Err(libc::EFAULT));
        assert_eq!(ioctl(firmware, ISSUE_COMMAND + 1, 0), Err(libc::EINVAL));
    });
    if !said.is_empty() {
        let certificates = "KVM_SEV_SNP_ENABLE_REQ_CERTS of KVM_MEMORY_ENCRYPT_OP is not modelled";
        assert!(said.contains(certificates), "{said}");
        assert!(said.contains("SNP_PLATFORM_STATUS of /dev/sev is not modelled"), "{said}");
        assert_eq!(said.matches("not modelled").count(), 2, "{said}");
    }
}

/// An SNP guest that can be asked for commands.
struct Snp {
    vm: Vm,
    firmware: c_int,
}

impl Snp {
    fn new() -> Self {
        Snp { vm: Vm::of_type(4), firmware: open(c"/dev/sev").expect("a machine with SNP") }
    }

    /// With KVM_SEV_INIT2 and LAUNCH_START.
    fn launching() -> Self {
        let guest = Snp::new();
        assert_eq!(guest.command(22, &mut kvm_sev_init::default()), Ok(0));
        let mut start = kvm_sev_snp_launch_start { policy: 3 << 16, ..Default::default() };
        assert_eq!(guest.command(100, &mut start), Ok(0));
        guest
    }

    fn command<T>(&self, id: u32, argument: &mut T) -> Answer {
        ioctl_with(self.vm.fd, ENCRYPT_OP, &mut self.raw(id, ptr::from_mut(argument) as u64))
    }

    fn raw(&self, id: u32, data: u64) -> kvm_sev_cmd {
        kvm_sev_cmd { id, data, sev_fd: self.firmware as u32, ..Default::default() }
    }
}

/// Memory that can be read only, with a structure at its start.
fn read_only<T>(content: T) -> u64 {
    let start = memory(PAGE);
    // SAFETY: the memory is new and large enough.
    unsafe { (start as *mut T).write(content) };
    assert_eq!(protect(start, PAGE, libc::PROT_READ), Ok(0));
    start
}

fn registers_of(vcpu: &Vcpu) -> Answer {
    ioctl_with(vcpu.fd, GET_REGS, &mut kvm_regs::default())
}

preloaded! {
    fn regions_of_an_snp_guest_are_read_and_remembered() {
        let guest = Snp::new();
        let start = memory(PAGE);
        let ask = |request, addr, size| ioctl_with(guest.vm.fd, request, &mut kvm_enc_region { addr, size });
        for request in [REGISTER_REGION, UNREGISTER_REGION] {
            assert_eq!(ioctl(guest.vm.fd, request, 0), Err(libc::EFAULT));
            assert_eq!(ask(request, start, PAGE), Err(libc::ENOTTY), "it is no SNP guest yet");
        }
        assert_eq!(guest.command(22, &mut kvm_sev_init::default()), Ok(0));
        assert_eq!(ask(UNREGISTER_REGION, start, PAGE), Err(libc::EINVAL));
        assert_eq!(ask(REGISTER_REGION, start, 0), Err(libc::EINVAL));
        assert_eq!(ask(REGISTER_REGION, start, PAGE), Ok(0));
        assert_eq!([(); 2].map(|()| ask(UNREGISTER_REGION, start, PAGE)), [Ok(0), Err(libc::EINVAL)]);
    }

    fn a_command_is_given_in_memory_that_can_be_written() {
        let guest = Snp::new();
        let mut init = kvm_sev_init::default();
        let command = read_only(guest.raw(22, ptr::from_mut(&mut init) as u64));
        assert_eq!(ioctl(guest.vm.fd, ENCRYPT_OP, command), Err(libc::EFAULT));
        assert_eq!(guest.command(22, &mut init), Err(libc::EPERM), "it was done all the same");

        let vm = Vm::of_type(5);
        let mut init = tdx_init_vm();
        let data = init.as_mut_ptr() as u64;
        let command = read_only(TdxCommand { id: 1, flags: 0, data, hw_error: 0 });
        assert_eq!(ioctl(vm.fd, ENCRYPT_OP, command), Err(libc::EFAULT));
        assert_eq!(tdx(vm.fd, 1, 0, data), Err(libc::EINVAL), "it was done all the same");
        let vcpu = vm.vcpu(0);
        assert_eq!(tdx(vcpu.fd, 2, 0, 0), Ok(0));
        // Without a slot the region itself is refused, if nothing else is wrong.
        let mut region = [memory(PAGE), GPA, 1];
        assert_eq!(tdx(vcpu.fd, 3, 1, read_only(region)), Err(libc::EFAULT));
        assert_eq!(tdx(vcpu.fd, 3, 1, region.as_mut_ptr() as u64), Err(libc::EINVAL));
    }

    fn what_an_owner_signed_is_a_block_of_its_size_and_not_at_null() {
        let guest = Snp::launching();
        let finish = |id_block_uaddr, id_auth_uaddr| {
            let mut finish = kvm_sev_snp_launch_finish { id_block_en: 1, ..Default::default() };
            (finish.id_block_uaddr, finish.id_auth_uaddr) = (id_block_uaddr, id_auth_uaddr);
            guest.command(102, &mut finish)
        };
        let pages = memory(2 * PAGE);
        unmap(pages + PAGE, PAGE);
        assert_eq!(finish(0, pages), Err(libc::EINVAL));
        assert_eq!(finish(pages, 0), Err(libc::EINVAL));
        assert_eq!(finish(pages + PAGE - 64, pages), Err(libc::EFAULT));
    }

    fn a_vcpu_keeps_its_registers_once_it_is_measured() {
        let guest = Snp::launching();
        let vcpu = guest.vm.vcpu(0);
        assert_eq!(registers_of(&vcpu), Ok(0));
        // SAFETY: the function takes a string.
        let fail: unsafe extern "C" fn(*const c_char) -> c_int =
            unsafe { std::mem::transmute(libc::dlsym(libc::RTLD_DEFAULT, c"kvmprep_model_fail".as_ptr())) };
        // SAFETY: the string ends with a zero.
        assert_eq!(unsafe { fail(c"launch_finish:1:policy_failure".as_ptr()) }, 0);
        let mut finish = kvm_sev_snp_launch_finish::default();
        assert_eq!(guest.command(102, &mut finish), Err(libc::EIO));
        assert_eq!(registers_of(&vcpu), Err(libc::EINVAL));
        assert_eq!(ioctl_with(vcpu.fd, GET_EVENTS, &mut kvm_vcpu_events::default()), Ok(0), "they are KVM's");

        let guest = Snp::launching();
        assert_eq!(guest.command(102, &mut finish), Ok(0));
        assert_eq!(registers_of(&guest.vm.vcpu(0)), Ok(0), "what is made later is not measured");
    }

    fn a_vmm_asks_what_a_tdx_guest_can_be_and_is_held_to_it() {
        let vm = Vm::of_type(5);
        assert_eq!(tdx(vm.fd, 0, 0, 8), Err(libc::EFAULT));
        assert_eq!(tdx(vm.fd, 0, 1, 8), Err(libc::EINVAL), "flags come first");
        let mut small = Capabilities::with_room(6);
        assert_eq!(small.ask(&vm), Err(libc::E2BIG));
        assert_eq!((small.0[0], small.0[Capabilities::HEAD - 1]), (u64::MAX, 6), "nothing is told");
        let mut told = Capabilities::with_room(12);
        assert_eq!(told.ask(&vm), Ok(0));
        assert_eq!(told.0[..6], [1 << 28, 7, 0, 2, 0, 0]);
        assert!(told.0[6..256].iter().all(|word| *word == 0), "reserved");
        assert_eq!(told.0[256], 9);
        assert_eq!(told.0[Capabilities::HEAD + 9 * Capabilities::ENTRY], u64::MAX, "no more than there is");
        assert_eq!(told.of_leaf(0x8000_0008), Some([0xff_0000 | 1 << 41, 0]));
        assert_eq!(told.of_leaf(0xd), None);

        let init = |change: fn(&mut Vec<u64>)| {
            let mut init = tdx_init_vm();
            change(&mut init);
            let data = init.as_mut_ptr() as u64;
            let mut command = TdxCommand { id: 1, flags: 0, data, hw_error: 0 };
            (ioctl_with(vm.fd, ENCRYPT_OP, &mut command), command.hw_error)
        };
        assert_eq!(init(|init| init[0] |= 1), (Err(libc::EINVAL), 0), "a guest to be debugged");
        assert_eq!(init(|init| init[1] = 1 << 9), (Err(libc::EINVAL), 0), "no such state");
        assert_eq!(init(|init| init[33] = 0xd), (Err(libc::EINVAL), 0), "no such leaf");
        // Too many entries are refused before any is read: here none can be.
        let page = memory(2 * PAGE);
        unmap(page + PAGE, PAGE);
        let end = page + PAGE - 264;
        set_word(end + 256, 257);
        assert_eq!(tdx(vm.fd, 1, 0, end), Err(libc::E2BIG));
        set_word(end + 256, 256);
        assert_eq!(tdx(vm.fd, 1, 0, end), Err(libc::EFAULT));
        let module_says = 0xc000_0100_0000_0045;
        assert_eq!(init(|init| init[34] |= 48 << 32), (Err(libc::EINVAL), module_says), "not to be chosen");
        assert_eq!(init(|init| init[1] = 7), (Ok(0), 0));

        let vcpu = vm.vcpu(0);
        let get = |list: &mut Vec<u64>| tdx(vcpu.fd, 5, 0, list.as_mut_ptr() as u64);
        assert_eq!(tdx(vcpu.fd, 5, 0, 8), Err(libc::EFAULT));
        let mut list = cpuid_list(2);
        assert_eq!(get(&mut list), Err(libc::E2BIG));
        assert_eq!((list[0], list[1], list[4]), (15, 0, 0), "only how many there are");
        let mut list = cpuid_list(20);
        assert_eq!(get(&mut list), Ok(0));
        assert_eq!((list[0], list[1], list[2]), (15, 0, 0x1f << 32), "the last basic leaf");
        assert_eq!((list[1 + 14 * 5], list[2 + 14 * 5] >> 48), (0x8000_0008, 48), "as wide as was chosen");
        // What is of a VM is not of a vCPU, and the other way round.
        assert_eq!(tdx(vcpu.fd, 0, 0, told.0.as_mut_ptr() as u64), Err(libc::EINVAL));
        assert_eq!(tdx(vm.fd, 5, 0, list.as_mut_ptr() as u64), Err(libc::EINVAL));
    }

    fn a_tdx_guest_is_loaded_sealed_and_populated() {
        let vm = Vm::of_type(5);
        let mut init = tdx_init_vm();
        assert_eq!(ioctl(vm.fd, CREATE_VCPU, 0), Err(libc::EIO), "not before the guest is made");
        assert_eq!(tdx(vm.fd, 1, 0, 8), Err(libc::EFAULT));
        assert_eq!(tdx(vm.fd, 1, 0, init.as_mut_ptr() as u64), Ok(0));
        let vcpu = vm.vcpu(0);
        assert_eq!(tdx(vcpu.fd, 2, 0, 0), Ok(0));
        let image = private_memory(&vm);
        let mut region = [image, GPA, PAGES];
        let measured = 1;
        assert_eq!(tdx(vcpu.fd, 3, measured, region.as_mut_ptr() as u64), Ok(0));
        assert_eq!(region, [image + PAGES * PAGE, GPA + PAGES * PAGE, 0]);
        // A page is added once: the region says how far it came.
        let mut again = [image, GPA + (PAGES - 1) * PAGE, 2];
        assert_eq!(tdx(vcpu.fd, 3, measured, again.as_mut_ptr() as u64), Err(libc::EIO));
        assert_eq!(again[2], 2);
        assert_eq!(vcpu.pre_fault(GPA, SIZE).0, Err(libc::EOPNOTSUPP));
        assert_eq!(tdx(vm.fd, 4, 0, 0), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        assert_eq!(vm.statistic("pages_4k"), SIZE / PAGE);
        assert_eq!(ioctl_with(vcpu.fd, GET_REGS, &mut kvm_regs::default()), Err(libc::EINVAL));
    }

    fn an_snp_guest_is_launched_and_populated() {
        let vm = Vm::of_type(4);
        let firmware = open(c"/dev/sev").expect("a machine with SNP");
        let sev = |id: u32, data: u64, sev_fd: c_int| {
            let mut command = kvm_sev_cmd { id, data, sev_fd: sev_fd as u32, ..Default::default() };
            ioctl_with(vm.fd, ENCRYPT_OP, &mut command)
        };
        let mut init = kvm_sev_init::default();
        assert_eq!(sev(22, ptr::from_mut(&mut init) as u64, firmware), Ok(0));
        let vcpu = vm.vcpu(0);
        let image = private_memory(&vm);
        let mut start = kvm_sev_snp_launch_start { policy: 3 << 16, ..Default::default() };
        let start = ptr::from_mut(&mut start) as u64;
        assert_eq!(sev(100, start, vm.kvm), Err(libc::ENOTTY), "that is no firmware's");
        assert_eq!(sev(100, start, firmware), Ok(0));
        let mut update = kvm_sev_snp_launch_update {
            gfn_start: GPA / PAGE,
            uaddr: image,
            len: PAGES * PAGE,
            type_: 1,
            ..Default::default()
        };
        assert_eq!(sev(101, ptr::from_mut(&mut update) as u64, firmware), Ok(0));
        assert_eq!((update.gfn_start, update.uaddr, update.len), (GPA / PAGE + PAGES, image + PAGES * PAGE, 0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE).0, Err(libc::EOPNOTSUPP));
        let mut finish = kvm_sev_snp_launch_finish::default();
        assert_eq!(sev(102, ptr::from_mut(&mut finish) as u64, firmware), Ok(0));
        assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
        assert_eq!(ioctl(vm.fd, ENCRYPT_OP, 0), Ok(0), "there is SEV");
        assert_eq!(ioctl(Vm::new().fd, ENCRYPT_OP, 0), Err(libc::ENOTTY));
    }
}
