//! Packs a guest's file system: busybox, the keeper of VMs, the init script, kernel modules, and the files it was given.
//!
//! The archive is written afresh for each boot, in the kernel's "newc" format and uncompressed: unpacking
//! would cost emulated time. Nothing of the host's identity enters it; owners are root and times are zero.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};

use super::guest::Guest;
use super::modules::Module;

const INIT: &str = include_str!("init.sh");
const DIRECTORIES: [&str; 10] =
    ["bin", "dev", "lib", "lib64", "proc", "root", "sys", "tmp", "bed", "bed/modules"];

/// Writes the archive for `guest` to `to`. The `token` frames the program's output.
pub fn write(
    to: &Path,
    guest: &Guest,
    modules: &[Module],
    [busybox, keeper]: [&Path; 2],
    token: &str,
) -> Result<()> {
    let file = io::BufWriter::new(File::create(to)?);
    let mut archive = Archive { out: file, inode: 0, directories: BTreeSet::new() };
    for directory in DIRECTORIES {
        archive.directory(directory)?;
    }
    // The kernel opens it before devtmpfs is mounted.
    archive.console()?;
    archive.file("bin/busybox", 0o755, &mut File::open(busybox)?)?;
    archive.file("bed/keeper", 0o755, &mut File::open(keeper)?)?;
    archive.bytes("init", 0o755, INIT.as_bytes())?;
    archive.bytes("bed/token", 0o644, token.as_bytes())?;
    archive.bytes("bed/program", 0o644, script(guest).as_bytes())?;
    for (index, module) in modules.iter().enumerate() {
        archive.bytes(&format!("bed/modules/{index:02}-{}.ko", module.name), 0o644, &module.image)?;
    }
    for (host, inside) in &guest.files {
        let mut file = File::open(host).with_context(|| format!("cannot read {}", host.display()))?;
        let mode = file.metadata()?.permissions().mode() & 0o777;
        archive.file(inside.trim_start_matches('/'), mode, &mut file)?;
    }
    trailer(archive.out)?.flush()?;
    Ok(())
}

/// Writes an archive of busybox and `init`, which becomes the first process: all that a guest inside a guest needs.
pub fn write_small(to: &Path, init: &str, busybox: &Path) -> Result<()> {
    let file = io::BufWriter::new(File::create(to)?);
    let mut archive = Archive { out: file, inode: 0, directories: BTreeSet::new() };
    for directory in ["bin", "dev", "proc", "tmp"] {
        archive.directory(directory)?;
    }
    archive.console()?;
    archive.file("bin/busybox", 0o755, &mut File::open(busybox)?)?;
    archive.bytes("init", 0o755, init.as_bytes())?;
    trailer(archive.out)?.flush()?;
    Ok(())
}

/// The shell script that becomes the program.
fn script(guest: &Guest) -> String {
    let mut text = String::from("cd /\n");
    for (name, value) in &guest.env {
        text.push_str(&format!("export {name}={}\n", quote(value)));
    }
    let words: Vec<String> = guest.argv.iter().map(|word| quote(word)).collect();
    text.push_str(&format!("exec {}\n", words.join(" ")));
    text
}

/// `text` as one word for a shell, whatever it holds.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

struct Archive<W: Write> {
    out: W,
    inode: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    fn entry(&mut self, name: &str, mode: u32, kind: ModeFileType) -> Builder {
        self.inode += 1;
        Builder::new(name).ino(self.inode).nlink(1).mode(mode).set_mode_file_type(kind)
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        if self.directories.insert(name.to_string()) {
            self.entry(name, 0o755, ModeFileType::Directory).write(&mut self.out, 0).finish()?;
        }
        Ok(())
    }

    fn console(&mut self) -> Result<()> {
        let node = self.entry("dev/console", 0o600, ModeFileType::Char).rdev_major(5).rdev_minor(1);
        node.write(&mut self.out, 0).finish()?;
        Ok(())
    }

    fn bytes(&mut self, name: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.parents(name)?;
        let size = u32::try_from(bytes.len()).with_context(|| format!("{name} is too large for a guest"))?;
        let mut writer = self.entry(name, mode, ModeFileType::Regular).write(&mut self.out, size);
        writer.write_all(bytes)?;
        writer.finish()?;
        Ok(())
    }

    fn file(&mut self, name: &str, mode: u32, from: &mut File) -> Result<()> {
        self.parents(name)?;
        let size = u32::try_from(from.metadata()?.len())
            .with_context(|| format!("{name} is too large for a guest"))?;
        let mut writer = self.entry(name, mode, ModeFileType::Regular).write(&mut self.out, size);
        io::copy(from, &mut writer)?;
        writer.finish()?;
        Ok(())
    }

    /// The kernel creates no directories by itself.
    fn parents(&mut self, name: &str) -> Result<()> {
        let slashes: Vec<usize> = name.match_indices('/').map(|(index, _)| index).collect();
        slashes.into_iter().try_for_each(|end| self.directory(&name[..end]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_quotes_every_word() {
        let mut guest = Guest::new(["/bin/a b", "it's", "$HOME"]);
        guest.env.push(("KEY".into(), "a;b".into()));
        assert_eq!(script(&guest), "cd /\nexport KEY='a;b'\nexec '/bin/a b' 'it'\\''s' '$HOME'\n");
    }

    #[test]
    fn every_file_comes_after_the_directories_it_lies_in() {
        let dir = tempfile::tempdir().unwrap();
        let (host, archive) = (dir.path().join("host"), dir.path().join("archive"));
        std::fs::write(&host, "content").unwrap();
        let mut guest = Guest::new(["/a/b/c"]);
        guest.add(&host, "/a/b/c", &[]).unwrap();
        write(&archive, &guest, &[], [&host, &host], "token").unwrap();

        let mut names = Vec::new();
        let mut rest = File::open(&archive).unwrap();
        loop {
            let mut reader = cpio::NewcReader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push(reader.entry().name().to_string());
            io::copy(&mut reader, &mut io::sink()).unwrap();
            rest = reader.finish().unwrap();
        }
        let at = |name: &str| names.iter().position(|other| other == name).unwrap();
        assert!(at("a") < at("a/b") && at("a/b") < at("a/b/c"), "{names:?}");
        assert_eq!(names.iter().filter(|name| *name == "bin").count(), 1);
    }
}
