//! The initial image of a confidential guest: what was put into its memory, and whether it is closed.
//!
//! Here the ledger, which knows nothing but claims, meets what else is known of the guest: its slots, and what is private.
//! A page is claimed before KVM is asked to take it, and given back where KVM has not.

use super::Vm;
use crate::error::{Error, Reason, Result, Stage};
use crate::kvm::ImagePages;
use crate::kvm::caps::{KVM_X86_SNP_VM, KVM_X86_TDX_VM};
use crate::memslot::SlotId;
use crate::populate::stage2::is_vcpu;
use crate::private::launch::{self, Added, Way};
use crate::private::ledger::{Ledger, Refusal};
use crate::private::visibility::Visibility;
use crate::range::Range;
use std::os::fd::RawFd;
use std::sync::{MutexGuard, PoisonError};

/// Memory that cannot be part of an initial image.
struct Unfit {
    part: Range,
    slot: Option<SlotId>,
    reason: Reason,
}

impl Vm {
    /// Claims all of `range` for the initial image, or nothing.
    pub fn claim(&self, range: Range) -> Result<()> {
        let mut ledger = self.ledger();
        check_open(&ledger, range)?;
        self.check_fit(range)?;
        ledger.claim(range).map_err(|why| refused(range, why))
    }

    /// Gives all of `range` back, or nothing.
    pub fn unclaim(&self, range: Range) -> Result<()> {
        self.check_guest_range(range)?;
        self.ledger().unclaim(range).map_err(|why| refused(range, why))
    }

    /// Whether all of `ranges` could be claimed, in that order. Claims nothing.
    pub fn check_claims(&self, ranges: &[Range]) -> Result<()> {
        let ledger = self.ledger();
        let in_list = |index: usize, error: Error| Error {
            message: format!("ranges[{index}]: {}", error.message),
            ..error
        };
        if let Some(first) = ranges.first() {
            check_open(&ledger, *first).map_err(|error| in_list(0, error))?;
        }
        let unfit = ranges.iter().map(|range| self.check_fit(*range)).enumerate();
        let unfit = unfit.filter_map(|(index, verdict)| Some((index, verdict.err()?))).next();
        let fit = &ranges[..unfit.as_ref().map_or(ranges.len(), |(index, _)| *index)];
        ledger
            .check_list(fit)
            .map_err(|found| in_list(found.index, refused(ranges[found.index], found.why)))?;
        unfit.map_or(Ok(()), |(index, error)| Err(in_list(index, error)))
    }

    /// The initial image is closed: KVM_SEV_SNP_LAUNCH_FINISH or KVM_TDX_FINALIZE_VM was done.
    pub fn note_sealed(&self) {
        self.ledger().seal();
    }

    /// Claims pages, has KVM put them into the initial image, and gives those back that it has not taken.
    pub fn launch(&self, way: Way, pages: &ImagePages) -> Added {
        let range = pages.range;
        let claimed = self.check_way(way, range).and_then(|()| self.claim(range));
        if let Err(why) = claimed {
            return Added::nothing(range, why.stage(Stage::Launch));
        }
        let added = launch::add(&*self.kernel, self.fd(), way, pages);
        if let Some(untaken) = added.untaken {
            // Refused where the image was closed meanwhile; then it is no matter.
            let _ = self.ledger().unclaim(untaken);
        }
        added
    }

    /// Refuses a call that is for another type of VM, or that could not say that its descriptor is wrong.
    fn check_way(&self, way: Way, range: Range) -> Result<()> {
        let wrong = |fd: RawFd, what: &str, hint| {
            Error::new(libc::EBADF, Reason::BadFd, format!("descriptor {fd} is not {what}")).hint(hint)
        };
        match way {
            Way::Tdx { vcpu, .. } if !is_vcpu(&*self.kernel, vcpu) => {
                return Err(wrong(vcpu, "a vCPU", "pass what KVM_CREATE_VCPU returned"));
            }
            Way::Snp { sev, .. } if self.kernel.file_status(sev).is_err() => {
                return Err(wrong(sev, "open", "pass a descriptor of /dev/sev"));
            }
            _ => {}
        }
        let (told, (needed, name)) = (self.caps()?.vm_type, way.vm_type());
        if told == 0 || told == needed {
            return Ok(());
        }
        Err(Error::invalid(Reason::BadValue, format!("this VM is of type {told}, and {name}'s is {needed}"))
            .range(range)
            .hint("use the call for the type that the handle was told"))
    }

    /// Refuses a pre-fault that KVM would refuse: of the whole VM, while its initial image is not closed.
    pub(crate) fn check_pre_fault_is_allowed(&self) -> Result<()> {
        let is_measured = matches!(self.caps()?.vm_type, KVM_X86_SNP_VM | KVM_X86_TDX_VM);
        if !is_measured || self.ledger().is_sealed() {
            return Ok(());
        }
        Err(Error::new(
            libc::EOPNOTSUPP,
            Reason::NotSealed,
            "KVM pre-faults nothing of an SNP or TDX guest before its initial image is closed",
        )
        .stage(Stage::Stage2)
        .hint(
            "call kvmprep_private_note_sealed() after KVM_SEV_SNP_LAUNCH_FINISH or KVM_TDX_FINALIZE_VM, or populate with \
             KVMPREP_POPULATE_HOST_ONLY",
        ))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses memory that cannot be part of an initial image; the lowest such part is told.
    fn check_fit(&self, range: Range) -> Result<()> {
        self.check_guest_range(range)?;
        let Some(Unfit { part, slot, reason }) = self.first_unfit(range) else { return Ok(()) };
        let (what, hint) = match reason {
            Reason::NoMemslot => ("has no memslot", "tell the handle of every slot, and claim memory alone"),
            Reason::NoGmem => {
                ("has no guest_memfd", "give the memslot a guest_memfd: the image is private memory")
            }
            _ => (
                "is not private",
                "make it private first with kvmprep_convert(), or set the attribute and call kvmprep_visibility_note()",
            ),
        };
        let message = format!("guest {part} {what}, and cannot be part of the initial image");
        let error = Error::invalid(reason, message).stage(Stage::Launch).range(part).hint(hint);
        Err(Error { slot, ..error })
    }

    fn first_unfit(&self, range: Range) -> Option<Unfit> {
        let memory = self.memory();
        let no_memslot = |part| Unfit { part, slot: None, reason: Reason::NoMemslot };
        let mut at = range.start;
        for (place, slot) in memory.slots.touching(0, range) {
            let Some(part) = place.intersect(&range) else { continue };
            if let Some(hole) = Range::between(at, part.start) {
                return Some(no_memslot(hole));
            }
            let of_slot = |part, reason| Some(Unfit { part, slot: Some(slot.id()), reason });
            if !slot.has_guest_memfd() {
                return of_slot(part, Reason::NoGmem);
            }
            if let Some(shared) = self.first_shared(part) {
                return of_slot(shared, Reason::NotPrivate);
            }
            at = part.end;
        }
        Range::between(at, range.end).map(no_memslot)
    }

    fn first_shared(&self, range: Range) -> Option<Range> {
        let run = self.visibility.run(range);
        match run.visibility {
            Visibility::Shared => Some(run.range),
            // Runs end where the other kind begins.
            Visibility::Private => {
                Range::between(run.range.end, range.end).map(|rest| self.visibility.run(rest).range)
            }
        }
    }
}

fn check_open(ledger: &Ledger, range: Range) -> Result<()> {
    if ledger.is_sealed() { Err(refused(range, Refusal::Sealed)) } else { Ok(()) }
}

fn refused(range: Range, why: Refusal) -> Error {
    let (errno, reason, part, message, hint) = match why {
        Refusal::Sealed => (
            libc::EPERM,
            Reason::Sealed,
            range,
            "the initial image is closed".to_string(),
            "make the image before kvmprep_private_note_sealed(); another image needs another VM",
        ),
        Refusal::Claimed(earlier) => (
            libc::EEXIST,
            Reason::Claimed,
            earlier,
            format!("guest {range} meets {earlier}, which is claimed already"),
            "put each page into the image once; kvmprep_private_unclaim() gives back what the kernel did not take",
        ),
        Refusal::NotClaimed(gap) => (
            libc::ENOENT,
            Reason::NotClaimed,
            gap,
            format!("guest {gap} is not claimed"),
            "give back what was claimed, and once",
        ),
    };
    Error::new(errno, reason, message).stage(Stage::Launch).range(part).hint(hint)
}
