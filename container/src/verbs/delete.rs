//! `delete`: removes what is left of a container.

use std::io;
use std::path::{Path, PathBuf};

use crate::cgroup::{Cgroup, CgroupError};
use crate::hooks::{self, Surroundings};
use crate::log;
use crate::process::Process;
use crate::resctrl::ResctrlError;
use crate::state::{Home, Record, StateError, Status};
use crate::systemd::{Systemd, SystemdError};
use crate::verbs::state::oci_state;

/// How long a killed process may take to be gone, in milliseconds: it may have much memory to give
/// back.
const END_MILLISECONDS_MAX: u32 = 10_000;

/// How long a process that ends may take to have ended, before it counts as running.
const PATIENCE_MILLISECONDS: u32 = 100;

/// What to delete.
#[derive(Clone, Debug)]
pub struct DeleteOptions {
    pub root: PathBuf,
    pub id: String,
    /// Kill the container if it runs, and take it as done if there is none.
    pub force: bool,
}

/// Why a container was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot delete container `{id}`: it is {status}, not stopped")]
    NotStopped { id: String, status: Status },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    #[error(transparent)]
    Resctrl(#[from] ResctrlError),
    #[error("cannot kill the first process of `{id}`")]
    Kill { id: String, source: io::Error },
    #[error("the first process of `{id}` was killed, but is still there after {seconds} s")]
    Undead { id: String, seconds: u32 },
}

/// Deletes a container: its processes, its cgroup, its directory; then runs its poststop hooks, whose
/// failures are returned as warnings.
///
/// # Errors
/// Those of [`DeleteError`]; a second call goes on where the first stopped.
pub fn delete(options: &DeleteOptions) -> Result<Vec<String>, DeleteError> {
    let home = match Home::open(&options.root, &options.id) {
        Err(StateError::NotFound { .. }) if options.force => return Ok(Vec::new()),
        home => home?,
    };
    match home.lock() {
        Err(StateError::NotFound { .. }) if options.force => return Ok(Vec::new()),
        locked => locked?,
    }
    let record = match home.record() {
        Ok(record) => record,
        // Its creator died before it had recorded anything.
        Err(StateError::NotFound { .. }) => {
            home.remove()?;
            return Ok(Vec::new());
        }
        Err(error) => return Err(error.into()),
    };
    let (status, mut process) = home.observe(&record)?;
    // The specification wants a container that is only created to be no exception.
    if let (Some(running), false) = (&process, options.force) {
        // Somebody may just have killed it.
        if running
            .ended_within(PATIENCE_MILLISECONDS)
            .map_err(|source| DeleteError::Kill {
                id: options.id.clone(),
                source,
            })?
        {
            process = None;
        }
    }
    if process.is_some() && !options.force {
        return Err(DeleteError::NotStopped {
            id: options.id.clone(),
            status,
        });
    }
    let cgroup = Cgroup::open(&record.cgroup)?;
    // Who cannot be reached is missed before anything is removed.
    let scope = reach_scope(&record, &cgroup)?;
    // Mostly the process was the last one in the cgroup.
    if process.is_some() || !cgroup.remove_if_empty()? {
        end(&options.id, process.as_ref(), &cgroup)?;
        cgroup.remove()?;
    }
    if let Some(groups) = &record.resctrl {
        groups.remove()?;
    }
    if let Some((unit, mut systemd)) = scope {
        systemd.stop(unit)?;
    }
    home.remove()?;
    Ok(run_poststop(&record))
}

/// Deletes a container that did not come to be what it was to be. What is reported is why that is so; what
/// fails now can only be warned of.
pub(crate) fn delete_failed(root: &Path, id: &str) {
    let deleted = delete(&DeleteOptions {
        root: root.to_path_buf(),
        id: id.to_owned(),
        force: true,
    });
    let warnings = deleted.unwrap_or_else(|error| vec![crate::error::chain(&error)]);
    warnings.iter().for_each(|warning| log::warn(warning));
}

/// The container's scope, if it has one that lasts, and who is to stop it.
fn reach_scope<'a>(
    record: &'a Record,
    cgroup: &Cgroup,
) -> Result<Option<(&'a str, Systemd)>, SystemdError> {
    let Some(unit) = &record.scope else {
        return Ok(None);
    };
    match Systemd::connect() {
        // A user's systemd ends with the user's last session, and its scopes with it.
        Err(SystemdError::ConnectUser { .. }) if !cgroup.exists() => Ok(None),
        systemd => Ok(Some((unit, systemd?))),
    }
}

/// Runs the hooks that come when all else is gone, each of them, and returns what failed.
pub(crate) fn run_poststop(record: &Record) -> Vec<String> {
    let state = oci_state(record, Status::Stopped, 0);
    let around = Surroundings::of_state(&state);
    let hooks = record.poststop.iter().enumerate();
    let run = |(index, hook)| hooks::run_one(hook, "poststop", index, &around).err();
    let errors = hooks.filter_map(run);
    errors.map(|error| crate::error::chain(&error)).collect()
}

/// Kills the first process, and everyone in the cgroup.
fn end(id: &str, process: Option<&Process>, cgroup: &Cgroup) -> Result<(), DeleteError> {
    let failed = |source| DeleteError::Kill {
        id: id.to_owned(),
        source,
    };
    match process.map_or(Ok(()), |process| process.signal(libc::SIGKILL)) {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(failed(error)),
        _ => {}
    }
    // Processes that shared the container's cgroup but not its pid namespace may live on.
    cgroup.kill_all()?;
    let ended = process.map_or(Ok(true), |process| {
        process.ended_within(END_MILLISECONDS_MAX)
    });
    if ended.map_err(failed)? {
        return Ok(());
    }
    Err(DeleteError::Undead {
        id: id.to_owned(),
        seconds: END_MILLISECONDS_MAX / 1000,
    })
}
