//! The one error type.
//!
//! An [`Error`] answers a person's three questions: what was wrong, where, and what to do. It never decides
//! anything; whoever raises it knows what it means.

use crate::kvm::Errno;
use crate::range::Range;
use std::borrow::Cow;

/// Declares the reasons once: number, constant, stable name.
macro_rules! reasons {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        /// Why a call failed, as a stable number and name. The C header documents each.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        #[allow(missing_docs, reason = "documented where C reads them, in abi::error")]
        pub enum Reason { $($name = $number,)* }

        impl Reason {
            /// Every reason there is.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// Its stable name, NUL-terminated for C.
            pub fn name(self) -> &'static std::ffi::CStr {
                match self { $(Reason::$name => $text,)* }
            }
        }
    };
}

reasons! {
    None = 0, c"none";
    NullPointer = 1, c"null-pointer";
    MisalignedPointer = 2, c"misaligned-pointer";
    StructSize = 3, c"struct-size";
    UnknownFlags = 4, c"unknown-flags";
    BadValue = 5, c"bad-value";
    ReservedNotZero = 6, c"reserved-not-zero";
    BadFd = 7, c"bad-fd";
    RangeEmpty = 8, c"range-empty";
    RangeUnaligned = 9, c"range-unaligned";
    RangeOverflow = 10, c"range-overflow";
    RangeBeyondGuest = 11, c"range-beyond-guest";
    NoMemslot = 12, c"no-memslot";
    MemslotOverlap = 13, c"memslot-overlap";
    MemslotChanging = 14, c"memslot-changing";
    MemslotUserfaultfd = 15, c"memslot-userfaultfd";
    MemslotDirtyLogged = 16, c"memslot-dirty-logged";
    MemslotDevice = 17, c"memslot-device";
    NoHostMapping = 18, c"no-host-mapping";
    HostMappingReadOnly = 19, c"host-mapping-read-only";
    HugetlbShortage = 20, c"hugetlb-shortage";
    MemoryShortage = 21, c"memory-shortage";
    Poisoned = 22, c"poisoned";
    KernelRefused = 23, c"kernel-refused";
    NoStage2 = 24, c"no-stage2";
    VcpuRefused = 25, c"vcpu-refused";
    Interrupted = 26, c"interrupted";
    RetriesExhausted = 27, c"retries-exhausted";
    TimedOut = 28, c"timed-out";
    Cancelled = 29, c"cancelled";
    Busy = 30, c"busy";
    Panicked = 31, c"panicked";
    VmDead = 32, c"vm-dead";
    ThreadFailed = 33, c"thread-failed";
    NotFinished = 34, c"not-finished";
    MemslotNumber = 35, c"memslot-number";
    MemslotAbsent = 36, c"memslot-absent";
    MemslotFixed = 37, c"memslot-fixed";
    MemslotTooLarge = 38, c"memslot-too-large";
    HvaNotUser = 39, c"hva-not-user";
    MemslotBeyondHost = 40, c"memslot-beyond-host";
    SharedBit = 41, c"shared-bit";
    GmemNotOne = 42, c"gmem-not-one";
    GmemTooShort = 43, c"gmem-too-short";
    GmemOtherVm = 44, c"gmem-other-vm";
    GmemBound = 45, c"gmem-bound";
    FlagsUnsupported = 46, c"flags-unsupported";
    MemslotMisaligned = 47, c"memslot-misaligned";
    RangeInexact = 48, c"range-inexact";
    NoGmem = 49, c"no-gmem";
    NoPrivateMemory = 50, c"no-private-memory";
    ConvertTooLarge = 51, c"convert-too-large";
    CallbackFailed = 52, c"callback-failed";
    Claimed = 53, c"claimed";
    NotClaimed = 54, c"not-claimed";
    NotPrivate = 55, c"not-private";
    Sealed = 56, c"sealed";
    NotSealed = 57, c"not-sealed";
    GmemUnused = 58, c"gmem-unused";
    GmemElsewhere = 59, c"gmem-elsewhere";
    WouldDeadlock = 60, c"would-deadlock";
    FirmwareRefused = 61, c"firmware-refused";
}

/// Where in the work something failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stage {
    /// No stage of populating: an argument, a handle.
    None = 0,
    /// A slot was being checked or set.
    Memslot = 1,
    /// The host's own page tables.
    Host = 2,
    /// The guest's stage-2 page tables.
    Stage2 = 3,
    /// Memory was becoming private or shared.
    Attributes = 4,
    /// Memory that is out of sight was being given up.
    Drop = 5,
    /// The initial image was being made.
    Launch = 6,
}

/// What was wrong, where, and what to do.
#[derive(Clone, Debug)]
pub struct Error {
    /// The positive errno whose negative the C function returns.
    pub errno: i32,
    /// The stable reason.
    pub reason: Reason,
    /// The stage of the work.
    pub stage: Stage,
    /// The slot concerned, with its address space in the upper half.
    pub slot: Option<u32>,
    /// The other slot concerned, as in an overlap.
    pub other_slot: Option<u32>,
    /// The guest range concerned.
    pub range: Option<Range>,
    /// The code of a confidential VM's firmware; 0 where there is none.
    pub firmware: u64,
    /// One sentence: what was wrong.
    pub message: String,
    /// One sentence: what to do.
    pub hint: Cow<'static, str>,
}

/// What fallible library code returns.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of no particular place.
    pub fn new(errno: i32, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            errno,
            reason,
            stage: Stage::None,
            slot: None,
            other_slot: None,
            range: None,
            firmware: 0,
            message: message.into(),
            hint: Cow::Borrowed(""),
        }
    }

    /// A bad argument: `EINVAL`.
    pub fn invalid(reason: Reason, message: impl Into<String>) -> Self {
        Self::new(libc::EINVAL, reason, message)
    }

    /// KVM's own refusal of `what`, where no better reason is known.
    pub fn kernel(errno: Errno, what: &str) -> Self {
        let error = Self::system(errno, what);
        if errno.0 != libc::EIO {
            return error;
        }
        Self { reason: Reason::VmDead, ..error }
            .hint("the VM is dead, or belongs to another process (after fork, use it in the parent only)")
    }

    /// The refusal of `what` by a part of the kernel that knows nothing of VMs.
    pub fn system(errno: Errno, what: &str) -> Self {
        let (reason, hint) = match errno.0 {
            libc::EBADF => {
                (Reason::BadFd, "pass a file descriptor that is open and of the kind the call needs")
            }
            libc::EINTR => (Reason::Interrupted, "call again: nothing was lost"),
            libc::EMFILE | libc::ENFILE => (Reason::KernelRefused, "raise the limit on open files"),
            libc::ENOMEM => (
                Reason::KernelRefused,
                "free memory on the host, or raise the cgroup's limit, and call again",
            ),
            libc::EPERM | libc::EACCES => {
                (Reason::KernelRefused, "see what forbids it: permissions, seals, a seccomp filter")
            }
            _ => (Reason::KernelRefused, "see the kernel's log, remove the cause, and call again"),
        };
        Self::new(errno.0, reason, format!("{what}: {errno}")).hint(hint)
    }

    /// Says what to do.
    pub fn hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Says in which stage.
    pub fn stage(mut self, stage: Stage) -> Self {
        self.stage = stage;
        self
    }

    /// Says which slot.
    pub fn slot(mut self, slot: u32) -> Self {
        self.slot = Some(slot);
        self
    }

    /// Says which other slot.
    pub fn other_slot(mut self, slot: u32) -> Self {
        self.other_slot = Some(slot);
        self
    }

    /// Says which guest range.
    pub fn range(mut self, range: Range) -> Self {
        self.range = Some(range);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_names_are_distinct_and_numbers_dense() {
        let mut names: Vec<_> = Reason::ALL.iter().map(|r| r.name()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Reason::ALL.len());
        for (number, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, number);
        }
    }
}
