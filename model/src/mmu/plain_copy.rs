//! An external table that only keeps what it was told, to be looked at.
//!
//! Nothing stands behind it: no hardware, and no rules but those that hold for any tables. A page needs a table to be in, a
//! table a parent; nothing comes twice, and nothing goes that is not there, or before what is below it. What breaks these is
//! refused for good, and the MMU then calls it a bug.

use super::external::{Change, Contents, ExternalError, ExternalTable, Request};
use super::table::lock;
use crate::sync::Mutex;
use crate::units::{Gfn, Level, Pfn};
use std::collections::{BTreeMap, BTreeSet};

/// A copy of the mirrored tables of one root.
pub struct PlainCopy {
    root_level: Level,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pages: BTreeMap<u64, Pfn>,
    /// By level and first frame.
    tables: BTreeSet<(Level, u64)>,
    calls: Calls,
    /// Calls that put something in and are to fail, counted from the first.
    failing: BTreeMap<u64, ExternalError>,
    puts: u64,
}

/// How often each thing was done.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Calls {
    /// A page was mapped.
    pub pages_mapped: u64,
    /// A page was taken away.
    pub pages_removed: u64,
    /// A table was put in.
    pub tables_added: u64,
    /// A table was freed.
    pub tables_freed: u64,
}

impl PlainCopy {
    /// For tables whose root is of this level.
    pub fn new(root_level: Level) -> Self {
        Self { root_level, state: Mutex::new(State::default()) }
    }

    /// Has the request fail that will be the `nth` from now, from 0, among those that put something in.
    pub fn fail(&self, nth: u64, error: ExternalError) {
        self.with(|state| state.failing.insert(state.puts + nth, error));
    }

    /// How often each thing was done.
    pub fn calls(&self) -> Calls {
        self.with(|state| state.calls)
    }

    /// The frame that is mapped at a guest's frame.
    pub fn page(&self, gfn: Gfn) -> Option<Pfn> {
        self.with(|state| state.pages.get(&gfn.0).copied())
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut lock(&self.state))
    }
}

impl State {
    /// Counts a request that puts something in, and fails it if that was asked for.
    fn put(&mut self) -> Result<(), ExternalError> {
        let nth = self.puts;
        self.puts += 1;
        self.failing.remove(&nth).map_or(Ok(()), Err)
    }

    fn has_table(&self, gfn: Gfn, level: Level, root_level: Level) -> bool {
        level == root_level || self.tables.contains(&(level, gfn.rounded_down(level.above()).0))
    }
}

fn require(holds: bool) -> Result<(), ExternalError> {
    if holds { Ok(()) } else { Err(ExternalError::Fatal) }
}

impl ExternalTable for PlainCopy {
    fn set(&self, change: &Change) -> Result<(), ExternalError> {
        let Change { gfn, level, .. } = *change;
        self.with(|state| {
            let has_table = state.has_table(gfn, level, self.root_level);
            match change.request() {
                Request::MapPage { pfn } => {
                    state.put()?;
                    require(has_table && level == Level::SMALL)?;
                    require(state.pages.insert(gfn.0, pfn).is_none())?;
                    state.calls.pages_mapped += 1;
                }
                Request::AddTable { .. } => {
                    state.put()?;
                    require(has_table && state.tables.insert((level.below(), gfn.0)))?;
                    state.calls.tables_added += 1;
                }
                Request::RemovePage { pfn } => {
                    require(state.pages.remove(&gfn.0) == Some(pfn))?;
                    state.calls.pages_removed += 1;
                }
                Request::ChangePage => require(state.pages.get(&gfn.0) == Some(&change.new.pfn()))?,
            }
            Ok(())
        })
    }

    fn free(&self, gfn: Gfn, level: Level) -> Result<(), ExternalError> {
        let end = gfn.0 + level.above().pages();
        self.with(|state| {
            require(state.pages.range(gfn.0..end).next().is_none())?;
            let is_below = |(below, at): &(Level, u64)| *below < level && (gfn.0..end).contains(at);
            require(!state.tables.iter().any(is_below))?;
            require(state.tables.remove(&(level, gfn.0)))?;
            state.calls.tables_freed += 1;
            Ok(())
        })
    }

    fn contents(&self) -> Option<Contents> {
        Some(self.with(|state| Contents {
            pages: state.pages.iter().map(|(gfn, pfn)| (Gfn(*gfn), *pfn)).collect(),
            tables: state.tables.iter().map(|(level, gfn)| (Gfn(*gfn), *level)).collect(),
        }))
    }
}
