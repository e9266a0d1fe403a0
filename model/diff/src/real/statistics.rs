//! KVM's own counters of a VM or a vCPU, by name, as KVM_GET_STATS_FD gives them.
//!
//! They are read by name, since each kernel has its own order. A counter that a kernel does not have is not there;
//! nothing is put in its place.

use std::cell::{RefCell, RefMut};
use std::os::fd::OwnedFd;

use kvm_bindings::{kvm_stats_desc, kvm_stats_header};

use super::sys;
use crate::machine::Outcome;

const KVM_GET_STATS_FD: u64 = sys::io(0xce);

/// Some counters of one VM or vCPU.
pub struct Statistics {
    file: OwnedFd,
    /// Names, and the places of their values among all from `data` on.
    places: Vec<(&'static str, usize)>,
    data: u64,
    values: RefCell<Vec<u64>>,
}

impl Statistics {
    /// Finds those counters of a VM or vCPU that have one of these names.
    pub fn of(owner: &OwnedFd, names: &[&'static str]) -> Result<Self, i64> {
        let file = sys::owned(sys::ioctl(owner, KVM_GET_STATS_FD, 0))?;
        let header = Header::read(&file)?;
        let found = (0..header.count).map(|number| header.descriptor(&file, number));
        let found = found.collect::<Result<Vec<_>, i64>>()?;
        let place = |name: &'static str| {
            found.iter().find(|(other, _)| other == name).map(|(_, place)| (name, *place))
        };
        let places: Vec<_> = names.iter().copied().filter_map(place).collect();
        let words = places.iter().map(|(_, place)| place + 1).max().unwrap_or(0);
        Ok(Statistics { places, data: header.data, values: RefCell::new(vec![0; words]), file })
    }

    /// One of them, as it is now.
    pub fn get(&self, name: &str) -> Option<u64> {
        let (_, place) = self.places.iter().find(|(other, _)| *other == name)?;
        Some(self.read()[*place])
    }

    /// Adds what they are now.
    pub fn add(&self, outcome: &mut Outcome) {
        let values = self.read();
        self.places.iter().for_each(|(name, place)| outcome.add_unsigned(name, values[*place]));
    }

    fn read(&self) -> RefMut<'_, Vec<u64>> {
        let mut values = self.values.borrow_mut();
        sys::read_words(&self.file, &mut values, self.data);
        values
    }
}

struct Header {
    count: u64,
    name_size: u64,
    descriptors: u64,
    data: u64,
}

impl Header {
    fn read(file: &OwnedFd) -> Result<Self, i64> {
        let mut words = [0; size_of::<kvm_stats_header>() / 8];
        check(sys::read_words(file, &mut words, 0))?;
        let half = |number: usize| words[number / 2] >> (32 * (number % 2)) & 0xffff_ffff;
        Ok(Header { name_size: half(1), count: half(2), descriptors: half(4), data: half(5) })
    }

    /// The name of one counter, and which word of the data it is.
    fn descriptor(&self, file: &OwnedFd, number: u64) -> Result<(String, usize), i64> {
        let fixed = size_of::<kvm_stats_desc>() as u64;
        let stride = fixed + self.name_size;
        let mut words = vec![0; usize::try_from(stride.div_ceil(8)).unwrap_or(0)];
        check(sys::read_words(file, &mut words, self.descriptors + number * stride))?;
        // flags: 32 bits, exponent and size: 16 each, then the offset and the bucket's size, 32 each.
        let offset = words[1] & 0xffff_ffff;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let name = bytes[usize::try_from(fixed).unwrap_or(0)..].split(|byte| *byte == 0).next();
        Ok((
            String::from_utf8_lossy(name.unwrap_or(&[])).into_owned(),
            usize::try_from(offset / 8).unwrap_or(0),
        ))
    }
}

fn check(read: i64) -> Result<(), i64> {
    if read < 0 { Err(read) } else { Ok(()) }
}
