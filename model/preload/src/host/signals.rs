//! Signals of a thread that is in one of the model's ioctls.
//!
//! As in the kernel, they wait until the ioctl is over, but KVM asks now and then whether there are any, and ends early. Those
//! that a thread brings upon itself by what it executes are let through: they are bugs.

use std::cell::Cell;
use std::ffi::c_int;

use super::calls;

thread_local! {
    /// What the thread held back before; none while it is in no ioctl.
    static HELD_BACK: Cell<Option<u64>> = const { Cell::new(None) };
    /// Where the thread last met memory that has failed.
    static FAILED: Cell<u64> = const { Cell::new(0) };
    /// Where memory has failed of which the thread is told when it is out of the ioctl.
    static TOLD_OF: Cell<Option<u64>> = const { Cell::new(None) };
}

/// The memory at an address has failed.
pub fn note_failed_memory(address: u64) {
    FAILED.set(address);
}

/// Has the thread get SIGBUS for the memory that it met last, when it is out of the ioctl.
pub fn tell_of_failed_memory() {
    TOLD_OF.set(Some(FAILED.get()));
}

/// Those of a thread's own making, and the two that the C library keeps for itself.
const LET_THROUGH: u64 = of(libc::SIGSEGV)
    | of(libc::SIGBUS)
    | of(libc::SIGFPE)
    | of(libc::SIGILL)
    | of(libc::SIGTRAP)
    | of(libc::SIGSYS)
    | of(libc::SIGABRT)
    | of(32)
    | of(33);

const fn of(signal: c_int) -> u64 {
    1 << (signal - 1)
}

/// Held while a thread is in an ioctl. Signals that came meanwhile are handled as this is dropped, so it is dropped last: with
/// no lock held, and the thread out of the model again.
#[must_use]
pub struct Blocked {
    /// What is held back afterwards; nothing is to be done by a guard within another's time.
    mask: Option<u64>,
    before: Option<u64>,
}

impl Blocked {
    /// All signals wait. KVM sees those that the thread lets through.
    pub fn new() -> Self {
        Self::seeing(None)
    }

    /// All signals wait. KVM sees those that are not in this mask (KVM_SET_SIGNAL_MASK).
    pub fn with_mask(mask: u64) -> Self {
        Self::seeing(Some(mask))
    }

    fn seeing(kvms: Option<u64>) -> Self {
        let before = HELD_BACK.get();
        let mask = before.is_none().then(|| calls::change_signal_mask(libc::SIG_BLOCK, !LET_THROUGH));
        HELD_BACK.set(kvms.or(before).or(mask));
        Blocked { mask, before }
    }
}

impl Default for Blocked {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        HELD_BACK.set(self.before);
        if let Some(mask) = self.mask {
            if let Some(address) = TOLD_OF.take() {
                calls::send_memory_failed(address);
            }
            calls::change_signal_mask(libc::SIG_SETMASK, mask);
        }
    }
}

/// Whether the thread is in an ioctl and has a signal to handle (`signal_pending`).
pub fn is_pending() -> bool {
    HELD_BACK.get().is_some_and(|held_back| {
        let mut pending = calls::pending_signals() & !held_back;
        while pending != 0 {
            let signal = pending.trailing_zeros() as c_int + 1;
            if !is_ignored(signal) {
                return true;
            }
            pending &= pending - 1;
        }
        false
    })
}

/// What waits is kept even if it is to be ignored; KVM would never have heard of it.
fn is_ignored(signal: c_int) -> bool {
    const IGNORED_BY_DEFAULT: [c_int; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];
    match calls::disposition(signal) {
        libc::SIG_IGN => true,
        libc::SIG_DFL => IGNORED_BY_DEFAULT.contains(&signal),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::c_void;
    use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    static HANDLED: AtomicU32 = AtomicU32::new(0);

    extern "C" fn handle(_: c_int) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }

    fn raise(signal: c_int) {
        // SAFETY: it is this thread's own.
        unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
    }

    #[test]
    fn signals_wait_are_seen_and_then_handled() {
        // SAFETY: the handler only counts.
        unsafe { libc::signal(libc::SIGUSR2, handle as extern "C" fn(c_int) as usize) };
        assert!(!is_pending());
        {
            let _blocked = Blocked::new();
            assert!(!is_pending());
            raise(libc::SIGCHLD);
            raise(libc::SIGWINCH);
            assert!(!is_pending(), "nobody handles those");
            raise(libc::SIGUSR2);
            assert!(is_pending());
            {
                let _unseen = Blocked::with_mask(of(libc::SIGUSR2));
                assert!(!is_pending());
            }
            assert!(is_pending());
            assert_eq!(HANDLED.load(Ordering::Relaxed), 0);
        }
        assert!(!is_pending());
        assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
    }

    static FAILED_AT: AtomicU64 = AtomicU64::new(0);

    extern "C" fn handle_failed(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel gives it to handlers of this kind.
        let (address, code) = unsafe { ((*info).si_addr() as u64, (*info).si_code) };
        assert_eq!(code, libc::BUS_MCEERR_AR);
        FAILED_AT.store(address, Ordering::Relaxed);
    }

    #[test]
    fn of_memory_that_has_failed_the_thread_is_told_afterwards() {
        // SAFETY: the handler only notes; what it was before is there again afterwards.
        unsafe {
            let [mut action, mut before]: [libc::sigaction; 2] = std::mem::zeroed();
            action.sa_flags = libc::SA_SIGINFO;
            action.sa_sigaction =
                handle_failed as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
            libc::sigaction(libc::SIGBUS, &action, &mut before);
            {
                let _blocked = Blocked::new();
                note_failed_memory(0x7000);
                tell_of_failed_memory();
                drop(Blocked::new());
                assert_eq!(FAILED_AT.load(Ordering::Relaxed), 0);
            }
            assert_eq!(FAILED_AT.swap(0, Ordering::Relaxed), 0x7000);
            drop(Blocked::new());
            assert_eq!(FAILED_AT.load(Ordering::Relaxed), 0, "once");
            libc::sigaction(libc::SIGBUS, &before, std::ptr::null_mut());
        }
    }

    #[test]
    fn what_the_thread_holds_back_itself_kvm_does_not_see() {
        let held_back = of(libc::SIGUSR1);
        let before = calls::change_signal_mask(libc::SIG_BLOCK, held_back);
        {
            let _blocked = Blocked::new();
            raise(libc::SIGUSR1);
            assert!(!is_pending());
            let _seen = Blocked::with_mask(0);
            assert!(is_pending());
        }
        // SAFETY: what waits is thrown away.
        unsafe { libc::signal(libc::SIGUSR1, libc::SIG_IGN) };
        calls::change_signal_mask(libc::SIG_SETMASK, before);
    }
}
