//! `update`: changes the limits of a container that exists.

use std::path::Path;

use oci_spec::runtime::LinuxResources;

use crate::cgroup::{Cgroup, CgroupError};
use crate::plan::{PlanError, rdt};
use crate::resctrl::{ResctrlError, ResctrlGroups};
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
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Resctrl(#[from] ResctrlError),
    #[error(
        "container `{id}` has no share of Intel RDT to change: its configuration has no linux.intelRdt"
    )]
    NoShares { id: String },
}

/// What a container may have of caches and memory bandwidth, as lines of a resctrl file system; what is
/// not given stays.
#[derive(Clone, Debug, Default)]
pub struct Shares {
    /// As `L3:0=7f0;1=1f`.
    pub cache: Option<String>,
    /// As `MB:0=20;1=70`.
    pub bandwidth: Option<String>,
}

/// Sets the limits that `resources` names; the others stay.
///
/// # Errors
/// Those of [`UpdateError`]; the limits are then as they were.
pub fn update(
    root: &Path,
    id: &str,
    resources: &LinuxResources,
    shares: Shares,
) -> Result<(), UpdateError> {
    let home = Home::open(root, id)?;
    let record = home.record()?;
    let (status, _) = home.observe(&record)?;
    if matches!(status, Status::Creating | Status::Stopped) {
        return Err(UpdateError::Status {
            id: id.to_owned(),
            status,
        });
    }
    let schemata = rdt::changed(shares.cache, shares.bandwidth)?;
    let groups = match &record.resctrl {
        None if !schemata.is_empty() => return Err(UpdateError::NoShares { id: id.to_owned() }),
        groups => groups.as_ref().filter(|_| !schemata.is_empty()),
    };
    let cgroup = Cgroup::open(&record.cgroup)?;
    let before = groups.map(ResctrlGroups::schemata).transpose()?;
    if let Some(groups) = groups {
        groups.update(&schemata)?;
    }
    if let Err(error) = cgroup.update(resources) {
        if let (Some(groups), Some(before)) = (groups, before) {
            // What is reported is the first error.
            let _ = groups.update(&before);
        }
        return Err(error.into());
    }
    if let Some(unit) = &record.scope {
        let properties = cgroup.properties(resources, resources.devices().is_some())?;
        Systemd::connect()?.set(unit, &properties)?;
    }
    Ok(())
}
