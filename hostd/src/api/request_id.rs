//! A number for each request, in the answer's `X-Request-Id`, in problems and in the log.

use axum::extract::Request;
use axum::http::HeaderValue;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::error::ApiError;

/// The header that carries the number.
const HEADER: &str = "x-request-id";

/// Stamps the answer; one that is a problem is put into words here, with the number in it.
pub(super) async fn stamp(request: Request, next: Next) -> Response {
    let id = format!("{:016x}", crate::random::number());
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        if error.status.is_server_error() {
            tracing::error!(request_id = id, %method, path, "{}", error.detail);
        }
        response = error.into_problem(&id).into_response();
    }
    let status = response.status().as_u16();
    tracing::debug!(request_id = id, %method, path, status, "answered");
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}
