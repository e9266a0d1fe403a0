//! The C face, one file for each section of the header.
//!
//! Arguments are checked and panics caught in one place, [`boundary`]; then the call goes inward. There is no
//! logic here, and no other module knows that this one exists.
//!
//! What these files' comments say is what C programmers read: cbindgen carries them into `include/kvmprep.h`.

#![allow(non_camel_case_types, reason = "C's names")]

pub mod boundary;

mod caps;
mod error;
mod job;
mod memslot;
mod populate;
mod vm;

pub use caps::*;
pub use error::*;
pub use job::*;
pub use memslot::*;
pub use populate::*;
pub use vm::*;
