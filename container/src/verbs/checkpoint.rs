//! `checkpoint`: writes a running container to files.

use std::path::Path;

use crate::cgroup::{Cgroup, CgroupError};
use crate::criu::{Criu, CriuError, Dump, DumpOptions};
use crate::spec::{Config, SpecError};
use crate::state::{Home, StateError, Status};
use crate::verbs::delete::{DeleteError, DeleteOptions, delete};

/// Why a container was not checkpointed.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("cannot checkpoint container `{id}`: it is {status}, and neither running nor paused")]
    Status { id: String, status: Status },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Criu(#[from] CriuError),
    #[error(transparent)]
    Delete(#[from] DeleteError),
}

/// Checkpoints the container `id` with CRIU, `criu` in PATH if none is named, and deletes it unless it is
/// to go on. Returns what its poststop hooks had to say.
///
/// # Errors
/// Those of [`CheckpointError`]; the container goes on then, but where it could only not be deleted.
pub fn checkpoint(
    root: &Path,
    id: &str,
    criu: Option<&Path>,
    options: &DumpOptions,
) -> Result<Vec<String>, CheckpointError> {
    let home = Home::open(root, id)?;
    home.lock()?;
    let record = home.record()?;
    let (status, process) = home.observe(&record)?;
    let process = match (status, process) {
        (Status::Running | Status::Paused, Some(process)) => process,
        (status, _) => {
            return Err(CheckpointError::Status {
                id: id.to_owned(),
                status,
            });
        }
    };
    let criu = Criu::find(criu)?;
    let config = Config::load_file(&home.config_path())?;
    let cgroup = Cgroup::open(&record.cgroup)?;
    let dump = Dump {
        spec: &config.spec,
        annotations: &record.annotations,
        rootfs: &record.rootfs,
        pid: process.pid(),
        cgroup: &cgroup,
        options,
    };
    dump.run(&criu)?;
    drop(home);
    if options.pre_dump || options.leave_running {
        return Ok(Vec::new());
    }
    Ok(delete(&DeleteOptions {
        root: root.to_owned(),
        id: id.to_owned(),
        force: true,
    })?)
}
