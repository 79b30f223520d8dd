//! `/v1/instances/{name}/VERB`: changes of state. Each answers once the change has come about.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use nix::sys::signal::Signal;
use serde::Deserialize;
use tokio::time;

use super::Context;
use super::error::ApiError;
use super::extract::Query;
use super::instances::Tagged;
use super::types::{Instance, InstanceState, Problem};
use crate::lifecycle::{self, Request};
use crate::validate::STOP_TIMEOUT_MAX_S;

/// The longest that one `wait` holds its connection.
const WAIT_MAX_S: u64 = 24 * 3600;
const WAIT_DEFAULT_S: u64 = 60;

async fn request(
    context: &Context,
    name: &str,
    request: Request,
    patience: Option<Duration>,
) -> Result<Tagged, ApiError> {
    let handle = context.instances.find(name)?;
    Ok(Tagged(
        StatusCode::OK,
        handle.request(request, patience).await?,
    ))
}

/// Starts an instance; answered once its workload runs.
#[utoipa::path(post, path = "/v1/instances/{name}/start", params(("name" = String, Path)),
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn start(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Tagged, ApiError> {
    request(&context, &name, Request::Start, None).await
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct StopQuery {
    /// Seconds between the polite signal and the kill, instead of the instance's own.
    timeout_s: Option<u32>,
}

impl StopQuery {
    fn patience(&self) -> Result<Option<Duration>, ApiError> {
        match self.timeout_s {
            Some(seconds) if seconds > STOP_TIMEOUT_MAX_S => Err(invalid(
                "timeout_s",
                format!("must be at most {STOP_TIMEOUT_MAX_S}"),
            )),
            seconds => Ok(seconds.map(|seconds| Duration::from_secs(u64::from(seconds)))),
        }
    }
}

/// Asks the workload to stop, and kills it if it does not.
#[utoipa::path(post, path = "/v1/instances/{name}/stop",
    params(("name" = String, Path), StopQuery),
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn stop(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<StopQuery>,
) -> Result<Tagged, ApiError> {
    request(&context, &name, Request::Stop, query.patience()?).await
}

/// Stops an instance and starts it again; one that does not run is started.
#[utoipa::path(post, path = "/v1/instances/{name}/restart",
    params(("name" = String, Path), StopQuery),
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn restart(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<StopQuery>,
) -> Result<Tagged, ApiError> {
    request(&context, &name, Request::Restart, query.patience()?).await
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct KillQuery {
    /// A signal's name (`HUP`, `SIGHUP`) or number. Any but KILL is just delivered.
    signal: Option<String>,
}

/// Ends the workload at once; with another signal than KILL, delivers that and no more.
#[utoipa::path(post, path = "/v1/instances/{name}/kill",
    params(("name" = String, Path), KillQuery),
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn kill(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<KillQuery>,
) -> Result<Tagged, ApiError> {
    let signal = match &query.signal {
        Some(text) => parse_signal(text)
            .ok_or_else(|| invalid("signal", format!("there is no signal `{text}`")))?,
        None => Signal::SIGKILL,
    };
    if signal == Signal::SIGKILL {
        return request(&context, &name, Request::Kill, None).await;
    }
    let instance = context.instances.signal(&name, signal).await?;
    Ok(Tagged(StatusCode::OK, instance))
}

/// Freezes every process of an instance.
#[utoipa::path(post, path = "/v1/instances/{name}/pause", params(("name" = String, Path)),
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn pause(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Tagged, ApiError> {
    request(&context, &name, Request::Pause, None).await
}

/// The opposite of pause.
#[utoipa::path(post, path = "/v1/instances/{name}/resume", params(("name" = String, Path)),
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn resume(
    State(context): State<Context>,
    Path(name): Path<String>,
) -> Result<Tagged, ApiError> {
    request(&context, &name, Request::Resume, None).await
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct WaitQuery {
    /// States to wait for, separated by commas; `stopped,failed` if absent.
    state: Option<String>,
    /// Seconds; 60 if absent.
    timeout_s: Option<u64>,
}

/// Waits until an instance is in one of the states; 408 if it does not get there in time.
#[utoipa::path(get, path = "/v1/instances/{name}/wait",
    params(("name" = String, Path), WaitQuery),
    responses((status = 200, body = Instance), (status = "4XX", body = Problem)))]
pub(super) async fn wait(
    State(context): State<Context>,
    Path(name): Path<String>,
    Query(query): Query<WaitQuery>,
) -> Result<Tagged, ApiError> {
    let states = match &query.state {
        Some(text) => parse_states(text)?,
        None => vec![InstanceState::Stopped, InstanceState::Failed],
    };
    let seconds = query.timeout_s.unwrap_or(WAIT_DEFAULT_S);
    if seconds > WAIT_MAX_S {
        return Err(invalid(
            "timeout_s",
            format!("must be at most {WAIT_MAX_S}"),
        ));
    }
    let handle = context.instances.find(&name)?;
    tokio::select! {
        waited = time::timeout(Duration::from_secs(seconds), handle.wait(&states)) => {
            match waited {
                Ok(instance) => Ok(Tagged(StatusCode::OK, instance?)),
                Err(_) => Err(ApiError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "wait_timeout",
                    format!(
                        "after {seconds} s the instance is {}",
                        lifecycle::name(handle.instance().state)
                    ),
                )
                .retryable()),
            }
        }
        () = context.stopping.cancelled() => Err(ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "shutting_down",
            "hostd is being stopped; the instance is not",
        )
        .retryable()),
    }
}

/// The states of a list such as `stopped,failed`.
///
/// # Errors
/// One of them is none.
pub(super) fn parse_states(text: &str) -> Result<Vec<InstanceState>, ApiError> {
    text.split(',')
        .map(|word| {
            serde_json::from_value(serde_json::Value::from(word))
                .map_err(|_| invalid("state", format!("there is no state `{word}`")))
        })
        .collect()
}

/// The signal of a name, with or without `SIG`, or of a number.
fn parse_signal(text: &str) -> Option<Signal> {
    if let Ok(number) = text.parse::<i32>() {
        return Signal::try_from(number).ok();
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") {
        name
    } else {
        format!("SIG{name}")
    };
    name.parse().ok()
}

fn invalid(parameter: &str, detail: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_query", detail).field(parameter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_go_by_name_and_number() {
        for (text, signal) in [
            ("HUP", Some(Signal::SIGHUP)),
            ("sigterm", Some(Signal::SIGTERM)),
            ("9", Some(Signal::SIGKILL)),
            ("0", None),
            ("65", None),
            ("NONE", None),
            ("", None),
        ] {
            assert_eq!(parse_signal(text), signal, "{text}");
        }
    }
}
