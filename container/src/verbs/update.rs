//! `update`: changes the limits of a container that exists.

use std::path::Path;

use oci_spec::runtime::LinuxResources;

use crate::cgroup::{Cgroup, CgroupError};
use crate::state::{Home, StateError, Status};
use crate::systemd::{Systemd, SystemdError};

/// Why the limits were not changed.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot update container `{id}`: it is {status}")]
    Status { id: String, status: Status },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Systemd(#[from] SystemdError),
}

/// Sets the limits that `resources` names; the others stay.
///
/// # Errors
/// Those of [`UpdateError`]; the limits are then as they were.
pub fn update(root: &Path, id: &str, resources: &LinuxResources) -> Result<(), UpdateError> {
    let home = Home::open(root, id)?;
    let record = home.record()?;
    let (status, _) = home.observe(&record)?;
    if matches!(status, Status::Creating | Status::Stopped) {
        return Err(UpdateError::Status {
            id: id.to_owned(),
            status,
        });
    }
    let cgroup = Cgroup::open(&record.cgroup)?;
    cgroup.update(resources)?;
    if let Some(unit) = &record.scope {
        let properties = cgroup.properties(resources, resources.devices().is_some())?;
        Systemd::connect()?.set(unit, &properties)?;
    }
    Ok(())
}
