//! The parent of a workload: holds its streams, its log and its exit record.
//!
//! One small process for each instance, with one thread and no runtime: it waits in poll(2) for
//! whatever comes. It must outlive every daemon, so it depends on none, and owes nothing to a
//! client: what a client does or fails to do is never the workload's affair for long.

mod client;
mod descriptors;
mod launch;
mod log;
pub mod protocol;
mod record;
mod server;
mod signals;
mod streams;
mod tap;
mod workload;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use self::{launch::Launched, protocol::Ready};
use crate::{
    create::CreateError,
    error::chain,
    footprint,
    handshake::Reason,
    state::StateError,
    verbs::{delete::DeleteError, start::StartError},
};

#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("cannot {action} {path:?}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path:?} already has a monitor")]
    Locked { path: PathBuf },
    #[error("{path:?} is no monitor's specification")]
    Spec {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("log.bytes_max is 0, so there is no room for any line")]
    LogSize,
    #[error("descriptors[{index}]: cannot open {what}")]
    Descriptor {
        index: usize,
        what: String,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Delete(#[from] DeleteError),
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

impl MonitorError {
    /// The code that a shell gives for a program that it cannot execute, if that is the error.
    fn exit_code(&self) -> Option<u8> {
        let Self::Create(
            CreateError::Init(failure) | CreateError::Start(StartError::Failed(failure)),
        ) = self
        else {
            return None;
        };
        match failure.reason {
            Reason::ProgramNotFound => Some(127),
            Reason::ProgramNotExecutable => Some(126),
            Reason::Hook | Reason::Other => None,
        }
    }
}

fn step<T, E: Into<io::Error>>(
    step: &'static str,
    result: Result<T, E>,
) -> Result<T, MonitorError> {
    result.map_err(|error| MonitorError::Step {
        step,
        source: error.into(),
    })
}

/// Runs the workload that `dir` describes, from its start to its removal. The protocol is in
/// [`protocol`]. The process that calls it must have one thread.
///
/// # Errors
///
/// If the workload was not started, which standard output has then been told; or if something of
/// it could not be removed, or its exit status not be recorded.
pub fn run(dir: &Path) -> Result<(), MonitorError> {
    signals::detach()?;
    match launch::launch(dir) {
        Err(error) => {
            tell(&Ready::Failed {
                exit_code: error.exit_code(),
                message: chain(&error),
            });
            Err(error)
        }
        Ok(Launched { server, ready }) => {
            tell(&ready);
            // It may wait for weeks from here on.
            footprint::forget_code();
            server.serve()
        }
    }
}

/// Prints the one line and gives standard output up. Nobody may be left to read it: the daemon that
/// started this may have died, and the next one will ask at the socket.
fn tell(ready: &Ready) {
    let line = serde_json::to_string(ready).unwrap_or_default() + "\n";
    let mut output = io::stdout();
    output
        .write_all(line.as_bytes())
        .and_then(|()| output.flush())
        .ok();
    // The number stays taken, so that no socket or file ever gets it and is printed into.
    if let Ok(null) = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
    {
        rustix::stdio::dup2_stdout(&null).ok();
        rustix::stdio::dup2_stdin(&null).ok();
    }
}
