//! Gives the library the name by which it is installed and preloaded: the loader then knows it again, whatever its file is
//! called where cargo has built it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libkvmprep-model.so");
}
