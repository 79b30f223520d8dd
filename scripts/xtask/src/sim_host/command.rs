//! `scripts/sim-host`.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::{Machine, Options};
use crate::{host_image, paths};

/// Runs a command in the simulated host: in the one that `--up` left running, else in a new one
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Boots a machine that stays up for the commands that follow
    #[arg(long, conflicts_with = "down")]
    up: bool,
    /// Ends the machine that `--up` left running
    #[arg(long)]
    down: bool,
    /// Memory of a machine that is booted now, in MiB
    #[arg(long, default_value_t = Options::default().memory_mib)]
    memory: u32,
    /// Processors of a machine that is booted now
    #[arg(long, default_value_t = Options::default().cpus)]
    cpus: u32,
    /// The command, run word for word; a shell if there is none
    #[arg(last = true)]
    command: Vec<String>,
}

/// Does what was asked for and ends as the command in the machine ended.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let kept = kept_dir();
    if arguments.down {
        let machine = Machine::find(&kept).context("No simulated host was left running")?;
        machine.end()?;
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options {
        memory_mib: arguments.memory,
        cpus: arguments.cpus,
        stays: arguments.up,
    };
    if arguments.up {
        if Machine::find(&kept).is_some() {
            bail!("A simulated host is up already; `scripts/sim-host --down` ends it");
        }
        Machine::boot(&host_image::build()?, &kept, options)?.keep()?;
        if arguments.command.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let machine = match Machine::find(&kept) {
        Some(machine) => machine,
        None => Machine::boot(&host_image::build()?, &new_dir(), options)?,
    };
    let terminal = arguments.command.is_empty() || std::io::stdin().is_terminal();
    machine.run(&arguments.command, terminal).map(exit_code)
}

fn kept_dir() -> PathBuf {
    paths::build().join("sim-host").join("kept")
}

/// A directory that no other run uses.
pub(crate) fn new_dir() -> PathBuf {
    paths::build()
        .join("sim-host")
        .join(std::process::id().to_string())
}

/// The exit status of a command as this process's own; a signal as a shell shows it.
fn exit_code(status: ExitStatus) -> ExitCode {
    ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(255),
    )
}
