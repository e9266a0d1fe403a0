//! The two claims about what builds it: the oldest Rust that `Cargo.toml` names, and architectures other than x86-64.
//!
//! Both are tried with Debian 13's own compiler and cargo, whatever Rust the machine has. It only checks and runs
//! nothing that it builds, and must never touch what the machine's own cargo has built.

use crate::bed::{Bed, ResolveError, Rust};
use crate::lanes::Lane;
use crate::project;
use anyhow::{Result, ensure};

const NAME: &str = "msrv";
/// What `Cargo.toml` claims for the library and these commands alike.
const CLAIMED: &str = env!("CARGO_PKG_RUST_VERSION");

/// The claims, each tried.
pub fn lane(bed: &Bed) -> Result<Lane> {
    let rust = match bed.rust() {
        Ok(rust) => rust,
        Err(ResolveError::Unavailable(why)) => return Ok(Lane::skipped(NAME, &why)),
        Err(ResolveError::Failed(error)) => {
            let mut lane = Lane::new(NAME);
            lane.check("getting Debian 13's Rust", Err(error));
            return Ok(lane);
        }
    };
    let mut lane = Lane::new(NAME);
    let version = rust.version()?;
    lane.check(&format!("Rust {version} is the one claimed"), claimed(&version));
    lane.check("library, commands and tests", check(&rust, &["--workspace"]));
    let foreign = ["--package", "kvmprep", "--target", Rust::FOREIGN_TARGET];
    lane.check(&format!("library and tests for {}", Rust::FOREIGN_TARGET), check(&rust, &foreign));
    Ok(lane)
}

/// A newer compiler would prove nothing about the oldest.
fn claimed(version: &str) -> Result<()> {
    ensure!(is_release_of(version, CLAIMED), "Cargo.toml claims {CLAIMED}, which this cannot show");
    Ok(())
}

/// Whether `version`, such as 1.85.1, is a release of `claimed`, such as 1.85.
fn is_release_of(version: &str, claimed: &str) -> bool {
    version.strip_prefix(claimed).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn check(rust: &Rust, what: &[&str]) -> Result<()> {
    let mut cargo = rust.cargo();
    cargo.current_dir(project::root()).args(["check", "--locked", "--all-targets"]).args(what);
    cargo.env("CARGO_TARGET_DIR", project::output()?.join(NAME));
    cargo.env("RUSTFLAGS", "--deny warnings").env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo.env_remove("CARGO_BUILD_TARGET");
    // A third of the space.
    cargo.env("CARGO_INCREMENTAL", "0").env("CARGO_PROFILE_DEV_DEBUG", "0");
    project::run(&mut cargo).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_told_from_one_that_only_begins_alike() {
        assert!(is_release_of("1.85.1", "1.85") && is_release_of("1.85.0", "1.85.0"));
        assert!(!is_release_of("1.850.0", "1.85") && !is_release_of("1.86.0", "1.85"));
    }
}
