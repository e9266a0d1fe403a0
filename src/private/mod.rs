//! Memory that the host must not see: which of the guest's is such, how it becomes such, and what was put into it first.
//!
//! [`visibility`] records which is which, in [`page_set`]s; [`turns`] keeps those apart who convert the same memory;
//! [`mod@convert`] knows the order of a conversion, [`discard`] how memory is given up, [`exits`] what a guest may ask for;
//! [`gmem`] makes the files; [`ledger`] knows what was put into the initial image, [`launch`] puts it there. Nothing here
//! knows of populating.

pub mod convert;
pub mod discard;
pub mod exits;
pub mod gmem;
pub mod launch;
pub mod ledger;
pub mod page_set;
pub mod turns;
pub mod visibility;

#[cfg(all(test, loom))]
mod races;
