//! Keeps what was fetched or built, outside the project, so that a fresh clone starts warm.
//!
//! An entry is a directory that appears whole, by rename, or not at all, and whose contents are checked against
//! its manifest before every use. One lock lets only one process at a time look at the cache or fill it. It must
//! never hand out an entry that does not match its manifest or was made by another recipe.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::process;

const MANIFEST: &str = "SHA256SUMS";
const RECIPE: &str = "recipe";
const UNFINISHED: &str = ".unfinished-";

/// The cache.
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache of the user who runs this.
    pub fn open() -> Result<Self> {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let Some(base) =
            absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        else {
            bail!("no place for the bed's cache: set HOME or XDG_CACHE_HOME to an absolute path");
        };
        Self::at(base.join("kvmprep"))
    }

    fn at(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root).with_context(|| format!("cannot create the cache {}", root.display()))?;
        Ok(Cache { root })
    }

    /// A directory in the cache that is not an entry: it may hold anything, and is used under the lock only.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The entry `name` if it is there, whole and of this `recipe`.
    pub fn get(&self, name: &str, recipe: &str) -> Result<Option<PathBuf>> {
        let _lock = self.lock()?;
        Ok(self.whole(name, recipe))
    }

    /// The entry `name`, which `make` fills when it is missing, damaged or of another `recipe`.
    pub fn get_or_make(
        &self,
        name: &str,
        recipe: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let _lock = self.lock()?;
        if let Some(path) = self.whole(name, recipe) {
            return Ok(path);
        }
        self.sweep()?;
        let unfinished = tempfile::Builder::new().prefix(UNFINISHED).tempdir_in(&self.root)?;
        make(unfinished.path())?;
        fs::write(unfinished.path().join(RECIPE), recipe)?;
        write_manifest(unfinished.path())?;
        let path = self.root.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::rename(unfinished.keep(), &path)?;
        Ok(path)
    }

    fn whole(&self, name: &str, recipe: &str) -> Option<PathBuf> {
        let path = self.root.join(name);
        let current = fs::read_to_string(path.join(RECIPE)).is_ok_and(|text| text == recipe);
        (current && matches_manifest(&path)).then_some(path)
    }

    /// Removes what an interrupted process left. Under the lock nobody else can be making anything.
    fn sweep(&self) -> Result<()> {
        for entry in fs::read_dir(&self.root)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    /// Held until dropped; the kernel lets go of it for a process that dies.
    fn lock(&self) -> Result<File> {
        let path = self.root.join("lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("bed: waiting for another cargo xtask to finish with {}", self.root.display());
            flock(&file, FlockOperation::LockExclusive)
                .with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(file)
    }
}

/// coreutils does the hashing: these are tens of megabytes, and this program is usually built unoptimised.
fn write_manifest(entry: &Path) -> Result<()> {
    let mut files = Vec::new();
    list_files(entry, entry, &mut files)?;
    files.sort();
    let sums =
        process::capture(Command::new("sha256sum").arg("--").args(&files).current_dir(entry))?.or_fail()?;
    Ok(fs::write(entry.join(MANIFEST), sums.stdout)?)
}

fn matches_manifest(entry: &Path) -> bool {
    let mut command = Command::new("sha256sum");
    command.args(["--check", "--strict", "--status", MANIFEST]).current_dir(entry);
    process::capture(&mut command).is_ok_and(|checked| checked.success)
}

/// Regular files under `dir`, as paths relative to `base`.
fn list_files(base: &Path, dir: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list_files(base, &entry.path(), into)?;
        } else {
            into.push(entry.path().strip_prefix(base)?.to_path_buf());
        }
    }
    Ok(())
}

/// How many bytes an entry takes.
pub fn size(entry: &Path) -> u64 {
    let mut files = Vec::new();
    if list_files(entry, entry, &mut files).is_err() {
        return 0;
    }
    files.iter().filter_map(|file| fs::metadata(entry.join(file)).ok()).map(|metadata| metadata.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("c")).unwrap();
        (dir, cache)
    }

    fn write(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |dir| Ok(fs::write(dir.join("file"), text)?)
    }

    #[test]
    fn a_whole_entry_is_made_once() {
        let (_dir, cache) = cache();
        let first = cache.get_or_make("e", "r1", write("one")).unwrap();
        let second = cache.get_or_make("e", "r1", |_| panic!("made again")).unwrap();
        assert_eq!(first, second);
        assert_eq!(fs::read_to_string(first.join("file")).unwrap(), "one");
    }

    #[test]
    fn a_damaged_or_outdated_entry_is_made_anew() {
        let (_dir, cache) = cache();
        let path = cache.get_or_make("e", "r1", write("one")).unwrap();
        fs::write(path.join("file"), "damaged").unwrap();
        assert_eq!(cache.get("e", "r1").unwrap(), None);
        cache.get_or_make("e", "r1", write("two")).unwrap();
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "two");
        cache.get_or_make("e", "r2", write("three")).unwrap();
        assert_eq!(fs::read_to_string(path.join("file")).unwrap(), "three");
    }

    #[test]
    fn a_failure_leaves_no_entry_and_its_remains_are_swept() {
        let (_dir, cache) = cache();
        let failed = cache.get_or_make("e", "r", |dir| {
            fs::write(dir.join("half"), "")?;
            bail!("interrupted")
        });
        assert!(failed.is_err());
        assert_eq!(cache.get("e", "r").unwrap(), None);
        let remains = cache.root.join(format!("{UNFINISHED}x"));
        fs::create_dir(&remains).unwrap();
        cache.get_or_make("e", "r", write("whole")).unwrap();
        assert!(!remains.exists());
    }
}
