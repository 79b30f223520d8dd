//! Clients whose connection becomes the guest's console: they see what it writes, and one at a time may
//! type.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use crate::console::{Feed, Reader};
use crate::devices::serial::SerialPort;
use crate::events::Poller;

/// Why a client gets no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    #[error("busy: somebody else types; attach without `input` to look on")]
    Taken,
    #[error("the connection cannot be read from")]
    Input(#[source] io::Error),
}

/// The guest's console.
pub struct Console {
    pub port: Arc<Mutex<SerialPort>>,
    pub feed: Arc<Feed>,
    pub poller: Arc<Poller>,
    /// The port's number in the event loop.
    pub source: u32,
}

opaque_debug!(Console);

impl Console {
    /// From now on there is something to see.
    #[must_use]
    pub fn shown(self) -> Console {
        let mut port = self.port.lock().expect("no device panics");
        port.show(self.feed.clone());
        drop(port);
        self
    }

    /// What `stream` is to see; what comes from it is typed, if `input`.
    pub(super) fn attach(
        &self,
        stream: &UnixStream,
        input: bool,
    ) -> Result<Attached, ConsoleError> {
        let typist = input.then(|| self.typist(stream)).transpose()?;
        Ok(Attached {
            reader: self.feed.reader(),
            _typist: typist,
        })
    }

    /// The port reads from the connection itself, as much as it has room for.
    fn typist(&self, stream: &UnixStream) -> Result<Typist, ConsoleError> {
        let keys = stream.try_clone().map_err(ConsoleError::Input)?;
        let keys = File::from(OwnedFd::from(keys));
        let mut port = self.port.lock().expect("no device panics");
        let number = port.connect(keys, self.poller.clone(), self.source);
        let number = number.map_err(ConsoleError::Input)?;
        Ok(Typist {
            number: number.ok_or(ConsoleError::Taken)?,
            port: self.port.clone(),
        })
    }
}

/// A client's console, until this is dropped.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) reader: Reader,
    _typist: Option<Typist>,
}

/// One who types, as long as this is there and there is something to come.
struct Typist {
    port: Arc<Mutex<SerialPort>>,
    number: u64,
}

opaque_debug!(Typist);

impl Drop for Typist {
    fn drop(&mut self) {
        let mut port = self.port.lock().expect("no device panics");
        port.disconnect(self.number);
    }
}
