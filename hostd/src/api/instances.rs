//! `/v1/instances`: what instances there are, and how they are made, changed and removed.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::Context;
use super::error::ApiError;
use super::extract::{Body, Query, if_match};
use super::types::{Instance, InstancePatch, InstanceSpec, PatchResult, Problem, Stats};
use super::verbs::parse_states;
use crate::instance::Made;
use crate::lifecycle::Request;

/// An instance with its `ETag`.
pub(super) struct Tagged(pub(super) StatusCode, pub(super) Instance);

impl IntoResponse for Tagged {
    fn into_response(self) -> Response {
        let tag = HeaderValue::from_str(&format!("\"{}\"", self.1.generation));
        let mut response = (self.0, Json(self.1)).into_response();
        if let Ok(tag) = tag {
            response.headers_mut().insert(header::ETAG, tag);
        }
        response
    }
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ListQuery {
    /// Labels that must be there, as `KEY=VALUE` or `KEY`, separated by commas.
    label: Option<String>,
    /// States to list, separated by commas.
    state: Option<String>,
}

/// Lists instances by name.
#[utoipa::path(get, path = "/v1/instances", params(ListQuery), responses(
    (status = 200, body = Vec<Instance>), (status = 400, body = Problem)))]
pub(super) async fn list(
    State(context): State<Context>,
    Query(query): Query<ListQuery>,
) -> Result<Json<Vec<Instance>>, ApiError> {
    let states = query.state.as_deref().map(parse_states).transpose()?;
    let mut instances = context.instances.list();
    instances.retain(|instance| {
        let state_fits = states
            .as_ref()
            .is_none_or(|states| states.contains(&instance.state));
        let labels_fit = query
            .label
            .iter()
            .flat_map(|label| label.split(','))
            .all(|wanted| match wanted.split_once('=') {
                Some((key, value)) => instance
                    .spec
                    .labels
                    .get(key)
                    .is_some_and(|found| found == value),
                None => instance.spec.labels.contains_key(wanted),
            });
        state_fits && labels_fit
    });
    Ok(Json(instances))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct CreateQuery {
    /// Starts the instance as well.
    #[serde(default)]
    start: bool,
    /// For a clone: `false` has its first start begin with the files alone, even if the snapshot holds
    /// memory to go on from.
    stateful: Option<bool>,
}

/// Makes an instance. Nothing of it runs until it is started. With `from_snapshot` it is a clone, for
/// which `image` may be left out.
#[utoipa::path(post, path = "/v1/instances", params(CreateQuery), request_body = InstanceSpec,
    responses((status = 201, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn create(
    State(context): State<Context>,
    Query(query): Query<CreateQuery>,
    Body(wanted): Body<Map<String, Value>>,
) -> Result<Tagged, ApiError> {
    let order = context.instances.order(wanted, query.stateful).await?;
    let instance = context.instances.create(order).await?;
    if !query.start {
        return Ok(Tagged(StatusCode::CREATED, instance));
    }
    let handle = context.instances.find(&instance.name)?;
    let instance = handle.request(Request::Start, None).await?;
    Ok(Tagged(StatusCode::CREATED, instance))
}

/// Shows an instance.
#[utoipa::path(get, path = "/v1/instances/{name}", params(("name" = String, Path)), responses(
    (status = 200, body = Instance), (status = 404, body = Problem)))]
pub(super) async fn show(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Tagged, ApiError> {
    let instance = context.instances.find(&name)?.instance();
    Ok(Tagged(StatusCode::OK, instance))
}

/// Makes an instance of this name unless it is there as wanted: 201 if it was made, 200 if it was
/// there.
#[utoipa::path(put, path = "/v1/instances/{name}", params(("name" = String, Path)),
    request_body = InstanceSpec,
    responses((status = 200, body = Instance), (status = 201, body = Instance),
        (status = "4XX", body = Problem)))]
pub(super) async fn ensure(
    State(context): State<Context>,
    Path(name): Path<String>,
    Body(wanted): Body<Map<String, Value>>,
) -> Result<Tagged, ApiError> {
    let order = context.instances.order(wanted, None).await?;
    Ok(match context.instances.ensure(order, &name).await? {
        Made::New(instance) => Tagged(StatusCode::CREATED, instance),
        Made::Existing(instance) => Tagged(StatusCode::OK, instance),
    })
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct UpdateQuery {
    /// Answers with the plan and changes nothing.
    #[serde(default)]
    dry_run: bool,
}

/// Changes limits and labels, all or nothing. With `If-Match`, only if the instance is as it was.
#[utoipa::path(patch, path = "/v1/instances/{name}",
    params(("name" = String, Path), UpdateQuery), request_body = InstancePatch,
    responses((status = 200, body = PatchResult), (status = "4XX", body = Problem)))]
pub(super) async fn update(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<UpdateQuery>,
    headers: HeaderMap,
    Body(patch): Body<InstancePatch>,
) -> Result<Json<PatchResult>, ApiError> {
    let generation = if_match(&headers)?;
    let handle = context.instances.find(&name)?;
    Ok(Json(handle.patch(patch, generation, query.dry_run).await?))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct RemoveQuery {
    /// Kills it first, if it runs.
    #[serde(default)]
    force: bool,
}

/// Removes an instance and all it has.
#[utoipa::path(delete, path = "/v1/instances/{name}",
    params(("name" = String, Path), RemoveQuery),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn remove(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<RemoveQuery>,
) -> Result<StatusCode, ApiError> {
    context.instances.find(&name)?.remove(query.force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What an instance uses; zeros if it does not run.
#[utoipa::path(get, path = "/v1/instances/{name}/stats", params(("name" = String, Path)),
    responses((status = 200, body = Stats), (status = "4XX", body = Problem)))]
pub(super) async fn stats(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Json<Stats>, ApiError> {
    Ok(Json(context.instances.stats(&name).await?))
}
