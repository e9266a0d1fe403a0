//! The stage-2 stage: KVM's page tables for the guest, filled by `KVM_PRE_FAULT_MEMORY`.
//!
//! One vCPU, one range, until nothing is left or a reason to stop. Every answer that the ioctl can give is
//! sorted here, once: what to repeat, what to hand to another vCPU, what ends the work.

use crate::error::{Error, Reason, Stage};
use crate::kvm::{Errno, Kernel};
use crate::range::{PAGE, Range};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

/// How a pre-fault ended. Each but `Done` carries what is left.
#[derive(Debug)]
pub enum Outcome {
    /// All of it is mapped.
    Done,
    /// A signal came.
    Interrupted(Range),
    /// This vCPU cannot, now: it is in SMM or runs a nested guest, or its VM is not finalised.
    VcpuRefused(Range),
    /// This kernel has no such ioctl.
    Unavailable(Range),
    /// The caller's patience said stop.
    Stopped(Range),
    /// Anything else.
    Failed(Range, Error),
}

/// How a worker bears with refusals that pass.
pub trait Patience {
    /// Whether a signal ends the call. It does not on a thread whose signals are blocked: an `EINTR` there is the
    /// kernel's way of saying "again".
    fn yields_to_signals(&self) -> bool;
    /// Waits before the next try.
    fn pause(&self, length: Duration) -> Pause;
    /// Whether a pre-fault may begin now; where it may, [`Patience::end`] follows it.
    fn may_begin(&self) -> bool {
        true
    }
    /// A pre-fault is over.
    fn end(&self) {}
}

/// How a pause ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Try again.
    Over,
    /// Stop trying.
    Stop,
    /// A signal came to a thread that yields to them.
    Signal,
}

/// The shortest and longest pause, and how long all may last together. A slot's deletion takes milliseconds; two
/// seconds are for a host that is swapping.
const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_millis(10);
const PATIENCE: Duration = Duration::from_secs(2);

/// Maps `range` through `vcpu`.
pub fn pre_fault(kernel: &dyn Kernel, vcpu: RawFd, range: Range, patience: &dyn Patience) -> Outcome {
    let mut rest = range;
    let mut pause = SHORTEST;
    let mut refused_since: Option<Instant> = None;
    let mut fell_short = false;
    loop {
        // The kernel says 0 as soon as it has mapped one page, also when a signal has stopped it: whether it was
        // one, the next page tells.
        let is_question = std::mem::take(&mut fell_short) && patience.yields_to_signals();
        let asked = if is_question { Range { start: rest.start, end: rest.start + PAGE } } else { rest };
        let answer = patience.may_begin().then(|| {
            let answer = kernel.pre_fault(vcpu, asked);
            patience.end();
            answer
        });
        let why = match answer {
            None => Delay::ChangeAnnounced,
            Some(answer) => match answer {
                Ok(None) if asked == rest => return Outcome::Done,
                Ok(None) => return Outcome::Interrupted(Range { start: asked.end, end: rest.end }),
                Ok(Some(left)) if left.start > rest.start => {
                    rest.start = left.start;
                    fell_short = true;
                    (pause, refused_since) = (SHORTEST, None);
                    continue;
                }
                // No progress and no error: as good as "again".
                Ok(Some(_)) => Delay::NoProgress,
                Err(errno) => match errno.0 {
                    libc::EINTR if patience.yields_to_signals() => return Outcome::Interrupted(rest),
                    libc::EINTR => Delay::Interrupted,
                    libc::EAGAIN => Delay::SlotChanges,
                    libc::EOPNOTSUPP => return Outcome::VcpuRefused(rest),
                    // What an unknown ioctl answers: EINVAL from KVM on x86-64, ENOTTY from others. The arguments
                    // were checked before and cannot be what is invalid.
                    libc::ENOTTY | libc::ENOSYS | libc::EINVAL if is_vcpu(kernel, vcpu) => {
                        return Outcome::Unavailable(rest);
                    }
                    _ => return Outcome::Failed(rest, explain(errno, vcpu, rest)),
                },
            },
        };
        if refused_since.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
            return Outcome::Failed(rest, why.gave_up(rest));
        }
        match patience.pause(pause) {
            Pause::Over => {}
            Pause::Stop => return Outcome::Stopped(rest),
            Pause::Signal => return Outcome::Interrupted(rest),
        }
        pause = (pause * 2).min(LONGEST);
    }
}

/// Whether the descriptor is not known to be something else than a vCPU.
pub fn is_vcpu(kernel: &dyn Kernel, fd: RawFd) -> bool {
    kernel.file_name(fd).is_none_or(|name| name.contains("kvm-vcpu"))
}

/// Why a pre-fault is to be tried again.
#[derive(Clone, Copy, Debug)]
enum Delay {
    /// The VMM has announced a slot's change, and none may begin.
    ChangeAnnounced,
    /// KVM sees a slot change.
    SlotChanges,
    /// KVM was interrupted, on a thread that no signal reaches.
    Interrupted,
    /// KVM did nothing, and said nothing.
    NoProgress,
}

impl Delay {
    /// What it means when patience has ended.
    fn gave_up(self, rest: Range) -> Error {
        let (cause, hint) = match self {
            Delay::ChangeAnnounced => (
                "a memslot's change was announced and has not been noted",
                "note each announced change with kvmprep_memslot_note before populating",
            ),
            Delay::SlotChanges => (
                "its memslot is being deleted or moved",
                "pre-fault while no slot is deleted or moved; a handle sees to it where changes are announced and noted",
            ),
            Delay::Interrupted => (
                "the kernel gives up on it again and again, as it does for memory that is broken hardware",
                "look for a memory error in the kernel's log; discard the page",
            ),
            Delay::NoProgress => ("the kernel maps nothing and gives no reason", "call again"),
        };
        Error::new(
            libc::EAGAIN,
            Reason::RetriesExhausted,
            format!("guest {rest} stayed unmappable for two seconds: {cause}"),
        )
        .stage(Stage::Stage2)
        .range(rest)
        .hint(hint)
    }
}

fn explain(errno: Errno, vcpu: RawFd, rest: Range) -> Error {
    let (reason, message, hint) = match errno.0 {
        libc::ENOENT => (
            Reason::NoMemslot,
            format!("KVM has no memslot at guest address {:#x}", rest.start),
            "tell the handle of every slot change (kvmprep_memslot_note) and announce deletions before they happen",
        ),
        libc::EFAULT => (
            Reason::NoHostMapping,
            format!("KVM cannot reach the memory behind guest address {:#x}", rest.start),
            "check that the slot's memory is mapped, that its guest_memfd is open, and its file long enough",
        ),
        libc::EHWPOISON => (
            Reason::Poisoned,
            format!("the page behind guest address {:#x} is broken hardware", rest.start),
            "discard the page, or give the guest other memory",
        ),
        libc::ENOMEM | libc::ENOSPC => (
            Reason::MemoryShortage,
            format!("no memory for the page tables or pages of guest address {:#x}", rest.start),
            "free memory on the host, or raise the cgroup's limit",
        ),
        libc::EIO => (
            Reason::VmDead,
            "the VM is dead, or belongs to another process".to_string(),
            "use the VM in the process that made it; a dead VM must be made anew",
        ),
        libc::EBADF | libc::ENOTTY | libc::EINVAL | libc::ENOSYS => {
            (Reason::BadFd, format!("descriptor {vcpu} is not a vCPU"), "pass what KVM_CREATE_VCPU returned")
        }
        _ => (Reason::KernelRefused, format!("pre-faulting guest {rest}: {errno}"), ""),
    };
    let code = if errno.0 == libc::ENOSPC { libc::ENOMEM } else { errno.0 };
    Error::new(code, reason, message).stage(Stage::Stage2).range(rest).hint(hint)
}
