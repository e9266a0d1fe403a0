//! Runs a test again with the library preloaded.

use std::path::PathBuf;
use std::process::{Command, Output};

/// Set where the library is loaded.
const INSIDE: &str = "KVMPREP_TEST_IS_PRELOADED";

/// Declares tests that run with the library preloaded.
macro_rules! preloaded {
    ($($(#[$meta:meta])* fn $name:ident() $body:block)*) => {
        $(
            $(#[$meta])*
            #[test]
            fn $name() {
                let name = concat!(module_path!(), "::", stringify!($name));
                crate::harness::run(name, &[], || $body);
            }
        )*
    };
}
pub(crate) use preloaded;

/// Runs the test of this name again with the library and these variables, or, where that is so already, its body. Answers what
/// was written on standard error.
pub fn run(name: &str, variables: &[(&str, &str)], body: impl FnOnce()) -> String {
    if std::env::var_os(INSIDE).is_some() {
        // What hangs is ended, and has failed: a busy machine is not to be taken for that.
        // SAFETY: a number is set.
        unsafe { libc::alarm(300) };
        body();
        return String::new();
    }
    // The crate's own name is not part of a test's.
    let (_, name) = name.split_once("::").expect("a path");
    let mut command = Command::new(std::env::current_exe().expect("this test"));
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(INSIDE, "1").env("LD_PRELOAD", library()).envs(variables.iter().copied());
    let Output { status, stdout, stderr } = command.output().expect("this test");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success() && stdout.contains("1 passed"), "{name}: {status}\n{stdout}\n{stderr}");
    stderr.into_owned()
}

/// Cargo builds it beside the tests.
pub fn library() -> PathBuf {
    let test = std::env::current_exe().expect("this test");
    let library = test.with_file_name("libkvmprep_model_preload.so");
    assert!(library.exists(), "{} is missing", library.display());
    library
}
