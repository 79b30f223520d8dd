//! The HTTP API: one file for each resource, and here the list of them.
//!
//! Handlers check what they were sent, ask an instance or a store, and put the answer into words.
//! They decide nothing and hold nothing between requests.

mod error;
mod events;
mod exec;
mod extract;
mod host;
mod images;
mod instances;
mod logs;
mod openapi;
mod request_id;
mod snapshots;
mod stream;
mod verbs;

pub mod types;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use axum::routing::{get, post};
use tokio::net::UnixListener;
use tokio::time;
use tokio_util::sync::CancellationToken;

use crate::events::Events;
use crate::image::ImageStore;
use crate::instance::Instances;
use crate::paths::Paths;

pub use self::openapi::document;

/// No request has a body larger than this.
pub const REQUEST_BYTES_MAX: usize = 1024 * 1024;

/// When hostd is told to go, requests under way get this long to finish.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// What the handlers work with.
#[derive(Clone, Debug)]
pub struct Context {
    pub instances: Instances,
    pub events: Events,
    pub images: ImageStore,
    pub paths: Arc<Paths>,
    /// Cancelled when hostd is to go; streams end then.
    pub stopping: CancellationToken,
}

/// The API as a service.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/v1/host", get(host::show))
        .route("/v1/metrics", get(host::metrics))
        .route("/v1/events", get(events::follow))
        .route("/v1/openapi.json", get(openapi::show))
        .route("/v1/images", get(images::list))
        .route("/v1/images/pull", post(images::pull))
        .route("/v1/images/import", post(images::import))
        .route(
            "/v1/images/{*reference}",
            get(images::show).delete(images::remove),
        )
        .route(
            "/v1/instances",
            get(instances::list).post(instances::create),
        )
        .route(
            "/v1/instances/{name}",
            get(instances::show)
                .put(instances::ensure)
                .patch(instances::update)
                .delete(instances::remove),
        )
        .route("/v1/instances/{name}/start", post(verbs::start))
        .route("/v1/instances/{name}/stop", post(verbs::stop))
        .route("/v1/instances/{name}/kill", post(verbs::kill))
        .route("/v1/instances/{name}/pause", post(verbs::pause))
        .route("/v1/instances/{name}/resume", post(verbs::resume))
        .route("/v1/instances/{name}/restart", post(verbs::restart))
        .route("/v1/instances/{name}/wait", get(verbs::wait))
        .route("/v1/instances/{name}/stats", get(instances::stats))
        .route("/v1/instances/{name}/logs", get(logs::read))
        .route(
            "/v1/instances/{name}/snapshots",
            get(snapshots::list).post(snapshots::create),
        )
        .route(
            "/v1/instances/{name}/snapshots/{snapshot}",
            get(snapshots::show).delete(snapshots::remove),
        )
        .route(
            "/v1/instances/{name}/snapshots/{snapshot}/restore",
            post(snapshots::restore),
        )
        .route(
            "/v1/instances/{name}/exec",
            get(exec::exec_socket).post(exec::exec),
        )
        .route(
            "/v1/instances/{name}/attach",
            get(exec::attach_socket).post(exec::attach),
        )
        .route(
            "/v1/instances/{name}/console",
            get(exec::console_socket).post(exec::console),
        )
        .fallback(error::no_such_path)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .layer(middleware::from_fn(request_id::stamp))
        .with_state(context)
}

/// Serves the API until `context.stopping` is cancelled.
///
/// # Errors
/// The listener fails.
pub async fn serve(listener: UnixListener, context: Context) -> io::Result<()> {
    let stopping = context.stopping.clone();
    let serving = axum::serve(listener, router(context))
        .with_graceful_shutdown(stopping.clone().cancelled_owned());
    let given_up = async {
        stopping.cancelled().await;
        time::sleep(SHUTDOWN_DEADLINE).await;
    };
    tokio::select! {
        result = serving => result,
        () = given_up => Ok(()),
    }
}

#[cfg(test)]
mod tests;
