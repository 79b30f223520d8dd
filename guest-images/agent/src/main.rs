//! `hostd-agent`: PID 1 of a virtual machine, or with `--serve` its serving half alone.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::panic;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use agent::console::{chain, say};
use agent::machine::{self, CGROUP, Machine};
use agent::protocol::Config;
use agent::run::{Surroundings, run};
use agent::status::{self, End};
use agent::transport::Transport;
use anyhow::{Context, Result, bail};

/// What is reported if the agent itself fails, as Docker does for itself.
const AGENT_FAILED: End = End {
    code: 125,
    oom: false,
};

const USAGE: &str = "hostd-agent is the first process of a virtual machine.
For development, as the first process of a pid namespace with a mount namespace of its own:
hostd-agent --serve SOCKET CGROUP CONFIG.json";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [option, socket, cgroup, config] if option == "--serve" => {
            match serve(socket.into(), cgroup.into(), config.as_ref()) {
                Ok(end) => end.code.into(),
                Err(error) => {
                    say(&format!("{error:#}"));
                    AGENT_FAILED.code.into()
                }
            }
        }
        // The kernel passes on what it does not know of its command line.
        _ if std::process::id() == 1 => boot(),
        _ => {
            say(USAGE);
            ExitCode::from(2)
        }
    }
}

/// The whole life of a machine. The return would be a kernel panic, which ends the machine too.
fn boot() -> ExitCode {
    panic::set_hook(Box::new(|panic| {
        say(&format!("This is a bug in hostd-agent: {panic}"));
        status::report_end(AGENT_FAILED);
        machine::power_off();
    }));
    let (machine, end) = live();
    if let Some(machine) = machine {
        machine.settle();
    }
    status::report_end(end);
    say(&format!("The workload has ended with {}", end.code));
    machine::power_off();
    end.code.into()
}

/// Sets the machine up and runs the workload to its end.
fn live() -> (Option<Machine>, End) {
    let set_up = machine::read_config().and_then(|config| {
        let machine = machine::set_up(&config)?;
        Ok((config, machine))
    });
    let (config, mut machine) = match set_up {
        Ok(set_up) => set_up,
        Err(error) => {
            say(&chain(&error));
            return (None, AGENT_FAILED);
        }
    };
    let power_button = machine.power_button.take();
    let surroundings = machine.memory.try_clone().map(|memory| Surroundings {
        transport: Transport::Vsock,
        cgroup: CGROUP.into(),
        memory,
        power_button,
    });
    let end = match surroundings {
        Ok(surroundings) => {
            run(&config, surroundings, status::report_ready).unwrap_or_else(|error| {
                say(&chain(&error));
                error.end()
            })
        }
        Err(error) => {
            say(&chain(&error));
            AGENT_FAILED
        }
    };
    (Some(machine), end)
}

/// Runs a workload in the root file system and the control group that are there.
fn serve(socket: PathBuf, cgroup: PathBuf, config: &Path) -> Result<End> {
    if std::process::id() != 1 {
        bail!("--serve takes the first process of a pid namespace");
    }
    let text = fs::read(config).with_context(|| format!("Failed to read {}", config.display()))?;
    let config: Config = serde_json::from_slice(&text).context("The configuration is malformed")?;
    let surroundings = Surroundings {
        transport: Transport::Unix(socket),
        cgroup,
        memory: File::open("/proc/meminfo").context("There is no /proc")?,
        power_button: None,
    };
    Ok(
        run(&config, surroundings, || say("Ready")).unwrap_or_else(|error| {
            say(&chain(&error));
            error.end()
        }),
    )
}
