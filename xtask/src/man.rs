//! The man pages, held against the header and the tools that show them.
//!
//! A page that says what the library does not do is worse than none, so whatever of a page a program can judge is
//! judged here: that each function and struct has its page, that declarations are the header's, that each errno
//! and constant is explained, that examples compile and references lead somewhere. It never writes a page.

mod header;
mod model;
mod page;

use crate::abi;
use crate::lanes::{self, Lane};
use crate::programs::{self, C_FLAGS, Programs};
use crate::project;
use crate::setup;
use anyhow::{Context, Result, bail};
use header::{Header, squeezed};
pub use model::example as model_example;
use page::{Page, WHOLE_WORDS, joined};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

/// `cargo xtask man`: the checks alone.
pub fn main() -> Result<()> {
    let started = Instant::now();
    let mut lane = Lane::new("man");
    check(&mut lane, &Programs::prepare()?);
    lanes::conclude("man.json", started, &[lane])
}

/// Adds every check of the man pages to the lane.
pub fn check(lane: &mut Lane, programs: &Programs) {
    let manual = match Manual::read() {
        Ok(manual) => manual,
        Err(error) => return lane.check("man pages, read", Err(error)),
    };
    lane.check("man pages, mandoc", manual.check_lint());
    lane.check("man pages, complete", verdict(manual.missing()));
    lane.check("man pages, known names only", verdict(manual.unknown_names()));
    lane.check("man pages, the model's", verdict(manual.missing_of_model()));
    lane.check("man pages, layout", verdict(manual.wrong_layout()));
    lane.check("man pages, versions", verdict(manual.wrong_versions()));
    lane.check("man pages, prototypes", verdict(manual.wrong_prototypes()));
    lane.check("man pages, structs", verdict(manual.wrong_structs()));
    lane.check("man pages, errors", verdict(manual.missing_errors()));
    lane.check("man pages, errnos that exist", manual.check_errnos());
    lane.check("man pages, references", verdict(manual.dead_references()));
    lane.check("man pages, examples", manual.check_examples(programs));
}

/// Complaints as an error; none as success.
fn verdict(complaints: Vec<String>) -> Result<()> {
    if complaints.is_empty() { Ok(()) } else { bail!("{}", complaints.join("\n")) }
}

/// What a function's page must have, in this order; NOTES and EXAMPLES may stand before the last.
const FUNCTION_SECTIONS: [&str; 7] =
    ["NAME", "SYNOPSIS", "DESCRIPTION", "RETURN VALUE", "ERRORS", "VERSIONS", "SEE ALSO"];

/// All pages, and what they are about.
struct Manual {
    pages: Vec<Page>,
    /// What is promised.
    header: Header,
    /// All names that there are, the model's too.
    names: BTreeSet<String>,
    /// Those of the model: what its header tells of, environment variables included.
    of_model: BTreeSet<String>,
    /// The library's, `major.minor.patch`.
    version: String,
}

impl Manual {
    fn read() -> Result<Self> {
        let text = std::fs::read_to_string(abi::header_path()).context("cannot read the header")?;
        let of_model = model::names()?;
        Ok(Self {
            pages: Page::all(&project::root().join("man"))?,
            header: Header::parse(&abi::promise::header(&text))?,
            names: Header::parse(&abi::promise::opened(&text))?
                .names()
                .cloned()
                .chain([abi::promise::MACRO.to_owned()])
                .chain(of_model.iter().cloned())
                .collect(),
            of_model,
            version: project::version()?,
        })
    }

    /// The pages that are more than a link to another.
    fn written(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter().filter(|page| page.redirect.is_none())
    }

    /// The pages that tell of many functions, and are named after none.
    fn overviews(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter().filter(|page| page.section == "7")
    }

    fn page(&self, title: &str) -> Option<&Page> {
        self.pages.iter().find(|page| page.title() == title)
    }

    /// The page that `man 3 NAME` shows.
    fn shown(&self, name: &str) -> Option<&Page> {
        let page = self.page(&format!("{name}(3)"))?;
        let Some(target) = &page.redirect else { return Some(page) };
        self.written().find(|page| *target == format!("man{}/{}.{}", page.section, page.name, page.section))
    }

    fn check_lint(&self) -> Result<()> {
        setup::require_packages(&["mandoc"])?;
        let mut command = Command::new("mandoc");
        command.args(["-T", "lint", "-W", "style"]).args(self.written().map(|page| &page.path));
        let output = command.output().context("cannot start mandoc")?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        // A title is the function's name, and C has small letters.
        let is_complaint = |line: &&str| !line.contains("STYLE: lower case character in document title");
        verdict(said.lines().filter(is_complaint).map(str::to_owned).collect())
    }

    /// Functions, types and constants of the header that no page is about or tells of.
    fn missing(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for name in self.header.functions.keys().chain(&self.header.types) {
            match self.shown(name) {
                None => complaints.push(format!("no page for {name}")),
                Some(page) if !names_of(page).contains(&name.as_str()) => {
                    complaints.push(format!("{}: NAME does not name {name}", page.title()));
                }
                Some(_) => {}
            }
        }
        let texts: Vec<String> = self.written().map(Page::text).collect();
        let told: BTreeSet<&str> =
            texts.iter().flat_map(|text| header::names(text)).map(|(name, _)| name).collect();
        let untold = self.header.constants.iter().filter(|name| !told.contains(name.as_str()));
        complaints.extend(untold.map(|name| format!("no page tells of {name}")));
        let overview = self.page("kvmprep(7)").map(Page::text).unwrap_or_default();
        let unlisted = self.header.functions.keys().filter(|name| !overview.contains(&format!("{name}(3)")));
        complaints.extend(unlisted.map(|name| format!("kvmprep(7) does not refer to {name}(3)")));
        complaints
    }

    /// What the model's header tells of and its page does not.
    fn missing_of_model(&self) -> Vec<String> {
        let Some(page) = self.page(model::PAGE) else { return vec![format!("there is no {}", model::PAGE)] };
        let text = page.text();
        let told: BTreeSet<&str> = header::names(&text).map(|(name, _)| name).collect();
        let untold = self.of_model.iter().filter(|name| !told.contains(name.as_str()));
        untold.map(|name| format!("{} does not tell of {name}", model::PAGE)).collect()
    }

    /// Pages and words that look like the header's and are not in it.
    fn unknown_names(&self) -> Vec<String> {
        let Header { functions, types, .. } = &self.header;
        let of_functions = self.pages.iter().filter(|page| page.section == "3");
        let strays = of_functions
            .filter(|page| !functions.contains_key(&page.name) && !types.contains(&page.name))
            .map(|page| format!("{}: the header has no such function or type", page.title()));
        let mut complaints: Vec<String> = strays.collect();
        for page in self.written() {
            for (name, after) in header::names(&page.text()) {
                let is_known = if after.starts_with('*') {
                    self.names.iter().any(|known| known.starts_with(name))
                } else {
                    self.names.contains(name) || self.overviews().any(|page| page.name == name)
                };
                if !is_known {
                    complaints.push(format!("{}: the header has no {name}", page.title()));
                }
            }
        }
        complaints
    }

    fn wrong_layout(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for page in self.written() {
            complaints.extend(self.wrong_title(page));
            if !page.requests().take_while(|request| *request != "TH").any(|request| request == WHOLE_WORDS) {
                complaints.push(format!("{}: no .{WHOLE_WORDS} before the title line", page.title()));
            }
            let headings: Vec<&str> = page.headings().collect();
            if self.header.functions.contains_key(&page.name) {
                let found = headings.iter().filter(|heading| FUNCTION_SECTIONS.contains(heading));
                if !found.eq(&FUNCTION_SECTIONS) {
                    complaints.push(format!(
                        "{}: its sections are {}, and must be {}",
                        page.title(),
                        headings.join(", "),
                        FUNCTION_SECTIONS.join(", ")
                    ));
                }
                if !page.lines.iter().any(|line| line.request == "SS" && line.text == "Threads") {
                    complaints.push(format!("{}: nothing under Threads", page.title()));
                }
            }
            if headings.last() != Some(&"SEE ALSO") {
                complaints.push(format!("{}: SEE ALSO is not its last section", page.title()));
            }
        }
        complaints
    }

    /// The title line must be of this page, and of the library as it is.
    fn wrong_title(&self, page: &Page) -> Option<String> {
        let title = page.lines.iter().find(|line| line.request == "TH").map_or("", |line| &line.text);
        let rest = title.strip_prefix(&format!("{} {} ", page.name, page.section));
        let (date, release) = rest.and_then(|rest| rest.split_once(' ')).unwrap_or_default();
        let is_date = |(at, c): (usize, char)| if at == 4 || at == 7 { c == '-' } else { c.is_ascii_digit() };
        let wanted = format!("kvmprep {} kvmprep Programmer's Manual", self.version);
        let is_right = date.len() == 10 && date.char_indices().all(is_date) && release == wanted;
        (!is_right).then(|| {
            format!(
                "{}: the title line is \"{title}\", not \"{} {} DATE {wanted}\"",
                page.title(),
                page.name,
                page.section
            )
        })
    }

    fn wrong_prototypes(&self) -> Vec<String> {
        let functions = self.header.functions.iter().map(|(name, function)| (name, &function.prototype));
        let mut complaints = Vec::new();
        for (name, declaration) in functions.chain(&self.header.callbacks) {
            let Some(page) = self.shown(name) else { continue };
            let synopsis = joined(page.section("SYNOPSIS"));
            // Once, and no other beside it.
            let around: Vec<&str> = synopsis.split(declaration.as_str()).collect();
            if around.len() != 2 || around.iter().any(|text| text.contains('(')) {
                complaints.push(format!(
                    "{}: SYNOPSIS says\n  {synopsis}\nand the header\n  {declaration}",
                    page.title()
                ));
            }
        }
        complaints
    }

    /// Each struct stands in its page as in the header, with a word on each field.
    fn wrong_structs(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for (name, layout) in &self.header.structs {
            let Some(page) = self.shown(name) else { continue };
            let is_declared = |code: &String| squeezed(code) == layout.declaration;
            if !Page::code(page.section("DESCRIPTION")).iter().any(is_declared) {
                complaints.push(format!(
                    "{}: does not show struct {name} as the header has it:\n  {}",
                    page.title(),
                    layout.declaration
                ));
            }
            let told: BTreeSet<&str> = page.lines.iter().filter_map(|line| line.italic.as_deref()).collect();
            let untold = layout.fields.iter().filter(|field| !told.contains(field.as_str()));
            complaints.extend(untold.map(|field| format!("{}: nothing on {name}.{field}", page.title())));
        }
        complaints
    }

    /// Errnos that the header names for a function.
    fn missing_errors(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for (name, function) in &self.header.functions {
            let Some(page) = self.page(&format!("{name}(3)")) else { continue };
            let told = header::errnos(&joined(page.section("ERRORS")));
            let missing = function.errnos.difference(&told);
            complaints.extend(missing.map(|errno| format!("{}: ERRORS lacks {errno}", page.title())));
        }
        complaints
    }

    /// The version that each function came with, and the one that all is about.
    fn wrong_versions(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for (name, function) in &self.header.functions {
            let Some(page) = self.page(&format!("{name}(3)")) else { continue };
            let since = format!("Library: {}.0.", function.since.as_deref().unwrap_or("0.1"));
            if !joined(page.section("VERSIONS")).contains(&since) {
                complaints.push(format!("{}: VERSIONS does not say \"{since}\"", page.title()));
            }
        }
        let current = format!("This page describes version {} of the library.", self.version);
        if !self.page("kvmprep(7)").is_some_and(|page| joined(page.section("VERSIONS")).contains(&current)) {
            complaints.push(format!("kvmprep(7): VERSIONS does not say \"{current}\""));
        }
        complaints
    }

    /// References to pages of ours, and to sections of those in section 7, that lead nowhere.
    fn dead_references(&self) -> Vec<String> {
        let mut complaints = Vec::new();
        for page in self.written() {
            let text = page.text();
            for title in references(&text) {
                if self.page(title).is_none() {
                    complaints.push(format!("{}: there is no {title}", page.title()));
                }
            }
            for overview in self.overviews() {
                let mut named = sections_named(&text, &overview.title());
                named.retain(|name| !overview.headings().any(|heading| heading == name));
                let told =
                    named.iter().map(|name| format!("{}: {} has no {name}", page.title(), overview.title()));
                complaints.extend(told);
            }
            let see_also = joined(page.section("SEE ALSO"));
            if page.section == "3" && !references(&see_also).contains(&"kvmprep(7)") {
                complaints.push(format!("{}: SEE ALSO lacks kvmprep(7)", page.title()));
            }
            if references(&see_also).contains(&page.title().as_str()) {
                complaints.push(format!("{}: SEE ALSO refers to itself", page.title()));
            }
        }
        let links = self.pages.iter().filter(|page| page.redirect.is_some());
        let dead = links.filter(|page| self.shown(&page.name).is_none());
        complaints.extend(dead.map(|page| format!("{}: leads to no page", page.title())));
        complaints
    }

    /// Asks the compiler for each errno that a page names.
    fn check_errnos(&self) -> Result<()> {
        let told: BTreeSet<String> = self.written().flat_map(|page| header::errnos(&page.text())).collect();
        let list = told.into_iter().map(|errno| errno.replace('-', "    ") + ",\n").collect::<String>();
        let file = examples_directory()?.join("errnos.c");
        std::fs::write(&file, format!("#include <errno.h>\nconst int errnos[] = {{\n{list}}};\n"))
            .with_context(|| format!("cannot write {}", file.display()))?;
        project::run(Command::new("cc").args(C_FLAGS).arg("-fsyntax-only").arg(&file)).map(drop)
    }

    /// Compiles every example as its reader would; a whole program is linked.
    fn check_examples(&self, programs: &Programs) -> Result<()> {
        let directory = examples_directory()?;
        let mut complaints = Vec::new();
        let mut count = 0;
        for page in self.written() {
            for code in Page::code(page.section("EXAMPLES")) {
                count += 1;
                let file = directory.join(format!("{}.{count}.c", page.name));
                std::fs::write(&file, &code).with_context(|| format!("cannot write {}", file.display()))?;
                let mut compiler = Command::new("cc");
                compiler.args(C_FLAGS).arg("-I").arg(project::root().join("include"));
                compiler.arg("-I").arg(programs::model_headers()).arg(&file);
                if code.contains("int main(") {
                    compiler.arg("-L").arg(programs.library_dir()).arg("-lkvmprep");
                } else {
                    compiler.arg("-c");
                }
                compiler.arg("-o").arg(file.with_extension("out"));
                if let Err(error) = project::run(&mut compiler) {
                    complaints.push(format!("{}: an example does not compile: {error:#}", page.title()));
                }
            }
        }
        if count == 0 {
            complaints.push("no example found: the check is broken".into());
        }
        verdict(complaints)
    }
}

/// Where what is compiled of pages lies.
fn examples_directory() -> Result<PathBuf> {
    let directory = project::output()?.join("man");
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// What a page's NAME line says it is about.
fn names_of(page: &Page) -> Vec<&str> {
    let line = page.section("NAME").first().map_or("", |line| line.text.as_str());
    line.split(" - ").next().unwrap_or_default().split(", ").collect()
}

/// Our pages that a text refers to: `kvmprep…(N)`.
fn references(text: &str) -> Vec<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts = text.match_indices("kvmprep").map(|(at, _)| at).filter(|at| !text[..*at].ends_with(is_part));
    starts
        .filter_map(|at| {
            let rest = &text[at..];
            let open = rest.find(|c| !is_part(c))?;
            let section = rest[open..].strip_prefix('(')?.strip_prefix(['3', '7'])?;
            section.starts_with(')').then(|| &rest[..open + 3])
        })
        .collect()
}

/// The sections in "… ONE SECTION and ANOTHER in kvmprep(7)", for such a title.
fn sections_named(text: &str, title: &str) -> Vec<String> {
    let mut sections = Vec::new();
    let mut before = text;
    while let Some(at) = before.rfind(&format!(" in {title}")) {
        before = &before[..at];
        let is_heading = |word: &&str| {
            *word == "and" || (!word.is_empty() && word.chars().all(|c| c.is_ascii_uppercase()))
        };
        let words = before.rsplit(' ').map(|word| word.trim_start_matches('('));
        let mut words: Vec<&str> = words.take_while(is_heading).collect();
        words.reverse();
        sections.extend(words.join(" ").split(" and ").filter(|s| !s.is_empty()).map(str::to_owned));
    }
    sections
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_found() {
        let text = "kvmprep_a(3), (kvmprep(7)); kvmprep_b(x) libkvmprep(3) kvmprep_c(3)";
        assert_eq!(references(text), ["kvmprep_a(3)", "kvmprep(7)", "kvmprep_c(3)"]);
        let text = "see (ONE A TWO and THREE in kvmprep(7)). A struct in kvmprep(7); FOUR in kvmprep_x(7)";
        assert_eq!(sections_named(text, "kvmprep(7)"), ["ONE A TWO", "THREE"]);
        assert_eq!(sections_named(text, "kvmprep_x(7)"), ["FOUR"]);
    }
}
