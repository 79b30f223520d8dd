//! `scripts/test`: every check and every test, each once.

use std::fs;
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

/// The end-to-end tests of both kinds in the simulated host, and the container crate's own tests: the
/// one host here that has cgroup v2 with every controller.
fn simulated(filter: &[String]) -> Result<()> {
    let names: Vec<&str> = SIMULATED.iter().map(|program| program.name).collect();
    let paths = step("Build the tests of the simulated host", || programs(&names))?;
    let machine = Machine::boot(&sim_host::new_dir(), Options::default())?;
    for (program, path) in SIMULATED.iter().zip(&paths) {
        let target = format!("/tmp/{}", program.name);
        machine.push(path, &target)?;
        let words = program.words.iter().copied().chain([target.as_str()]);
        let words: Vec<String> = words
            .map(str::to_owned)
            .chain(filter.iter().cloned())
            .collect();
        if !machine.run(&words, false)?.success() {
            for words in DIAGNOSIS {
                machine.run(&words.map(str::to_owned), false)?;
            }
            bail!("Tests failed in the simulated host: {}", program.name);
        }
    }
    let doctor = machine.run(&["hostctl", "doctor"].map(str::to_owned), false)?;
    if !doctor.success() {
        bail!("`hostctl doctor` is not content with the simulated host");
    }
    Ok(())
}

/// What a failed program's host is asked: most of all whether its memory ran out.
const DIAGNOSIS: [[&str; 3]; 4] = [
    ["tail", "-n60", "/var/log/hostd.log"],
    ["sh", "-c", "dmesg | tail -n 60"],
    ["sh", "-c", "free -m"],
    ["sh", "-c", "df -m; du -amx / | sort -rn | head -n 30"],
];

/// A test program that runs in the simulated host.
struct Program {
    /// As cargo calls it.
    name: &'static str,
    /// What comes before it: where it finds what it tests.
    words: &'static [&'static str],
}

/// The runtime of the host image, in place of the one that cargo built beside the tests.
const INSTALLED_RUNTIME: &[&str] = &["env", "CARGO_BIN_EXE_hostd-oci=/usr/bin/hostd-oci"];

/// In the order of what they cost.
const SIMULATED: &[Program] = &[
    Program {
        name: "seccomp",
        words: &[],
    },
    Program {
        name: "oci_library",
        words: &[],
    },
    Program {
        name: "cgroup",
        words: &[],
    },
    Program {
        name: "oci",
        words: INSTALLED_RUNTIME,
    },
    Program {
        name: "e2e",
        words: &[
            "env",
            "HOSTD_E2E_HOST=installed",
            "HOSTD_E2E_KINDS=container,vm",
        ],
    },
];

/// The executables of tests, in the order of their names, without what only a debugger reads: they go
/// through an emulated network.
pub(crate) fn programs(names: &[&str]) -> Result<Vec<PathBuf>> {
    let mut build = cargo(["test", "--release", "--locked", "--quiet"]);
    build.args(["--package", "tests", "--package", "container"]);
    for name in names {
        build.args(["--test", name]);
    }
    let messages = run(build.args(["--no-run", "--message-format=json"]))?;
    let messages: Vec<Value> = messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let dir = paths::build().join("tests");
    fs::create_dir_all(&dir)?;
    let find = |name: &&str| {
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
        Ok(stripped)
    };
    names.iter().map(find).collect()
}

fn cargo<const N: usize>(arguments: [&str; N]) -> std::process::Command {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let mut cargo = command(&cargo, arguments);
    cargo.current_dir(paths::root()).stdin(Stdio::null());
    cargo
}
