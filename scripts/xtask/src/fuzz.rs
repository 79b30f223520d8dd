//! `cargo xtask fuzz`: what guests, clients and files can send to the VMM, and what a container's
//! configuration can be, guessed by libFuzzer for a bounded time.
//!
//! libFuzzer learns from counters that the compiler adds to the code, and those are to be had from a
//! stable compiler too. What was found interesting is kept in `build/`, so that the next run goes on
//! from there; inputs that once did harm are in the tree and are tried first.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::step::{command, join, run, step};
use crate::{packages, paths};

/// Counts how often each edge between basic blocks is taken, where libFuzzer finds it.
const INSTRUMENTATION: &str = "-Ccodegen-units=1 -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=3 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table";

/// How long each target runs in `scripts/test`.
const SECONDS: u32 = 4;

/// An input that takes longer is a hang.
const INPUT_SECONDS_MAX: u32 = 10;

/// A target that takes more is a leak, or an allocation by a number that the guest chose.
const MEMORY_MIB_MAX: u32 = 1024;

/// Runs the fuzz targets, each for a bounded time (needs root)
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

/// Builds them and runs them.
pub(crate) fn fuzz(arguments: &Arguments) -> Result<()> {
    packages::ensure(&["build-essential"])?;
    let mut chosen = targets()?;
    if !arguments.targets.is_empty() {
        let known: Vec<String> = chosen.iter().map(|target| target.name.clone()).collect();
        for name in &arguments.targets {
            ensure!(
                known.contains(name),
                "There are the targets {}",
                known.join(", ")
            );
        }
        chosen.retain(|target| arguments.targets.contains(&target.name));
    }
    step("Build the fuzz targets", || build(&chosen))?;
    if let Some(input) = &arguments.input {
        let [target] = chosen.as_slice() else {
            bail!("Name the one target that is to get the input");
        };
        return run(Command::new(binary(&target.name)).arg(input)).map(|_| ());
    }
    let names: Vec<&str> = chosen.iter().map(|target| target.name.as_str()).collect();
    let what = format!("Fuzz {} for {} s each", names.join(", "), arguments.seconds);
    step(&what, || run_all(&chosen, arguments.seconds))
}

/// As many at a time as there are processors; after a failure no more are begun.
fn run_all(targets: &[Target], seconds: u32) -> Result<()> {
    let left = Mutex::new(targets.iter());
    let next = || left.lock().ok()?.next();
    let work = || {
        while let Some(target) = next() {
            let ended = run_target(target, seconds);
            if ended.is_err() {
                // Nobody finds another one.
                while next().is_some() {}
                return ended.with_context(|| format!("Fuzzing {} failed", target.name));
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..processors).map(|_| scope.spawn(work)).collect();
        join(workers)
    })
}

/// Where the targets are.
const PACKAGES: [&str; 2] = ["vmm/fuzz", "container/fuzz"];

/// A file of a package.
struct Target {
    package: &'static str,
    name: String,
}

fn targets() -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    for package in PACKAGES {
        let dir = paths::root().join(package).join("fuzz_targets");
        for entry in fs::read_dir(&dir).with_context(|| format!("Cannot read {}", dir.display()))? {
            let path = entry?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            targets.extend(stem.map(|stem| Target {
                package,
                name: stem.to_owned(),
            }));
        }
    }
    targets.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(targets)
}

/// Instrumented code has a target directory of its own: it would displace the other.
fn target_dir() -> PathBuf {
    paths::target().join("fuzz")
}

fn build(targets: &[Target]) -> Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    // Without --locked: a new dependency of the VMM is one of this package too, and its lock file is
    // nobody's to remember.
    let mut build = command(&cargo, ["build", "--release", "--quiet"]);
    build
        .args(["--target", paths::TARGET, "--target-dir"])
        .arg(target_dir())
        .env("RUSTFLAGS", INSTRUMENTATION)
        .current_dir(paths::root().join("fuzz"));
    for target in targets {
        build.args(["--bin", &target.name]);
    }
    run(&mut build).map(|_| ())
}

fn binary(name: &str) -> PathBuf {
    target_dir().join(paths::TARGET).join("release").join(name)
}

fn run_target(target: &Target, seconds: u32) -> Result<()> {
    let Target { package, name } = target;
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
        .args(regressions(target))
        .current_dir(&kept);
    // It prints the input, where it is kept, and what went wrong.
    run(&mut fuzzer).map(|_| ()).with_context(|| {
        format!(
            "`cargo xtask fuzz {name} --input FILE` repeats it; keep FILE in {package}/corpus/{name}"
        )
    })
}

/// Inputs in the tree.
fn regressions(target: &Target) -> Option<PathBuf> {
    let corpus = paths::root().join(target.package).join("corpus");
    Some(corpus.join(&target.name)).filter(|dir| Path::is_dir(dir))
}
