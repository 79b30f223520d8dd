//! `start`: lets the program of a created container run.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use crate::handshake::{self, Channel, Failure, Message, Reason};
use crate::hooks::{self, HookError, Surroundings};
use crate::notify;
use crate::readiness::{Proxy, ReadinessError, ServiceManager};
use crate::spec::Config;
use crate::state::{Home, Record, START_SOCKET, StateError, Status};
use crate::verbs::delete::delete_failed;
use crate::verbs::state::oci_state;

/// Why a container was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot start container `{id}`: it is {status}, not created")]
    Status { id: String, status: Status },
    #[error("cannot start container `{id}`: another process starts it, or it has ended")]
    Raced { id: String },
    /// The first process says why the program could not be executed.
    #[error(transparent)]
    Failed(#[from] Failure),
    #[error("the container's first process died before it executed the program")]
    Died,
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Readiness(#[from] ReadinessError),
    #[error("cannot {step}")]
    Step {
        step: &'static str,
        source: io::Error,
    },
}

/// Starts the program of the created container `id`, and returns when it was executed; with a service
/// manager, if the container was created with one, when it is ready or has ended.
///
/// # Errors
/// Those of [`StartError`]. If the program could not be executed the container is then stopped; if a hook
/// failed it is deleted, as the specification has it (runtime.md, Lifecycle, 7 and 9).
pub fn start(
    root: &Path,
    id: &str,
    service_manager: Option<&ServiceManager>,
) -> Result<(), StartError> {
    let started = start_once(root, id, service_manager);
    if started.as_ref().is_err_and(StartError::is_of_hook) {
        delete_failed(root, id);
    }
    started
}

impl StartError {
    fn is_of_hook(&self) -> bool {
        match self {
            Self::Hook(_) => true,
            Self::Failed(failure) => failure.reason == Reason::Hook,
            Self::State(_)
            | Self::Status { .. }
            | Self::Raced { .. }
            | Self::Died
            | Self::Readiness(_)
            | Self::Step { .. } => false,
        }
    }
}

fn start_once(
    root: &Path,
    id: &str,
    service_manager: Option<&ServiceManager>,
) -> Result<(), StartError> {
    let home = Home::open(root, id)?;
    let record = home.record()?;
    let (status, process) = home.observe(&record)?;
    if status != Status::Created {
        return Err(StartError::Status {
            id: id.to_owned(),
            status,
        });
    }
    let proxy = Proxy::listen(&home, service_manager)?;
    let raced = || StartError::Raced { id: id.to_owned() };
    let channel = match handshake::connect(&home.socket_path(START_SOCKET)) {
        Ok(channel) => channel,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            return Err(raced());
        }
        Err(source) => {
            return Err(StartError::Step {
                step: "reach the first process",
                source,
            });
        }
    };
    // It may go away at any time; what it had to say is then still there to be received.
    let _ = channel.send(&Message::Proceed);
    let agent = |listener| hand_over_listener(&home, &record, &listener);
    match await_exec(&channel, agent) {
        Ok(()) => {}
        Err(StartError::Died) => return Err(raced()),
        Err(error) => return Err(error),
    }
    home.mark_started()?;
    run_poststart(&record)?;
    if let (Some(proxy), Some(process)) = (proxy, &process) {
        proxy.conduct(process);
    }
    Ok(())
}

/// Waits until a process has executed its program. `agent` takes the listener of its seccomp filter, if
/// there is one.
pub(crate) fn await_exec(
    channel: &Channel,
    mut agent: impl FnMut(OwnedFd) -> io::Result<()>,
) -> Result<(), StartError> {
    let mut executing = false;
    loop {
        let message = channel.receive();
        match message.map_err(|source| StartError::Step {
            step: "hear of the program",
            source,
        })? {
            Some(Message::Executing) => executing = true,
            Some(Message::Failed(failure)) => return Err(failure.into()),
            Some(Message::Notify(Some(listener))) => {
                agent(listener).map_err(|source| StartError::Step {
                    step: "hand over the listener of the seccomp filter",
                    source,
                })?;
                // If the process is dead, that is heard next.
                let _ = channel.send(&Message::Proceed);
            }
            Some(_) => {}
            None if executing => return Ok(()),
            None => return Err(StartError::Died),
        }
    }
}

/// Hands the listener of the container's seccomp filter to the agent that the configuration names.
pub(crate) fn hand_over_listener(
    home: &Home,
    record: &Record,
    listener: &OwnedFd,
) -> io::Result<()> {
    let config = Config::load_file(&home.config_path()).map_err(io::Error::other)?;
    let linux = config.spec.linux().as_ref();
    match linux.and_then(|linux| linux.seccomp().as_ref()) {
        Some(seccomp) => notify::hand_over(seccomp, record, Status::Created, record.pid, listener),
        None => Ok(()),
    }
}

/// Runs the poststart hooks. If one fails the container is to be deleted.
pub(crate) fn run_poststart(record: &Record) -> Result<(), HookError> {
    if record.poststart.is_empty() {
        return Ok(());
    }
    let state = oci_state(record, Status::Running, record.pid);
    let around = Surroundings::of_state(&state);
    hooks::run(&record.poststart, "poststart", &around)
}
