//! The project's own scenarios, those of `docs/scenarios/`, and their drawings, which stand beside them.
//!
//! A drawing is committed, so that it is seen where nothing can be run, and so it may grow old: that is what [`check`] is for.
//! It judges and never draws anew.

use super::drawing;
use crate::project;
use anyhow::{Context, Result, ensure};
use std::path::{Path, PathBuf};

/// The page that shows the drawings.
const PAGE: &str = "docs/mirror.md";

/// A scenario of the project's own.
pub struct Own {
    pub name: String,
    pub title: String,
    path: PathBuf,
}

impl Own {
    fn read(path: PathBuf) -> Result<Self> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let mut own = Own { name, title: String::new(), path };
        let text = own.text()?;
        let title = text.lines().find_map(|line| line.strip_prefix("title "));
        own.title = title.with_context(|| format!("{} has no title", own.path.display()))?.trim().into();
        Ok(own)
    }

    pub fn text(&self) -> Result<String> {
        std::fs::read_to_string(&self.path).with_context(|| format!("cannot read {}", self.path.display()))
    }

    fn drawing(&self) -> PathBuf {
        self.path.with_extension("svg")
    }

    fn draw(&self) -> Result<String> {
        let film = super::film(&self.text()?).with_context(|| format!("scenario {}", self.name))?;
        Ok(drawing::svg(&film))
    }

    /// How the page refers to its drawing.
    fn link(&self) -> String {
        format!("(scenarios/{}.svg)", self.name)
    }
}

fn directory() -> PathBuf {
    project::root().join("docs/scenarios")
}

fn files(extension: &str) -> Result<Vec<PathBuf>> {
    let directory = directory();
    let entries =
        std::fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    let mut files: Vec<PathBuf> =
        paths.into_iter().filter(|path| path.extension().is_some_and(|found| found == extension)).collect();
    files.sort();
    Ok(files)
}

/// Every scenario, by name.
pub fn all() -> Result<Vec<Own>> {
    files("txt")?.into_iter().map(Own::read).collect()
}

pub fn draw_all() -> Result<()> {
    for own in all()? {
        let path = own.drawing();
        std::fs::write(&path, own.draw()?).with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}

/// Whether each drawing is what its scenario comes to now, and the page shows each, and no other; and whether the page's own
/// example can be played.
pub fn check() -> Result<()> {
    let page =
        std::fs::read_to_string(project::root().join(PAGE)).with_context(|| format!("cannot read {PAGE}"))?;
    let all = all()?;
    ensure!(!all.is_empty(), "there are no scenarios");
    for own in &all {
        let path = own.drawing();
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        ensure!(
            committed == own.draw()?,
            "{} is not what the model comes to: `cargo xtask model draw` draws it anew",
            path.display()
        );
        ensure!(page.contains(&own.link()), "{PAGE} does not show {}", own.name);
    }
    let has_scenario = |path: &Path| all.iter().any(|own| own.drawing() == path);
    let stray = files("svg")?.into_iter().find(|path| !has_scenario(path));
    ensure!(stray.is_none(), "{} is of no scenario", stray.unwrap_or_default().display());
    super::film(&example(&page)).with_context(|| format!("the example in {PAGE}"))?;
    Ok(())
}

/// The lines of the page that are a scenario: indented, from the one on that makes a virtual machine.
fn example(page: &str) -> String {
    let lines = page.lines().skip_while(|line| !line.starts_with("    vm "));
    lines.map_while(|line| line.strip_prefix("    ")).map(|line| format!("{line}\n")).collect()
}
