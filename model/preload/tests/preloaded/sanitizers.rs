//! Programs that are built with a sanitizer: they get no findings for what the model does, and work as they do without it.

use crate::harness::library;
use std::path::Path;
use std::process::{Command, Output};

/// Builds the program with a sanitizer and runs it with the library; answers with what was said, if it has failed.
fn run_with(sanitizer: &str, option: (&str, &str)) -> Result<(), String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/preloaded/sanitized.c");
    let directory = std::env::temp_dir();
    let program = directory.join(format!("kvmprep-model-{sanitizer}-{}", std::process::id()));
    let built = Command::new("cc")
        .args(["-g", "-pthread", &format!("-fsanitize={sanitizer}"), "-o"])
        .args([&program, &source])
        .output()
        .expect("a compiler, which Rust needs too");
    if !built.status.success() {
        println!("not built, so not run: {}", String::from_utf8_lossy(&built.stderr));
        return Ok(());
    }
    // A sanitizer may keep the program from ending itself.
    let mut limited = Command::new("timeout");
    limited.args(["--signal=KILL", "300"]).arg(&program);
    let run = limited.env("LD_PRELOAD", library()).env(option.0, option.1).output();
    std::fs::remove_file(&program).expect("the program");
    let Output { status, stderr, .. } = run.expect("the program");
    match status.success() {
        true => Ok(()),
        false => Err(format!("{status}\n{}", String::from_utf8_lossy(&stderr))),
    }
}

#[test]
fn thread_sanitizer_finds_nothing_in_the_model_and_forks() {
    run_with("thread", ("TSAN_OPTIONS", "")).unwrap();
}

#[test]
fn address_sanitizer_goes_with_the_model_if_it_need_not_be_the_first_library() {
    run_with("address", ("ASAN_OPTIONS", "verify_asan_link_order=0")).unwrap();
}
