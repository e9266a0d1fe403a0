//! Failures that a test asks for by text: which call of which operation is answered with which error, without being made.
//!
//! An operation is one of the TDX module's, of the SNP firmware's, of the machine's table of frames, or an ioctl. A text that is
//! not understood plans nothing at all, and whoever gave it is told what there is.

use crate::ioctls;
use kvmprep_model::confidential::Failures;
use kvmprep_model::errno::{Errno, Result};
use kvmprep_model::snp::rmp::RmpUpdate;
use kvmprep_model::snp::{FirmwareError, Operation};
use kvmprep_model::tdx::status::Operand;
use kvmprep_model::tdx::{Seamcall, Status};
use kvmprep_model::vm::Machine;
use std::sync::LazyLock;

/// Calls that are to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    what: What,
    /// The first of them, counted from 1.
    first: u64,
    /// How many.
    times: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Seamcall(Seamcall, Status),
    Firmware(Operation, FirmwareError),
    Frames,
    Ioctl(&'static str, Errno),
}

const SEAMCALLS: [(&str, Seamcall); 17] = [
    ("mng_create", Seamcall::MngCreate),
    ("mng_init", Seamcall::MngInit),
    ("mng_key_freeid", Seamcall::MngKeyFreeid),
    ("vp_create", Seamcall::VpCreate),
    ("vp_init", Seamcall::VpInit),
    ("vp_enter", Seamcall::VpEnter),
    ("mem_sept_add", Seamcall::MemSeptAdd),
    ("mem_sept_remove", Seamcall::MemSeptRemove),
    ("mem_page_add", Seamcall::MemPageAdd),
    ("mem_page_aug", Seamcall::MemPageAug),
    ("mem_page_remove", Seamcall::MemPageRemove),
    ("mem_range_block", Seamcall::MemRangeBlock),
    ("mem_track", Seamcall::MemTrack),
    ("mr_extend", Seamcall::MrExtend),
    ("mr_finalize", Seamcall::MrFinalize),
    ("phymem_page_reclaim", Seamcall::PhymemPageReclaim),
    ("phymem_page_wbinvd", Seamcall::PhymemPageWbinvd),
];

const STATUSES: [(&str, Status); 8] = [
    ("busy", Status::OPERAND_BUSY.of(Operand::Sept)),
    ("epoch_busy", Status::PREVIOUS_TLB_EPOCH_BUSY.of(Operand::Epoch)),
    ("operand_invalid", Status::OPERAND_INVALID.of(Operand::Rcx)),
    ("page_metadata_incorrect", Status::PAGE_METADATA_INCORRECT.of(Operand::R8)),
    ("ept_walk_failed", Status::EPT_WALK_FAILED.of(Operand::Rcx)),
    ("ept_entry_state_incorrect", Status::EPT_ENTRY_STATE_INCORRECT.of(Operand::Rcx)),
    ("op_state_incorrect", Status::OP_STATE_INCORRECT),
    ("non_recoverable_td", Status::NON_RECOVERABLE_TD),
];

const COMMANDS: [(&str, Operation); 6] = [
    ("gctx_create", Operation::GctxCreate),
    ("launch_start", Operation::LaunchStart),
    ("activate", Operation::Activate),
    ("launch_update", Operation::LaunchUpdate),
    ("launch_finish", Operation::LaunchFinish),
    ("page_reclaim", Operation::PageReclaim),
];

const FIRMWARE_ERRORS: [(&str, FirmwareError); 7] = [
    ("invalid_guest_state", FirmwareError::INVALID_GUEST_STATE),
    ("policy_failure", FirmwareError::POLICY_FAILURE),
    ("inactive", FirmwareError::INACTIVE),
    ("bad_measurement", FirmwareError::BAD_MEASUREMENT),
    ("invalid_param", FirmwareError::INVALID_PARAM),
    ("invalid_page_state", FirmwareError::INVALID_PAGE_STATE),
    ("invalid_page_owner", FirmwareError::INVALID_PAGE_OWNER),
];

/// The machine's own operation on its table of frames, and how it fails.
const FRAMES: (&str, &str) = ("rmpupdate", "refused");
/// What the name of an ioctl follows.
const IOCTL: &str = "ioctl ";
/// Errors have numbers below this.
const MOST_ERRORS: i32 = 134;

static IOCTLS: LazyLock<Failures<&'static str, Errno>> = LazyLock::new(Failures::default);

/// Whether this call of an ioctl is to fail, and how.
pub fn of_ioctl(name: &'static str) -> Result<()> {
    IOCTLS.check(name)
}

/// Reads a text: `WHAT:NTH:HOW`, separated by commas; NTH may be a range (`3-5`). The error is for people.
pub fn parse(text: &str) -> std::result::Result<Vec<Plan>, String> {
    text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(parse_one).collect()
}

fn parse_one(part: &str) -> std::result::Result<Plan, String> {
    let mut fields = part.split(':').map(str::trim);
    let (Some(what), Some(nth), Some(how), None) =
        (fields.next(), fields.next(), fields.next(), fields.next())
    else {
        return Err(format!("'{part}' should be WHAT:NTH:HOW, such as mem_page_aug:3:busy"));
    };
    let (first, times) = calls(nth).ok_or_else(|| {
        format!("'{nth}' in '{part}' should say which calls fail, counted from 1, such as 3 or 3-5")
    })?;
    Ok(Plan { what: what_fails(what, how)?, first, times })
}

fn calls(nth: &str) -> Option<(u64, u64)> {
    let (first, last) = nth.split_once('-').unwrap_or((nth, nth));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (1 <= first && first <= last).then(|| (first, last - first + 1))
}

fn what_fails(what: &str, how: &str) -> std::result::Result<What, String> {
    if let Some(name) = what.strip_prefix(IOCTL) {
        let name = ioctls::NAMES.iter().find(|known| **known == name.trim());
        let name = name.ok_or_else(|| format!("'{what}': KVM has no such ioctl"))?;
        return Ok(What::Ioctl(name, errno(how)?));
    }
    if what == FRAMES.0 {
        return if how == FRAMES.1 { Ok(What::Frames) } else { Err(unknown("error", how, [FRAMES.1])) };
    }
    if let Some((_, seamcall)) = SEAMCALLS.iter().find(|(name, _)| *name == what) {
        return Ok(What::Seamcall(*seamcall, error(how, &STATUSES, Status)?));
    }
    if let Some((_, command)) = COMMANDS.iter().find(|(name, _)| *name == what) {
        return Ok(What::Firmware(
            *command,
            error(how, &FIRMWARE_ERRORS, |number| FirmwareError(number as u32))?,
        ));
    }
    let known = SEAMCALLS.iter().map(|(name, _)| *name).chain(COMMANDS.iter().map(|(name, _)| *name));
    Err(unknown("operation", what, known.chain([FRAMES.0, "ioctl KVM_..."])))
}

/// An error by its name, or by its number.
fn error<E: Copy>(
    how: &str,
    known: &[(&str, E)],
    of_number: impl Fn(u64) -> E,
) -> std::result::Result<E, String> {
    if let Some((_, error)) = known.iter().find(|(name, _)| *name == how) {
        return Ok(*error);
    }
    let number = how.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
    number
        .map(of_number)
        .ok_or_else(|| unknown("error", how, known.iter().map(|(name, _)| *name).chain(["0x..."])))
}

fn errno(how: &str) -> std::result::Result<Errno, String> {
    let known = (1..MOST_ERRORS).map(Errno).find(|errno| format!("{errno:?}") == how);
    let errno =
        known.or_else(|| how.parse().ok().filter(|number| (1..MOST_ERRORS).contains(number)).map(Errno));
    errno.ok_or_else(|| format!("'{how}' should be an error such as EAGAIN, or its number"))
}

fn unknown<'a>(kind: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<_> = known.into_iter().collect();
    format!("'{name}' should be an {kind}: {}", known.join(", "))
}

/// Has the calls fail, counted from now on.
pub fn arm(plans: &[Plan], machine: &Machine) {
    for Plan { what, first, times } in plans.iter().copied() {
        let Machine { module, firmware, .. } = machine;
        match what {
            What::Seamcall(seamcall, status) => {
                module.iter().for_each(|module| module.failures().fail_times(seamcall, first, times, status));
            }
            What::Firmware(command, error) => {
                firmware
                    .iter()
                    .for_each(|firmware| firmware.failures().fail_times(command, first, times, error));
            }
            What::Frames => {
                let each =
                    |rmp: &kvmprep_model::snp::Rmp| rmp.failures().fail_times(RmpUpdate, first, times, ());
                firmware.iter().for_each(|firmware| each(firmware.rmp()));
            }
            What::Ioctl(name, errno) => IOCTLS.fail_times(name, first, times, errno),
        }
    }
}

/// No call is to fail any more.
pub fn clear(machine: &Machine) {
    IOCTLS.clear();
    machine.module.iter().for_each(|module| module.failures().clear());
    if let Some(firmware) = &machine.firmware {
        firmware.failures().clear();
        firmware.rmp().failures().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Plan {
        parse(text).unwrap()[0]
    }

    #[test]
    fn texts_are_understood() {
        let plan = one("mem_page_aug:3:busy");
        assert_eq!((plan.first, plan.times), (3, 1));
        assert_eq!(plan.what, What::Seamcall(Seamcall::MemPageAug, Status::OPERAND_BUSY.of(Operand::Sept)));
        let plan = one("launch_update:2-4:0x15");
        assert_eq!((plan.first, plan.times), (2, 3));
        assert_eq!(plan.what, What::Firmware(Operation::LaunchUpdate, FirmwareError(0x15)));
        assert_eq!(one("ioctl KVM_RUN:1:EAGAIN").what, What::Ioctl("KVM_RUN", Errno::EAGAIN));
        assert_eq!(one("ioctl KVM_RUN:1:71").what, What::Ioctl("KVM_RUN", Errno(71)));
        assert_eq!(one("rmpupdate:1:refused").what, What::Frames);
        assert_eq!(parse("vp_init:1:busy, mr_extend:1:operand_invalid").unwrap().len(), 2);
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn what_is_not_understood_is_explained() {
        for (text, told) in [
            ("mem_page_aug", "WHAT:NTH:HOW"),
            ("mem_page_aug:0:busy", "counted from 1"),
            ("mem_page_aug:5-3:busy", "counted from 1"),
            ("page_add:1:busy", "mem_page_add"),
            ("mem_page_add:1:refused", "operand_invalid"),
            ("launch_update:1:busy", "invalid_page_state"),
            ("ioctl KVM_RUM:1:EIO", "no such ioctl"),
            ("ioctl KVM_RUN:1:EFOO", "EAGAIN"),
            ("rmpupdate:1:busy", "refused"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }

    #[test]
    fn the_ioctl_that_was_named_fails_at_the_calls_that_were_named() {
        arm(&parse("ioctl KVM_SMI:2-3:EBUSY").unwrap(), &machine());
        let answers: Vec<_> = (0..4).map(|_| of_ioctl("KVM_SMI").err()).collect();
        assert_eq!(answers, [None, Some(Errno::EBUSY), Some(Errno::EBUSY), None]);
        assert_eq!(of_ioctl("KVM_NMI"), Ok(()));
        arm(&parse("ioctl KVM_SMI:1:EBUSY").unwrap(), &machine());
        clear(&machine());
        assert_eq!(of_ioctl("KVM_SMI"), Ok(()));
    }

    fn machine() -> Machine {
        let host: std::sync::Arc<dyn kvmprep_model::host::HostMemory> = crate::host::process().clone();
        Machine::new(crate::settings::current().personality, host)
    }
}
