//! An interface as the C compiler understands it: what a header and a list of symbol versions amount to.
//!
//! Functions with their types become a shared library of empty functions, since libabigail reads libraries;
//! constants, initialisers and alignments become lines with their values, since it cannot see those. Nothing here
//! knows which interface is the current one, or which should be.

use super::{SONAME, text};
use crate::project;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A header, and the versions of its functions.
#[derive(Clone, PartialEq)]
pub struct Interface {
    pub header: String,
    pub map: String,
}

/// Flags that do not change what is declared; a header's own claims about sizes are tested elsewhere.
const FLAGS: [&str; 5] = ["-std=c11", "-g", "-O0", "-Werror", "-Wno-unused-parameter"];

impl Interface {
    /// Compiles the library whose debug information tells the types. `dir` is for this one alone.
    pub fn library(&self, dir: &Path) -> Result<PathBuf> {
        let (source, map, library) =
            (dir.join("interface.c"), dir.join("kvmprep.map"), dir.join("interface.so"));
        self.write_header(dir)?;
        std::fs::write(&map, &self.map)?;
        let functions = text::prototypes(&self.header);
        ensure!(!functions.is_empty(), "no function found in the header: the check is broken");
        let bodies =
            functions.iter().map(|(_, declaration)| format!("{declaration} {{ __builtin_trap(); }}\n"));
        std::fs::write(&source, format!("#include \"kvmprep.h\"\n{}", bodies.collect::<String>()))?;
        let mut compiler = Command::new("cc");
        compiler.args(FLAGS).args(["-shared", "-fPIC", "-nostdlib"]).arg(format!("-Wl,-soname,{SONAME}"));
        compiler.arg(format!("-Wl,--version-script={}", map.display())).arg(&source).arg("-o").arg(&library);
        project::run(&mut compiler).context("the header's functions do not compile")?;
        Ok(library)
    }

    /// What no library tells: each constant with its type, each initialiser's bytes, each struct's alignment.
    pub fn values(&self, dir: &Path) -> Result<BTreeMap<String, String>> {
        let (source, program) = (dir.join("values.c"), dir.join("values"));
        self.write_header(dir)?;
        std::fs::write(&source, self.values_source())?;
        let mut compiler = Command::new("cc");
        compiler.args(FLAGS).arg(&source).arg("-o").arg(&program);
        project::run(&mut compiler).context("the header's constants do not compile")?;
        let said = project::run(&mut Command::new(&program))?;
        Ok(said
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect())
    }

    fn values_source(&self) -> String {
        let mut body = String::new();
        // The version's own number is another one in each.
        for name in text::constants(&self.header).iter().filter(|name| **name != "KVMPREP_VERSION") {
            body += &format!("    NUMBER({name});\n");
        }
        for (name, structure) in text::initialisers(&self.header) {
            body += &format!(
                "    {{ struct {structure} value = {name}; bytes(\"{name}\", &value, sizeof(value)); }}\n"
            );
        }
        for name in text::structs(&self.header) {
            body += &format!("    printf(\"alignment of struct {name}=%zu\\n\", _Alignof(struct {name}));\n");
        }
        format!("{VALUES_HEAD}{body}    return 0;\n}}\n")
    }

    fn write_header(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir)?;
        Ok(std::fs::write(dir.join("kvmprep.h"), text::without_asserts(&self.header))?)
    }
}

const VALUES_HEAD: &str = r#"#include "kvmprep.h"
#include <stdio.h>
#define TYPE(x) _Generic((x), int: "int", unsigned: "unsigned int", long: "long", unsigned long: "unsigned long", \
                              long long: "long long", unsigned long long: "unsigned long long")
#define NUMBER(name) printf("%s=%s %lld\n", #name, TYPE(name), (long long)(name))
static inline void bytes(const char *name, const void *value, size_t size) {
    printf("%s=", name);
    for (size_t i = 0; i < size; i++)
        printf("%02x", ((const unsigned char *)value)[i]);
    printf("\n");
}
int main(void) {
"#;

/// What libabigail has to say of two libraries: nothing when they are alike.
pub fn difference(old: &Path, new: &Path, options: &[&str]) -> Result<Option<String>> {
    let mut abidiff = Command::new("abidiff");
    // Renamed fields are harmless to it, not to a program that is compiled anew, nor when two were swapped.
    abidiff
        .args(["--harmless", "--no-default-suppression", "--no-show-locs"])
        .args(options)
        .arg(old)
        .arg(new);
    let output = abidiff.output().context("cannot start abidiff")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // Bits: 1 it failed, 2 it was called wrongly, 4 there is a change, 8 one that is surely incompatible.
    let status = output.status.code().unwrap_or(1);
    ensure!(status & 3 == 0, "abidiff failed: {said}{}", String::from_utf8_lossy(&output.stderr));
    Ok((status != 0).then_some(said))
}
