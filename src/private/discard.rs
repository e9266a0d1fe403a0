//! Giving memory up that has gone out of the guest's sight: guest_memfd pages that are shared now, shared memory that is
//! private now.
//!
//! Each kind of memory has its own call for that. Whether it is time is for others ([`super::convert`]): what is given up
//! here is lost.

use super::convert::Given;
use super::visibility::{Visibility, VisibilityMap};
use crate::error::{Error, Result, Stage};
use crate::kvm::{Errno, Kernel, MappedObject, Mapping, Mappings, Smaps, Sys};
use crate::memslot::{Memslot, Placed};
use crate::range::{PAGE, Range, RangeSet};
use std::cell::RefCell;
use std::os::fd::RawFd;

/// Where memory is given up: this process, as it is on one occasion.
pub struct Host<'a> {
    /// The kernel beneath.
    pub kernel: &'a dyn Kernel,
    /// The mappings.
    pub mappings: &'a Mappings<'a>,
    /// Memory that more than one slot shows: none of them has it for itself.
    pub shown_twice: &'a RangeSet,
    /// What is private.
    pub map: &'a VisibilityMap,
    /// What was kept on this occasion and may go later on it, with the rest of its huge page.
    pub kept: &'a RefCell<RangeSet>,
}

impl Host<'_> {
    /// Gives up what `part` of a slot was as `out_of_sight`.
    pub fn drop_side(
        &self,
        slot: &Placed,
        part: Range,
        out_of_sight: Visibility,
        given: &mut Given,
    ) -> Result<()> {
        match out_of_sight {
            Visibility::Private => self.drop_private(&slot.slot, part, given),
            Visibility::Shared => self.drop_shared(&slot.slot, part, given),
        }
    }

    fn drop_private(&self, slot: &Memslot, part: Range, given: &mut Given) -> Result<()> {
        let Some((fd, offset)) = slot.guest_memfd_at(part.start) else { return Ok(()) };
        self.kernel.punch(fd, offset, part.size()).map_err(|errno| failed(slot, part, errno))?;
        given.up += part.size();
        Ok(())
    }

    fn drop_shared(&self, slot: &Memslot, part: Range, given: &mut Given) -> Result<()> {
        let mut at = part.start;
        while let Some(rest) = Range::between(at, part.end) {
            let found = self.mappings.at(slot.hva_of(at)).map_err(|errno| failed(slot, rest, errno))?;
            let Some(mapping) = found else { break };
            let mapped = slot.gpas_of(Range { start: mapping.start, end: mapping.end });
            let Some(piece) = mapped.and_then(|mapped| mapped.intersect(&rest)) else { break };
            self.drop_mapped(slot, &mapping, piece, given)?;
            at = piece.end;
        }
        Ok(())
    }

    fn drop_mapped(&self, slot: &Memslot, mapping: &Mapping, piece: Range, given: &mut Given) -> Result<()> {
        let page = page_size(self.kernel, mapping).map_err(|errno| failed(slot, piece, errno))?;
        let (mut up, mut failure) = (RangeSet::new(), None);
        for part in self.own_pages(slot, page, piece) {
            match self.give_up(slot, mapping, part) {
                Ok(()) => up.insert(part),
                Err(errno) if can_never_go(errno) => {}
                Err(errno) => {
                    failure = Some(failed(slot, part, errno));
                    break;
                }
            }
        }
        let mut kept = self.kept.borrow_mut();
        given.kept_no_more += up.iter().map(|part| kept.remove(part)).sum::<u64>();
        let of_piece = up.size_within(piece);
        given.up += of_piece;
        given.late += up.size() - of_piece;
        if let Some(failure) = failure {
            return Err(failure);
        }
        given.kept += piece.size() - of_piece;
        up.missing(piece).into_iter().for_each(|part| kept.insert(part));
        Ok(())
    }

    /// What of [`Self::whole_pages`] no other slot shows.
    fn own_pages(&self, slot: &Memslot, size: u64, piece: Range) -> Vec<Range> {
        let Some(whole) = self.whole_pages(slot, size, piece) else { return Vec::new() };
        let host = Range { start: slot.hva_of(whole.start), end: slot.hva_of(whole.start) + whole.size() };
        let page_of = |part: Range| Range {
            start: part.start - part.start % size,
            end: part.end.next_multiple_of(size),
        };
        let others: RangeSet = self.shown_twice.within(host).map(page_of).collect();
        others.missing(host).into_iter().filter_map(|part| slot.gpas_of(part)).collect()
    }

    /// Where pages are huge, of a pool, and can only go as a whole: `piece` without those whose rest is to stay, and with
    /// the rest of those whose rest is not.
    fn whole_pages(&self, slot: &Memslot, size: u64, piece: Range) -> Option<Range> {
        if size <= PAGE {
            return Some(piece);
        }
        let page_at = |gpa: u64| {
            let hva = slot.hva_of(gpa);
            let page = slot.gpas_of(Range::new(hva - hva % size, size)?)?;
            (page.size() == size && self.map.may_be_dropped(page, piece)).then_some(page)
        };
        let last = piece.end - PAGE;
        let start = match page_at(piece.start) {
            Some(page) => page.start,
            None => piece.start.checked_add(size - slot.hva_of(piece.start) % size)?,
        };
        let end = match page_at(last) {
            Some(page) => page.end,
            None => last.checked_sub(slot.hva_of(last) % size)?,
        };
        Range::between(start, end)
    }

    fn give_up(&self, slot: &Memslot, mapping: &Mapping, part: Range) -> Sys<()> {
        let hva = slot.hva_of(part.start);
        if !mapping.shared {
            return self.kernel.discard(hva, part.size());
        }
        match self.kernel.remove(hva, part.size()) {
            // Locked memory is not let go this way; by its file it is. The descriptor is the VMM's word, and what is punched
            // out of another file is lost.
            Err(Errno(libc::EINVAL | libc::EACCES)) => match self.file_of(slot, mapping, part) {
                Some((fd, offset)) => self.kernel.punch(fd, offset, part.size()),
                None => Err(Errno(libc::EINVAL)),
            },
            answer => answer,
        }
    }

    /// The file behind the mapping, where the VMM has told of it and it is that still.
    fn file_of(&self, slot: &Memslot, mapping: &Mapping, part: Range) -> Option<(RawFd, u64)> {
        let (fd, offset) = slot.file_at(part.start)?;
        let is_it = mapping.inode != 0
            && self.kernel.file_status(fd).is_ok_and(|status| status.id.inode == mapping.inode)
            && offset == mapping.offset + (slot.hva_of(part.start) - mapping.start);
        is_it.then_some((fd, offset))
    }
}

/// Whether that is the answer of memory that cannot be given up: a device's, a sealed file's, a locked mapping's.
fn can_never_go(errno: Errno) -> bool {
    matches!(errno.0, libc::EINVAL | libc::EACCES | libc::EPERM | libc::ENODEV | libc::EOPNOTSUPP)
}

/// Bytes in a page of the mapping. Where the mapping does not tell (before Linux 6.11), what may be of a pool is looked for:
/// who took it for small pages would never give a huge one up that is converted part by part.
pub fn page_size(kernel: &dyn Kernel, mapping: &Mapping) -> Sys<u64> {
    match (mapping.page_size, mapping.object) {
        (0, MappedObject::Hugetlb | MappedObject::Shmem | MappedObject::File) => {
            Ok(Smaps::new(kernel).look(mapping.start)?.map_or(PAGE, |entry| entry.page_size))
        }
        (0, _) => Ok(PAGE),
        (size, _) => Ok(size),
    }
}

fn failed(slot: &Memslot, part: Range, errno: Errno) -> Error {
    Error::system(errno, "giving up memory that is out of sight")
        .stage(Stage::Drop)
        .slot(slot.id())
        .range(part)
}
