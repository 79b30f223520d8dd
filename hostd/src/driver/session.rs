//! A conversation over a socket that speaks lines of frames, as the monitor and the guest's agent
//! do.

use agent::protocol::Frame;
use futures::{SinkExt, StreamExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_util::codec::{Framed, LinesCodec};

use super::{SESSION_FRAMES_MAX, Session};

/// Passes frames on until either side ends; those from the process as `amend` has them.
pub(super) fn over_lines(
    connection: Framed<UnixStream, LinesCodec>,
    amend: impl Fn(Frame) -> Frame + Send + 'static,
) -> Session {
    let (input, mut towards) = mpsc::channel::<Frame>(SESSION_FRAMES_MAX);
    let (from, output) = mpsc::channel(SESSION_FRAMES_MAX);
    let (mut sink, mut stream) = connection.split();
    tokio::spawn(async move {
        while let Some(frame) = towards.recv().await {
            let line = serde_json::to_string(&frame).expect("a frame has only plain values");
            if sink.send(line).await.is_err() {
                return;
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let line = tokio::select! {
                line = stream.next() => line,
                // Nobody listens any more.
                () = from.closed() => return,
            };
            let Some(Ok(line)) = line else { return };
            let frame = serde_json::from_str(&line).map_or_else(
                |error| Frame::Error {
                    code: 125,
                    message: format!("a frame cannot be understood: {error}"),
                },
                &amend,
            );
            let last = matches!(frame, Frame::Exit { .. } | Frame::Error { .. });
            if from.send(frame).await.is_err() || last {
                return;
            }
        }
    });
    Session { input, output }
}
