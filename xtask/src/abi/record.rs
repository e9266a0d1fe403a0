//! The recorded interfaces, and what the current one may be beside them.
//!
//! abi/SONAME/VERSION/ holds the header and the symbol versions of each version, as they were. Programs that were
//! built with any of them run with the current library, so none of them may lose anything; and the record of the
//! current version must be the current files to the letter, comments included, so that nothing changes unseen. A
//! record is never edited by hand.

use super::text::{self, Growth};
use super::view::{self, Interface};
use super::{SONAME, header, promise, symbols};
use crate::project;
use anyhow::{Context, Result, bail, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// A version's interface as it was recorded.
pub struct Recorded {
    pub version: String,
    pub interface: Interface,
}

/// What is different in a newer interface, in words.
#[derive(Debug, Default)]
struct Changes {
    incompatible: Vec<String>,
    compatible: Vec<String>,
}

/// The interface as the sources have it now, as far as it is promised to stay.
pub fn current() -> Result<Interface> {
    let Interface { header, map } = files()?;
    Ok(Interface { header: promise::header(&header), map: promise::map(&map) })
}

/// All that is shipped: what is promised, and what is not.
pub fn whole() -> Result<Interface> {
    let Interface { header, map } = files()?;
    Ok(Interface { header: promise::opened(&header), map })
}

fn files() -> Result<Interface> {
    let read = |path: PathBuf| {
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    Ok(Interface { header: read(header::path())?, map: read(symbols::map_path())? })
}

/// Every recorded version with the current soname, the oldest first.
pub fn recorded() -> Result<Vec<Recorded>> {
    let directory = directory();
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for entry in std::fs::read_dir(&directory)? {
        let entry = entry?;
        let read = |name: &str| {
            let file = entry.path().join(name);
            std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
        };
        let interface = Interface { header: read("kvmprep.h")?, map: read("kvmprep.map")? };
        all.push(Recorded { version: entry.file_name().to_string_lossy().into_owned(), interface });
    }
    all.sort_by_key(|recorded| numbers(&recorded.version));
    Ok(all)
}

/// Fails when the current interface is not the recorded one.
pub fn check() -> Result<()> {
    let (all, current, version) = (recorded()?, current()?, project::version()?);
    symbols::check_map(&current.header, &current.map)?;
    check_programs(&all, &current, &version)?;
    let own = all.iter().find(|recorded| recorded.version == version);
    let own = own.with_context(|| {
        format!("{SONAME} {version} has no record: run `cargo xtask abi record` and commit abi/")
    })?;
    check_letters(own, &current)
}

/// Makes the current interface the record of its version, unless programs would break.
pub fn record() -> Result<()> {
    let (all, current, version) = (recorded()?, current()?, project::version()?);
    header::check()?;
    symbols::check_map(&current.header, &current.map)?;
    check_programs(&all, &current, &version)?;
    if let Some(newest) = all.last() {
        ensure!(
            numbers(&newest.version) <= numbers(&version),
            "{} is recorded, and Cargo.toml says {version}: a record of the past is not changed",
            newest.version
        );
    }
    let directory = directory().join(&version);
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("kvmprep.h"), &current.header)?;
    std::fs::write(directory.join("kvmprep.map"), &current.map)?;
    println!("recorded as {SONAME} {version}: commit abi/");
    Ok(())
}

/// Fails when a program that was built with any recorded version would break, or start with a library too old for it.
fn check_programs(all: &[Recorded], current: &Interface, version: &str) -> Result<()> {
    for older in all {
        compare(&older.interface, current)?.refuse_incompatible(&older.version)?;
        if older.version != version {
            check_nodes(older, current)?;
        }
    }
    Ok(())
}

/// Fails when a node that an earlier version had has got another function: a program that uses it would start with a
/// library of that version and die at the call, and its package would ask for no newer one.
fn check_nodes(older: &Recorded, current: &Interface) -> Result<()> {
    let (before, now) = (symbols::mapped(&older.interface.map), symbols::mapped(&current.map));
    let nodes: BTreeSet<&String> = before.values().collect();
    let is_late = |(name, node): &(&String, &String)| !before.contains_key(*name) && nodes.contains(node);
    let late: Vec<String> =
        now.iter().filter(is_late).map(|(name, node)| format!("{name} in {node}")).collect();
    ensure!(
        late.is_empty(),
        "abi/kvmprep.map has {}, and {} had that node without it: put it into the node of the release to come",
        late.join(", "),
        older.version
    );
    Ok(())
}

/// Fails when header or map are not the recorded ones, comments included: a record is what a version's users were told.
fn check_letters(recorded: &Recorded, current: &Interface) -> Result<()> {
    if recorded.interface == *current {
        return Ok(());
    }
    let added = compare(&recorded.interface, current)?.compatible;
    let what = if added.is_empty() { "only words differ".to_owned() } else { added.join("\n") };
    bail!(
        "what include/kvmprep.h or abi/kvmprep.map promises is not what is recorded as {}: run `cargo xtask abi record` and commit \
         abi/\n{what}",
        recorded.version
    )
}

impl Changes {
    fn refuse_incompatible(&self, version: &str) -> Result<()> {
        if self.incompatible.is_empty() {
            return Ok(());
        }
        bail!(
            "programs built with kvmprep {version} would break:\n{}\n\
             Take the change back. If it must be, the library needs a new soname, in xtask/src/abi.rs, build.rs and \
             CMakeLists.txt alike, and every program must be built anew. (A version that nobody has got yet may be \
             taken back: delete its directory in abi/{SONAME}.)",
            self.incompatible.join("\n")
        )
    }
}

/// What programs built with `old` find in `new`.
fn compare(old: &Interface, new: &Interface) -> Result<Changes> {
    let work = tempfile::tempdir_in(project::output()?)?;
    let dir = |name: &str| work.path().join(name);
    let mut changes = Changes::default();
    compare_types(old, new, &dir, &mut changes)?;
    compare_values(&old.values(&dir("old"))?, &new.values(&dir("new"))?, &old.header, &mut changes);
    Ok(changes)
}

/// Functions and types. A struct that may grow is compared as far as the older header knows it: what is appended is
/// a compatible change, and so is a use for what was reserved; every other change is seen.
fn compare_types(
    old: &Interface,
    new: &Interface,
    dir: &impl Fn(&str) -> PathBuf,
    changes: &mut Changes,
) -> Result<()> {
    let (before, after) = (old.library(&dir("old"))?, new.library(&dir("new"))?);
    let Some(whole) = view::difference(&before, &after, &[])? else { return Ok(()) };
    let known = as_far_as_known(old, new).library(&dir("known"))?;
    match view::difference(&before, &known, &["--no-added-syms"])? {
        Some(broken) => changes.incompatible.push(broken),
        None => changes.compatible.push(whole),
    }
    Ok(())
}

/// `new` without the fields that it has appended to structs that `old` says may grow, and with what `old` has reserved
/// under that name again.
fn as_far_as_known(old: &Interface, new: &Interface) -> Interface {
    let mut header = new.header.clone();
    for name in text::structs(&old.header) {
        for (n, field) in text::fields(&old.header, name).into_iter().enumerate() {
            let now = text::fields(&header, name).get(n).copied().unwrap_or_default();
            if is_put_to_use(field, now) {
                header = text::redeclared(&header, name, n, field);
            }
        }
        let fields = text::fields(&old.header, name).len();
        if text::growth(&old.header, name).is_some() && text::fields(&header, name).len() > fields {
            header = text::shortened(&header, name, fields);
        }
    }
    Interface { header, map: new.map.clone() }
}

/// Whether a field was reserved, and is now of the same type with a name that says what for: callers left it zero, or did
/// not look at it.
fn is_put_to_use(before: &str, now: &str) -> bool {
    let parts = |field: &str| {
        let (kind, name) = field.trim().trim_end_matches(';').rsplit_once(' ')?;
        let (name, length) = name.split_at(name.find('[').unwrap_or(name.len()));
        Some((kind.to_owned(), name.to_owned(), length.to_owned()))
    };
    let (Some(before), Some(now)) = (parts(before), parts(now)) else { return false };
    before.1.starts_with("reserved") && (before.0, before.2) == (now.0, now.2)
}

fn compare_values(
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
    old_header: &str,
    changes: &mut Changes,
) {
    let inputs: BTreeSet<String> = text::initialisers(old_header)
        .into_iter()
        .filter(|(_, structure)| text::growth(old_header, structure) == Some(Growth::Input))
        .map(|(name, _)| name)
        .collect();
    for (name, before) in old {
        match new.get(name) {
            None => changes.incompatible.push(format!("{name} is gone (it was {before})")),
            Some(after) if after == before => {}
            Some(after) if inputs.contains(name) && has_only_grown(before, after) => {
                changes.compatible.push(format!("{name} has grown: {before} to {after}"));
            }
            Some(after) => changes.incompatible.push(format!("{name} was {before} and is {after}")),
        }
    }
    for (name, value) in new.iter().filter(|(name, _)| !old.contains_key(*name)) {
        changes.compatible.push(format!("{name} is new: {value}"));
    }
}

/// Whether an initialiser's bytes go on where they ended; the first four are the struct's size.
fn has_only_grown(before: &str, after: &str) -> bool {
    let size = |bytes: &str| bytes.split_at_checked(8).map(|(_, rest)| rest.to_owned());
    matches!((size(before), size(after)), (Some(before), Some(after)) if after.starts_with(&before))
}

fn directory() -> PathBuf {
    project::root().join("abi").join(SONAME)
}

fn numbers(version: &str) -> Vec<u32> {
    version.split('.').filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An interface with one struct that may grow and one that may not.
    fn interface(fixed: &str, growing: &str, constant: &str) -> Interface {
        let header = format!(
            "#include <stdint.h>\n#include <stddef.h>\n#define KVMPREP_C {constant}\n\
             #define KVMPREP_IN_INIT {{ sizeof(struct kvmprep_in), 7 }}\n\
             struct kvmprep_fixed {{\n{fixed}}};\nstruct kvmprep_in {{\n  uint32_t struct_size;\n{growing}}};\n\
             int kvmprep_a(struct kvmprep_fixed *fixed, const struct kvmprep_in *in);\n"
        );
        let map = "K_1 {\nglobal:\n    kvmprep_a;\nlocal:\n    *;\n};\n".to_owned();
        Interface { header, map }
    }

    const FIXED: &str = "  uint32_t a;\n  uint32_t b;\n";
    const GROWING: &str = "  uint32_t c;\n";

    /// Whether a change is seen as compatible; `None` when it is not seen.
    fn verdict(fixed: &str, growing: &str, constant: &str) -> Option<bool> {
        verdict_of(&interface(FIXED, GROWING, "1"), &interface(fixed, growing, constant))
    }

    fn verdict_of(old: &Interface, new: &Interface) -> Option<bool> {
        crate::setup::require_packages(super::super::PACKAGES).unwrap();
        let changes = compare(old, new).unwrap();
        (!changes.incompatible.is_empty() || !changes.compatible.is_empty())
            .then_some(changes.incompatible.is_empty())
    }

    #[test]
    fn what_is_the_same_is_no_change() {
        assert_eq!(verdict(FIXED, GROWING, "1"), None);
    }

    #[test]
    fn only_a_struct_that_may_grow_may_grow_and_only_at_its_end() {
        assert_eq!(verdict(FIXED, "  uint32_t c;\n  uint32_t d;\n", "1"), Some(true));
        assert_eq!(verdict(FIXED, "  uint32_t d;\n  uint32_t c;\n", "1"), Some(false));
        assert_eq!(verdict(FIXED, "  uint64_t c;\n  uint32_t d;\n", "1"), Some(false));
        assert_eq!(verdict("  uint32_t a;\n  uint32_t b;\n  uint32_t c;\n", GROWING, "1"), Some(false));
        assert_eq!(verdict("  uint32_t a;\n", GROWING, "1"), Some(false));
    }

    #[test]
    fn what_was_reserved_may_be_put_to_use_as_it_is() {
        let of = |fixed: &str| interface(fixed, GROWING, "1");
        let was = of("  uint32_t a;\n  uint32_t reserved;\n  uint64_t reserved1[2];\n");
        let verdict = |fixed: &str| verdict_of(&was, &of(fixed));
        assert_eq!(verdict("  uint32_t a;\n  uint32_t used;\n  uint64_t reserved1[2];\n"), Some(true));
        assert_eq!(verdict("  uint32_t a;\n  uint32_t reserved;\n  uint64_t used[2];\n"), Some(true));
        assert_eq!(verdict("  uint32_t a;\n  int32_t used;\n  uint64_t reserved1[2];\n"), Some(false));
        assert_eq!(verdict("  uint32_t a;\n  uint32_t used;\n  uint64_t reserved1[1];\n"), Some(false));
        assert_eq!(
            verdict("  uint32_t other;\n  uint32_t reserved;\n  uint64_t reserved1[2];\n"),
            Some(false)
        );
        let back = of("  uint32_t a;\n  uint32_t used;\n  uint64_t reserved1[2];\n");
        assert_eq!(verdict_of(&back, &was), Some(false));
    }

    #[test]
    fn appended_fields_must_not_raise_the_alignment_that_older_programs_gave_the_struct() {
        assert_eq!(verdict(FIXED, "  uint32_t c;\n  uint64_t d;\n", "1"), Some(false));
    }

    #[test]
    fn fields_of_one_type_that_change_places_are_seen() {
        assert_eq!(verdict("  uint32_t b;\n  uint32_t a;\n", GROWING, "1"), Some(false));
        assert_eq!(verdict("  uint32_t a;\n  uint32_t renamed;\n", GROWING, "1"), Some(false));
    }

    #[test]
    fn a_constant_keeps_its_value_and_its_type() {
        assert_eq!(verdict(FIXED, GROWING, "2"), Some(false));
        assert_eq!(verdict(FIXED, GROWING, "1u"), Some(false));
        assert_eq!(verdict(FIXED, GROWING, "(2 - 1)"), None);
        assert_eq!(verdict(FIXED, GROWING, "1\n#define KVMPREP_D 2"), Some(true));
    }

    /// What is said of a version 1 with `kvmprep_a` in node K_1, when a later one adds `kvmprep_b` in `node`.
    fn nodes(node: &str) -> Result<()> {
        let with = |map: String| Interface { header: String::new(), map };
        let first = "K_1 {\nglobal:\n    kvmprep_a;\n};\n".to_owned();
        let now = match node {
            "K_1" => first.replace("kvmprep_a;", "kvmprep_a;\n    kvmprep_b;"),
            node => format!("{first}{node} {{\nglobal:\n    kvmprep_b;\n}} K_1;\n"),
        };
        check_nodes(&Recorded { version: "1".into(), interface: with(first) }, &with(now))
    }

    #[test]
    fn a_node_of_an_earlier_version_gets_no_function() {
        assert!(nodes("K_2").is_ok());
        let said = nodes("K_1").unwrap_err().to_string();
        assert!(said.contains("kvmprep_b in K_1") && !said.contains("kvmprep_a"), "{said}");
    }

    #[test]
    fn a_record_is_the_file_to_the_letter() {
        crate::setup::require_packages(super::super::PACKAGES).unwrap();
        let recorded = Recorded { version: "1".into(), interface: interface(FIXED, GROWING, "1") };
        let said = |current: Interface| check_letters(&recorded, &current).unwrap_err().to_string();
        assert!(check_letters(&recorded, &interface(FIXED, GROWING, "1")).is_ok());
        assert!(said(interface(FIXED, GROWING, "1 /* one */")).contains("only words"));
        assert!(said(interface(FIXED, GROWING, "1\n#define KVMPREP_D 2")).contains("KVMPREP_D is new"));
    }

    #[test]
    fn an_initialiser_may_go_on_but_not_change() {
        assert!(has_only_grown("10000000ffff", "14000000ffff0000"));
        assert!(!has_only_grown("10000000ffff", "14000000fffe0000"));
        assert!(!has_only_grown("10000000ffff", "08000000"));
    }
}
