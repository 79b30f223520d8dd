//! hostd's side of a VMM's control socket.

use std::path::Path;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio::time;
use tokio_util::codec::{Framed, LinesCodec};
use vmm::control::{REQUEST_BYTES_MAX, Request, Response};

use crate::driver::DriverError;

/// A machine answers at once; one that is silent this long is stuck.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// From the machine's start to the guest's word that its workload runs. A guest on a slow host
/// takes many seconds.
const READY_DEADLINE: Duration = Duration::from_secs(180);

/// Of what a machine says in an error, what is passed on.
const MESSAGE_CHARS_MAX: usize = 1000;

/// Lines in both directions.
pub(super) type Connection = Framed<UnixStream, LinesCodec>;

/// Asks the machine what it answers at once.
pub(super) async fn ask(socket: &Path, request: &Request) -> Result<Response, DriverError> {
    exchange(socket, request, ANSWER_DEADLINE).await
}

/// Waits until the guest's workload runs.
pub(super) async fn wait_ready(socket: &Path) -> Result<(), DriverError> {
    exchange(socket, &Request::WaitReady {}, READY_DEADLINE)
        .await
        .map(|_| ())
}

/// A connection to the machine on which the request has been answered. A refusal is an answer.
pub(super) async fn converse(
    socket: &Path,
    request: &Request,
) -> Result<(Connection, Response), DriverError> {
    within(ANSWER_DEADLINE, speak(socket, request)).await
}

/// For an answer to another question.
pub(super) fn unexpected(response: &Response) -> DriverError {
    refused(&format!("it answered {response:?}"))
}

/// For a request that the machine did not grant. What it says goes to logs and terminals, whoever
/// speaks for it.
pub(super) fn refused(message: &str) -> DriverError {
    let shown = message.chars().take(MESSAGE_CHARS_MAX);
    let shown = shown.map(|c| if c.is_control() { ' ' } else { c });
    DriverError::Helper {
        action: "asking the VMM".to_owned(),
        message: shown.collect(),
    }
}

async fn exchange(
    socket: &Path,
    request: &Request,
    deadline: Duration,
) -> Result<Response, DriverError> {
    match within(deadline, speak(socket, request)).await? {
        (_, Response::Error { message }) => Err(refused(&message)),
        (_, response) => Ok(response),
    }
}

async fn within<T>(
    deadline: Duration,
    asked: impl Future<Output = Result<T, DriverError>>,
) -> Result<T, DriverError> {
    time::timeout(deadline, asked)
        .await
        .map_err(|_| DriverError::Timeout {
            seconds: deadline.as_secs(),
        })?
}

async fn speak(socket: &Path, request: &Request) -> Result<(Connection, Response), DriverError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(DriverError::io("connecting to the VMM"))?;
    let codec = LinesCodec::new_with_max_length(REQUEST_BYTES_MAX);
    let mut connection = Framed::new(stream, codec);
    let line = serde_json::to_string(request).expect("a request has only plain values");
    let unanswered = || refused("the machine ended");
    connection.send(line).await.map_err(|_| unanswered())?;
    let Some(Ok(line)) = connection.next().await else {
        return Err(unanswered());
    };
    let response = serde_json::from_str(&line)
        .map_err(|error| DriverError::io("understanding the VMM")(error.into()))?;
    Ok((connection, response))
}
