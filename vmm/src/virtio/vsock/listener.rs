//! Where the host's clients come in, and where the guest's connections go out: Firecracker's
//! convention of a unix socket that is told `CONNECT PORT\n`, and of sockets named `PATH_PORT`.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, socket,
};

/// The longest request: `CONNECT 4294967295\n`, with room for idle spaces.
const REQUEST_BYTES_MAX: usize = 32;

/// The host's side of a vsock device.
#[derive(Debug)]
pub struct VsockHost {
    listener: UnixListener,
    /// The path that the listener was bound to; it is removed with it, and sockets that the guest
    /// can reach are beside it.
    path: Option<PathBuf>,
}

impl VsockHost {
    /// Listens at `path`; the guest's connections to port P go to `path` with `_P` appended.
    ///
    /// A socket that nobody listens on any more is replaced.
    pub fn bind(path: &Path) -> io::Result<VsockHost> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_dead(path) => {
                fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            result => result?,
        };
        listener.set_nonblocking(true)?;
        Ok(VsockHost {
            listener,
            path: Some(path.to_owned()),
        })
    }

    /// Takes over a socket that listens already. The guest cannot connect to the host.
    pub fn inherited(listener: UnixListener) -> io::Result<VsockHost> {
        listener.set_nonblocking(true)?;
        Ok(VsockHost {
            listener,
            path: None,
        })
    }

    /// The next client; none if it has gone already; an error if none waits or can be let in.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
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
        let path = self.path.as_ref().ok_or(io::ErrorKind::ConnectionRefused)?;
        let mut path = path.clone().into_os_string();
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
        self.listener.as_fd()
    }
}

impl Drop for VsockHost {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Whether it was there or not, it is not afterwards.
            let _ = fs::remove_file(path);
        }
    }
}

fn is_dead(path: &Path) -> bool {
    let socket = fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    let refused = UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    socket && refused
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
