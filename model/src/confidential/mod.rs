//! What TDX and SNP have in common.
//!
//! Both put an initial image into private memory page by page, out of memory that the VMM names, and both depend on an
//! agent beside KVM (a module, a firmware) that says no in its own words and that tests let fail. Which agent it is, and
//! what it is asked, stands in [`tdx`](crate::tdx) and [`snp`](crate::snp), never here.

pub mod failures;
pub mod frames;
pub mod image;
pub mod stops;
#[cfg(all(test, not(loom)))]
pub(crate) mod testing;

pub use failures::Failures;
pub use image::{Held, ImageTarget, User};
pub use stops::Stop;

/// A measurement: SHA-384, which both use.
pub type Digest = [u8; 48];
