//! `kill`: sends a signal.

use std::io;
use std::path::PathBuf;

use oci_spec::runtime::LinuxNamespaceType;
use rustix::fs::stat;
use rustix::io::Errno;

use crate::cgroup::{Cgroup, CgroupError};
use crate::process::Process;
use crate::spec::Config;
use crate::state::{Home, StateError, Status};

/// To whom, and what.
#[derive(Clone, Debug)]
pub struct KillOptions {
    pub root: PathBuf,
    pub id: String,
    /// The signal's number.
    pub signal: i32,
    /// Every process of the container, not only the first.
    pub all: bool,
}

/// Why a signal was not sent.
#[derive(Debug, thiserror::Error)]
pub enum KillError {
    #[error(transparent)]
    State(#[from] StateError),
    /// The text is the one that engines look for.
    #[error("container not running: `{id}` is {status}")]
    NotRunning { id: String, status: Status },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot send signal {signal}")]
    Signal { signal: i32, source: io::Error },
}

/// Sends a signal to the first process of a container, or to all.
///
/// # Errors
/// [`KillError::NotRunning`] if there is no process; with `all` that is no error.
pub fn kill(options: &KillOptions) -> Result<(), KillError> {
    let home = Home::open(&options.root, &options.id)?;
    let record = home.record()?;
    let (status, process) = home.observe(&record)?;
    let signal = options.signal;
    let failed = |source| KillError::Signal { signal, source };
    // Without a pid namespace of its own nobody else would kill the others.
    let grouped = !record.cgroup.is_empty();
    let leaves_others = || signal == libc::SIGKILL && grouped && shares_pids(&home);
    if options.all && !grouped {
        let Some(process) = process else {
            return Ok(());
        };
        return kill_without_group(&home, &process, signal).map_err(failed);
    }
    if options.all || leaves_others() {
        let cgroup = Cgroup::open(&record.cgroup)?;
        if !options.all && process.is_none() && cgroup.pids()?.is_empty() {
            return Err(KillError::NotRunning {
                id: options.id.clone(),
                status,
            });
        }
        if signal == libc::SIGKILL {
            return Ok(cgroup.kill_all()?);
        }
        for pid in cgroup.pids()? {
            let pid = pid.as_raw();
            let Some(start_time) = crate::process::start_time(pid).map_err(failed)? else {
                continue;
            };
            if let Some(process) = Process::find(pid, start_time).map_err(failed)? {
                send(&process, signal).map_err(failed)?;
            }
        }
        return Ok(());
    }
    let Some(process) = process else {
        return Err(KillError::NotRunning {
            id: options.id.clone(),
            status,
        });
    };
    send(&process, signal).map_err(failed)?;
    if signal == libc::SIGKILL && status == Status::Paused {
        // A frozen process of cgroup v1 does not die.
        Cgroup::open(&record.cgroup)?.thaw()?;
    }
    Ok(())
}

/// Without a group all that is known are the first process and those of its own pid namespace. With SIGKILL
/// the kernel ends these with it.
fn kill_without_group(home: &Home, first: &Process, signal: i32) -> io::Result<()> {
    if signal == libc::SIGKILL || shares_pids(home) {
        return send(first, signal);
    }
    let namespace = |pid: i32| match stat(format!("/proc/{pid}/ns/pid")) {
        Ok(stat) => Ok(Some((stat.st_dev, stat.st_ino))),
        // It has ended, or is another user's, and then none of the container's.
        Err(Errno::NOENT | Errno::SRCH | Errno::ACCESS) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    let Some(own) = namespace(first.pid())? else {
        return Ok(());
    };
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some(start_time) = crate::process::start_time(pid)? else {
            continue;
        };
        // The descriptor comes first: what it does not lead to any more is not signalled.
        if let Some(process) = Process::find(pid, start_time)?
            && namespace(pid)? == Some(own)
        {
            send(&process, signal)?;
        }
    }
    Ok(())
}

/// Whether the kernel does not kill the other processes with the first.
fn shares_pids(home: &Home) -> bool {
    let Ok(config) = Config::load_file(&home.config_path()) else {
        return false;
    };
    let linux = config.spec.linux().as_ref();
    let mut namespaces = linux
        .and_then(|linux| linux.namespaces().as_ref())
        .into_iter()
        .flatten();
    !namespaces
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none())
}

/// A process that ends at this moment needs no signal.
fn send(process: &Process, signal: i32) -> io::Result<()> {
    match process.signal(signal) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}
