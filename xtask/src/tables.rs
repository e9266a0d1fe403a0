//! Tables that the library's tests print, shown where tests are run.
//!
//! The tests judge their rows themselves; here these are counted and shown, so that a run says what was tried. A test that
//! printed no rows, or fewer than it says, has not passed.

use crate::lanes::{Counts, Lane};
use crate::project;
use anyhow::Result;

/// A table that a test prints.
pub struct Printed {
    /// What it is of.
    pub what: &'static str,
    /// The file of `tests/`, and which of its tests.
    pub program: &'static str,
    pub tests: &'static str,
    /// Finds it in what the test says.
    pub parse: fn(&str) -> Result<Table>,
}

/// A table.
pub struct Table {
    /// Headings and rows.
    pub lines: Vec<String>,
    /// How many things were tried.
    pub count: u64,
}

impl Printed {
    /// Runs the test, shows the table and counts what it tried.
    pub fn check(&self, lane: &mut Lane) {
        match self.run() {
            Ok(table) => {
                lane.add(self.what, Counts { passed: table.count, ..Counts::default() }, "");
                table.lines.iter().for_each(|line| println!("       {line}"));
            }
            Err(error) => lane.check(self.what, Err(error)),
        }
    }

    fn run(&self) -> Result<Table> {
        let mut cargo = project::cargo();
        cargo.args(["test", "--quiet", "--package", "kvmprep", "--test", self.program, self.tests]);
        let said = project::run(cargo.args(["--", "--nocapture", "--test-threads=1"]))?;
        (self.parse)(&said)
    }
}
