//! `/v1/instances/{name}/exec`, `/attach` and `/console`: talking to what runs in an instance.
//!
//! | call | what follows |
//! |---|---|
//! | `POST …/exec` with an [`ExecRequest`] | one answer, an [`ExecResult`] |
//! | the same with `Accept: application/x-ndjson` | the process's frames, a line each |
//! | `GET …/exec` with a WebSocket upgrade | the client's first message is the [`ExecRequest`], then frames |
//! | `POST …/attach` | the workload's frames from now on, a line each |
//! | `GET …/attach?stdin=true` with a WebSocket upgrade | frames, as soon as it runs |
//! | `POST …/console` | what a VM writes to its console as frames, a line each |
//! | `GET …/console?stdin=true` with a WebSocket upgrade | frames |
//!
//! Frames are those of `agent::protocol::Frame`.

use std::time::Duration;

use axum::Json;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::time;

use super::Context;
use super::error::ApiError;
use super::extract::{Body, Query, wants_lines};
use super::stream::{self, Timed};
use super::types::{ExecRequest, ExecResult, Problem};
use crate::driver::{self, Channel};
use crate::pointer;
use crate::validate::{self, FieldError};

/// How long a client may take to say what it wants run.
const FIRST_MESSAGE_DEADLINE: Duration = Duration::from_secs(10);

/// A day; what runs longer is a workload.
const TIMEOUT_MAX_MS: u64 = 24 * 3600 * 1000;

/// Runs a process in a running instance.
#[utoipa::path(post, path = "/v1/instances/{name}/exec", params(("name" = String, Path)),
    request_body = ExecRequest,
    responses((status = 200, body = ExecResult), (status = "4XX", body = Problem)))]
pub(super) async fn exec(
    State(context): State<Context>,
    Path(name): Path<String>,
    headers: HeaderMap,
    Body(mut request): Body<ExecRequest>,
) -> Result<Response, ApiError> {
    check(&request)?;
    let input = request.input.take();
    let timeout_ms = request.timeout_ms;
    if wants_lines(&headers) {
        let session = context
            .instances
            .talk(&name, Channel::Exec(Box::new(request)))
            .await?;
        let timed = Timed::new(session, timeout_ms);
        timed.feed(input.unwrap_or_default());
        return Ok(stream::lines(timed, context.stopping.clone()));
    }
    let session = context
        .instances
        .talk(&name, Channel::Exec(Box::new(request)))
        .await?;
    let timed = Timed::new(session, timeout_ms);
    timed.feed(input.unwrap_or_default());
    match stream::gather(timed).await {
        Ok(result) => Ok(Json(result).into_response()),
        Err((code, message)) => Err(ApiError::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            match code {
                126 => "not_executable",
                127 => "no_such_program",
                _ => "exec_failed",
            },
            message,
        )
        .field("/command")),
    }
}

/// Runs a process in a running instance, over a WebSocket: the first message is the request.
#[utoipa::path(get, path = "/v1/instances/{name}/exec", params(("name" = String, Path)),
    responses((status = 101, description = "frames as text messages, both ways"),
        (status = "4XX", body = Problem)))]
pub(super) async fn exec_socket(
    State(context): State<Context>,
    Path(name): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ApiError> {
    context.instances.find(&name)?;
    Ok(
        stream::bounded(upgrade).on_upgrade(async move |mut socket| {
            let opened = open(&context, &name, &mut socket).await;
            match opened {
                Ok(timed) => {
                    stream::socket(socket, Vec::new(), timed, context.stopping.clone()).await;
                }
                Err(message) => stream::refuse(&mut socket, &message).await,
            }
        }),
    )
}

async fn open(context: &Context, name: &str, socket: &mut WebSocket) -> Result<Timed, String> {
    let message = time::timeout(FIRST_MESSAGE_DEADLINE, socket.recv()).await;
    let Ok(Some(Ok(Message::Text(text)))) = message else {
        return Err("the first message must be the exec request".to_owned());
    };
    let request: ExecRequest =
        pointer::parse(text.as_bytes()).map_err(|error| error.to_string())?;
    check(&request).map_err(|error| error.to_string())?;
    if request.input.is_some() {
        return Err("/input: is sent as stdin frames over a WebSocket".to_owned());
    }
    let timeout_ms = request.timeout_ms;
    let session = context
        .instances
        .talk(name, Channel::Exec(Box::new(request)))
        .await
        .map_err(|error| driver::chain(&error))?;
    Ok(Timed::new(session, timeout_ms))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct AttachQuery {
    /// Gives the workload this client's input; one client at a time has it.
    #[serde(default)]
    stdin: bool,
}

/// Follows a running workload's output.
#[utoipa::path(post, path = "/v1/instances/{name}/attach", params(("name" = String, Path)),
    responses((status = 200, content_type = "application/x-ndjson"),
        (status = "4XX", body = Problem)))]
pub(super) async fn attach(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let channel = Channel::Attach { stdin: false };
    let session = context.instances.talk(&name, channel).await?;
    Ok(stream::lines(
        Timed::new(session, None),
        context.stopping.clone(),
    ))
}

/// Joins a workload's streams, over a WebSocket: at once if it runs, or else as soon as it does.
#[utoipa::path(get, path = "/v1/instances/{name}/attach",
    params(("name" = String, Path), AttachQuery),
    responses((status = 101, description = "frames as text messages, both ways"),
        (status = "4XX", body = Problem)))]
pub(super) async fn attach_socket(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<AttachQuery>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ApiError> {
    context.instances.find(&name)?;
    Ok(
        stream::bounded(upgrade).on_upgrade(async move |mut socket| {
            let mut early = Vec::new();
            let joining = context.instances.join(&name, query.stdin);
            let joined =
                stream::meanwhile(&mut socket, &mut early, &context.stopping, joining).await;
            match joined {
                Some(Ok(session)) => {
                    let timed = Timed::new(session, None);
                    stream::socket(socket, early, timed, context.stopping.clone()).await;
                }
                Some(Err(error)) => stream::refuse(&mut socket, &driver::chain(&error)).await,
                // The client has gone, or hostd goes.
                None => {}
            }
        }),
    )
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct ConsoleQuery {
    /// Lets this client type; one at a time may.
    #[serde(default)]
    stdin: bool,
}

/// Follows what a VM writes to its console, beginning with the last of what it has written.
#[utoipa::path(post, path = "/v1/instances/{name}/console", params(("name" = String, Path)),
    responses((status = 200, content_type = "application/x-ndjson"),
        (status = "4XX", body = Problem)))]
pub(super) async fn console(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let session = context.instances.console(&name, false).await?;
    Ok(stream::lines(
        Timed::new(session, None),
        context.stopping.clone(),
    ))
}

/// Goes to a VM's console, over a WebSocket. The session ends with the machine, or when it is sent a
/// signal.
#[utoipa::path(get, path = "/v1/instances/{name}/console",
    params(("name" = String, Path), ConsoleQuery),
    responses((status = 101, description = "frames as text messages, both ways"),
        (status = "4XX", body = Problem)))]
pub(super) async fn console_socket(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<ConsoleQuery>,
    upgrade: WebSocketUpgrade,
) -> Result<Response, ApiError> {
    // Before the upgrade, so that a refusal is a problem like any other.
    let session = context.instances.console(&name, query.stdin).await?;
    Ok(stream::bounded(upgrade).on_upgrade(async move |socket| {
        let timed = Timed::new(session, None);
        stream::socket(socket, Vec::new(), timed, context.stopping.clone()).await;
    }))
}

fn check(request: &ExecRequest) -> Result<(), FieldError> {
    if request.command.first().is_none_or(String::is_empty) {
        return Err(FieldError::new(
            "/command",
            "must be a program and its arguments",
        ));
    }
    validate::check_args("/command", &request.command)?;
    for (key, value) in &request.env {
        validate::check_env(&validate::pointer("/env", key), key, value)?;
    }
    if let Some(user) = &request.user {
        validate::check_user("/user", user)?;
    }
    if let Some(directory) = &request.working_dir {
        validate::check_absolute("/working_dir", directory)?;
    }
    match request.timeout_ms {
        Some(ms) if !(1..=TIMEOUT_MAX_MS).contains(&ms) => Err(FieldError::new(
            "/timeout_ms",
            format!("must be from 1 to {TIMEOUT_MAX_MS}, not {ms}"),
        )),
        _ => Ok(()),
    }
}
