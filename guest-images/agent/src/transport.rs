//! How the agent and the host reach each other: vsock, or unix sockets for development.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect, getpeername, listen,
    socket,
};

use crate::protocol::PORT;
use crate::sys;

/// The host's context id.
const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Ports that Linux gives to nobody without CAP_NET_BIND_SERVICE.
const PRIVILEGED_PORTS: Range<u32> = 512..1024;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// How to reach the host.
#[derive(Clone, Debug)]
pub enum Transport {
    /// The virtual machine's vsock device.
    Vsock,
    /// The agent listens at this path and connects to `PATH_PORT`, as on the host's side of
    /// hostd-vmm's vsock device.
    Unix(PathBuf),
}

/// Where the host's connections arrive. Whatever its family, a connected stream socket reads, writes
/// and shuts down as a unix one does, so that is the type of it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    family: Transport,
}

impl Transport {
    /// Connects to a port of the host.
    pub(crate) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        match self {
            Self::Vsock => {
                let socket = vsock()?;
                connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
                Ok(socket.into())
            }
            Self::Unix(path) => UnixStream::connect(with_port(path, port)),
        }
    }

    /// Listens for the host's connections.
    pub(crate) fn listen(&self) -> io::Result<Listener> {
        let socket = match self {
            Self::Vsock => {
                let socket = vsock()?;
                let address = VsockAddr::new(libc::VMADDR_CID_ANY, PORT);
                bind(socket.as_raw_fd(), &address)?;
                listen(&socket, Backlog::new(BACKLOG)?)?;
                socket
            }
            Self::Unix(path) => UnixListener::bind(path)?.into(),
        };
        Ok(Listener {
            socket,
            family: self.clone(),
        })
    }
}

/// Connects to a port of the host over vsock, from one that only privileged processes may have.
pub(crate) fn connect_privileged(port: u32) -> io::Result<UnixStream> {
    let socket = vsock()?;
    // Somebody else in the machine, or a connection that is about to end, may have some of them.
    let free = PRIVILEGED_PORTS.rev().find(|own| {
        let address = VsockAddr::new(libc::VMADDR_CID_ANY, *own);
        bind(socket.as_raw_fd(), &address).is_ok()
    });
    free.ok_or(io::ErrorKind::AddrInUse)?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, port))?;
    Ok(socket.into())
}

impl Listener {
    /// Waits for the next connection of the host.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let stream = UnixStream::from(sys::accept(self.socket.as_fd())?);
            if matches!(self.family, Transport::Unix(_)) || is_from_host(&stream) {
                return Ok(stream);
            }
            // The workload itself may connect to the port through a loopback; it is not answered.
        }
    }
}

fn vsock() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socket(AddressFamily::Vsock, SockType::Stream, flags, None)?)
}

fn is_from_host(stream: &UnixStream) -> bool {
    getpeername::<VsockAddr>(stream.as_raw_fd()).is_ok_and(|address| address.cid() == HOST_CID)
}

fn with_port(path: &Path, port: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("_{port}"));
    name.into()
}
