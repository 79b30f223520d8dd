//! What can be done with a container that exists, one file each.
//!
//! All but `exec`, `run`, `checkpoint` and `restore` may be called from a program with several threads: they fork nothing, or
//! only to execute a hook, a program of the host.

pub mod check;
pub mod checkpoint;
pub mod delete;
pub mod events;
pub mod exec;
pub mod features;
pub(crate) mod inside;
pub mod kill;
pub mod list;
pub mod pause;
pub mod ps;
pub mod restore;
pub mod run;
pub mod spec;
pub mod start;
pub mod state;
pub mod update;
