//! SNP: guests whose private memory is theirs by a table of the machine's frames.
//!
//! - [`rmp`]: that table, which the processor asks on each access, and a host whose frames leave it when they are freed.
//! - [`firmware`], with [`measurement`]: what the secure processor keeps of a guest, and what it answers.
//! - [`launch`]: the commands by which the VMM makes a guest, and how KVM gives it frames afterwards.
//!
//! Private memory of such a guest is mapped by the tables that the processor walks for it, as shared memory is. Nothing is
//! mirrored.

pub mod firmware;
pub mod launch;
#[cfg(all(test, not(loom)))]
mod launch_tests;
pub mod measurement;
pub mod rmp;

pub use firmware::{Firmware, FirmwareError, Operation, PageType};
pub use launch::{Call, Command, IdBlock, Init2, LaunchFinish, LaunchStart, LaunchUpdate, Snp, SnpTarget};
pub use rmp::{Refusal, Rmp, RmpHost};
