//! Paths: what is said of `/dev/kvm` without opening it, and by whom it can be opened.

use crate::harness::preloaded;
use crate::kvm::*;
use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;

const KVM: &CStr = c"/dev/kvm";
const NUMBER: (u32, u32) = (10, 232);

fn status(path: &CStr) -> libc::stat {
    let mut status = MaybeUninit::uninit();
    // SAFETY: there is room for what is written, and it is read after it was.
    unsafe {
        assert_eq!(libc::stat(path.as_ptr(), status.as_mut_ptr()), 0);
        status.assume_init()
    }
}

fn fork(child: impl FnOnce() -> bool) {
    // SAFETY: the child does little, and ends.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(i32::from(!child()));
        }
        let mut status = 0;
        assert_eq!((libc::waitpid(pid, &mut status, 0), status), (pid, 0));
    }
}

preloaded! {
    fn kvm_is_there_for_who_asks_first() {
        // That of another device, so that it is the same where there is no KVM.
        let (kvm, other) = (status(KVM), status(c"/dev/null"));
        assert_eq!((kvm.st_ino, kvm.st_mode), (other.st_ino, other.st_mode));
        assert_eq!((libc::major(kvm.st_rdev), libc::minor(kvm.st_rdev)), NUMBER);
        let mut extended = MaybeUninit::<libc::statx>::uninit();
        // SAFETY: there is room for what is written, and it is read after it was.
        unsafe {
            assert_eq!(libc::access(KVM.as_ptr(), libc::R_OK | libc::W_OK), 0);
            assert_eq!(libc::access(KVM.as_ptr(), libc::X_OK), -1);
            assert_eq!(libc::faccessat(libc::AT_FDCWD, KVM.as_ptr(), libc::W_OK, 0), 0);
            assert_eq!(libc::statx(0, KVM.as_ptr(), 0, libc::STATX_INO, extended.as_mut_ptr()), 0);
            let extended = extended.assume_init();
            assert_eq!(extended.stx_ino, other.st_ino);
            assert_eq!((extended.stx_rdev_major, extended.stx_rdev_minor), NUMBER);
        }
        assert_eq!(status(c"/dev/zero").st_rdev, libc::makedev(1, 5));
    }

    fn streams_are_opened_of_the_model_too() {
        // SAFETY: the strings end with a zero, and the streams are open while they are used.
        unsafe {
            let kvm = libc::fopen(KVM.as_ptr(), c"r+e".as_ptr());
            let fd = libc::fileno(kvm);
            assert_eq!(ioctl(fd, CHECK_EXTENSION, 235), Ok(0b11_0011), "all types of virtual machines");
            assert_eq!(libc::fcntl(fd, libc::F_GETFD), libc::FD_CLOEXEC);
            assert_eq!(libc::fclose(kvm), 0);
            let release = libc::fopen(c"/proc/sys/kernel/osrelease".as_ptr(), c"r".as_ptr());
            let mut line = [0 as c_char; 64];
            assert!(!libc::fgets(line.as_mut_ptr(), 64, release).is_null());
            assert_eq!(CStr::from_ptr(line.as_ptr()), c"7.3.0-kvmprep-model\n");
            assert!(libc::fopen(c"/dev/kvm2".as_ptr(), c"r".as_ptr()).is_null());
            assert_eq!(errno(), libc::ENOENT);
        }
    }

    fn a_forked_child_gets_no_other_kvm_in_the_models_place() {
        fork(|| open(KVM).is_ok());
        let vm = Vm::new();
        // SAFETY: the function takes a descriptor and room of no size.
        let dump: unsafe extern "C" fn(c_int, *mut c_char, usize) -> c_int = unsafe {
            std::mem::transmute(libc::dlsym(libc::RTLD_DEFAULT, c"kvmprep_model_dump".as_ptr()))
        };
        fork(|| {
            open(KVM) == Err(libc::ENOSYS)
                // SAFETY: there is no room.
                && unsafe { dump(vm.fd, std::ptr::null_mut(), 0) } == -libc::EIO
        });
    }
}
