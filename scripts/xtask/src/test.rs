//! `scripts/test`: every check and every test, each once.

mod simulated;
mod tools;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::step::{command, run, step};
use crate::{binaries, fixtures, fuzz, packages, paths};

/// Passes every test: style, unit, native (root), fuzz, and end-to-end in the simulated host
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only the end-to-end tests in the simulated host; what follows `--` selects some of them
    #[arg(long)]
    sim: bool,
    /// Passed to the test programs
    #[arg(last = true)]
    filter: Vec<String>,
}

/// Runs them in the order of what they cost.
pub(crate) fn test(arguments: &Arguments) -> Result<()> {
    packages::ensure(packages::ALL)?;
    if !arguments.sim {
        style()?;
    }
    binaries::build()?;
    fixtures::busybox()?;
    if !arguments.sim {
        native(&arguments.filter)?;
        fuzz::fuzz(&fuzz::Arguments::default())?;
    }
    simulated::run(&arguments.filter)
}

fn style() -> Result<()> {
    step("Check the format", || run(&mut cargo(["fmt", "--check"])))?;
    step("Lint", || {
        let mut clippy = cargo([
            "clippy",
            "--quiet",
            // What it needs built, such as SQLite, is then built once.
            "--release",
            "--workspace",
            "--all-targets",
            "--locked",
        ]);
        run(clippy.args(["--", "-D", "warnings"]))
    })?;
    Ok(())
}

/// Unit tests, the crates' own tests, and the end-to-end tests of containers on this machine.
fn native(filter: &[String]) -> Result<()> {
    let mut tests = cargo([
        "test",
        "--release",
        "--workspace",
        "--locked",
        "--no-fail-fast",
    ]);
    tests.arg("--").args(filter);
    let status = tests.status().context("Cannot run cargo")?;
    if !status.success() {
        bail!("Tests failed on this machine");
    }
    Ok(())
}

/// The executables of libraries' unit tests and of other tests, by their names, without what only a debugger
/// reads: they go through an emulated network.
pub(crate) fn programs<'a>(
    libraries: &BTreeSet<&'a str>,
    tests: &BTreeSet<&'a str>,
) -> Result<Vec<(&'a str, PathBuf)>> {
    // Of the whole workspace, as it is built for the tests on this machine: what is chosen decides on the
    // features of dependencies.
    let mut build = cargo(["test", "--release", "--workspace", "--locked", "--quiet"]);
    if !libraries.is_empty() {
        build.arg("--lib");
    }
    for name in tests {
        build.args(["--test", name]);
    }
    let messages = run(build.args(["--no-run", "--message-format=json"]))?;
    let messages: Vec<Value> = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let dir = paths::build().join("tests");
    fs::create_dir_all(&dir)?;
    let find = |name: &&'a str| {
        let mut messages = messages.iter();
        let executable = messages
            .find_map(|message| {
                message["executable"]
                    .as_str()
                    .filter(|_| message["target"]["name"] == **name)
            })
            .with_context(|| format!("cargo names no executable of the tests `{name}`"))?;
        let stripped = dir.join(name);
        run(command("strip", ["-o"]).arg(&stripped).arg(executable))?;
        Ok((*name, stripped))
    };
    libraries.iter().chain(tests).map(find).collect()
}

fn cargo<const N: usize>(arguments: [&str; N]) -> std::process::Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut cargo = command(&cargo, arguments);
    cargo.current_dir(paths::root()).stdin(Stdio::null());
    cargo
}
