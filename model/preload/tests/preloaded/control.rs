//! What a test asks of the model itself (`kvmprep-model.h`).

use crate::harness::preloaded;
use crate::kvm::*;
use std::ffi::{CStr, CString, c_char, c_int, c_void};

const SIZE: u64 = MIB;

/// A function of the library's.
fn function(name: &CStr) -> *mut c_void {
    // SAFETY: the name ends with a zero.
    let function = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    assert!(!function.is_null(), "the library offers it");
    function
}

fn with_text(name: &CStr, text: &str) -> c_int {
    let text = CString::new(text).expect("no zero");
    // SAFETY: these functions take a string.
    unsafe {
        let function: unsafe extern "C" fn(*const c_char) -> c_int = std::mem::transmute(function(name));
        function(text.as_ptr())
    }
}

fn with_room<T>(name: &CStr, vm: &Vm, room: &mut [T]) -> c_int {
    // SAFETY: these functions write at most so many bytes of numbers.
    unsafe {
        let function: unsafe extern "C" fn(c_int, *mut c_void, usize) -> c_int =
            std::mem::transmute(function(name));
        function(vm.fd, room.as_mut_ptr().cast(), size_of_val(room))
    }
}

/// A VM of which all memory is mapped.
fn prepared() -> (Vm, Vcpu) {
    let vm = Vm::new();
    let vcpu = vm.vcpu(0);
    let memory = memory(SIZE);
    assert_eq!(advise(memory, SIZE, libc::MADV_NOHUGEPAGE), Ok(0));
    assert_eq!(advise(memory, SIZE, libc::MADV_POPULATE_WRITE), Ok(0));
    assert_eq!(vm.set_region(1, GPA, memory, SIZE), Ok(0));
    assert_eq!(vcpu.pre_fault(GPA, SIZE), (Ok(0), 0));
    (vm, vcpu)
}

preloaded! {
    fn the_kernel_can_be_chosen_until_the_machine_is_made() {
        assert_eq!(with_text(c"kvmprep_model_set_kernel", "6.1"), 0);
        assert_eq!(with_text(c"kvmprep_model_set_kernel", "2.6"), -libc::EINVAL);
        assert_eq!(with_text(c"kvmprep_model_set_vm_types", "default"), 0);
        let vm = Vm::new();
        assert_eq!(vm.vcpu(0).pre_fault(GPA, PAGE), (Err(libc::EINVAL), PAGE), "6.1 has no pre-fault");
        assert_eq!(with_text(c"kvmprep_model_set_kernel", "7.3"), -libc::EBUSY);
        assert_eq!(with_text(c"kvmprep_model_set_vm_types", "tdx"), -libc::EBUSY);
    }

    fn an_ioctl_fails_when_it_is_told_to() {
        let (_vm, vcpu) = prepared();
        assert_eq!(with_text(c"kvmprep_model_fail", "ioctl KVM_PRE_FAULT_MEMORY:2-3:EBUSY"), 0);
        assert_eq!(vcpu.pre_fault(GPA, PAGE), (Ok(0), 0));
        assert_eq!(vcpu.pre_fault(GPA, PAGE), (Err(libc::EBUSY), PAGE));
        assert_eq!(with_text(c"kvmprep_model_fail", ""), 0);
        assert_eq!(vcpu.pre_fault(GPA, PAGE), (Ok(0), 0));
        assert_eq!(with_text(c"kvmprep_model_fail", "ioctl KVM_RUN"), -libc::EINVAL);
    }

    fn what_is_mapped_is_counted() {
        let (vm, _vcpu) = prepared();
        let mut counts = [7u64; 7];
        assert_eq!(with_room(c"kvmprep_model_get_counts", &vm, &mut counts), 0);
        assert_eq!(counts, [SIZE / PAGE, 0, 0, 0, 0, 0, 0], "what is not known is zero");
        let mut first = [7u64; 1];
        assert_eq!(with_room(c"kvmprep_model_get_counts", &vm, &mut first), 0);
        assert_eq!(first, [SIZE / PAGE]);
        assert_eq!(with_room(c"kvmprep_model_measurement", &vm, &mut [0u8; 48]), -libc::ENOTTY);
    }

    fn what_is_mapped_is_written_down() {
        let (vm, _vcpu) = prepared();
        let length = with_room::<u8>(c"kvmprep_model_dump", &vm, &mut []);
        assert!(length > 100, "{length}");
        let mut text = vec![1u8; length as usize + 1];
        assert_eq!(with_room(c"kvmprep_model_dump", &vm, &mut text), length);
        let text = CString::from_vec_with_nul(text).expect("one zero, at the end").into_string().expect("text");
        assert!(text.lines().count() > 5 && text.contains(&format!("{:#x}", GPA / PAGE)), "{text}");
        let mut start = [1u8; 8];
        assert_eq!(with_room(c"kvmprep_model_dump", &vm, &mut start), length);
        assert_eq!((&start[..7], start[7]), (&text.as_bytes()[..7], 0));
    }

    fn a_vm_that_is_as_it_must_be_is_found_so() {
        let (vm, _vcpu) = prepared();
        let mut why = [1u8; 64];
        assert_eq!((with_room(c"kvmprep_model_check", &vm, &mut why), why[0]), (0, 0));
    }

    fn what_is_to_fail_can_be_said_before_the_kernel_is_chosen() {
        assert_eq!(with_text(c"kvmprep_model_fail", "ioctl KVM_CREATE_VM:1:EBUSY"), 0);
        assert_eq!(with_text(c"kvmprep_model_fail", ""), 0);
        assert_eq!(with_text(c"kvmprep_model_fail", "ioctl KVM_CREATE_VM:1:ENOMEM,mng_create:1:busy"), 0);
        assert_eq!(with_text(c"kvmprep_model_set_kernel", "6.12"), 0);
        assert_eq!(with_text(c"kvmprep_model_set_vm_types", "default,sw_protected"), 0);
        let kvm = open(c"/dev/kvm").expect("the model is here");
        assert_eq!(with_text(c"kvmprep_model_set_kernel", "6.1"), -libc::EBUSY);
        assert_eq!(ioctl(kvm, CREATE_VM, 0), Err(libc::ENOMEM));
    }
}
