//! The runtime as an engine uses it: the binary, with a root file system of busybox. Needs root.

#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod bundle;
mod checkpoint;
mod command_line;
mod devices;
mod escapes;
mod exec;
mod hooks;
mod isolation;
mod lifecycle;
mod limits;
mod migration;
mod mounts;
mod namespaces;
mod network_devices;
mod process;
mod races;
mod readiness;
mod rootless;
mod seccomp;
mod suites;
mod systemd;
mod systemd_user;
mod terminal;
mod update;
