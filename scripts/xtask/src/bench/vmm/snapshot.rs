//! What it takes to save a machine and to go on from there. Peers are not asked: each does it in a way
//! of its own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use serde_json::json;

use super::console::{Process, Run};
use super::machine::{MEMORY_MIB, Monitor};
use super::place::Place;
use super::row::{Sample, first_instruction};
use crate::step::run;

/// What is measured.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Step {
    /// From a running machine to all of it on the disk.
    Full,
    /// The same, of what has changed since.
    Diff,
    /// From the start of a process until the guest goes on.
    Restore,
}

/// Makes a machine, saves it, and takes the time of one step of that.
pub(super) fn measure(
    monitor: &Monitor,
    place: &Place,
    memory_mib: u64,
    step: Step,
) -> Result<Option<Sample>> {
    let socket = place.path("control");
    let Some(process) = begin(monitor, place, memory_mib, step == Step::Diff)? else {
        return Ok(None);
    };
    let folder = place.path("snapshot");
    let difference = place.path("difference");
    let full = save(monitor, &socket, &folder, &[])?;
    let sample = match step {
        Step::Full => Some(full),
        Step::Diff => {
            ask(&socket, "resume")?;
            Some(save(monitor, &socket, &difference, &["--diff"])?)
        }
        Step::Restore => {
            drop(process);
            restore(monitor, &folder)?
        }
    };
    for folder in [folder, difference] {
        if folder.exists() {
            fs::remove_dir_all(folder).context("Cannot remove a snapshot")?;
        }
    }
    Ok(sample)
}

/// Makes a small machine, saves it to a folder, and ends it.
pub(super) fn keep(monitor: &Monitor, place: &Place, folder: &Path) -> Result<()> {
    let process = begin(monitor, place, MEMORY_MIB, false)?.context("Only ours can do this")?;
    save(monitor, &place.path("control"), folder, &[])?;
    drop(process);
    Ok(())
}

/// A machine whose guest runs; none of peers.
fn begin(
    monitor: &Monitor,
    place: &Place,
    memory_mib: u64,
    tracked: bool,
) -> Result<Option<Process>> {
    let machine = json!({
        "boot": {"kernel": place.kernel(), "cmdline": "bench=beat"},
        "memory": {"size_mib": memory_mib, "track_dirty": tracked},
        "rng": false,
        "console": "stdio",
        "control": place.path("control"),
    });
    let Some(mut command) = monitor.run_machine(place, &machine)? else {
        return Ok(None);
    };
    let mut process = Process::start(&mut command)?;
    process.read_until(|output| output.contains("beating"))?;
    Ok(Some(process))
}

/// Pauses a machine and saves it.
fn save(monitor: &Monitor, socket: &Path, folder: &Path, more: &[&str]) -> Result<Sample> {
    let mut command = tool(monitor)?;
    command.arg("--snapshot").arg(folder).args(more);
    command.arg("--control").arg(socket);
    let start = Instant::now();
    ask(socket, "pause")?;
    run(&mut command)?;
    Ok(Sample {
        value: start.elapsed().as_secs_f64() * 1e3,
        cpu: None,
    })
}

/// Goes on from what was saved, until the guest says that it does.
fn restore(monitor: &Monitor, folder: &Path) -> Result<Option<Sample>> {
    let mut command = tool(monitor)?;
    command.arg("--restore").arg(folder).arg("--boot-timer");
    let started = clock_gettime(ClockId::CLOCK_MONOTONIC)?.into();
    let mut process = Process::start(&mut command)?;
    process.read_until(|output| output.contains("boot_at_us") && output.ends_with('\n'))?;
    let run = Run {
        started,
        output: process.output().to_owned(),
        ..Run::default()
    };
    first_instruction(&run)
        .map(Some)
        .with_context(|| format!("The machine does not go on:\n{}", run.output))
}

fn tool(monitor: &Monitor) -> Result<Command> {
    monitor.tool().context("Only ours can do this")
}

/// Has a machine do something.
fn ask(socket: &Path, action: &str) -> Result<()> {
    let mut stream = UnixStream::connect(socket).context("Cannot reach the machine")?;
    writeln!(stream, "{}", json!({ "action": action }))?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    if !answer.contains("\"done\"") {
        bail!("The machine does not {action}: {answer}");
    }
    Ok(())
}
