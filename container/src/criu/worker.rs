//! A CRIU that serves one request of this process (`criu swrk`).
//!
//! It is not ended with its caller: with a signal in the middle it would leave processes behind that have
//! its code in them. At each notification it waits for an answer, and when the socket is closed instead it
//! undoes what it has done: what was to be dumped goes on, what was being restored is gone.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::SigSet;
use prost::Message;
use rustix::io::{FdFlags, fcntl_setfd};

use super::CriuError;
use super::rpc::{Kind, Notification, Request, Response};
use crate::handshake::{self, Channel};
use crate::launch;
use crate::process::Process;
use crate::sys::{self, Cloned};

/// The longest message that is taken from CRIU: texts and numbers.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// What is done when CRIU waits for its caller: with what it says, and the descriptor that came along.
pub(super) type Attend<'a, E> = dyn FnMut(&Notification, Option<OwnedFd>) -> Result<(), E> + 'a;

/// A CRIU that runs.
#[derive(Debug)]
pub(super) struct Worker {
    channel: Channel,
    process: Process,
}

/// Where CRIU runs, and what it finds open there, under the numbers of this process.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) descriptors: &'a [BorrowedFd<'a>],
    /// New namespaces for CRIU itself, as `CLONE_NEW*` flags.
    pub(super) namespaces: u64,
    /// A group of cgroup v2 for it.
    pub(super) cgroup: Option<BorrowedFd<'a>>,
    /// What is done in them before it starts.
    pub(super) prepare: &'a dyn Fn() -> io::Result<()>,
}

impl Place<'_> {
    /// This process's own.
    pub(super) const HERE: Place<'static> = Place {
        descriptors: &[],
        namespaces: 0,
        cgroup: None,
        prepare: &|| Ok(()),
    };
}

impl Worker {
    /// Starts the program. The caller must have a single thread.
    pub(super) fn start(program: &Path, place: Place<'_>) -> Result<Self, CriuError> {
        let failed = CriuError::step("start CRIU");
        let (report, telling) = Channel::pair().map_err(failed)?;
        match sys::clone3(place.namespaces, place.cgroup).map_err(failed)? {
            Cloned::Child => {
                let error = execute(program, place, &telling);
                launch::fail(&telling, &error)
            }
            Cloned::Parent { pid, pidfd } => {
                drop(telling);
                let process = Process::from_child(pid, pidfd).map_err(failed)?;
                match await_execution(&report) {
                    Ok(channel) => Ok(Self { channel, process }),
                    Err(error) => {
                        let _ = process.wait();
                        Err(failed(error))
                    }
                }
            }
        }
    }

    /// Has a request carried out, with `attend` called at each point where CRIU waits for its caller. If
    /// that fails CRIU is told to give up.
    pub(super) fn serve<E>(
        self,
        request: &Request,
        attend: &mut Attend<'_, E>,
    ) -> Result<Response, Served<E>> {
        let failed = CriuError::step("talk to CRIU");
        let outcome = self.converse(request, attend);
        let Self { channel, process } = self;
        // It may wait for more.
        drop(channel);
        process.wait().map_err(failed)?;
        outcome
    }

    fn converse<E>(
        &self,
        request: &Request,
        attend: &mut Attend<'_, E>,
    ) -> Result<Response, Served<E>> {
        self.send(request)?;
        let mut refused = None;
        loop {
            let Some((response, descriptor)) = self.receive()? else {
                let source = io::Error::from(io::ErrorKind::UnexpectedEof);
                return Err(
                    refused.unwrap_or_else(|| CriuError::step("hear from CRIU")(source).into())
                );
            };
            if response.kind() != Kind::Notify {
                return refused.map_or(Ok(response), Err);
            }
            let notification = response.notify.unwrap_or_default();
            let attended = attend(&notification, descriptor);
            self.send(&Request {
                kind: Kind::Notify.into(),
                notify_success: Some(attended.is_ok()),
                ..Request::default()
            })?;
            if let Err(error) = attended {
                refused.get_or_insert(Served::Caller(error));
            }
        }
    }

    fn send(&self, request: &Request) -> Result<(), CriuError> {
        let bytes = request.encode_to_vec();
        match self.channel.send_packet(&[IoSlice::new(&bytes)], None) {
            // It is gone; what it had to say is still there to be received.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            sent => sent.map_err(CriuError::step("ask CRIU")),
        }
    }

    fn receive(&self) -> Result<Option<(Response, Option<OwnedFd>)>, CriuError> {
        let receive = || {
            let length = self.channel.await_packet()?;
            if length > MESSAGE_BYTES_MAX {
                return Err(io::Error::other("its message is too long"));
            }
            let mut packet = vec![0; length];
            let (length, descriptor) = self.channel.receive_packet(&mut packet)?;
            if length == 0 {
                return Ok(None);
            }
            let response = Response::decode(&packet[..length]).map_err(io::Error::other)?;
            Ok(Some((response, descriptor)))
        };
        receive().map_err(CriuError::step("hear from CRIU"))
    }
}

/// How a conversation failed.
pub(crate) enum Served<E> {
    Criu(CriuError),
    /// What was to be done at a notification.
    Caller(E),
}

impl<E> From<CriuError> for Served<E> {
    fn from(error: CriuError) -> Self {
        Served::Criu(error)
    }
}

/// In the child: becomes CRIU, or says why not.
///
/// The socket is made here, and one end sent to the caller: CRIU takes numbers of descriptors for those of
/// the process that has made the socket, which is then itself.
fn execute(program: &Path, place: Place<'_>, telling: &Channel) -> io::Error {
    let prepare = || -> io::Result<Channel> {
        // The caller's foreground verbs block signals, to pass them on.
        SigSet::empty().thread_set_mask()?;
        sys::reset_signal_handlers();
        sys::reset_broken_pipe();
        (place.prepare)()?;
        let (caller, own) = Channel::pair()?;
        telling.send(&handshake::Message::Socket(Some(caller.into())))?;
        for descriptor in place.descriptors.iter().copied().chain([own.as_fd()]) {
            fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        Ok(own)
    };
    let socket = match prepare() {
        Ok(socket) => socket,
        Err(error) => return error,
    };
    let number = socket.as_fd().as_raw_fd().to_string();
    let mut command = Command::new(program);
    command.args(["swrk", &number]).stdin(Stdio::null());
    // What it has to say is in its log.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let error = command.exec();
    io::Error::new(error.kind(), format!("{}: {error}", program.display()))
}

/// Waits until the child is CRIU, and returns the socket to it.
fn await_execution(report: &Channel) -> io::Result<Channel> {
    let mut socket = None;
    loop {
        match report.receive()? {
            Some(handshake::Message::Socket(descriptor)) => socket = descriptor,
            Some(handshake::Message::Failed(failure)) => return Err(io::Error::other(failure)),
            Some(other) => return Err(io::Error::other(format!("unexpected: {other:?}"))),
            None => {
                let socket = socket.ok_or(io::ErrorKind::UnexpectedEof)?;
                return Ok(Channel::new(socket));
            }
        }
    }
}
