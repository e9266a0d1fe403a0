//! Builds c-tests/callers.c: one program in which callers of every age use the library of today.
//!
//! An age is a header: each that was recorded as it is; the newest as it would be if the outputs had only their first
//! fields, for each number of them; and the current one with more at the end of every struct that may grow. The
//! library's own header is included by none of them.

use super::record;
use super::text::{self, Growth};
use crate::programs::{C_FLAGS, Programs, model_headers, support_sources};
use crate::project;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The C test that is built here.
pub const NAME: &str = "callers";

/// A program's view of the library.
struct Age {
    name: String,
    header: String,
    flags: &'static [&'static str],
}

/// Builds the program.
pub fn build(built: &Programs) -> Result<PathBuf> {
    let dir = project::output()?.join(NAME);
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let ages = ages()?;
    let list = ages.iter().enumerate().map(|(i, age)| format!("CALLER_CASE(\"{}\", caller_{i})\n", age.name));
    std::fs::write(dir.join("callers-list.h"), list.collect::<String>())?;
    let objects = compile(&ages, &dir)?;
    let (tests, program) = (project::root().join("c-tests"), dir.join(NAME));
    let mut compiler = Command::new("cc");
    compiler.args(C_FLAGS).arg("-I").arg(project::root().join("include")).arg("-I").arg(&dir);
    compiler
        .arg("-I")
        .arg(&tests)
        .arg("-I")
        .arg(model_headers())
        .arg(tests.join("callers.c"))
        .args(support_sources(&tests.join("support"))?);
    compiler
        .args(objects)
        .arg("-L")
        .arg(built.library_dir())
        .args(["-lkvmprep", "-pthread", "-o"])
        .arg(&program);
    project::run(&mut compiler).context("c-tests/callers.c does not compile")?;
    Ok(program)
}

fn ages() -> Result<Vec<Age>> {
    let recorded = record::recorded()?;
    let Some(newest) = recorded.last() else {
        bail!("no interface is recorded: run `cargo xtask abi record`")
    };
    let mut ages: Vec<Age> = recorded
        .iter()
        .map(|recorded| Age {
            name: recorded.version.clone(),
            header: recorded.interface.header.clone(),
            flags: &[],
        })
        .collect();
    let header = &newest.interface.header;
    let longest = outputs(header).iter().map(|name| text::fields(header, name).len()).max().unwrap_or(0);
    ages.extend((1..longest).map(|n| Age {
        name: format!("{}, outputs cut to {n}", newest.version),
        header: outputs(header).iter().fold(header.clone(), |text, name| text::shortened(&text, name, n)),
        flags: &[],
    }));
    ages.push(Age {
        name: "newer".to_owned(),
        header: newer(&record::current()?.header),
        flags: &["-DCALLER_IS_NEWER", "-Wno-missing-field-initializers"],
    });
    Ok(ages)
}

fn outputs(header: &str) -> Vec<&str> {
    let is_output = |name: &&str| text::growth(header, name) == Some(Growth::Output);
    text::structs(header).into_iter().filter(is_output).collect()
}

/// What a later version could be: no alignment that is larger, no padding.
fn newer(header: &str) -> String {
    let growing = text::structs(header).into_iter().filter(|name| text::growth(header, name).is_some());
    growing.fold(header.to_owned(), |text, name| text::lengthened(&text, name, "uint32_t added_later[2];"))
}

/// One object for each age; as many at once as there are processors.
fn compile(ages: &[Age], dir: &Path) -> Result<Vec<PathBuf>> {
    let at_once = std::thread::available_parallelism().map_or(1, |n| n.get());
    let numbered: Vec<(usize, &Age)> = ages.iter().enumerate().collect();
    let shares: Vec<Result<Vec<PathBuf>>> = std::thread::scope(|scope| {
        let shares = numbered.chunks(numbered.len().div_ceil(at_once));
        let threads: Vec<_> = shares
            .map(|share| scope.spawn(|| share.iter().map(|(i, age)| compile_one(*i, age, dir)).collect()))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a compiling thread panicked")))
            .collect()
    });
    Ok(shares.into_iter().collect::<Result<Vec<_>>>()?.concat())
}

fn compile_one(i: usize, age: &Age, dir: &Path) -> Result<PathBuf> {
    let (include, object) = (dir.join(format!("age-{i}")), dir.join(format!("caller-{i}.o")));
    std::fs::create_dir_all(&include)?;
    std::fs::write(include.join("kvmprep.h"), text::without_asserts(&age.header))?;
    let tests = project::root().join("c-tests");
    let mut compiler = Command::new("cc");
    compiler.args(C_FLAGS).args(age.flags).arg(format!("-DCALLER=caller_{i}")).arg("-I").arg(include);
    compiler.arg("-I").arg(&tests).arg("-c").arg(tests.join("callers.c")).arg("-o").arg(&object);
    project::run(&mut compiler).with_context(|| format!("a caller of {} does not compile", age.name))?;
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_header_has_more_of_what_may_grow_and_of_nothing_else() {
        let header = record::current().unwrap().header;
        let newer = newer(&header);
        let count = |text: &str, name: &str| text::fields(text, name).len();
        for name in text::structs(&header) {
            let more = usize::from(text::growth(&header, name).is_some());
            assert_eq!(count(&newer, name), count(&header, name) + more, "{name}");
        }
    }

    #[test]
    fn all_that_the_header_calls_growing_is_found_to_be() {
        let header = record::current().unwrap().header;
        let inputs = ["kvmprep_vm_config", "kvmprep_populate_opts", "kvmprep_convert_opts"];
        assert!(inputs.iter().all(|name| text::growth(&header, name) == Some(Growth::Input)));
        assert_eq!(outputs(&header).len(), 7);
        let fixed = [
            "kvmprep_error",
            "kvmprep_range",
            "kvmprep_memslot",
            "kvmprep_backing_result",
            "kvmprep_visibility_run",
        ];
        assert!(fixed.iter().all(|name| text::growth(&header, name).is_none()));
    }
}
