//! The commands by which the VMM makes an SNP guest (KVM_MEMORY_ENCRYPT_OP), and how KVM gives it frames afterwards.
//!
//! Each check stands where the kernel has it, since the VMM sees which one comes first. What was done before an error stays
//! done. Locks of slots and vCPUs are the virtual machine's; here is only said when they are taken.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};

use super::firmware::{Answer, Context, Firmware, FirmwareError, PageType};
use super::rmp::{Refusal, Rmp};
use crate::confidential::image::{self, Source};
use crate::confidential::{Digest, Held, ImageTarget, User};
use crate::errno::{Errno, Result};
use crate::host::{HostMemory, Page};
use crate::personality::Personality;
use crate::sync::plain::{Mutex, MutexGuard, OnceLock};
use crate::units::{Gfn, Hva, PAGE_SIZE, Pfn};

/// The guest may run with hyperthreading.
pub const POLICY_SMT: u64 = 1 << 16;
/// Must be one.
pub const POLICY_RESERVED_ONE: u64 = 1 << 17;
/// The guest may run on one socket only.
const POLICY_SINGLE_SOCKET: u64 = 1 << 20;
/// Versions of the firmware's interface, hyperthreading, the reserved one, debugging, a single socket.
const POLICY_KNOWN: u64 = 0xffff | POLICY_SMT | POLICY_RESERVED_ONE | 1 << 19 | POLICY_SINGLE_SOCKET;
/// KVM_SEV_INIT and KVM_SEV_ES_INIT.
const INIT: u32 = 0;
const ES_INIT: u32 = 1;
/// The last command for guests without SNP. Of those in between, these have a number and nothing that they do:
/// KVM_SEV_SEND_UPDATE_VMSA, KVM_SEV_RECEIVE_UPDATE_VMSA and KVM_SEV_CERT_EXPORT.
const SEND_CANCEL: u32 = 21;
const NUMBERS_ALONE: [u32; 3] = [10, 14, 19];
/// The newest protocol between guest and KVM.
const GHCB_VERSION_MAX: u16 = 2;

/// `struct kvm_sev_cmd`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Command {
    /// Which command, and what it points to.
    pub call: Call,
    /// The descriptor is one of the firmware's device.
    pub is_firmware_fd: bool,
    /// What the firmware said.
    pub error: u32,
}

/// A command, and what its `data` is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Call {
    /// KVM_SEV_INIT2.
    Init2(User<Init2>),
    /// KVM_SEV_SNP_LAUNCH_START.
    LaunchStart(User<LaunchStart>),
    /// KVM_SEV_SNP_LAUNCH_UPDATE.
    LaunchUpdate(User<LaunchUpdate>),
    /// KVM_SEV_SNP_LAUNCH_FINISH.
    LaunchFinish(User<LaunchFinish>),
    /// A command for guests without SNP, by its number; or a number below those of SNP's own that has no command.
    Older(u32),
    /// Any other.
    Other(u32),
}

impl Call {
    /// The command that makes it.
    pub const fn command(self) -> Command {
        Command { call: self, is_firmware_fd: true, error: 0 }
    }
}

/// `struct kvm_sev_init`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Init2 {
    /// None are known here.
    pub vmsa_features: u64,
    /// None are known.
    pub flags: u32,
    /// The protocol between guest and KVM; 0 for the newest.
    pub ghcb_version: u16,
}

/// `struct kvm_sev_snp_launch_start`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaunchStart {
    /// What may be done to the guest.
    pub policy: u64,
    /// None are known.
    pub flags: u16,
}

impl Default for LaunchStart {
    fn default() -> Self {
        LaunchStart { policy: POLICY_SMT | POLICY_RESERVED_ONE, flags: 0 }
    }
}

/// `struct kvm_sev_snp_launch_update`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaunchUpdate {
    /// As what the guest has the first page.
    pub gfn_start: u64,
    /// Where the pages are copied from.
    pub uaddr: u64,
    /// How many bytes.
    pub len: u64,
    /// Of what kind they are ([`PageType`]).
    pub page_type: u8,
    /// None are known.
    pub flags: u16,
}

/// `struct kvm_sev_snp_launch_finish`, as far as it matters here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LaunchFinish {
    /// What the guest's owner says of it.
    pub id_block: Option<IdBlock>,
    /// None are known.
    pub flags: u16,
}

/// What a guest's owner has signed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IdBlock {
    /// The launch digest that the guest must have. None at NULL.
    pub digest: Option<User<Digest>>,
    /// The signature. It is always good. None at NULL.
    pub signature: Option<User<()>>,
}

/// What commands ask of the virtual machine.
pub trait SnpTarget: ImageTarget {
    /// Which kernel it is of.
    fn personality(&self) -> &Personality;

    /// Takes the lock of its slots.
    fn lock_slots(&self) -> Box<dyn Held + '_>;

    /// Takes the locks of all its vCPUs. EINTR when the thread is killed while it waits.
    fn lock_vcpus(&self) -> Result<Box<dyn Held + '_>>;

    /// How many vCPUs it has.
    fn vcpus(&self) -> usize;
}

/// An SNP guest (`struct kvm_sev_info`).
pub struct Snp {
    firmware: Arc<Firmware>,
    /// The virtual machine's own lock, for everything here: one command at a time.
    launch: Mutex<Launch>,
    /// The guest's number, once KVM_SEV_INIT2 has been.
    asid: OnceLock<u32>,
    is_pre_fault_allowed: AtomicBool,
    /// So many vCPUs, in the order in which they were made, have state that is the guest's.
    measured_vcpus: AtomicUsize,
    on_bug: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Launch {
    context: Option<Arc<Context>>,
}

impl Snp {
    /// A guest of which nothing is known yet. `on_bug` is called when the virtual machine is dead.
    pub fn new(firmware: Arc<Firmware>, on_bug: impl Fn() + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Snp {
            firmware,
            launch: Mutex::default(),
            asid: OnceLock::new(),
            is_pre_fault_allowed: AtomicBool::new(false),
            measured_vcpus: AtomicUsize::new(0),
            on_bug: Box::new(on_bug),
        })
    }

    /// The machine's firmware.
    pub fn firmware(&self) -> &Arc<Firmware> {
        &self.firmware
    }

    /// The guest's number, once KVM_SEV_INIT2 has been.
    pub fn asid(&self) -> Option<u32> {
        self.asid.get().copied()
    }

    /// Its image is complete: other memory may be pre-faulted.
    pub fn is_pre_fault_allowed(&self) -> bool {
        self.is_pre_fault_allowed.load(Ordering::Acquire)
    }

    /// Whether a vCPU, by how many were made before it, has state that is the guest's. No other can be let into the guest.
    pub fn has_measured(&self, vcpu: usize) -> bool {
        vcpu < self.measured_vcpus.load(Ordering::Acquire)
    }

    /// What was measured.
    pub fn digest(&self) -> Option<Digest> {
        self.launch().context.as_ref().map(|context| context.digest())
    }

    /// A private frame is about to be mapped (`sev_gmem_make_private`): it becomes the guest's, who has to validate it.
    pub fn make_private(&self, gfn: Gfn, pfn: Pfn) -> Result<()> {
        let Some(asid) = self.asid() else { return Ok(()) };
        let rmp = self.firmware.rmp();
        if rmp.lookup(pfn).is_some() {
            return Ok(());
        }
        rmp.make_private(pfn, gfn, asid, false).map_err(|_| Errno::EINVAL)
    }

    /// The guest takes a private page, or gives it up (PVALIDATE). That it was so already is its own matter. A guest that has
    /// no number yet has no frames either, and nobody asks whose they are.
    pub fn validate(&self, gfn: Gfn, pfn: Pfn, is_validated: bool) -> std::result::Result<(), Refusal> {
        let Some(asid) = self.asid() else { return Ok(()) };
        self.firmware.rmp().validate(pfn, gfn, asid, is_validated).map(drop)
    }

    /// The guest accesses a page that it means to be private.
    pub fn check_private_access(&self, gfn: Gfn, pfn: Pfn) -> std::result::Result<(), Refusal> {
        let Some(asid) = self.asid() else { return Ok(()) };
        self.firmware.rmp().check_guest(pfn, gfn, asid)
    }

    /// The guest writes to a page that it means to be shared. (What it reads there is not looked at.)
    pub fn check_shared_write(&self, pfn: Pfn) -> std::result::Result<(), Refusal> {
        if self.firmware.rmp().is_hosts(pfn) { Ok(()) } else { Err(Refusal::NotTheGuests) }
    }

    /// The machine's table of frames.
    pub fn rmp(&self) -> &Arc<Rmp> {
        self.firmware.rmp()
    }

    /// KVM_MEMORY_ENCRYPT_OP (`sev_mem_enc_ioctl`). Without a command it asks whether there is SEV.
    pub fn command(&self, target: &dyn SnpTarget, argument: Option<&mut User<Command>>) -> Result<()> {
        let Some(argument) = argument else { return Ok(()) };
        let mut command = argument.copy_in()?;
        let mut launch = self.launch();
        if self.asid().is_some() && matches!(command.call, Call::Init2(_) | Call::Older(_)) {
            return Err(Errno::EPERM);
        }
        let mut fw =
            Commands { firmware: &self.firmware, is_fd_good: command.is_firmware_fd, error: command.error };
        let answer = match &mut command.call {
            Call::Init2(parameters) => self.init2(target, parameters),
            Call::LaunchStart(parameters) => self.launch_start(target, &mut launch, &mut fw, parameters),
            Call::LaunchUpdate(parameters) => self.launch_update(target, &launch, &mut fw, parameters),
            Call::LaunchFinish(parameters) => self.launch_finish(target, &launch, &mut fw, parameters),
            Call::Older(INIT | ES_INIT) => Err(Errno::EINVAL),
            Call::Older(number) if *number > SEND_CANCEL || NUMBERS_ALONE.contains(number) => {
                return Err(Errno::EINVAL);
            }
            Call::Older(_) => Err(Errno::ENOTTY),
            Call::Other(_) => return Err(Errno::EINVAL),
        };
        command.error = fw.error;
        argument.copy_out(command)?;
        answer
    }

    fn init2(&self, target: &dyn SnpTarget, parameters: &User<Init2>) -> Result<()> {
        let parameters = parameters.copy_in()?;
        if target.vcpus() != 0
            || parameters.flags != 0
            || parameters.vmsa_features != 0
            || parameters.ghcb_version > GHCB_VERSION_MAX
            || parameters.ghcb_version == 1 && target.personality().snp_wants_second_ghcb_version()
        {
            return Err(Errno::EINVAL);
        }
        let asid = self.firmware.new_asid().ok_or(Errno::EBUSY)?;
        self.asid.get_or_init(|| asid);
        Ok(())
    }

    fn launch_start(
        &self,
        target: &dyn SnpTarget,
        launch: &mut Launch,
        fw: &mut Commands<'_>,
        parameters: &User<LaunchStart>,
    ) -> Result<()> {
        let asid = self.asid().ok_or(Errno::ENOTTY)?;
        let LaunchStart { policy, flags } = parameters.copy_in()?;
        if launch.context.is_some() || flags != 0 || !is_policy_good(target.personality(), policy) {
            return Err(Errno::EINVAL);
        }
        let context = fw.issue(|firmware| firmware.gctx_create()).map_err(|_| Errno::ENOTTY)?;
        fw.issue(|firmware| firmware.launch_start(&context))?;
        fw.issue(|firmware| firmware.activate(&context, asid))?;
        launch.context = Some(context);
        Ok(())
    }

    fn launch_update(
        &self,
        target: &dyn SnpTarget,
        launch: &Launch,
        fw: &mut Commands<'_>,
        argument: &mut User<LaunchUpdate>,
    ) -> Result<()> {
        let context = launch.context.as_deref().ok_or(Errno::EINVAL)?;
        let mut update = argument.copy_in()?;
        let (kind, source) = check_update(target.personality(), &update)?;
        let _slots = target.lock_slots();
        let start = Gfn(update.gfn_start);
        // That there is a file is a check of its own; that it was closed is found only with the first page.
        if target.backed_pages(start) == Err(Errno::EINVAL) {
            return Err(Errno::EINVAL);
        }
        let mut page_fw = Commands { error: 0, ..*fw };
        let mut add = |gfn: Gfn, pfn, frame| {
            let source =
                source.zip(frame).map(|(Source { hva, .. }, frame)| (hva.plus_pages(gfn.0 - start.0), frame));
            self.add_page(target, context, &mut page_fw, kind, gfn, pfn, source)
        };
        let done =
            image::populate(target, start, source, update.len / PAGE_SIZE, &mut add).map_err(|_| {
                fw.error = page_fw.error;
                Errno::EIO
            })?;
        update.gfn_start += done;
        update.len -= done * PAGE_SIZE;
        if kind != PageType::Zero {
            update.uaddr += done * PAGE_SIZE;
        }
        argument.copy_out(update)
    }

    /// `sev_gmem_post_populate`: one page of the image. A frame with which it fails is the host's again, as it was.
    #[allow(clippy::too_many_arguments)]
    fn add_page(
        &self,
        target: &dyn SnpTarget,
        context: &Context,
        fw: &mut Commands<'_>,
        kind: PageType,
        gfn: Gfn,
        pfn: Pfn,
        source: Option<(Hva, Pfn)>,
    ) -> Result<()> {
        let (rmp, host) = (self.firmware.rmp(), target.host());
        if rmp.lookup(pfn).is_some() {
            return Err(Errno::EEXIST);
        }
        let before = host.page(pfn);
        if let Some((hva, source)) = source {
            host.set_page(pfn, &read_source(host, hva, source)?);
        }
        let asid = self.asid().ok_or(Errno::EINVAL)?;
        let answer = rmp.make_private(pfn, gfn, asid, true).and_then(|()| {
            let answer = fw.issue(|firmware| firmware.launch_update(context, pfn, kind));
            let is_corrected = kind == PageType::Cpuid && fw.error == FirmwareError::INVALID_PARAM.0;
            if answer.is_err() && self.reclaim(pfn).is_ok() && is_corrected {
                write_back(host, source, &host.page(pfn));
            }
            answer
        });
        if answer.is_err() {
            host.set_page(pfn, &before);
        }
        answer
    }

    /// `snp_page_reclaim`. A frame that the firmware keeps can never be used again, and the virtual machine ends.
    fn reclaim(&self, pfn: Pfn) -> Result<()> {
        if self.firmware.page_reclaim(pfn).is_err() {
            (self.on_bug)();
            return Err(Errno::EIO);
        }
        self.firmware.rmp().make_shared(pfn).map_err(|_| Errno::EIO)
    }

    fn launch_finish(
        &self,
        target: &dyn SnpTarget,
        launch: &Launch,
        fw: &mut Commands<'_>,
        parameters: &User<LaunchFinish>,
    ) -> Result<()> {
        self.asid().ok_or(Errno::ENOTTY)?;
        let context = launch.context.as_deref().ok_or(Errno::EINVAL)?;
        let LaunchFinish { id_block, flags } = parameters.copy_in()?;
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        {
            let _vcpus = target.lock_vcpus()?;
            for vcpu in 0..target.vcpus() {
                self.measure_vcpu(context, fw, vcpu)?;
            }
        }
        let signed = match id_block {
            Some(IdBlock { digest, signature }) => {
                // `psp_copy_user_blob` takes NULL for a mistake of its own kind.
                let digest = digest.ok_or(Errno::EINVAL)?.copy_in()?;
                signature.ok_or(Errno::EINVAL)?.copy_in()?;
                Some(digest)
            }
            None => None,
        };
        fw.issue(|firmware| firmware.launch_finish(context, signed.as_ref()))?;
        self.is_pre_fault_allowed.store(true, Ordering::Release);
        Ok(())
    }

    /// One vCPU of `snp_launch_update_vmsa`. What is the guest's already cannot be read any more to be measured
    /// (`sev_es_sync_vmsa`): a launch that fails after this cannot be finished.
    fn measure_vcpu(&self, context: &Context, fw: &mut Commands<'_>, vcpu: usize) -> Result<()> {
        if self.has_measured(vcpu) {
            return Err(Errno::EINVAL);
        }
        fw.issue(|firmware| firmware.launch_update_vcpu(context))?;
        self.measured_vcpus.store(vcpu + 1, Ordering::Release);
        Ok(())
    }

    fn launch(&self) -> MutexGuard<'_, Launch> {
        self.launch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Snp {
    fn drop(&mut self) {
        if let Some(asid) = self.asid() {
            self.firmware.give_asid_back(asid);
        }
    }
}

fn is_policy_good(personality: &Personality, policy: u64) -> bool {
    let (must_be_one, known) = if personality.snp_leaves_topology_to_policy() {
        (POLICY_RESERVED_ONE, POLICY_KNOWN)
    } else {
        (POLICY_RESERVED_ONE | POLICY_SMT, POLICY_KNOWN & !POLICY_SINGLE_SOCKET)
    };
    policy & !known == 0 && policy & must_be_one == must_be_one
}

/// The VMM is shown what its CPUID page should have been, if that can be written.
fn write_back(host: &dyn HostMemory, source: Option<(Hva, Pfn)>, content: &Page) {
    let Some((hva, _)) = source else { return };
    let (first, second) = content.split_at(PAGE_SIZE as usize - within(hva));
    if let Ok(page) = host.follow(hva, true) {
        host.write_frame(page.pfn, within(hva), first);
    }
    if let Ok(page) = follow_second(host, hva, true) {
        host.write_frame(page, 0, second);
    }
}

/// What is copied from an address, whose page is in this frame. It may begin within a page and end within the next.
fn read_source(host: &dyn HostMemory, hva: Hva, frame: Pfn) -> Result<Page> {
    let mut content = [0; PAGE_SIZE as usize];
    let (first, second) = content.split_at_mut(PAGE_SIZE as usize - within(hva));
    host.read_frame(frame, within(hva), first);
    if !second.is_empty() {
        host.read_frame(follow_second(host, hva, false)?, 0, second);
    }
    Ok(content)
}

fn follow_second(host: &dyn HostMemory, hva: Hva, write: bool) -> Result<Pfn> {
    if within(hva) == 0 {
        return Err(Errno::EFAULT);
    }
    host.follow(hva.plus_pages(1), write).map(|page| page.pfn).map_err(|_| Errno::EFAULT)
}

/// How far into its page an address lies.
fn within(hva: Hva) -> usize {
    (hva.0 % PAGE_SIZE) as usize
}

fn check_update(personality: &Personality, update: &LaunchUpdate) -> Result<(PageType, Option<Source>)> {
    let is_strict = personality.snp_launch_update_is_strict();
    if update.len % PAGE_SIZE != 0 || (is_strict && update.len == 0) || update.flags != 0 {
        return Err(Errno::EINVAL);
    }
    let kind = PageType::of_number(update.page_type).ok_or(Errno::EINVAL)?;
    if kind == PageType::Zero {
        return Ok((kind, None));
    }
    if is_strict && (update.uaddr == 0 || update.uaddr % PAGE_SIZE != 0) {
        return Err(Errno::EINVAL);
    }
    let source = Source { hva: Hva(update.uaddr), may_be_written: is_strict && kind == PageType::Cpuid };
    Ok((kind, Some(source)))
}

/// Commands to the firmware, by the descriptor that the VMM gave for it, and its last answer.
struct Commands<'a> {
    firmware: &'a Firmware,
    is_fd_good: bool,
    error: u32,
}

impl Commands<'_> {
    fn issue<T>(&mut self, call: impl FnOnce(&Firmware) -> Answer<T>) -> Result<T> {
        if !self.is_fd_good {
            return Err(Errno::EBADF);
        }
        let answer = call(self.firmware);
        self.error = answer.as_ref().err().map_or(0, |FirmwareError(number)| *number);
        answer.map_err(|_| Errno::EIO)
    }
}
