//! Confinement of processes on Linux: the OCI runtime verbs and the monitor. Knows nothing of VMs
//! or hostd.
//!
//! A configuration goes one way: [`spec`] (its shape) → `plan` (its meaning; every file open) →
//! [`create`] (the creator's side) and `init` (the first process), which talk by `handshake`. What
//! exists is in [`state`], and what can be done with it in [`verbs`].

pub mod cgroup;
mod copy;
pub mod create;
pub mod criu;
mod devices;
mod environment;
pub mod error;
pub mod footprint;
mod handshake;
mod hooks;
mod idmap;
mod init;
mod label;
mod launch;
pub mod log;
mod masks;
pub mod monitor;
mod mountinfo;
mod mounts;
mod namespaces;
mod netlink;
mod network_devices;
mod notify;
mod open_files;
mod plan;
pub mod process;
mod program;
pub mod readiness;
mod relay;
pub mod resctrl;
mod rights;
mod root;
mod rootfs;
pub mod sealed;
pub mod seccomp;
pub mod spec;
pub mod state;
mod sys;
pub mod systemd;
mod tty;
pub mod users;
pub mod verbs;
