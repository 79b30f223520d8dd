//! `/v1/host` and `/v1/metrics`: what this host is, has, and gives to its instances.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use tokio::task;

use super::Context;
use super::types::{Host, Problem};
use crate::driver::Kinds;
use crate::store::Record;
use crate::{doctor, host, lifecycle, metrics};

/// Shows the host: capacity, what is given away, what the kernel offers.
#[utoipa::path(get, path = "/v1/host", responses(
    (status = 200, body = Host), (status = "5XX", body = Problem)))]
pub(super) async fn show(State(context): State<Context>) -> Json<Host> {
    let paths = Arc::clone(&context.paths);
    let findings = task::spawn_blocking(move || doctor::findings_for(&paths.guest, &paths.state))
        .await
        .expect("the checks do not panic");
    let records = context.instances.records();
    let capacity = context.instances.capacity();
    Json(Host {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: host::kernel(),
        cpus: u32::try_from(capacity.cpus.len()).unwrap_or(u32::MAX),
        memory_bytes: capacity.memory_bytes,
        memory_allocated_bytes: records
            .iter()
            .map(|record| memory_of(record, context.instances.kinds()))
            .fold(0, u64::saturating_add),
        cgroup: host::cgroup_layout().to_owned(),
        instances: u64::try_from(records.len()).unwrap_or(u64::MAX),
        findings,
    })
}

/// What a running instance may take of the host's memory; 0 if that is not bounded.
fn memory_of(record: &Record, kinds: &Kinds) -> u64 {
    let instance = &record.instance;
    if !lifecycle::is_live(instance.state) {
        return 0;
    }
    let rules = kinds.of(instance.spec.isolation).rules;
    let limit = instance
        .spec
        .limits
        .memory
        .max
        .or(rules.memory_default_bytes);
    limit.map_or(0, |limit| rules.memory_overhead.with(limit))
}

/// The stats of every running instance as Prometheus text.
#[utoipa::path(get, path = "/v1/metrics", responses(
    (status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(context): State<Context>) -> impl IntoResponse {
    let text = metrics::render(&context.instances).await;
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}
