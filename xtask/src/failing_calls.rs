//! The table of the system calls that were failed, one after the other, and of what came of it: tests/failing_calls.rs.

use crate::tables::{Printed, Table};
use anyhow::{Context, Result, ensure};

/// It.
pub const TABLE: Printed = Printed {
    what: "each system call failing, with each errno",
    program: "failing_calls",
    tests: "after_any_failure",
    parse,
};

/// A heading, a row for each piece of work, and their sum.
fn parse(said: &str) -> Result<Table> {
    let from_heading = said.lines().skip_while(|line| !line.starts_with("failing each call,"));
    let mut lines: Vec<String> = Vec::new();
    for line in from_heading {
        lines.push(line.to_owned());
        if line.starts_with("all ") {
            break;
        }
    }
    let rows = lines.get(1..lines.len().max(2) - 1).unwrap_or_default();
    let counts: Option<Vec<u64>> = rows.iter().map(|row| cases(row, 3)).collect();
    let count: u64 = counts.context("a row without numbers")?.iter().sum();
    let told = lines.last().and_then(|sum| cases(sum, 2)).context("there is no table")?;
    ensure!(count > 0 && count == told, "the rows are of {count} cases, and {told} are told");
    Ok(Table { lines, count })
}

/// The last number of a row but one; it ends with that many.
fn cases(row: &str, numbers: usize) -> Option<u64> {
    let last: Option<Vec<u64>> =
        row.split_whitespace().rev().take(numbers).map(|word| word.parse().ok()).collect();
    last?.get(1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_whole_or_none() {
        let said = |rows: &str| format!("running 1 test\nfailing each call, calls cases refused\n{rows}ok\n");
        let table =
            parse(&said("a slot is made   3   17   12\nanother   1   7   7\nall   24   19\n")).unwrap();
        assert_eq!((table.count, table.lines.len()), (24, 4));
        for broken in [
            "",
            "all   0   0\n",
            "a slot is made   3   17   12\n",
            "a slot is made   3   17   12\nall   18   12\n",
            "a slot is made   3   seventeen   12\nall   17   12\n",
        ] {
            assert!(parse(&said(broken)).is_err(), "{broken:?}");
        }
    }
}
