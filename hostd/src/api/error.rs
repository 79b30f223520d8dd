//! Errors as RFC 9457 problems: whose fault, which field, what to do.
//!
//! 4xx is the caller's part to mend, 5xx is ours or the host's. Codes are stable; texts are not.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};

use super::types::{InstanceState, Problem};
use crate::driver::{self, DriverError};
use crate::instance::{InstanceError, SupplyError};
use crate::store::StoreError;
use crate::validate::FieldError;

/// An answer that is not what was asked for.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    code: &'static str,
    pub(super) detail: String,
    field: Option<String>,
    hint: Option<String>,
    retryable: bool,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            field: None,
            hint: None,
            retryable: false,
        }
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    pub(super) fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }

    /// The problem as it goes over the wire, where no response carries it.
    pub(super) fn to_problem(&self, request_id: &str) -> Problem {
        Problem {
            code: self.code.to_owned(),
            status: self.status.as_u16(),
            detail: self.detail.clone(),
            field: self.field.clone(),
            hint: self.hint.clone(),
            retryable: self.retryable,
            request_id: request_id.to_owned(),
        }
    }

    pub(super) fn into_problem(self, request_id: &str) -> impl IntoResponse + use<> {
        let mut response = (self.status, Json(self.to_problem(request_id))).into_response();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        response
    }
}

impl IntoResponse for ApiError {
    /// `request_id::stamp` turns it into a problem.
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

impl From<FieldError> for ApiError {
    fn from(error: FieldError) -> Self {
        let code = if error.field.is_empty() {
            "malformed_json"
        } else if error.detail.starts_with("unknown field") {
            "unknown_field"
        } else {
            "invalid_field"
        };
        Self {
            status: StatusCode::BAD_REQUEST,
            code,
            detail: error.detail,
            field: (!error.field.is_empty()).then_some(error.field),
            hint: error.hint,
            retryable: false,
        }
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_query",
            rejection.body_text(),
        )
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let detail = driver::chain(&error);
        match error {
            StoreError::NameTaken(_) => Self::new(StatusCode::CONFLICT, "name_taken", detail)
                .field("/name")
                .hint("choose another name, or remove the instance that has it"),
            StoreError::Database(_) | StoreError::TooNew { .. } | StoreError::Malformed { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "store_failed", detail)
            }
        }
    }
}

impl From<InstanceError> for ApiError {
    fn from(error: InstanceError) -> Self {
        let detail = driver::chain(&error);
        match error {
            InstanceError::NotFound(_) => Self::new(StatusCode::NOT_FOUND, "not_found", detail)
                .hint("`hostctl list --all` shows those that there are"),
            InstanceError::NoImage(image) => {
                Self::new(StatusCode::NOT_FOUND, "image_not_found", detail)
                    .field("/image")
                    .hint(format!("pull it first: hostctl image pull {image}"))
            }
            InstanceError::NoSnapshot { instance, .. } => {
                Self::new(StatusCode::NOT_FOUND, "snapshot_not_found", detail).hint(format!(
                    "see what there is: hostctl snapshot list {instance}"
                ))
            }
            InstanceError::SnapshotTaken(_) => {
                Self::new(StatusCode::CONFLICT, "name_taken", detail)
                    .field("/name")
                    .hint("choose another name, or remove the snapshot that has it")
            }
            InstanceError::SnapshotsFull => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "full", detail)
                    .hint("remove a snapshot that is not needed any more")
            }
            InstanceError::Different(_) => Self::new(StatusCode::CONFLICT, "name_taken", detail)
                .field("/name")
                .hint("remove it first, or change its limits and labels with PATCH"),
            InstanceError::Full => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "full", detail).retryable()
            }
            InstanceError::Refused(refused) => {
                let error =
                    Self::new(StatusCode::CONFLICT, "refused", detail).hint(refused.remedy());
                if refused.is_retryable() {
                    error.retryable()
                } else {
                    error
                }
            }
            InstanceError::NotRunning(state) => {
                let hint = if state == InstanceState::Paused {
                    "resume it first"
                } else {
                    "start it first"
                };
                Self::new(StatusCode::CONFLICT, "not_running", detail).hint(hint)
            }
            InstanceError::Field(field) => field.into(),
            InstanceError::Stale { .. } => {
                Self::new(StatusCode::PRECONDITION_FAILED, "stale", detail)
                    .hint("read the instance again and repeat the change")
            }
            InstanceError::CalledOff => Self::new(StatusCode::CONFLICT, "called_off", detail),
            InstanceError::Busy => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "busy", detail).retryable()
            }
            InstanceError::Unreachable => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unreachable", detail).retryable()
            }
            InstanceError::Supply(SupplyError::NoAddress) => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "no_address", detail)
                    .hint("remove instances, or give hostd a larger --subnet")
            }
            InstanceError::Supply(SupplyError::Image(_)) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "image_store_failed",
                detail,
            ),
            InstanceError::Store(error) => error.into(),
            InstanceError::Driver(error) => from_driver(&error),
        }
    }
}

fn from_driver(error: &DriverError) -> ApiError {
    let detail = driver::chain(error);
    match error {
        DriverError::Field(field) => {
            let mut api: ApiError = field.clone().into();
            api.status = StatusCode::UNPROCESSABLE_ENTITY;
            api
        }
        DriverError::Workload { .. } => {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "start_failed", detail)
                .hint("see its log, and check the command and the working directory")
        }
        DriverError::NoSuchProgram { .. } => {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "no_such_program", detail)
                .hint("check the command and its PATH")
        }
        DriverError::NotExecutable { .. } => {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "not_executable", detail)
                .hint("check that it is a program for this host, and its permissions")
        }
        DriverError::Unavailable { hint, .. } => {
            ApiError::new(StatusCode::NOT_IMPLEMENTED, "unavailable", detail).hint(*hint)
        }
        DriverError::Timeout { .. } => {
            ApiError::new(StatusCode::GATEWAY_TIMEOUT, "driver_timeout", detail).retryable()
        }
        DriverError::NotRunning => {
            ApiError::new(StatusCode::CONFLICT, "not_running", detail).hint("start it first")
        }
        DriverError::Paused => {
            ApiError::new(StatusCode::CONFLICT, "paused", detail).hint("resume it first")
        }
        DriverError::NoConsole(_) => ApiError::new(StatusCode::CONFLICT, "no_console", detail)
            .hint("use `hostctl exec -t` for a terminal in it"),
        DriverError::ConsoleTaken => ApiError::new(StatusCode::CONFLICT, "console_taken", detail)
            .hint("look on without typing: hostctl console --no-stdin")
            .retryable(),
        DriverError::ConsolesFull { .. } => {
            ApiError::new(StatusCode::CONFLICT, "consoles_full", detail).retryable()
        }
        DriverError::Memory { .. } => ApiError::new(StatusCode::CONFLICT, "guest_memory", detail)
            .hint("ask for a size nearer to what it had, or set it before the next start"),
        DriverError::Io { .. } | DriverError::Helper { .. } => {
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "driver_failed", detail)
        }
    }
}

pub(super) async fn no_such_path(uri: Uri) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no_such_path",
        format!("there is nothing at {}", uri.path()),
    )
    .hint("GET /v1/openapi.json lists what there is")
}

pub(super) async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "no_such_method",
        format!("{} does not take {method}", uri.path()),
    )
}
