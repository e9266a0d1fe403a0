//! Judges the software model as it is installed: what the option adds to the tree, what the preloaded library shows of itself,
//! and a test suite that finds it there.
//!
//! What the model answers is judged elsewhere. Where there is no model of the processor, it only sees to it that this is said.

use super::consumers::{self, Places};
use super::tree::{self, MODEL_PAGE, Tree};
use crate::abi::text;
use crate::lanes::Lane;
use crate::man;
use crate::programs::{self, C_FLAGS};
use crate::project;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Its file, and the name by which the loader finds it and knows it again.
const NAME: &str = "libkvmprep-model.so";

/// `plain` was installed without the option, `with_model` by `cargo xtask install --model`.
pub fn check(lane: &mut Lane, plain: &Tree, with_model: Tree, places: &Places, work: &Path) {
    let library = with_model.prefix.join("lib").join(NAME);
    lane.check("the model is a component of its own", is_one_component(plain, &with_model, work));
    lane.check("the model: what it exports", exports(&library));
    lane.check("the model: its soname", has_soname(&library));
    lane.check("the model: what it needs", tree::check_needed(&library));
    lane.check("the model: relro, stack", tree::check_hardening(&library));
    lane.check("the model: pkg-config", pkg_config(&with_model, &library));
    lane.check("the model is stripped where that is asked for", is_stripped_where_asked(&library, work));
    lane.check("the model is refused for another processor", is_refused_elsewhere(places, work));
    let said = consumers::check_without_model(&places.projects, &plain.prefix, &work.join("no model"));
    lane.check("without the model, find_package says so", said);
    let places = Places {
        projects: places.projects.clone(),
        prefix: with_model.prefix,
        source: places.source.clone(),
    };
    consumers::check_with_model(lane, &places);
    lane.check("the model: the manual's example prints what the manual says", example(&places.prefix, work));
}

/// The option adds what the component has, and changes nothing else.
fn is_one_component(plain: &Tree, with_model: &Tree, work: &Path) -> Result<()> {
    let of_model = ["lib/libkvmprep-model.so", "lib/pkgconfig/kvmprep-model.pc", "include/kvmprep-model.h"];
    let mut of_model: BTreeSet<PathBuf> = of_model.map(PathBuf::from).into();
    of_model.insert(Path::new("share/man/man7").join(MODEL_PAGE));
    let names = |tree: &Tree| -> Result<BTreeSet<PathBuf>> { Ok(tree.files()?.into_keys().collect()) };
    let (before, after) = (names(plain)?, names(with_model)?);
    let added: BTreeSet<PathBuf> = after.difference(&before).cloned().collect();
    ensure!(added == of_model && before.is_subset(&after), "added {added:?}");
    let component = Tree { prefix: work.join("component"), version: plain.version.clone() };
    install_component(&component.prefix, &[])?;
    let component = names(&component)?;
    ensure!(component == of_model, "the component has {component:?}");
    Ok(())
}

fn install_component(prefix: &Path, options: &[&str]) -> Result<()> {
    let build = project::output()?.join("build");
    let _alone = super::lock(&build.with_extension("lock"))?;
    let mut install = Command::new("cmake");
    install.env_remove("DESTDIR").arg("--install").arg(build).args(["--component", "kvmprep_model"]);
    project::run(install.args(options).arg("--prefix").arg(prefix)).map(drop)
}

/// `cmake --install --strip` takes the symbols off that nobody needs, and leaves those that are shown.
fn is_stripped_where_asked(library: &Path, work: &Path) -> Result<()> {
    let prefix = work.join("stripped");
    install_component(&prefix, &["--strip"])?;
    let stripped = prefix.join("lib").join(NAME);
    let has_symbols =
        |library: &Path| -> Result<bool> { Ok(tree::readelf("--sections", library)?.contains(" .symtab ")) };
    ensure!(has_symbols(library)?, "there is nothing to be stripped: the check is broken");
    ensure!(!has_symbols(&stripped)?, "{} still has its symbols", stripped.display());
    exports(&stripped)
}

/// It may show the functions of its header, and those of the C library before which it stands: anything else, such as a part of
/// the Rust runtime, would be found by the program in place of its own.
fn exports(library: &Path) -> Result<()> {
    let shown = tree::symbols(library, "--dynamic")?;
    let header = std::fs::read_to_string(programs::model_headers().join("kvmprep-model.h"))?;
    let declared = text::prototypes(&header).into_iter();
    let declared: BTreeSet<String> =
        declared.filter(|(_, text)| text.starts_with("KVMPREP_MODEL_WEAK ")).map(|(name, _)| name).collect();
    ensure!(declared.contains("kvmprep_model_set_steps"), "the header declares {declared:?}");
    let missing: Vec<_> = declared.difference(&shown).collect();
    ensure!(missing.is_empty(), "not exported: {missing:?}");
    let libc = project::run(Command::new("cc").arg("-print-file-name=libc.so.6"))?;
    let of_libc = tree::symbols(Path::new(libc.trim()), "--dynamic")?;
    let of_libc: BTreeSet<&str> = of_libc.iter().filter_map(|name| name.split('@').next()).collect();
    ensure!(of_libc.contains("ioctl"), "the C library has no ioctl: the check is broken");
    let is_known = |name: &&String| declared.contains(*name) || of_libc.contains(name.as_str());
    let stray: Vec<_> = shown.iter().filter(|name| !is_known(name)).collect();
    ensure!(stray.is_empty(), "exported, and neither the header's nor the C library's: {stray:?}");
    Ok(())
}

fn has_soname(library: &Path) -> Result<()> {
    let dynamic = tree::readelf("--dynamic", library)?;
    ensure!(dynamic.contains(&format!("Library soname: [{NAME}]")), "{dynamic}");
    Ok(())
}

fn pkg_config(tree: &Tree, library: &Path) -> Result<()> {
    let (libdir, include) = (tree.prefix.join("lib"), tree.prefix.join("include"));
    let paths: [(&str, &Path); 3] = [("preload", library), ("libdir", &libdir), ("includedir", &include)];
    tree.check_module("kvmprep-model", &libdir, &paths)
}

/// Built and run as the page has it.
fn example(prefix: &Path, work: &Path) -> Result<()> {
    let (code, expected) = man::model_example()?;
    std::fs::create_dir_all(work)?;
    let (source, program) = (work.join("example.c"), work.join("example"));
    std::fs::write(&source, code)?;
    let mut compiler = Command::new("cc");
    compiler.args(C_FLAGS).arg("-I").arg(prefix.join("include")).arg(&source).arg("-o").arg(&program);
    project::run(&mut compiler)?;
    let mut run = Command::new("timeout");
    run.args(["--kill-after=5", "300", "env", &format!("LD_PRELOAD={NAME}")]).arg(&program);
    let printed = project::run(run.env("LD_LIBRARY_PATH", prefix.join("lib")))?;
    ensure!(printed == expected, "it prints\n{printed}and the manual says\n{expected}");
    Ok(())
}

/// Before anything is built.
fn is_refused_elsewhere(places: &Places, work: &Path) -> Result<()> {
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(&places.source).arg("-B").arg(work.join("elsewhere"));
    configure.args(["-DKVMPREP_MODEL=ON", "-DKVMPREP_RUST_TARGET=aarch64-unknown-linux-gnu"]);
    let refused = project::run(&mut configure);
    let said = refused.err().context("it was taken")?.to_string();
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(said.contains("the software model is of KVM on x86-64"), "{said}");
    Ok(())
}
