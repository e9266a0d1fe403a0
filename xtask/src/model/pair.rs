//! A mirror and the external table that it is to be equal to, row by row.
//!
//! Here it is decided whether a difference between the two is a change under way, and by which call, or a mistake.

use super::calls::Call;
use super::player::{Progress, UnderWay};
use super::runs::put_together;
use super::view::{Cell, CellKind, Link, Names, PairRow, cell, cell_of_spte, place};
use kvmprep_model::dump::{ExternalEntry, ExternalTarget};
use kvmprep_model::mmu::{RootDump, Spte};
use kvmprep_model::units::{Gfn, GfnRange, Level, Pfn};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// What both sides have in one place.
#[derive(Clone, Copy, Default)]
struct Both<'a> {
    mirror: Option<Spte>,
    external: Option<&'a ExternalEntry>,
}

/// All places where one of both has something.
pub fn pair_rows(
    mirror: &RootDump,
    external: &[ExternalEntry],
    names: &Names,
    under_way: &[UnderWay],
) -> Vec<PairRow> {
    // A table comes before what is in it.
    let mut places: BTreeMap<(Gfn, Reverse<Level>), Both<'_>> = BTreeMap::new();
    for entry in &mirror.entries {
        places.entry((entry.gfn, Reverse(entry.level))).or_default().mirror = Some(entry.spte);
    }
    for entry in external {
        places.entry((entry.gfn, Reverse(entry.level))).or_default().external = Some(entry);
    }
    let row = |((gfn, Reverse(level)), both): (_, Both<'_>)| {
        let frame = both.frame(level).and_then(|pfn| names.get(&(gfn, pfn)).cloned());
        PairRow {
            place: place(mirror.level, gfn, level),
            mirror: both.mirror.map_or_else(nothing, |spte| cell_of_spte(spte, level, false)),
            external: both.external.map_or_else(nothing, cell_of_external),
            link: both.link(gfn, level, under_way),
            frame: frame.unwrap_or_default(),
        }
    };
    put_together(places.into_iter().map(row).collect())
}

fn nothing() -> Cell {
    cell(CellKind::Nothing, "nothing", "")
}

fn cell_of_external(entry: &ExternalEntry) -> Cell {
    let (kind, what, note) = match entry.target {
        ExternalTarget::Table => (CellKind::Table, "table".to_string(), ""),
        ExternalTarget::Page { pfn, is_pending: false } => {
            (CellKind::Page, format!("frame {:#x}", pfn.0), "")
        }
        ExternalTarget::Page { pfn, is_pending: true } => {
            (CellKind::Pending, format!("frame {:#x}", pfn.0), "pending")
        }
    };
    if entry.is_blocked { cell(CellKind::Blocked, what, "blocked") } else { cell(kind, what, note) }
}

impl Both<'_> {
    /// The frame that both map, or one of them.
    fn frame(self, level: Level) -> Option<Pfn> {
        match self.external.map(|entry| entry.target) {
            Some(ExternalTarget::Page { pfn, .. }) => Some(pfn),
            _ => self.mirror.filter(|spte| spte.is_leaf(level)).map(Spte::pfn),
        }
    }

    fn are_equal(self, level: Level) -> bool {
        match (self.mirror, self.external.map(|entry| entry.target)) {
            (Some(spte), Some(ExternalTarget::Table)) => spte.child(level).is_some(),
            (Some(spte), Some(ExternalTarget::Page { pfn, .. })) => spte.is_leaf(level) && spte.pfn() == pfn,
            (None, None) => true,
            _ => false,
        }
    }

    fn link(self, gfn: Gfn, level: Level, under_way: &[UnderWay]) -> Link {
        if self.are_equal(level) {
            return Link::Equal;
        }
        let place = GfnRange::of_page(gfn, level);
        let is_here = |range: &GfnRange| range.intersection(place).is_some();
        let here = under_way.iter().filter(|under_way| under_way.ranges.iter().any(is_here));
        // A frozen entry waits for something to be put in, one that is cleared for something to be taken out.
        let is_frozen = self.mirror.is_some_and(Spte::is_frozen);
        let is_its = |call: &Call| match call.takes_away() {
            false => is_frozen && call.adds_table() == (level > Level::SMALL),
            true => self.mirror.is_none(),
        };
        let stopped_in = |under_way: &UnderWay| match under_way.progress {
            Progress::Stopped(call) => Some(call).filter(is_its),
            Progress::Waits => None,
        };
        match here.into_iter().find_map(stopped_in) {
            Some(call) => Link::UnderWay { call: call.name().into(), takes_away: call.takes_away() },
            None => Link::Different,
        }
    }
}
