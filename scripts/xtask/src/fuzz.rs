//! `cargo xtask fuzz`: what guests, clients and files can send to the VMM, guessed by libFuzzer for a
//! bounded time.
//!
//! libFuzzer learns from counters that the compiler adds to the code, and those are to be had from a
//! stable compiler too. What was found interesting is kept in `build/`, so that the next run goes on
//! from there; inputs that once did harm are in the tree and are tried first.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::step::{command, run, step};
use crate::{packages, paths};

/// Counts how often each edge between basic blocks is taken, where libFuzzer finds it.
const INSTRUMENTATION: &str = "-Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=3 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table";

/// How long each target runs in `scripts/test`.
const SECONDS: u32 = 8;

/// An input that takes longer is a hang.
const INPUT_SECONDS_MAX: u32 = 10;

/// A target that takes more is a leak, or an allocation by a number that the guest chose.
const MEMORY_MIB_MAX: u32 = 1024;

/// Runs the fuzz targets of the VMM, each for a bounded time (needs root)
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// How long each target runs
    #[arg(long, value_name = "N", default_value_t = SECONDS)]
    seconds: u32,
    /// Passes this input to the one target that is named, once
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Which targets; all without it
    targets: Vec<String>,
}

impl Default for Arguments {
    fn default() -> Self {
        Self {
            seconds: SECONDS,
            input: None,
            targets: Vec::new(),
        }
    }
}

/// Builds them and runs them one after the other.
pub(crate) fn fuzz(arguments: &Arguments) -> Result<()> {
    packages::ensure(&["build-essential"])?;
    let all = targets()?;
    let mut chosen = &arguments.targets;
    if chosen.is_empty() {
        chosen = &all;
    }
    for name in chosen {
        ensure!(
            all.contains(name),
            "There are the targets {}",
            all.join(", ")
        );
    }
    step("Build the fuzz targets", build)?;
    if let Some(input) = &arguments.input {
        let [name] = chosen.as_slice() else {
            bail!("Name the one target that is to get the input");
        };
        return run(Command::new(binary(name)).arg(input)).map(|_| ());
    }
    for name in chosen {
        let what = format!("Fuzz {name} for {} s", arguments.seconds);
        step(&what, || run_target(name, arguments.seconds))?;
    }
    Ok(())
}

fn package() -> PathBuf {
    paths::root().join("vmm/fuzz")
}

/// The targets are the files.
fn targets() -> Result<Vec<String>> {
    let dir = package().join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("Cannot read {}", dir.display()))? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        names.extend(stem.map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

/// Instrumented code has a target directory of its own: it would displace the other.
fn target_dir() -> PathBuf {
    paths::target().join("fuzz")
}

fn build() -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    // Without --locked: a new dependency of the VMM is one of this package too, and its lock file is
    // nobody's to remember.
    let mut build = command(&cargo, ["build", "--release", "--quiet"]);
    build
        .args(["--target", paths::TARGET, "--target-dir"])
        .arg(target_dir())
        .env("RUSTFLAGS", INSTRUMENTATION)
        .current_dir(package());
    run(&mut build).map(|_| ())
}

fn binary(name: &str) -> PathBuf {
    target_dir().join(paths::TARGET).join("release").join(name)
}

fn run_target(name: &str, seconds: u32) -> Result<()> {
    let kept = paths::build().join("fuzz");
    let learnt = kept.join(name);
    fs::create_dir_all(&learnt).with_context(|| format!("Cannot make {}", learnt.display()))?;
    let mut fuzzer = Command::new(binary(name));
    fuzzer
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!(
            "-artifact_prefix={}/failed-{name}-",
            kept.display()
        ))
        .arg("-verbosity=0")
        .arg(&learnt)
        .args(regressions(name))
        .current_dir(&kept);
    // It prints the input, where it is kept, and what went wrong.
    run(&mut fuzzer).map(|_| ()).with_context(|| {
        format!(
            "`cargo xtask fuzz {name} --input FILE` repeats it; keep FILE in vmm/fuzz/corpus/{name}"
        )
    })
}

/// Inputs in the tree.
fn regressions(name: &str) -> Option<PathBuf> {
    Some(package().join("corpus").join(name)).filter(|dir| Path::is_dir(dir))
}
