//! `/v1/openapi.json`: the API's description, made from the handlers and types themselves.

use axum::Json;
use utoipa::OpenApi;
use utoipa::openapi;

use super::{events, exec, host, images, instances, logs, snapshots, verbs};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "hostd",
        description = "Virtual machines and containers of one host, through one lifecycle. \
            Sizes are bytes, rates are bytes or operations per second, times are RFC 3339. \
            Errors are RFC 9457 problems.",
    ),
    paths(
        host::show,
        host::metrics,
        events::follow,
        images::list,
        images::show,
        images::pull,
        images::import,
        images::remove,
        instances::list,
        instances::create,
        instances::show,
        instances::ensure,
        instances::update,
        instances::remove,
        instances::stats,
        snapshots::list,
        snapshots::create,
        snapshots::show,
        snapshots::remove,
        snapshots::restore,
        verbs::start,
        verbs::stop,
        verbs::kill,
        verbs::pause,
        verbs::resume,
        verbs::restart,
        verbs::wait,
        logs::read,
        exec::exec,
        exec::exec_socket,
        exec::attach,
        exec::attach_socket,
        exec::console,
        exec::console_socket,
    )
)]
struct Description;

/// The description of the API.
pub fn document() -> openapi::OpenApi {
    Description::openapi()
}

pub(super) async fn show() -> Json<openapi::OpenApi> {
    Json(document())
}
