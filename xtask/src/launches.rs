//! The table of what TDX's and SNP's launches can answer: tests/launch.rs.

use crate::tables::{Printed, Table};
use anyhow::{Result, ensure};

/// It.
pub const TABLE: Printed = Printed {
    what: "launches, each errno and each partial progress",
    program: "launch",
    tests: "each_answer",
    parse,
};

/// Headings and rows, which are counted.
fn parse(said: &str) -> Result<Table> {
    let is_heading = |line: &&str| line.starts_with("4 pages by ");
    let lines = said.lines().filter(|line| is_heading(line) || is_row(line)).map(str::to_owned);
    let lines: Vec<String> = lines.collect();
    let count = lines.iter().filter(|line| is_row(line)).count() as u64;
    let told = said.lines().filter_map(|line| line.split_once(" exchanges with ")?.0.parse::<u64>().ok());
    let told: u64 = told.sum();
    ensure!(count > 0 && count == told, "{count} rows printed, {told} told");
    Ok(Table { lines, count })
}

fn is_row(line: &str) -> bool {
    line.starts_with("TDX ") || line.starts_with("SNP type ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_is_cut_short_is_none() {
        let heading = "\nrunning 2 tests\n4 pages by   the kernel's side\n";
        let rows = "TDX          all at once\nSNP type 1   all at once\n";
        let whole = format!("{heading}{rows}1 exchanges with TDX\n.1 exchanges with SNP\n");
        assert_eq!(parse(&format!("{heading}{rows}2 exchanges with TDX\n")).unwrap().lines.len(), 3);
        assert!(parse(&whole).is_err(), "a number that is not read must not count as read");
        assert!(parse(&format!("{heading}{rows}3 exchanges with TDX\n")).is_err());
        assert!(parse(heading).is_err());
    }
}
