//! `/v1/instances/{name}/snapshots`: what an instance was at one moment, kept.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;

use super::Context;
use super::error::ApiError;
use super::extract::Body;
use super::instances::Tagged;
use super::types::{Instance, Problem, RestoreRequest, Snapshot, SnapshotRequest};

/// Lists the snapshots of an instance, the oldest first.
#[utoipa::path(get, path = "/v1/instances/{name}/snapshots", params(("name" = String, Path)),
    responses((status = 200, body = Vec<Snapshot>), (status = 404, body = Problem)))]
pub(super) async fn list(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Json<Vec<Snapshot>>, ApiError> {
    Ok(Json(context.instances.snapshots(&name).await?))
}

/// Keeps what an instance has written, and with `stateful` its memory. One that runs stands still
/// meanwhile, so that all of it is of one moment, and runs on.
#[utoipa::path(post, path = "/v1/instances/{name}/snapshots", params(("name" = String, Path)),
    request_body = SnapshotRequest,
    responses((status = 201, body = Snapshot), (status = "4XX", body = Problem)))]
pub(super) async fn create(
    State(context): State<Context>,
    Path(name): Path<String>,
    Body(request): Body<SnapshotRequest>,
) -> Result<(StatusCode, Json<Snapshot>), ApiError> {
    let snapshot = context.instances.find(&name)?.snapshot(request).await?;
    Ok((StatusCode::CREATED, Json(snapshot)))
}

/// Shows a snapshot.
#[utoipa::path(get, path = "/v1/instances/{name}/snapshots/{snapshot}",
    params(("name" = String, Path), ("snapshot" = String, Path)),
    responses((status = 200, body = Snapshot), (status = 404, body = Problem)))]
pub(super) async fn show(
    State(context): State<Context>,
    Path((name, snapshot)): Path<(String, String)>,
) -> Result<Json<Snapshot>, ApiError> {
    Ok(Json(context.instances.snapshot(&name, &snapshot).await?))
}

/// Removes a snapshot. Clones of it keep what they have.
#[utoipa::path(delete, path = "/v1/instances/{name}/snapshots/{snapshot}",
    params(("name" = String, Path), ("snapshot" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn remove(
    State(context): State<Context>,
    Path((name, snapshot)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let handle = context.instances.find(&name)?;
    handle.remove_snapshot(snapshot).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes an instance what it was: its files, its limits and labels, and, if the snapshot holds memory,
/// what it was doing. One that runs is killed for that and runs again afterwards.
#[utoipa::path(post, path = "/v1/instances/{name}/snapshots/{snapshot}/restore",
    params(("name" = String, Path), ("snapshot" = String, Path)),
    request_body = RestoreRequest,
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn restore(
    State(context): State<Context>,
    Path((name, snapshot)): Path<(String, String)>,
    Body(request): Body<RestoreRequest>,
) -> Result<Tagged, ApiError> {
    let handle = context.instances.find(&name)?;
    let instance = handle.restore(snapshot, request).await?;
    Ok(Tagged(StatusCode::OK, instance))
}
