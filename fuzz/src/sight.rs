//! What lies behind a guest's memory, on a kernel that is none: whether a conversion has given up what is in sight, or
//! kept what is not.
//!
//! It looks only at slots whose memory and files nobody else has, since of others there is nothing to be said.

use crate::fake::Fake;
use crate::oracle::{demand, share};
use crate::slots::{GUEST_MEMFD, OWN_FILES};
use kvmprep::abi::{KVMPREP_MEMSLOT_MEMORY_FD, kvmprep_memslot};
use kvmprep::range::{Range, RangeSet};

/// The slots that can be judged.
pub fn of_their_own(slots: &[kvmprep_memslot]) -> Vec<kvmprep_memslot> {
    let is_alone = |slot: &&kvmprep_memslot| {
        let has_own_files = slot.guest_memfd >= OWN_FILES && slot.flags & GUEST_MEMFD != 0;
        has_own_files
            && slot.slot >> 16 == 0
            && slots.iter().filter(|other| other.slot != slot.slot).all(|other| {
                !share((slot.hva, slot.size), (other.hva, other.size))
                    && slot.guest_memfd != other.guest_memfd
                    && (slot.memory_fd < 0 || slot.memory_fd != other.memory_fd)
            })
    };
    slots.iter().filter(is_alone).copied().collect()
}

/// Has all of their memory there, on both sides.
pub fn fill(fake: &Fake, slots: &[kvmprep_memslot]) {
    let mut host = fake.host.lock().expect("no thread has failed");
    let mut allocated = fake.allocated.lock().expect("no thread has failed");
    for slot in slots {
        host.insert(Range { start: slot.hva, end: slot.hva + slot.size });
        for (fd, offset) in files(slot) {
            let whole = Range { start: offset, end: offset + slot.size };
            allocated.entry(fd).or_default().insert(whole);
        }
    }
}

/// The files behind a slot, and where in them it begins: the guest_memfd, and what is mapped.
fn files(slot: &kvmprep_memslot) -> impl Iterator<Item = (i32, u64)> {
    let is_told = slot.attributes & KVMPREP_MEMSLOT_MEMORY_FD != 0;
    let mapped = is_told.then_some((slot.memory_fd, slot.memory_fd_offset));
    std::iter::once((slot.guest_memfd, slot.guest_memfd_offset)).chain(mapped)
}

/// What has become of memory that was there on both sides, and of which `before` was private and `after` is.
pub struct Sight<'a> {
    pub fake: &'a Fake,
    pub slots: &'a [kvmprep_memslot],
    pub before: &'a RangeSet,
    pub after: &'a RangeSet,
}

impl Sight<'_> {
    /// Nothing is gone that was never out of sight.
    pub fn judge_kept(&self, name: &str) {
        for slot in self.slots {
            let place = Range { start: slot.gpa, end: slot.gpa + slot.size };
            let (private, shared) = (self.stayed(place, true), self.stayed(place, false));
            demand(private.iter().all(|part| self.has_private(slot, *part)), name, "private memory is kept");
            demand(shared.iter().all(|part| self.has_shared(slot, *part)), name, "shared memory is kept");
        }
    }

    /// All of `range` that has gone out of sight is gone, of slots in memory that can go page by page and is no
    /// guest_memfd. `first` is the hva of the first mapping that is such.
    pub fn judge_dropped(&self, name: &str, range: Range, first: u64) {
        for slot in self.slots.iter().filter(|slot| slot.hva >= first) {
            let place = Range { start: slot.gpa, end: slot.gpa + slot.size };
            let Some(place) = place.intersect(&range) else { continue };
            let allocated = self.fake.allocated.lock().expect("no thread has failed");
            let host = self.fake.host.lock().expect("no thread has failed");
            for part in self.before.within(place).flat_map(|was| self.after.missing(was)) {
                let start = part.start - slot.gpa + slot.guest_memfd_offset;
                let left =
                    allocated[&slot.guest_memfd].size_within(Range { start, end: start + part.size() });
                demand(left == 0, name, "private memory that became shared is given up");
            }
            for part in self.after.within(place).flat_map(|is| self.before.missing(is)) {
                let start = part.start - slot.gpa + slot.hva;
                let left = host.size_within(Range { start, end: start + part.size() });
                demand(left == 0, name, "shared memory that became private is given up");
            }
        }
    }

    /// The parts of `place` that were and are private, or were and are shared.
    fn stayed(&self, place: Range, private: bool) -> Vec<Range> {
        if private {
            self.before.within(place).flat_map(|part| self.after.within(part).collect::<Vec<_>>()).collect()
        } else {
            self.before.missing(place).into_iter().flat_map(|part| self.after.missing(part)).collect()
        }
    }

    fn has_private(&self, slot: &kvmprep_memslot, part: Range) -> bool {
        self.has_in_file(slot, part, slot.guest_memfd, slot.guest_memfd_offset)
    }

    fn has_shared(&self, slot: &kvmprep_memslot, part: Range) -> bool {
        let start = part.start - slot.gpa + slot.hva;
        let mapped = Range { start, end: start + part.size() };
        let host = self.fake.host.lock().expect("no thread has failed");
        host.size_within(mapped) == mapped.size()
            && files(slot).skip(1).all(|(fd, offset)| self.has_in_file(slot, part, fd, offset))
    }

    fn has_in_file(&self, slot: &kvmprep_memslot, part: Range, fd: i32, offset: u64) -> bool {
        let start = part.start - slot.gpa + offset;
        let allocated = self.fake.allocated.lock().expect("no thread has failed");
        let held =
            allocated.get(&fd).map_or(0, |set| set.size_within(Range { start, end: start + part.size() }));
        held == part.size()
    }
}
