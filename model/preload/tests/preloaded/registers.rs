//! Registers: what is one and the same, and which of them have KVM take a vCPU's root anew.

use crate::harness::{preloaded, run};
use crate::kvm::*;
use kvm_bindings::{kvm_msr_entry, kvm_sregs, kvm_vcpu_events};

const SIZE: u64 = MIB;
const EFER: u32 = 0xc000_0080;
const NO_EXECUTE: u64 = 1 << 11;
const SVM: u64 = 1 << 12;
const LONG_MODE_ACTIVE: u64 = 1 << 10;

fn system_registers(vcpu: &Vcpu) -> kvm_sregs {
    let mut sregs = kvm_sregs::default();
    ioctl_with(vcpu.fd, GET_SREGS, &mut sregs).expect("registers");
    sregs
}

fn set(vcpu: &Vcpu, change: impl FnOnce(&mut kvm_sregs)) {
    let mut sregs = system_registers(vcpu);
    change(&mut sregs);
    assert_eq!(ioctl_with(vcpu.fd, SET_SREGS, &mut sregs), Ok(0));
}

/// `struct kvm_msrs` of one.
#[repr(C)]
struct Msr {
    count: u64,
    entry: kvm_msr_entry,
}

fn msr(index: u32, data: u64) -> Msr {
    Msr { count: 1, entry: kvm_msr_entry { index, data, ..Default::default() } }
}

#[test]
fn a_root_is_taken_anew_where_what_paging_hangs_on_changes() {
    let name = concat!(module_path!(), "::a_root_is_taken_anew_where_what_paging_hangs_on_changes");
    // With an obsolete root a pre-fault of this kernel ends by a signal alone.
    run(name, &[("KVMPREP_MODEL_KERNEL", "6.12")], || {
        let pre_fault_after = |change: &dyn Fn(&Vcpu)| {
            let vm = Vm::new();
            let vcpu = vm.vcpu(0);
            assert_eq!(vm.set_region(1, GPA, memory(SIZE), SIZE), Ok(0));
            assert_eq!(vm.set_region(2, 2 * GPA, memory(SIZE), SIZE), Ok(0));
            assert_eq!(vcpu.pre_fault(GPA, PAGE).0, Ok(0));
            assert_eq!(vm.set_region(2, 2 * GPA, 0, 0), Ok(0));
            change(&vcpu);
            vcpu.pre_fault(GPA, SIZE).0
        };
        assert_eq!(pre_fault_after(&|_| ()), Err(libc::EINTR));
        assert_eq!(pre_fault_after(&|vcpu| set(vcpu, |_| ())), Err(libc::EINTR));
        let as_they_are = |vcpu: &Vcpu| {
            let mut events = kvm_vcpu_events::default();
            assert_eq!(ioctl_with(vcpu.fd, GET_EVENTS, &mut events), Ok(0));
            assert_eq!(ioctl_with(vcpu.fd, SET_EVENTS, &mut events), Ok(0));
        };
        assert_eq!(pre_fault_after(&as_they_are), Err(libc::EINTR));
        let changes: [fn(&mut kvm_sregs); 4] =
            [|it| it.cr0 |= 1, |it| it.cr3 = PAGE, |it| it.cr4 |= 1 << 5, |it| it.efer |= NO_EXECUTE];
        for change in changes {
            assert_eq!(pre_fault_after(&|vcpu| set(vcpu, change)), Ok(0));
        }
    });
}

preloaded! {
    fn efer_is_one_register() {
        let vcpu = Vm::new().vcpu(0);
        set(&vcpu, |sregs| sregs.efer = SVM | LONG_MODE_ACTIVE);
        let mut efer = msr(EFER, 0);
        assert_eq!(ioctl_with(vcpu.fd, GET_MSRS, &mut efer), Ok(1));
        assert_eq!(efer.entry.data, SVM | LONG_MODE_ACTIVE);
        assert_eq!(ioctl_with(vcpu.fd, SET_MSRS, &mut msr(EFER, NO_EXECUTE)), Ok(1));
        assert_eq!(system_registers(&vcpu).efer, NO_EXECUTE | LONG_MODE_ACTIVE);
    }
}
