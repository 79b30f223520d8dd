//! The release binaries of the workspace.

use anyhow::Result;

use crate::paths;
use crate::step::{command, run, step};

/// Builds them all; quick when nothing changed.
pub(crate) fn build() -> Result<()> {
    step("Build hostd", || {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = command(&cargo.to_string_lossy(), ["build", "--release", "--locked"]);
        build.arg("--quiet").current_dir(paths::root());
        run(&mut build).map(|_| ())
    })
}
