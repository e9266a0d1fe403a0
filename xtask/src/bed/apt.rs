//! A private apt: its own lists, state and source list, in the bed's cache.
//!
//! It lets packages of other releases be looked up, verified and unpacked by the machine's own apt without
//! the machine noticing. It must never install anything, and never touch the machine's own lists or
//! configuration; what it leaves as it is, is how to reach the network (proxies and the like).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result};

use super::cache::{Cache, Lock};
use super::mirror::Mirror;
use super::process::{self, Captured};
use super::{Unavailable, progress};

/// Every suite anything of the bed is taken from. A mirror without one of them serves the rest.
const SUITES: [&str; 6] = ["bookworm", "bookworm-backports", "trixie", "trixie-backports", "forky", "sid"];

/// The architecture of all but what is asked for by another name.
const ARCHITECTURE: &str = "amd64";

/// What Debian calls the architecture of a source package.
const SOURCE: &str = "source";

/// The private apt.
pub struct Apt<'a> {
    dir: PathBuf,
    _lock: Lock,
    mirror: Mirror,
    updated: &'a Updated,
}

/// What updating the lists complained about, once that has been done. One run of ours needs it once.
pub type Updated = OnceLock<Option<String>>;

impl<'a> Apt<'a> {
    /// An apt with its lists in `cache`, fetching from `mirror`. There is only one at a time.
    pub fn new(cache: &Cache, mirror: Mirror, updated: &'a Updated) -> Result<Self> {
        let (dir, lock) = cache.scratch("apt")?;
        Ok(Apt { dir, _lock: lock, mirror, updated })
    }

    /// Names of the packages in `suites` that match a regular expression.
    pub fn names(&self, suites: &[&str], pattern: &str) -> Result<Vec<String>> {
        let mut command = self.command("apt-cache", suites)?;
        let found = process::capture(command.args(["search", "--names-only", pattern]))?.or_fail()?;
        Ok(found.stdout.lines().filter_map(|line| Some(line.split_once(' ')?.0.to_string())).collect())
    }

    /// Downloads `packages` from `suites` and unpacks them into `into`. Answers with their versions.
    pub fn unpack(&self, suites: &[&str], packages: &[String], into: &Path) -> Result<Vec<String>> {
        let mut command = self.command("apt-get", suites)?;
        let work = tempfile::tempdir_in(&self.dir)?;
        let got = process::capture(command.arg("download").args(packages).current_dir(work.path()))?;
        self.check(got, packages)?;
        unpack_all(work.path(), into)
    }

    /// The same, together with everything they depend on, libc included.
    pub fn unpack_with_dependencies(&self, suites: &[&str], packages: &[String], into: &Path) -> Result<()> {
        let mut command = self.command("apt-get", suites)?;
        let work = tempfile::tempdir_in(&self.dir)?;
        fs::create_dir(work.path().join("partial"))?;
        command.arg("-o").arg(format!("Dir::Cache::Archives={}", work.path().display()));
        // Backports are never chosen unasked: the last suite named is the one that is meant.
        command.args(suites.last().map(|suite| format!("--target-release={suite}")));
        command.args(["install", "--download-only", "--yes", "--no-install-recommends"]).args(packages);
        self.check(process::capture(&mut command)?, packages)?;
        unpack_all(work.path(), into).map(drop)
    }

    /// Downloads `packages` of another `architecture` and unpacks them into `into`. Its lists are fetched for this
    /// alone; nothing else sees them.
    pub fn unpack_foreign(
        &self,
        architecture: &str,
        suites: &[&str],
        packages: &[String],
        into: &Path,
    ) -> Result<()> {
        let complaint = self.update(suites, architecture)?.unwrap_or_default();
        let mut command = self.bare_command("apt-get", suites, architecture)?;
        let work = tempfile::tempdir_in(&self.dir)?;
        let got = process::capture(command.arg("download").args(packages).current_dir(work.path()))?;
        self.check(got, packages).with_context(|| format!("packages for {architecture} {complaint}"))?;
        unpack_all(work.path(), into).map(drop)
    }

    /// Downloads the newest source package `name` in `suites`, verified and still packed, into `into`. Answers with
    /// its version. Its lists are fetched for this alone, too.
    pub fn source(&self, suites: &[&str], name: &str, into: &Path) -> Result<String> {
        let complaint = self.update(suites, SOURCE)?.unwrap_or_default();
        let mut command = self.bare_command("apt-get", suites, SOURCE)?;
        fs::create_dir_all(into)?;
        command.args(["source", "--download-only", "--only-source", name]).current_dir(into);
        self.check(process::capture(&mut command)?, &[name.to_string()])
            .with_context(|| format!("the source of {name} {complaint}"))?;
        source_version(into).with_context(|| format!("apt left no source of {name}"))
    }

    /// A package that cannot be had is not a failure of the bed's, and is told apart.
    fn check(&self, got: Captured, packages: &[String]) -> Result<()> {
        if got.success {
            return Ok(());
        }
        Err(self.unavailable(&format!(
            "{} could not be downloaded: {}",
            packages.join(" "),
            got.stderr.trim()
        )))
        .context("the package mirror did not deliver")
    }

    /// Says that something is missing, with what apt complained about earlier, which is often the reason.
    pub fn unavailable(&self, what: &str) -> Unavailable {
        match self.updated.get().and_then(Option::as_deref) {
            Some(complaint) => Unavailable(format!("{what}\n(apt's update of the lists said: {complaint})")),
            None => Unavailable(what.to_string()),
        }
    }

    /// An apt command that sees `suites` and nothing else, after the lists have been brought up to date.
    fn command(&self, tool: &str, suites: &[&str]) -> Result<Command> {
        if self.updated.get().is_none() {
            let complaint = self.update(&SUITES, ARCHITECTURE)?;
            let _ = self.updated.set(complaint);
        }
        self.bare_command(tool, suites, ARCHITECTURE)
    }

    /// Fetches the lists. A suite that fails leaves the others usable, so that whether this matters is seen
    /// only when a package is missed. Unsigned or wrongly signed lists are refused by apt itself.
    fn update(&self, suites: &[&str], architecture: &str) -> Result<Option<String>> {
        let _step = progress::step("fetching package lists");
        for name in ["state", "lists/partial", "cache"] {
            fs::create_dir_all(self.dir.join(name))?;
        }
        // An empty status file: nothing counts as installed, so dependencies are complete.
        fs::write(self.dir.join("status"), "")?;
        let updated = process::capture(self.bare_command("apt-get", suites, architecture)?.arg("update"))?;
        // What could not be reached is only a warning to apt.
        let telling = |line: &&str| line.starts_with("E:") || line.starts_with("W: Failed");
        // One a suite would say the same six times.
        let complaints: Vec<&str> = updated.stderr.lines().filter(telling).take(2).collect();
        Ok((!complaints.is_empty()).then(|| complaints.join(" ")))
    }

    fn bare_command(&self, tool: &str, suites: &[&str], architecture: &str) -> Result<Command> {
        let view = self.dir.join(format!("{}@{architecture}", suites.join("+")));
        let (sources, configuration) = (view.with_extension("sources"), view.with_extension("conf"));
        fs::write(&sources, source_list(&self.mirror, suites, architecture))?;
        fs::write(&configuration, self.configuration(&sources, architecture))?;
        let mut command = Command::new(tool);
        // Read after the machine's own configuration, unlike APT_CONFIG, and so the last word.
        command.arg("--config-file").arg(&configuration).arg("--quiet");
        command.env_remove("APT_CONFIG").env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        Ok(command)
    }

    fn configuration(&self, sources: &Path, architecture: &str) -> String {
        let dir = self.dir.display();
        let architecture = if architecture == SOURCE { ARCHITECTURE } else { architecture };
        // The hooks of the machine's configuration are about the machine's lists, and may delete its caches.
        // Each suite set is another view of the same lists, which a package cache file would confuse. "_apt"
        // cannot read a home directory.
        format!(
            r##"Dir::Etc::SourceList "{sources}";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{dir}/state";
Dir::State::Lists "{dir}/lists";
Dir::State::Status "{dir}/status";
Dir::Cache "{dir}/cache";
Dir::Cache::PkgCache "";
Dir::Cache::SrcPkgCache "";
Dir::Log "{dir}/log";
#clear APT::Architectures;
APT::Architecture "{architecture}";
APT::Architectures {{ "{architecture}"; }};
APT::Get::List-Cleanup "false";
APT::Default-Release "";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "3";
#clear APT::Update;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Post-Invoke;
"##,
            sources = sources.display(),
        )
    }
}

fn source_list(mirror: &Mirror, suites: &[&str], architecture: &str) -> String {
    let signed_by =
        mirror.signed_by.as_ref().map(|value| format!("Signed-By: {value}\n")).unwrap_or_default();
    let kind = match architecture {
        SOURCE => "Types: deb-src\nTargets: Sources\n".to_string(),
        _ => format!("Types: deb\nTargets: Packages\nArchitectures: {architecture}\n"),
    };
    format!("{kind}URIs: {}\nSuites: {}\nComponents: main\n{signed_by}", mirror.uri, suites.join(" "))
}

/// The version that the one source description in `dir` gives.
fn source_version(dir: &Path) -> Result<String> {
    let mut files = fs::read_dir(dir)?.flatten().map(|entry| entry.path());
    let description = files.find(|path| path.extension().is_some_and(|extension| extension == "dsc"));
    let text = fs::read_to_string(description.context("it has no description")?)?;
    let version = text.lines().find_map(|line| line.strip_prefix("Version: "));
    Ok(version.context("its description names no version")?.trim().to_string())
}

/// Unpacks every package in `from`, in order of name, and answers with their versions.
fn unpack_all(from: &Path, into: &Path) -> Result<Vec<String>> {
    let mut archives: Vec<PathBuf> = fs::read_dir(from)?.flatten().map(|entry| entry.path()).collect();
    archives.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    archives.sort();
    fs::create_dir_all(into)?;
    let mut versions = Vec::new();
    for archive in &archives {
        process::capture(Command::new("dpkg-deb").arg("-x").arg(archive).arg(into))?.or_fail()?;
        let field =
            process::capture(Command::new("dpkg-deb").arg("-f").arg(archive).arg("Version"))?.or_fail()?;
        versions.push(field.stdout.trim().to_string());
    }
    Ok(versions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_source_list_names_only_the_suites_asked_for() {
        let mirror = Mirror { uri: "ftp://mirror.example/debian".into(), signed_by: Some("/k.gpg".into()) };
        let text = source_list(&mirror, &["trixie", "sid"], "arm64");
        assert!(text.contains("URIs: ftp://mirror.example/debian\nSuites: trixie sid\n"), "{text}");
        assert!(text.contains("\nArchitectures: arm64\n"), "{text}");
        assert!(text.ends_with("Signed-By: /k.gpg\n"), "{text}");
        let sources = source_list(&mirror, &["trixie"], SOURCE);
        assert!(sources.starts_with("Types: deb-src\n") && !sources.contains("Architectures"), "{sources}");
        assert!(!source_list(&Mirror { signed_by: None, ..mirror }, &["sid"], "amd64").contains("Signed-By"));
    }
}
