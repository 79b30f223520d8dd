//! What is known of a container, and what it is doing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use oci_spec::runtime::Hook;
use serde::{Deserialize, Serialize};

use crate::resctrl::ResctrlGroups;

/// What is known of a container for as long as it exists.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub oci_version: String,
    pub id: String,
    /// Absolute.
    pub bundle: PathBuf,
    /// Absolute.
    pub rootfs: PathBuf,
    pub created: Timestamp,
    /// The user that made it.
    pub owner: u32,
    /// 0 until there is a process.
    #[serde(skip)]
    pub pid: i32,
    #[serde(skip)]
    pub start_time: u64,
    /// Path in every cgroup hierarchy; empty if there is no group.
    pub cgroup: String,
    /// The unit of systemd whose group it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// Its share of caches and memory bandwidth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resctrl: Option<ResctrlGroups>,
    /// The container has its caller's mount namespace, which says nothing of its root.
    #[serde(default)]
    pub shares_mounts: bool,
    /// The container keeps its caller's session keyring, and so do further processes.
    #[serde(default)]
    pub no_new_keyring: bool,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Hooks that run long after the creation: here, so that the configuration need not be read again.
    #[serde(default)]
    pub poststart: Vec<Hook>,
    #[serde(default)]
    pub poststop: Vec<Hook>,
}

/// What a container is doing.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}
