//! Mappers and a zapper that race, in every order in which their threads could run: loom tries them.
//!
//! What runs is the MMU itself, with tables of two entries, and a plain copy as the external table, which refuses whatever
//! comes in a wrong order. After each order the invariants of tables are checked, and that what each thread was told adds up.
//! No order is left out: threads may be interrupted as often as it goes.
//!
//! `cargo xtask test` builds this with `--cfg loom`; of the model's tests only these can run then.

use super::{
    AccessKind, Calls, ExternalError, ExternalTable, FastFault, MapResult, Mapping, Mirroring, Mmu,
    PlainCopy, Role, Root, RootFilter, Settings, Walk, invariants,
};
use crate::sync::{AtomicU64, Ordering};
use crate::units::{Gfn, GfnRange, Level, Pfn};
use MapResult::{Fixed, Retry, Spurious};
use std::collections::HashSet;
use std::sync::{Arc, Mutex};

/// The frames of one small table.
const BOTH: GfnRange = GfnRange::new(Gfn(0), 2);
/// What is behind them before [`Deed::MoveFrames`], and after: this much added to the guest's.
const MOVED: u64 = 100;

/// What a thread does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Deed {
    /// Maps a guest frame, once, with a page of this level.
    Map(u64, Level),
    /// Looks up the frame behind a guest frame without a lock, and maps it unless it is out of date.
    Fault(u64),
    /// Puts other frames behind all guest frames, telling the MMU before and after.
    MoveFrames,
    /// Zaps the leafs of both frames.
    Zap,
    /// Makes all direct roots invalid and zaps them.
    FastZap,
    /// Withholds writing.
    WriteProtect,
    /// Gives writing back, if it was withheld.
    FixFast(u64),
}

const SMALL: Level = Level::SMALL;
const HUGE: Level = Level::HUGE;

/// Where the threads race.
#[derive(Clone, Copy)]
struct Scene {
    mirroring: Mirroring,
    /// Orders are many: tables are no deeper than what is tried needs.
    levels: u8,
    /// What is mapped before.
    before: Option<Deed>,
    /// Which request to the external table finds it busy, counted from where the threads begin.
    busy: Option<u64>,
}

const MIRROR: Scene = Scene { mirroring: Mirroring::Mirror, levels: 2, before: None, busy: None };
const DIRECT: Scene = Scene { mirroring: Mirroring::Direct, levels: 2, before: None, busy: None };

/// What each thread was told.
type Told = Vec<Option<MapResult>>;

/// Everything that the threads have in common.
struct Stage {
    mmu: Mmu,
    root: Root,
    external: Arc<PlainCopy>,
    /// What is behind the guest's frames.
    offset: AtomicU64,
}

impl Stage {
    fn new(scene: Scene) -> Self {
        let external = Arc::new(PlainCopy::new(Level::new(scene.levels)));
        let mmu = Mmu::new(Settings { keeps_present_leafs: true }, Some(external.clone()));
        let root = mmu.root(Role {
            smm: false,
            guest_mode: false,
            accessed_dirty: true,
            levels: scene.levels,
            mirroring: scene.mirroring,
            gfn_bits: Gfn(0),
        });
        Self { mmu, root, external, offset: AtomicU64::new(0) }
    }

    fn act(&self, deed: Deed) -> Option<MapResult> {
        match deed {
            Deed::Map(gfn, level) => return Some(self.map(gfn, gfn, level)),
            Deed::Fault(gfn) => return Some(self.fault(gfn)),
            Deed::FixFast(gfn) => return self.fix_fast(gfn),
            Deed::MoveFrames => self.move_frames(),
            Deed::Zap => _ = self.mmu.lock_exclusive().zap_leafs(RootFilter::EVERYTHING, BOTH),
            Deed::FastZap => {
                self.mmu.lock_exclusive().invalidate_all_direct_roots();
                self.mmu.zap_invalidated_roots();
            }
            Deed::WriteProtect => _ = self.mmu.lock_shared().write_protect(0, BOTH, SMALL),
        }
        None
    }

    fn map(&self, gfn: u64, pfn: u64, level: Level) -> MapResult {
        self.mmu.lock_shared().map(&self.root, &mapping(gfn, pfn, level))
    }

    fn fault(&self, gfn: u64) -> MapResult {
        let before = self.mmu.snapshot();
        let pfn = gfn + self.offset.load(Ordering::Acquire);
        let lock = self.mmu.lock_shared();
        if lock.is_stale(before, Gfn(gfn)) {
            return Retry;
        }
        lock.map(&self.root, &mapping(gfn, pfn, SMALL))
    }

    fn move_frames(&self) {
        let mut lock = self.mmu.lock_exclusive();
        lock.begin_invalidation(BOTH);
        lock.zap_leafs(RootFilter::EVERYTHING, BOTH);
        drop(lock);
        self.offset.store(MOVED, Ordering::Release);
        self.mmu.lock_exclusive().end_invalidation();
    }

    fn fix_fast(&self, gfn: u64) -> Option<MapResult> {
        let fault = FastFault { gfn: Gfn(gfn), kind: AccessKind::Write, is_present: true, dirty_log: None };
        self.mmu.lock_shared().fix_fast(&self.root, &fault)
    }

    /// The tables are sound, and agree with what the threads were told.
    fn check(&self, scene: Scene, before: Calls, told: &Told) {
        invariants::check(&self.mmu).unwrap();
        let offset = self.offset.load(Ordering::Acquire);
        for entry in self.mmu.lock_shared().entries(&self.root, BOTH) {
            let is_right = entry.spte.pfn() == Pfn(entry.gfn.0 + offset);
            assert!(
                !entry.spte.is_leaf(entry.level) || is_right,
                "a frame that is someone else's: {entry:?}"
            );
        }
        if scene.mirroring == Mirroring::Mirror {
            let calls = self.external.calls();
            let fixed = told.iter().filter(|told| **told == Some(Fixed)).count() as u64;
            assert_eq!(calls.pages_mapped - before.pages_mapped, fixed, "who maps a page is told so");
            assert_eq!(calls.pages_mapped - calls.pages_removed, self.mmu.page_counts()[0]);
            assert_eq!(calls.tables_freed, 0, "tables stay");
        }
    }

    /// Everything ends, on both sides.
    fn check_end(&self) {
        self.mmu.destroy();
        invariants::check(&self.mmu).unwrap();
        assert_eq!(self.external.contents(), Some(Default::default()));
    }
}

fn mapping(gfn: u64, pfn: u64, level: Level) -> Mapping<'static> {
    Mapping {
        gfn: Gfn(gfn),
        pfn: Pfn(pfn),
        goal_level: level,
        kind: AccessKind::Write,
        is_prefetch: false,
        is_writable: true,
        dirty_log: None,
    }
}

/// Does the deeds, each on a thread of its own, in every order. Gives all that the threads were told.
fn explore(scene: Scene, deeds: &[Deed]) -> HashSet<Told> {
    let seen = Arc::new(Mutex::new(HashSet::new()));
    let (all, deeds) = (Arc::clone(&seen), deeds.to_vec());
    let mut model = loom::model::Builder::new();
    model.preemption_bound = None;
    model.max_branches = 10_000;
    model.check(move || {
        let stage = Arc::new(Stage::new(scene));
        if let Some(deed) = scene.before {
            assert_eq!(stage.act(deed), Some(Fixed));
        }
        if let Some(nth) = scene.busy {
            stage.external.fail(nth, ExternalError::Busy);
        }
        let before = stage.external.calls();
        let threads: Vec<_> = deeds
            .iter()
            .map(|deed| {
                let (stage, deed) = (Arc::clone(&stage), *deed);
                loom::thread::spawn(move || stage.act(deed))
            })
            .collect();
        let told: Told = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        stage.check(scene, before, &told);
        stage.check_end();
        all.lock().unwrap().insert(told);
    });
    Arc::try_unwrap(seen).unwrap().into_inner().unwrap()
}

fn told<const N: usize>(results: [MapResult; N]) -> Told {
    results.into_iter().map(Some).collect()
}

fn told_beside_another(results: [MapResult; 2]) -> Told {
    vec![Some(results[0]), Some(results[1]), None]
}

#[test]
fn two_who_map_the_same_mirrored_page_put_it_in_once() {
    let seen = explore(MIRROR, &[Deed::Map(0, SMALL), Deed::Map(0, SMALL)]);
    let one = [[Fixed, Spurious], [Fixed, Retry], [Spurious, Fixed], [Retry, Fixed]];
    assert_eq!(seen, one.map(told).into());
}

#[test]
fn two_who_map_the_same_mirrored_page_beside_a_zapper() {
    let seen = explore(MIRROR, &[Deed::Map(0, SMALL), Deed::Map(0, SMALL), Deed::Zap]);
    let all = [[Fixed, Fixed], [Fixed, Spurious], [Fixed, Retry], [Spurious, Fixed], [Retry, Fixed]];
    assert_eq!(seen, all.map(told_beside_another).into());
}

#[test]
fn two_who_map_neighbours_in_a_mirrored_table_beside_a_zapper() {
    let seen = explore(MIRROR, &[Deed::Map(0, SMALL), Deed::Map(1, SMALL), Deed::Zap]);
    // Who finds the table being put in does not wait.
    let all = [[Fixed, Fixed], [Fixed, Retry], [Retry, Fixed]];
    assert_eq!(seen, all.map(told_beside_another).into());
}

#[test]
fn a_busy_external_table_has_mappers_try_again_and_changes_nothing() {
    let before = [None, Some(Deed::Map(1, SMALL))];
    for (before, nth) in before.into_iter().flat_map(|before| (0..2).map(move |nth| (before, nth))) {
        let scene = Scene { before, busy: Some(nth), ..MIRROR };
        let seen = explore(scene, &[Deed::Map(0, SMALL), Deed::Map(0, SMALL)]);
        assert!(seen.contains(&told([Retry, Fixed])), "{seen:?}");
    }
    let scene = Scene { before: Some(Deed::Map(1, SMALL)), busy: Some(0), ..MIRROR };
    let seen = explore(scene, &[Deed::Map(0, SMALL), Deed::Map(0, SMALL), Deed::Zap]);
    assert!(seen.contains(&told_beside_another([Retry, Retry])), "{seen:?}");
}

#[test]
fn no_frame_is_mapped_that_was_given_away() {
    for scene in [DIRECT, MIRROR] {
        let seen = explore(scene, &[Deed::Fault(0), Deed::MoveFrames]);
        assert!(seen.contains(&vec![Some(Retry), None]) && seen.contains(&vec![Some(Fixed), None]));
    }
}

#[test]
fn a_huge_page_and_small_ones_take_each_others_place() {
    let deep = Scene { levels: 3, ..DIRECT };
    // Where there is a huge page it is split, and the small one is mapped by that.
    let cases = [(None, Fixed), (Some(Deed::Map(1, SMALL)), Fixed), (Some(Deed::Map(0, HUGE)), Spurious)];
    for (before, small) in cases {
        let seen = explore(Scene { before, ..deep }, &[Deed::Map(0, SMALL), Deed::Map(0, HUGE)]);
        assert!(seen.contains(&told([small, Fixed])), "{seen:?}");
    }
    let scene = Scene { before: Some(Deed::Map(1, SMALL)), ..deep };
    explore(scene, &[Deed::Map(0, SMALL), Deed::Map(0, HUGE), Deed::Zap]);
}

#[test]
fn a_root_that_goes_takes_in_nothing() {
    let seen = explore(DIRECT, &[Deed::Map(0, SMALL), Deed::Map(1, SMALL), Deed::FastZap]);
    assert!(seen.contains(&told_beside_another([Retry, Retry])), "{seen:?}");
    assert!(seen.contains(&told_beside_another([Fixed, Fixed])), "{seen:?}");
}

#[test]
fn writing_is_given_back_only_to_what_is_there() {
    let scene = Scene { before: Some(Deed::Map(0, SMALL)), ..DIRECT };
    let seen = explore(scene, &[Deed::FixFast(0), Deed::WriteProtect, Deed::Zap]);
    for one in [None, Some(Spurious), Some(Fixed)] {
        assert!(seen.contains(&vec![one, None, None]), "{seen:?}");
    }
    // Nor while it goes under the shared lock.
    explore(scene, &[Deed::FixFast(0), Deed::WriteProtect, Deed::FastZap]);
}
