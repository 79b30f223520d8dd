//! `ps`: the processes of a container.

use std::path::Path;

use crate::cgroup::{Cgroup, CgroupError};
use crate::process::Process;
use crate::state::{Home, StateError};

/// Why the processes are not known.
#[derive(Debug, thiserror::Error)]
pub enum PsError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// The pids of all processes of a container, in the caller's pid namespace.
///
/// # Errors
/// Those of [`PsError`].
pub fn ps(root: &Path, id: &str) -> Result<Vec<i32>, PsError> {
    let home = Home::open(root, id)?;
    let record = home.record()?;
    if record.cgroup.is_empty() {
        // Nobody tells the others.
        let (_, process) = home.observe(&record)?;
        return Ok(process.iter().map(Process::pid).collect());
    }
    let pids = Cgroup::open(&record.cgroup)?.pids()?;
    Ok(pids.into_iter().map(nix::unistd::Pid::as_raw).collect())
}
