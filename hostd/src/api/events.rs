//! `/v1/events`: what happens on this host, as server-sent events.

use std::convert::Infallible;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Sse;
use axum::response::sse::{self, KeepAlive};
use futures::stream::{self, Stream, StreamExt};
use serde::Deserialize;

use super::Context;
use super::error::ApiError;
use super::extract::Query;
use super::types::{Event, Problem};
use crate::events::Listener;

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
pub(super) struct EventsQuery {
    /// Starts after the event of this sequence number; 0 for all that are kept. Without it and
    /// without `Last-Event-ID` only what happens from now on is sent.
    since: Option<u64>,
    /// Goes on with what happens from now on; true if absent.
    #[serde(default = "yes")]
    follow: bool,
}

fn yes() -> bool {
    true
}

/// Follows what happens. `id` is the sequence number, `event` the kind, `data` the event as JSON.
#[utoipa::path(get, path = "/v1/events", params(EventsQuery), responses(
    (status = 200, body = Event, content_type = "text/event-stream"),
    (status = 400, body = Problem)))]
pub(super) async fn follow(
    State(context): State<Context>,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, ApiError> {
    // A browser's EventSource sends the last id that it has seen when it connects again.
    let last_seen = headers
        .get("last-event-id")
        .and_then(|value| value.to_str().ok()?.parse().ok());
    let listener = context.events.listen(query.since.or(last_seen));
    let listener = if query.follow {
        listener
    } else {
        listener.up_to_now()
    };
    let stream = stream::unfold(listener, next_batch)
        .flat_map(stream::iter)
        .map(|event| Ok(to_sse(&event)))
        .take_until(context.stopping.cancelled_owned());
    Ok(Sse::new(stream).keep_alive(KeepAlive::default()))
}

async fn next_batch(mut listener: Listener) -> Option<(Vec<Event>, Listener)> {
    match listener.next().await {
        Ok(batch) if batch.is_empty() => None,
        Ok(batch) => Some((batch, listener)),
        Err(error) => {
            tracing::error!(
                error = crate::driver::chain(&error),
                "events cannot be read"
            );
            None
        }
    }
}

fn to_sse(event: &Event) -> sse::Event {
    let data = serde_json::to_string(event).expect("an event has only plain values");
    sse::Event::default()
        .id(event.sequence.to_string())
        .event(event.kind.clone())
        .data(data)
}
