//! `hostctl` as a user runs it, against a hostd that is made of a few functions.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

#[path = "cli/fake_hostd.rs"]
mod fake_hostd;
#[path = "cli/output.rs"]
mod output;
#[path = "cli/sessions.rs"]
mod sessions;
#[path = "cli/terminal.rs"]
mod terminal;
