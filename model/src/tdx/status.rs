//! What the TDX module answers, in its own numbers.
//!
//! The upper half of a status says what is wrong, the lower half with which operand. KVM compares upper halves only.

use std::fmt;

/// The status of a call into the TDX module.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub u64);

/// With which operand something is wrong: the lower half of a status.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Operand {
    /// Register RCX, mostly the guest's address.
    Rcx = 1,
    /// Register R8, mostly a frame.
    R8 = 8,
    /// The state that is saved for a guest.
    Xfam = 0x41,
    /// What was chosen of a guest's CPUID.
    CpuidConfig = 0x45,
    /// The secure EPT.
    Sept = 0x92,
    /// The count by which flushes are tracked.
    Epoch = 0xa9,
}

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)*) => {
        impl Status {
            $($(#[$doc])* pub const $name: Status = Status($number << 32);)*

            fn name(self) -> Option<&'static str> {
                match self.kind() {
                    $(Status::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// The guest is dead.
    NON_RECOVERABLE_TD = 0x4000_0002;
    /// Someone else holds what is needed.
    OPERAND_BUSY = 0x8000_0200;
    /// vCPUs still run that entered before the last but one count of flushes.
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201;
    /// There is no random number to be had for a key just now.
    RND_NO_ENTROPY = 0x8000_0203;
    /// An operand makes no sense.
    OPERAND_INVALID = 0xc000_0100;
    /// A frame is not what it has to be; mostly, it is already in use.
    PAGE_METADATA_INCORRECT = 0xc000_0300;
    /// Frames still belong to the guest.
    TD_ASSOCIATED_PAGES_EXIST = 0xc000_0400;
    /// Not at this time of the guest's life.
    LIFECYCLE_STATE_INCORRECT = 0xc000_0607;
    /// Not before, or not after, the guest was finalized.
    OP_STATE_INCORRECT = 0xc000_0608;
    /// The guest has no vCPUs.
    NO_VCPUS = 0xc000_0609;
    /// The secure EPT has no table for that address.
    EPT_WALK_FAILED = 0xc000_0b00;
    /// No page is mapped there.
    EPT_ENTRY_NOT_PRESENT = 0xc000_0b03;
    /// What is to be removed was not blocked.
    GPA_RANGE_NOT_BLOCKED = 0xc000_0b06;
    /// It was blocked before.
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0b07;
    /// vCPUs may still use what is to be removed.
    TLB_TRACKING_NOT_DONE = 0xc000_0b08;
    /// The guest has accepted the page before.
    PAGE_ALREADY_ACCEPTED = 0x0000_0b0a;
    /// The page is smaller than the guest accepts.
    PAGE_SIZE_MISMATCH = 0xc000_0b0b;
    /// The entry is not in a state that allows this.
    EPT_ENTRY_STATE_INCORRECT = 0xc000_0b0d;
    /// The table still has entries.
    EPT_PAGE_NOT_FREE = 0xc000_0b0e;
    /// There is no such value of a guest to be read.
    METADATA_FIELD_ID_INCORRECT = 0xc000_0c00;
}

impl Status {
    /// With the operand that it is about.
    pub const fn of(self, operand: Operand) -> Self {
        Status(self.0 | operand as u64)
    }

    /// What is wrong, without the operand.
    pub const fn kind(self) -> Self {
        Status(self.0 & !0xffff_ffff)
    }

    /// Trying again may help.
    pub const fn is_busy(self) -> bool {
        self.kind().0 == Status::OPERAND_BUSY.0
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:#x})", self.0),
            None => write!(f, "{:#x}", self.0),
        }
    }
}
