//! What the manual has on the software model: the names that its page must tell of, and the page's example.
//!
//! The model's header is written by hand and is its own reference, so no prototype is compared here.

use super::header;
use super::page::Page;
use crate::programs;
use crate::project;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;

/// The page.
pub const PAGE: &str = "kvmprep_model(7)";

/// What of the header is there for the compiler alone.
const INTERNAL: [&str; 2] = ["KVMPREP_MODEL_H", "KVMPREP_MODEL_WEAK"];

/// Functions, types, constants and environment variables: all names in the header, its comments included, which may also tell of
/// several by how they begin.
pub fn names() -> Result<BTreeSet<String>> {
    let file = programs::model_headers().join("kvmprep-model.h");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let names: BTreeSet<String> = header::names(&text)
        .map(|(name, _)| name.to_owned())
        .filter(|name| !name.ends_with('_') && !INTERNAL.contains(&name.as_str()))
        .collect();
    ensure!(
        names.contains("kvmprep_model_set_steps") && names.contains("KVMPREP_MODEL_KERNEL"),
        "the model's header has {names:?}: the check is broken"
    );
    Ok(names)
}

/// The page's program, and what it says that this prints.
pub fn example() -> Result<(String, String)> {
    let pages = Page::all(&project::root().join("man"))?;
    let page = pages.iter().find(|page| page.title() == PAGE).with_context(|| format!("no {PAGE}"))?;
    let lines = page.section("EXAMPLES");
    let code = Page::code(lines).into_iter().next().context("no example")?;
    let after = lines.iter().skip_while(|line| line.request != "EE");
    let printed =
        after.skip_while(|line| line.request != "nf").skip(1).take_while(|line| line.request != "fi");
    let printed = printed.map(|line| format!("{}\n", line.text)).collect::<String>();
    ensure!(!printed.is_empty(), "{PAGE} does not say what its example prints");
    Ok((code, printed))
}
