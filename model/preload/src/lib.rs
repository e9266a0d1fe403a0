//! `libkvmprep-model.so`: preloaded, it answers a program's `/dev/kvm` out of the software model.
//!
//! The program is not changed: it opens, maps and asks as ever, and its memory is its own. What it reaches through a
//! descriptor of the model goes to [`kvmprep_model`]; everything else goes on to the C library untouched. What is not modelled
//! fails with a message that names it, never silently. A program that wants more (guest accesses, failures, dumps) uses the
//! C header `kvmprep-model.h`.
//!
//! What is `unsafe` stands at the floor: where the C library is called, or calls.

pub mod clock;
pub mod control;
pub mod cpuid;
pub mod failing;
pub mod files;
pub mod fork;
pub mod guard;
pub mod heap;
pub mod host;
pub mod inside;
pub mod interpose;
pub mod ioctls;
pub mod mappings;
pub mod memfd;
pub mod named;
pub mod nested;
pub mod objects;
pub mod own;
pub mod real;
pub mod refuse;
pub mod registers;
pub mod request;
pub mod run;
pub mod run_page;
pub mod say;
pub mod settings;
pub mod snp;
pub mod stats;
pub mod steps;
pub mod system;
pub mod tdx;
pub mod transfers;
pub mod user;
pub mod vcpu;
pub mod vm;
