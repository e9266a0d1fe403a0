//! Whether any program can include the header: every language standard and compiler, with every warning an error,
//! alone and beside the kernel's own header, in either order.

use super::{header, promise};
use crate::bed::{Bed, KernelHeaders, ResolveError};
use crate::lanes::{Counts, Lane};
use crate::project;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Compilers of C with the standards that they know. The last is C23 before it was finished.
const C: [&str; 2] = ["gcc", "clang-19"];
const C_STANDARDS: [&str; 4] = ["c99", "c11", "c17", "c2x"];
const CPP: [&str; 2] = ["g++", "clang++-19"];
const CPP_STANDARDS: [&str; 3] = ["c++11", "c++17", "c++20"];

const WARNINGS: [&str; 9] = [
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Wconversion",
    "-Wredundant-decls",
    "-Wundef",
    // Padding that is not spelled out would be garbage in what a caller passes.
    "-Wpadded",
    "-Werror",
    "-fsyntax-only",
];

/// Included twice, through a file as a user does: a header compiled by itself is a main file to clang.
const USER: &str = "\
#include <stdio.h>
BEFORE
#include <kvmprep.h>
#include <kvmprep.h>
AFTER
struct kvmprep_populate_opts opts = KVMPREP_POPULATE_OPTS_INIT;
struct kvmprep_vm_config config = KVMPREP_VM_CONFIG_INIT;
struct kvmprep_memslot slot = KVMPREP_MEMSLOT_INIT;
int print(void);
int print(void) { return printf(\"%u\", KVMPREP_NO_SLOT); }
";

/// The packages of the compilers.
pub const PACKAGES: &[&str] = &["clang-19", "g++", "gcc", "libc6-dev"];

/// What the header is compiled beside.
struct Beside {
    name: String,
    before: &'static str,
    after: &'static str,
    headers: Option<PathBuf>,
}

/// Adds a check for each neighbour, alone first. Kernel headers that cannot be had here are skipped, and said to be.
pub fn check(lane: &mut Lane, bed: &Bed) {
    let alone = Beside { name: "alone".into(), before: "", after: "", headers: None };
    check_beside(lane, &alone);
    let before = "#define KVMPREP_EXPERIMENTAL\n";
    check_beside(lane, &Beside { name: format!("with {}", promise::MACRO), before, ..alone });
    for name in KernelHeaders::NAMES {
        match bed.kernel_headers(name) {
            Ok(headers) => beside_kernel(lane, &headers),
            Err(ResolveError::Unavailable(why)) => {
                let skipped = Counts { skipped: 1, ..Counts::default() };
                lane.add(&format!("kernel headers {name}: cannot be had here: {why}"), skipped, "");
            }
            Err(ResolveError::Failed(error)) => lane.check(&format!("kernel headers {name}"), Err(error)),
        }
    }
    lane.check("the header defines no name but its own", own_names());
}

fn beside_kernel(lane: &mut Lane, headers: &KernelHeaders) {
    let kernel = "#include <linux/kvm.h>\n";
    for (place, before, after) in [("after", kernel, ""), ("before", "", kernel)] {
        let name = format!("{place} <linux/kvm.h> of {}", headers.version());
        check_beside(lane, &Beside { name, before, after, headers: Some(headers.dir().to_path_buf()) });
    }
}

fn check_beside(lane: &mut Lane, beside: &Beside) {
    let c = C.iter().flat_map(|compiler| C_STANDARDS.map(|standard| (*compiler, "c", standard)));
    let cpp = CPP.iter().flat_map(|compiler| CPP_STANDARDS.map(|standard| (*compiler, "c++", standard)));
    let (mut counts, mut details) = (Counts::default(), String::new());
    for (compiler, language, standard) in c.chain(cpp) {
        match compile(compiler, language, standard, beside) {
            Ok(()) => counts.passed += 1,
            Err(error) => {
                counts.failed += 1;
                details += &format!("{compiler} -std={standard}: {error:#}\n");
            }
        }
    }
    lane.add(&format!("the header, {}", beside.name), counts, &details);
}

fn compile(compiler: &str, language: &str, standard: &str, beside: &Beside) -> Result<()> {
    let mut command = Command::new(compiler);
    command.arg(format!("-std={standard}")).args(WARNINGS);
    if language == "c" {
        command.args(["-Wc++-compat", "-Wstrict-prototypes"]);
    }
    let user = project::output()?.join("header-user.c");
    std::fs::write(&user, USER.replace("BEFORE\n", beside.before).replace("AFTER\n", beside.after))?;
    // Before the machine's own, and with its warnings left to the kernel's people.
    command.args(beside.headers.iter().flat_map(|dir| [Path::new("-isystem"), dir.as_path()]));
    command.arg("-I").arg(header_dir()?).args(["-x", language]).arg(user);
    project::run(&mut command).map(drop)
}

/// Every macro that the header leaves behind has our prefix, the three headers that it includes apart.
fn own_names() -> Result<()> {
    let includes = "#include <stddef.h>\n#include <stdint.h>\n#include <stdbool.h>\n";
    let with = format!("{includes}#include <kvmprep.h>\n");
    let (standard, all) = (macros(includes)?, macros(&with)?);
    let added: Vec<&String> = all.iter().filter(|name| !standard.contains(name)).collect();
    ensure!(added.len() > 50, "only {added:?} defined: the check is broken");
    let foreign: Vec<_> = added.into_iter().filter(|name| !name.starts_with("KVMPREP_")).collect();
    if !foreign.is_empty() {
        bail!("macros that programs may use themselves: {foreign:?}");
    }
    Ok(())
}

fn macros(text: &str) -> Result<Vec<String>> {
    let source = project::output()?.join("header-macros.c");
    std::fs::write(&source, text)?;
    let mut compiler = Command::new("gcc");
    let said = project::run(compiler.args(["-dM", "-E", "-I"]).arg(header_dir()?).arg(source))?;
    let names = said.lines().filter_map(|line| line.strip_prefix("#define ")?.split([' ', '(']).next());
    Ok(names.map(str::to_owned).collect())
}

fn header_dir() -> Result<PathBuf> {
    header::path().parent().map(Path::to_path_buf).context("the header has no directory")
}
