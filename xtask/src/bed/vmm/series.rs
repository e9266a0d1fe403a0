//! Applies a series of patches to a source tree, and exchanges it for another.
//!
//! A file that comes out as it was keeps its time, so that a build sees only what an edit of the patches changed. A
//! series applies as a whole or the tree is given up by the caller; it must never be left half patched unseen.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use super::super::process;

/// The patches in `dir`, in the order of their names, in one text.
pub fn read(dir: &Path) -> Result<String> {
    let listed = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    let mut files: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    files.sort();
    let texts = files.iter().map(fs::read_to_string).collect::<Result<Vec<_>, _>>()?;
    Ok(texts.concat())
}

/// Takes the patches `old` out of `tree` and puts `new` in. An empty series is no series.
pub fn exchange(tree: &Path, old: &str, new: &str) -> Result<()> {
    let mut touched = paths(old);
    touched.extend(paths(new));
    let before = snapshot(tree, &touched);
    patch(tree, old, &["--reverse"])?;
    patch(tree, new, &[])?;
    restore_times(tree, &before)
}

fn patch(tree: &Path, series: &str, options: &[&str]) -> Result<()> {
    // One by one, backwards when they are taken out: a later one may build on an earlier one.
    let mut patches = split(series);
    if options.contains(&"--reverse") {
        patches.reverse();
    }
    for text in patches {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), text)?;
        let mut command = Command::new("patch");
        // No fuzz: a patch that fits only about is for another source.
        command.args([
            "--strip=1",
            "--batch",
            "--silent",
            "--fuzz=0",
            "--reject-file=-",
            "--no-backup-if-mismatch",
        ]);
        command.args(options).arg("--input").arg(file.path()).arg("--directory").arg(tree);
        process::capture(&mut command)?.or_fail().context("a patch does not apply")?;
    }
    Ok(())
}

/// The patches of a series, each as git writes it.
fn split(series: &str) -> Vec<String> {
    let mut patches: Vec<String> = Vec::new();
    for line in series.split_inclusive('\n') {
        if is_head(line) || patches.is_empty() {
            patches.push(String::new());
        }
        if let Some(last) = patches.last_mut() {
            last.push_str(line);
        }
    }
    patches
}

/// The line that git begins a patch with: `From`, a commit, a date that is always the same.
fn is_head(line: &str) -> bool {
    line.starts_with("From ") && line.trim_end().ends_with("Mon Sep 17 00:00:00 2001")
}

/// The files that a series touches.
fn paths(series: &str) -> Vec<String> {
    let names = series.lines().filter_map(|line| line.strip_prefix("--- a/").or(line.strip_prefix("+++ b/")));
    names.map(|name| name.trim_end().to_string()).collect()
}

type Snapshot = BTreeMap<String, (Vec<u8>, SystemTime)>;

fn snapshot(tree: &Path, names: &[String]) -> Snapshot {
    let look = |name: &String| {
        let path = tree.join(name);
        let time = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
        Some((name.clone(), (fs::read(path).ok()?, time)))
    };
    names.iter().filter_map(look).collect()
}

fn restore_times(tree: &Path, before: &Snapshot) -> Result<()> {
    for (name, (content, time)) in before {
        let path = tree.join(name);
        if fs::read(&path).is_ok_and(|now| now == *content) {
            File::options().write(true).open(&path)?.set_modified(*time)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const HEAD: &str = "From 0123 Mon Sep 17 00:00:00 2001\n";

    fn change(file: &str, from: &str, to: &str) -> String {
        format!("{HEAD}--- a/{file}\n+++ b/{file}\n@@ -1 +1 @@\n-{from}\n+{to}\n")
    }

    #[test]
    fn a_series_is_exchanged_and_what_stays_the_same_keeps_its_time() {
        let tree = tempfile::tempdir().unwrap();
        let (a, b) = (tree.path().join("a.c"), tree.path().join("b.c"));
        fs::write(&a, "one\n").unwrap();
        fs::write(&b, "one\n").unwrap();
        let old = change("a.c", "one", "two") + &change("a.c", "two", "three") + &change("b.c", "one", "two");
        exchange(tree.path(), "", &old).unwrap();
        assert_eq!(fs::read_to_string(&a).unwrap(), "three\n");

        let past = SystemTime::now() - Duration::from_secs(3600);
        for path in [&a, &b] {
            File::options().write(true).open(path).unwrap().set_modified(past).unwrap();
        }
        let new = change("a.c", "one", "three") + &change("b.c", "one", "four");
        exchange(tree.path(), &old, &new).unwrap();
        assert_eq!(fs::read_to_string(&b).unwrap(), "four\n");
        let age = |path: &Path| fs::metadata(path).unwrap().modified().unwrap().elapsed().unwrap();
        assert!(age(&a) > Duration::from_secs(3000) && age(&b) < Duration::from_secs(3000));
    }

    #[test]
    fn a_patch_for_another_source_is_refused() {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("a.c"), "other\n").unwrap();
        let error = exchange(tree.path(), "", &change("a.c", "one", "two")).unwrap_err();
        assert!(error.to_string().contains("does not apply"), "{error:#}");
    }
}
