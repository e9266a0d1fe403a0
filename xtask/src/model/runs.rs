//! Pages beside each other that are alike, put together into one row, where there would be too many.

use super::view::{Cell, CellKind, EntryPlace, Link, PairRow, Row};
use kvmprep_model::dump::text::size;
use kvmprep_model::units::PAGE_SIZE;

/// With more rows than this, pages beside each other are put together.
const MANY_ROWS: usize = 14;
/// So many at least.
const RUN: usize = 4;

/// What can be put together with the same after it.
pub trait InRuns: Sized {
    fn place(&self) -> &EntryPlace;
    /// Whether they are the same but for where they are, and which frame that is.
    fn is_like(&self, other: &Self) -> bool;
    /// All of them in one.
    fn of_run(run: &[Self]) -> Self;
}

impl InRuns for Row {
    fn place(&self) -> &EntryPlace {
        &self.place
    }

    fn is_like(&self, other: &Self) -> bool {
        (self.cell.kind, &self.cell.note, self.is_private)
            == (CellKind::Page, &other.cell.note, other.is_private)
            && other.cell.kind == CellKind::Page
    }

    fn of_run(run: &[Self]) -> Self {
        let first = run[0].clone();
        let last = run.last().map_or("", |last| &last.frame);
        let frame = frames_of_run(&first.frame, last);
        Row {
            place: place_of_run(run),
            cell: first.cell.of_many(run.len()),
            frame,
            is_private: first.is_private,
        }
    }
}

impl InRuns for PairRow {
    fn place(&self) -> &EntryPlace {
        &self.place
    }

    fn is_like(&self, other: &Self) -> bool {
        let is_page = |kind| matches!(kind, CellKind::Page | CellKind::Pending);
        (self.mirror.kind, self.external.kind, &self.link)
            == (other.mirror.kind, other.external.kind, &other.link)
            && is_page(self.external.kind)
            && self.link == Link::Equal
    }

    fn of_run(run: &[Self]) -> Self {
        let first = run[0].clone();
        PairRow {
            place: place_of_run(run),
            mirror: first.mirror.of_many(run.len()),
            external: first.external.of_many(run.len()),
            frame: frames_of_run(&first.frame, run.last().map_or("", |last| &last.frame)),
            link: first.link,
        }
    }
}

impl Cell {
    fn of_many(self, pages: usize) -> Self {
        Cell { what: format!("{pages} frames"), ..self }
    }
}

fn place_of_run<T: InRuns>(run: &[T]) -> EntryPlace {
    let first = run[0].place().clone();
    EntryPlace { size: size(run.len() as u64 * first.level.pages() * PAGE_SIZE), ..first }
}

/// `ram 0–7`, for there is little room. Pages of other names have that in common.
fn frames_of_run(first: &str, last: &str) -> String {
    match (first.split_once(" page "), last.split_once(" page ")) {
        (Some((name, from)), Some((_, to))) => format!("{name} {from}–{to}"),
        _ => first.to_string(),
    }
}

/// The rows, with runs of alike pages as one if there are many.
pub fn put_together<T: InRuns + Clone>(rows: Vec<T>) -> Vec<T> {
    if rows.len() <= MANY_ROWS {
        return rows;
    }
    let follows = |a: &T, b: &T| {
        let (at, next) = (a.place(), b.place());
        a.is_like(b) && at.level == next.level && at.gfn.plus(at.level.pages()) == next.gfn
    };
    rows.chunk_by(follows)
        .flat_map(|run| if run.len() >= RUN { vec![T::of_run(run)] } else { run.to_vec() })
        .collect()
}
