//! Pre-population: both page-table stages are filled before the guest runs.
//!
//! [`plan`] decides, [`queue`] hands out, [`host`] and [`stage2`] do, [`job`] joins them; [`coverage`] remembers
//! what was done and [`supply`] knows whether it can fit. Nothing in here starts without being asked to.

pub mod coverage;
pub mod host;
pub mod job;
pub mod plan;
pub mod queue;
pub mod stage2;
pub mod supply;
