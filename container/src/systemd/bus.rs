//! The connection to systemd, by the socket that it keeps for systemctl: without a message bus between,
//! which need not be there.
//!
//! A crate for D-Bus would be an asynchronous runtime (zbus) or a library in C (dbus); what is needed of
//! the protocol is four calls and one signal.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::wire::{Call, FIXED_BYTES, Message, MessageKind, length};
use crate::rights;

/// How long systemd may take for any answer: it may be busy with a host that boots.
const ANSWER_SECONDS_MAX: u64 = 25;

/// The answer to the authentication is two short lines.
const LINES_BYTES_MAX: usize = 256;

const NAME: &str = "org.freedesktop.systemd1";

/// Why systemd did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum SystemdError {
    #[error("cannot connect to systemd at {}", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error(
        "cannot connect to this user's systemd at {}: XDG_RUNTIME_DIR must name its directory, and it runs while \
         the user is logged in, or always after `loginctl enable-linger`; without it, omit --systemd-cgroup",
        path.display()
    )]
    ConnectUser { path: PathBuf, source: io::Error },
    #[error("cannot talk to systemd")]
    Talk(#[source] io::Error),
    #[error("systemd refuses to {act}: {message}")]
    Refused {
        act: &'static str,
        /// As `org.freedesktop.systemd1.NoSuchUnit`.
        name: String,
        message: String,
    },
    #[error("systemd could not start {unit}: the job is {result}")]
    Job { unit: String, result: String },
    #[error(
        "this user's systemd could not start {unit}: it may move processes that run below its own group, as \
         `systemd-run --user --scope` starts them, and others only with the help of the system's message bus"
    )]
    NotMovable { unit: String },
}

/// An authenticated connection.
#[derive(Debug)]
pub(super) struct Bus {
    stream: UnixStream,
    serial: u32,
}

impl Bus {
    pub(super) fn connect(path: &Path) -> Result<Bus, SystemdError> {
        let failed = |source| {
            let path = path.to_owned();
            if rights::is_host_root() {
                SystemdError::Connect { path, source }
            } else {
                SystemdError::ConnectUser { path, source }
            }
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        let timeout = Some(Duration::from_secs(ANSWER_SECONDS_MAX));
        stream.set_read_timeout(timeout).map_err(failed)?;
        stream.set_write_timeout(timeout).map_err(failed)?;
        let mut bus = Bus { stream, serial: 0 };
        bus.authenticate().map_err(failed)?;
        Ok(bus)
    }

    /// Who this is systemd sees by the socket, also where a user namespace gives the user another number.
    fn authenticate(&mut self) -> io::Result<()> {
        self.stream
            .write_all(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")?;
        let mut lines = Vec::new();
        while lines.iter().filter(|byte| **byte == b'\n').count() < 2 {
            if lines.len() == LINES_BYTES_MAX {
                return Err(malformed());
            }
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            lines.push(byte[0]);
        }
        if lines.starts_with(b"DATA\r\nOK ") {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&lines).trim_end().to_owned();
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("it answers `{}`", text.escape_debug()),
        ))
    }

    /// Calls a method and waits for its answer. `act` is what it does, for the error.
    pub(super) fn call(
        &mut self,
        act: &'static str,
        call: &Call<'_>,
    ) -> Result<Message, SystemdError> {
        self.serial += 1;
        let bytes = call.encode(NAME, self.serial);
        self.stream.write_all(&bytes).map_err(SystemdError::Talk)?;
        loop {
            let message = self.receive()?;
            // Signals of before tell of nothing that was begun here.
            if message.reply_to != Some(self.serial) {
                continue;
            }
            if message.kind == MessageKind::Error {
                let reason = message.body().text().unwrap_or_default().to_owned();
                return Err(SystemdError::Refused {
                    act,
                    name: message.error.unwrap_or_default(),
                    message: reason,
                });
            }
            return Ok(message);
        }
    }

    /// Waits for the end of a job, and returns how it ended.
    pub(super) fn await_job(&mut self, job: &str) -> Result<String, SystemdError> {
        loop {
            let message = self.receive()?;
            if message.kind != MessageKind::Signal
                || message.member.as_deref() != Some("JobRemoved")
            {
                continue;
            }
            let mut body = message.body();
            let ended = (|| {
                body.number()?;
                let path = body.text()?;
                let _unit = body.text()?;
                Some((path, body.text()?))
            })();
            let (path, result) = ended.ok_or_else(|| SystemdError::Talk(malformed()))?;
            if path == job {
                return Ok(result.to_owned());
            }
        }
    }

    fn receive(&mut self) -> Result<Message, SystemdError> {
        let mut read = || -> io::Result<Message> {
            let mut fixed = [0; FIXED_BYTES];
            self.stream.read_exact(&mut fixed)?;
            let length = length(&fixed).ok_or_else(malformed)?;
            let mut bytes = fixed.to_vec();
            bytes.resize(length, 0);
            self.stream.read_exact(&mut bytes[FIXED_BYTES..])?;
            Message::decode(&bytes).ok_or_else(malformed)
        };
        read().map_err(|source| {
            if source.kind() != io::ErrorKind::WouldBlock {
                return SystemdError::Talk(source);
            }
            let silence = format!("it has not answered for {ANSWER_SECONDS_MAX} s");
            SystemdError::Talk(io::Error::new(io::ErrorKind::TimedOut, silence))
        })
    }
}

pub(super) fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its answer is malformed")
}
