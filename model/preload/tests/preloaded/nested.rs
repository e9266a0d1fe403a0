//! A guest that the guest runs (KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE).

use crate::harness::preloaded;
use crate::kvm::*;
use std::ffi::c_int;

const GET_NESTED_STATE: u64 = 0xc080_aebe;
const SET_NESTED_STATE: u64 = 0x4080_aebf;

const GUEST_MODE: u64 = 1;
const RUN_PENDING: u64 = 2;
const GIF: u64 = 1 << 8;
const AMD: u64 = 1 << 16;
const HEADER: u64 = 128;
const WHOLE: u64 = HEADER + 4096;

/// In words: the header's first is flags, format and size.
type State = [u64; WHOLE as usize / 8];

const fn state(flags: u64, size: u64) -> State {
    let mut state = [0; WHOLE as usize / 8];
    state[0] = flags | AMD | size << 32;
    state[1] = GPA;
    let block = HEADER as usize / 8;
    state[block + 0x10 / 8] = 1; // VMRUN is intercepted
    state[block + 0x58 / 8] = 1; // ASID
    state[block + 0x4d0 / 8] = 1 << 12; // EFER.SVME
    state[block + 0x558 / 8] = 1 << 31 | 1; // CR0.PG, CR0.PE
    state
}

fn set(vcpu: c_int, mut state: State) -> Answer {
    ioctl_with(vcpu, SET_NESTED_STATE, &mut state)
}

fn allow(vcpu: c_int) {
    let mut sregs = kvm_bindings::kvm_sregs::default();
    ioctl_with(vcpu, GET_SREGS, &mut sregs).expect("registers");
    sregs.efer |= 1 << 12;
    ioctl_with(vcpu, SET_SREGS, &mut sregs).expect("EFER.SVME");
}

preloaded! {
    fn what_was_set_is_got_and_told_how_large_it_is() {
        let vcpu = Vm::new().vcpu(0);
        let mut got = state(0, HEADER);
        assert_eq!(ioctl_with(vcpu.fd, GET_NESTED_STATE, &mut got), Ok(0));
        assert_eq!(got[0], GIF | AMD | HEADER << 32);
        allow(vcpu.fd);
        let wanted = state(GUEST_MODE | GIF, WHOLE);
        assert_eq!(set(vcpu.fd, wanted), Ok(0));
        assert_eq!(ioctl_with(vcpu.fd, GET_NESTED_STATE, &mut got), Err(libc::E2BIG));
        assert_eq!(got[0] >> 32, WHOLE);
        assert_eq!(ioctl_with(vcpu.fd, GET_NESTED_STATE, &mut got), Ok(0));
        assert_eq!(got, wanted);
        assert_eq!(set(vcpu.fd, state(GIF, HEADER)), Ok(0));
        assert_eq!(ioctl_with(vcpu.fd, GET_NESTED_STATE, &mut got), Ok(0));
        assert_eq!(got[0], GIF | AMD | HEADER << 32);
    }

    fn what_makes_no_sense_is_refused() {
        let vcpu = Vm::new().vcpu(0);
        let wanted = state(GUEST_MODE | GIF, WHOLE);
        assert_eq!(set(vcpu.fd, wanted), Err(libc::EINVAL), "EFER.SVME is not set");
        allow(vcpu.fd);
        assert_eq!(set(vcpu.fd, state(GUEST_MODE, HEADER)), Err(libc::EINVAL));
        assert_eq!(set(vcpu.fd, state(GIF, HEADER - 1)), Err(libc::EINVAL));
        assert_eq!(set(vcpu.fd, state(RUN_PENDING, WHOLE)), Err(libc::EINVAL));
        assert_eq!(set(vcpu.fd, state(1 << 4, WHOLE)), Err(libc::EINVAL));
        for (word, value) in [(0, wanted[0] & !AMD), (1, GPA + 8), (18, 0), (27, 0), (170, 0), (187, 1)] {
            let mut wrong = wanted;
            wrong[word] = value;
            assert_eq!(set(vcpu.fd, wrong), Err(libc::EINVAL), "word {word}");
        }
        for address in [8, u64::MAX - 3] {
            assert_eq!(ioctl(vcpu.fd, GET_NESTED_STATE, address), Err(libc::EFAULT));
            assert_eq!(ioctl(vcpu.fd, SET_NESTED_STATE, address), Err(libc::EFAULT));
        }
        assert_eq!(set(vcpu.fd, wanted), Ok(0));
    }

    fn who_goes_into_smm_leaves_it() {
        let vcpu = Vm::new().vcpu(0);
        allow(vcpu.fd);
        assert_eq!(set(vcpu.fd, state(GUEST_MODE | GIF, WHOLE)), Ok(0));
        let mut events = kvm_bindings::kvm_vcpu_events::default();
        assert_eq!(ioctl_with(vcpu.fd, GET_EVENTS, &mut events), Ok(0));
        events.flags |= kvm_bindings::KVM_VCPUEVENT_VALID_SMM;
        events.smi.smm = 1;
        assert_eq!(ioctl_with(vcpu.fd, SET_EVENTS, &mut events), Ok(0));
        let mut got = state(0, WHOLE);
        assert_eq!(ioctl_with(vcpu.fd, GET_NESTED_STATE, &mut got), Ok(0));
        assert_eq!(got[0] & GUEST_MODE, 0);
    }
}
