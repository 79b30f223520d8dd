//! What the creator of a container and its first process say to each other, and `start` to it later.
//!
//! One packet is one message: a byte that says which, and a text. The peer's end of a socket closes when
//! it executes the container's program or dies, so silence is never waited for.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, bind, recv, recvmsg,
    sendmsg, socket_with, socketpair,
};

/// The longest packet; a longer error text is cut.
const PACKET_BYTES_MAX: usize = 16 * 1024;

/// A message, in the order in which they are sent.
#[derive(Debug)]
pub(crate) enum Message {
    /// A helper made the first process as its sibling: the pid is this, the descriptor comes along.
    Forked { pid: i32, pidfd: Option<OwnedFd> },
    /// Go on to the next wait.
    Proceed,
    /// The namespaces are made: run the hooks that belong here.
    Hooks,
    /// The terminal's other side.
    Console(Option<OwnedFd>),
    /// The listener of the seccomp filter.
    Notify(Option<OwnedFd>),
    /// A socket to somebody else.
    Socket(Option<OwnedFd>),
    /// All is set up, but for what needs `start`.
    Ready,
    /// The next that happens is exec: the end of the stream means that it succeeded.
    Executing,
    /// It did not work.
    Failed(Failure),
}

/// Why a process of a container gave up before it executed its program.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Which of the reasons that a caller may act on.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// What the failure of a process was about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// There is no such program.
    ProgramNotFound,
    /// The program is there, but the kernel does not execute it.
    ProgramNotExecutable,
    /// A hook failed.
    Hook,
    /// Something else, of which nothing but the message is known.
    Other,
}

impl Message {
    pub(crate) fn failed(reason: Reason, message: String) -> Self {
        Self::Failed(Failure { reason, message })
    }
}

/// One end of a socket for messages.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: OwnedFd,
}

impl Channel {
    pub(crate) fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self { socket: one }, Self { socket: other }))
    }

    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    pub(crate) fn send(&self, message: &Message) -> io::Result<()> {
        let text;
        let (tag, text, descriptor): (u8, &str, Option<&OwnedFd>) = match message {
            Message::Forked { pid, pidfd } => {
                text = pid.to_string();
                (b'f', &text, pidfd.as_ref())
            }
            Message::Proceed => (b'p', "", None),
            Message::Hooks => (b'h', "", None),
            Message::Console(terminal) => (b'c', "", terminal.as_ref()),
            Message::Notify(listener) => (b'n', "", listener.as_ref()),
            Message::Socket(socket) => (b's', "", socket.as_ref()),
            Message::Ready => (b'r', "", None),
            Message::Executing => (b'x', "", None),
            Message::Failed(Failure { reason, message }) => {
                let tag = match reason {
                    Reason::ProgramNotFound => b'm',
                    Reason::ProgramNotExecutable => b'u',
                    Reason::Hook => b'k',
                    Reason::Other => b'e',
                };
                (tag, message, None)
            }
        };
        let text = text.as_bytes();
        let text = &text[..text.len().min(PACKET_BYTES_MAX - 1)];
        self.send_packet(
            &[IoSlice::new(&[tag]), IoSlice::new(text)],
            descriptor.map(AsFd::as_fd),
        )
    }

    /// The next message; nothing when the peer has closed its end.
    pub(crate) fn receive(&self) -> io::Result<Option<Message>> {
        // Most packets are short: so much memory would be made, in both processes, for a few bytes.
        let mut packet = vec![0; self.await_packet()?.min(PACKET_BYTES_MAX)];
        let (length, descriptor) = self.receive_packet(&mut packet)?;
        let Some((tag, text)) = packet[..length].split_first() else {
            return Ok(None);
        };
        let text = String::from_utf8_lossy(text).into_owned();
        Ok(Some(match tag {
            b'f' => Message::Forked {
                pid: text.parse().map_err(io::Error::other)?,
                pidfd: descriptor,
            },
            b'p' => Message::Proceed,
            b'h' => Message::Hooks,
            b'c' => Message::Console(descriptor),
            b'n' => Message::Notify(descriptor),
            b's' => Message::Socket(descriptor),
            b'r' => Message::Ready,
            b'x' => Message::Executing,
            b'm' => Message::failed(Reason::ProgramNotFound, text),
            b'u' => Message::failed(Reason::ProgramNotExecutable, text),
            b'k' => Message::failed(Reason::Hook, text),
            b'e' => Message::failed(Reason::Other, text),
            _ => return Err(io::Error::other("a message of an unknown kind")),
        }))
    }

    /// Waits until the peer says to go on.
    pub(crate) fn await_proceed(&self) -> io::Result<()> {
        match self.receive()? {
            Some(Message::Proceed) => Ok(()),
            Some(other) => Err(io::Error::other(format!(
                "expected to go on, got {other:?}"
            ))),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    pub(crate) fn send_packet(
        &self,
        parts: &[IoSlice<'_>],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        loop {
            // Without NOSIGNAL a dead peer would end this process by SIGPIPE.
            match sendmsg(&self.socket, parts, &mut ancillary, SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                result => return result.map(drop).map_err(Into::into),
            }
        }
    }

    /// The length of the next packet, once it is there; 0 when the peer has closed its end.
    pub(crate) fn await_packet(&self) -> io::Result<usize> {
        let look = RecvFlags::PEEK | RecvFlags::TRUNC;
        loop {
            match recv(&self.socket, &mut [0; 0], look) {
                Err(Errno::INTR) => {}
                // A peer that dies with something unread resets the connection.
                Err(Errno::CONNRESET) => return Ok(0),
                result => return Ok(result?.1),
            }
        }
    }

    pub(crate) fn receive_packet(&self, packet: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let length = loop {
            let parts = &mut [IoSliceMut::new(packet)];
            match recvmsg(&self.socket, parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                // A peer that dies with something unread resets the connection.
                Err(Errno::CONNRESET) => break 0,
                result => break result?.bytes,
            }
        };
        let descriptor = ancillary.drain().find_map(|message| {
            let RecvAncillaryMessage::ScmRights(mut descriptors) = message else {
                return None;
            };
            descriptors.next()
        });
        Ok((length, descriptor))
    }
}

/// Makes a socket that [`connect`] finds.
pub(crate) fn listen(path: &Path) -> io::Result<OwnedFd> {
    /// More than one only where several `start`s race; one wins, and the others are told.
    const BACKLOG: i32 = 8;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Connects to a process that waits at `path`.
pub(crate) fn connect(path: &Path) -> io::Result<Channel> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(Channel { socket })
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> Self {
        channel.socket
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sends a descriptor with some bytes over a stream socket, as engines and agents expect it.
pub(crate) fn send_descriptor(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<()> {
    let descriptors = [descriptor];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    if sent < bytes.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_as_sent_and_the_end_is_seen() {
        let (one, other) = Channel::pair().unwrap();
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        one.send(&Message::Forked {
            pid: 7,
            pidfd: Some(file),
        })
        .unwrap();
        let long = "é".repeat(PACKET_BYTES_MAX);
        for reason in [Reason::ProgramNotFound, Reason::ProgramNotExecutable] {
            one.send(&Message::failed(reason, long.clone())).unwrap();
        }
        drop(one);
        let Some(Message::Forked {
            pid: 7,
            pidfd: Some(_),
        }) = other.receive().unwrap()
        else {
            panic!("the first message is another one");
        };
        for expected in [Reason::ProgramNotFound, Reason::ProgramNotExecutable] {
            let Some(Message::Failed(Failure { reason, message })) = other.receive().unwrap()
            else {
                panic!("the message is another one");
            };
            assert_eq!(reason, expected);
            assert!(message.len() >= PACKET_BYTES_MAX - 4);
        }
        assert!(other.receive().unwrap().is_none());
        assert!(other.send(&Message::Ready).is_err());
    }
}
