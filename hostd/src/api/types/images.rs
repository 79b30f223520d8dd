//! The wire form of images.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Problem;

/// One image of the store.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct Image {
    pub reference: String,
    /// Of the image's manifest, `sha256:…`.
    pub digest: String,
    /// Compressed bytes of its layers.
    pub size: u64,
    pub architecture: String,
    #[schema(value_type = String)]
    pub created_at: Timestamp,
}

/// `POST /v1/images/pull`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    pub reference: String,
    /// Speak plain HTTP. Loopback registries are spoken to in plain HTTP without it.
    #[serde(default)]
    pub insecure: bool,
}

/// `POST /v1/images/import`: an OCI layout (a directory or a tar of one) on the host.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ImportRequest {
    /// An absolute path of the host.
    pub path: String,
    /// The name to give it. If absent, the layout's own `org.opencontainers.image.ref.name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
}

/// A line of the NDJSON that `pull` and `import` answer with under `Accept: application/x-ndjson`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TransferEvent {
    Progress {
        /// The blob, `sha256:…`.
        digest: String,
        done_bytes: u64,
        total_bytes: u64,
    },
    Unpacking {
        digest: String,
    },
    Done(Image),
    Failed(Problem),
}
