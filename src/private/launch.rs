//! Pages into a confidential guest's initial image, by the two calls that Linux has for it.
//!
//! Either call may take some pages and stop. TDX's then says why as well; SNP's says why only where it has taken none, and
//! hardly. Every answer is sorted here, once: what to repeat, what the caller must know. Nothing is claimed here, nothing
//! is mapped beyond what is added, and no page is named again that the kernel may have taken.

use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::caps::{KVM_X86_SNP_VM, KVM_X86_TDX_VM};
use crate::kvm::{Errno, ImagePages, Kernel, Launched};
use crate::range::{PAGE, Range};
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// By which call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `KVM_TDX_INIT_MEM_REGION`.
    Tdx {
        /// A vCPU that is initialised.
        vcpu: RawFd,
        /// `KVM_TDX_MEASURE_MEMORY_REGION`.
        flags: u32,
    },
    /// `KVM_SEV_SNP_LAUNCH_UPDATE`.
    Snp {
        /// The firmware's device.
        sev: RawFd,
        /// What the pages are.
        page_type: PageType,
    },
}

/// What SNP's firmware is told of a page; the kernel's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum PageType {
    /// Content that is measured.
    Normal = 1,
    /// Zeroes.
    Zero = 3,
    /// Content that is not measured.
    Unmeasured = 4,
    /// Where the firmware leaves the guest's secrets.
    Secrets = 5,
    /// CPUID values, which the firmware checks.
    Cpuid = 6,
}

/// What became of the pages.
#[derive(Debug)]
pub struct Added {
    /// What is not in the image.
    pub rest: Option<Range>,
    /// What the kernel has surely not taken.
    pub untaken: Option<Range>,
    /// Why there is a rest.
    pub verdict: Result<()>,
}

impl Added {
    /// Nothing of `range`.
    pub fn nothing(range: Range, why: Error) -> Self {
        Self { rest: Some(range), untaken: Some(range), verdict: Err(why) }
    }
}

/// How often a call is repeated that neither gets on nor fails for good: pauses double from the shortest to the longest,
/// and come to two seconds.
const TRIES: u32 = 200;
const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_millis(10);
/// How often where SNP's call gives no reason: a signal may have been it, which is over by the next.
const UNEXPLAINED_TRIES: u32 = 3;

/// `SEV_RET_*`, of `<linux/psp-sev.h>`: the firmware was not asked.
const NO_FIRMWARE_CALL: u64 = 0xffff_ffff;
const INVALID_GUEST_STATE: u64 = 0x02;
const INVALID_PARAMETER: u64 = 0x16;

const KVM_CAP_GUEST_MEMFD: u32 = 234;

/// Adds `pages`, in order.
pub fn add(kernel: &dyn Kernel, vm: RawFd, way: Way, pages: &ImagePages) -> Added {
    let launch = Launch { kernel, vm, way, pages };
    // Times that the first page of the rest was tried in vain.
    let (mut rest, mut tries) = (pages.range, 0);
    loop {
        let asked = way.step(rest);
        let launched = launch.call(asked);
        let next = launched.left.map_or(asked.end, |left| left.start);
        let has_progress = next > rest.start;
        match Range::between(next, rest.end) {
            Some(left) => rest = left,
            None => return Added { rest: None, untaken: None, verdict: Ok(()) },
        }
        tries = if has_progress { 0 } else { tries };
        if has_progress && launched.answer.is_ok() {
            continue;
        }
        tries += 1;
        let most = way.most_tries(&launched);
        if tries >= most {
            return launch.stopped(rest, &launched);
        }
        if most == TRIES && launch.pause(tries) == Err(Errno(libc::EINTR)) {
            return launch.stopped(rest, &Launched { answer: Err(Errno(libc::EINTR)), ..launched });
        }
    }
}

impl Way {
    /// The type of the VMs that it is for, and what that is called.
    pub fn vm_type(self) -> (u32, &'static str) {
        match self {
            Way::Tdx { .. } => (KVM_X86_TDX_VM, "TDX"),
            Way::Snp { .. } => (KVM_X86_SNP_VM, "SNP"),
        }
    }

    fn is_cpuid(self) -> bool {
        matches!(self, Way::Snp { page_type: PageType::Cpuid, .. })
    }

    /// How much of `rest` one call is asked for. A page of CPUID values that is refused after others were taken is
    /// corrected, and nobody told; the next call would add what nobody has looked at. So these go one by one.
    fn step(self, rest: Range) -> Range {
        if self.is_cpuid() { Range { end: rest.start + PAGE, ..rest } } else { rest }
    }

    /// How often a page is tried on which a call has stopped so.
    fn most_tries(self, launched: &Launched) -> u32 {
        match (self, launched.answer.map_err(|errno| errno.0)) {
            (_, Ok(()) | Err(libc::EAGAIN | libc::EBUSY)) => TRIES,
            (Way::Snp { .. }, Err(libc::EIO)) if firmware_code(launched).is_none() => UNEXPLAINED_TRIES,
            _ => 1,
        }
    }
}

/// The firmware's own word, where it gave one.
fn firmware_code(launched: &Launched) -> Option<u64> {
    Some(launched.firmware).filter(|code| ![0, NO_FIRMWARE_CALL].contains(code))
}

/// One launch under way.
struct Launch<'a> {
    kernel: &'a dyn Kernel,
    vm: RawFd,
    way: Way,
    pages: &'a ImagePages,
}

impl Launch<'_> {
    fn call(&self, asked: Range) -> Launched {
        let pages = self.pages.part(asked);
        match self.way {
            Way::Tdx { vcpu, flags } => self.kernel.tdx_init_mem_region(vcpu, &pages, flags),
            Way::Snp { sev, page_type } => {
                self.kernel.snp_launch_update(self.vm, sev, &pages, page_type as u8)
            }
        }
    }

    fn pause(&self, tries: u32) -> std::result::Result<(), Errno> {
        let length = SHORTEST.saturating_mul(1 << (tries - 1).min(10)).min(LONGEST);
        self.kernel.wait(&AtomicU32::new(0), 0, length)
    }

    fn stopped(&self, rest: Range, launched: &Launched) -> Added {
        let is_known = launched.answer != Err(Errno(libc::EPROTO));
        let error = self.explain(rest, launched).stage(Stage::Launch).range(rest);
        let firmware = firmware_code(launched).unwrap_or(0);
        Added {
            rest: Some(rest),
            untaken: is_known.then_some(rest),
            verdict: Err(Error { firmware, ..error }),
        }
    }

    fn explain(&self, rest: Range, launched: &Launched) -> Error {
        let page = rest.start;
        let Err(errno) = launched.answer else {
            return gave_up(page, "adds nothing and gives no reason", "call again with what remains");
        };
        match errno.0 {
            libc::EINTR => Error::new(libc::EINTR, Reason::Interrupted, "a signal came")
                .hint("call again with what remains, and its content"),
            libc::EAGAIN | libc::EBUSY => {
                gave_up(page, "asks to try again", "call again with what remains, when no vCPU is in use")
            }
            libc::EHWPOISON => Error::new(
                libc::EHWPOISON,
                Reason::Poisoned,
                format!("the memory for guest page {page:#x} is broken hardware"),
            )
            .hint("discard the page, or give the guest other memory"),
            libc::ENOMEM | libc::ENOSPC => Error::new(
                libc::ENOMEM,
                Reason::MemoryShortage,
                format!("no memory for guest page {page:#x}, or for the page tables that lead to it"),
            )
            .hint("free memory on the host, or raise the cgroup's limit; then call again with what remains"),
            libc::EPROTO => Error::new(
                libc::EPROTO,
                Reason::KernelRefused,
                format!("what the kernel says of its progress from guest page {page:#x} on cannot be"),
            )
            .hint("make the VM anew: nobody knows what was added; all of it counts as claimed"),
            libc::EFAULT => self.unreachable(rest),
            libc::EINVAL => self.invalid(page),
            libc::EIO => self.io_error(rest, launched),
            libc::ENOTTY => self.unknown(),
            _ => Error::kernel(errno, self.name())
                .hint("what remains is not in the image: remove the cause, and call again with it"),
        }
    }

    fn name(&self) -> &'static str {
        match self.way {
            Way::Tdx { .. } => "KVM_TDX_INIT_MEM_REGION",
            Way::Snp { .. } => "KVM_SEV_SNP_LAUNCH_UPDATE",
        }
    }

    fn unknown(&self) -> Error {
        let (name, since) = match self.way {
            Way::Tdx { .. } => {
                ("TDX", "needs Linux 6.16, TDX enabled in KVM, and a VM of type KVM_X86_TDX_VM")
            }
            Way::Snp { .. } => {
                ("SEV-SNP", "needs Linux 6.11, SEV-SNP enabled in KVM, and a VM of type KVM_X86_SNP_VM")
            }
        };
        Error::new(libc::ENOTTY, Reason::KernelRefused, format!("KVM has no {name} for this VM")).hint(since)
    }

    /// KVM has refused what is right by all that the handle knows. Once pages were taken, VM and vCPU are right too.
    fn invalid(&self, page: u64) -> Error {
        let has_begun = page > self.pages.range.start;
        let (what, hint) = match self.way {
            _ if has_begun => (
                "it is not private in KVM, or has no guest_memfd there",
                "tell the handle of each slot change, and by kvmprep_visibility_note() of each attribute that is set",
            ),
            Way::Tdx { .. } => (
                "the TDX guest or this vCPU is not initialised, the guest is finalised, or the page is not private in KVM",
                "add pages after KVM_TDX_INIT_VM and this vCPU's KVM_TDX_INIT_VCPU and before KVM_TDX_FINALIZE_VM; tell the \
                 handle gpa_shared_bit, and of each slot and attribute",
            ),
            Way::Snp { .. } => (
                "this is no SNP guest, its launch has not been started, or the page has no guest_memfd in KVM",
                "add pages to a VM of type KVM_X86_SNP_VM after KVM_SEV_SNP_LAUNCH_START; tell the handle of each slot",
            ),
        };
        Error::invalid(Reason::KernelRefused, format!("KVM refused guest page {page:#x}: {what}")).hint(hint)
    }

    fn unreachable(&self, rest: Range) -> Error {
        let (message, hint) = match self.unreadable_source(rest) {
            Some(source) => return source,
            None => (
                format!("KVM cannot reach the guest_memfd behind guest page {:#x}", rest.start),
                "keep the slot's guest_memfd open while the VM lives",
            ),
        };
        Error::new(libc::EFAULT, Reason::NoHostMapping, message).hint(hint)
    }

    /// That the content cannot be read, or written where the firmware corrects it, if so it is.
    fn unreadable_source(&self, rest: Range) -> Option<Error> {
        let source = self.pages.part(rest).source?;
        let mapping = self.kernel.mapping(source).ok()?;
        let is_there = mapping.is_some_and(|mapping| {
            mapping.start <= source
                && source + PAGE <= mapping.end
                && if self.way.is_cpuid() { mapping.writable } else { mapping.readable }
        });
        let how = if self.way.is_cpuid() { "written" } else { "read" };
        let error = Error::new(
            libc::EFAULT,
            Reason::NoHostMapping,
            format!("the source {source:#x} of guest page {:#x} cannot be {how}", rest.start),
        );
        (!is_there).then(|| error.hint("pass as much memory as the range is large, mapped and accessible"))
    }

    /// An error of many causes. A dead VM answers so whatever is asked.
    fn io_error(&self, rest: Range, launched: &Launched) -> Error {
        let page = rest.start;
        if let Err(Errno(libc::EIO)) = self.kernel.check_extension(self.vm, KVM_CAP_GUEST_MEMFD) {
            return Error::new(
                libc::EIO,
                Reason::VmDead,
                format!("the VM is dead, or belongs to another process, at guest page {page:#x}"),
            )
            .hint("look at the kernel's log; a dead VM must be made anew");
        }
        if let Some(code) = firmware_code(launched) {
            return self.refused_by_firmware(page, code);
        }
        match self.way {
            Way::Tdx { .. } => Error::new(
                libc::EEXIST,
                Reason::Claimed,
                format!("KVM did not add guest page {page:#x}: it is there already, and the handle does not know of it"),
            )
            .hint("add each page once; claim with kvmprep_private_claim() what is added without the handle"),
            Way::Snp { .. } => self.unreadable_source(rest).unwrap_or_else(|| {
                Error::new(
                    libc::EIO,
                    Reason::KernelRefused,
                    format!("KVM did not add guest page {page:#x} and does not say why"),
                )
                .hint(
                    "look whether it is private in KVM, was added without the handle, its guest_memfd is open, sev_fd is \
                     /dev/sev, and memory is left",
                )
            }),
        }
    }

    fn refused_by_firmware(&self, page: u64, code: u64) -> Error {
        let who = if matches!(self.way, Way::Tdx { .. }) { "TDX module" } else { "firmware" };
        let hint = match (self.way, code) {
            (Way::Snp { page_type: PageType::Cpuid, .. }, INVALID_PARAMETER) => {
                "the firmware has put the values that it takes into source: compare, and call again with what remains if they \
                 will do"
            }
            (Way::Snp { .. }, INVALID_GUEST_STATE) => {
                "add pages between KVM_SEV_SNP_LAUNCH_START and KVM_SEV_SNP_LAUNCH_FINISH"
            }
            (Way::Snp { .. }, _) => "look the code up among the SEV-SNP firmware's status codes",
            (Way::Tdx { .. }, _) => "look the code up among the TDX module's completion status codes",
        };
        let message = format!("the {who} refused guest page {page:#x} with code {code:#x}");
        Error::new(libc::EIO, Reason::FirmwareRefused, message).hint(hint)
    }
}

fn gave_up(page: u64, cause: &str, hint: &'static str) -> Error {
    Error::new(
        libc::EAGAIN,
        Reason::RetriesExhausted,
        format!("guest page {page:#x} could not be added for two seconds: KVM {cause}"),
    )
    .hint(hint)
}
