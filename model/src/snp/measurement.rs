//! What the firmware measures of an initial image: the launch digest.
//!
//! Each page's digest is made of the one before and of what was added, so that it depends on the order of everything. The
//! same image launched by real firmware has the same value, but for the pages of vCPUs: the model has no registers, and
//! takes such a page for zeros.

use sha2::{Digest as _, Sha384};

use crate::confidential::Digest;
use crate::host::Page;
use crate::snp::PageType;
use crate::units::PAGE_SIZE;

/// How long the structure is that is hashed for each page.
const PAGE_INFO_SIZE: usize = 0x70;
/// The address that pages of vCPUs count as.
const VCPU_PAGE_GPA: u64 = 0xffff_ffff_f000;

/// The launch digest so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LaunchDigest(pub Digest);

impl Default for LaunchDigest {
    fn default() -> Self {
        LaunchDigest([0; 48])
    }
}

impl LaunchDigest {
    /// A page is part of the image. What it holds counts only if it is an ordinary one.
    pub fn add_page(&mut self, kind: PageType, gpa: u64, page: &Page) {
        let contents = if kind == PageType::Normal { Sha384::digest(page).into() } else { [0; 48] };
        self.add(kind as u8, gpa, &contents);
    }

    /// A vCPU is part of the image.
    pub fn add_vcpu(&mut self) {
        const VMSA: u8 = 2;
        self.add(VMSA, VCPU_PAGE_GPA, &Sha384::digest([0; PAGE_SIZE as usize]).into());
    }

    fn add(&mut self, kind: u8, gpa: u64, contents: &Digest) {
        let mut info = [0; PAGE_INFO_SIZE];
        info[..48].copy_from_slice(&self.0);
        info[48..96].copy_from_slice(contents);
        info[96..98].copy_from_slice(&(PAGE_INFO_SIZE as u16).to_le_bytes());
        info[98] = kind;
        info[104..].copy_from_slice(&gpa.to_le_bytes());
        self.0 = Sha384::digest(info).into();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::snp::firmware::page_of;

    /// The value was computed apart from this code, by a few lines of Python from the firmware's own description.
    #[test]
    fn the_value_is_that_of_real_firmware() {
        let mut digest = LaunchDigest::default();
        let page = page_of(0x1122_3344_5566_7788);
        digest.add_page(PageType::Normal, 0x1000, &page);
        digest.add_page(PageType::Zero, 0x2000, &page);
        digest.add_vcpu();
        let value: String = digest.0.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            value,
            "3761d07bc649230298baf3e35b2b17bb10dfc9ce58f8c5982c21a0701fe565c541ab15e1ab7af5644160205bf904e97b"
        );
    }
}
