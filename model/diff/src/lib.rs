//! Random programs of KVM operations, run on a real kernel and on the model, which must agree.
//!
//! `diff_model` compares the kernel that it runs on with the model, `find_mistakes` sees that the comparison would notice a
//! model that is wrong. Both must run alone on their machine and as root, since they set the policies for huge pages and
//! take a pool of them: the bed is the place for them (`cargo xtask bed diff model`). What is here is for these two programs
//! and promises nothing to others.

pub mod campaign;
pub mod comparison;
pub mod generator;
pub mod machine;
pub mod operation;
pub mod real;
pub mod reproducer;
pub mod shrinker;
pub mod simulated;
