//! What of a scene is to be drawn, and how it is put: rows of tables, each with its words.
//!
//! A mirror and the external table beside it share their rows: what one has and the other has not is seen at once. Nothing
//! here knows where on the paper a thing goes, or in which colour.

use super::language::Design;
use super::pair::pair_rows;
use super::player::{Picture, Scene, UnderWay};
use super::runs::put_together;
use super::words;
use kvmprep_model::dump::text::{level_size, permissions, size};
use kvmprep_model::dump::{ExternalEntry, SlotDump, VmDump};
use kvmprep_model::mmu::{EntryView, Mirroring, RootDump, Spte};
use kvmprep_model::personality::VmType;
use kvmprep_model::units::{Gfn, GfnRange, Level, PAGE_SIZE, Pfn, Privacy};
use std::collections::BTreeMap;

/// Everything of a picture that is drawn.
pub struct View {
    pub headline: String,
    pub strips: Vec<Strip>,
    /// Roots that nothing is kept equal to.
    pub columns: Vec<Column>,
    /// A root, and the external table that is to be equal to it.
    pub pair: Option<Pair>,
}

/// What KVM was told of a slot.
pub struct Strip {
    pub title: String,
    /// In a guest that has no private memory, without saying that it is shared.
    pub runs: Vec<(Option<Privacy>, String)>,
}

pub struct Column {
    pub title: String,
    pub subtitle: String,
    pub rows: Vec<Row>,
}

/// An entry of a table.
#[derive(Clone, PartialEq)]
pub struct Row {
    pub place: EntryPlace,
    pub cell: Cell,
    /// It maps a page that KVM was told is private.
    pub is_private: bool,
    /// What lies in the frame that it maps.
    pub frame: String,
}

/// Where an entry stands.
#[derive(Clone, PartialEq)]
pub struct EntryPlace {
    /// How many tables it is from the root.
    pub depth: usize,
    pub address: String,
    pub size: String,
    pub gfn: Gfn,
    pub level: Level,
}

/// What an entry is.
#[derive(Clone, PartialEq)]
pub struct Cell {
    pub kind: CellKind,
    pub what: String,
    /// What may be done with it, or what state it is in.
    pub note: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CellKind {
    Nothing,
    Table,
    Page,
    /// The guest has yet to accept it.
    Pending,
    /// The guest is kept from using it.
    Blocked,
    Frozen,
    NoMemory,
}

pub struct Pair {
    /// Whether the root is a mirror, or no table says that it is.
    pub is_mirror: bool,
    pub title: String,
    pub subtitle: String,
    pub external_title: String,
    pub external_subtitle: String,
    pub rows: Vec<PairRow>,
}

/// An entry of both.
#[derive(Clone, PartialEq)]
pub struct PairRow {
    pub place: EntryPlace,
    pub mirror: Cell,
    pub external: Cell,
    pub link: Link,
    pub frame: String,
}

/// How the two sides of a row stand to each other.
#[derive(Clone, PartialEq, Debug)]
pub enum Link {
    Equal,
    /// Something is being put in, or taken away, by this call.
    UnderWay {
        call: String,
        takes_away: bool,
    },
    /// They differ, and nobody is at it.
    Different,
}

pub type Names = BTreeMap<(Gfn, Pfn), String>;

impl Strip {
    /// All that it says.
    pub fn text(&self) -> String {
        let labels: Vec<_> = self.runs.iter().map(|(_, label)| label.as_str()).collect();
        format!("{}: {}", self.title, labels.join(", "))
    }
}

impl View {
    pub fn of(picture: &Picture) -> Self {
        match &picture.scene {
            Scene::Vm { version, dump, names } => {
                let headline = headline(dump, &format!("{}.{}", version.0, version.1));
                View::of_vm(headline, dump, names, &picture.under_way)
            }
            Scene::Design { which, tables, external } => View::of_design(*which, tables, external),
        }
    }

    fn of_vm(headline: String, dump: &VmDump, names: &Names, under_way: &[UnderWay]) -> Self {
        let mirror = dump.roots(Mirroring::Mirror).next();
        let external = dump.external.as_deref();
        let pair = match (mirror, external) {
            (Some(mirror), Some(external)) => Some(Pair {
                is_mirror: true,
                title: "Mirror root".into(),
                subtitle: "KVM's own copy. No processor walks it.".into(),
                external_title: "Secure EPT, the external table".into(),
                external_subtitle: "The module's. The guest's private accesses go here.".into(),
                rows: pair_rows(mirror, external, names, under_way),
            }),
            _ => None,
        };
        let alone =
            dump.roots.iter().filter(|root| pair.is_none() || root.role.mirroring == Mirroring::Direct);
        View {
            headline,
            strips: dump.slots.iter().map(|slot| strip(dump, slot)).collect(),
            columns: alone.map(|root| column(dump, root, names)).collect(),
            pair,
        }
    }

    fn of_design(which: Design, tables: &[RootDump; 2], external: &[ExternalEntry]) -> Self {
        let names = Names::new();
        let [shared, private] = tables;
        let is_ours = which == Design::ByTable;
        let shared = Column {
            title: if is_ours { "Direct root" } else { "Root of shared accesses" }.into(),
            subtitle: if is_ours {
                "It says of itself that it is none."
            } else {
                "It says nothing of itself."
            }
            .into(),
            rows: rows(shared, &names, &[]),
        };
        let pair = Pair {
            is_mirror: is_ours,
            title: if is_ours { "Mirror root" } else { "Root of private accesses" }.into(),
            subtitle: if is_ours {
                "It says of itself that it is a mirror."
            } else {
                "It says nothing of itself."
            }
            .into(),
            external_title: "External table".into(),
            external_subtitle: "The guest's private accesses go here.".into(),
            rows: pair_rows(private, external, &names, &[]),
        };
        // One that is empty says nothing here.
        let columns = if shared.rows.is_empty() { Vec::new() } else { vec![shared] };
        View { headline: words::design(which).into(), strips: Vec::new(), columns, pair: Some(pair) }
    }
}

fn headline(dump: &VmDump, version: &str) -> String {
    let kind = match dump.vm_type {
        VmType::Default => "An ordinary guest",
        VmType::SwProtected => "A software-protected guest",
        VmType::Snp => "An SNP guest",
        VmType::Tdx => "A TDX guest",
    };
    let state = match (dump.is_dead, dump.is_sealed) {
        (true, _) => ", dead",
        (false, false) => ", before its image is sealed",
        _ => "",
    };
    let [small, huge, gigantic] = dump.page_counts;
    let counts = [(small, "4K"), (huge, "2M"), (gigantic, "1G")];
    let mapped: Vec<_> = counts
        .iter()
        .filter(|(pages, _)| *pages > 0)
        .map(|(pages, size)| format!("{pages} of {size}"))
        .collect();
    let mapped = if mapped.is_empty() { "nothing".into() } else { mapped.join(", ") };
    format!("{kind}{state}. Linux {version}. Pages mapped: {mapped}.")
}

fn strip(dump: &VmDump, slot: &SlotDump) -> Strip {
    let mut title = format!(
        "Slot {} at {:#x}, {}{}",
        slot.id,
        slot.range.start.gpa(),
        size(slot.range.pages() * PAGE_SIZE),
        if slot.as_id == 1 { ", of SMM" } else { "" }
    );
    if slot.is_invalid {
        title += ", about to go";
    }
    if dump.vm_type == VmType::Default {
        return Strip { title, runs: vec![(None, size(slot.range.pages() * PAGE_SIZE))] };
    }
    let mut runs = Vec::new();
    let mut gfn = slot.range.start;
    while gfn < slot.range.end {
        let privacy = dump.privacy(gfn);
        let end = end_of_run(dump, gfn, slot.range);
        runs.push((Some(privacy), run_label(privacy, end.0 - gfn.0)));
        gfn = end;
    }
    Strip { title, runs }
}

fn run_label(privacy: Privacy, pages: u64) -> String {
    let kind = if privacy == Privacy::Private { "private" } else { "shared" };
    format!("{kind} {}", size(pages * PAGE_SIZE))
}

/// Where frames of another kind begin, or the range ends.
fn end_of_run(dump: &VmDump, gfn: Gfn, range: GfnRange) -> Gfn {
    let bounds = dump.private.iter().flat_map(|run| [run.start, run.end]);
    bounds.filter(|bound| *bound > gfn).min().map_or(range.end, |bound| bound.min(range.end))
}

fn column(dump: &VmDump, root: &RootDump, names: &Names) -> Column {
    let mut title = match root.role.mirroring {
        Mirroring::Direct => "Direct root".to_string(),
        Mirroring::Mirror => "Mirror root".to_string(),
    };
    if root.role.smm {
        title += " of SMM";
    }
    if root.is_invalid {
        title += ", out of use";
    }
    let subtitle = match (root.role.mirroring, root.role.gfn_bits.0, dump.vm_type) {
        (Mirroring::Mirror, _, _) => "What it was kept equal to is gone.".into(),
        (_, 0, VmType::Default) => "The processor walks it.".into(),
        (_, 0, _) => "The processor walks it, for private accesses too.".into(),
        (_, bit, _) => {
            format!(
                "The processor walks it for shared accesses: with bit {}.",
                Gfn(bit).gpa().trailing_zeros()
            )
        }
    };
    Column { title, subtitle, rows: rows(root, names, &dump.private) }
}

fn rows(root: &RootDump, names: &Names, private: &[GfnRange]) -> Vec<Row> {
    let row = |entry: &EntryView| {
        let cell = cell_of_spte(entry.spte, entry.level, true);
        let is_page = cell.kind == CellKind::Page;
        let frame = is_page.then(|| names.get(&(entry.gfn, entry.spte.pfn())).cloned()).flatten();
        Row {
            place: place(root.level, entry.gfn, entry.level),
            cell,
            is_private: is_page && private.iter().any(|run| run.contains(entry.gfn)),
            frame: frame.unwrap_or_default(),
        }
    };
    put_together(root.entries.iter().map(row).collect())
}

pub fn place(top: Level, gfn: Gfn, level: Level) -> EntryPlace {
    EntryPlace {
        depth: usize::from(top.number().saturating_sub(level.number())),
        address: format!("{:#x}", gfn.gpa()),
        size: level_size(level),
        gfn,
        level,
    }
}

pub fn cell(kind: CellKind, what: impl Into<String>, note: impl Into<String>) -> Cell {
    Cell { kind, what: what.into(), note: note.into() }
}

pub fn cell_of_spte(spte: Spte, level: Level, shows_permissions: bool) -> Cell {
    if spte.is_frozen() {
        return cell(CellKind::Frozen, "frozen", "");
    }
    if spte.is_mmio() {
        return cell(CellKind::NoMemory, "no memory", "");
    }
    if spte.child(level).is_some() {
        return cell(CellKind::Table, "table", "");
    }
    if spte.is_leaf(level) {
        let note = if shows_permissions { permissions(spte) } else { String::new() };
        return cell(CellKind::Page, format!("frame {:#x}", spte.pfn().0), note);
    }
    cell(CellKind::Nothing, "nothing", "")
}
