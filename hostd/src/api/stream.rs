//! Conversations over HTTP: a driver's [`Session`] as a WebSocket, as lines, or as one answer.
//!
//! **WebSocket**: each text message is one [`Frame`] as JSON, in both directions; after an `exit`
//! or `error` frame the server closes. **Lines**: the frames from the process, one a line
//! (`application/x-ndjson`), up to the `exit` or `error` frame; input cannot be sent.

use std::pin::pin;
use std::time::Duration;

use agent::protocol::{FRAME_DATA_BYTES_MAX, Frame, LINE_BYTES_MAX};
use axum::body::Body;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures::{SinkExt, StreamExt, stream};
use nix::libc;
use tokio::sync::mpsc;
use tokio::time::{self, Instant};
use tokio_util::sync::CancellationToken;

use super::types::{ExecResult, Exit};
use crate::driver::{SESSION_FRAMES_MAX, Session};

/// Of each output stream, what a one-call exec keeps.
pub(super) const OUTPUT_BYTES_MAX: usize = 1024 * 1024;

/// After a kill for a timeout, how long the end is waited for.
const KILLED_GRACE: Duration = Duration::from_secs(5);

/// A conversation with a deadline.
pub(super) struct Timed {
    pub(super) session: Session,
    deadline: Option<Instant>,
    timed_out: bool,
}

impl Timed {
    pub(super) fn new(session: Session, timeout_ms: Option<u64>) -> Self {
        let deadline = timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
        Self {
            session,
            deadline,
            timed_out: false,
        }
    }

    /// Gives the process all of its input, and then end of file.
    ///
    /// On a task of its own, since a process may fill its output before it reads its input. The
    /// task ends with the process, whose end closes the channel.
    pub(super) fn feed(&self, input: String) {
        let sender = self.session.input.clone();
        tokio::spawn(async move {
            for chunk in input.as_bytes().chunks(FRAME_DATA_BYTES_MAX) {
                let frame = Frame::Stdin(BASE64_STANDARD.encode(chunk));
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
            // A process that has ended needs no end of file.
            let _ = sender.send(Frame::Stdin(String::new())).await;
        });
    }

    /// The next frame of the process, which is killed at the deadline. `None` if it will not say
    /// how it ended.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            let deadline = self.deadline;
            let due = async {
                match deadline {
                    Some(deadline) => time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                frame = self.session.output.recv() => return frame,
                () = due => {
                    if self.timed_out {
                        return None;
                    }
                    self.timed_out = true;
                    self.deadline = Some(Instant::now() + KILLED_GRACE);
                    // If the way in is full the process does not read, and is killed all the same
                    // once its streams are closed.
                    let _ = self.session.input.try_send(Frame::Signal(libc::SIGKILL));
                }
            }
        }
    }
}

fn is_last(frame: &Frame) -> bool {
    matches!(frame, Frame::Exit { .. } | Frame::Error { .. })
}

fn lost() -> Frame {
    Frame::Error {
        code: 125,
        message: "the process was lost".to_owned(),
    }
}

/// The frames as lines.
pub(super) fn lines(timed: Timed, stopping: CancellationToken) -> Response {
    let body = stream::unfold(Some(timed), move |timed| {
        let stopping = stopping.clone();
        async move {
            let mut timed = timed?;
            let frame = tokio::select! {
                frame = timed.next() => frame.unwrap_or_else(lost),
                () = stopping.cancelled() => lost(),
            };
            let rest = (!is_last(&frame)).then_some(timed);
            Some((Ok::<_, std::io::Error>(to_json(&frame) + "\n"), rest))
        }
    });
    let lines = [(header::CONTENT_TYPE, "application/x-ndjson")];
    (lines, Body::from_stream(body)).into_response()
}

/// Takes a request to upgrade, with the bounds that frames need.
pub(super) fn bounded(upgrade: WebSocketUpgrade) -> WebSocketUpgrade {
    upgrade
        .max_message_size(LINE_BYTES_MAX)
        .max_frame_size(LINE_BYTES_MAX)
}

/// Waits for `work`, keeping what the client sends meanwhile in `early`. `None` if the client goes,
/// sends more than is kept, or hostd goes.
pub(super) async fn meanwhile<T>(
    socket: &mut WebSocket,
    early: &mut Vec<Message>,
    stopping: &CancellationToken,
    work: impl Future<Output = T>,
) -> Option<T> {
    let mut work = pin!(work);
    loop {
        tokio::select! {
            biased;
            result = &mut work => return Some(result),
            message = socket.recv() => match message {
                Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                Some(Ok(message)) if early.len() < SESSION_FRAMES_MAX => early.push(message),
                Some(Ok(_)) => return None,
            },
            () = stopping.cancelled() => return None,
        }
    }
}

/// Passes frames between the socket and the session until either ends. `early` are messages that
/// the client has sent already.
///
/// Each direction goes on by itself: a process that waits for its output to be read must not keep
/// its output from being read because it does not take its input.
pub(super) async fn socket(
    socket: WebSocket,
    early: Vec<Message>,
    mut timed: Timed,
    stopping: CancellationToken,
) {
    let (mut sink, mut source) = socket.split();
    let input = timed.session.input.clone();
    let hearing = async {
        for message in early {
            pass_on(&input, message).await?;
        }
        while let Some(Ok(message)) = source.next().await {
            pass_on(&input, message).await?;
        }
        Ok(())
    };
    let telling = async {
        loop {
            let frame = timed.next().await.unwrap_or_else(lost);
            if sink.send(to_message(&frame)).await.is_err() || is_last(&frame) {
                return;
            }
        }
    };
    let heard: Result<(), &str> = tokio::select! {
        heard = hearing => heard,
        () = telling => Ok(()),
        () = stopping.cancelled() => Ok(()),
    };
    if let Err(message) = heard {
        let frame = Frame::Error {
            code: 125,
            message: message.to_owned(),
        };
        // The client may have gone already; here and below.
        let _ = sink.send(to_message(&frame)).await;
    }
    let _ = sink.send(Message::Close(None)).await;
}

/// Gives the process what the client sent.
async fn pass_on(input: &mpsc::Sender<Frame>, message: Message) -> Result<(), &'static str> {
    match message {
        Message::Text(text) => match serde_json::from_str::<Frame>(&text) {
            Ok(frame) if is_towards_process(&frame) => {
                // A process that has ended reads no more; its exit frame is on its way.
                let _ = input.send(frame).await;
                Ok(())
            }
            Ok(_) | Err(_) => Err("a message must be a stdin, resize or signal frame"),
        },
        Message::Ping(_) | Message::Pong(_) | Message::Close(_) => Ok(()),
        Message::Binary(_) => Err("a message must be text"),
    }
}

/// Tells the client by a last frame why there is no conversation.
pub(super) async fn refuse(socket: &mut WebSocket, message: &str) {
    let frame = Frame::Error {
        code: 125,
        message: message.to_owned(),
    };
    // The client may have gone already.
    let _ = socket.send(to_message(&frame)).await;
}

fn is_towards_process(frame: &Frame) -> bool {
    match frame {
        Frame::Stdin(data) => data.len() <= FRAME_DATA_BYTES_MAX.div_ceil(3) * 4,
        Frame::Resize { .. } | Frame::Signal(_) => true,
        Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit { .. } | Frame::Error { .. } => false,
    }
}

fn to_message(frame: &Frame) -> Message {
    Message::Text(to_json(frame).into())
}

fn to_json(frame: &Frame) -> String {
    serde_json::to_string(frame).expect("a frame has only plain values")
}

/// Gathers the process's output, up to the bound, and its end.
///
/// # Errors
/// The process could not be run: the exit code that a shell would give, and why.
pub(super) async fn gather(mut timed: Timed) -> Result<ExecResult, (i32, String)> {
    let (mut stdout, mut stderr, mut truncated) = (Vec::new(), Vec::new(), false);
    let exit = loop {
        match timed.next().await {
            Some(Frame::Stdout(data)) => truncated |= !keep(&mut stdout, &data),
            Some(Frame::Stderr(data)) => truncated |= !keep(&mut stderr, &data),
            Some(Frame::Exit { code, signal, oom }) => break Exit { code, signal, oom },
            Some(Frame::Error { code, message }) => return Err((code, message)),
            Some(Frame::Stdin(_) | Frame::Resize { .. } | Frame::Signal(_)) => {}
            None if timed.timed_out => {
                break Exit {
                    code: None,
                    signal: Some(libc::SIGKILL),
                    oom: false,
                };
            }
            None => return Err((125, "the process was lost".to_owned())),
        }
    };
    Ok(ExecResult {
        exit,
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
        stdout_base64: BASE64_STANDARD.encode(&stdout),
        stderr_base64: BASE64_STANDARD.encode(&stderr),
        truncated,
        timed_out: timed.timed_out,
    })
}

/// Whether all of it fit.
fn keep(kept: &mut Vec<u8>, data: &str) -> bool {
    let bytes = BASE64_STANDARD.decode(data).unwrap_or_default();
    let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len());
    kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    bytes.len() <= room
}
