//! `pause` and `resume`: freezes the processes of a container, and lets them go on.

use std::path::Path;

use crate::cgroup::{Cgroup, CgroupError};
use crate::state::{Home, StateError, Status};

/// Why a container was not paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot {act} container `{id}`: it is {status}")]
    Status {
        act: &'static str,
        id: String,
        status: Status,
    },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Freezes every process of a container that is created or runs.
///
/// # Errors
/// Those of [`PauseError`]; it goes on then.
pub fn pause(root: &Path, id: &str) -> Result<(), PauseError> {
    let cgroup = cgroup(root, id, "pause", &[Status::Created, Status::Running])?;
    cgroup.freeze().inspect_err(|_| {
        // Half a freeze is worse than none. What is reported is the first error.
        let _ = cgroup.thaw();
    })?;
    Ok(())
}

/// Lets the processes of a paused container go on.
///
/// # Errors
/// Those of [`PauseError`].
pub fn resume(root: &Path, id: &str) -> Result<(), PauseError> {
    Ok(cgroup(root, id, "resume", &[Status::Paused])?.thaw()?)
}

fn cgroup(
    root: &Path,
    id: &str,
    act: &'static str,
    allowed: &[Status],
) -> Result<Cgroup, PauseError> {
    let home = Home::open(root, id)?;
    let record = home.record()?;
    let (status, _) = home.observe(&record)?;
    if !allowed.contains(&status) {
        return Err(PauseError::Status {
            act,
            id: id.to_owned(),
            status,
        });
    }
    Ok(Cgroup::open(&record.cgroup)?)
}
