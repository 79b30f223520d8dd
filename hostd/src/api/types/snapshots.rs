//! The wire form of snapshots.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::InstanceSpec;

/// `POST /v1/instances/{name}/snapshots`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// As an instance's name; `snap0`, `snap1` and so on if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// With the memory of an instance that runs or is paused, so that a restore goes on where it was.
    /// Only for isolation `vm`.
    #[serde(default)]
    pub stateful: bool,
}

/// `POST /v1/instances/{name}/snapshots/{snapshot}/restore`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Whether to go on from the memory of the snapshot. If absent: if it has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stateful: Option<bool>,
}

/// `GET /v1/instances/{name}/snapshots/{snapshot}`: what an instance was at one moment.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Snapshot {
    pub instance: String,
    pub name: String,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
    /// Whether it holds memory.
    pub stateful: bool,
    /// What it takes of the disk at most, in bytes: less where the file system can share blocks.
    pub size_bytes: u64,
    /// The manifest digest of the image that it lies over.
    pub image_digest: String,
    /// What the instance was asked to be at that moment. A restore brings it back too.
    pub spec: InstanceSpec,
}
