//! The release binaries of the workspace.

use anyhow::Result;

use crate::paths;
use crate::step::{command, run, step};

/// Builds them all; quick when nothing changed.
pub(crate) fn build() -> Result<()> {
    step("Build hostd", || cargo_build(&[]))
}

/// Builds one of them.
pub(crate) fn build_one(name: &str) -> Result<()> {
    step(&format!("Build {name}"), || cargo_build(&["--bin", name]))
}

fn cargo_build(which: &[&str]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = command(&cargo.to_string_lossy(), ["build", "--release", "--locked"]);
    build.arg("--quiet").args(which).current_dir(paths::root());
    run(&mut build).map(|_| ())
}
