//! What must be true of page tables, whatever happened.
//!
//! Some of it can be seen from the tables as they are ([`check`]), some only from how they were before a step
//! ([`TRANSITIONS`]), and some of it the code cannot break at all: only a shared guard can map and only an exclusive one can
//! take a mirrored page away, as the types have it; and that a page never takes another's place is asserted where entries
//! are changed. The numbers are those of the list of invariants that the model is held to.
//!
//! Nothing here changes anything. It looks at all tables, and is for tests: of which there are very many, so that what holds
//! is found to hold without a thing being written or hashed, and only what does not hold is put into words.

use super::external::Contents;
use super::{ENTRIES, EntryView, Exclusive, Held, MapResult, Mirroring, Mmu, Root, TableId, Walk};
use crate::units::{Gfn, GfnRange, Level, Pfn};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::{Debug, Display};

#[cfg(all(test, not(loom)))]
pub(crate) mod broken;

/// A check that says what is wrong.
pub type Check = fn(&Dump) -> Result<(), String>;

/// All tables at one moment.
#[derive(Clone, Debug)]
pub struct Dump {
    roots: Vec<(Root, Vec<EntryView>)>,
    /// What each table is for.
    shapes: BTreeMap<TableId, (Gfn, Level)>,
    counts: [i64; 3],
    external: Option<Contents>,
}

/// What can be seen from tables as they are, by name.
pub const STATE: &[(&str, Check)] = &[
    ("1: mirror and external table agree", mirror_equals_external),
    ("2: external tables have their parents", external_tables_have_parents),
    ("3: nothing stays frozen", nothing_stays_frozen),
    ("8: mirrored pages are small and permit everything", mirrored_leafs_are_plain),
    ("13: the counts count the leafs", counts_are_right),
    ("14: huge pages are aligned", huge_pages_are_aligned),
    ("18: tables hang together", tables_hang_together),
];

/// A check of a step, by what was before it and what was after.
pub type Transition = fn(&Dump, &Dump) -> Result<(), String>;

/// What can be seen of steps of some kinds, by name. Each says of which.
pub const TRANSITIONS: &[(&str, Transition)] = &[
    ("4: what failed left no trace", nothing_changed),
    ("12: a zap keeps the tables", tables_are_kept),
    ("15: a pre-fault leaves alone what was mapped", leafs_are_left_alone),
];

/// Checks everything that can be seen from tables as they are.
pub fn check(mmu: &Mmu) -> Result<(), String> {
    if let Some(bug) = mmu.bug() {
        return Err(format!("a bug was reported: {bug}"));
    }
    let dump = Dump::of(mmu);
    STATE.iter().try_for_each(|(name, check)| check(&dump).map_err(|what| format!("{name}: {what}")))
}

impl Dump {
    /// How all tables are now. Waits for the lock.
    pub fn of(mmu: &Mmu) -> Self {
        Self::under(&mmu.lock_exclusive())
    }

    /// How all tables are under the lock.
    pub fn under(lock: &Exclusive<'_>) -> Self {
        let mmu = lock.mmu();
        let roots: Vec<_> = mmu
            .roots()
            .into_iter()
            .map(|root| {
                let entries = lock.entries(&root, GfnRange::ALL);
                (root, entries)
            })
            .collect();
        let all = roots.iter().flat_map(|(root, entries)| {
            let children = entries.iter().filter_map(|entry| entry.spte.child(entry.level));
            children.chain([root.table()])
        });
        let shape = |id| (id, (mmu.tables.get(id).gfn(), mmu.tables.get(id).level()));
        let shapes = all.map(shape).collect();
        let external = mmu.external.as_deref().and_then(|external| external.contents());
        Dump { roots, shapes, counts: mmu.counts.sum(), external }
    }

    fn entries(&self) -> impl Iterator<Item = (&Root, &EntryView)> {
        self.roots.iter().flat_map(|(root, entries)| entries.iter().map(move |entry| (root, entry)))
    }

    /// Every page that is mapped.
    pub(crate) fn leafs(&self) -> impl Iterator<Item = (&Root, &EntryView)> {
        self.entries().filter(|(_, entry)| entry.spte.is_leaf(entry.level))
    }

    /// The pages of one root, in the order of their frames.
    fn leafs_of(&self, root: &Root) -> impl Iterator<Item = &EntryView> {
        let of_root = self.roots.iter().filter(move |(other, _)| other == root);
        of_root.flat_map(|(_, entries)| entries.iter()).filter(|entry| entry.spte.is_leaf(entry.level))
    }

    /// Every entry that leads to a table.
    fn links(&self) -> impl Iterator<Item = (&Root, &EntryView)> {
        self.entries().filter(|(_, entry)| entry.spte.child(entry.level).is_some())
    }

    fn mirrors(&self) -> impl Iterator<Item = &(Root, Vec<EntryView>)> {
        self.roots.iter().filter(|(root, _)| root.mirroring() == Mirroring::Mirror)
    }
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}

fn equal<T: PartialEq + Debug>(what: impl Display, left: &T, right: &T) -> Result<(), String> {
    ensure(left == right, || format!("{what}: {left:?} but {right:?}"))
}

/// 1: a page is in the mirror exactly if the external table has it, with the same frame; and so for tables.
pub fn mirror_equals_external(dump: &Dump) -> Result<(), String> {
    let Some(external) = &dump.external else { return Ok(()) };
    let entries = || dump.mirrors().flat_map(|(_, entries)| entries);
    let pages = || {
        let leafs = entries().filter(|entry| entry.spte.is_leaf(entry.level));
        leafs.map(|entry| (entry.gfn, entry.spte.pfn()))
    };
    let tables = || {
        let links = entries().filter(|entry| entry.spte.child(entry.level).is_some());
        links.map(|entry| (entry.gfn, entry.level.below()))
    };
    // Both are in the order of frames, unless there are several mirrors.
    if !pages().eq(external.pages.iter().map(|(gfn, pfn)| (*gfn, *pfn))) {
        let pages: BTreeMap<Gfn, Pfn> = pages().collect();
        equal("pages of the mirror and the external table", &pages, &external.pages)?;
    }
    let tables: BTreeSet<(Gfn, Level)> = tables().collect();
    equal("tables of the mirror and the external table", &tables, &external.tables)
}

/// 2: nothing is in an external table without the table that it would have to be in.
pub fn external_tables_have_parents(dump: &Dump) -> Result<(), String> {
    let Some(external) = &dump.external else { return Ok(()) };
    let Some((root, _)) = dump.mirrors().next() else {
        return ensure(external.pages.is_empty(), || format!("no mirror has {external:?}"));
    };
    let has = |gfn: Gfn, level: Level| {
        level == root.level() || external.tables.contains(&(gfn.rounded_down(level.above()), level))
    };
    // The neighbour's table is mostly the page's own.
    let mut last = None;
    for gfn in external.pages.keys() {
        let table = Some(gfn.rounded_down(Level::HUGE));
        if last != table {
            ensure(has(*gfn, Level::SMALL), || format!("the page {gfn:?} is in no table"))?;
            last = table;
        }
    }
    for (gfn, level) in &external.tables {
        ensure(has(*gfn, level.above()), || format!("the table of {gfn:?}, {level:?} is in no table"))?;
    }
    Ok(())
}

/// 3: frozen is for a moment only.
pub fn nothing_stays_frozen(dump: &Dump) -> Result<(), String> {
    match dump.entries().find(|(_, entry)| entry.spte.is_frozen()) {
        Some((root, entry)) => Err(format!("{entry:?} of {root:?}")),
        None => Ok(()),
    }
}

/// 8: no mirrored page is huge, and each permits everything and is dirty.
pub fn mirrored_leafs_are_plain(dump: &Dump) -> Result<(), String> {
    for (root, entry) in dump.leafs().filter(|(root, _)| root.mirroring() == Mirroring::Mirror) {
        let spte = entry.spte;
        let permits_all = spte.is_readable() && spte.is_writable() && spte.is_executable() && spte.is_dirty();
        ensure(entry.level == Level::SMALL && permits_all, || format!("{entry:?} of {root:?}"))?;
    }
    Ok(())
}

/// 13: the pages counted are the leafs there are, in all roots together.
pub fn counts_are_right(dump: &Dump) -> Result<(), String> {
    let mut leafs = [0; 3];
    dump.leafs().for_each(|(_, entry)| leafs[usize::from(entry.level.number()) - 1] += 1);
    equal("leafs and counts", &leafs, &dump.counts)
}

/// 14, as far as tables go: a huge page is aligned on both sides.
pub fn huge_pages_are_aligned(dump: &Dump) -> Result<(), String> {
    for (_, entry) in dump.leafs() {
        let pfn = entry.spte.pfn();
        ensure(pfn == pfn.rounded_down(entry.level), || format!("{entry:?}"))?;
    }
    Ok(())
}

/// 18: what leads to a table permits everything and counts as accessed, and the table is for the level below and for the
/// entry's frames. No table is led to twice.
pub fn tables_hang_together(dump: &Dump) -> Result<(), String> {
    let mut seen: BTreeSet<TableId> = dump.roots.iter().map(|(root, _)| root.table()).collect();
    for (root, entry) in dump.links() {
        let Some(child) = entry.spte.child(entry.level) else { continue };
        let spte = entry.spte;
        let permits = spte.is_readable() && spte.is_writable() && spte.is_executable();
        ensure(permits, || format!("{entry:?} does not permit everything"))?;
        ensure(spte.is_accessed() == root.role().accessed_dirty, || format!("{entry:?} is not accessed"))?;
        let (shape, wanted) = (dump.shapes[&child], (entry.gfn, entry.level.below()));
        ensure(shape == wanted, || format!("the table of {entry:?}: {shape:?} but {wanted:?}"))?;
        ensure(seen.insert(child), || format!("two entries lead to the table of {entry:?}"))?;
    }
    let Some((_, first)) = dump.entries().next() else { return Ok(()) };
    let mut last = (first.table, dump.shapes[&first.table]);
    for (root, entry) in dump.entries() {
        if last.0 != entry.table {
            last = (entry.table, dump.shapes[&entry.table]);
        }
        let (gfn, level) = last.1;
        let all = GfnRange::new(gfn, level.pages() * ENTRIES as u64);
        ensure(level == entry.level && all.contains(entry.gfn), || format!("{entry:?} of {root:?}"))?;
    }
    Ok(())
}

/// 4: after a step that failed, every entry is bit by bit what it was, and so are the counts. (Tables that were put in
/// on the way, before what failed, are a step of their own.)
pub fn nothing_changed(before: &Dump, after: &Dump) -> Result<(), String> {
    for ((_, old), (_, new)) in before.roots.iter().zip(&after.roots) {
        equal("entries", old, new)?;
    }
    equal("counts", &before.counts, &after.counts)?;
    equal("external tables", &before.external, &after.external)
}

/// 4, of a step that may have put in tables on the way: every page is mapped bit by bit as it was, and no other.
pub fn leafs_are_the_same(before: &Dump, after: &Dump) -> Result<(), String> {
    let pages =
        |dump: &Dump| -> Vec<_> { dump.leafs().map(|(_, leaf)| (leaf.gfn, leaf.level, leaf.spte)).collect() };
    equal("pages", &pages(before), &pages(after))?;
    equal("counts", &before.counts, &after.counts)
}

/// 12: whatever was zapped, every table is where it was, the external ones too.
pub fn tables_are_kept(before: &Dump, after: &Dump) -> Result<(), String> {
    links_are_kept(before, after, |_| true)
}

/// The same of mirrors, for steps that may have taken other roots away.
pub(crate) fn mirrors_are_kept(before: &Dump, after: &Dump) -> Result<(), String> {
    links_are_kept(before, after, |root| root.mirroring() == Mirroring::Mirror)
}

fn links_are_kept(before: &Dump, after: &Dump, is_of: impl Fn(&Root) -> bool) -> Result<(), String> {
    let there: HashSet<&EntryView> = after.links().map(|(_, entry)| entry).collect();
    for (root, entry) in before.links().filter(|(root, _)| is_of(root)) {
        ensure(there.contains(entry), || format!("{entry:?} of {root:?} is gone"))?;
    }
    let (Some(before), Some(after)) = (&before.external, &after.external) else { return Ok(()) };
    let gone = || before.tables.difference(&after.tables);
    ensure(gone().next().is_none(), || format!("the external tables {:?} are gone", gone()))
}

/// 15: after a pre-fault, a leaf that was there is what it was, unless a page of another size took its place; and what is
/// new was not accessed. For kernels that leave leafs alone (since 6.13).
pub fn leafs_are_left_alone(before: &Dump, after: &Dump) -> Result<(), String> {
    for (root, _) in &after.roots {
        let mut old = before.leafs_of(root).peekable();
        for new in after.leafs_of(root) {
            while old.next_if(|old| GfnRange::of_page(old.gfn, old.level).end <= new.gfn).is_some() {}
            let around = old.peek().filter(|old| GfnRange::of_page(old.gfn, old.level).contains(new.gfn));
            match around {
                Some(old) if old.level == new.level => {
                    ensure(old.spte == new.spte, || format!("{old:?} of {root:?} became {new:?}"))?;
                }
                // A part of a huge page that was split is as accessed as that was.
                Some(old) if old.level > new.level => {}
                _ => ensure(!new.spte.is_accessed(), || format!("{new:?} counts as accessed"))?,
            }
        }
    }
    Ok(())
}

/// 5: of those who mapped one page at the same time, none of whom saw it taken away, one did it.
pub fn one_mapped_it(results: &[MapResult]) -> Result<(), String> {
    let fixed = results.iter().filter(|result| **result == MapResult::Fixed).count();
    let is_bug = results.contains(&MapResult::Bug);
    ensure(fixed == 1 && !is_bug, || format!("{results:?}"))
}
