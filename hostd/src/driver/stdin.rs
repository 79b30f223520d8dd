//! The input of a process that hostd itself writes to.

use std::collections::VecDeque;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tokio::io::{AsyncWrite, AsyncWriteExt};

/// Input that the process has not taken; more is left with the client.
const PENDING_BYTES_MAX: usize = 256 * 1024;

/// The character by which a terminal is told the end of its input (Ctrl-D).
const END_OF_TRANSMISSION: u8 = 4;

type Input = Box<dyn AsyncWrite + Send + Unpin>;

/// A process's input: what it has not taken yet waits here, so that signals can overtake it.
pub(super) struct Stdin {
    /// `None` once it has ended, or the process wants no more.
    sink: Option<Input>,
    pending: VecDeque<u8>,
    terminal: bool,
    /// End of file follows what is pending.
    ends: bool,
}

impl Stdin {
    /// With a terminal behind `sink`, the end of file is a character.
    pub(super) fn new(sink: Input, terminal: bool) -> Self {
        Self {
            sink: Some(sink),
            pending: VecDeque::new(),
            terminal,
            ends: false,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < PENDING_BYTES_MAX
    }

    pub(super) fn is_pending(&self) -> bool {
        self.sink.is_some() && !self.pending.is_empty()
    }

    /// Adds a frame's data; none is the end of file.
    pub(super) fn add(&mut self, data: &str) {
        if self.sink.is_none() {
            return;
        }
        let bytes = BASE64_STANDARD.decode(data).unwrap_or_default();
        if !bytes.is_empty() {
            self.pending.extend(bytes);
        } else if self.terminal {
            self.pending.push_back(END_OF_TRANSMISSION);
        } else {
            self.finish();
        }
    }

    /// There is no more to come.
    pub(super) fn finish(&mut self) {
        self.ends = true;
        if self.pending.is_empty() {
            self.sink = None;
        }
    }

    /// Writes as much as the process takes at once. Nothing is lost if it is dropped.
    pub(super) async fn write(&mut self) {
        let Some(sink) = &mut self.sink else { return };
        match sink.write(self.pending.as_slices().0).await {
            Ok(count @ 1..) => {
                self.pending.drain(..count);
            }
            // The process wants no more.
            Ok(0) | Err(_) => {
                self.sink = None;
                self.pending.clear();
            }
        }
        if self.ends && self.pending.is_empty() {
            self.sink = None;
        }
    }
}
