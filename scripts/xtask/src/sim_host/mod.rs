//! The simulated host: the host image under qemu, with AMD-V in software.
//!
//! It is a machine of its own that has what the real one may lack: a KVM that boots stock kernels and
//! cgroup v2 with every controller. Commands reach it over ssh on a loopback port, with a key that is
//! made for it.

mod command;
mod machine;
mod ssh;

pub(crate) use command::{Arguments, new_dir, run};
pub(crate) use machine::{Machine, Options};
