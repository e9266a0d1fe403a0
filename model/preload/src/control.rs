//! `kvmprep-model.h`: what a program that knows of the model may ask of it beside the kernel's own interface.
//!
//! Each function is answered with 0, or a number, or a negative errno; `errno` is left alone. The program's structures are read
//! here, and its memory is written here; what is done with them is decided elsewhere. A pointer that is not NULL is believed, as
//! in any C library.

use crate::guard::Guard;
use crate::host;
use crate::inside;
use crate::objects;
use crate::steps::{Kind, Step};
use crate::{failing, say, settings, system};
use kvmprep_model::dump::{ExternalTarget, VmDump};
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::invariants;
use kvmprep_model::units::{Privacy, Width};
use kvmprep_model::vm::Vm;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::size_of;
use std::sync::Arc;

/// `KVMPREP_MODEL_READ` and so on.
const READ: u32 = 1;
const WRITE: u32 = 2;
const FETCH: u32 = 3;
const COPY: u32 = 4;
const ACCEPT: u32 = 5;
const OUT: u32 = 6;
const HYPERCALL: u32 = 7;
const HALT: u32 = 8;
const LOOP: u32 = 9;

/// `KVMPREP_MODEL_STEP_PRIVATE` and so on.
const IS_PRIVATE: u32 = 1 << 0;
const IS_REPEATED: u32 = 1 << 1;
const IS_ANSWER: u32 = 1 << 2;

/// `struct kvmprep_model_step`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RawStep {
    kind: u32,
    flags: u32,
    gpa: u64,
    count: u64,
    stride: u64,
    width: u32,
    port: u32,
    value: u64,
    value_stride: u64,
    to: u64,
    to_stride: u64,
    args: [u64; 4],
    values: *mut u64,
}

/// `struct kvmprep_model_counts`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RawCounts {
    pages_4k: u64,
    pages_2m: u64,
    pages_1g: u64,
    external_pages: u64,
    gmem_pages: u64,
}

impl RawStep {
    fn step(&self) -> Result<Step> {
        let allowed = match self.kind {
            READ | WRITE | FETCH | COPY | ACCEPT => IS_PRIVATE,
            OUT => IS_ANSWER,
            HYPERCALL => IS_REPEATED,
            _ => 0,
        };
        if self.flags & !allowed != 0 {
            return Err(Errno::EINVAL);
        }
        let is_private = self.flags & IS_PRIVATE != 0;
        Ok(Step {
            kind: self.kind()?,
            privacy: if is_private { Privacy::Private } else { Privacy::Shared },
            gpa: self.gpa,
            count: self.count.max(1),
            stride: self.stride,
            width: match self.width {
                0 => Width::Four,
                bytes => Width::of_bytes(bytes.into()).ok_or(Errno::EINVAL)?,
            },
        })
    }

    fn kind(&self) -> Result<Kind> {
        Ok(match self.kind {
            READ => Kind::Read { values: (!self.values.is_null()).then_some(self.values as u64) },
            WRITE => Kind::Write { value: self.value, stride: self.value_stride },
            FETCH => Kind::Fetch,
            COPY => Kind::Copy { to: self.to, stride: self.to_stride },
            ACCEPT => Kind::Accept,
            OUT => Kind::Out {
                port: self.port.try_into().map_err(|_| Errno::EINVAL)?,
                value: match self.flags & IS_ANSWER {
                    0 => Some(self.value.try_into().map_err(|_| Errno::EINVAL)?),
                    _ => None,
                },
            },
            HYPERCALL => Kind::Hypercall {
                number: self.value,
                args: self.args,
                is_repeated: self.flags & IS_REPEATED != 0,
            },
            HALT => Kind::Halt,
            LOOP => Kind::Loop,
            _ => return Err(Errno::EINVAL),
        })
    }
}

/// Models another kernel.
///
/// # Safety
///
/// `name` is a string, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_set_kernel(name: *const c_char) -> c_int {
    // SAFETY: the caller's.
    answer(|| settings::set_kernel(unsafe { text(name) }?).map(|()| 0))
}

/// Offers other types of virtual machines.
///
/// # Safety
///
/// `names` is a string, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_set_vm_types(names: *const c_char) -> c_int {
    // SAFETY: the caller's.
    answer(|| settings::set_vm_types(unsafe { text(names) }?).map(|()| 0))
}

/// Has calls fail, or no more.
///
/// # Safety
///
/// `what` is a string, or NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_fail(what: *const c_char) -> c_int {
    answer(|| {
        // SAFETY: the caller's.
        let what = if what.is_null() { "" } else { unsafe { text(what) }? };
        let plans = failing::parse(what).map_err(|why| {
            say::line(format_args!("{why}"));
            Errno::EINVAL
        })?;
        if settings::plan(&plans).is_ok() {
            return Ok(0);
        }
        if plans.is_empty() {
            failing::clear(system::machine());
        }
        failing::arm(&plans, system::machine());
        Ok(0)
    })
}

/// Says what a vCPU's guest does from now on.
///
/// # Safety
///
/// There are `n` steps, and what their `values` point to may be written until they are done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_set_steps(vcpu_fd: c_int, steps: *const RawStep, n: usize) -> c_int {
    answer(|| {
        let vcpu = objects::vcpu(vcpu_fd).ok_or(Errno::EBADF)?;
        let raw = match n {
            0 => &[],
            _ if steps.is_null() => return Err(Errno::EFAULT),
            // SAFETY: the caller's.
            _ => unsafe { std::slice::from_raw_parts(steps, n) },
        };
        let steps: Vec<Step> = raw.iter().map(RawStep::step).collect::<Result<_>>()?;
        vcpu.set_steps(steps).map(|()| 0)
    })
}

/// Copies a confidential guest's measurement.
///
/// # Safety
///
/// At `digest`, `size` bytes may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_measurement(vm_fd: c_int, digest: *mut c_void, size: usize) -> c_int {
    answer(|| {
        let vm = vm(vm_fd)?;
        let measured = match (vm.tdx(), vm.snp()) {
            (Some(tdx), _) => tdx.measurement(),
            (_, Some(snp)) => snp.digest(),
            (None, None) => return Err(Errno::ENOTTY),
        };
        let measured = measured.ok_or(Errno(libc::ENODATA))?;
        if size < measured.len() {
            return Err(Errno::E2BIG);
        }
        // SAFETY: the caller's; there is room.
        unsafe { copy_out(&measured, digest.cast()) }?;
        Ok(measured.len() as c_int)
    })
}

/// Counts what is mapped, and what memory the guest has.
///
/// # Safety
///
/// At `counts`, `size` bytes may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_get_counts(vm_fd: c_int, counts: *mut c_void, size: usize) -> c_int {
    answer(|| {
        let vm = vm(vm_fd)?;
        let counted = counts_of(&vm);
        let mut bytes = [0; size_of::<RawCounts>()];
        let fields = [
            counted.pages_4k,
            counted.pages_2m,
            counted.pages_1g,
            counted.external_pages,
            counted.gmem_pages,
        ];
        for (part, field) in bytes.chunks_mut(size_of::<u64>()).zip(fields) {
            part.copy_from_slice(&field.to_ne_bytes());
        }
        let known = size.min(bytes.len());
        // SAFETY: the caller's; there is room for so much, and for zeroes after it.
        unsafe {
            copy_out(&bytes[..known], counts.cast())?;
            counts.cast::<u8>().add(known).write_bytes(0, size - known);
        }
        Ok(0)
    })
}

/// Writes page tables and all else down as text.
///
/// # Safety
///
/// At `text`, `size` bytes may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_dump(vm_fd: c_int, text: *mut c_char, size: usize) -> c_int {
    answer(|| {
        let vm = vm(vm_fd)?;
        // What the host has not told yet is told first.
        vm.statistics();
        // SAFETY: the caller's.
        unsafe { put_text(&VmDump::of(&vm).to_string(), text, size) }
    })
}

/// Looks whether all that must be true of a VM is.
///
/// # Safety
///
/// At `why`, `size` bytes may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvmprep_model_check(vm_fd: c_int, why: *mut c_char, size: usize) -> c_int {
    answer(|| {
        let vm = vm(vm_fd)?;
        vm.statistics();
        let host = host::process();
        let (broken, answer) = match invariants::check(&vm, &|hva| host.behind(hva)) {
            Ok(()) => (String::new(), Ok(0)),
            Err(broken) => (broken.to_string(), Err(Errno::EIO)),
        };
        // SAFETY: the caller's.
        unsafe { put_text(&broken, why, size) }.and(answer)
    })
}

fn counts_of(vm: &Vm) -> RawCounts {
    let pages = vm.statistics();
    let external = VmDump::of(vm).external.unwrap_or_default();
    RawCounts {
        pages_4k: pages.pages_4k,
        pages_2m: pages.pages_2m,
        pages_1g: pages.pages_1g,
        external_pages: external
            .iter()
            .filter(|entry| matches!(entry.target, ExternalTarget::Page { .. }))
            .count() as u64,
        gmem_pages: vm.guest_memfds().iter().map(|file| file.present_pages()).sum(),
    }
}

fn answer(act: impl FnOnce() -> Result<c_int>) -> c_int {
    let guard = Guard::enter();
    // Of a forked child's threads none would let go of the locks that others of its parent's held.
    let answer = if inside::is_forked() { Err(Errno::EIO) } else { act() };
    drop(guard);
    answer.unwrap_or_else(|errno| -errno.0)
}

fn vm(fd: c_int) -> Result<Arc<Vm>> {
    objects::vm(fd).map(|vm| vm.model().clone()).ok_or(Errno::EBADF)
}

/// A string of the program's: EFAULT for NULL, EINVAL for what is no text.
///
/// # Safety
///
/// It is a string, or NULL.
unsafe fn text<'a>(string: *const c_char) -> Result<&'a str> {
    if string.is_null() {
        return Err(Errno::EFAULT);
    }
    // SAFETY: the caller's.
    unsafe { CStr::from_ptr(string) }.to_str().map_err(|_| Errno::EINVAL)
}

/// As much of a text as there is room for, with a zero at the end; says how long it is as a whole.
///
/// # Safety
///
/// So many bytes may be written.
unsafe fn put_text(text: &str, to: *mut c_char, size: usize) -> Result<c_int> {
    if size > 0 {
        let mut known = text.as_bytes()[..text.len().min(size - 1)].to_vec();
        known.push(0);
        // SAFETY: the caller's.
        unsafe { copy_out(&known, to.cast()) }?;
    }
    Ok(text.len().min(c_int::MAX as usize) as c_int)
}

/// # Safety
///
/// As many bytes may be written there, or it is NULL.
unsafe fn copy_out(bytes: &[u8], to: *mut u8) -> Result<()> {
    if to.is_null() {
        return Err(Errno::EFAULT);
    }
    // SAFETY: the caller's; what is copied is the model's own.
    unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    fn step(kind: u32) -> RawStep {
        // SAFETY: it is numbers, and a pointer that may be null.
        RawStep { kind, ..unsafe { std::mem::zeroed() } }
    }

    #[test]
    fn the_structures_are_those_of_the_header() {
        assert_eq!(size_of::<RawStep>(), 112);
        assert_eq!((offset_of!(RawStep, width), offset_of!(RawStep, value)), (32, 40));
        assert_eq!((offset_of!(RawStep, args), offset_of!(RawStep, values)), (72, 104));
        assert_eq!(size_of::<RawCounts>(), 40);
    }

    #[test]
    fn a_step_has_what_its_kind_has_and_nothing_else() {
        let read = RawStep { flags: IS_PRIVATE, width: 8, ..step(READ) }.step().unwrap();
        assert_eq!((read.kind, read.privacy), (Kind::Read { values: None }, Privacy::Private));
        assert_eq!((read.width, read.count), (Width::Eight, 1));
        assert_eq!(step(WRITE).step().unwrap().width, Width::Four);
        let out = RawStep { flags: IS_ANSWER, ..step(OUT) }.step().unwrap();
        assert_eq!(out.kind, Kind::Out { port: 0, value: None });
        let wrong = [
            step(0),
            step(10),
            RawStep { width: 3, ..step(READ) },
            RawStep { flags: IS_ANSWER, ..step(READ) },
            RawStep { flags: IS_PRIVATE, ..step(HALT) },
            RawStep { flags: 1 << 3, ..step(WRITE) },
            RawStep { port: 1 << 16, ..step(OUT) },
            RawStep { value: 1 << 32, ..step(OUT) },
        ];
        assert!(wrong.iter().all(|step| step.step() == Err(Errno::EINVAL)));
    }

    #[test]
    fn texts_are_cut_where_there_is_no_room() {
        let mut room = [1 as c_char; 8];
        // SAFETY: there is as much room as is said.
        assert_eq!(unsafe { put_text("abcdef", room.as_mut_ptr(), 4) }, Ok(6));
        assert_eq!(room, [b'a' as c_char, b'b' as c_char, b'c' as c_char, 0, 1, 1, 1, 1]);
        // SAFETY: nothing is written.
        assert_eq!(unsafe { put_text("abcdef", std::ptr::null_mut(), 0) }, Ok(6));
    }

    #[test]
    fn what_is_none_of_the_models_is_ebadf() {
        // SAFETY: nothing is read or written.
        unsafe {
            assert_eq!(kvmprep_model_set_steps(0, std::ptr::null(), 0), -libc::EBADF);
            assert_eq!(kvmprep_model_measurement(-1, std::ptr::null_mut(), 0), -libc::EBADF);
            assert_eq!(kvmprep_model_dump(0, std::ptr::null_mut(), 0), -libc::EBADF);
            assert_eq!(kvmprep_model_set_kernel(std::ptr::null()), -libc::EFAULT);
            assert_eq!(kvmprep_model_set_kernel(c"5.4".as_ptr()), -libc::EINVAL);
        }
    }
}
