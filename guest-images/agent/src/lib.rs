//! The first process of a virtual machine that was started from an OCI image.
//!
//! [`machine`] makes a root file system, a network and the rest of a running system out of a kernel
//! that has just booted; [`run`] is the life of the workload in it. [`protocol`] and [`initramfs`]
//! are for the host's side.

mod account;
mod cgroup;
pub mod console;
mod exec;
pub mod initramfs;
mod launch;
mod lines;
pub mod machine;
mod memory;
mod power_button;
pub mod protocol;
mod reaper;
pub mod run;
mod server;
mod start;
pub mod status;
mod streams;
mod sys;
mod thrash;
pub mod transport;
mod workload;
