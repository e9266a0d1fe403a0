//! Names the shared library: programs linked against it ask for its ABI, not for its file.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvmprep.so.0");
}
