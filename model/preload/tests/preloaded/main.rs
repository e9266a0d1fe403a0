//! Programs with `libkvmprep-model.so` preloaded.
//!
//! Each test runs itself once more, in a process of its own into which the library is loaded, and there does with KVM what a VMM
//! does: by system calls of the C library, which are the model's then. Nothing here is linked against the model.

mod control;
mod descriptors;
mod guest;
mod harness;
mod kvm;
mod launch;
mod memory;
mod nested;
mod paths;
mod refusals;
mod registers;
mod sanitizers;
