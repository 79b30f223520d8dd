//! hostd's side of the agent in a VM, over the VMM's vsock socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use agent::protocol::{self, LINE_BYTES_MAX, Process, Request, Response};
use futures::{SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio::time;
use tokio_util::codec::{Framed, LinesCodec};

use crate::api::types::ExecRequest;
use crate::driver::DriverError;

/// An agent answers at once; one that is silent this long has a guest that is stuck.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

type Connection = Framed<UnixStream, LinesCodec>;

/// Asks the agent what has one answer, at once.
pub(super) async fn ask(socket: &Path, request: &Request) -> Result<Response, DriverError> {
    ask_patiently(socket, request, ANSWER_DEADLINE).await
}

/// Asks the agent what has one answer, which may take the guest so long.
pub(super) async fn ask_patiently(
    socket: &Path,
    request: &Request,
    deadline: Duration,
) -> Result<Response, DriverError> {
    let asked = async {
        let mut connection = connect(socket, request).await?;
        match connection.next().await {
            Some(Ok(line)) => Ok(serde_json::from_str(&line)?),
            Some(Err(error)) => Err(io::Error::other(error)),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    };
    let response = within(deadline, asked).await?;
    if let Response::Error { message } = response {
        return Err(DriverError::Helper {
            action: "asking the guest's agent".to_owned(),
            message,
        });
    }
    Ok(response)
}

/// Runs a process in the guest; frames follow on the connection.
pub(super) async fn exec(socket: &Path, request: ExecRequest) -> Result<Connection, DriverError> {
    let mut env: Vec<String> = request
        .env
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    if request.tty && !request.env.contains_key("TERM") {
        env.push("TERM=xterm".to_owned());
    }
    let process = Process {
        args: request.command,
        env,
        user: request.user,
        working_dir: request.working_dir,
        tty: request.tty,
        stdin: true,
    };
    within(ANSWER_DEADLINE, connect(socket, &Request::Exec(process))).await
}

/// A connection to the agent with the request on its way.
async fn connect(socket: &Path, request: &Request) -> io::Result<Connection> {
    let stream = UnixStream::connect(socket).await?;
    let codec = LinesCodec::new_with_max_length(LINE_BYTES_MAX);
    let mut connection = Framed::new(stream, codec);
    let hello = format!("CONNECT {}", protocol::PORT);
    connection.send(hello).await.map_err(io::Error::other)?;
    match connection.next().await {
        Some(Ok(line)) if line.starts_with("OK ") => {}
        Some(Ok(line)) => return Err(io::Error::other(format!("the VMM answered `{line}`"))),
        Some(Err(error)) => return Err(io::Error::other(error)),
        None => return Err(io::Error::other("nothing listens in the guest")),
    }
    let line = serde_json::to_string(request).expect("a request has only plain values");
    connection.send(line).await.map_err(io::Error::other)?;
    Ok(connection)
}

async fn within<T>(
    deadline: Duration,
    work: impl Future<Output = io::Result<T>>,
) -> Result<T, DriverError> {
    time::timeout(deadline, work)
        .await
        .map_err(|_| DriverError::Timeout {
            seconds: deadline.as_secs(),
        })?
        .map_err(DriverError::io("talking to the guest's agent"))
}
