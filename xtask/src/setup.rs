//! Sees to it that the machine has the packages that one of our commands needs.
//!
//! As root it installs what is missing, so that a bare Debian with Rust is enough; anybody else is told the
//! exact command. It must never upgrade or remove anything.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Returns once all of `packages` are installed, or says what to type.
pub fn require_packages(packages: &[&str]) -> Result<()> {
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !is_root()? {
        bail!(
            "packages are missing. Type: sudo apt-get update && sudo apt-get install --no-install-recommends {}",
            missing.join(" ")
        );
    }
    eprintln!("installing {}", missing.join(" "));
    // The lists are usually there and good; a failed attempt is what shows that they are not. The update's
    // own result says little, since a third party's entry may fail: whether the install works is what counts.
    if install(&missing).is_err() {
        let _ = apt_get(&["update"]);
        install(&missing)?;
    }
    Ok(())
}

fn missing<'a>(packages: &[&'a str]) -> Result<Vec<&'a str>> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"])
        .args(packages)
        .stdin(Stdio::null())
        .output()
        .context("cannot run dpkg-query: our commands install what they need on Debian 12 or newer only")?;
    // Packages it has never heard of make it exit with 1, and are simply not listed.
    Ok(not_installed(packages, &String::from_utf8_lossy(&output.stdout)))
}

fn not_installed<'a>(packages: &[&'a str], listing: &str) -> Vec<&'a str> {
    let installed: Vec<&str> = listing.lines().filter_map(|line| line.strip_suffix(" installed")).collect();
    packages.iter().filter(|package| !installed.contains(package)).copied().collect()
}

fn install(packages: &[&str]) -> Result<()> {
    let mut arguments = vec!["install", "--yes", "--no-install-recommends", "--no-upgrade", "--no-remove"];
    arguments.extend(packages);
    apt_get(&arguments)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        // Another apt at work is waited for.
        .args(["--quiet", "-o", "DPkg::Lock::Timeout=300"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .context("cannot run apt-get")?;
    if !output.status.success() {
        bail!(
            "apt-get {} failed:\n{}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    Ok(())
}

fn is_root() -> Result<bool> {
    let output = Command::new("id").arg("-u").output().context("cannot run id")?;
    Ok(output.stdout.trim_ascii() == b"0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let listing = "gcc installed\nflex config-files\nbison not-installed\n";
        assert_eq!(not_installed(&["gcc", "flex", "bison", "bc"], listing), ["flex", "bison", "bc"]);
    }

    #[test]
    fn nothing_is_asked_for_nothing() {
        assert!(not_installed(&[], "").is_empty());
    }
}
