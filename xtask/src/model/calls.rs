//! The calls that the agents beside KVM are asked for, by the names that their manuals give them.
//!
//! A scenario names them to have them fail or stop. What they do is the model's.

use super::language::Failure;
use kvmprep_model::confidential::Stop;
use kvmprep_model::snp::{Firmware, FirmwareError, Operation as Snp};
use kvmprep_model::tdx::{Module, Seamcall as Tdx, Status};

/// A call of the TDX module, or of SNP's firmware.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Call {
    Tdx(Tdx),
    Snp(Snp),
}

const NAMES: &[(Call, &str)] = &[
    (Call::Tdx(Tdx::MngInit), "TDH.MNG.INIT"),
    (Call::Tdx(Tdx::VpInit), "TDH.VP.INIT"),
    (Call::Tdx(Tdx::VpEnter), "TDH.VP.ENTER"),
    (Call::Tdx(Tdx::MemSeptAdd), "TDH.MEM.SEPT.ADD"),
    (Call::Tdx(Tdx::MemPageAdd), "TDH.MEM.PAGE.ADD"),
    (Call::Tdx(Tdx::MemPageAug), "TDH.MEM.PAGE.AUG"),
    (Call::Tdx(Tdx::MemRangeBlock), "TDH.MEM.RANGE.BLOCK"),
    (Call::Tdx(Tdx::MemTrack), "TDH.MEM.TRACK"),
    (Call::Tdx(Tdx::MemPageRemove), "TDH.MEM.PAGE.REMOVE"),
    (Call::Tdx(Tdx::PhymemPageWbinvd), "TDH.PHYMEM.PAGE.WBINVD"),
    (Call::Tdx(Tdx::MrExtend), "TDH.MR.EXTEND"),
    (Call::Tdx(Tdx::MrFinalize), "TDH.MR.FINALIZE"),
    (Call::Snp(Snp::LaunchUpdate), "SNP_LAUNCH_UPDATE"),
    (Call::Snp(Snp::LaunchFinish), "SNP_LAUNCH_FINISH"),
];

impl Call {
    /// Every call that a scenario can name.
    pub const ALL: &[Call] = &{
        let mut all = [NAMES[0].0; NAMES.len()];
        let mut nth = 0;
        while nth < NAMES.len() {
            all[nth] = NAMES[nth].0;
            nth += 1;
        }
        all
    };

    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(call, _)| *call == self).map_or("", |(_, name)| name)
    }

    /// Whether it is made while a virtual machine or a vCPU is.
    pub fn is_of_making(self) -> bool {
        matches!(self, Call::Tdx(Tdx::MngInit | Tdx::VpInit))
    }

    /// Whether it takes something out of the external table, or is on the way to that.
    pub fn takes_away(self) -> bool {
        matches!(self, Call::Tdx(Tdx::MemRangeBlock | Tdx::MemTrack | Tdx::MemPageRemove))
    }

    /// Whether it puts a table in, rather than a page.
    pub fn adds_table(self) -> bool {
        self == Call::Tdx(Tdx::MemSeptAdd)
    }

    /// The nth of them from now on fails.
    pub fn fail(self, module: &Module, firmware: &Firmware, nth: u64, how: Failure) {
        match (self, how) {
            (Call::Tdx(call), Failure::Busy) => module.failures().fail(call, nth, Status::OPERAND_BUSY),
            (Call::Tdx(call), Failure::Refused) => module.failures().fail(call, nth, Status::OPERAND_INVALID),
            // The firmware is never busy with something else: KVM asks it under a lock.
            (Call::Snp(call), _) => firmware.failures().fail(call, nth, FirmwareError::POLICY_FAILURE),
        }
    }

    /// The nth of them from now on stops.
    pub fn stop(self, module: &Module, firmware: &Firmware, nth: u64) -> Stop {
        match self {
            Call::Tdx(call) => module.failures().stop(call, nth),
            Call::Snp(call) => firmware.failures().stop(call, nth),
        }
    }
}
