//! The MMU by itself, without a virtual machine: what is mapped, what is left, and what the external table was told.
//!
//! Threads are raced elsewhere (`src/mmu/races.rs`), but for one test here that has many.

use kvmprep_model::mmu::{
    AccessKind, Calls, DirtyLog, ExternalError, ExternalTable, FastFault, MapResult, Mapping, Mirroring, Mmu,
    NoMemory, PlainCopy, Role, Root, RootFilter, Settings, Spte, Violation, Walk,
    invariants::{self, Dump},
};
use kvmprep_model::units::{Gfn, GfnRange, Level, Pfn};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use AccessKind::{Read, Write};
use MapResult::{Bug, Fixed, Retry, Spurious};

const SMALL: Level = Level::SMALL;
const HUGE: Level = Level::HUGE;
const GIGANTIC: Level = Level::GIGANTIC;
const N: u64 = HUGE.pages();

fn role(mirroring: Mirroring) -> Role {
    Role { smm: false, guest_mode: false, accessed_dirty: true, levels: 4, mirroring, gfn_bits: Gfn(0) }
}

/// What a pre-fault maps.
fn prefetch(gfn: u64, pfn: u64, goal_level: Level) -> Mapping<'static> {
    Mapping {
        gfn: Gfn(gfn),
        pfn: Pfn(pfn),
        goal_level,
        kind: Read,
        is_prefetch: true,
        is_writable: true,
        dirty_log: None,
    }
}

/// What a guest's access maps.
fn fault(gfn: u64, pfn: u64, goal_level: Level, kind: AccessKind) -> Mapping<'static> {
    Mapping { kind, is_prefetch: false, ..prefetch(gfn, pfn, goal_level) }
}

/// An MMU with one direct root, checked after each step.
struct Direct {
    mmu: Mmu,
    root: Root,
}

impl Direct {
    fn with(settings: Settings, role: Role) -> Self {
        let mmu = Mmu::new(settings, None);
        let root = mmu.root(role);
        Self { mmu, root }
    }

    fn new() -> Self {
        Self::with(Settings { keeps_present_leafs: true }, role(Mirroring::Direct))
    }

    fn map(&self, mapping: Mapping<'_>) -> MapResult {
        let result = self.mmu.lock_shared().map(&self.root, &mapping);
        self.check();
        result
    }

    fn map_mmio(&self, page: NoMemory) -> MapResult {
        let result = self.mmu.lock_shared().map_mmio(&self.root, &page);
        self.check();
        result
    }

    fn zap(&self, start: u64, end: u64) -> bool {
        let range = GfnRange { start: Gfn(start), end: Gfn(end) };
        let any = self.mmu.lock_exclusive().zap_leafs(RootFilter::direct(0), range);
        self.check();
        any
    }

    fn walk(&self, gfn: u64) -> (Spte, Level) {
        self.mmu.lock_shared().walk(&self.root, Gfn(gfn))
    }

    fn access(&self, gfn: u64, kind: AccessKind) -> Result<(u64, bool), Violation> {
        let found = self.mmu.lock_shared().hardware_access(&self.root, Gfn(gfn), kind)?;
        Ok((found.pfn.0, found.is_newly_dirty))
    }

    fn fix_fast(&self, gfn: u64, is_present: bool, dirty_log: Option<&dyn DirtyLog>) -> Option<MapResult> {
        let fault = FastFault { gfn: Gfn(gfn), kind: Write, is_present, dirty_log };
        self.mmu.lock_shared().fix_fast(&self.root, &fault)
    }

    fn check(&self) {
        invariants::check(&self.mmu).unwrap();
    }
}

#[derive(Default)]
struct Log(Mutex<Vec<u64>>);

impl DirtyLog for Log {
    fn mark(&self, gfn: Gfn) {
        self.0.lock().unwrap().push(gfn.0);
    }
}

impl Log {
    fn take(&self) -> Vec<u64> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[test]
fn pages_of_each_size_are_mapped_where_they_are_asked_for() {
    let direct = Direct::new();
    assert_eq!(direct.access(5, Read), Err(Violation::NotPresent));
    assert_eq!(direct.map(fault(5, 1005, SMALL, Read)), Fixed);
    assert_eq!(direct.map(fault(3 * N + 7, 8 * N + 7, HUGE, Read)), Fixed);
    assert_eq!(direct.map(fault(2 * N * N + 9, 4 * N * N + 9, GIGANTIC, Write)), Fixed);
    assert_eq!(direct.mmu.page_counts(), [1, 1, 1]);
    assert_eq!(direct.access(5, Read), Ok((1005, false)));
    assert_eq!(direct.access(3 * N, Read), Ok((8 * N, false)));
    assert_eq!(direct.access(4 * N - 1, Write), Ok((9 * N - 1, false)));
    assert_eq!(direct.access(3 * N * N - 1, Read), Ok((5 * N * N - 1, false)));
    assert_eq!(direct.access(4 * N, Read), Err(Violation::NotPresent));
    assert_eq!(direct.walk(6), (Spte::EMPTY, SMALL));
}

#[test]
fn what_is_mapped_read_only_is_not_written_and_then_is() {
    let direct = Direct::new();
    let read_only = Mapping { is_writable: false, ..fault(5, 1005, SMALL, Read) };
    assert_eq!(direct.map(read_only), Fixed);
    assert_eq!(direct.access(5, Write), Err(Violation::Protected));
    assert_eq!(direct.fix_fast(5, true, None), None);
    assert_eq!(direct.map(fault(5, 1005, SMALL, Write)), Fixed);
    assert_eq!(direct.access(5, Write), Ok((1005, false)));
    assert_eq!(direct.map(fault(5, 1005, SMALL, Write)), Spurious);
}

#[test]
fn a_pre_fault_is_no_access_and_leaves_alone_what_is_mapped() {
    let direct = Direct::new();
    let read_only = Mapping { is_writable: false, ..prefetch(5, 1005, SMALL) };
    assert_eq!(direct.map(read_only), Fixed);
    let before = Dump::of(&direct.mmu);
    assert!(!direct.walk(5).0.is_accessed());
    assert_eq!(direct.map(prefetch(5, 1005, SMALL)), Spurious);
    assert_eq!(direct.map(prefetch(6, 1006, SMALL)), Fixed);
    invariants::leafs_are_left_alone(&before, &Dump::of(&direct.mmu)).unwrap();
    assert!(!direct.walk(5).0.is_writable());
    direct.access(5, Read).unwrap();
    assert!(direct.walk(5).0.is_accessed());
    assert!(invariants::leafs_are_left_alone(&before, &Dump::of(&direct.mmu)).is_err());
}

#[test]
fn older_kernels_make_the_leaf_anew() {
    let direct = Direct::with(Settings { keeps_present_leafs: false }, role(Mirroring::Direct));
    let read_only = Mapping { is_writable: false, ..fault(5, 1005, SMALL, Read) };
    assert_eq!(direct.map(read_only), Fixed);
    assert_eq!(direct.map(read_only), Spurious);
    assert_eq!(direct.map(prefetch(5, 1005, SMALL)), Fixed);
    let (spte, _) = direct.walk(5);
    assert!(spte.is_writable() && spte.is_dirty() && !spte.is_accessed());
    // Of one that could be written before, the processor is to say whether it was.
    assert_eq!([(); 2].map(|()| direct.map(prefetch(5, 1005, SMALL))), [Fixed, Spurious]);
    assert!(!direct.walk(5).0.is_dirty());
}

/// A vCPU that has seen no slot comes late: another has seen the new one, and has mapped the page.
#[test]
fn memory_that_another_has_mapped_is_not_taken_for_none() {
    let page = |kind, is_prefetch| NoMemory { gfn: Gfn(5), generation: 7, kind, is_prefetch };
    let read_only = Mapping { is_writable: false, ..prefetch(5, 1005, SMALL) };
    let is_mmio = Err(Violation::Mmio { generation: 7 });

    let direct = Direct::new();
    assert_eq!(direct.map(read_only), Fixed);
    assert_eq!(direct.map_mmio(page(Read, true)), Spurious);
    assert_eq!(direct.map_mmio(page(Read, false)), Spurious);
    assert_eq!(direct.access(5, Read), Ok((1005, false)));
    // What it does not allow was not wanted by a pre-fault.
    assert_eq!(direct.map_mmio(page(Write, false)), Fixed);
    assert_eq!(direct.access(5, Read), is_mmio);
    assert_eq!(direct.mmu.page_counts(), [0, 0, 0]);

    let older = Direct::with(Settings { keeps_present_leafs: false }, role(Mirroring::Direct));
    assert_eq!(older.map(prefetch(N, N, HUGE)), Fixed);
    assert_eq!(older.map_mmio(NoMemory { gfn: Gfn(N + 1), ..page(Read, true) }), Fixed);
    assert_eq!(older.access(N + 1, Read), is_mmio);
    assert_eq!(older.access(N + 2, Read), Ok((N + 2, false)));
    assert_eq!(older.mmu.page_counts(), [N - 1, 0, 0]);
}

#[test]
fn a_huge_page_is_split_for_a_small_one_and_put_in_place_of_small_ones() {
    let direct = Direct::new();
    assert_eq!(direct.map(prefetch(0, 0, GIGANTIC)), Fixed);
    // The parts are there by the split alone.
    assert_eq!(direct.map(prefetch(N + 3, N + 3, SMALL)), Spurious);
    assert_eq!(direct.mmu.page_counts(), [N, N - 1, 0]);
    for gfn in [0, N, N + 3, N * N - 1] {
        assert_eq!(direct.access(gfn, Read), Ok((gfn, false)));
    }
    assert_eq!(direct.map(prefetch(N, N, HUGE)), Fixed);
    assert_eq!(direct.mmu.page_counts(), [0, N, 0]);
    assert_eq!(direct.map(prefetch(7, 7, GIGANTIC)), Fixed);
    assert_eq!(direct.mmu.page_counts(), [0, 0, 1]);
}

#[test]
fn a_huge_page_across_an_edge_goes_as_a_whole_and_tables_stay() {
    let direct = Direct::new();
    direct.map(prefetch(0, 0, HUGE));
    for gfn in [N, N + 1, 2 * N] {
        direct.map(prefetch(gfn, gfn, SMALL));
    }
    let before = Dump::of(&direct.mmu);
    assert!(direct.zap(N - 1, N + 1));
    assert_eq!(direct.mmu.page_counts(), [2, 0, 0]);
    assert_eq!(direct.access(0, Read), Err(Violation::NotPresent));
    assert_eq!(direct.access(N + 1, Read), Ok((N + 1, false)));
    invariants::tables_are_kept(&before, &Dump::of(&direct.mmu)).unwrap();
    assert!(!direct.zap(N - 1, N + 1));
    direct.mmu.lock_exclusive().zap_all();
    assert_eq!(direct.mmu.page_counts(), [0; 3]);
    assert!(invariants::tables_are_kept(&before, &Dump::of(&direct.mmu)).is_err());
}

#[test]
fn that_there_is_no_memory_is_remembered_with_its_generation() {
    let direct = Direct::new();
    for generation in [0, 5, 0x3ffff] {
        let page = NoMemory { gfn: Gfn(5), generation, kind: Read, is_prefetch: false };
        assert_eq!([(); 2].map(|()| direct.map_mmio(page)), [Fixed, Fixed]);
        assert_eq!(direct.access(5, Read), Err(Violation::Mmio { generation }));
    }
    assert_eq!(direct.mmu.page_counts(), [0; 3]);
    assert_eq!(direct.map(fault(5, 1005, SMALL, Read)), Fixed);
    assert_eq!(direct.access(5, Read), Ok((1005, false)));
}

#[test]
fn without_accessed_bits_the_first_access_faults() {
    let without = Role { accessed_dirty: false, ..role(Mirroring::Direct) };
    let direct = Direct::with(Settings { keeps_present_leafs: true }, without);
    assert_eq!(direct.map(prefetch(5, 1005, SMALL)), Fixed);
    assert_eq!(direct.mmu.page_counts(), [1, 0, 0]);
    assert_eq!(direct.access(5, Read), Err(Violation::NotPresent));
    let log = Log::default();
    assert_eq!(direct.fix_fast(5, false, Some(&log)), Some(Fixed));
    assert_eq!((direct.access(5, Write), log.take()), (Ok((1005, false)), vec![5]));
    assert_eq!(direct.fix_fast(5, false, None), Some(Spurious));
    // With them nothing was withheld.
    let direct = Direct::new();
    direct.map(prefetch(5, 1005, SMALL));
    assert_eq!(direct.fix_fast(5, false, None), None);
}

#[test]
fn while_a_log_is_kept_each_page_s_first_write_is_noticed() {
    let direct = Direct::new();
    let log = Log::default();
    direct.map(fault(0, 0, HUGE, Write));
    let all = GfnRange::new(Gfn(0), N);
    assert!(direct.mmu.lock_shared().write_protect(0, all, SMALL));
    // Of a huge page, only the slow path knows which page it was.
    assert_eq!(direct.fix_fast(3, true, Some(&log)), None);
    direct.mmu.lock_shared().split_huge_pages(0, all, SMALL);
    direct.check();
    assert_eq!(direct.mmu.page_counts(), [N, 0, 0]);
    assert_eq!(direct.access(3, Write), Err(Violation::Protected));
    assert_eq!(direct.fix_fast(3, true, Some(&log)), Some(Fixed));
    assert_eq!((direct.access(3, Write), log.take()), (Ok((3, false)), vec![3]));
    // The bitmap was read: the pages are noticed again.
    direct.mmu.lock_exclusive().clear_dirty_masked(0, Gfn(0), 1 << 3, true);
    assert_eq!(direct.access(3, Write), Err(Violation::Protected));
    let logged = Mapping { dirty_log: Some(&log), ..fault(4, 4, SMALL, Write) };
    assert_eq!(direct.map(logged), Fixed);
    assert_eq!(log.take(), [4]);
    // What was withheld for another reason is not given back.
    assert!(direct.mmu.lock_exclusive().write_protect_gfn(0, Gfn(4), SMALL));
    assert_eq!(direct.fix_fast(4, true, None), None);
}

#[test]
fn a_processor_that_logs_is_told_by_the_dirty_bit() {
    let direct = Direct::new();
    for gfn in [3, 4] {
        direct.map(fault(gfn, gfn, SMALL, Write));
    }
    assert!(direct.mmu.lock_shared().clear_dirty(0, GfnRange::new(Gfn(0), N)));
    assert_eq!([Read, Write, Write].map(|kind| direct.access(3, kind).unwrap().1), [false, true, false]);
    direct.mmu.lock_exclusive().clear_dirty_masked(0, Gfn(0), 1 << 3, false);
    assert_eq!([3, 4].map(|gfn| direct.walk(gfn).0.is_dirty()), [false, false]);
    assert_eq!(direct.access(3, Write), Ok((3, true)));
}

#[test]
fn when_a_log_ends_huge_pages_come_back_where_they_may() {
    let may_be = |gfn: Gfn| if gfn < Gfn(2 * N) { HUGE } else { SMALL };
    for recovers in [true, false] {
        let direct = Direct::new();
        for gfn in [3, N, N + 1, 2 * N, 3 * N] {
            direct.map(prefetch(gfn, 7 * N + gfn, SMALL));
        }
        // The first frame is not all of it the slot's.
        let slot = GfnRange { start: Gfn(1), end: Gfn(3 * N) };
        let shared = direct.mmu.lock_shared();
        if recovers {
            assert!(shared.recover_huge_pages(0, slot, may_be));
        } else {
            assert!(shared.zap_collapsible(0, slot, may_be));
        }
        drop(shared);
        direct.check();
        assert_eq!(direct.mmu.page_counts(), [3, u64::from(recovers), 0]);
        let whole = if recovers { Ok((8 * N + 9, false)) } else { Err(Violation::NotPresent) };
        assert_eq!(direct.access(N + 9, Read), whole);
        assert_eq!(direct.access(2 * N, Read), Ok((9 * N, false)));
    }
}

#[test]
fn a_bit_of_addresses_is_only_in_the_way_through_the_tables() {
    let bit = Gfn(1 << 35);
    let direct = Direct::with(
        Settings { keeps_present_leafs: true },
        Role { gfn_bits: bit, ..role(Mirroring::Direct) },
    );
    assert_eq!(direct.map(prefetch(5, 1005, SMALL)), Fixed);
    assert_eq!(direct.access(5, Read), Ok((1005, false)));
    let entries = direct.mmu.lock_shared().entries(&direct.root, GfnRange::ALL);
    assert_eq!(entries.len(), 4);
    assert!(entries.iter().all(|entry| entry.gfn.0 & bit.0 == 0));
    assert!(direct.zap(0, N));
    assert_eq!(direct.mmu.page_counts(), [0; 3]);
}

#[test]
fn vcpus_of_equal_role_share_a_root_until_it_is_invalidated() {
    let direct = Direct::new();
    let mmu = &direct.mmu;
    assert_eq!(mmu.root(direct.root.role()), direct.root);
    let smm = mmu.root(Role { smm: true, ..direct.root.role() });
    assert_ne!(smm, direct.root);
    mmu.lock_shared().map(&smm, &prefetch(5, 5, SMALL));
    assert!(!direct.zap(0, N), "another address space");
    direct.map(prefetch(5, 5, SMALL));
    mmu.lock_exclusive().invalidate_all_direct_roots();
    assert_eq!(direct.map(prefetch(6, 6, SMALL)), Retry);
    // Who zaps meanwhile, for a notifier, finds them.
    assert_eq!(mmu.page_counts(), [2, 0, 0]);
    assert!(!direct.zap(0, N), "no processor uses it");
    assert_eq!(mmu.page_counts(), [1, 0, 0]);
    let next = mmu.root(direct.root.role());
    assert_ne!(next, direct.root);
    mmu.lock_shared().map(&next, &prefetch(7, 7, SMALL));
    mmu.zap_invalidated_roots();
    assert_eq!((mmu.page_counts(), mmu.roots()), ([1, 0, 0], vec![next]));
    direct.check();
}

#[test]
fn what_was_found_before_an_invalidation_is_stale() {
    let direct = Direct::new();
    let mmu = &direct.mmu;
    let is_stale = |before, gfn| mmu.lock_shared().is_stale(before, Gfn(gfn));
    let before = mmu.snapshot();
    mmu.lock_exclusive().begin_invalidation(GfnRange::new(Gfn(10), 10));
    assert_eq!([9, 10, 19, 20].map(|gfn| is_stale(before, gfn)), [false, true, true, false]);
    // Of several at once only what is around all is known, until all have ended.
    mmu.lock_exclusive().begin_invalidation(GfnRange::new(Gfn(2), 1));
    assert_eq!([1, 5, 19, 20].map(|gfn| is_stale(before, gfn)), [false, true, true, false]);
    mmu.lock_exclusive().widen_invalidation(GfnRange::new(Gfn(30), 1));
    mmu.lock_exclusive().end_invalidation();
    let between = mmu.snapshot();
    assert_eq!([1, 5, 25, 31].map(|gfn| is_stale(between, gfn)), [false, true, true, false]);
    assert!(is_stale(before, 1));
    mmu.lock_exclusive().end_invalidation();
    assert_eq!([before, between, mmu.snapshot()].map(|at| is_stale(at, 25)), [true, true, false]);
}

/// A mirrored root with a plain copy as its other side.
struct Mirrored {
    mmu: Mmu,
    root: Root,
    external: Arc<PlainCopy>,
}

impl Mirrored {
    fn new() -> Self {
        let external = Arc::new(PlainCopy::new(Level::FOURTH));
        let mmu = Mmu::new(Settings { keeps_present_leafs: true }, Some(external.clone()));
        let root = mmu.root(role(Mirroring::Mirror));
        Self { mmu, root, external }
    }

    fn map(&self, gfn: u64) -> MapResult {
        self.mmu.lock_shared().map(&self.root, &fault(gfn, 1000 + gfn, SMALL, Write))
    }

    fn check(&self) {
        invariants::check(&self.mmu).unwrap();
    }
}

#[test]
fn a_mirrored_page_is_on_both_sides_and_its_tables_stay_when_it_goes() {
    let mirrored = Mirrored::new();
    assert_eq!([5, 5, 6].map(|gfn| mirrored.map(gfn)), [Fixed, Spurious, Fixed]);
    mirrored.check();
    assert_eq!(mirrored.external.page(Gfn(5)), Some(Pfn(1005)));
    let put_in = Calls { pages_mapped: 2, tables_added: 3, ..Calls::default() };
    assert_eq!(mirrored.external.calls(), put_in);
    let before = Dump::of(&mirrored.mmu);
    let one = GfnRange::new(Gfn(5), 1);
    // What the host says of its own memory does not concern it.
    assert!(!mirrored.mmu.lock_exclusive().zap_leafs(RootFilter::direct(0), one));
    mirrored.mmu.lock_exclusive().zap_all();
    assert!(mirrored.mmu.lock_exclusive().zap_leafs(RootFilter::mirror(0), one));
    mirrored.check();
    invariants::tables_are_kept(&before, &Dump::of(&mirrored.mmu)).unwrap();
    assert_eq!(mirrored.map(5), Fixed);
    assert_eq!(mirrored.external.calls(), Calls { pages_mapped: 3, pages_removed: 1, ..put_in });
    mirrored.mmu.destroy();
    mirrored.check();
    let end = Calls { pages_mapped: 3, pages_removed: 3, tables_freed: 3, ..put_in };
    assert_eq!(mirrored.external.calls(), end);
    assert_eq!(mirrored.external.contents(), Some(Default::default()));
}

#[test]
fn a_request_that_fails_leaves_no_trace() {
    // Three tables, and the page.
    for nth in 0..4 {
        let mirrored = Mirrored::new();
        for failing in 0..=nth {
            mirrored.external.fail(failing, ExternalError::Busy);
        }
        for done in 0..=nth {
            let before = Dump::of(&mirrored.mmu);
            assert_eq!(mirrored.map(5), Retry, "request {done} of {nth}");
            invariants::nothing_changed(&before, &Dump::of(&mirrored.mmu)).unwrap();
            mirrored.check();
        }
        assert_eq!(mirrored.map(5), Fixed);
        mirrored.check();
        // And where it is not the first, what was done before stays.
        let mirrored = Mirrored::new();
        mirrored.external.fail(nth, ExternalError::Busy);
        assert_eq!(mirrored.map(5), Retry);
        mirrored.check();
        assert_eq!(mirrored.external.calls().tables_added, nth);
        assert_eq!(mirrored.map(5), Fixed);
        mirrored.check();
    }
}

#[test]
fn what_an_external_table_must_not_refuse_is_a_bug() {
    let mirrored = Mirrored::new();
    mirrored.external.fail(1, ExternalError::Fatal);
    assert_eq!(mirrored.map(5), Bug);
    assert!(mirrored.mmu.has_bug());
    let mirrored = Mirrored::new();
    assert_eq!(mirrored.mmu.lock_shared().map(&mirrored.root, &prefetch(0, 0, HUGE)), Bug);
    assert!(mirrored.mmu.bug().unwrap().contains("huge"));
}

#[test]
fn a_page_is_never_mapped_in_place_of_another() {
    let direct = Direct::new();
    direct.map(prefetch(5, 1005, SMALL));
    assert_eq!(direct.mmu.lock_shared().map(&direct.root, &prefetch(5, 1006, SMALL)), Bug);
    assert!(invariants::check(&direct.mmu).is_err());
}

/// A step of the random test.
#[derive(Clone, Copy, Debug)]
enum Step {
    Map { mirror: bool, gfn: u64, level: Level, kind: AccessKind, is_prefetch: bool },
    Zap { mirror: bool, start: u64, pages: u64 },
    Access { gfn: u64, kind: AccessKind },
    WriteProtect { start: u64, pages: u64, level: Level },
    Split { start: u64, pages: u64 },
    Recover { start: u64, pages: u64 },
    FastZap,
    Fail { nth: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    // Edges of frames of each size, and what is around them.
    let edge = prop::sample::select(vec![0, N, 2 * N, N * N, N * N + N]);
    let gfn = (edge, 0..4u64, any::<bool>()).prop_map(
        |(edge, near, before)| {
            if before { edge + N - 1 - near } else { edge + near }
        },
    );
    let level = prop::sample::select(vec![SMALL, SMALL, HUGE, GIGANTIC]);
    let kind = prop::sample::select(vec![Read, Write]);
    let pages = prop::sample::select(vec![1, 2, N, N + 1, N * N]);
    let range = || (gfn.clone(), pages.clone());
    prop_oneof![
        6 => (any::<bool>(), gfn.clone(), level.clone(), kind.clone(), any::<bool>()).prop_map(
            |(mirror, gfn, level, kind, is_prefetch)| Step::Map { mirror, gfn, level, kind, is_prefetch }
        ),
        3 => (any::<bool>(), range())
            .prop_map(|(mirror, (start, pages))| Step::Zap { mirror, start, pages }),
        3 => (gfn.clone(), kind).prop_map(|(gfn, kind)| Step::Access { gfn, kind }),
        1 => (range(), level).prop_map(
            |((start, pages), level)| Step::WriteProtect { start, pages, level: level.min(HUGE) }
        ),
        1 => range().prop_map(|(start, pages)| Step::Split { start, pages: pages.min(2) }),
        1 => range().prop_map(|(start, pages)| Step::Recover { start, pages }),
        1 => Just(Step::FastZap),
        1 => (0..3u64).prop_map(|nth| Step::Fail { nth }),
    ]
}

/// What is mapped, page by page of the smallest size, as the plainest books have it. Frames are those of the guest.
#[derive(Default)]
struct Books {
    /// The first frame of each page that is mapped directly, with its level.
    direct: BTreeMap<u64, Level>,
    mirror: BTreeMap<u64, Level>,
}

impl Books {
    fn pages(&mut self, mirror: bool) -> &mut BTreeMap<u64, Level> {
        if mirror { &mut self.mirror } else { &mut self.direct }
    }

    fn find(pages: &BTreeMap<u64, Level>, gfn: u64) -> Option<(u64, Level)> {
        let (start, level) = pages.range(..=gfn).next_back()?;
        (gfn < start + level.pages()).then_some((*start, *level))
    }

    fn map(&mut self, mirror: bool, gfn: u64, level: Level) {
        let pages = self.pages(mirror);
        while let Some((start, huge)) = Self::find(pages, gfn).filter(|(_, huge)| *huge > level) {
            pages.remove(&start);
            for part in 0..N {
                pages.insert(start + part * huge.below().pages(), huge.below());
            }
        }
        let start = Gfn(gfn).rounded_down(level).0;
        pages.retain(|page, _| !(start..start + level.pages()).contains(page));
        pages.insert(start, level);
    }

    fn zap(&mut self, mirror: bool, start: u64, end: u64) {
        self.pages(mirror).retain(|page, level| *page >= end || page + level.pages() <= start);
    }

    fn counts(&self) -> [u64; 3] {
        let mut counts = [0; 3];
        let all = self.direct.values().chain(self.mirror.values());
        all.for_each(|level| counts[usize::from(level.number()) - 1] += 1);
        counts
    }
}

/// An MMU with a root of each kind, and the books.
struct World {
    mmu: Mmu,
    external: Arc<PlainCopy>,
    books: Books,
}

impl World {
    fn new() -> Self {
        let external = Arc::new(PlainCopy::new(Level::FOURTH));
        let mmu = Mmu::new(Settings { keeps_present_leafs: true }, Some(external.clone()));
        Self { mmu, external, books: Books::default() }
    }

    fn root(&self, mirror: bool) -> Root {
        self.mmu.root(role(if mirror { Mirroring::Mirror } else { Mirroring::Direct }))
    }

    fn step(&mut self, step: Step) {
        let range = |start, pages| GfnRange::new(Gfn(start), pages);
        match step {
            Step::Map { mirror, gfn, level, kind, is_prefetch } => {
                let level = if mirror { SMALL } else { level };
                self.map(mirror, Mapping { is_prefetch, ..fault(gfn, gfn, level, kind) });
            }
            Step::Zap { mirror, start, pages } => {
                let filter = if mirror { RootFilter::mirror(0) } else { RootFilter::direct(0) };
                let before = Dump::of(&self.mmu);
                self.mmu.lock_exclusive().zap_leafs(filter, range(start, pages));
                invariants::tables_are_kept(&before, &Dump::of(&self.mmu)).unwrap();
                self.books.zap(mirror, start, start + pages);
            }
            Step::Access { gfn, kind } => self.access(gfn, kind),
            Step::WriteProtect { start, pages, level } => {
                self.root(false);
                self.mmu.lock_shared().write_protect(0, range(start, pages), level);
            }
            Step::Split { start, pages } => {
                self.mmu.lock_shared().split_huge_pages(0, range(start, pages), HUGE);
                self.note_split(start, pages);
            }
            Step::Recover { start, pages } => {
                let slot = range(Gfn(start).rounded_down(HUGE).0, pages.next_multiple_of(N));
                self.mmu.lock_shared().recover_huge_pages(0, slot, |_| HUGE);
                let parts: Vec<u64> = self.books.direct.keys().copied().collect();
                for gfn in parts.into_iter().filter(|gfn| slot.contains(Gfn(*gfn))) {
                    if Books::find(&self.books.direct, gfn).is_some_and(|(_, level)| level == SMALL) {
                        self.books.map(false, gfn, HUGE);
                    }
                }
            }
            Step::FastZap => {
                self.mmu.lock_exclusive().invalidate_all_direct_roots();
                self.mmu.zap_invalidated_roots();
                self.books.direct.clear();
            }
            Step::Fail { nth } => self.external.fail(nth, ExternalError::Busy),
        }
        invariants::check(&self.mmu).unwrap();
        assert_eq!(self.mmu.page_counts(), self.books.counts(), "{step:?}");
    }

    fn map(&mut self, mirror: bool, mapping: Mapping<'_>) {
        let (root, gfn) = (self.root(mirror), mapping.gfn.0);
        let was = Books::find(self.books.pages(mirror), gfn);
        let before = Dump::of(&self.mmu);
        let result = self.mmu.lock_shared().map(&root, &mapping);
        match result {
            Fixed => self.books.map(mirror, gfn, mapping.goal_level),
            // It was there, or has come of a split.
            Spurious => {
                assert!(was.is_some_and(|(_, level)| level >= mapping.goal_level));
                self.books.map(mirror, gfn, mapping.goal_level);
            }
            Retry => assert!(mirror),
            Bug => panic!("{:?}", self.mmu.bug()),
        }
        if mapping.is_prefetch {
            invariants::leafs_are_left_alone(&before, &Dump::of(&self.mmu)).unwrap();
        }
    }

    fn access(&mut self, gfn: u64, kind: AccessKind) {
        let root = self.root(false);
        let is_mapped = Books::find(&self.books.direct, gfn).is_some();
        match self.mmu.lock_shared().hardware_access(&root, Gfn(gfn), kind) {
            Ok(found) => assert_eq!((found.pfn, is_mapped), (Pfn(gfn), true)),
            Err(Violation::NotPresent) => assert!(!is_mapped),
            Err(Violation::Protected) => assert!(is_mapped && kind == Write),
            Err(other) => panic!("{other:?}"),
        }
    }

    /// Splits leave nothing above 2 MiB in the range.
    fn note_split(&mut self, start: u64, pages: u64) {
        for gfn in start..start + pages {
            let found = Books::find(&self.books.direct, gfn);
            if found.is_some_and(|(_, level)| level == GIGANTIC) {
                self.books.map(false, gfn, HUGE);
            }
        }
    }

    fn end(self) {
        self.mmu.destroy();
        invariants::check(&self.mmu).unwrap();
        assert_eq!(self.external.contents(), Some(Default::default()));
    }
}

/// Steps of the random test: KVMPREP_MODEL_STEPS, or what is quick.
fn steps() -> u32 {
    std::env::var("KVMPREP_MODEL_STEPS").map_or(4_000, |steps| steps.parse().expect("a number of steps"))
}

#[test]
fn whatever_is_done_the_books_and_the_invariants_hold() {
    const EACH: u32 = 100;
    let config = ProptestConfig {
        cases: steps().div_ceil(EACH),
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(steps in prop::collection::vec(step(), EACH as usize))| {
        let mut world = World::new();
        steps.into_iter().for_each(|step| world.step(step));
        world.end();
    });
}

#[test]
fn threads_that_map_and_zap_leave_sound_tables() {
    const ROUNDS: u64 = 2000;
    let external = Arc::new(PlainCopy::new(Level::FOURTH));
    let mmu = Mmu::new(Settings { keeps_present_leafs: true }, Some(external.clone()));
    let map = |thread: u64| {
        let direct = role(Mirroring::Direct);
        for round in 0..ROUNDS {
            let gfn = (round * 7 + thread) % (2 * N);
            let level = if round % 16 == thread { HUGE } else { SMALL };
            let result = mmu.lock_shared().map(&mmu.root(direct), &fault(gfn, gfn, level, Write));
            assert_ne!(result, Bug);
            let private = mmu.root(role(Mirroring::Mirror));
            let result = mmu.lock_shared().map(&private, &fault(gfn, gfn, SMALL, Write));
            assert_ne!(result, Bug);
            if let Ok(found) = mmu.lock_shared().hardware_access(&mmu.root(direct), Gfn(gfn), Read) {
                assert_eq!(found.pfn, Pfn(gfn));
            }
        }
    };
    let zap = || {
        for round in 0..ROUNDS / 4 {
            let range = GfnRange::new(Gfn(round % (2 * N)), 8);
            mmu.lock_exclusive().zap_leafs(RootFilter::both(0), range);
            if round % 64 == 0 {
                mmu.lock_exclusive().invalidate_all_direct_roots();
                mmu.zap_invalidated_roots();
            }
            if round % 16 == 0 {
                invariants::check(&mmu).unwrap();
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in 0..3 {
            scope.spawn(move || map(thread));
        }
        scope.spawn(zap);
    });
    invariants::check(&mmu).unwrap();
    mmu.destroy();
    invariants::check(&mmu).unwrap();
    assert_eq!(external.contents(), Some(Default::default()));
}
