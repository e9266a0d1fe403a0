//! Draws a film: its pictures one below the other, as an SVG that is read in light and in dark.
//!
//! Lengths are in the drawing's own units. Whatever stands in a table is of one width per letter, so that it is known what
//! fits; other text is broken where it would get too long. What there is to draw is decided in `view.rs`.

use super::player::{Film, Picture, Progress};
use super::view::{Cell, CellKind, Column, EntryPlace, Link, Pair, Strip, View};
use super::words;
use kvmprep_model::units::Privacy;
use std::collections::BTreeSet;
use svg::Document;
use svg::node::element::{Circle, Group, Line, Path, Rectangle, Style, Text};

const WIDTH: i32 = 940;
const MARGIN: i32 = 20;
/// Where the right half begins: direct roots, and external tables.
const RIGHT: i32 = 480;
/// From one row to the next, and how high one is.
const PITCH: i32 = 26;
const ROW: i32 = 21;
const INDENT: i32 = 12;
/// An entry of a root table, and one of the fourth level below it.
const LONGEST: i32 = SHORTEST + 3 * INDENT;
const SHORTEST: i32 = 290;
/// So many letters of what lies in a frame have room beside its entry.
const FRAME_LETTERS: usize = 16;
/// One letter of a table's text, and of a call's name.
const LETTER: i32 = 7;

const STYLE: &str = "\
text{font-family:system-ui,sans-serif;font-size:13px;fill:#1f2328}\
.m{font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:11.5px}\
.s{font-size:11px}.call{font-size:10.5px}.caption{font-size:14px;font-weight:600}.title{font-size:13px;font-weight:600}\
.faint{fill:#59636e}.back{fill:#fff}.rule{stroke:#d1d9e0}.number{fill:#59636e}.on{fill:#fff;font-weight:600}\
rect{stroke-width:1.2}.table{fill:none}.guide{fill:none;stroke:#afb8c1;stroke-width:1.2}\
.direct{stroke:#3b7dc4}.mirror{stroke:#8250df}.external{stroke:#1a7f37}\
.page.direct{fill:#ddebf9}.page.mirror{fill:#efe5fd}.page.external{fill:#d9f2df}\
.pending{fill:none;stroke-dasharray:5 3}.frozen{fill:#cdf1f7;stroke:#087990;stroke-dasharray:3 3;stroke-width:2}\
.blocked{fill:#ffdfdc;stroke:#cf222e;stroke-width:2}.nothing{fill:none;stroke:#afb8c1;stroke-dasharray:2 4}\
.private,.page.private{fill:#fbe3c9;stroke:#bf6a02}.shared{fill:#e6eaef;stroke:#818b98}\
.t-frozen{fill:#087990}.t-blocked{fill:#cf222e}.a{fill:none;stroke-width:1.6}.h{stroke:none}\
.a-equal{stroke:#1a7f37}.h-equal{fill:#1a7f37}.a-put{stroke:#087990;stroke-dasharray:4 3}.h-put{fill:#087990}\
.a-take{stroke:#cf222e;stroke-dasharray:4 3}.h-take{fill:#cf222e}.a-wrong{stroke:#cf222e;stroke-width:2.5}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.faint{fill:#9198a1}.back{fill:#0d1117}.rule{stroke:#2f353d}\
.number{fill:#656c76}.on{fill:#fff}.guide{stroke:#525964}\
.direct{stroke:#4c8dd6}.mirror{stroke:#a475f9}.external{stroke:#3fb950}\
.page.direct{fill:#122d4a}.page.mirror{fill:#2f1f52}.page.external{fill:#12331b}\
.frozen{fill:#0c3640;stroke:#39c5dd}.blocked{fill:#4a1d1d;stroke:#ff7b72}.nothing{stroke:#525964}\
.private,.page.private{fill:#43290c;stroke:#d18616}.shared{fill:#21262d;stroke:#818b98}.t-frozen{fill:#39c5dd}.t-blocked{fill:#ff7b72}\
.a-equal{stroke:#3fb950}.h-equal{fill:#3fb950}.a-put{stroke:#39c5dd}.h-put{fill:#39c5dd}\
.a-take{stroke:#ff7b72}.h-take{fill:#ff7b72}.a-wrong{stroke:#ff7b72}}";

/// The whole drawing.
pub fn svg(film: &Film) -> String {
    let mut sheet = Sheet { group: Group::new(), y: MARGIN, seen: BTreeSet::new(), said: Vec::new() };
    let is_series = film.pictures.len() > 1;
    for (index, picture) in film.pictures.iter().enumerate() {
        if index > 0 {
            sheet.rule();
        }
        sheet.picture(picture, is_series.then_some(index + 1));
    }
    sheet.legend();
    let height = sheet.y + MARGIN / 2;
    let back = Rectangle::new().set("class", "back").set("width", WIDTH).set("height", height);
    let document = Document::new()
        .set("viewBox", (0, 0, WIDTH, height))
        .set("role", "img")
        .set("aria-label", film.title.as_str())
        .add(Style::new(STYLE))
        .add(back)
        .add(sheet.group);
    format!("{document}\n")
}

/// What is drawn so far, and how far down that is.
struct Sheet {
    group: Group,
    y: i32,
    /// What the legend has to explain.
    seen: BTreeSet<Legend>,
    /// What the last picture said beside its tables, which is not said again.
    said: Vec<String>,
}

/// On which side tables are indented.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Left,
    /// As in a mirror.
    Right,
}

/// What does not explain itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Legend {
    Private,
    Shared,
    Equal,
    UnderWay,
    Frozen,
    Pending,
    Blocked,
    Different,
}

impl Sheet {
    fn add(&mut self, node: impl svg::Node) {
        let group = std::mem::take(&mut self.group);
        self.group = group.add(node);
    }

    fn text(&mut self, x: i32, y: i32, class: &str, text: &str) {
        self.add(Text::new(text).set("x", x).set("y", y).set("class", class));
    }

    fn text_at(&mut self, x: i32, y: i32, class: &str, anchor: &str, text: &str) {
        self.add(Text::new(text).set("x", x).set("y", y).set("class", class).set("text-anchor", anchor));
    }

    fn rectangle(&mut self, x: i32, y: i32, width: i32, class: &str) {
        let rectangle = Rectangle::new().set("x", x).set("y", y).set("width", width).set("height", ROW);
        self.add(rectangle.set("rx", 3).set("class", class));
    }

    fn rule(&mut self) {
        self.y += 8;
        let (y, end) = (self.y, WIDTH - MARGIN);
        self.add(Line::new().set("x1", MARGIN).set("y1", y).set("x2", end).set("y2", y).set("class", "rule"));
        self.y += 16;
    }

    fn picture(&mut self, picture: &Picture, number: Option<usize>) {
        let view = View::of(picture);
        self.caption(&picture.caption, number);
        let said = std::mem::take(&mut self.said);
        self.said.push(view.headline.clone());
        if !said.contains(&view.headline) {
            self.text(MARGIN, self.y + 12, "s faint", &view.headline);
            self.y += 20;
        }
        self.y += 6;
        let top = self.y;
        self.steps(picture);
        // Slots stand where there is room.
        let has_columns = !view.columns.is_empty();
        let left_end = self.y;
        let (x, start) = if has_columns { (MARGIN, left_end) } else { (RIGHT, top) };
        self.y = start;
        for strip in &view.strips {
            let text = strip.text();
            if !said.contains(&text) {
                self.strip(x, strip);
            }
            self.said.push(text);
        }
        let slots_end = self.y;
        self.y = if has_columns { top } else { slots_end };
        view.columns.iter().for_each(|column| self.column(column));
        self.y = self.y.max(left_end).max(slots_end);
        if let Some(pair) = &view.pair {
            self.pair(pair);
        }
    }

    fn caption(&mut self, caption: &str, number: Option<usize>) {
        let mut x = MARGIN;
        if let Some(number) = number {
            let (middle, y) = (MARGIN + 10, self.y + 9);
            self.add(Circle::new().set("cx", middle).set("cy", y).set("r", 10).set("class", "number"));
            self.text_at(middle, y + 4, "s on", "middle", &number.to_string());
            x += 30;
        }
        let lines = wrapped(caption, 102);
        if lines.is_empty() && number.is_some() {
            self.y += 20;
        }
        for line in lines {
            self.text(x, self.y + 14, "caption", &line);
            self.y += 20;
        }
        self.y += 2;
    }

    /// What was done, as one would type it, and what is not over.
    fn steps(&mut self, picture: &Picture) {
        // That a scenario has what has stopped go on is no step of anyone in it.
        for step in picture.steps.iter().filter(|step| !step.answer.is_empty()) {
            let answer = match step.answer.as_str() {
                "0" => String::new(),
                answer => format!(" → {answer}"),
            };
            self.step(&format!("{}{answer}", step.text), "m");
        }
        for under_way in &picture.under_way {
            let class = match under_way.progress {
                Progress::Stopped(call) if call.takes_away() => "m t-blocked",
                _ => "m t-frozen",
            };
            let progress = match under_way.progress {
                Progress::Stopped(_) => "under way".to_string(),
                waits => words::progress(waits),
            };
            self.step(&format!("{} … {progress}", under_way.text), class);
        }
        self.y += 8;
    }

    fn step(&mut self, text: &str, class: &str) {
        for line in wrapped(text, 60) {
            self.text(MARGIN, self.y + 12, class, &line);
            self.y += 17;
        }
    }

    /// A slot, as a bar of what is private in it and what is shared.
    fn strip(&mut self, start: i32, strip: &Strip) {
        self.text(start, self.y + 12, "s faint", &strip.title);
        self.y += 18;
        let space = RIGHT - MARGIN - 40;
        let letters: usize = strip.runs.iter().map(|(_, label)| label.len() + 2).sum();
        let spare = (space - letters as i32 * LETTER).max(0) / strip.runs.len().max(1) as i32;
        let mut x = start;
        for (index, (privacy, label)) in strip.runs.iter().enumerate() {
            let width = (label.len() + 2) as i32 * LETTER + spare;
            if x + width > start + space && index > 0 {
                self.text(x + 4, self.y + 15, "m faint", "…");
                break;
            }
            let (class, legend) = match privacy {
                Some(Privacy::Private) => ("private", Some(Legend::Private)),
                Some(Privacy::Shared) => ("shared", Some(Legend::Shared)),
                None => ("shared", None),
            };
            self.seen.extend(legend);
            self.rectangle(x, self.y, width - 3, class);
            self.text_at(x + (width - 3) / 2, self.y + 15, "m", "middle", label);
            x += width;
        }
        self.y += PITCH + 8;
    }

    fn column(&mut self, column: &Column) {
        self.title(RIGHT, &column.title, &column.subtitle);
        let mut guides = Guides::default();
        for row in &column.rows {
            let kind = if row.is_private { "direct private" } else { "direct" };
            self.entry(RIGHT, Side::Left, kind, (&row.place, &row.cell), &mut guides);
            self.frame(&row.frame);
            self.y += PITCH;
        }
        if column.rows.is_empty() {
            self.text(RIGHT, self.y + 13, "s faint", "Nothing is mapped.");
            self.y += PITCH;
        }
        self.y += 10;
    }

    fn pair(&mut self, pair: &Pair) {
        let top = self.y;
        self.title(MARGIN, &pair.title, &pair.subtitle);
        self.y = top;
        self.title(RIGHT, &pair.external_title, &pair.external_subtitle);
        let (mut left, mut right) = (Guides::default(), Guides::default());
        let kind = if pair.is_mirror { "mirror" } else { "direct" };
        for row in &pair.rows {
            self.entry(MARGIN, Side::Left, kind, (&row.place, &row.mirror), &mut left);
            self.entry(RIGHT, Side::Right, "external", (&row.place, &row.external), &mut right);
            self.link(&row.link);
            self.frame(&row.frame);
            self.y += PITCH;
        }
        if pair.rows.is_empty() {
            self.text(MARGIN, self.y + 13, "s faint", "Nothing is mapped.");
            self.text(RIGHT, self.y + 13, "s faint", "Nothing is mapped.");
            self.y += PITCH;
        }
    }

    fn title(&mut self, x: i32, title: &str, subtitle: &str) {
        self.text(x, self.y + 12, "title", title);
        self.text(x, self.y + 28, "s faint", subtitle);
        self.y += 38;
    }

    /// What lies in the frame of an entry on the right.
    fn frame(&mut self, frame: &str) {
        let mut frame = frame.to_string();
        if frame.chars().count() > FRAME_LETTERS {
            frame = frame.chars().take(FRAME_LETTERS - 1).chain(['…']).collect();
        }
        self.text(RIGHT + LONGEST + 6, self.y + 15, "m", &frame);
    }

    fn entry(&mut self, x: i32, side: Side, kind: &str, entry: (&EntryPlace, &Cell), guides: &mut Guides) {
        let (place, cell) = entry;
        let indent = place.depth as i32 * INDENT;
        let (start, end) = match side {
            Side::Left => (x + indent, x + LONGEST),
            Side::Right => (x, x + LONGEST - indent),
        };
        let y = self.y;
        if let Some(from) = guides.to(place.depth, y + ROW) {
            let (bend, to) = match side {
                Side::Left => (start - INDENT + 5, start),
                Side::Right => (end + INDENT - 5, end),
            };
            let path = format!("M{bend} {from}V{}H{to}", y + ROW / 2);
            self.add(Path::new().set("d", path).set("class", "guide"));
        }
        let class = match cell.kind {
            CellKind::Table => format!("table {kind}"),
            CellKind::Page => format!("page {kind}"),
            CellKind::Pending => format!("pending {kind}"),
            CellKind::Blocked => "blocked".into(),
            CellKind::Frozen => "frozen".into(),
            CellKind::Nothing | CellKind::NoMemory => "nothing".into(),
        };
        self.seen.extend(match cell.kind {
            CellKind::Pending => Some(Legend::Pending),
            CellKind::Blocked => Some(Legend::Blocked),
            CellKind::Frozen => Some(Legend::Frozen),
            _ => None,
        });
        self.rectangle(start, y, end - start, &class);
        let faint = if cell.kind == CellKind::Nothing { "m faint" } else { "m" };
        let base = y + 15;
        // Columns are straight, however far to the right their table begins.
        let text = if side == Side::Left { x + LONGEST - SHORTEST } else { x };
        self.text(start + 6, base, faint, &place.address);
        self.text_at(text + 128, base, "m faint", "end", &place.size);
        self.text(text + 138, base, faint, &cell.what);
        self.text_at(end - 6, base, faint, "end", &cell.note);
    }

    /// From the mirror's entry to the external one.
    fn link(&mut self, link: &Link) {
        let (from, to, y) = (MARGIN + LONGEST + 4, RIGHT - 4, self.y + ROW / 2);
        let (legend, kind) = match link {
            Link::Equal => (Legend::Equal, "equal"),
            Link::UnderWay { takes_away: false, .. } => (Legend::UnderWay, "put"),
            Link::UnderWay { takes_away: true, .. } => (Legend::UnderWay, "take"),
            Link::Different => (Legend::Different, ""),
        };
        self.seen.insert(legend);
        if *link == Link::Different {
            self.crossed_line(from, to, y);
        } else {
            self.arrow(from, to, y, kind);
        }
        if let Link::UnderWay { call, takes_away } = link {
            let class = if *takes_away { "call t-blocked" } else { "call t-frozen" };
            // All of the module's begin alike, and there is little room.
            self.text_at((from + to) / 2, y - 4, class, "middle", call.trim_start_matches("TDH."));
        }
    }

    fn arrow(&mut self, from: i32, to: i32, y: i32, kind: &str) {
        let (line, head) = (format!("M{from} {y}H{}", to - 6), format!("M{to} {y}l-8 -4v8z"));
        self.add(Path::new().set("d", line).set("class", format!("a a-{kind}")));
        self.add(Path::new().set("d", head).set("class", format!("h h-{kind}")));
    }

    fn crossed_line(&mut self, from: i32, to: i32, y: i32) {
        let path = format!("M{from} {y}H{to}M{} {}l12 -16", (from + to) / 2 - 6, y + 8);
        self.add(Path::new().set("d", path).set("class", "a a-wrong"));
    }

    fn legend(&mut self) {
        if self.seen.is_empty() {
            return;
        }
        self.rule();
        let mut x = MARGIN;
        for legend in std::mem::take(&mut self.seen) {
            let text = legend.text();
            let width = 34 + text.len() as i32 * 6 + 14;
            if x + width > WIDTH - MARGIN && x > MARGIN {
                x = MARGIN;
                self.y += PITCH;
            }
            let middle = self.y + ROW / 2;
            match legend {
                Legend::Equal => self.arrow(x, x + 26, middle, "equal"),
                Legend::UnderWay => self.arrow(x, x + 26, middle, "put"),
                Legend::Different => self.crossed_line(x, x + 26, middle),
                Legend::Private => self.rectangle(x, self.y, 26, "private"),
                Legend::Shared => self.rectangle(x, self.y, 26, "shared"),
                Legend::Frozen => self.rectangle(x, self.y, 26, "frozen"),
                Legend::Pending => self.rectangle(x, self.y, 26, "pending external"),
                Legend::Blocked => self.rectangle(x, self.y, 26, "blocked"),
            }
            self.text(x + 34, self.y + 15, "s faint", text);
            x += width;
        }
        self.y += PITCH;
    }
}

impl Legend {
    fn text(self) -> &'static str {
        match self {
            Legend::Private => "KVM was told: private",
            Legend::Shared => "KVM was told: shared",
            Legend::Equal => "the same on both sides",
            Legend::UnderWay => "a call that has no answer yet",
            Legend::Frozen => "frozen: someone is changing it, and nobody else may",
            Legend::Pending => "pending: the guest has yet to accept it",
            Legend::Blocked => "blocked: no new translation is made from it",
            Legend::Different => "not the same, and nobody is at it",
        }
    }
}

/// Where the lines from tables to what is in them begin.
#[derive(Default)]
struct Guides {
    /// The bottom of the last entry of each depth.
    bottoms: Vec<i32>,
}

impl Guides {
    /// Where the line begins that leads to an entry of this depth, whose bottom is there.
    fn to(&mut self, depth: usize, bottom: i32) -> Option<i32> {
        self.bottoms.truncate(depth);
        let from = self.bottoms.last().copied();
        self.bottoms.resize(depth, bottom);
        self.bottoms.push(bottom);
        from
    }
}

/// The text in lines of at most so many letters, broken between words.
fn wrapped(text: &str, letters: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= letters => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_broken_between_words() {
        assert_eq!(wrapped("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrapped("immovable", 3), ["immovable"]);
        assert!(wrapped("", 3).is_empty());
    }

    #[test]
    fn lines_lead_from_a_table_to_each_entry_in_it() {
        let mut guides = Guides::default();
        let bottoms = [(0, 10), (1, 20), (2, 30), (2, 40), (1, 50), (2, 60)];
        let begun: Vec<_> = bottoms.iter().map(|(depth, bottom)| guides.to(*depth, *bottom)).collect();
        assert_eq!(begun, [None, Some(10), Some(20), Some(20), Some(10), Some(50)]);
    }
}
