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

async fn exchange(
    socket: &Path,
    request: &Request,
    deadline: Duration,
) -> Result<Response, DriverError> {
    let asked = async {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(DriverError::io("connecting to the VMM"))?;
        let codec = LinesCodec::new_with_max_length(REQUEST_BYTES_MAX);
        let mut connection = Framed::new(stream, codec);
        let line = serde_json::to_string(request).expect("a request has only plain values");
        let unanswered = || DriverError::Helper {
            action: "asking the VMM".to_owned(),
            message: "the machine ended".to_owned(),
        };
        connection.send(line).await.map_err(|_| unanswered())?;
        match connection.next().await {
            Some(Ok(line)) => Ok(line),
            Some(Err(_)) | None => Err(unanswered()),
        }
    };
    let line = time::timeout(deadline, asked)
        .await
        .map_err(|_| DriverError::Timeout {
            seconds: deadline.as_secs(),
        })??;
    match serde_json::from_str(&line) {
        Ok(Response::Error { message }) => Err(DriverError::Helper {
            action: "asking the VMM".to_owned(),
            message,
        }),
        Ok(response) => Ok(response),
        Err(error) => Err(DriverError::io("understanding the VMM")(error.into())),
    }
}
