//! The firmware of the secure processor as KVM sees it: what it keeps of a guest, and what it answers to each command.
//!
//! It takes frames only in the state that its own rules want, and only while the guest is launched. It knows nothing of KVM.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use super::measurement::LaunchDigest;
use super::rmp::Rmp;
use crate::confidential::{Digest, Failures};
use crate::host::{HostMemory, Page};
use crate::sync::plain::{Mutex, MutexGuard};
use crate::units::{PAGE_SIZE, Pfn};

/// What the firmware answers, in its own numbers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FirmwareError(pub u32);

impl FirmwareError {
    /// `SEV_RET_INVALID_GUEST_STATE`: the guest is launched already.
    pub const INVALID_GUEST_STATE: FirmwareError = FirmwareError(2);
    /// `SEV_RET_POLICY_FAILURE`.
    pub const POLICY_FAILURE: FirmwareError = FirmwareError(7);
    /// `SEV_RET_INACTIVE`: the guest has no number.
    pub const INACTIVE: FirmwareError = FirmwareError(8);
    /// `SEV_RET_BAD_MEASUREMENT`: the image is not the one that its owner has signed.
    pub const BAD_MEASUREMENT: FirmwareError = FirmwareError(11);
    /// `SEV_RET_INVALID_PARAM`: of a CPUID page, that it promises what the processor does not have.
    pub const INVALID_PARAM: FirmwareError = FirmwareError(0x16);
    /// `SEV_RET_INVALID_PAGE_STATE`.
    pub const INVALID_PAGE_STATE: FirmwareError = FirmwareError(0x1a);
    /// `SEV_RET_INVALID_PAGE_OWNER`.
    pub const INVALID_PAGE_OWNER: FirmwareError = FirmwareError(0x1c);
}

/// A page that is one word and zeros after it.
pub(super) fn page_of(word: u64) -> Page {
    let mut page = [0; PAGE_SIZE as usize];
    page[..8].copy_from_slice(&word.to_le_bytes());
    page
}

/// The commands, by their names.
#[allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Operation {
    GctxCreate,
    LaunchStart,
    Activate,
    LaunchUpdate,
    LaunchFinish,
    PageReclaim,
}

/// Of what kind a page of an initial image is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum PageType {
    /// Copied and measured.
    Normal = 1,
    /// Zeroed.
    Zero = 3,
    /// Copied, but what it holds is not measured.
    Unmeasured = 4,
    /// Filled by the firmware.
    Secrets = 5,
    /// Copied, if the firmware agrees with every value.
    Cpuid = 6,
}

impl PageType {
    /// The type of a number.
    pub const fn of_number(number: u8) -> Option<Self> {
        match number {
            1 => Some(PageType::Normal),
            3 => Some(PageType::Zero),
            4 => Some(PageType::Unmeasured),
            5 => Some(PageType::Secrets),
            6 => Some(PageType::Cpuid),
            _ => None,
        }
    }
}

/// What the model's firmware fills a page of secrets with.
pub const SECRETS: u64 = u64::from_le_bytes(*b"secrets!");

/// What the firmware answers.
pub type Answer<T> = Result<T, FirmwareError>;

/// The firmware of one machine.
pub struct Firmware {
    host: Arc<dyn HostMemory>,
    rmp: Arc<Rmp>,
    /// The bits that a CPUID page may have.
    cpuid: u64,
    failures: Failures<Operation, FirmwareError>,
    numbers: Mutex<Numbers>,
}

#[derive(Default)]
struct Numbers {
    /// The last that was new.
    last: u32,
    given_back: BTreeSet<u32>,
    available: u32,
}

/// A guest as the firmware keeps it.
#[derive(Debug, Default)]
pub struct Context(Mutex<Guest>);

#[derive(Debug, Default)]
struct Guest {
    stage: Stage,
    asid: Option<u32>,
    digest: LaunchDigest,
}

/// How far a guest is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Stage {
    #[default]
    Created,
    Launching,
    Running,
}

impl Firmware {
    /// The firmware of a machine that has numbers for so many guests, and finds these bits of a CPUID page good.
    pub fn new(host: Arc<dyn HostMemory>, rmp: Arc<Rmp>, guests: u32, cpuid: u64) -> Arc<Self> {
        let numbers = Mutex::new(Numbers { available: guests, ..Numbers::default() });
        Arc::new(Firmware { host, rmp, cpuid, failures: Failures::default(), numbers })
    }

    /// Commands that are to fail.
    pub fn failures(&self) -> &Failures<Operation, FirmwareError> {
        &self.failures
    }

    /// The machine's table of frames.
    pub fn rmp(&self) -> &Arc<Rmp> {
        &self.rmp
    }

    /// A number for a new guest, if there is one: none that was given back, while there are others. (KVM's own doing, but one a
    /// machine.)
    pub fn new_asid(&self) -> Option<u32> {
        let mut numbers = lock(&self.numbers);
        if numbers.last == numbers.available {
            return numbers.given_back.pop_first();
        }
        numbers.last += 1;
        Some(numbers.last)
    }

    /// The guest of that number has gone (`sev_asid_free`).
    pub fn give_asid_back(&self, asid: u32) {
        lock(&self.numbers).given_back.insert(asid);
    }

    /// SNP_GCTX_CREATE.
    pub fn gctx_create(&self) -> Answer<Arc<Context>> {
        self.failures.check(Operation::GctxCreate)?;
        Ok(Arc::default())
    }

    /// SNP_LAUNCH_START.
    pub fn launch_start(&self, guest: &Context) -> Answer<()> {
        self.failures.check(Operation::LaunchStart)?;
        let mut guest = guest.lock();
        if guest.stage != Stage::Created {
            return Err(FirmwareError::INVALID_GUEST_STATE);
        }
        guest.stage = Stage::Launching;
        Ok(())
    }

    /// SNP_ACTIVATE.
    pub fn activate(&self, guest: &Context, asid: u32) -> Answer<()> {
        self.failures.check(Operation::Activate)?;
        guest.lock().asid = Some(asid);
        Ok(())
    }

    /// SNP_LAUNCH_UPDATE: takes a page into the image. It has to be the firmware's, and is the guest's afterwards, who need
    /// not validate it.
    ///
    /// A CPUID page with which the firmware does not agree is left as it should be.
    pub fn launch_update(&self, guest: &Context, pfn: Pfn, kind: PageType) -> Answer<()> {
        self.failures.check(Operation::LaunchUpdate)?;
        let mut guest = guest.lock();
        if guest.stage != Stage::Launching {
            return Err(FirmwareError::INVALID_GUEST_STATE);
        }
        let asid = guest.asid.ok_or(FirmwareError::INACTIVE)?;
        let entry = self.rmp.lookup(pfn).filter(|entry| entry.is_immutable);
        let entry = entry.ok_or(FirmwareError::INVALID_PAGE_STATE)?;
        if entry.asid != asid {
            return Err(FirmwareError::INVALID_PAGE_OWNER);
        }
        self.fill(pfn, kind)?;
        guest.digest.add_page(kind, entry.gfn.gpa(), &self.host.page(pfn));
        self.rmp.by_firmware(pfn, |entry| {
            if let Some(entry) = entry {
                entry.is_immutable = false;
                entry.is_validated = true;
            }
        });
        Ok(())
    }

    fn fill(&self, pfn: Pfn, kind: PageType) -> Answer<()> {
        match kind {
            PageType::Normal | PageType::Unmeasured => {}
            PageType::Zero => self.host.set_page(pfn, &page_of(0)),
            PageType::Secrets => self.host.set_page(pfn, &page_of(SECRETS)),
            PageType::Cpuid => {
                let asked = self.host.load(pfn);
                if asked & !self.cpuid != 0 {
                    self.host.store(pfn, asked & self.cpuid);
                    return Err(FirmwareError::INVALID_PARAM);
                }
            }
        }
        Ok(())
    }

    /// SNP_LAUNCH_UPDATE of a vCPU's own page.
    pub fn launch_update_vcpu(&self, guest: &Context) -> Answer<()> {
        self.failures.check(Operation::LaunchUpdate)?;
        let mut guest = guest.lock();
        if guest.stage != Stage::Launching {
            return Err(FirmwareError::INVALID_GUEST_STATE);
        }
        guest.digest.add_vcpu();
        Ok(())
    }

    /// SNP_LAUNCH_FINISH: the image is complete, and is the one that `signed` says, if that is said.
    pub fn launch_finish(&self, guest: &Context, signed: Option<&Digest>) -> Answer<()> {
        self.failures.check(Operation::LaunchFinish)?;
        let mut guest = guest.lock();
        if guest.stage != Stage::Launching {
            return Err(FirmwareError::INVALID_GUEST_STATE);
        }
        if signed.is_some_and(|signed| *signed != guest.digest.0) {
            return Err(FirmwareError::BAD_MEASUREMENT);
        }
        guest.stage = Stage::Running;
        Ok(())
    }

    /// SNP_PAGE_RECLAIM: gives up a frame that is not yet the guest's.
    pub fn page_reclaim(&self, pfn: Pfn) -> Answer<()> {
        self.failures.check(Operation::PageReclaim)?;
        self.rmp.by_firmware(pfn, |entry| match entry {
            Some(entry) => {
                entry.is_immutable = false;
                Ok(())
            }
            None => Err(FirmwareError::INVALID_PAGE_STATE),
        })
    }
}

impl Context {
    /// What was measured so far.
    pub fn digest(&self) -> Digest {
        self.lock().digest.0
    }

    fn lock(&self) -> MutexGuard<'_, Guest> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
