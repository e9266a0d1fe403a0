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
mod image;
mod job;
#[cfg(feature = "experimental")]
mod launch;
mod memslot;
mod populate;
mod private;
mod vm;

pub use caps::*;
pub use error::*;
pub use image::*;
pub use job::*;
#[cfg(feature = "experimental")]
pub use launch::*;
pub use memslot::*;
pub use populate::*;
pub use private::*;
pub use vm::*;
