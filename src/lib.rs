//! kvmprep prepares a KVM guest's memory before the guest needs it.
//!
//! The product is a C library: see `include/kvmprep.h`. What this crate exports to Rust is its inside, laid
//! open so that the project's own benchmarks and tests can put a scripted kernel beneath it; it carries no
//! promise of stability.
//!
//! The house, from the door inwards: [`abi`] is the C face and holds no logic; [`vm`] is what the library
//! remembers of one guest; [`populate`] fills both page-table stages; [`memslot`] knows the slots; [`kvm`] is
//! the only place that makes system calls; [`range`], [`error`] and [`panics`] are the ground.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("kvmprep is for 64-bit Linux");

pub mod abi;
pub mod error;
pub mod kvm;
pub mod level;
pub mod memslot;
pub mod panics;
pub mod populate;
pub mod private;
pub mod range;
pub mod vm;
