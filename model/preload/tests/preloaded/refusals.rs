//! What is not modelled fails, with a message that names it.

use crate::harness::{library, preloaded, run};
use crate::kvm::*;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Output};

#[test]
fn a_request_that_is_not_modelled_is_named() {
    let said = run(concat!(module_path!(), "::a_request_that_is_not_modelled_is_named"), &[], || {
        let vm = Vm::new();
        assert_eq!(ioctl(vm.fd, CREATE_IRQCHIP, 0), Err(libc::ENOSYS));
        assert_eq!(ioctl(vm.fd, CREATE_IRQCHIP, 0), Err(libc::ENOSYS));
        // What KVM has not either, of such an object, is no border of the model.
        assert_eq!(ioctl(vm.fd, libc::TCGETS, 0), Err(libc::ENOTTY));
        assert_eq!(ioctl(vm.fd, RUN, 0), Err(libc::ENOTTY));
        assert_eq!(ioctl(vm.vcpu(0).fd, CHECK_EXTENSION, 0), Err(libc::EINVAL));
        assert_eq!(ioctl(vm.kvm, RUN, 0), Err(libc::EINVAL));
    });
    if !said.is_empty() {
        assert_eq!(said.matches("KVM_CREATE_IRQCHIP (0xae60) of a VM is not modelled").count(), 1, "{said}");
        assert_eq!(said.matches("not modelled").count(), 1, "{said}");
    }
}

#[test]
fn a_guest_without_steps_is_not_run() {
    let said = run(concat!(module_path!(), "::a_guest_without_steps_is_not_run"), &[], || {
        let vm = Vm::new();
        assert_eq!(vm.vcpu(0).run(), Err(libc::ENOSYS));
    });
    if !said.is_empty() {
        assert!(said.contains("the model executes no guest's code"), "{said}");
    }
}

/// Runs `true` with the library and a variable.
fn start_with(name: &str, value: &OsStr) -> (Option<i32>, String) {
    let Output { status, stderr, .. } =
        Command::new("true").env("LD_PRELOAD", library()).env(name, value).output().expect("a program");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn what_the_environment_says_and_is_not_understood_is_said() {
    let (code, said) = start_with("KVMPREP_MODEL_KERNAL", "6.12".as_ref());
    assert!(code == Some(0) && said.contains("KVMPREP_MODEL_KERNAL is set"), "{said}");
    for value in [OsStr::new("5.10"), OsStr::from_bytes(b"6.1\xff")] {
        let (code, said) = start_with("KVMPREP_MODEL_KERNEL", value);
        assert_eq!(code, Some(78), "it ends by itself, without a signal: {value:?}: {said}");
        assert!(said.contains("should be a kernel that is modelled"), "{value:?}: {said}");
    }
    assert_eq!(start_with("KVMPREP_MODEL_KERNEL", "6.12".as_ref()), (Some(0), String::new()));
}

#[test]
fn the_release_is_the_modelled_kernels() {
    let name = concat!(module_path!(), "::the_release_is_the_modelled_kernels");
    run(name, &[("KVMPREP_MODEL_KERNEL", "6.12")], || {
        let vm = Vm::new();
        assert_eq!(ioctl(vm.fd, CHECK_EXTENSION, 236), Ok(1));
        assert_eq!(ioctl(vm.fd, CHECK_EXTENSION, 244), Ok(0), "no flags yet");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
        assert!(release.starts_with("6.12."), "{release}");
    });
}

#[test]
fn what_a_kernel_has_not_is_refused_before_its_argument_is_read() {
    let name = concat!(module_path!(), "::what_a_kernel_has_not_is_refused_before_its_argument_is_read");
    run(name, &[("KVMPREP_MODEL_KERNEL", "6.1")], || {
        let vm = Vm::new();
        for request in [SET_REGION2, SET_ATTRIBUTES, CREATE_GUEST_MEMFD] {
            assert_eq!(ioctl(vm.fd, request, 0), Err(libc::ENOTTY), "{request:#x}");
        }
        let vcpu = vm.vcpu(0);
        for request in [PRE_FAULT, ENCRYPT_OP] {
            assert_eq!(ioctl(vcpu.fd, request, 0), Err(libc::EINVAL), "{request:#x}");
        }
    });
}

#[test]
fn vcpus_have_commands_since_tdx() {
    let name = concat!(module_path!(), "::vcpus_have_commands_since_tdx");
    run(name, &[("KVMPREP_MODEL_KERNEL", "6.12")], || {
        assert_eq!(ioctl(Vm::new().vcpu(0).fd, ENCRYPT_OP, 0), Err(libc::EINVAL));
    });
}

preloaded! {
    fn other_files_are_none_of_the_models() {
        let _vm = Vm::new();
        let directory = std::env::temp_dir();
        let path = directory.join(format!("kvmprep-model-{}", std::process::id()));
        std::fs::write(&path, "content").expect("a file");
        assert_eq!(std::fs::read_to_string(&path).expect("the file"), "content");
        std::fs::remove_file(path).expect("the file");
    }

    fn there_are_no_more_vcpus_than_is_said() {
        let vm = Vm::new();
        let most = ioctl(vm.fd, CHECK_EXTENSION, 66).expect("KVM_CAP_MAX_VCPUS") as u64;
        for number in 0..most {
            close(ioctl(vm.fd, CREATE_VCPU, number).expect("a vCPU"));
        }
        assert_eq!(ioctl(vm.fd, CREATE_VCPU, most), Err(libc::EINVAL));
    }
}
