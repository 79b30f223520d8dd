//! From the specification to a workload that runs: opens everything, then creates the container.

use std::{
    fs::{self, File},
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process,
};

use rustix::fs::{FlockOperation, flock};
use serde::Deserialize;

use super::{
    MonitorError,
    descriptors::{self, Made},
    log::Log,
    protocol::{MonitorSpec, Ready},
    record,
    server::Server,
    step,
    streams::Streams,
    workload::Workload,
};
use crate::{
    cgroup::Cgroup,
    create::{CreateOptions, Grouping, Stdio, create_started},
    state::Home,
    verbs::delete::DeleteOptions,
};

const SPEC_FILE: &str = "monitor.json";
const SOCKET_FILE: &str = "monitor.sock";

/// A specification or a configuration that is larger is refused.
const JSON_BYTES_MAX: u64 = 4 * 1024 * 1024;

#[derive(Debug)]
pub(super) struct Launched {
    pub(super) server: Server,
    pub(super) ready: Ready,
}

/// Starts the workload that `dir` describes. A failure leaves nothing behind.
pub(super) fn launch(dir: &Path) -> Result<Launched, MonitorError> {
    let (lock, spec) = read_spec(dir)?;
    remove_traces(dir)?;
    let log = Log::open(&spec.log).map_err(|source| MonitorError::Io {
        action: "open the log",
        path: spec.log.path.clone(),
        source,
    })?;
    let mut made = Made::default();
    let socket = dir.join(SOCKET_FILE);
    let listener = descriptors::listen(&socket)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|source| MonitorError::Io {
            action: "listen at",
            path: socket.clone(),
            source,
        })?;
    made.add(&socket);
    let descriptors = descriptors::open(&spec.descriptors, &mut made)?;
    let workload = create(&spec, descriptors)?;
    made.keep();
    let ready = Ready::Running {
        pid: workload.process.pid(),
        start_time: workload.process.start_time(),
        monitor_pid: i32::try_from(process::id()).unwrap_or_default(),
    };
    let mut server = Server::new(dir.to_owned(), socket, lock, listener, log, workload);
    if spec.await_client {
        server.await_client();
    }
    Ok(Launched { server, ready })
}

/// Reads the specification, and locks it for as long as the returned file is open.
fn read_spec(dir: &Path) -> Result<(File, MonitorSpec), MonitorError> {
    let path = dir.join(SPEC_FILE);
    let failed = |action, source| MonitorError::Io {
        action,
        path: path.clone(),
        source,
    };
    let file = File::open(&path).map_err(|source| failed("open", source))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(MonitorError::Locked { path });
        }
        Err(error) => return Err(failed("lock", error.into())),
    }
    let mut text = Vec::new();
    let read = (&file).take(JSON_BYTES_MAX).read_to_end(&mut text);
    read.map_err(|source| failed("read", source))?;
    let spec: MonitorSpec = serde_json::from_slice(&text).map_err(|source| MonitorError::Spec {
        path: path.clone(),
        source,
    })?;
    if spec.log.bytes_max == 0 {
        return Err(MonitorError::LogSize);
    }
    Ok((file, spec))
}

/// What an earlier run left must not be taken for this one's.
fn remove_traces(dir: &Path) -> Result<(), MonitorError> {
    let path: PathBuf = dir.join(record::FILE);
    match fs::remove_file(&path) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(MonitorError::Io {
            action: "remove",
            path,
            source,
        }),
        _ => Ok(()),
    }
}

fn create(spec: &MonitorSpec, descriptors: Vec<OwnedFd>) -> Result<Workload, MonitorError> {
    let executable = match &spec.executable {
        None => None,
        Some(path) => {
            let file = File::open(path).map_err(|source| MonitorError::Io {
                action: "open",
                path: path.clone(),
                source,
            })?;
            Some(OwnedFd::from(file))
        }
    };
    let terminal = wants_terminal(&spec.bundle)?;
    let (pipes, stdio) = if terminal {
        (None, Stdio::Inherit)
    } else {
        let (streams, stdio) = step("make pipes", Streams::pipes(spec.stdin))?;
        (Some(streams), stdio)
    };
    let created = create_started(CreateOptions {
        root: spec.root.clone(),
        id: spec.id.clone(),
        bundle: spec.bundle.clone(),
        stdio,
        executable,
        descriptors,
        pid_file: None,
        pidfd_socket: None,
        config: None,
        env: Vec::new(),
        no_new_keyring: false,
        grouping: Grouping::Files,
        service_manager: None,
    })?;
    let delete = DeleteOptions {
        root: spec.root.clone(),
        id: spec.id.clone(),
        force: true,
    };
    let streams = match (pipes, created.console) {
        (Some(streams), _) => Ok(streams),
        (None, Some(master)) => step("set up the terminal", Streams::terminal(master, spec.stdin)),
        (None, None) => Ok(Streams::default()),
    };
    let home = Home::open(&spec.root, &spec.id).and_then(|home| home.record());
    let cgroup = home
        .map_err(MonitorError::from)
        .map(|record| Cgroup::open(&record.cgroup).ok());
    match (streams, cgroup) {
        (Ok(streams), Ok(cgroup)) => Ok(Workload {
            process: created.process,
            streams,
            cgroup,
            delete,
        }),
        (Err(error), _) | (_, Err(error)) => {
            // The container runs, but nobody would hold it. The first error is the one to tell.
            crate::verbs::delete::delete(&delete).ok();
            created.process.wait().ok();
            Err(error)
        }
    }
}

/// What of `config.json` the monitor must know before the container is created.
#[derive(Deserialize)]
struct Config {
    process: Option<Process>,
}

#[derive(Deserialize)]
struct Process {
    #[serde(default)]
    terminal: bool,
}

/// Whether the workload is to have a terminal. A configuration that cannot be read is judged, and
/// its errors are told, by `create`.
fn wants_terminal(bundle: &Path) -> Result<bool, MonitorError> {
    let path = bundle.join("config.json");
    let read = || -> std::io::Result<Vec<u8>> {
        let mut text = Vec::new();
        File::open(&path)?
            .take(JSON_BYTES_MAX)
            .read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| MonitorError::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let config: Option<Config> = serde_json::from_slice(&text).ok();
    Ok(config
        .and_then(|config| config.process)
        .is_some_and(|process| process.terminal))
}
