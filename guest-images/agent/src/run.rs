//! The life of a workload, from its start to the last byte of its output.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use libc::SIGTERM;

use crate::cgroup::{CgroupError, Cgroups};
use crate::console::{chain, say};
use crate::launch::{FAILED, LaunchError};
use crate::memory::Memory;
use crate::power_button;
use crate::protocol::Config;
use crate::reaper::{Reaper, STACK_BYTES};
use crate::server::{Agent, Slots, serve};
use crate::status::End;
use crate::thrash;
use crate::transport::Transport;
use crate::workload::{HostStreams, Workload};

/// How long the clients of exec are given to hear that their processes have ended with the workload.
const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// What the agent finds around it.
#[derive(Debug)]
pub struct Surroundings {
    /// How the host is reached.
    pub transport: Transport,
    /// The control group (version 2) to put processes below.
    pub cgroup: PathBuf,
    /// /proc/meminfo, open.
    pub memory: File,
    /// The device of the power button, open.
    pub power_button: Option<File>,
}

/// Why there was no workload, or why its end is not known.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("Failed to wait for processes")]
    Reap(#[source] io::Error),
    #[error(transparent)]
    Cgroup(Box<dyn std::error::Error + Send + Sync>),
    #[error("Failed to start the workload")]
    Launch {
        /// The exit code that says so.
        code: u8,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("Failed to read how much memory there is")]
    Memory(#[source] io::Error),
    #[error("Failed to serve the workload")]
    Serve(#[source] io::Error),
}

impl RunError {
    /// The end to report.
    pub fn end(&self) -> End {
        let code = match self {
            Self::Launch { code, .. } => *code,
            Self::Reap(_) | Self::Cgroup(_) | Self::Memory(_) | Self::Serve(_) => FAILED,
        };
        End { code, oom: false }
    }
}

impl From<CgroupError> for RunError {
    fn from(error: CgroupError) -> Self {
        Self::Cgroup(Box::new(error))
    }
}

impl From<LaunchError> for RunError {
    fn from(error: LaunchError) -> Self {
        Self::Launch {
            code: error.code(),
            source: Box::new(error),
        }
    }
}

/// Runs the workload and serves the host until the workload has ended and all its output has
/// arrived. `ready` is called once the workload runs and the agent can be reached.
pub fn run(
    config: &Config,
    surroundings: Surroundings,
    ready: impl FnOnce(),
) -> Result<End, RunError> {
    let reaper = Reaper::start().map_err(RunError::Reap)?;
    let cgroups = Cgroups::create(&surroundings.cgroup)?;
    if config.pids_max.is_some() {
        cgroups.set_pids_max(config.pids_max)?;
    }
    let memory = Memory::read(&surroundings.memory).map_err(RunError::Memory)?;
    cgroups.set_memory_max(memory.for_workload())?;
    let listener = surroundings.transport.listen();

    let host = HostStreams::connect(&config.process, &surroundings.transport);
    let (mut workload, streams) = match Workload::start(&config.process, &cgroups, &reaper) {
        Ok(started) => started,
        Err(error) => {
            host.explain(&chain(&error));
            return Err(error.into());
        }
    };
    let outputs = workload.join(streams, host).map_err(RunError::Serve)?;

    let agent = Arc::new(Agent {
        reaper,
        cgroups,
        workload,
        description: config.process.clone(),
        execs: Slots::default(),
        network: config.network.clone().into(),
        memory: surroundings.memory,
        memory_at_start: memory,
    });
    match listener {
        Ok(listener) => {
            let agent = Arc::clone(&agent);
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            thread
                .spawn(move || serve(&listener, &agent))
                .map_err(RunError::Serve)?;
        }
        Err(error) => say(&format!("The host cannot reach the agent: {error}")),
    }
    thrash::watch(Arc::clone(&agent)).map_err(RunError::Serve)?;
    if let Some(button) = surroundings.power_button {
        let signal = config.stop_signal.unwrap_or(SIGTERM);
        power_button::watch(button, Arc::clone(&agent), signal).map_err(RunError::Serve)?;
    }
    ready();
    let end = agent.workload.wait().map_err(RunError::Serve)?;
    outputs.finish();
    agent.execs.wait_for_all(LAST_WORDS_MAX);
    Ok(end)
}
