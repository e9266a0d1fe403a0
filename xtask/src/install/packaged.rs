//! Judges what a distribution's packager does: another place, components, an archive left out, cargo's options, a new
//! version.
//!
//! It takes the tree that was built already, and never builds the library anew.

use super::consumers::{self, Places};
use super::lane::beneath;
use super::tree::Tree;
use crate::lanes::Lane;
use crate::project;
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// Where Debian has libraries, beneath the prefix.
const LIBDIR: &str = "lib/x86_64-linux-gnu";
const COMPONENTS: &[&str] = &["runtime", "development", "static"];

/// `tree` was installed from the build in `places.source`.
pub fn check(lane: &mut Lane, tree: &Tree, places: &Places, work: &Path) {
    let package = Package { places, work };
    lane.check("without the archive, find_package goes on", package.archive_deleted(tree));
    lane.check("the components are all, and work without the static one", package.components(tree));
    lane.check("options for cargo, in one string", package.cargo_flags());
    lane.check("in /usr, pkg-config names no directory", package.in_usr());
    lane.check("a directory for documents", package.document_directory());
    lane.check("a version that only Cargo.toml has is refused", package.new_version(&tree.version));
}

struct Package<'a> {
    places: &'a Places,
    work: &'a Path,
}

impl Package<'_> {
    /// The archive alone is deleted, or put in another package: CMake's files stay as they were installed.
    fn archive_deleted(&self, tree: &Tree) -> Result<()> {
        let prefix = self.work.join("archive deleted");
        std::fs::create_dir_all(self.work)?;
        project::run(Command::new("cp").arg("-a").arg(&tree.prefix).arg(&prefix))?;
        std::fs::remove_file(prefix.join("lib/libkvmprep.a"))?;
        consumers::check_without_archive(&self.places.projects, &prefix)
    }

    fn components(&self, tree: &Tree) -> Result<()> {
        let (one_by_one, two) = (self.work.join("components"), self.work.join("two components"));
        self.configure(&["-DCMAKE_INSTALL_LIBDIR=lib"])?;
        for component in COMPONENTS {
            self.install_component(component, &one_by_one)?;
        }
        let installed = Tree { prefix: one_by_one, version: tree.version.clone() }.files()?;
        let (installed, all): (Vec<_>, Vec<_>) =
            (installed.into_keys().collect(), tree.files()?.into_keys().collect());
        ensure!(installed == all, "by components {installed:?}, at once {all:?}");
        for component in COMPONENTS.iter().filter(|component| **component != "static") {
            self.install_component(component, &two)?;
        }
        consumers::check_without_archive(&self.places.projects, &two)
    }

    fn install_component(&self, component: &str, prefix: &Path) -> Result<()> {
        let component = format!("kvmprep_{component}");
        self.cmake(&["--install", "build", "--component", &component, "--prefix"], Some(prefix)).map(drop)
    }

    /// An option that shows proves that they arrive; --locked is among cargo's own already.
    fn cargo_flags(&self) -> Result<()> {
        for flags in ["--offline --locked --message-format=json", "--locked;--message-format=json"] {
            self.configure(&[&format!("-DKVMPREP_CARGO_FLAGS={flags}")])?;
            let said = self.cmake(&["--build", "build"], None)?;
            ensure!(said.contains("\"reason\":\"build-finished\""), "{flags} did not reach cargo:\n{said}");
        }
        Ok(())
    }

    /// There pkg-config is to name no directory: `-I/usr/include` changes the order in which headers are found.
    fn in_usr(&self) -> Result<()> {
        let destdir = self.work.join("in usr");
        self.configure(&["-DCMAKE_INSTALL_PREFIX=/usr", &format!("-DCMAKE_INSTALL_LIBDIR={LIBDIR}")])?;
        let mut install = self.command(&["--install", "build", "--component", "kvmprep_development"]);
        project::run(install.env("DESTDIR", &destdir))?;
        let mut ask = Command::new("pkg-config");
        ask.env("PKG_CONFIG_PATH", beneath(&destdir, "/usr").join(LIBDIR).join("pkgconfig"));
        let flags = project::run(ask.args(["--cflags", "--libs", "kvmprep"]))?;
        ensure!(flags.trim() == "-lkvmprep", "pkg-config says {flags}");
        Ok(())
    }

    fn document_directory(&self) -> Result<()> {
        let prefix = self.work.join("documents");
        self.configure(&["-DCMAKE_INSTALL_DOCDIR=share/doc/elsewhere"])?;
        self.install_component("runtime", &prefix)?;
        let licence = prefix.join("share/doc/elsewhere/LICENSE-MIT");
        ensure!(licence.exists(), "no {}", licence.display());
        Ok(())
    }

    fn new_version(&self, version: &str) -> Result<()> {
        let source = self.work.join("new version");
        for name in ["CMakeLists.txt", "cmake", "include", "abi", "Cargo.toml"] {
            std::fs::create_dir_all(&source)?;
            project::run(Command::new("cp").arg("-a").arg(self.places.source.join(name)).arg(&source))?;
        }
        let manifest = source.join("Cargo.toml");
        let text = std::fs::read_to_string(&manifest)?;
        let text = text.replacen(&format!("\nversion = \"{version}\""), "\nversion = \"77.0.1\"", 1);
        std::fs::write(&manifest, text)?;
        let mut configure = Command::new("cmake");
        configure.arg("-S").arg(&source).arg("-B").arg(source.join("build"));
        let refused = project::run(&mut configure);
        let said = refused.err().context("it was built")?.to_string();
        let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
        let to_do = "Set KVMPREP_VERSION in src/abi/error.rs to 0x4d0001, then type: cargo xtask abi header";
        ensure!(said.contains(to_do), "{said}");
        Ok(())
    }

    /// With these options and no earlier ones.
    fn configure(&self, options: &[&str]) -> Result<()> {
        let fresh = ["-B", "build", "-UCMAKE_INSTALL_*", "-UKVMPREP_*"];
        self.cmake(&[&fresh, options].concat(), None).map(drop)
    }

    fn cmake(&self, arguments: &[&str], last: Option<&Path>) -> Result<String> {
        project::run(self.command(arguments).args(last))
    }

    /// CMake, on the source that is built already.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("cmake");
        command.current_dir(&self.places.source).args(arguments).env_remove("DESTDIR");
        command
    }
}
