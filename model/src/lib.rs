//! A software model of KVM's memory side on x86-64.
//!
//! It answers as Linux's KVM would: which memslot is taken, what a pre-fault maps and how much of it is left, how many
//! faults a guest takes, what a conversion or a punched hole undoes, and what TDX and SNP refuse. It is written from the
//! kernel's rules alone and shares no code with the library kvmprep, so that each can be held against the other, and both
//! against real kernels. Where a kernel and this model differ, the model is wrong.
//!
//! The rooms are the kernel's own:
//!
//! - [`units`], [`errno`], [`personality`]: the ground. Frame numbers, levels, errors, and which kernel is modelled.
//! - [`host`]: the host's memory, as KVM sees it through `get_user_pages` and MMU notifiers.
//! - [`gmem`], [`memslot`], [`attributes`]: what the VMM has told KVM.
//! - [`mmu`]: the TDP MMU: page tables, roots, mapping, zapping, and mirrored tables with their external ones.
//! - [`tdx`], [`snp`], and [`confidential`], which they have in common: the two kinds of confidential guests, which hang on to
//!   the rest through traits.
//! - [`vm`]: virtual machines and vCPUs, the ioctls, and the guest's accesses.
//! - [`invariants`]: what must be true after every step; [`dump`]: all of it at one moment, to be shown.
//! - [`mistake`]: rules that are broken on purpose, for a test to find.
//!
//! Imports point one way: `vm` uses everything above it, `tdx` and `snp` use `mmu`, `gmem` and `memslot`, and nothing in
//! `mmu` knows of TDX or SNP. There is no unsafe code here, and no system call.

#![forbid(unsafe_code)]

pub mod attributes;
pub mod confidential;
pub mod dump;
pub mod errno;
pub mod gmem;
pub mod host;
pub mod invariants;
pub mod memslot;
pub mod mistake;
pub mod mmu;
pub mod personality;
pub mod snp;
pub mod stats;
mod sync;
pub mod tdx;
pub mod units;
pub mod vm;
