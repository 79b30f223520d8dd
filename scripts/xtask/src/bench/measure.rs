//! One command, measured: how long it took, how much processor time, how much memory.

use std::fs;
use std::io::{Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::step::command;

/// What something cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cost {
    /// From the call to the end.
    pub(crate) wall: Duration,
    /// Of the command and of all its children that it waited for.
    pub(crate) processor: Duration,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.processor += other.processor;
    }
}

/// Runs a command without input or output; it must succeed.
pub(crate) fn run(command: &mut Command) -> Result<Cost> {
    let mut errors = tempfile::tempfile().context("Cannot make a file for errors")?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors.try_clone()?);
    let before = processor_time()?;
    let start = Instant::now();
    let status = command
        .status()
        .with_context(|| format!("Cannot run {command:?}"))?;
    let wall = start.elapsed();
    if !status.success() {
        let mut text = String::new();
        errors.rewind()?;
        errors.read_to_string(&mut text)?;
        bail!("{command:?} ended with {status}: {}", text.trim_end());
    }
    Ok(Cost {
        wall,
        processor: processor_time()?.saturating_sub(before),
    })
}

/// The most memory that a command, or one of its children, had at a time, in KiB.
pub(crate) fn memory(command: &Command, work: &Path) -> Result<u64> {
    let out = work.join("memory");
    // Another program starts it: the memory of a process counts from before its exec, when it still is
    // a copy of its parent, and this one is not small.
    let mut measured = time();
    measured.args(["--format", "%M", "--output"]).arg(&out);
    measured.arg(command.get_program()).args(command.get_args());
    run(&mut measured)?;
    let text = fs::read_to_string(&out).context("time(1) wrote nothing")?;
    text.trim().parse().context("time(1) wrote no number")
}

/// The program that tells how much memory a command took at most.
pub(crate) fn time() -> Command {
    command::<&str>("/usr/bin/time", [])
}

/// Waits for a process that a runtime left to us, and counts the time that it used.
pub(crate) fn reap(pid: Pid) -> Result<Duration> {
    let before = processor_time()?;
    let ended = waitpid(pid, None).context("Cannot wait for the container")?;
    if !matches!(ended, WaitStatus::Exited(_, 0)) {
        bail!("The container ended otherwise than it should: {ended:?}");
    }
    Ok(processor_time()?.saturating_sub(before))
}

/// Of all children that were waited for.
fn processor_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("Cannot read the time used")?;
    let microseconds =
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(microseconds.try_into()?))
}
