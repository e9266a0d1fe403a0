//! TDX: guests whose private memory only a module can map, which trusts nobody.
//!
//! - [`module`], with [`sept`], [`status`] and [`measurement`]: the other side. What the TDX module keeps of a guest, and
//!   what it answers to each SEAMCALL. It knows nothing of KVM.
//! - [`guest`]: what KVM keeps of a guest (`struct kvm_tdx`), and its vCPUs while they run.
//! - [`secure_ept`]: how changes of the mirror become SEAMCALLs.
//! - [`config`]: what guests of the module can be, one table of attributes, saved state and CPUID.
//! - [`launch`]: the commands by which the VMM makes a guest.
//! - [`capabilities`]: what KVM tells of that table, of a guest, and what it takes of it.
//!
//! Nothing here decides what is mapped: the MMU does, and says so through
//! [`ExternalTable`](crate::mmu::ExternalTable).

pub mod capabilities;
pub mod config;
pub mod guest;
pub mod launch;
#[cfg(all(test, not(loom)))]
mod launch_tests;
pub mod measurement;
pub mod module;
#[cfg(all(test, not(loom)))]
mod module_tests;
pub mod secure_ept;
pub mod sept;
pub mod status;

pub use capabilities::{Capabilities, CpuidEntry, CpuidList};
pub use guest::{InGuest, Tdx, TdxVcpu};
pub use launch::{Call, Command, InitMemRegion, InitVm, TdxVcpuTarget, TdxVmTarget};
pub use module::{Accept, Access, Module, Seamcall, TdParams};
pub use secure_ept::SecureEpt;
pub use status::Status;
