//! Where the host's clients come in, and where the guest's connections go out: Firecracker's
//! convention of a unix socket that is told `CONNECT PORT\n`, and of sockets named `PATH_PORT`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket,
};

use crate::listen::Listener;

/// The longest request: `CONNECT 4294967295\n`, with room for idle spaces.
const REQUEST_BYTES_MAX: usize = 32;

/// The host's side of a vsock device.
#[derive(Debug)]
pub struct VsockHost {
    /// Sockets that the guest can reach are beside it.
    listener: Listener,
}

impl VsockHost {
    /// Listens at `path`; the guest's connections to port P go to `path` with `_P` appended.
    ///
    /// A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> io::Result<VsockHost> {
        VsockHost::of(Listener::bind(path)?)
    }

    /// Takes over a socket that listens already. The guest cannot connect to the host.
    pub fn inherited(socket: UnixListener) -> io::Result<VsockHost> {
        VsockHost::of(Listener::inherited(socket))
    }

    fn of(listener: Listener) -> io::Result<VsockHost> {
        listener.socket().set_nonblocking(true)?;
        Ok(VsockHost { listener })
    }

    /// The next client; none if it has gone already; an error if none waits or can be let in.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.socket().accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionAborted
                    || error.kind() == io::ErrorKind::Interrupted =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Connects to the socket for the guest's connections to `port`. Never waits: a socket whose
    /// backlog is full counts as one where nobody listens.
    pub(super) fn connect(&self, port: u32) -> io::Result<OwnedFd> {
        let path = self.listener.path();
        let path = path.ok_or(io::ErrorKind::ConnectionRefused)?;
        let mut path = path.as_os_str().to_owned();
        path.push(format!("_{port}"));
        let address = UnixAddr::new(Path::new(&path))?;
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(socket.as_raw_fd(), &address)?;
        Ok(socket)
    }
}

impl AsFd for VsockHost {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.socket().as_fd()
    }
}

/// What a client has said so far.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Greeting {
    Port(u32),
    Incomplete,
    /// It is not a request, or the client is gone.
    Invalid,
}

/// Reads a client's request, and not a byte of what may follow it.
pub(super) fn read_request(stream: &UnixStream) -> Greeting {
    let mut bytes = [0; REQUEST_BYTES_MAX];
    let flags = MsgFlags::MSG_DONTWAIT;
    let seen = match recv(stream.as_raw_fd(), &mut bytes, flags | MsgFlags::MSG_PEEK) {
        Ok(0) => return Greeting::Invalid,
        Ok(seen) => seen,
        Err(Errno::EAGAIN | Errno::EINTR) => return Greeting::Incomplete,
        Err(_) => return Greeting::Invalid,
    };
    let Some(end) = bytes[..seen].iter().position(|byte| *byte == b'\n') else {
        return if seen < REQUEST_BYTES_MAX {
            Greeting::Incomplete
        } else {
            Greeting::Invalid
        };
    };
    // These bytes are there: taking them away is all this does.
    if recv(stream.as_raw_fd(), &mut bytes[..=end], flags) != Ok(end + 1) {
        return Greeting::Invalid;
    }
    parse(&bytes[..end]).map_or(Greeting::Invalid, Greeting::Port)
}

fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let command = words.next()?;
    let port = words.next()?.parse().ok()?;
    (command.eq_ignore_ascii_case("connect") && words.next().is_none()).then_some(port)
}
