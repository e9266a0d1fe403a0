//! A vCPU with the smallest guest: flat 32-bit code of two instructions, which touches one word and says so on a port.
//!
//! One access is one KVM_RUN, or two where KVM has the VMM do it. The code is in a page of its own, which the guest has to
//! fetch, like any guest.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, ensure};
use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_UNKNOWN, KVM_VCPUEVENT_VALID_SMM,
    kvm_pre_fault_memory, kvm_regs, kvm_run, kvm_segment, kvm_sregs, kvm_vcpu_events,
};

use super::nested;
use super::statistics::Statistics;
use super::sys;
use crate::machine::Outcome;
use crate::operation::{CODE_GPA, MMIO_WORD};

const KVM_CREATE_VCPU: u64 = sys::io(0x41);
const KVM_RUN: u64 = sys::io(0x80);
const KVM_SET_REGS: u64 = sys::iow::<kvm_regs>(0x82);
pub(super) const KVM_GET_SREGS: u64 = sys::ior::<kvm_sregs>(0x83);
pub(super) const KVM_SET_SREGS: u64 = sys::iow::<kvm_sregs>(0x84);
/// Its number has the size of the first field alone.
const KVM_SET_SIGNAL_MASK: u64 = sys::iow::<u32>(0x8b);
const KVM_GET_VCPU_EVENTS: u64 = sys::ior::<kvm_vcpu_events>(0x9f);
const KVM_SET_VCPU_EVENTS: u64 = sys::iow::<kvm_vcpu_events>(0xa0);
const KVM_PRE_FAULT_MEMORY: u64 = sys::iowr::<kvm_pre_fault_memory>(0xd5);

const WRITE_AT: usize = 0;
const READ_AT: usize = 16;
const DONE_PORT: u16 = 0x10;

/// The guest's code page begins with this.
pub const CODE: [u8; 20] = {
    let mut code = [0xf4; 20]; // hlt
    let write = [0x89, 0x07, 0xe7, 0x10]; // mov %eax, (%edi); out %eax, $DONE_PORT
    let read = [0x8b, 0x07, 0xe7, 0x10]; // mov (%edi), %eax; out %eax, $DONE_PORT
    let mut at = 0;
    while at < 4 {
        code[WRITE_AT + at] = write[at];
        code[READ_AT + at] = read[at];
        at += 1;
    }
    code
};

/// Counters that a guest's faults and pre-faults move. Exits are not among them: timers make some.
const COUNTERS: [&str; 6] = ["pf_taken", "pf_fixed", "pf_emulate", "pf_spurious", "pf_fast", MMIO_SPTES];
const MMIO_SPTES: &str = "pf_mmio_spte_created";

/// No reason of KVM's: what stands in kvm_run until KVM writes there.
const NO_REASON: u32 = u32::MAX;

/// One vCPU.
pub struct Vcpu {
    fd: OwnedFd,
    run: Run,
    statistics: Statistics,
}

impl Vcpu {
    /// Makes one that is ready to touch memory, and to run guests of its own where there are such. `run_size` is
    /// KVM_GET_VCPU_MMAP_SIZE.
    pub fn new(vm: &OwnedFd, id: u64, run_size: usize, has_nested: bool) -> Result<Self> {
        let fd = sys::owned(sys::ioctl(vm, KVM_CREATE_VCPU, id))
            .map_err(|error| anyhow::anyhow!("KVM_CREATE_VCPU: {error}"))?;
        let run = Run::new(&fd, run_size)?;
        let statistics =
            Statistics::of(&fd, &COUNTERS).map_err(|error| anyhow::anyhow!("KVM_GET_STATS_FD: {error}"))?;
        if has_nested {
            nested::allow(&fd)?;
        }
        set_flat_mode(&fd)?;
        let_signals_through(&fd)?;
        Ok(Vcpu { fd, run, statistics })
    }

    /// KVM_PRE_FAULT_MEMORY.
    pub fn pre_fault(&mut self, gpa: u64, size: u64, flags: u64) -> Outcome {
        let mut range = kvm_pre_fault_memory { gpa, size, flags, padding: [0; 5] };
        self.run.set_reason(NO_REASON);
        let mut outcome = Outcome::of(self.pre_fault_for_some_time(&mut range));
        outcome.add_unsigned("gpa", range.gpa);
        outcome.add_unsigned("size", range.size);
        if self.run.reason() == KVM_EXIT_MEMORY_FAULT {
            self.add_memory_fault(&mut outcome);
        }
        outcome
    }

    /// The same while the guest runs one of its own.
    pub fn pre_fault_nested(&mut self, has_tables: bool, gpa: u64, size: u64) -> Outcome {
        let vcpu = self.fd.as_raw_fd();
        nested::within(vcpu, has_tables, || self.pre_fault(gpa, size, 0)).unwrap_or_else(Outcome::of)
    }

    /// A kernel may not come back from a pre-fault until there is a signal. What that leaves of a range that is being worked
    /// on is done by another call, and counts as one with it. Two that came to nothing would have gone on for ever.
    fn pre_fault_for_some_time(&self, range: &mut kvm_pre_fault_memory) -> i64 {
        let whole = range.size;
        const INTERRUPTED: i64 = -libc::EINTR as i64;
        let mut came_to_nothing = 0;
        loop {
            let before = range.size;
            let without_memory = self.statistics.get(MMIO_SPTES);
            let limit = Limit::begin(Limit::OF_PRE_FAULT);
            let answer = sys::ioctl_with(&self.fd, KVM_PRE_FAULT_MEMORY, range);
            let is_cut_off = limit.is_over();
            // It ended for want of memory, whether or not the time was over.
            let is_at_end = range.size == 0 || self.statistics.get(MMIO_SPTES) > without_memory;
            match answer {
                0 if is_cut_off && !is_at_end => {}
                INTERRUPTED if is_cut_off && came_to_nothing == 0 => came_to_nothing += 1,
                error @ ..0 => return if before < whole { 0 } else { error },
                _ => return answer,
            }
        }
    }

    /// Has the guest read or, with a word, write at an address.
    pub fn touch(&mut self, gpa: u64, word: Option<u32>) -> Outcome {
        let rip = CODE_GPA + if word.is_some() { WRITE_AT } else { READ_AT } as u64;
        let mut registers =
            kvm_regs { rip, rdi: gpa, rax: word.unwrap_or(0).into(), rflags: 2, ..Default::default() };
        let set = sys::ioctl_with(&self.fd, KVM_SET_REGS, &mut registers);
        if set < 0 {
            return Outcome::of(set);
        }
        let mut seen = Vec::new();
        let _limit = Limit::begin(Limit::OF_RUN);
        loop {
            // Before 6.8 an error leaves there what was there.
            self.run.set_reason(KVM_EXIT_UNKNOWN);
            let ran = sys::ioctl(&self.fd, KVM_RUN, 0);
            let reason = self.run.reason();
            if ran == 0 && reason == KVM_EXIT_MMIO && seen.is_empty() {
                seen = self.run.do_mmio();
                continue;
            }
            let mut outcome = Outcome::of(ran);
            seen.into_iter().for_each(|(name, value)| outcome.add(name, value));
            self.add_exit(&mut outcome, reason, word.is_none());
            return outcome;
        }
    }

    /// Has the guest read while there is a signal.
    pub fn touch_with_signal(&mut self, gpa: u64) -> Outcome {
        // SAFETY: the signal is blocked but for KVM_RUN, which ends for it (see `prepare_signals`).
        unsafe { libc::raise(libc::SIGUSR1) };
        let outcome = self.touch(gpa, None);
        let signal = user_signal();
        // SAFETY: a set of signals, of which the only one is pending; what is known of it is not asked for.
        unsafe { libc::sigwaitinfo(&raw const signal, std::ptr::null_mut()) };
        outcome
    }

    fn add_exit(&self, outcome: &mut Outcome, reason: u32, is_read: bool) {
        match reason {
            KVM_EXIT_IO if self.run.io_port() == DONE_PORT => {
                if is_read {
                    outcome.add("word", self.run.io_word().into());
                }
            }
            KVM_EXIT_MEMORY_FAULT => self.add_memory_fault(outcome),
            other => outcome.add("exit_reason", other.into()),
        }
    }

    fn add_memory_fault(&self, outcome: &mut Outcome) {
        let [flags, gpa, size] = self.run.memory_fault();
        outcome.add_unsigned("memory_fault.flags", flags);
        outcome.add_unsigned("memory_fault.gpa", gpa);
        outcome.add_unsigned("memory_fault.size", size);
    }

    /// Has the vCPU enter or leave SMM.
    pub fn set_smm(&mut self, is_in_smm: bool) -> i64 {
        let mut events = kvm_vcpu_events::default();
        let got = sys::ioctl_with(&self.fd, KVM_GET_VCPU_EVENTS, &mut events);
        if got < 0 {
            return got;
        }
        events.flags = KVM_VCPUEVENT_VALID_SMM;
        events.smi.smm = is_in_smm.into();
        sys::ioctl_with(&self.fd, KVM_SET_VCPU_EVENTS, &mut events)
    }

    /// Adds the counters.
    pub fn add_statistics(&self, outcome: &mut Outcome) {
        self.statistics.add(outcome);
    }
}

/// Ends a call of this thread that would not end, with EINTR.
struct Limit;

static IS_OVER: AtomicBool = AtomicBool::new(false);

impl Limit {
    /// An access goes through at once, or not at all.
    const OF_RUN: i64 = 10_000;
    /// A page takes less, though not on every machine.
    const OF_PRE_FAULT: i64 = 40;

    fn begin(milliseconds: i64) -> Self {
        IS_OVER.store(false, Ordering::Relaxed);
        Self::set(milliseconds);
        Limit
    }

    fn is_over(&self) -> bool {
        IS_OVER.load(Ordering::Relaxed)
    }

    fn set(milliseconds: i64) {
        let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let left = libc::timeval { tv_sec: milliseconds / 1000, tv_usec: milliseconds % 1000 * 1000 };
        let timer = libc::itimerval { it_interval: none, it_value: left };
        // SAFETY: a signal is asked for, which has a handler (see `catch_alarms`).
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        Self::set(0);
    }
}

extern "C" fn note_alarm(_: libc::c_int) {
    IS_OVER.store(true, Ordering::Relaxed);
}

/// Has an alarm interrupt a call, and nothing else; and blocks the signal that is for KVM_RUN alone.
pub fn prepare_signals() -> Result<()> {
    let signal = user_signal();
    // SAFETY: the handler sets a flag, so that it may run anywhere; what was blocked before is not asked for.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = note_alarm as extern "C" fn(libc::c_int) as usize;
        libc::sigprocmask(libc::SIG_BLOCK, &raw const signal, std::ptr::null_mut())
            | libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut())
    };
    ensure!(done == 0, "signals: {}", std::io::Error::last_os_error());
    Ok(())
}

fn user_signal() -> libc::sigset_t {
    // SAFETY: a set of bits, which is made empty and then has one.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        set
    }
}

/// `struct kvm_signal_mask` with the kernel's own set of signals.
#[repr(C, packed(4))]
struct SignalMask {
    size: u32,
    blocked: u64,
}

/// No signal is blocked while KVM_RUN runs.
fn let_signals_through(vcpu: &OwnedFd) -> Result<()> {
    let mask = SignalMask { size: size_of::<u64>() as u32, blocked: 0 };
    // SAFETY: the kernel reads the structure and as many bytes after its first field as that says.
    let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) };
    ensure!(done == 0, "KVM_SET_SIGNAL_MASK: {}", std::io::Error::last_os_error());
    Ok(())
}

fn set_flat_mode(vcpu: &OwnedFd) -> Result<()> {
    let mut registers = kvm_sregs::default();
    ensure!(sys::ioctl_with(vcpu, KVM_GET_SREGS, &mut registers) == 0, "KVM_GET_SREGS");
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    registers.cs = kvm_segment { selector: 8, type_: 11, ..data };
    for segment in
        [&mut registers.ds, &mut registers.es, &mut registers.fs, &mut registers.gs, &mut registers.ss]
    {
        *segment = data;
    }
    registers.cr0 |= 1;
    ensure!(sys::ioctl_with(vcpu, KVM_SET_SREGS, &mut registers) == 0, "KVM_SET_SREGS");
    Ok(())
}

/// The structure that KVM and its user share.
struct Run {
    at: *mut kvm_run,
    size: usize,
}

impl Run {
    fn new(vcpu: &OwnedFd, size: usize) -> Result<Self> {
        ensure!(size >= size_of::<kvm_run>(), "KVM's kvm_run is too small");
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), 0)
        };
        ensure!(at != libc::MAP_FAILED, "cannot map kvm_run: {}", std::io::Error::last_os_error());
        Ok(Run { at: at.cast(), size })
    }

    fn get(&self) -> &kvm_run {
        // SAFETY: mapped for as long as this lives, large enough, made of integers; KVM writes only in calls that this
        // thread makes.
        unsafe { &*self.at }
    }

    fn get_mut(&mut self) -> &mut kvm_run {
        // SAFETY: as above, and nobody else has it.
        unsafe { &mut *self.at }
    }

    fn reason(&self) -> u32 {
        self.get().exit_reason
    }

    fn set_reason(&mut self, reason: u32) {
        self.get_mut().exit_reason = reason;
    }

    fn io_port(&self) -> u16 {
        // SAFETY: integers, whatever the reason.
        unsafe { self.get().__bindgen_anon_1.io.port }
    }

    fn io_word(&self) -> u32 {
        // SAFETY: integers, whatever the reason; KVM says where in its mapping the word is.
        unsafe {
            let offset = self.get().__bindgen_anon_1.io.data_offset as usize;
            assert!(offset + 4 <= self.size);
            self.at.cast::<u8>().add(offset).cast::<u32>().read_unaligned()
        }
    }

    fn memory_fault(&self) -> [u64; 3] {
        // SAFETY: integers, whatever the reason.
        let fault = unsafe { &self.get().__bindgen_anon_1.memory_fault };
        [fault.flags, fault.gpa, fault.size]
    }

    /// Does what the guest asks of a device, and says what it asked.
    fn do_mmio(&mut self) -> Vec<(&'static str, i64)> {
        // SAFETY: integers, whatever the reason.
        let mmio = unsafe { &mut self.get_mut().__bindgen_anon_1.mmio };
        let mut seen = vec![
            ("mmio.gpa", mmio.phys_addr as i64),
            ("mmio.len", mmio.len.into()),
            ("mmio.is_write", mmio.is_write.into()),
        ];
        if mmio.is_write == 0 {
            mmio.data[..4].copy_from_slice(&MMIO_WORD.to_ne_bytes());
        } else {
            let [a, b, c, d, ..] = mmio.data;
            seen.push(("mmio.word", u32::from_ne_bytes([a, b, c, d]).into()));
        }
        seen
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // SAFETY: the mapping of this value alone.
        unsafe { libc::munmap(self.at.cast(), self.size) };
    }
}
