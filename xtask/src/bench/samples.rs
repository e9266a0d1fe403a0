//! What the measuring programs print: `sample|WHAT|WAY|VALUE`, one line for each measurement.
//!
//! Keeps the order in which comparisons and ways first came, which is the order for tables and chart.

use anyhow::{Context, Result};

/// All samples of a run.
#[derive(Debug, Default)]
pub struct Samples(Vec<Sample>);

#[derive(Debug)]
struct Sample {
    what: String,
    way: String,
    value: f64,
}

impl Samples {
    /// Takes a line; false when it is no sample.
    pub fn take(&mut self, line: &str) -> bool {
        let mut fields = line.trim_end().split('|');
        let parsed = (|| {
            fields.next().filter(|word| *word == "sample")?;
            let (what, way) = (fields.next()?.into(), fields.next()?.into());
            let value = fields.next()?.parse().ok()?;
            fields.next().is_none().then_some(Sample { what, way, value })
        })();
        let is_sample = parsed.is_some();
        self.0.extend(parsed);
        is_sample
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Every comparison whose name ends in `suffix`, without it: backings, as people call them.
    pub fn comparisons(&self, suffix: &str) -> Vec<&str> {
        distinct(self.0.iter().filter_map(|sample| sample.what.strip_suffix(suffix)))
    }

    /// The ways of one comparison.
    pub fn ways(&self, what: &str) -> Vec<&str> {
        distinct(self.0.iter().filter(|sample| sample.what == what).map(|sample| sample.way.as_str()))
    }

    /// The median of one way in one comparison.
    pub fn median(&self, what: &str, way: &str) -> Result<f64> {
        let of_it = self.0.iter().filter(|sample| sample.what == what && sample.way == way);
        median(of_it.map(|sample| sample.value).collect())
            .with_context(|| format!("{what}: {way} was not measured"))
    }
}

fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut seen = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

/// A name as an identifier: `hugetlb 2M, private` is `hugetlb-2m-private`.
pub fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
}

/// The middle value, or the mean of both.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Samples {
        let mut samples = Samples::default();
        for value in [5, 1, 9] {
            assert!(samples.take(&format!("sample|memfd, shared, 1t|kvmprep|{value}\n")));
        }
        assert!(samples.take("sample|memfd, shared, 1t|prealloc|4"));
        assert!(samples.take("sample|memfd, shared, 1t|prealloc|6"));
        samples
    }

    #[test]
    fn the_median_is_the_middle_or_between_two() {
        let samples = samples();
        assert_eq!(samples.median("memfd, shared, 1t", "kvmprep").unwrap(), 5.0);
        assert_eq!(samples.median("memfd, shared, 1t", "prealloc").unwrap(), 5.0);
        assert!(samples.median("memfd, shared, 1t", "by hand").is_err());
    }

    #[test]
    fn names_are_found_in_their_order() {
        let samples = samples();
        assert_eq!(samples.comparisons(", 1t"), ["memfd, shared"]);
        assert_eq!(samples.ways("memfd, shared, 1t"), ["kvmprep", "prealloc"]);
    }

    #[test]
    fn other_lines_are_no_samples() {
        let mut samples = Samples::default();
        for line in ["ok host_anon_4k", "sample|a|b", "sample|a|b|c", "sample|a|b|1|2", ""] {
            assert!(!samples.take(line), "{line}");
        }
        assert!(samples.is_empty());
    }

    #[test]
    fn a_slug_has_no_more_than_letters_digits_and_dashes() {
        assert_eq!(slug("hugetlb 2M, private"), "hugetlb-2m-private");
        assert_eq!(slug("guest_memfd, mapped"), "guest-memfd-mapped");
    }
}
