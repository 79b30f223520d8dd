//! The host's end of a connection: a unix socket, a descriptor that the VMM was given, or the VMM
//! itself, who takes reports.
//!
//! Nothing here blocks, and nobody else is made to see a flag change. A flag like O_NONBLOCK belongs
//! to the open file, which a descriptor may share with a shell or a monitor, so:
//! - sockets are asked not to block call by call;
//! - a pipe or terminal is opened anew through /proc, with O_NONBLOCK of our own;
//! - a pipe that cannot be (no /proc, or another user's) is polled before each call, and written to
//!   in pieces that a writable pipe has room for;
//! - a terminal that cannot be is made non-blocking after all, until the descriptor is dropped:
//!   whoever has no /proc runs in a jail, and has a terminal of its own there;
//! - regular files do not block.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use crate::devices::guest_status::Reports;
use crate::spec::StreamDirection;
use crate::virtio::chain::IoList;

/// What a pipe that polls as writable takes without blocking (`PIPE_BUF` of pipe(7)).
const PIPE_BYTES_MIN: usize = 4096;

/// The host's end of a connection.
#[derive(Debug)]
pub(super) enum Endpoint {
    /// A connected stream socket; closed with the connection.
    Socket(OwnedFd),
    /// One direction, which outlives the connection.
    Stream(Stream),
    /// What the guest sends is reports, one in each packet.
    Reports(Reports),
}

/// A descriptor that the guest is joined to in one direction.
#[derive(Debug)]
pub(super) struct Stream {
    file: File,
    mode: Mode,
    pub(super) direction: StreamDirection,
}

/// How calls on a stream are kept from blocking.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mode {
    /// It is a socket.
    Socket,
    /// The open file says so, or it never blocks.
    File,
    /// The open file said otherwise, and shall again.
    Borrowed(OFlag),
    Polled,
}

impl Stream {
    /// Finds out how `file` can be used without blocking.
    pub(super) fn new(file: File, direction: StreamDirection) -> io::Result<Stream> {
        let kind = file.metadata()?.file_type();
        if kind.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let stream = |file, mode| Stream {
            file,
            mode,
            direction,
        };
        if kind.is_socket() {
            return Ok(stream(file, Mode::Socket));
        }
        if !kind.is_fifo() && !kind.is_char_device() {
            return Ok(stream(file, Mode::File));
        }
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_NONBLOCK) {
            return Ok(stream(file, Mode::File));
        }
        if let Ok(file) = open_anew(&file, direction) {
            return Ok(stream(file, Mode::File));
        }
        if kind.is_fifo() {
            return Ok(stream(file, Mode::Polled));
        }
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(stream(file, Mode::Borrowed(flags)))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Mode::Borrowed(flags) = self.mode {
            // There is nobody to tell, and nothing to do about it.
            let _ = fcntl(&self.file, FcntlArg::F_SETFL(flags));
        }
    }
}

/// The same pipe or terminal, as an open file of our own.
fn open_anew(file: &File, direction: StreamDirection) -> io::Result<File> {
    OpenOptions::new()
        .read(direction == StreamDirection::ToGuest)
        .write(direction == StreamDirection::FromGuest)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl Endpoint {
    /// Whether data of the guest can go there.
    pub(super) fn takes_data(&self) -> bool {
        match self {
            Endpoint::Socket(_) => true,
            Endpoint::Stream(stream) => stream.direction == StreamDirection::FromGuest,
            Endpoint::Reports(_) => true,
        }
    }

    /// Whether data for the guest can come from there.
    pub(super) fn gives_data(&self) -> bool {
        match self {
            Endpoint::Socket(_) => true,
            Endpoint::Stream(stream) => stream.direction == StreamDirection::ToGuest,
            Endpoint::Reports(_) => false,
        }
    }

    /// Whether the end of the guest's data is the end of the connection.
    pub(super) fn ends_with_guest_data(&self) -> bool {
        match self {
            Endpoint::Socket(_) => false,
            Endpoint::Stream(stream) => stream.direction == StreamDirection::FromGuest,
            Endpoint::Reports(_) => true,
        }
    }

    /// The most that one call of [`write`](Self::write) may be given.
    pub(super) fn write_bytes_max(&self) -> usize {
        match self {
            Endpoint::Stream(stream) if stream.mode == Mode::Polled => PIPE_BYTES_MIN,
            Endpoint::Socket(_) | Endpoint::Stream(_) | Endpoint::Reports(_) => usize::MAX,
        }
    }

    /// Whether [`write`](Self::write) can take data where the guest has put it.
    pub(super) fn writes_guest_memory(&self) -> bool {
        !matches!(self, Endpoint::Reports(_))
    }

    /// The descriptor that tells when the end is ready, if there is one; it always is without.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Endpoint::Socket(socket) => Some(socket.as_fd()),
            Endpoint::Stream(stream) => Some(stream.file.as_fd()),
            Endpoint::Reports(_) => None,
        }
    }

    /// Reads what there is; 0 at the end; an error of kind `WouldBlock` if there is nothing yet.
    pub(super) fn read(&self, list: &IoList<'_>) -> io::Result<usize> {
        retry(|| match self {
            Endpoint::Socket(socket) => list.receive_from(socket.as_fd()),
            Endpoint::Stream(stream) => match stream.mode {
                Mode::Socket => list.receive_from(stream.file.as_fd()),
                Mode::File | Mode::Borrowed(_) => list.read_from(stream.file.as_fd()),
                Mode::Polled => {
                    ready(stream.file.as_fd(), PollFlags::POLLIN)?;
                    list.read_from(stream.file.as_fd())
                }
            },
            Endpoint::Reports(_) => Ok(0),
        })
    }

    /// Writes what there is room for; an error of kind `WouldBlock` if there is none yet.
    pub(super) fn write(&self, list: &IoList<'_>) -> io::Result<usize> {
        retry(|| match self {
            Endpoint::Socket(socket) => list.send_to(socket.as_fd()),
            Endpoint::Stream(stream) => match stream.mode {
                Mode::Socket => list.send_to(stream.file.as_fd()),
                Mode::File | Mode::Borrowed(_) => list.write_to(stream.file.as_fd()),
                Mode::Polled => {
                    ready(stream.file.as_fd(), PollFlags::POLLOUT)?;
                    list.write_to(stream.file.as_fd())
                }
            },
            Endpoint::Reports(_) => Err(io::ErrorKind::Unsupported.into()),
        })
    }

    /// As [`write`](Self::write), from memory of our own, and of any length.
    pub(super) fn write_bytes(&self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(self.write_bytes_max())];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        retry(|| match self {
            Endpoint::Socket(socket) => Ok(send(socket.as_raw_fd(), bytes, flags)?),
            Endpoint::Stream(stream) => match stream.mode {
                Mode::Socket => Ok(send(stream.file.as_raw_fd(), bytes, flags)?),
                Mode::File | Mode::Borrowed(_) => (&stream.file).write(bytes),
                Mode::Polled => {
                    ready(stream.file.as_fd(), PollFlags::POLLOUT)?;
                    (&stream.file).write(bytes)
                }
            },
            Endpoint::Reports(reports) => {
                reports.take(bytes);
                Ok(bytes.len())
            }
        })
    }

    /// Tells a socket's other end that nothing more will be written, or read. Streams are not ours
    /// to shut.
    pub(super) fn shut(&self, how: Shutdown) {
        if let Endpoint::Socket(socket) = self {
            // It fails only if the other end is gone, which shows when it is used.
            let _ = shutdown(socket.as_raw_fd(), how);
        }
    }
}

/// Whether a call would not block, as far as anyone can know in advance.
fn ready(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    let mut fds = [PollFd::new(fd, flags)];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(0) => Err(io::ErrorKind::WouldBlock.into()),
        Ok(_) => Ok(()),
        Err(Errno::EINTR) => Err(io::ErrorKind::Interrupted.into()),
        Err(error) => Err(error.into()),
    }
}

/// Signals interrupt calls; none of ours means to stop.
fn retry(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::pty::openpty;
    use nix::unistd::pipe;
    use tempfile::tempfile;

    use super::*;

    fn flags(file: &File) -> OFlag {
        OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).unwrap())
    }

    #[test]
    fn whoever_shares_an_open_file_with_us_sees_no_change() {
        let (reader, writer) = pipe().unwrap();
        let (input, output) = (File::from(reader), File::from(writer));
        let terminal = openpty(None, None).unwrap();
        let slave = File::from(terminal.slave);
        for (file, direction) in [
            (input, StreamDirection::ToGuest),
            (output, StreamDirection::FromGuest),
            (slave.try_clone().unwrap(), StreamDirection::ToGuest),
            (slave, StreamDirection::FromGuest),
            (tempfile().unwrap(), StreamDirection::FromGuest),
        ] {
            let before = flags(&file);
            let stream = Stream::new(file.try_clone().unwrap(), direction).unwrap();
            assert_eq!(flags(&file), before);
            let list = IoList::new();
            if direction == StreamDirection::ToGuest {
                let result = Endpoint::Stream(stream).read(&list);
                assert!(
                    matches!(&result, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
                        || result.is_ok()
                );
            }
            assert_eq!(flags(&file), before);
        }
    }

    #[test]
    fn flags_that_had_to_be_changed_are_restored() {
        let terminal = openpty(None, None).unwrap();
        let slave = File::from(terminal.slave);
        let before = flags(&slave);
        fcntl(&slave, FcntlArg::F_SETFL(before | OFlag::O_NONBLOCK)).unwrap();
        drop(Stream {
            file: slave.try_clone().unwrap(),
            mode: Mode::Borrowed(before),
            direction: StreamDirection::FromGuest,
        });
        assert_eq!(flags(&slave), before);
    }

    #[test]
    fn a_polled_pipe_never_blocks_and_loses_nothing() {
        let (reader, writer) = pipe().unwrap();
        let (mut reader, writer) = (File::from(reader), File::from(writer));
        assert!(!flags(&writer).contains(OFlag::O_NONBLOCK));
        let endpoint = Endpoint::Stream(Stream {
            file: writer,
            mode: Mode::Polled,
            direction: StreamDirection::FromGuest,
        });
        // More than a pipe holds, in pieces that do not divide it.
        let data: Vec<u8> = (0..=250).cycle().take(1_000_000).collect();
        let (mut sent, mut received) = (0, Vec::new());
        while received.len() < data.len() {
            match endpoint.write_bytes(&data[sent..]) {
                Ok(written) => sent += written,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    // What is in the pipe: a read of a pipe that is not empty does not wait.
                    let mut some = [0; 5000];
                    let read = reader.read(&mut some).unwrap();
                    received.extend(&some[..read]);
                }
            }
            if sent == data.len() {
                let mut rest = vec![0; sent - received.len()];
                reader.read_exact(&mut rest).unwrap();
                received.extend(rest);
            }
        }
        assert!(received == data);

        let (reader, writer) = pipe().unwrap();
        let endpoint = Endpoint::Stream(Stream {
            file: File::from(reader),
            mode: Mode::Polled,
            direction: StreamDirection::ToGuest,
        });
        let mut buffer = [0; 16];
        let mut read = || {
            let mut list = IoList::new();
            list.push_buffer(&mut buffer);
            endpoint.read(&list).map_err(|error| error.kind())
        };
        assert_eq!(read(), Err(io::ErrorKind::WouldBlock));
        File::from(writer.try_clone().unwrap())
            .write_all(b"abc")
            .unwrap();
        assert_eq!(read(), Ok(3));
        assert_eq!(read(), Err(io::ErrorKind::WouldBlock));
        drop(writer);
        assert_eq!(read(), Ok(0));
    }
}
