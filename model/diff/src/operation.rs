//! What a program may do: to the host's memory, to the VM, and inside the guest.
//!
//! An operation says what is done by numbers alone, addresses among them, so that it means the same on every machine
//! and when it is run again. It must never depend on what came of an earlier one: whoever takes one out of a program,
//! as the shrinker does, has a program again.

use kvmprep_model::personality::VmType;

/// Bytes in a page.
pub const PAGE: u64 = 4096;
/// The largest memslot that a program has the kernel take.
pub const LARGEST_SLOT: u64 = 1 << 30;
/// Bytes in a huge page.
pub const FRAME: u64 = 2 << 20;

/// Places in the process's address space where a program maps memory, each for itself.
pub const AREAS: usize = 3;
/// How much a program may map in one.
pub const AREA_SIZE: u64 = 4 * FRAME;
/// Huge pages in the machine's pool: for every area at once, twice, since a private mapping that a fork has copied takes as
/// many again.
pub const POOL_PAGES: u64 = 2 * AREAS as u64 * AREA_SIZE / FRAME;
const ARENA: u64 = 0x1000_0000_0000;
/// Where one begins after another.
pub const AREA_STRIDE: u64 = 1 << 30;

/// Where the guest's code is, for the guest.
pub const CODE_GPA: u64 = 0;
/// Where the guest's code is, for the process; never touched by a program.
pub const CODE_HVA: u64 = ARENA - AREA_STRIDE;
/// A page of the process that nobody else has, for its own purposes.
pub const SPARE_HVA: u64 = CODE_HVA + AREA_STRIDE / 2;
/// Where huge pages are promised to nobody's use.
pub const PROMISED_HVA: u64 = CODE_HVA - AREA_STRIDE;
/// The slot of the guest's code, in each address space.
pub const CODE_SLOT: u32 = 500;
/// The most vCPUs that a program uses.
pub const VCPUS: usize = 2;
/// What a read of an address without memory answers.
pub const MMIO_WORD: u32 = 0x0bad_cafe;

/// Where an area begins.
pub const fn area_start(area: usize) -> u64 {
    ARENA + area as u64 * AREA_STRIDE
}

/// The area that an address lies in, if it does in any.
pub fn area_of(hva: u64) -> Option<usize> {
    let area = usize::try_from(hva.checked_sub(ARENA)? / AREA_STRIDE).ok()?;
    (area < AREAS && hva < area_start(area) + AREA_SIZE).then_some(area)
}

/// What memory is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Anonymous and private.
    Anonymous,
    /// Anonymous and shared.
    AnonymousShared,
    /// A new memfd, shared.
    MemfdShared,
    /// A new memfd, private.
    MemfdPrivate,
    /// Huge pages of 2 MiB, private.
    HugetlbPrivate,
    /// A new memfd of huge pages of 2 MiB, shared.
    HugetlbShared,
    /// A guest_memfd, shared, from so many bytes on.
    GuestMemfd {
        /// Which.
        file: usize,
        /// From where on.
        offset: u64,
    },
}

/// What madvise is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Advice {
    DontNeed,
    Remove,
    PopulateRead,
    PopulateWrite,
    HugePage,
    NoHugePage,
    Collapse,
    DontFork,
    DoFork,
}

impl Advice {
    /// Its name in C.
    pub fn name(self) -> &'static str {
        match self {
            Advice::DontNeed => "MADV_DONTNEED",
            Advice::Remove => "MADV_REMOVE",
            Advice::PopulateRead => "MADV_POPULATE_READ",
            Advice::PopulateWrite => "MADV_POPULATE_WRITE",
            Advice::HugePage => "MADV_HUGEPAGE",
            Advice::NoHugePage => "MADV_NOHUGEPAGE",
            Advice::Collapse => "MADV_COLLAPSE",
            Advice::DontFork => "MADV_DONTFORK",
            Advice::DoFork => "MADV_DOFORK",
        }
    }
}

/// What mprotect is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Protection {
    None,
    Read,
    ReadWrite,
}

/// A file descriptor that a memslot is given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileReference {
    /// No file descriptor at all.
    Bad,
    /// One of something else.
    Other,
    /// A guest_memfd that another VM made.
    OfAnotherVm,
    /// The guest_memfd that was created as the nth; a bad one if that failed or it is closed.
    GuestMemfd(usize),
}

/// Which vCPU.
pub type VcpuIndex = usize;

/// One operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum Operation {
    /// mmap over a whole area, whose earlier memory goes.
    Map {
        at: u64,
        size: u64,
        backing: Backing,
    },
    Unmap {
        at: u64,
        size: u64,
    },
    Advise {
        at: u64,
        size: u64,
        advice: Advice,
    },
    Protect {
        at: u64,
        size: u64,
        protection: Protection,
    },
    /// The process writes a word.
    Store {
        at: u64,
        word: u32,
    },
    /// The process reads a word.
    Load {
        at: u64,
    },
    /// fallocate of the area's memfd, with FALLOC_FL_PUNCH_HOLE.
    Punch {
        area: usize,
        offset: u64,
        size: u64,
    },
    /// fallocate of the area's memfd.
    Allocate {
        area: usize,
        offset: u64,
        size: u64,
    },
    /// A child is made, which holds all memory and does nothing.
    Fork,
    /// That child ends.
    Reap,

    /// KVM_SET_USER_MEMORY_REGION, or 2 where there is a `file` or it `is_second`.
    SetRegion {
        slot: u32,
        flags: u32,
        gpa: u64,
        size: u64,
        hva: u64,
        file: FileReference,
        offset: u64,
        is_second: bool,
    },
    GetDirtyLog {
        slot: u32,
    },
    /// KVM_CLEAR_DIRTY_LOG, with a bitmap of which every word has these bits.
    ClearDirtyLog {
        slot: u32,
        first_page: u64,
        pages: u32,
        bits: u64,
    },
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    ProtectDirtyLog {
        how: u64,
    },
    CreateFile {
        size: u64,
        flags: u64,
    },
    CloseFile {
        file: usize,
    },
    /// fallocate of a guest_memfd, with KEEP_SIZE where `keep_size`.
    PunchFile {
        file: usize,
        offset: u64,
        size: u64,
        keep_size: bool,
    },
    AllocateFile {
        file: usize,
        offset: u64,
        size: u64,
        keep_size: bool,
    },
    SetAttributes {
        address: u64,
        size: u64,
        attributes: u64,
        flags: u64,
    },
    /// KVM_CAP_DISABLE_QUIRKS2.
    DisableQuirks {
        quirks: u64,
    },
    /// KVM_CHECK_EXTENSION of the VM.
    CheckExtension {
        cap: u32,
    },

    PreFault {
        vcpu: VcpuIndex,
        gpa: u64,
        size: u64,
        flags: u64,
    },
    /// The same from within a guest of the guest's, which it stops then. It has page tables of its own, or none.
    PreFaultNested {
        vcpu: VcpuIndex,
        has_tables: bool,
        gpa: u64,
        size: u64,
    },
    SetSmm {
        vcpu: VcpuIndex,
        is_in_smm: bool,
    },
    GuestRead {
        vcpu: VcpuIndex,
        gpa: u64,
    },
    GuestWrite {
        vcpu: VcpuIndex,
        gpa: u64,
        word: u32,
    },
    /// The guest would read, but there is a signal, which KVM_RUN lets through.
    GuestInterrupted {
        vcpu: VcpuIndex,
        gpa: u64,
    },
}

impl Operation {
    /// Its name, for counting.
    pub fn name(&self) -> &'static str {
        match self {
            Operation::Map { .. } => "mmap",
            Operation::Unmap { .. } => "munmap",
            Operation::Advise { advice, .. } => advice.name(),
            Operation::Protect { .. } => "mprotect",
            Operation::Store { .. } => "store",
            Operation::Load { .. } => "load",
            Operation::Punch { .. } => "punch",
            Operation::Allocate { .. } => "allocate",
            Operation::Fork => "fork",
            Operation::Reap => "reap",
            Operation::SetRegion { .. } => "set_region",
            Operation::GetDirtyLog { .. } => "get_dirty_log",
            Operation::ClearDirtyLog { .. } => "clear_dirty_log",
            Operation::ProtectDirtyLog { .. } => "protect_dirty_log",
            Operation::CreateFile { .. } => "create_guest_memfd",
            Operation::CloseFile { .. } => "close_guest_memfd",
            Operation::PunchFile { .. } => "punch_guest_memfd",
            Operation::AllocateFile { .. } => "allocate_guest_memfd",
            Operation::SetAttributes { .. } => "set_attributes",
            Operation::DisableQuirks { .. } => "disable_quirks",
            Operation::CheckExtension { .. } => "check_extension",
            Operation::PreFault { .. } => "pre_fault",
            Operation::PreFaultNested { .. } => "pre_fault_nested",
            Operation::SetSmm { .. } => "set_smm",
            Operation::GuestRead { .. } => "guest_read",
            Operation::GuestWrite { .. } => "guest_write",
            Operation::GuestInterrupted { .. } => "guest_interrupted",
        }
    }
}

/// The machine's policy for transparent huge pages of anonymous memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub enum ThpPolicy {
    Always,
    Advised,
    Never,
}

impl ThpPolicy {
    /// Its name in sysfs.
    pub fn name(self) -> &'static str {
        match self {
            ThpPolicy::Always => "always",
            ThpPolicy::Advised => "madvise",
            ThpPolicy::Never => "never",
        }
    }
}

/// What a program finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Setting {
    /// What kind of VM.
    pub vm_type: VmType,
    /// When memory is huge.
    pub thp: ThpPolicy,
    /// How many huge pages of the pool somebody else has promised to him.
    pub promised_elsewhere: u64,
}

/// Operations on a machine of their own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Program {
    /// What they find.
    pub setting: Setting,
    /// In this order.
    pub operations: Vec<Operation>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_has_its_addresses_and_no_others() {
        assert_eq!(area_of(area_start(1)), Some(1));
        assert_eq!(area_of(area_start(1) + AREA_SIZE - 1), Some(1));
        assert_eq!(area_of(area_start(1) + AREA_SIZE), None);
        assert_eq!(area_of(area_start(AREAS)), None);
        assert_eq!(area_of(CODE_HVA), None);
    }
}
