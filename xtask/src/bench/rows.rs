//! A row of figures: ours against theirs, and the bar that it is held to.
//!
//! The one place where a ratio is made and a bar judged. It knows nothing of what was measured.

use serde::Serialize;

/// One comparison. `theirs` and `ratio` are missing where there is nothing to compare with.
#[derive(Serialize, Debug)]
pub struct Row {
    pub id: String,
    pub ours: f64,
    pub theirs: Option<f64>,
    pub unit: &'static str,
    pub ratio: Option<f64>,
    #[serde(skip)]
    bar: Option<Bar>,
}

/// The unit of what has none.
pub const RATIO: &str = "";
/// What a page takes in a map.
pub const BITS: &str = "bits/page";

/// What a row is held to.
#[derive(Clone, Copy, Debug)]
enum Bar {
    /// The ratio of two times.
    Ratio(f64),
    /// Our own time, in the row's unit.
    Time(f64),
    /// Our own count.
    Count(f64),
    /// The ratio of two rates, of which more is better.
    RatioOfRates(f64),
    /// Our own rate.
    Rate(f64),
}

/// The file of figures.
#[derive(Serialize)]
pub struct Rows<'a> {
    pub rows: &'a [Row],
}

impl Row {
    /// Two times, in nanoseconds; shown in milliseconds.
    pub fn times(id: impl Into<String>, ours: f64, theirs: f64) -> Self {
        let milliseconds = |ns: f64| round(ns / 1e6);
        let ratio = Some(round(ours / theirs));
        Row {
            id: id.into(),
            ours: milliseconds(ours),
            theirs: Some(milliseconds(theirs)),
            unit: "ms",
            ratio,
            bar: None,
        }
    }

    /// Two short times, in nanoseconds.
    pub fn nanoseconds(id: impl Into<String>, ours: f64, theirs: f64) -> Self {
        Self::counts(id, ours.round(), theirs.round(), "ns")
    }

    /// Two counts.
    pub fn counts(id: impl Into<String>, ours: f64, theirs: f64, unit: &'static str) -> Self {
        let ratio = (theirs > 0.0).then(|| round(ours / theirs));
        Row { id: id.into(), ours: round(ours), theirs: Some(theirs), unit, ratio, bar: None }
    }

    /// A count that stands by itself.
    pub fn count(id: impl Into<String>, ours: f64, unit: &'static str) -> Self {
        Row { id: id.into(), ours: round(ours), theirs: None, unit, ratio: None, bar: None }
    }

    /// Holds its ratio to `most`.
    pub fn ratio_at_most(self, most: f64) -> Self {
        Row { bar: Some(Bar::Ratio(most)), ..self }
    }

    /// Holds our time to `most`, in the row's unit.
    pub fn time_at_most(self, most: f64) -> Self {
        Row { bar: Some(Bar::Time(most)), ..self }
    }

    /// Holds our count to `most`.
    pub fn count_at_most(self, most: f64) -> Self {
        Row { bar: Some(Bar::Count(most)), ..self }
    }

    /// Holds the ratio of its rates to `least`.
    pub fn ratio_at_least(self, least: f64) -> Self {
        Row { bar: Some(Bar::RatioOfRates(least)), ..self }
    }

    /// Holds our rate to `least`.
    pub fn rate_at_least(self, least: f64) -> Self {
        Row { bar: Some(Bar::Rate(least)), ..self }
    }

    /// The same under another name.
    pub fn under(&self, id: &str) -> Self {
        Row { id: id.into(), ..*self }
    }

    /// Whether it misses its bar.
    pub fn is_missed(&self) -> bool {
        match self.bar {
            None => false,
            Some(Bar::Ratio(most)) => self.ratio.is_none_or(|ratio| ratio > most),
            Some(Bar::Time(most) | Bar::Count(most)) => self.ours > most,
            Some(Bar::RatioOfRates(least)) => self.ratio.is_none_or(|ratio| ratio < least),
            Some(Bar::Rate(least)) => self.ours < least,
        }
    }

    /// Whether it comes out the same every time.
    pub fn is_exact(&self) -> bool {
        matches!(self.bar, Some(Bar::Count(_)))
    }

    fn verdict(&self) -> String {
        let word = if self.is_missed() { "MISSED" } else { "ok" };
        match self.bar {
            None => String::new(),
            Some(Bar::Ratio(most) | Bar::Time(most) | Bar::Count(most)) => format!("bar {most}: {word}"),
            Some(Bar::RatioOfRates(least) | Bar::Rate(least)) => format!("bar {least} or more: {word}"),
        }
    }
}

/// The row with the highest ratio.
pub fn worst(rows: &[Row]) -> Option<&Row> {
    rows.iter().max_by(|a, b| a.ratio.unwrap_or(0.0).total_cmp(&b.ratio.unwrap_or(0.0)))
}

/// To three decimals, or as many as leave three digits: more would be noise, in a file that people read too.
fn round(value: f64) -> f64 {
    let decimals = if value == 0.0 { 3.0 } else { (2.0 - value.abs().log10().floor()).max(3.0) };
    let scale = 10f64.powf(decimals);
    (value * scale).round() / scale
}

/// Rows for people.
pub fn table(rows: &[Row]) -> String {
    let width = rows.iter().map(|row| row.id.len()).max().unwrap_or(0);
    let mut text = format!("  {:width$} {:>10} {:>10} {:13} {:>6}\n", "", "ours", "theirs", "", "ratio");
    for row in rows {
        let theirs = row.theirs.map_or("-".into(), |theirs| number(theirs, row.unit));
        let ratio = row.ratio.map_or("-".into(), |ratio| {
            if ratio < 0.01 { format!("{ratio:.0e}") } else { format!("{ratio:.2}") }
        });
        let ours = number(row.ours, row.unit);
        let line = format!(
            "  {:width$} {ours:>10} {theirs:>10} {:13} {ratio:>6}  {}",
            row.id,
            row.unit,
            row.verdict()
        );
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn number(value: f64, unit: &str) -> String {
    match unit {
        "ms" => format!("{value:.1}"),
        RATIO | BITS => format!("{value:.3}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_ours_over_theirs_and_is_held_to_its_bar() {
        let row = Row::times("x", 3e6, 5e6);
        assert_eq!((row.ours, row.theirs, row.ratio), (3.0, Some(5.0), Some(0.6)));
        assert!(!row.ratio_at_most(0.6).is_missed());
        assert!(Row::times("x", 3e6, 5e6).ratio_at_most(0.59).is_missed());
    }

    #[test]
    fn a_time_is_held_to_its_bar_and_is_not_exact() {
        let row = Row::times("x", 11e6, 5e9).time_at_most(10.0);
        assert!(row.is_missed() && !row.is_exact());
        assert!(!Row::times("x", 9e6, 5e6).time_at_most(10.0).is_missed());
    }

    #[test]
    fn a_rate_is_held_to_its_bar_from_below_and_is_not_exact() {
        let rate = |ours| Row::count("x", ours, "pages/s").rate_at_least(5e6);
        assert!(rate(4.9e6).is_missed() && !rate(5e6).is_missed() && !rate(4.9e6).is_exact());
        let scaling = |ours| Row::counts("x", ours, 1e6, "pages/s").ratio_at_least(1.7);
        assert!(scaling(1.69e6).is_missed() && !scaling(1.7e6).is_missed());
        assert!(table(&[scaling(1e6)]).contains("bar 1.7 or more: MISSED"));
    }

    #[test]
    fn a_bar_on_a_ratio_that_cannot_be_had_is_missed() {
        assert!(Row::counts("x", 0.0, 0.0, "faults").ratio_at_most(1.0).is_missed());
        assert!(!Row::counts("x", 0.0, 0.0, "faults").count_at_most(0.0).is_missed());
    }

    #[test]
    fn a_small_ratio_is_not_rounded_to_its_bar() {
        let ratio = |ours| Row::nanoseconds("x", ours, 1e6).ratio_at_most(0.001);
        assert!(ratio(1010.0).is_missed() && !ratio(1000.0).is_missed());
        assert_eq!(ratio(12.0).ratio, Some(0.000012));
        assert!(table(&[ratio(12.0)]).contains(" 1e-5 "), "{}", table(&[ratio(12.0)]));
    }

    #[test]
    fn the_worst_row_is_the_one_with_the_highest_ratio() {
        let rows = [Row::times("a", 1.0, 2.0), Row::times("b", 3.0, 4.0), Row::times("c", 1.0, 9.0)];
        assert_eq!(worst(&rows).map(|row| row.id.as_str()), Some("b"));
    }

    #[test]
    fn the_table_says_what_was_missed() {
        let text = table(&[Row::times("slow", 9e6, 5e6).ratio_at_most(1.03)]);
        assert!(
            text.contains("slow") && text.contains("1.80") && text.contains("bar 1.03: MISSED"),
            "{text}"
        );
    }
}
