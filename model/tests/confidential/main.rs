//! Confidential guests from their beginning to their end, on whole virtual machines.
//!
//! What each command checks is tested beside it, in the crate. Here nothing is faked but the host's memory, the TDX module and
//! the SNP firmware, which are the model's own.

mod bench;
mod dump;
mod lives;
mod midway;
mod steps;
mod validation;
