//! Finds the kernel modules the bed needs and puts them in the order in which they can be loaded.
//!
//! Packages ship them compressed and without the index that installation would make, so what a module depends
//! on is read from the module itself. A module that is not there is taken to be built in; whoever needs it
//! finds out.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::process;

/// A module, uncompressed.
#[derive(Clone)]
pub struct Module {
    /// Its name as the kernel writes it, with underscores.
    pub name: String,
    /// The ELF file.
    pub image: Vec<u8>,
}

/// The modules `wanted` and what they depend on, from anywhere under `dir`, in loading order.
pub fn collect(dir: &Path, wanted: &[&str], busybox: &Path) -> Result<Vec<Module>> {
    let mut available = BTreeMap::new();
    index(dir, &mut available)?;
    let mut loaded = Vec::new();
    for name in wanted {
        load(name, &available, busybox, &mut loaded)?;
    }
    Ok(loaded)
}

fn load(
    name: &str,
    available: &BTreeMap<String, PathBuf>,
    busybox: &Path,
    loaded: &mut Vec<Module>,
) -> Result<()> {
    let name = name.replace('-', "_");
    let Some(path) = available.get(&name) else {
        return Ok(());
    };
    if loaded.iter().any(|module| module.name == name) {
        return Ok(());
    }
    let image = decompress(path, busybox)?;
    for dependency in depends(&image) {
        load(&dependency, available, busybox, loaded)?;
    }
    loaded.push(Module { name, image });
    Ok(())
}

/// Maps module names to files.
fn index(dir: &Path, into: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        // Links lead to the kernel's source or back into the tree.
        if entry.file_type()?.is_dir() {
            index(&entry.path(), into)?;
        } else if let Some((stem, "" | ".xz" | ".zst" | ".gz")) =
            entry.file_name().to_str().and_then(|name| name.split_once(".ko"))
        {
            into.insert(stem.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}

fn decompress(path: &Path, busybox: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    let extension = path.extension().and_then(|extension| extension.to_str());
    let plain = match extension {
        Some("xz") => process::filter(Command::new(busybox).arg("xzcat"), &bytes)?,
        Some("gz") => process::filter(Command::new(busybox).arg("zcat"), &bytes)?,
        Some("zst") => {
            crate::setup::require_packages(&["zstd"])?;
            process::filter(Command::new("zstd").args(["--decompress", "--stdout"]), &bytes)?
        }
        _ => bytes,
    };
    if !plain.starts_with(b"\x7fELF") {
        bail!("{} is not a kernel module", path.display());
    }
    Ok(plain)
}

/// The `depends=` entry of a module's `.modinfo` section, whose strings are separated by NUL.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[start + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names.split(',').filter(|name| !name.is_empty()).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(dir: &Path, file: &str, depends: &str) {
        let path = dir.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("\x7fELF..\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tempfile::tempdir().unwrap();
        module(dir.path(), "arch/kvm-amd.ko", "kvm,ccp");
        module(dir.path(), "arch/kvm.ko", "irqbypass");
        module(dir.path(), "crypto/ccp.ko", "");
        module(dir.path(), "virt/irqbypass.ko", "");
        module(dir.path(), "net/other.ko", "");
        let loaded = collect(dir.path(), &["kvm-amd", "kvm"], Path::new("unused")).unwrap();
        let names: Vec<&str> = loaded.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "ccp", "kvm_amd"]);
    }

    #[test]
    fn what_is_not_a_module_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("kvm.ko"), "text").unwrap();
        let error = collect(dir.path(), &["kvm"], Path::new("unused")).err().unwrap();
        assert!(error.to_string().contains("not a kernel module"), "{error}");
    }

    #[test]
    fn a_module_without_the_entry_depends_on_nothing() {
        assert!(depends(b"\x7fELF\0name=kvm\0").is_empty());
        assert!(depends(b"\x7fELF\0depends=\0").is_empty());
    }
}
