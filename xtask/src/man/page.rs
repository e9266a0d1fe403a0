//! One man page, read: its sections as plain text, its examples as C, what it refers to.
//!
//! It understands the few macros and escapes that our pages use and refuses any other, so that no check is
//! passed by text that was not understood. It judges nothing.

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};

/// A page as it lies in `man/`.
pub struct Page {
    /// The file's name without its section.
    pub name: String,
    /// The section: 3 or 7.
    pub section: String,
    pub path: PathBuf,
    /// The page that is shown in its place.
    pub redirect: Option<String>,
    pub lines: Vec<Line>,
}

/// Keeps groff from hyphenating, when it stands before the title line: a name that is cut at a line's end can be
/// neither searched for nor copied.
pub const WHOLE_WORDS: &str = "nr HY 0";

/// One line of a page.
pub struct Line {
    /// The macro at its start; empty for text.
    pub request: String,
    /// What the reader sees of it: the macro's arguments, or the text.
    pub text: String,
    /// The first word that is set in italics, where there is one.
    pub italic: Option<String>,
    /// Whether it is code, between `.EX` and `.EE`.
    pub is_code: bool,
}

impl Page {
    /// All pages of the directory, in the order of their names.
    pub fn all(directory: &Path) -> Result<Vec<Self>> {
        let mut pages = Vec::new();
        for entry in
            std::fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?
        {
            let path = entry?.path();
            pages.push(Self::read(&path).with_context(|| path.display().to_string())?);
        }
        pages.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(pages)
    }

    fn read(path: &Path) -> Result<Self> {
        let file = path.file_name().context("no file name")?.to_string_lossy().into_owned();
        let (name, section) = file.rsplit_once('.').context("no section in the file's name")?;
        let source = std::fs::read_to_string(path)?;
        Ok(Self {
            name: name.into(),
            section: section.into(),
            path: path.to_owned(),
            redirect: source.strip_prefix(".so ").map(|target| target.trim_end().to_owned()),
            lines: parse(&source)?,
        })
    }

    /// `name(section)`.
    pub fn title(&self) -> String {
        format!("{}({})", self.name, self.section)
    }

    /// The headings of its sections, in order.
    pub fn headings(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().filter(|line| line.request == "SH").map(|line| line.text.as_str())
    }

    /// The macros of its lines, in order.
    pub fn requests(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(|line| line.request.as_str())
    }

    /// The lines of a section; none where there is no such section.
    pub fn section(&self, heading: &str) -> &[Line] {
        let is_heading = |line: &Line| line.request == "SH";
        let Some(at) = self.lines.iter().position(|line| is_heading(line) && line.text == heading) else {
            return &[];
        };
        let section = &self.lines[at + 1..];
        &section[..section.iter().position(is_heading).unwrap_or(section.len())]
    }

    /// All its text, in one line.
    pub fn text(&self) -> String {
        joined(&self.lines)
    }

    /// The pieces of code in `lines`.
    pub fn code(lines: &[Line]) -> Vec<String> {
        let mut blocks = Vec::new();
        for line in lines {
            match line.request.as_str() {
                "EX" => blocks.push(String::new()),
                _ if line.is_code => {
                    if let Some(block) = blocks.last_mut() {
                        *block += &line.text;
                        block.push('\n');
                    }
                }
                _ => {}
            }
        }
        blocks
    }
}

/// The text of `lines`, with single spaces.
pub fn joined(lines: &[Line]) -> String {
    let words = lines.iter().flat_map(|line| line.text.split_ascii_whitespace());
    words.collect::<Vec<_>>().join(" ")
}

fn parse(source: &str) -> Result<Vec<Line>> {
    let (mut lines, mut is_code) = (Vec::new(), false);
    for (number, source) in source.lines().enumerate() {
        let mut line = parse_line(source).with_context(|| format!("line {}", number + 1))?;
        if line.request == "EE" {
            is_code = false;
        }
        line.is_code = is_code;
        if line.request == "EX" {
            is_code = true;
        }
        ensure!(
            !is_code || !line.request.is_empty() || !has_bare_quotes(source),
            "line {}: in code write \\-, \\(aq, \\(ha, \\(ti, \\(ga: {source}",
            number + 1
        );
        lines.push(line);
    }
    Ok(lines)
}

/// Whether code has a character that is shown as a typographical one, which no compiler takes from a reader.
fn has_bare_quotes(source: &str) -> bool {
    source.match_indices(['-', '\'', '^', '~', '`']).any(|(at, _)| !source[..at].ends_with('\\'))
}

fn parse_line(source: &str) -> Result<Line> {
    let line =
        |request: &str, text: String, italic| Line { request: request.into(), text, italic, is_code: false };
    if source.starts_with("'\\\"") || source.starts_with(".\\\"") {
        return Ok(line("\\\"", String::new(), None));
    }
    let Some(source) = source.strip_prefix('.') else {
        return Ok(line("", plain(source)?, None));
    };
    if source == WHOLE_WORDS {
        return Ok(line(WHOLE_WORDS, String::new(), None));
    }
    let (request, rest) = source.split_once(' ').unwrap_or((source, ""));
    let words = arguments(rest)?;
    let (text, italic) = match request {
        "SH" | "SS" | "TH" | "B" => (words.join(" "), None),
        "I" => (words.join(" "), Some(words.join(" "))),
        "IR" | "IB" => (words.concat(), words.first().cloned()),
        "RI" | "BI" => (words.concat(), words.get(1).cloned()),
        "BR" | "RB" => (words.concat(), None),
        "PP" | "TP" | "IP" | "RS" | "RE" | "br" | "nf" | "fi" | "EX" | "EE" | "TS" | "TE" | "so" => {
            (String::new(), None)
        }
        _ => bail!("our pages do without .{request}"),
    };
    Ok(line(request, text, italic))
}

/// A macro's arguments: words, or text in quotes.
fn arguments(mut rest: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    loop {
        rest = rest.trim_start_matches(' ');
        if rest.is_empty() {
            return Ok(words);
        }
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').context("a quote is not closed")?,
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        words.push(plain(word)?);
        rest = after;
    }
}

/// Text as it is shown, escapes resolved.
fn plain(source: &str) -> Result<String> {
    const ESCAPES: [(&str, &str); 13] = [
        ("-", "-"),
        ("e", "\\"),
        ("&", ""),
        (" ", " "),
        ("(aq", "'"),
        ("(dq", "\""),
        ("(ha", "^"),
        ("(ti", "~"),
        ("(ga", "`"),
        ("(em", "\u{2014}"),
        ("(bu", "\u{2022}"),
        ("fB", ""),
        ("fR", ""),
    ];
    let mut text = String::new();
    let mut rest = source;
    while let Some((before, after)) = rest.split_once('\\') {
        text += before;
        let known = ESCAPES.iter().find(|(name, _)| after.starts_with(name));
        let (name, shown) =
            known.with_context(|| format!("an escape that our pages do without: {source}"))?;
        text += shown;
        rest = &after[name.len()..];
    }
    Ok(text + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_what_the_reader_sees() {
        let text = |source| parse_line(source).unwrap().text;
        assert_eq!(text(".BR kvmprep_populate (3),"), "kvmprep_populate(3),");
        assert_eq!(text(".BI \"int f(int \" a \", int \" b );"), "int f(int a, int b);");
        assert_eq!(text("puts(\"a\\en\");"), "puts(\"a\\n\");");
        assert_eq!(text(".B \\-EINVAL"), "-EINVAL");
        assert_eq!(parse_line(".RI ( size ).").unwrap().italic.as_deref(), Some("size"));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(parse_line(".Sh NAME").is_err());
        assert!(parse_line(".nr HY 1").is_err());
        assert!(parse_line("a \\(co b").is_err());
        assert!(parse_line(".B \"open").is_err());
        assert!(parse(".EX\nx = -1;\n.EE\n").is_err());
        assert!(parse(".EX\nx = \\-1;\n.EE\nold-fashioned\n").is_ok());
    }

    #[test]
    fn code_is_apart_from_text() {
        let lines =
            parse(".SH EXAMPLES\nText.\n.EX\nint a;\n\nint b;\n.EE\nMore.\n.EX\nint c;\n.EE\n").unwrap();
        assert_eq!(Page::code(&lines), ["int a;\n\nint b;\n", "int c;\n"]);
    }
}
