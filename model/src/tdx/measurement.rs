//! What the TDX module measures of the initial image: the register MRTD.
//!
//! It is SHA-384 over blocks of 128 bytes: one that names each page that is added, and for each 256 bytes that are measured
//! one that names them and the 256 bytes themselves. So it depends on the order of everything, and the same image loaded by
//! a real TDX module has the same value.

use sha2::{Digest as _, Sha384};

use crate::confidential::Digest;
use crate::units::Gfn;

/// How many bytes one MR.EXTEND measures.
pub const CHUNK: u64 = 256;

/// The measurement of a guest while its image is loaded.
#[derive(Clone, Debug, Default)]
pub struct Measurement {
    hash: Sha384,
}

impl Measurement {
    /// A page is part of the image.
    pub fn add_page(&mut self, gfn: Gfn) {
        self.hash.update(block(b"MEM.PAGE.ADD", gfn.gpa()));
    }

    /// So is what 256 bytes of it hold.
    pub fn extend(&mut self, gpa: u64, chunk: &[u8; CHUNK as usize]) {
        self.hash.update(block(b"MR.EXTEND", gpa));
        self.hash.update(chunk);
    }

    /// The value.
    pub fn value(&self) -> Digest {
        self.hash.clone().finalize().into()
    }
}

fn block(name: &[u8], gpa: u64) -> [u8; 128] {
    let mut block = [0; 128];
    block[..name.len()].copy_from_slice(name);
    block[16..24].copy_from_slice(&gpa.to_le_bytes());
    block
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;

    /// The value was computed apart from this code, by a few lines of Python from the module's own description.
    #[test]
    fn the_value_is_that_of_a_real_module() {
        let mut measurement = Measurement::default();
        measurement.add_page(Gfn(1));
        for offset in (0..PAGE_SIZE).step_by(CHUNK as usize) {
            let mut chunk = [0; CHUNK as usize];
            if offset == 0 {
                chunk[..8].copy_from_slice(&0x1122_3344_5566_7788_u64.to_le_bytes());
            }
            measurement.extend(0x1000 + offset, &chunk);
        }
        measurement.add_page(Gfn(2));
        let value: String = measurement.value().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            value,
            "f00e19bccb933b9a8bc992209dc2a98d130098fec5f9763b413694d38c91b822e8478ae85f028734404d2d96f5d09787"
        );
    }
}
