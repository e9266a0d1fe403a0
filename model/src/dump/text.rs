//! The same in words, line by line: what a terminal or a test's failure shows.
//!
//! Addresses are the guest's, without its shared bit; what stands below a table is further to the right. Lines are for
//! people: nothing is to read them back.

use std::fmt::{self, Display, Formatter};

use super::{ExternalEntry, ExternalTarget, FileDump, FrameDump, FrameOwner, SlotDump, VmDump};
use crate::memslot::{LOG_DIRTY_PAGES, READONLY};
use crate::mmu::{EntryView, Mirroring, RootDump, Spte};
use crate::personality::VmType;
use crate::units::{GfnRange, Level, PAGE_SIZE, Privacy};

impl Display for VmDump {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.headline())?;
        self.slots.iter().try_for_each(|slot| writeln!(f, "{}", slot_line(slot)))?;
        self.private.iter().try_for_each(|run| writeln!(f, "private: {}", range(*run)))?;
        self.roots.iter().try_for_each(|root| f.write_str(&root_text(root)))?;
        self.external.iter().try_for_each(|external| f.write_str(&external_text(external)))?;
        if !self.frames.is_empty() {
            writeln!(f, "frames")?;
        }
        self.frames.iter().try_for_each(|frame| writeln!(f, "  {}", frame_line(frame)))?;
        let [small, huge, gigantic] = self.page_counts;
        writeln!(f, "mapped: {small} of 4K, {huge} of 2M, {gigantic} of 1G")
    }
}

impl VmDump {
    fn headline(&self) -> String {
        let mut line = format!("vm {}", type_name(self.vm_type));
        if matches!(self.vm_type, VmType::Tdx | VmType::Snp) {
            line += if self.is_sealed { ", its image sealed" } else { ", its image not sealed" };
        }
        if self.shared_bit.0 != 0 {
            line += &format!(", shared bit {:#x}", self.shared_bit.gpa());
        }
        if self.is_dead {
            line += ", dead";
        }
        line
    }
}

/// The name of a type, as people write it.
pub const fn type_name(vm_type: VmType) -> &'static str {
    match vm_type {
        VmType::Default => "default",
        VmType::SwProtected => "sw-protected",
        VmType::Snp => "snp",
        VmType::Tdx => "tdx",
    }
}

/// So many bytes, in the largest unit that leaves no fraction.
pub fn size(bytes: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let unit = units.iter().find(|(shift, _)| bytes != 0 && bytes % (1 << shift) == 0);
    unit.map_or_else(|| bytes.to_string(), |(shift, name)| format!("{}{name}", bytes >> shift))
}

/// The size of what an entry of a table of this level is for.
pub fn level_size(level: Level) -> String {
    size(level.pages() * PAGE_SIZE)
}

/// What an entry allows, and whether it is accessed and dirty: RWXAD, with dashes for what is not.
pub fn permissions(spte: Spte) -> String {
    let flags = [
        (spte.is_readable(), 'R'),
        (spte.is_writable(), 'W'),
        (spte.is_executable(), 'X'),
        (spte.is_accessed(), 'A'),
        (spte.is_dirty(), 'D'),
    ];
    flags.iter().map(|(is_set, name)| if *is_set { *name } else { '-' }).collect()
}

/// A root and what is in its tables, as lines.
pub fn root_text(root: &RootDump) -> String {
    let entries = root.entries.iter().map(|entry| entry_line(root.level, entry));
    lines(std::iter::once(root_line(root)).chain(entries))
}

/// What an external table has, as lines.
pub fn external_text(entries: &[ExternalEntry]) -> String {
    let top = entries.iter().map(|entry| entry.level).max().unwrap_or(Level::FOURTH);
    let entries = entries.iter().map(|entry| external_line(top, entry));
    lines(std::iter::once("external table".to_string()).chain(entries))
}

fn lines(lines: impl Iterator<Item = String>) -> String {
    lines.map(|line| line + "\n").collect()
}

fn range(range: GfnRange) -> String {
    format!("{:#x} +{}", range.start.gpa(), size(range.pages() * PAGE_SIZE))
}

fn slot_line(slot: &SlotDump) -> String {
    let mut line = format!("slot {}:{}: {} at {:#x}", slot.as_id, slot.id, range(slot.range), slot.hva.0);
    for (flag, name) in [(LOG_DIRTY_PAGES, "logged"), (READONLY, "read-only")] {
        if slot.flags & flag != 0 {
            line += &format!(", {name}");
        }
    }
    if let Some(file) = &slot.file {
        line += &format!(", {}", file_text(file));
    }
    if slot.is_invalid {
        line += ", about to go";
    }
    line
}

fn file_text(file: &FileDump) -> String {
    let FileDump { number, first_index, .. } = file;
    let mut text = format!("file {number} from page {first_index:#x}, {} present", file.pages.len());
    if file.serves_all {
        text += ", for all accesses";
    }
    if file.privacy == Privacy::Shared {
        text += ", shared";
    }
    if file.is_closed {
        text += ", closed";
    }
    text
}

fn root_line(root: &RootDump) -> String {
    let mut line = match root.role.mirroring {
        Mirroring::Direct => "direct root".to_string(),
        Mirroring::Mirror => "mirror root".to_string(),
    };
    line += &format!(" of {} levels", root.level.number());
    if root.role.smm {
        line += ", of SMM";
    }
    if root.role.gfn_bits.0 != 0 {
        line += &format!(", addresses with {:#x}", root.role.gfn_bits.gpa());
    }
    if root.is_invalid {
        line += ", out of use";
    }
    line
}

fn indent(top: Level, level: Level) -> String {
    " ".repeat(2 + 2 * usize::from(top.number().saturating_sub(level.number())))
}

fn entry_line(top: Level, entry: &EntryView) -> String {
    let EntryView { gfn, level, spte, .. } = *entry;
    let start = format!("{}{:#x} +{}", indent(top, level), gfn.gpa(), level_size(level));
    let what = match spte.child(level) {
        Some(_) => "table".to_string(),
        None if spte.is_leaf(level) => format!("frame {:#x} {}", spte.pfn().0, permissions(spte)),
        None => format!("{spte:?}"),
    };
    format!("{start} {what}")
}

fn external_line(top: Level, entry: &ExternalEntry) -> String {
    let ExternalEntry { gfn, level, target, is_blocked } = *entry;
    let mut line = format!("{}{:#x} +{}", indent(top, level), gfn.gpa(), level_size(level));
    line += &match target {
        ExternalTarget::Table => " table".to_string(),
        ExternalTarget::Page { pfn, is_pending: false } => format!(" frame {:#x}", pfn.0),
        ExternalTarget::Page { pfn, is_pending: true } => format!(" frame {:#x} pending", pfn.0),
    };
    if is_blocked {
        line += " blocked";
    }
    line
}

fn frame_line(frame: &FrameDump) -> String {
    let mut line = format!("{:#x}", frame.pfn.0);
    if let Some((file, index)) = frame.file {
        line += &format!(" file {file} page {index:#x}");
    }
    line + &match frame.owner {
        FrameOwner::Host => String::new(),
        FrameOwner::Firmware => ", the firmware's".into(),
        FrameOwner::Guest { gfn, is_accepted: true } => format!(", the guest's at {:#x}", gfn.gpa()),
        FrameOwner::Guest { gfn, is_accepted: false } => {
            format!(", the guest's at {:#x}, not validated", gfn.gpa())
        }
    }
}
