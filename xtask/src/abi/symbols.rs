//! What the shared library exports: the header's functions, each with its version, and nothing else.

use super::{SONAME, header, text};
use crate::project;
use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// Fails when the library exports anything but the header's functions, or not all of them, or not by the versions
/// that abi/kvmprep.map gives them.
pub fn check(library: &Path) -> Result<()> {
    let header = std::fs::read_to_string(header::path()).context("cannot read the header")?;
    let map = std::fs::read_to_string(map_path()).context("cannot read abi/kvmprep.map")?;
    let (declared, exported) = (text::declared_functions(&header), exported(library)?);
    ensure!(!declared.is_empty(), "no function found in the header: the check is broken");
    let names: BTreeSet<String> = exported.keys().cloned().collect();
    same(&declared, &names, "declared but not exported", "exported but not declared")
        .with_context(|| library.display().to_string())?;
    check_map(&header, &map)?;
    let versions = mapped(&map);
    for (name, version) in &exported {
        let expected = versions.get(name).map(String::as_str).unwrap_or_default();
        ensure!(
            version == &format!("@@{expected}"),
            "{}: {name}{version}, and abi/kvmprep.map says {name}@@{expected}",
            library.display()
        );
    }
    Ok(())
}

/// Fails when the list of versions is not about the header's functions.
pub fn check_map(header: &str, map: &str) -> Result<()> {
    let listed = mapped(map).into_keys().collect();
    same(&text::declared_functions(header), &listed, "declared but not listed", "listed but not declared")
        .context("abi/kvmprep.map")
}

/// Fails when programs linked against the library would not ask for its ABI.
pub fn check_soname(library: &Path) -> Result<()> {
    let dynamic = project::run(Command::new("readelf").args(["--dynamic", "--wide"]).arg(library))?;
    let soname = format!("Library soname: [{SONAME}]");
    ensure!(dynamic.contains(&soname), "{}: no {soname}", library.display());
    Ok(())
}

pub fn map_path() -> std::path::PathBuf {
    project::root().join("abi/kvmprep.map")
}

fn same(left: &BTreeSet<String>, right: &BTreeSet<String>, only_left: &str, only_right: &str) -> Result<()> {
    let (missing, extra): (Vec<_>, Vec<_>) =
        (left.difference(right).collect(), right.difference(left).collect());
    ensure!(missing.is_empty() && extra.is_empty(), "{only_left} {missing:?}, {only_right} {extra:?}");
    Ok(())
}

/// Each exported symbol with what follows its name: `@@VERSION`, or nothing.
fn exported(library: &Path) -> Result<BTreeMap<String, String>> {
    let text = project::run(
        Command::new("nm").args(["--dynamic", "--defined-only", "--format=posix"]).arg(library),
    )?;
    // The versions themselves are absolute.
    let symbols = text.lines().filter(|line| !line.contains(" A ")).filter_map(|line| line.split(' ').next());
    let split = |symbol: &str| {
        let (name, version) = symbol.split_at(symbol.find('@').unwrap_or(symbol.len()));
        (name.to_owned(), version.to_owned())
    };
    Ok(symbols.map(split).collect())
}

/// Each listed function with its version.
pub fn mapped(map: &str) -> BTreeMap<String, String> {
    let (mut node, mut found) = (String::new(), BTreeMap::new());
    for line in map.lines().map(str::trim) {
        if let Some(name) = line.strip_suffix('{') {
            node = name.trim().to_owned();
        } else if let Some(name) = line.strip_suffix(';').filter(|name| name.starts_with("kvmprep_")) {
            found.insert(name.to_owned(), node.clone());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str =
        "/* x */\nA_1 {\nglobal:\n    kvmprep_a;\nlocal:\n    *;\n};\nA_2 {\n    kvmprep_b;\n} A_1;\n";

    #[test]
    fn each_function_has_the_version_of_its_node() {
        let expected = [("kvmprep_a", "A_1"), ("kvmprep_b", "A_2")];
        assert!(mapped(MAP).iter().map(|(name, node)| (name.as_str(), node.as_str())).eq(expected));
    }

    #[test]
    fn a_list_that_is_not_the_headers_is_refused() {
        let (both, one) =
            ("int kvmprep_a(void);\nint kvmprep_b(void);\n", "int kvmprep_a(void);\nint kvmprep_c(void);\n");
        assert!(check_map(both, MAP).is_ok());
        let said = format!("{:#}", check_map(one, MAP).unwrap_err());
        assert!(
            said.contains("listed [\"kvmprep_c\"]") && said.contains("declared [\"kvmprep_b\"]"),
            "{said}"
        );
    }
}
