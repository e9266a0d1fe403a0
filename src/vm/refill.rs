//! After a conversion: both page tables are filled again, of what was converted and of what that has torn.
//!
//! A huge page is unmapped as a whole, and given up as a whole, when a part of it is converted. Which there are at the edges
//! of a range is found out here, before; afterwards they are populated by an ordinary job. Nothing is converted here.

use super::Vm;
use super::conversion::{ConvertReport, Site, interrupted};
use crate::error::{Error, Result, Stage};
use crate::kvm::{Errno, MappedObject, Mappings};
use crate::level::Level;
use crate::memslot::{Memslot, Placed, alignment};
use crate::populate::job::{Job, Leave, Options, Worker};
use crate::populate::plan::Intent;
use crate::private::discard;
use crate::private::visibility::Visibility;
use crate::range::{HUGE, PAGE, Range, RangeSet};
use std::sync::Arc;

impl Vm {
    /// All that a conversion of `range` may touch: huge pages can only go, and are to be mapped again, as a whole. `all`:
    /// transparent ones too.
    pub(super) fn reach(&self, range: Range, to: Visibility, all: bool) -> Result<Range> {
        if to == Visibility::Shared {
            return Ok(range);
        }
        let (slots, mappings) = (self.memory().slots.in_range(range), self.mappings()?);
        let mut reach = range;
        for gpa in [range.start, range.end - PAGE] {
            let page = self.host_page(&slots, &mappings, gpa, all)?;
            if let Some(page) = page.filter(|page| !range.contains(page)) {
                reach = Range { start: reach.start.min(page.start), end: reach.end.max(page.end) };
            }
        }
        Ok(reach)
    }

    pub(super) fn mappings(&self) -> Result<Mappings<'_>> {
        Mappings::now(&*self.kernel).map_err(looking_up)
    }

    /// The huge page of the host's that may hold `gpa`, as far as its slot goes: one of a pool, or, where those count too,
    /// a transparent one.
    fn host_page(
        &self,
        slots: &[Placed],
        mappings: &Mappings<'_>,
        gpa: u64,
        transparent_too: bool,
    ) -> Result<Option<Range>> {
        let Some(Placed { slot, .. }) = at(slots, gpa) else { return Ok(None) };
        let hva = slot.hva_of(gpa);
        let found = mappings.at(hva).map_err(looking_up)?.filter(|mapping| mapping.start <= hva);
        let Some(mapping) = found else { return Ok(None) };
        let size = match discard::page_size(&*self.kernel, &mapping).map_err(looking_up)? {
            PAGE if transparent_too && mapping.object != MappedObject::GuestMemfd => HUGE,
            size => size,
        };
        Ok(Range::new(hva - hva % size, size).filter(|_| size > PAGE).and_then(|page| slot.gpas_of(page)))
    }

    /// Notes the rest of the huge pages, of stage 2 and, where it `gives_up` memory, of the host's, that making the site's
    /// piece private breaks up: it is to be mapped again, by this call or a later one. Private memory has no huge pages of its
    /// own, as far as [`crate::memslot::prediction::largest_private`] knows.
    pub(super) fn note_broken_pages(&self, site: &Site<'_>, gives_up: bool) -> Result<()> {
        if site.reach == site.piece {
            return Ok(());
        }
        let mut broken = RangeSet::new();
        for gpa in [site.piece.start, site.piece.end - PAGE] {
            if let Some(frame) = self.broken_frame(&site.slots, gpa, site.reach)? {
                broken.insert(frame);
            }
            if let Some(page) = self.split_page(&site.slots, gpa, site.piece)?.filter(|_| gives_up) {
                broken.insert(page);
            }
        }
        broken.remove(site.piece);
        broken.iter().for_each(|part| self.visibility.set_torn(part, true));
        Ok(())
    }

    /// The largest page of stage 2, as far as `reach` goes, that holds `gpa` and breaks up when some of it becomes private.
    fn broken_frame(&self, slots: &[Placed], gpa: u64, reach: Range) -> Result<Option<Range>> {
        let Some(Placed { place, slot, .. }) = at(slots, gpa) else { return Ok(None) };
        for level in [Level::G1, Level::M2] {
            let frame = level.frame(gpa).filter(|frame| place.contains(frame) && reach.contains(frame));
            let may_be_huge = |frame: &Range| {
                alignment::hva_shift(&slot.region, level) == 0
                    && !slot.is_dirty_logged()
                    && self.visibility.is_all(*frame, Visibility::Shared)
            };
            let Some(frame) = frame.filter(may_be_huge) else { continue };
            let (start, end) = (slot.hva_of(frame.start), slot.hva_of(frame.start) + frame.size());
            if self.kernel.huge_pages(start, end).map_err(looking_up)? == Some((start, end)) {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// The huge page of the host's at `gpa`, as far as its slot goes, that changes when memory of `piece` is given up: a
    /// transparent one is split, and one of a pool goes when all of it is out of sight. KVM then forgets all that it has
    /// mapped of it, in small pages and privately too.
    fn split_page(&self, slots: &[Placed], gpa: u64, piece: Range) -> Result<Option<Range>> {
        let Some(Placed { slot, .. }) = at(slots, gpa) else { return Ok(None) };
        if let Some(page) = self.host_page(slots, &self.mappings()?, gpa, false)? {
            let rest = [Range::between(page.start, piece.start), Range::between(piece.end, page.end)];
            let goes = rest.iter().flatten().all(|part| self.visibility.is_all(*part, Visibility::Private));
            return Ok(goes.then_some(page));
        }
        let start = slot.hva_of(gpa) & !(HUGE - 1);
        let page = Range { start, end: start + HUGE };
        let is_whole =
            self.kernel.huge_pages(page.start, page.end).map_err(looking_up)? == Some((page.start, page.end));
        Ok(slot.gpas_of(page).filter(|_| is_whole))
    }

    /// Fills both page tables of what was converted, and of what that has cost its neighbours.
    pub(super) fn refill(
        self: &Arc<Self>,
        site: &Site<'_>,
        worker: &mut Worker<'_>,
        report: &mut ConvertReport,
    ) -> Result<()> {
        let converts =
            |slot: &Memslot| slot.has_guest_memfd() && !slot.nature.device && !slot.nature.userfaultfd;
        let mut torn = self.visibility.torn(site.reach);
        torn.remove(site.piece);
        let asked: Vec<Range> = std::iter::once(site.piece)
            .chain(torn.iter())
            .flat_map(|all| parts(&site.slots, all))
            .filter(|(_, placed)| converts(&placed.slot))
            .map(|(part, _)| part)
            .collect();
        if asked.is_empty() {
            return Ok(());
        }
        let job = Job::new(self, &asked, refilling(!worker.has_vcpu())).map_err(not_refilled)?;
        let leave = job.lend(worker, &mut |_| {});
        let left = job.remaining();
        job.give_up();
        let mapped_again = torn.iter().flat_map(|part| left.missing(part));
        mapped_again.for_each(|part| self.visibility.set_torn(part, false));
        let prefaulted = job.done_in_stage2();
        report.prefaulted += prefaulted;
        if prefaulted > 0 {
            report.neighbours += torn.iter().map(|part| part.size() - left.size_within(part)).sum::<u64>();
        }
        let rest = left.first().unwrap_or(site.piece);
        match leave {
            Leave::Interrupted => Err(interrupted(rest, Stage::Stage2)),
            _ => job
                .verdict()
                .map_err(|error| not_refilled(Error { range: error.range.or(Some(rest)), ..error })),
        }
    }
}

/// All is converted: that the stage must tell, whatever kept it from being populated.
pub(super) fn not_refilled(error: Error) -> Error {
    match error.stage {
        Stage::Host | Stage::Stage2 => error,
        _ => error.stage(Stage::Stage2),
    }
}

/// The slots that have something of `range`, with what they have of it; by place, as `slots` are.
pub(super) fn parts(slots: &[Placed], range: Range) -> impl Iterator<Item = (Range, &Placed)> {
    let first = slots.partition_point(|placed| placed.place.end <= range.start);
    slots[first..].iter().map_while(move |placed| Some((placed.place.intersect(&range)?, placed)))
}

/// The slot that holds `gpa`.
fn at(slots: &[Placed], gpa: u64) -> Option<&Placed> {
    let first = slots.partition_point(|placed| placed.place.end <= gpa);
    slots.get(first).filter(|placed| placed.place.start <= gpa)
}

pub(super) fn looking_up(errno: Errno) -> Error {
    Error::system(errno, "looking up the slot's mapping").stage(Stage::Attributes)
}

fn refilling(host_only: bool) -> Options {
    Options {
        intent: Intent::Write,
        host_only,
        huge_advice: false,
        require_stage2: false,
        check_free: false,
        skip_covered: false,
        dirty_logged_too: false,
        exact: false,
        for_conversion: true,
        timeout: None,
    }
}
