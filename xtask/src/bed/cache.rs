//! Keeps what was fetched or built, outside the project, so that a fresh clone starts warm.
//!
//! An entry is a directory that appears whole, by rename, or not at all, and whose contents are checked
//! against its manifest before every use. Each entry has a lock, so that one process at a time looks at it or
//! makes it, and nobody waits for an entry that is not his. It must never hand out an entry that does not
//! match its manifest or was made by another recipe.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::{process, progress};

const MANIFEST: &str = "SHA256SUMS";
const RECIPE: &str = "recipe";
const UNFINISHED: &str = "unfinished-";

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

    /// A directory that is not an entry and may hold anything, for as long as the lock is kept.
    pub fn scratch(&self, name: &str) -> Result<(PathBuf, Lock)> {
        let lock = self.lock(name)?;
        let path = self.root.join(name);
        fs::create_dir_all(&path)?;
        Ok((path, lock))
    }

    /// The entry `name` if it is there, whole and of this `recipe`.
    pub fn get(&self, name: &str, recipe: &str) -> Result<Option<PathBuf>> {
        let _lock = self.lock(name)?;
        Ok(self.whole(name, recipe))
    }

    /// The entry `name`, which `make` fills when it is missing, damaged or of another `recipe`.
    pub fn get_or_make(
        &self,
        name: &str,
        recipe: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let _lock = self.lock(name)?;
        if let Some(path) = self.whole(name, recipe) {
            return Ok(path);
        }
        let unfinished = self.root.join(format!("{UNFINISHED}{name}"));
        // Left by a process that was interrupted: under the lock nobody else can be making this.
        remove(&unfinished)?;
        fs::create_dir(&unfinished)?;
        if let Err(error) = make(&unfinished).and_then(|()| seal(&unfinished, recipe)) {
            remove(&unfinished)?;
            return Err(error);
        }
        let path = self.root.join(name);
        remove(&path)?;
        fs::rename(&unfinished, &path)?;
        Ok(path)
    }

    fn whole(&self, name: &str, recipe: &str) -> Option<PathBuf> {
        let path = self.root.join(name);
        let current = fs::read_to_string(path.join(RECIPE)).is_ok_and(|text| text == recipe);
        (current && matches_manifest(&path)).then_some(path)
    }

    fn lock(&self, name: &str) -> Result<Lock> {
        let path = self.root.join(format!("{name}.lock"));
        let file = File::options().create(true).truncate(false).write(true).open(&path)?;
        // Checking an entry takes a moment; only making one is worth a word.
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut held = false;
        while !held && Instant::now() < deadline {
            held = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
            if !held {
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        if !held {
            progress::say(&format!("waiting for another cargo xtask to finish with {name}"));
            flock(&file, FlockOperation::LockExclusive)
                .with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Ok(Lock { _file: file })
    }
}

/// Held until dropped; the kernel lets go of it for a process that dies.
pub struct Lock {
    _file: File,
}

fn remove(dir: &Path) -> Result<()> {
    match dir.exists() {
        true => fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display())),
        false => Ok(()),
    }
}

/// Makes a finished directory an entry.
fn seal(entry: &Path, recipe: &str) -> Result<()> {
    fs::write(entry.join(RECIPE), recipe)?;
    write_manifest(entry)
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
    fn a_lock_is_one_entrys_only() {
        let (_dir, cache) = cache();
        cache.get_or_make("a", "r", |_| cache.get_or_make("b", "r", write("b")).map(drop)).unwrap();
        let (_path, held) = cache.scratch("s").unwrap();
        let taken = |name: &str| {
            let file = File::open(cache.root.join(name)).unwrap();
            flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
        };
        assert!(taken("s.lock") && !taken("a.lock"));
        drop(held);
        assert!(!taken("s.lock"));
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
        let remains = cache.root.join(format!("{UNFINISHED}e"));
        fs::create_dir(&remains).unwrap();
        fs::write(remains.join("file of an earlier try"), "").unwrap();
        let path = cache.get_or_make("e", "r", write("whole")).unwrap();
        assert!(!path.join("file of an earlier try").exists());
        assert!(!remains.exists());
    }
}
