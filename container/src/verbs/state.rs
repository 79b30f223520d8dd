//! `state`: what a container is, and what it is doing now.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::state::{Home, Record, StateError, Status};

/// The state of a container as the specification has it, and a little more.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    pub oci_version: String,
    pub id: String,
    /// 0 when there is no process.
    pub pid: i32,
    pub status: Status,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: Timestamp,
    /// The user that made the container.
    pub owner: String,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl State {
    fn new(record: &Record, status: Status, pid: i32) -> Self {
        Self {
            oci_version: record.oci_version.clone(),
            id: record.id.clone(),
            pid,
            status,
            bundle: record.bundle.clone(),
            rootfs: record.rootfs.clone(),
            created: record.created,
            owner: owner_name(record.owner),
            annotations: record.annotations.clone(),
        }
    }
}

/// The state of the container `id`.
///
/// # Errors
/// [`StateError::NotFound`] if there is none.
pub fn state(root: &Path, id: &str) -> Result<State, StateError> {
    let home = Home::open(root, id)?;
    let record = home.record()?;
    let (status, process) = home.observe(&record)?;
    Ok(State::new(
        &record,
        status,
        process.map_or(0, |process| process.pid()),
    ))
}

/// The state as hooks read it.
pub(crate) fn oci_state(record: &Record, status: Status, pid: i32) -> String {
    let state = State::new(record, status, pid);
    serde_json::to_string(&state).expect("strings and numbers can be written as JSON")
}

fn owner_name(uid: u32) -> String {
    if uid == 0 {
        return "root".to_owned();
    }
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid))
        .ok()
        .flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}
