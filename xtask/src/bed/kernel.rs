//! Names the kernels of the bed and makes each of them ready to boot.
//!
//! A packaged kernel is chosen from what the mirror offers, unpacked, and reduced to its image and the few
//! modules that matter. Nothing is ever installed. A kernel that cannot be had is told apart from one that
//! fails, so that a test can report it as skipped and never as passed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::cache::Cache;
use super::modules::{self, Module};
use super::qemu::Qemu;
use super::{private, progress};

/// Changes whenever an entry is laid out differently.
const RECIPE: &str = "image and modules in loading order, layout 1";

const MODULES: [&str; 3] = ["irqbypass", "kvm", "kvm-amd"];

/// A kernel as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kernel {
    /// One of the distribution's, by its name in [`Kernel::PACKAGED`].
    Packaged(&'static str),
    /// Built by the bed with `KVM_SW_PROTECTED_VM`, for private memory without confidential hardware.
    Private,
    /// The user's own image; modules come from a directory, or are built in.
    Own { image: PathBuf, modules: Option<PathBuf> },
}

/// A packaged kernel: the start of its version (all when empty) and the suites it is taken from.
struct Series {
    name: &'static str,
    prefix: &'static str,
    suites: &'static [&'static str],
}

/// Suites that carry the newest kernels; the private kernel's source comes from there too.
pub const NEWEST_SUITES: &[&str] = &["trixie-backports", "forky", "sid"];

const SERIES: [Series; 3] = [
    Series { name: "6.1", prefix: "6.1.", suites: &["bookworm"] },
    Series { name: "6.12", prefix: "6.12.", suites: &["trixie", "bookworm-backports"] },
    Series { name: "newest", prefix: "", suites: NEWEST_SUITES },
];

impl Kernel {
    /// Names of the packaged kernels.
    pub const PACKAGED: [&'static str; 3] = [SERIES[0].name, SERIES[1].name, SERIES[2].name];

    /// Every kernel the bed can have by itself.
    pub fn all() -> Vec<Kernel> {
        Self::PACKAGED.map(Kernel::Packaged).into_iter().chain([Kernel::Private]).collect()
    }

    /// The kernel of this name.
    pub fn named(name: &str) -> Result<Kernel> {
        Self::all().into_iter().find(|kernel| kernel.name() == name).with_context(|| {
            let names: Vec<String> = Self::all().iter().map(Kernel::name).collect();
            format!("there is no kernel {name:?} in the bed; there are: {}", names.join(", "))
        })
    }

    /// What to call it.
    pub fn name(&self) -> String {
        match self {
            Kernel::Packaged(name) => (*name).to_string(),
            Kernel::Private => "private".to_string(),
            Kernel::Own { image, .. } => image.display().to_string(),
        }
    }
}

/// A kernel ready to boot.
#[derive(Clone)]
pub struct ResolvedKernel {
    /// The name it was asked for by.
    pub name: String,
    /// Its version, such as 6.12.57.
    pub version: String,
    pub(super) image: PathBuf,
    pub(super) modules: Vec<Module>,
}

/// Makes `kernel` ready, fetching or building what the cache does not have.
pub fn obtain<'a>(
    kernel: &Kernel,
    cache: &Cache,
    qemu: &Qemu,
    apt: impl FnOnce() -> Result<Apt<'a>>,
) -> Result<ResolvedKernel> {
    let name = kernel.name();
    match kernel {
        Kernel::Packaged(series) => {
            let series = SERIES.iter().find(|known| known.name == *series);
            let series = series.with_context(|| format!("there is no packaged kernel {name:?}"))?;
            let make = |into: &Path| fetch(series, &apt()?, &qemu.busybox(), into);
            load(&name, &cache.get_or_make(&entry(kernel), &recipe(kernel), make)?)
        }
        Kernel::Private => {
            let make = |into: &Path| private::build(apt()?, into);
            load(&name, &cache.get_or_make(&entry(kernel), &recipe(kernel), make)?)
        }
        Kernel::Own { image, modules } => own(name, image, modules.as_deref(), qemu),
    }
}

/// `kernel` as far as the cache has it; a kernel of the user's own is never there. With its directory.
pub fn cached(kernel: &Kernel, cache: &Cache) -> Result<Option<(ResolvedKernel, PathBuf)>> {
    if matches!(kernel, Kernel::Own { .. }) {
        return Ok(None);
    }
    let dir = cache.get(&entry(kernel), &recipe(kernel))?;
    dir.map(|dir| Ok((load(&kernel.name(), &dir)?, dir))).transpose()
}

fn entry(kernel: &Kernel) -> String {
    format!("kernel-{}", kernel.name())
}

fn recipe(kernel: &Kernel) -> String {
    match kernel {
        Kernel::Private => format!("{RECIPE}\n{}", private::CONFIG),
        _ => RECIPE.to_string(),
    }
}

fn load(name: &str, dir: &Path) -> Result<ResolvedKernel> {
    let mut files: Vec<PathBuf> = Vec::new();
    if dir.join("modules").exists() {
        files = fs::read_dir(dir.join("modules"))?.flatten().map(|entry| entry.path()).collect();
    }
    files.sort();
    let module = |path: &PathBuf| -> Result<Module> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let name = stem.split_once('-').map(|(_, name)| name.to_string()).unwrap_or(stem);
        Ok(Module { name, image: fs::read(path)? })
    };
    Ok(ResolvedKernel {
        name: name.to_string(),
        version: fs::read_to_string(dir.join("version"))?,
        image: dir.join("vmlinuz"),
        modules: files.iter().map(module).collect::<Result<_>>()?,
    })
}

fn own(name: String, image: &Path, modules: Option<&Path>, qemu: &Qemu) -> Result<ResolvedKernel> {
    let bytes = fs::read(image).with_context(|| format!("cannot read the kernel {}", image.display()))?;
    let version = image_version(&bytes)
        .with_context(|| format!("{} is no bootable x86 kernel image (bzImage)", image.display()))?;
    let modules = match modules {
        Some(dir) => modules::collect(dir, &MODULES, &qemu.busybox())
            .with_context(|| format!("cannot take modules from {}", dir.display()))?,
        None => Vec::new(),
    };
    Ok(ResolvedKernel { name, version, image: image.to_path_buf(), modules })
}

fn fetch(series: &Series, apt: &Apt<'_>, busybox: &Path, into: &Path) -> Result<()> {
    let _step = progress::step(&format!("fetching kernel {}", series.name));
    let names = apt.names(series.suites, "^linux-(image|binary|modules)-.*-cloud-amd64")?;
    let Some(packages) = choose(&names, series.prefix) else {
        let what = format!("no package of a {} kernel in {}", series.name, series.suites.join(", "));
        return Err(apt.unavailable(&what).into());
    };
    let root = tempfile::tempdir_in(into)?;
    let versions = apt.unpack(series.suites, &packages, root.path())?;
    let image = find_image(root.path())?.context("the kernel's packages hold no image")?;
    let modules = modules::collect(root.path(), &MODULES, busybox)?;
    if !modules.iter().any(|module| module.name == "kvm_amd") {
        bail!("{} hold no kvm-amd module", packages.join(" "));
    }
    let version = upstream_version(versions.first().map_or("", String::as_str));
    store(into, &image, version, &modules)
}

/// Lays out an entry of the cache.
pub fn store(into: &Path, image: &Path, version: &str, modules: &[Module]) -> Result<()> {
    fs::copy(image, into.join("vmlinuz"))?;
    fs::write(into.join("version"), version)?;
    fs::create_dir(into.join("modules"))?;
    for (index, module) in modules.iter().enumerate() {
        fs::write(into.join("modules").join(format!("{index:02}-{}.ko", module.name)), &module.image)?;
    }
    Ok(())
}

/// The packages that together make the newest kernel whose version starts with `prefix`. Older kernels come
/// in one package, newer ones split into image and modules; an image is preferred signed, as a user would
/// have it.
fn choose(names: &[String], prefix: &str) -> Option<Vec<String>> {
    let has = |name: &String| names.contains(name);
    let versions = names.iter().filter_map(|name| package_version(name));
    let mut versions: Vec<&str> = versions.filter(|version| version.starts_with(prefix)).collect();
    versions.sort_by_key(|version| numbers(version));
    versions.iter().rev().find_map(|version| {
        let modules = format!("linux-modules-{version}-cloud-amd64");
        let split = ["linux-binary-{}-cloud-amd64", "linux-binary-unsigned-{}-cloud-amd64"];
        let whole = ["linux-image-{}-cloud-amd64", "linux-image-{}-cloud-amd64-unsigned"];
        let image =
            |patterns: [&str; 2]| patterns.map(|text| text.replace("{}", version)).into_iter().find(has);
        match has(&modules) {
            true => image(split).map(|image| vec![image, modules]),
            false => image(whole).map(|image| vec![image]),
        }
    })
}

/// The version in a kernel package's name: `linux-image-6.12.57+deb13-cloud-amd64` → `6.12.57+deb13`.
fn package_version(name: &str) -> Option<&str> {
    let name = name.strip_suffix("-unsigned").unwrap_or(name).strip_suffix("-cloud-amd64")?;
    let prefixes = ["linux-image-", "linux-binary-unsigned-", "linux-binary-", "linux-modules-"];
    let version = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix))?;
    version.starts_with(|first: char| first.is_ascii_digit()).then_some(version)
}

/// Every number in a version, for comparing.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// `6.1.176` of the package version `6.1.176-1~bpo12+1`.
pub fn upstream_version(package_version: &str) -> &str {
    let without_epoch = package_version.split_once(':').map_or(package_version, |(_, rest)| rest);
    without_epoch.split(['-', '~', '+']).next().unwrap_or_default()
}

fn find_image(dir: &Path) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = find_image(&entry.path())? {
                return Ok(Some(found));
            }
        } else if entry.file_name().to_string_lossy().starts_with("vmlinuz") {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// The version a bzImage carries in its setup header (Documentation/arch/x86/boot.rst): the offset of a
/// string less 0x200, at 0x20e.
fn image_version(image: &[u8]) -> Option<String> {
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let offset = u16::from_le_bytes([*image.get(0x20e)?, *image.get(0x20f)?]);
    let text = image.get(usize::from(offset) + 0x200..)?.split(|byte| *byte == 0 || *byte == b' ').next()?;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn the_newest_whole_kernel_of_a_series_is_chosen() {
        let offered = names(&[
            "linux-image-6.12.95+deb12-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64",
            "linux-image-6.12.107+deb13-cloud-amd64-unsigned",
            "linux-image-6.12.200+deb13-cloud-amd64-dbg",
            "linux-image-6.1.0-50-cloud-amd64",
            "linux-image-cloud-amd64",
        ]);
        assert_eq!(choose(&offered, "6.12.").unwrap(), ["linux-image-6.12.107+deb13-cloud-amd64"]);
        assert_eq!(choose(&offered, "6.1.").unwrap(), ["linux-image-6.1.0-50-cloud-amd64"]);
        assert_eq!(choose(&offered, "5.10."), None);
    }

    #[test]
    fn a_split_kernel_brings_its_modules_and_one_without_image_is_passed_over() {
        let offered = names(&[
            "linux-image-7.3.4+deb13-cloud-amd64-dbg",
            "linux-binary-unsigned-7.3.4+deb13-cloud-amd64",
            "linux-modules-7.3.4+deb13-cloud-amd64",
            "linux-modules-7.4.1+deb14-cloud-amd64",
        ]);
        let expected =
            ["linux-binary-unsigned-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"];
        assert_eq!(choose(&offered, "").unwrap(), expected);
    }

    #[test]
    fn an_unsigned_image_serves_where_there_is_no_signed_one() {
        let offered = names(&["linux-image-6.12.9-cloud-amd64-unsigned"]);
        assert_eq!(choose(&offered, "6.12.").unwrap(), offered);
    }

    #[test]
    fn versions_lose_what_the_distribution_adds() {
        assert_eq!(upstream_version("6.1.176-1"), "6.1.176");
        assert_eq!(upstream_version("1:7.3.4-1~bpo13+1"), "7.3.4");
    }

    #[test]
    fn the_version_of_an_image_is_read_and_other_files_have_none() {
        let mut image = vec![0u8; 0x400];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
        image[0x300..0x30c].copy_from_slice(b"6.12.57 (me)");
        assert_eq!(image_version(&image).as_deref(), Some("6.12.57"));
        assert_eq!(image_version(&image[..0x204]), None);
        assert_eq!(image_version(&vec![0u8; 0x400]), None);
    }
}
