//! Builds the guest that converts its memory: firmware of our own for a microvm, which needs no system.
//!
//! Its source is in converter/. It comes out as an image of 64 KiB whose last 16 bytes are the CPU's first; the machine's
//! own headers and libraries must never get into it, since it is 32-bit code that runs on nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::super::process;
use crate::project;

/// Its path in the outer guest.
pub const INSIDE: &str = "/firmware/converter.bin";

const OPTIONS: [&str; 16] = [
    "-m32",
    "-march=i686",
    "-mgeneral-regs-only",
    "-ffreestanding",
    "-fno-pic",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,--fatal-warnings",
];

const SIZE: u64 = 64 << 10;

/// Builds it in `dir`.
pub fn build(dir: &Path) -> Result<PathBuf> {
    crate::setup::require_packages(&["gcc"])?;
    let source = project::root().join("xtask/src/bed/vmm/converter");
    let (program, image) = (dir.join("converter"), dir.join("converter.bin"));
    let mut gcc = Command::new("gcc");
    gcc.args(OPTIONS).arg("-T").arg(source.join("rom.ld")).arg("-o").arg(&program);
    gcc.args(["start.S", "main.c"].map(|name| source.join(name)));
    process::capture(&mut gcc)?.or_fail().context("the guest that converts its memory")?;
    let mut objcopy = Command::new("objcopy");
    objcopy.args(["--output-target=binary", "--only-section=.text", "--only-section=.reset"]);
    process::capture(objcopy.arg(&program).arg(&image))?.or_fail()?;
    let size = image.metadata()?.len();
    ensure!(size == SIZE, "the guest's firmware has {size} bytes; a microvm wants {SIZE}");
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_instruction_is_where_the_cpu_looks_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let image = std::fs::read(build(dir.path()).unwrap()).unwrap();
        let first = &image[image.len() - 16..];
        // A jump to the start of the image, with a displacement of 16 bits, from behind its 3 bytes.
        assert_eq!(first[0], 0xe9);
        let displacement = u16::from_le_bytes([first[1], first[2]]);
        assert_eq!(0xfff3_u16.wrapping_add(displacement), 0);
    }
}
