//! `/v1/images`: what instances can be made from.

use axum::Json;
use axum::body::Body as HttpBody;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::Context;
use super::error::ApiError;
use super::extract::{Body, wants_lines};
use super::types::{Image, ImportRequest, Problem, PullRequest, TransferEvent};
use crate::driver::chain;
use crate::image::{ImageError, PullOptions};
use crate::paths::is_plain_absolute;
use crate::store::Happening;
use crate::validate::FieldError;

/// Progress that waits for a slow client; more is dropped.
const PROGRESS_MAX: usize = 64;

/// A pull or import on a task of its own, and its progress. Dropping it stops the work.
struct Work {
    result: JoinHandle<Result<Image, ImageError>>,
    progress: mpsc::Receiver<TransferEvent>,
}

impl Drop for Work {
    fn drop(&mut self) {
        self.result.abort();
    }
}

impl Work {
    async fn finish(&mut self, context: &Context, kind: &'static str) -> Result<Image, ApiError> {
        let image = match (&mut self.result).await {
            Ok(result) => result?,
            Err(_) => return Err(ImageError::Cancelled.into()),
        };
        tell(
            context,
            kind,
            &image.reference,
            json!({"digest": image.digest}),
        )
        .await?;
        Ok(image)
    }
}

/// Lists the images that have a name.
#[utoipa::path(get, path = "/v1/images", responses((status = 200, body = Vec<Image>)))]
pub(super) async fn list(State(context): State<Context>) -> Result<Json<Vec<Image>>, ApiError> {
    Ok(Json(context.images.list()?))
}

/// Shows an image. The reference may hold slashes.
#[utoipa::path(get, path = "/v1/images/{reference}", params(("reference" = String, Path)),
    responses((status = 200, body = Image), (status = 404, body = Problem)))]
pub(super) async fn show(
    State(context): State<Context>,
    Path(reference): Path<String>,
) -> Result<Json<Image>, ApiError> {
    Ok(Json(context.images.get(&reference)?))
}

/// Pulls an image from its registry. With `Accept: application/x-ndjson` progress is told in lines
/// of `TransferEvent`.
#[utoipa::path(post, path = "/v1/images/pull", request_body = PullRequest,
    responses((status = 200, body = Image), (status = "4XX", body = Problem)))]
pub(super) async fn pull(
    State(context): State<Context>,
    headers: HeaderMap,
    Body(request): Body<PullRequest>,
) -> Result<Response, ApiError> {
    let (sender, progress) = mpsc::channel(PROGRESS_MAX);
    let images = context.images.clone();
    let options = PullOptions {
        insecure: request.insecure,
        ..PullOptions::default()
    };
    let result =
        tokio::spawn(async move { images.pull(&request.reference, options, sender).await });
    answer(context, &headers, Work { result, progress }, "image.pulled").await
}

/// Imports an image from the host's own file system. Progress as with `pull`.
#[utoipa::path(post, path = "/v1/images/import", request_body = ImportRequest,
    responses((status = 200, body = Image), (status = "4XX", body = Problem)))]
pub(super) async fn import(
    State(context): State<Context>,
    headers: HeaderMap,
    Body(request): Body<ImportRequest>,
) -> Result<Response, ApiError> {
    if !is_plain_absolute(&request.path) {
        return Err(FieldError::new("/path", "must be an absolute path of the host").into());
    }
    let (sender, progress) = mpsc::channel(PROGRESS_MAX);
    let images = context.images.clone();
    let result = tokio::spawn(async move {
        let path = std::path::Path::new(&request.path);
        images
            .import(path, request.reference.as_deref(), sender)
            .await
    });
    answer(
        context,
        &headers,
        Work { result, progress },
        "image.imported",
    )
    .await
}

/// Removes a name; what no name and no instance uses any more is freed.
#[utoipa::path(delete, path = "/v1/images/{reference}", params(("reference" = String, Path)),
    responses((status = 204), (status = "4XX", body = Problem)))]
pub(super) async fn remove(
    State(context): State<Context>,
    Path(reference): Path<String>,
) -> Result<StatusCode, ApiError> {
    let image = context.images.get(&reference)?;
    let records = context.instances.records();
    let others = context.images.list()?;
    let others = others
        .iter()
        .filter(|other| other.digest == image.digest)
        .count();
    let users: Vec<&str> = records
        .iter()
        .filter(|record| record.instance.image_digest == image.digest)
        .map(|record| record.instance.name.as_str())
        .collect();
    // With another name left the image stays.
    if !users.is_empty() && others <= 1 {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            "in_use",
            format!("`{}` is used by {}", image.reference, users.join(", ")),
        )
        .hint("remove the instances that use it first"));
    }
    context.images.remove(&reference).await?;
    let in_use = records
        .iter()
        .map(|record| record.instance.image_digest.clone())
        .collect();
    context.images.collect_garbage(&in_use).await?;
    tell(
        &context,
        "image.removed",
        &image.reference,
        json!({"digest": image.digest}),
    )
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn answer(
    context: Context,
    headers: &HeaderMap,
    mut work: Work,
    kind: &'static str,
) -> Result<Response, ApiError> {
    if !wants_lines(headers) {
        // Progress that nobody reads is dropped by the sender.
        return Ok(Json(work.finish(&context, kind).await?).into_response());
    }
    let lines = stream::unfold(Some(work), move |work| {
        let context = context.clone();
        async move {
            let mut work = work?;
            let (event, rest) = match work.progress.recv().await {
                Some(event) => (event, Some(work)),
                None => match work.finish(&context, kind).await {
                    Ok(image) => (TransferEvent::Done(image), None),
                    Err(error) => (TransferEvent::Failed(error.to_problem("")), None),
                },
            };
            let line = serde_json::to_string(&event).expect("an event has only plain values");
            Some((Ok::<_, std::io::Error>(line + "\n"), rest))
        }
    });
    let lines_of_json = [(header::CONTENT_TYPE, "application/x-ndjson")];
    Ok((lines_of_json, HttpBody::from_stream(lines)).into_response())
}

async fn tell(
    context: &Context,
    kind: &'static str,
    reference: &str,
    data: serde_json::Value,
) -> Result<(), ApiError> {
    let happening = Happening {
        kind,
        subject: reference.to_owned(),
        data,
    };
    Ok(context.events.tell(happening).await?)
}

impl From<ImageError> for ApiError {
    fn from(error: ImageError) -> Self {
        use ImageError as E;
        let detail = chain(&error);
        let hint = error.hint();
        let api = match error {
            E::NotFound { .. } => Self::new(StatusCode::NOT_FOUND, "image_not_found", detail),
            E::InvalidReference { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "invalid_field", detail).field("/reference")
            }
            E::Ambiguous { .. } | E::NoName { .. } => {
                Self::new(StatusCode::BAD_REQUEST, "missing_reference", detail).field("/reference")
            }
            E::DigestMismatch { .. } | E::SizeMismatch { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "digest_mismatch", detail)
            }
            E::Refused { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "layer_refused", detail)
            }
            E::BadLayer { .. } | E::Malformed { .. } | E::UnsupportedMediaType { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "image_malformed", detail)
            }
            E::NoPlatform { .. } => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "no_platform", detail)
            }
            E::Registry { status, .. } => from_registry(status, detail),
            E::Unreachable { .. } => {
                Self::new(StatusCode::BAD_GATEWAY, "registry_unreachable", detail).retryable()
            }
            E::NoSpace { .. } => {
                Self::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", detail).retryable()
            }
            E::Io { ref source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Self::new(StatusCode::UNPROCESSABLE_ENTITY, "no_such_file", detail).field("/path")
            }
            E::Cancelled => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "cancelled", detail).retryable()
            }
            E::Tls { .. }
            | E::ToolMissing { .. }
            | E::ToolFailed { .. }
            | E::InUse { .. }
            | E::Io { .. } => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "image_store_failed",
                detail,
            ),
        };
        match hint {
            Some(hint) => api.hint(hint),
            None => api,
        }
    }
}

/// What the registry holds against the request is the caller's to mend; its own faults are not.
fn from_registry(status: u16, detail: String) -> ApiError {
    match status {
        401 | 403 => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "registry_denied", detail),
        404 => ApiError::new(StatusCode::NOT_FOUND, "image_not_found", detail).field("/reference"),
        400..500 => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "registry_refused", detail),
        _ => ApiError::new(StatusCode::BAD_GATEWAY, "registry_failed", detail).retryable(),
    }
}
