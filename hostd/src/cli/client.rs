//! HTTP over hostd's socket. One connection for each request: the socket is local, and so no call can
//! wait behind another.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::http::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};
use tokio_tungstenite::tungstenite::{self, protocol::WebSocketConfig};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use super::error::CliError;
use crate::api::types::Problem;

/// How often a daemon that is coming up is tried.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// The longest line or message that hostd sends.
const LINE_BYTES_MAX: usize = 1024 * 1024;

/// What need not be escaped in a path or a query.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

pub(super) const JSON: &str = "application/json";
pub(super) const NDJSON: &str = "application/x-ndjson";

/// No body.
pub(super) const EMPTY: Option<&()> = None;

/// Where hostd listens.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) socket: PathBuf,
    /// How long to wait for a hostd that does not listen yet, or has just gone.
    pub(super) patience: Duration,
}

impl Client {
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CliError> {
        self.call(Method::GET, path, EMPTY).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CliError> {
        self.call(Method::POST, path, body).await
    }

    pub(super) async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, CliError> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), CliError> {
        self.send(Method::DELETE, path, JSON, EMPTY).await.map(drop)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, CliError> {
        let response = self.send(method, path, JSON, body).await?;
        let bytes = response
            .into_body()
            .collect()
            .await
            .map_err(CliError::Connection)?;
        serde_json::from_slice(&bytes.to_bytes()).map_err(CliError::Answer)
    }

    /// Sends a request and answers with the head of a response that is not an error.
    async fn send(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Response<Incoming>, CliError> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "hostd")
            .header(header::ACCEPT, accept);
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, JSON);
                serde_json::to_vec(body).map_err(CliError::Answer)?
            }
            None => Vec::new(),
        };
        let request = request
            .body(Full::new(Bytes::from(bytes)))
            .map_err(|source| CliError::Address {
                path: path.into(),
                source,
            })?;

        let response = self.exchange(request).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(CliError::Connection)?;
        Err(refusal(status, &body.to_bytes()))
    }

    /// Answers with the head of the response. A hostd that is killed takes connections with it that
    /// it has not answered: a question is then asked again as long as a hostd is waited for. A
    /// request that changes something may have been carried out, and is not sent twice.
    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, CliError> {
        let deadline = Instant::now() + self.patience;
        loop {
            let stream = TokioIo::new(self.connect(deadline).await?);
            match attempt(stream, request.clone()).await {
                Err(error)
                    if request.method().is_safe() && broke(&error) && Instant::now() < deadline =>
                {
                    sleep(RETRY_INTERVAL).await;
                }
                result => return result.map_err(CliError::Connection),
            }
        }
    }

    /// A response that comes line by line.
    pub(super) async fn lines(
        &self,
        method: Method,
        path: &str,
        accept: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Lines, CliError> {
        let response = self.send(method, path, accept, body).await?;
        Ok(Lines {
            body: response.into_body(),
            buffer: Vec::new(),
            ended: false,
        })
    }

    /// A conversation in both directions.
    pub(super) async fn converse(
        &self,
        path: &str,
    ) -> Result<WebSocketStream<UnixStream>, CliError> {
        let config = WebSocketConfig::default()
            .max_message_size(Some(LINE_BYTES_MAX))
            .max_frame_size(Some(LINE_BYTES_MAX));
        let deadline = Instant::now() + self.patience;
        let stream = self.connect(deadline).await?;
        let address = format!("ws://hostd{path}");
        match client_async_with_config(address, stream, Some(config)).await {
            Ok((socket, _)) => Ok(socket),
            Err(tungstenite::Error::Http(response)) => Err(refusal(
                response.status(),
                response.body().as_deref().unwrap_or_default(),
            )),
            Err(error) => Err(CliError::Socket(Box::new(error))),
        }
    }

    async fn connect(&self, deadline: Instant) -> Result<UnixStream, CliError> {
        loop {
            match UnixStream::connect(&self.socket).await {
                Ok(stream) => return Ok(stream),
                Err(error) if is_not_up_yet(&error) && Instant::now() < deadline => {
                    sleep(RETRY_INTERVAL).await;
                }
                Err(source) => {
                    return Err(CliError::Connect {
                        socket: self.socket.clone(),
                        source,
                    });
                }
            }
        }
    }
}

async fn attempt(
    stream: TokioIo<UnixStream>,
    request: Request<Full<Bytes>>,
) -> hyper::Result<Response<Incoming>> {
    let (mut sender, connection) = http1::handshake(stream).await?;
    // It ends with the response's body, or with the process.
    tokio::spawn(connection);
    sender.send_request(request).await
}

/// Whether the other side went away, as opposed to having answered nonsense.
fn broke(error: &hyper::Error) -> bool {
    let source = error.source().and_then(<dyn Error>::downcast_ref);
    error.is_incomplete_message()
        || error.is_canceled()
        || source.is_some_and(|source: &io::Error| {
            matches!(
                source.kind(),
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
            )
        })
}

/// A listener that goes while one is in its queue resets the connection.
fn is_not_up_yet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
    )
}

/// What an error response says, also when it is not a problem document.
fn refusal(status: StatusCode, body: &[u8]) -> CliError {
    let problem = serde_json::from_slice(body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(body);
        let text = text.lines().next().unwrap_or_default();
        Problem {
            code: format!("http_{}", status.as_u16()),
            status: status.as_u16(),
            detail: format!("hostd answered {status} {text}")
                .trim_end()
                .to_owned(),
            field: None,
            hint: None,
            retryable: status.is_server_error(),
            request_id: String::new(),
        }
    });
    problem.into()
}

/// The lines of a response's body.
#[derive(Debug)]
pub(super) struct Lines {
    body: Incoming,
    buffer: Vec<u8>,
    ended: bool,
}

impl Lines {
    /// The next line without its end; `None` at the end of the body.
    pub(super) async fn next(&mut self) -> Result<Option<String>, CliError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).take(end).collect();
                return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
            }
            if self.ended {
                let rest = std::mem::take(&mut self.buffer);
                let rest = String::from_utf8_lossy(&rest).into_owned();
                return Ok((!rest.is_empty()).then_some(rest));
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(CliError::LongLine);
            }
            match self.body.frame().await {
                Some(frame) => {
                    if let Ok(data) = frame.map_err(CliError::Connection)?.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                None => self.ended = true,
            }
        }
    }

    /// The next line that is not empty, as JSON.
    pub(super) async fn next_json<T: DeserializeOwned>(&mut self) -> Result<Option<T>, CliError> {
        while let Some(line) = self.next().await? {
            if !line.is_empty() {
                return serde_json::from_str(&line)
                    .map(Some)
                    .map_err(CliError::Answer);
            }
        }
        Ok(None)
    }
}

/// The path of an instance, whatever the user calls it.
pub(super) fn instance(name: &str) -> String {
    format!("/v1/instances/{}", escape(name))
}

/// A text as part of a path or a query.
pub(super) fn escape(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

/// A path with those of the parameters that have a value.
pub(super) fn with_query(path: &str, parameters: &[(&str, Option<String>)]) -> String {
    let query: Vec<String> = parameters
        .iter()
        .filter_map(|(key, value)| Some(format!("{key}={}", escape(value.as_deref()?))))
        .collect();
    if query.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", query.join("&"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_lead_to_another_resource() {
        assert_eq!(instance("web-1"), "/v1/instances/web-1");
        assert_eq!(
            instance("../images?x#y"),
            "/v1/instances/..%2Fimages%3Fx%23y"
        );
    }

    #[test]
    fn a_query_has_only_what_was_given() {
        assert_eq!(with_query("/p", &[("a", None)]), "/p");
        let since = Some("2026-01-01T00:00:00+01:00".to_owned());
        let path = with_query(
            "/p",
            &[("a", Some("1".into())), ("b", None), ("since", since)],
        );
        assert_eq!(path, "/p?a=1&since=2026-01-01T00%3A00%3A00%2B01%3A00");
    }

    #[test]
    fn an_answer_that_is_no_problem_document_is_still_told() {
        let error = refusal(StatusCode::BAD_GATEWAY, b"<html>\nno</html>");
        assert_eq!(error.to_string(), "hostd answered 502 Bad Gateway <html>");
    }
}
