//! `scripts/test`: every check and every test, each once.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::Value;

use crate::sim_host::{self, Machine, Options};
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
    simulated(&arguments.filter)
}

fn style() -> Result<()> {
    step("Check the format", || run(&mut cargo(["fmt", "--check"])))?;
    step("Lint", || {
        let mut clippy = cargo([
            "clippy",
            "--quiet",
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

/// The end-to-end tests of both kinds in the simulated host.
fn simulated(filter: &[String]) -> Result<()> {
    let program = step("Build the end-to-end tests", end_to_end_program)?;
    let machine = Machine::boot(&sim_host::new_dir(), Options::default())?;
    machine.push(&program, "/tmp/e2e")?;
    let settings = [
        "env",
        "HOSTD_E2E_HOST=installed",
        "HOSTD_E2E_KINDS=container,vm",
        "/tmp/e2e",
    ];
    let words: Vec<String> = settings
        .into_iter()
        .map(str::to_owned)
        .chain(filter.iter().cloned())
        .collect();
    let status = machine.run(&words, false)?;
    if !status.success() {
        let log = ["tail", "-n", "60", "/var/log/hostd.log"].map(str::to_owned);
        machine.run(&log, false)?;
        bail!("Tests failed in the simulated host");
    }
    let doctor = machine.run(&["hostctl", "doctor"].map(str::to_owned), false)?;
    if !doctor.success() {
        bail!("`hostctl doctor` is not content with the simulated host");
    }
    Ok(())
}

/// Where cargo put the end-to-end tests' executable.
fn end_to_end_program() -> Result<PathBuf> {
    let arguments = [
        "test",
        "--release",
        "--locked",
        "--quiet",
        "--package",
        "tests",
    ];
    let mut build = cargo(arguments);
    let messages = run(build.args(["--test", "e2e", "--no-run", "--message-format=json"]))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "e2e")
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo names no executable of the end-to-end tests")
}

fn cargo<const N: usize>(arguments: [&str; N]) -> std::process::Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut cargo = command(&cargo, arguments);
    cargo.current_dir(paths::root()).stdin(Stdio::null());
    cargo
}
