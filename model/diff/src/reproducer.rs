//! Prints a program as one in C, which does the same on plain KVM and shows what comes of it.
//!
//! It is for a person who wants to see what the kernel does without all that is here, and perhaps to send it to the
//! kernel's people. It prints a line for each operation, in the words of [`Outcome::figures`], so that the two can be
//! compared. Nothing here is run.

use std::fmt::Write;

use crate::machine::Outcome;
use crate::operation::{
    AREA_SIZE, AREA_STRIDE, Advice, Backing, CODE_GPA, CODE_HVA, CODE_SLOT, FileReference, MMIO_WORD,
    Operation, POOL_PAGES, PROMISED_HVA, Program, Protection, SPARE_HVA, area_of, area_start,
};

const SUPPORT: &str = include_str!("reproducer.c");

/// The program's text. What each operation should show, or is shown by another, is put beside it.
pub fn print(program: &Program, remarks: &[(usize, String)]) -> String {
    let mut text = SUPPORT.to_string();
    let setting = &program.setting;
    let _ = writeln!(
        text,
        "\nint main(void) {{\n    begin(&(struct program){{.vm_type = {}, .thp = \"{}\",\n        \
         .pool = {POOL_PAGES}, .promised = {}, .promised_at = {PROMISED_HVA:#x},\n        \
         .code_slot = {CODE_SLOT}, .code_gpa = {CODE_GPA:#x}, .code = {CODE_HVA:#x}, .spare = {SPARE_HVA:#x},\n        \
         .mmio_word = {MMIO_WORD:#x}, .areas = {:#x}, .area_stride = {AREA_STRIDE:#x}, .area_size = {AREA_SIZE:#x}}});",
        setting.vm_type.number(),
        setting.thp.name(),
        setting.promised_elsewhere,
        area_start(0),
    );
    for (step, operation) in program.operations.iter().enumerate() {
        let _ = writeln!(text, "    settle();\n    show({step}, {});", call(operation));
        for (_, remark) in remarks.iter().filter(|(place, _)| *place == step) {
            let _ = writeln!(text, "    /* {remark} */");
        }
    }
    text.push_str("    return 0;\n}\n");
    text
}

/// What the program prints where each operation comes to this.
pub fn prints(outcomes: &[Outcome]) -> String {
    outcomes.iter().enumerate().map(|(step, outcome)| format!("{step}: {}\n", outcome.figures())).collect()
}

fn call(operation: &Operation) -> String {
    match *operation {
        Operation::Map { at, size, backing } => map(at, size, backing),
        Operation::Unmap { at, size } => format!("answer(munmap((void *){at:#x}, {size:#x}))"),
        Operation::Advise { at, size, advice } => {
            format!("answer(madvise((void *){at:#x}, {size:#x}, {}))", Advice::name(advice))
        }
        Operation::Protect { at, size, protection } => {
            let protection = match protection {
                Protection::None => "PROT_NONE",
                Protection::Read => "PROT_READ",
                Protection::ReadWrite => "PROT_READ | PROT_WRITE",
            };
            format!("answer(mprotect((void *){at:#x}, {size:#x}, {protection}))")
        }
        Operation::Store { at, word } => format!("store({at:#x}, {word:#x})"),
        Operation::Load { at } => format!("load({at:#x})"),
        Operation::Punch { area, offset, size } => fallocate("memfds", area, "HOLE", offset, size),
        Operation::Allocate { area, offset, size } => {
            fallocate("memfds", area, "FALLOC_FL_KEEP_SIZE", offset, size)
        }
        Operation::Fork => "make_child()".into(),
        Operation::Reap => "end_child()".into(),
        Operation::SetRegion { slot, flags, gpa, size, hva, file, offset, is_second } => {
            let fd = match file {
                FileReference::Bad => "-1".into(),
                FileReference::Other => "vm".into(),
                FileReference::OfAnotherVm => "another_vms_file()".into(),
                FileReference::GuestMemfd(number) => format!("files[{number}]"),
            };
            match is_second {
                true => format!(
                    "set_region2({slot:#x}, {flags:#x}, {gpa:#x}, {size:#x}, {hva:#x}, {fd}, {offset:#x})"
                ),
                false => format!("set_region({slot:#x}, {flags:#x}, {gpa:#x}, {size:#x}, {hva:#x})"),
            }
        }
        Operation::GetDirtyLog { slot } => format!("get_dirty_log({slot:#x})"),
        Operation::ClearDirtyLog { slot, first_page, pages, bits } => {
            format!("clear_dirty_log({slot:#x}, {first_page:#x}, {pages:#x}, {bits:#x})")
        }
        Operation::ProtectDirtyLog { how } => {
            format!("enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, {how:#x})")
        }
        Operation::CreateFile { size, flags } => format!("create_guest_memfd({size:#x}, {flags:#x})"),
        Operation::CloseFile { file } => format!("close_file({file})"),
        Operation::PunchFile { file, offset, size, keep_size } => {
            let mode = if keep_size { "HOLE" } else { "FALLOC_FL_PUNCH_HOLE" };
            fallocate("files", file, mode, offset, size)
        }
        Operation::AllocateFile { file, offset, size, keep_size } => {
            let mode = if keep_size { "FALLOC_FL_KEEP_SIZE" } else { "0" };
            fallocate("files", file, mode, offset, size)
        }
        Operation::SetAttributes { address, size, attributes, flags } => {
            format!("set_attributes({address:#x}, {size:#x}, {attributes:#x}, {flags:#x})")
        }
        Operation::DisableQuirks { quirks } => format!("enable_cap(KVM_CAP_DISABLE_QUIRKS2, {quirks:#x})"),
        Operation::CheckExtension { cap } => format!("answer(ioctl(vm, KVM_CHECK_EXTENSION, {cap}))"),
        Operation::PreFault { vcpu, gpa, size, flags } => {
            format!("pre_fault({vcpu}, {gpa:#x}, {size:#x}, {flags:#x})")
        }
        Operation::PreFaultNested { vcpu, has_tables, gpa, size } => {
            format!("pre_fault_nested({vcpu}, {has_tables}, {gpa:#x}, {size:#x})")
        }
        Operation::SetSmm { vcpu, is_in_smm } => format!("set_smm({vcpu}, {is_in_smm})"),
        Operation::GuestRead { vcpu, gpa } => format!("guest_read({vcpu}, {gpa:#x})"),
        Operation::GuestWrite { vcpu, gpa, word } => format!("guest_write({vcpu}, {gpa:#x}, {word:#x})"),
        Operation::GuestInterrupted { vcpu, gpa } => format!("guest_interrupted({vcpu}, {gpa:#x})"),
    }
}

fn fallocate(files: &str, number: usize, mode: &str, offset: u64, size: u64) -> String {
    format!("answer(fallocate({files}[{number}], {mode}, (off_t){offset:#x}, (off_t){size:#x}))")
}

fn map(at: u64, size: u64, backing: Backing) -> String {
    let area = area_of(at).unwrap_or(0);
    let (flags, file, offset) = match backing {
        Backing::Anonymous => ("MAP_PRIVATE | MAP_ANONYMOUS", "-1".into(), 0),
        Backing::AnonymousShared => ("MAP_SHARED | MAP_ANONYMOUS", "-1".into(), 0),
        Backing::HugetlbPrivate => ("MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB", "-1".into(), 0),
        Backing::GuestMemfd { file, offset } => ("MAP_SHARED", format!("files[{file}]"), offset),
        Backing::MemfdShared => return map_memfd(area, at, size, "MAP_SHARED", "0"),
        Backing::MemfdPrivate => return map_memfd(area, at, size, "MAP_PRIVATE", "0"),
        Backing::HugetlbShared => return map_memfd(area, at, size, "MAP_SHARED", "MFD_HUGETLB"),
    };
    format!("map({area}, {at:#x}, {size:#x}, {flags}, {file}, {offset:#x})")
}

fn map_memfd(area: usize, at: u64, size: u64, flags: &str, kind: &str) -> String {
    format!("map_memfd({area}, {at:#x}, {size:#x}, {flags}, {kind})")
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::generator::{self, Abilities};

    #[test]
    fn every_program_compiles_without_a_warning() {
        let directory = std::env::temp_dir().join(format!("kvmprep-reproducer-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let source = directory.join("reproducer.c");
        // So long that it has everything, and so short that it has not.
        for (number, length) in [(1, 2000), (2, 1)] {
            let program = generator::program(1, number, length, &Abilities::ALL);
            std::fs::write(&source, print(&program, &[(0, "a remark".into())])).unwrap();
            let compiled = Command::new("cc")
                .args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
                .args([directory.join("reproducer"), source.clone()])
                .output()
                .unwrap();
            assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
