//! What can be done with a container that exists, one file each.
//!
//! All but `exec` may be called from a program with several threads: they fork nothing.

pub mod delete;
pub mod kill;
pub mod list;
pub mod run;
pub mod start;
pub mod state;
