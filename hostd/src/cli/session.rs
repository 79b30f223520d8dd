//! A conversation with a process in an instance: our streams are its streams, our signals its
//! signals, our terminal's size its terminal's.

use std::io::{self, Read, Write};
use std::thread;

use agent::protocol::Frame;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use nix::libc;
use tokio::net::UnixStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::error::CliError;
use super::terminal::{self, DetachKeys, RawMode, Typed};
use crate::api::types::Exit;

pub(super) type Socket = WebSocketStream<UnixStream>;

/// What is read at a time; well below what one frame may carry.
const CHUNK_BYTES: usize = 32 * 1024;
/// Chunks that are read ahead of what hostd takes.
const CHUNKS_MAX: usize = 4;
/// Signals that wait for hostd to take them.
const SIGNALS_MAX: usize = 16;

/// What becomes of standard input.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Input {
    /// It is the process's.
    Ours,
    /// The process reads end of file.
    Empty,
    /// Somebody else may be writing.
    NotOurs,
}

/// How a conversation ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Ending {
    Exit(Exit),
    /// The process could not be run.
    Error {
        code: i32,
        message: String,
    },
    /// The user left; the process goes on.
    Detached,
    /// hostd went away; the process may go on.
    Lost,
}

/// Signals that mean the process and not us.
const FORWARDED: [libc::c_int; 6] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// Listens to signals from now on, so that none is lost while a session is being set up.
#[derive(Debug)]
pub(super) struct Signals {
    received: mpsc::Receiver<Frame>,
}

impl Signals {
    /// With a terminal, changes of its size are passed on too.
    pub(super) fn listen(tty: bool) -> Result<Signals, CliError> {
        let (sender, received) = mpsc::channel(SIGNALS_MAX);
        let mut kinds = FORWARDED.to_vec();
        kinds.extend(tty.then_some(libc::SIGWINCH));
        for number in kinds {
            let mut stream =
                signal(SignalKind::from_raw(number)).map_err(|source| CliError::Terminal {
                    action: "listen to signals",
                    source,
                })?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    let frame = match number {
                        libc::SIGWINCH => size_frame(),
                        _ => Some(Frame::Signal(number)),
                    };
                    if let Some(frame) = frame
                        && sender.send(frame).await.is_err()
                    {
                        return;
                    }
                }
            });
        }
        Ok(Signals { received })
    }
}

fn size_frame() -> Option<Frame> {
    terminal::size().map(|(rows, cols)| Frame::Resize { rows, cols })
}

/// Passes everything on in both directions until the process ends or the user leaves.
pub(super) async fn converse(
    socket: Socket,
    input: Input,
    tty: bool,
    mut signals: Signals,
) -> Result<Ending, CliError> {
    // Only where keys are typed: input from a pipe stays as it is.
    let raw = if tty && input == Input::Ours && terminal::is_input() {
        Some(RawMode::enter()?)
    } else {
        None
    };
    let (sink, stream) = socket.split();
    let detach_keys = raw.as_ref().map(|_| DetachKeys::default());
    let ending = tokio::select! {
        ending = receive(stream) => ending,
        () = send(sink, input, tty, detach_keys, &mut signals.received) => Ok(Ending::Detached),
    };
    drop(raw);
    ending
}

/// Writes what the process writes, until its last frame.
async fn receive(mut stream: SplitStream<Socket>) -> Result<Ending, CliError> {
    while let Some(Ok(message)) = stream.next().await {
        let Message::Text(text) = message else {
            continue;
        };
        match serde_json::from_str(&text).map_err(CliError::Answer)? {
            Frame::Stdout(data) => write(&mut io::stdout().lock(), &data)?,
            Frame::Stderr(data) => write(&mut io::stderr().lock(), &data)?,
            Frame::Exit { code, signal, oom } => {
                return Ok(Ending::Exit(Exit { code, signal, oom }));
            }
            Frame::Error { code, message } => return Ok(Ending::Error { code, message }),
            Frame::Stdin(_) | Frame::Resize { .. } | Frame::Signal(_) => {}
        }
    }
    Ok(Ending::Lost)
}

fn write(stream: &mut impl Write, data: &str) -> Result<(), CliError> {
    let bytes = BASE64_STANDARD.decode(data).map_err(|_| {
        CliError::Output(io::Error::new(
            io::ErrorKind::InvalidData,
            "hostd sent broken base64",
        ))
    })?;
    stream
        .write_all(&bytes)
        .and_then(|()| stream.flush())
        .map_err(CliError::Output)
}

/// Sends input, signals and sizes. Returns only if the user typed the detach keys.
async fn send(
    mut sink: SplitSink<Socket, Message>,
    input: Input,
    tty: bool,
    mut keys: Option<DetachKeys>,
    signals: &mut mpsc::Receiver<Frame>,
) {
    // What cannot be sent is lost with the connection, of which the receiving side tells.
    if let Some(frame) = tty.then(size_frame).flatten() {
        let _ = sink.send(message(&frame)).await;
    }
    if input == Input::Empty {
        let _ = sink.send(message(&Frame::Stdin(String::new()))).await;
    }
    let mut chunks = (input == Input::Ours).then(read_input);
    loop {
        let chunk = async {
            match &mut chunks {
                Some(chunks) => chunks.recv().await,
                None => std::future::pending().await,
            }
        };
        let frame = tokio::select! {
            Some(frame) = signals.recv() => frame,
            chunk = chunk => match (chunk, &mut keys) {
                (Some(bytes), None) => Frame::Stdin(BASE64_STANDARD.encode(bytes)),
                (Some(bytes), Some(keys)) => match keys.filter(&bytes) {
                    Typed::Detach => break,
                    Typed::Pass(bytes) if bytes.is_empty() => continue,
                    Typed::Pass(bytes) => Frame::Stdin(BASE64_STANDARD.encode(bytes)),
                },
                (None, _) => {
                    chunks = None;
                    Frame::Stdin(String::new())
                }
            },
        };
        let _ = sink.send(message(&frame)).await;
    }
    let _ = sink.close().await;
}

fn message(frame: &Frame) -> Message {
    let text = serde_json::to_string(frame).expect("a frame has only plain values");
    Message::Text(text.into())
}

/// Reads standard input on a thread of its own, which may block for ever and ends with the process.
fn read_input() -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            match io::stdin().lock().read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(length) => {
                    if sender.blocking_send(buffer[..length].to_vec()).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

/// The status that a shell gives such an end.
pub(super) fn status(exit: &Exit) -> u8 {
    let status = match (exit.code, exit.signal) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 125,
    };
    u8::try_from(status & 0xff).expect("eight bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_128_and_its_number() {
        let table = [
            (Some(0), None, 0),
            (Some(3), None, 3),
            (None, Some(9), 137),
            (None, None, 125),
        ];
        for (code, signal, expected) in table {
            assert_eq!(
                status(&Exit {
                    code,
                    signal,
                    oom: false
                }),
                expected
            );
        }
    }
}
