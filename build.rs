//! Links the development build of the shared library as CMake links the one that is installed: programs ask for its
//! ABI, not for its file, and it stays mapped once it is.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libkvmprep.so.0");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
