//! The runtime as an engine uses it: the binary, with a root file system of busybox. Needs root.

#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod bundle;
mod exec;
mod isolation;
mod lifecycle;
