//! Every kind of call that the memory side of KVM makes to anyone else, each of which can be made to fail: to the host, to the
//! TDX module, to the SNP firmware, and the instruction that changes the table of frames.
//!
//! Nothing here knows what a failure should come to, but for one thing: which may end a virtual machine.

use kvmprep_model::confidential::Failures;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::host::{FileFrames, FollowError, HostLayer, HostMemory, HostPage};
use kvmprep_model::personality::VmType;
use kvmprep_model::snp::{Firmware, FirmwareError, Operation, rmp::Rmp, rmp::RmpUpdate};
use kvmprep_model::tdx::{Module, Seamcall, Status};
use kvmprep_model::units::{Hva, Pfn};
use std::sync::Arc;

/// A call that fails, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Failure {
    /// `get_user_pages`.
    Follow(FollowError),
    /// A page for a guest_memfd, of which there is none.
    Frame,
    /// A guest_memfd.
    File,
    Module(Seamcall, Status),
    Firmware(Operation, FirmwareError),
    /// RMPUPDATE.
    Entry,
}

const SEAMCALLS: [Seamcall; 16] = [
    Seamcall::MngCreate,
    Seamcall::MngInit,
    Seamcall::MngKeyFreeid,
    Seamcall::VpCreate,
    Seamcall::VpInit,
    Seamcall::VpEnter,
    Seamcall::MemSeptAdd,
    Seamcall::MemPageAdd,
    Seamcall::MemPageAug,
    Seamcall::MemPageRemove,
    Seamcall::MemRangeBlock,
    Seamcall::MemTrack,
    Seamcall::MrExtend,
    Seamcall::MrFinalize,
    Seamcall::PhymemPageReclaim,
    Seamcall::PhymemPageWbinvd,
];

const COMMANDS: [Operation; 6] = [
    Operation::GctxCreate,
    Operation::LaunchStart,
    Operation::Activate,
    Operation::LaunchUpdate,
    Operation::LaunchFinish,
    Operation::PageReclaim,
];

impl Failure {
    /// All that there are for a type of virtual machine.
    pub fn all_of(vm_type: VmType) -> Vec<Failure> {
        let follow = [FollowError::NoMapping, FollowError::Interrupted, FollowError::Poisoned];
        let mut all: Vec<Failure> = follow.map(Failure::Follow).into();
        all.extend([Failure::Frame, Failure::File]);
        match vm_type {
            VmType::Tdx => {
                let ways = [Status::OPERAND_BUSY, Status::OPERAND_INVALID];
                all.extend(
                    SEAMCALLS.iter().flat_map(|call| ways.map(|status| Failure::Module(*call, status))),
                );
            }
            VmType::Snp => {
                let refused = FirmwareError::INVALID_PAGE_STATE;
                all.extend(COMMANDS.map(|command| Failure::Firmware(command, refused)));
                all.push(Failure::Entry);
            }
            VmType::Default | VmType::SwProtected => {}
        }
        all
    }

    /// Whether it is of a call by which a virtual machine is made.
    pub fn is_of_making(self) -> bool {
        use Seamcall::{MngCreate, MngInit, VpCreate, VpInit};
        matches!(self, Failure::Module(MngCreate | MngInit | VpCreate | VpInit, _))
    }

    /// What has to fail first, so that there is such a call.
    pub fn prerequisite(self) -> Option<Failure> {
        let is_reclaim = matches!(self, Failure::Firmware(Operation::PageReclaim, _));
        is_reclaim.then_some(Failure::Firmware(Operation::LaunchUpdate, FirmwareError::INVALID_PAGE_STATE))
    }

    /// Whether KVM has to live with it.
    pub fn is_harmless(self) -> bool {
        use Seamcall::{
            MemPageAdd, MemPageAug, MemPageRemove, MemRangeBlock, MemSeptAdd, MemTrack, MrFinalize,
        };
        match self {
            Failure::Module(
                MemSeptAdd | MemPageAdd | MemPageAug | MemPageRemove | MemRangeBlock | MemTrack | MrFinalize,
                status,
            ) => status.is_busy(),
            Failure::Module(..) | Failure::Firmware(Operation::PageReclaim, _) => false,
            Failure::Follow(_) | Failure::Frame | Failure::File | Failure::Firmware(..) | Failure::Entry => {
                true
            }
        }
    }
}

/// What is asked of the host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum HostCall {
    Follow,
    Frame,
    File,
}

/// Everyone whom calls are made to.
#[derive(Clone)]
pub struct Agents {
    host: Arc<Failures<HostCall, Option<FollowError>>>,
    pub module: Option<Arc<Module>>,
    pub firmware: Option<Arc<Firmware>>,
    /// What is planned and has not happened.
    planned: Vec<Failure>,
}

impl Agents {
    pub fn new(module: Option<Arc<Module>>, firmware: Option<Arc<Firmware>>) -> Self {
        Agents { host: Arc::default(), module, firmware, planned: Vec::new() }
    }

    /// A host that does as another, but for what is planned.
    pub fn failing(&self, host: Arc<dyn HostMemory>) -> Arc<dyn HostMemory> {
        Arc::new(FailingHost { host, failures: self.host.clone() })
    }

    /// The `nth` such call from now on fails, unless one is to fail already.
    pub fn plan(&mut self, failure: Failure, nth: u64) {
        if self.is_planned(failure) {
            return;
        }
        match failure {
            Failure::Follow(error) => self.host.fail(HostCall::Follow, nth, Some(error)),
            Failure::Frame => self.host.fail(HostCall::Frame, nth, None),
            Failure::File => self.host.fail(HostCall::File, nth, None),
            Failure::Module(call, status) => self.module().failures().fail(call, nth, status),
            Failure::Firmware(command, error) => self.firmware().failures().fail(command, nth, error),
            Failure::Entry => self.rmp().failures().fail(RmpUpdate, nth, ()),
        }
        self.planned.push(failure);
    }

    /// What has happened of what was planned, since it was last asked.
    pub fn struck(&mut self) -> Vec<Failure> {
        if self.planned.is_empty() {
            return Vec::new();
        }
        let (planned, struck) =
            std::mem::take(&mut self.planned).into_iter().partition(|f| self.is_planned(*f));
        self.planned = planned;
        struck
    }

    /// What was planned of the module that there was will not happen: there is another.
    pub fn replace_module(&mut self, module: Arc<Module>) {
        self.module = Some(module);
        self.planned.retain(|failure| !matches!(failure, Failure::Module(..)));
    }

    pub fn has_planned_of_module(&self) -> bool {
        self.planned.iter().any(|failure| matches!(failure, Failure::Module(..)))
    }

    /// Whether a call of the kind is to fail, this way or another.
    fn is_planned(&self, failure: Failure) -> bool {
        match failure {
            Failure::Follow(_) => self.host.is_planned(HostCall::Follow),
            Failure::Frame => self.host.is_planned(HostCall::Frame),
            Failure::File => self.host.is_planned(HostCall::File),
            Failure::Module(call, _) => self.module().failures().is_planned(call),
            Failure::Firmware(command, _) => self.firmware().failures().is_planned(command),
            Failure::Entry => self.rmp().failures().is_planned(RmpUpdate),
        }
    }

    fn module(&self) -> &Module {
        self.module.as_deref().expect("only of TDX guests are such failures planned")
    }

    fn firmware(&self) -> &Firmware {
        self.firmware.as_deref().expect("only of SNP guests are such failures planned")
    }

    fn rmp(&self) -> &Rmp {
        self.firmware().rmp()
    }
}

struct FailingHost {
    host: Arc<dyn HostMemory>,
    failures: Arc<Failures<HostCall, Option<FollowError>>>,
}

impl HostLayer for FailingHost {
    fn below(&self) -> &dyn HostMemory {
        &*self.host
    }

    fn follow(&self, hva: Hva, write: bool) -> std::result::Result<HostPage, FollowError> {
        self.failures.check(HostCall::Follow).map_err(|error| error.unwrap_or(FollowError::NoMapping))?;
        self.host.follow(hva, write)
    }

    fn new_file(&self, pages: u64) -> Result<Box<dyn FileFrames>> {
        self.failures.check(HostCall::File).map_err(|_| Errno::ENOMEM)?;
        let frames = self.host.new_file(pages)?;
        Ok(Box::new(FailingFrames { frames, failures: self.failures.clone() }))
    }
}

struct FailingFrames {
    frames: Box<dyn FileFrames>,
    failures: Arc<Failures<HostCall, Option<FollowError>>>,
}

impl FileFrames for FailingFrames {
    fn allocate(&self, index: u64) -> Result<Pfn> {
        self.failures.check(HostCall::Frame).map_err(|_| Errno::ENOMEM)?;
        self.frames.allocate(index)
    }

    fn release(&self, index: u64) {
        self.frames.release(index);
    }
}
