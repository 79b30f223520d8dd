//! `/v1/instances/{name}/logs`: what a workload has written, as lines of JSON.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use futures::stream;
use jiff::Timestamp;
use serde::Deserialize;

use super::Context;
use super::error::ApiError;
use super::extract::Query;
use super::types::{LogLine, Problem};
use crate::driver;
use crate::logs::{LogReader, Selection};

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct LogsQuery {
    /// Goes on with what is written from now on, until the instance stops.
    #[serde(default)]
    follow: bool,
    /// Only lines written at or after this time (RFC 3339).
    #[param(value_type = Option<String>)]
    since: Option<Timestamp>,
    /// Only the last so many lines of what is there.
    tail: Option<usize>,
}

/// Reads a workload's log.
#[utoipa::path(get, path = "/v1/instances/{name}/logs",
    params(("name" = String, Path), LogsQuery),
    responses((status = 200, body = LogLine, content_type = "application/x-ndjson"),
        (status = "4XX", body = Problem)))]
pub(super) async fn read(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<LogsQuery>,
) -> Result<Response, ApiError> {
    let handle = context.instances.find(&name)?;
    let selection = Selection {
        since: query.since,
        tail: query.tail,
        follow: query.follow,
    };
    let reader = LogReader::open(context.paths.log(&name), selection, handle);
    let lines = stream::unfold(reader, async |mut reader| match reader.next().await {
        Ok(Some(lines)) => Some((Ok(lines), reader)),
        Ok(None) => None,
        Err(error) => {
            tracing::error!(error = driver::chain(&error), "a log cannot be read");
            Some((Err(error), reader))
        }
    })
    .take_until(context.stopping.cancelled_owned());
    let lines_of_json = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((lines_of_json, Body::from_stream(lines)).into_response())
}
