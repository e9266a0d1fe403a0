//! Pre-population: both page-table stages are filled before the guest runs.
//!
//! [`plan`] decides, [`queue`] hands out, a [`worker`] takes it through [`host`] and [`stage2`], [`job`] joins them all
//! and [`report`] tells; [`coverage`] remembers what was done, [`supply`] knows whether it can fit, and [`page_size`]
//! what huge pages there are. Nothing in here starts without being asked to.

pub mod coverage;
pub mod exact;
pub mod host;
pub mod job;
pub mod page_size;
pub mod plan;
pub mod queue;
pub mod report;
pub mod stage2;
pub mod supply;
pub mod worker;
