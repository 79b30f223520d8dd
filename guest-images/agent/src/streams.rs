//! The standard streams of a process: pipes, or a terminal, and the agent's ends of them.
//!
//! The agent's ends do not block, so that whoever serves one can look at other things too.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{OpenptyResult, openpty};
use nix::unistd::{Gid, Uid, fchown};

use crate::account::Account;
use crate::protocol::Process;
use crate::sys;

/// The most that one read takes from a process: what a pipe holds.
const CHUNK_BYTES: usize = 64 * 1024;

/// What is still read once the process has ended: as much as a pipe can hold, so that all it wrote
/// arrives, and a child that it left behind and that writes without end changes nothing.
const DRAIN_BYTES_MAX: usize = 1 << 20;

/// The character that a terminal in its usual mode takes for the end of the input.
pub(crate) const END_OF_INPUT: u8 = 4;

/// The agent's ends.
#[derive(Debug)]
pub(crate) struct Streams {
    /// Absent if the process has no input, or reads end of file.
    pub(crate) stdin: Option<File>,
    pub(crate) stdout: File,
    /// Absent with a terminal.
    pub(crate) stderr: Option<File>,
    pub(crate) terminal: Option<Terminal>,
}

/// Both sides of a terminal. The agent keeps the process's side open so that its own never reads as
/// ended while the process closes and opens the terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    own: File,
    _process: OwnedFd,
}

impl Streams {
    /// Gives `command` the streams that `process` asks for, owned by `account`, so that it may open
    /// them by name (/dev/stdout).
    pub(crate) fn connect(
        command: &mut Command,
        process: &Process,
        account: &Account,
    ) -> io::Result<Streams> {
        if process.tty {
            return Self::terminal(command, account);
        }
        let stdin = if process.stdin {
            let (theirs, ours) = io::pipe()?;
            own(theirs.as_fd(), account)?;
            command.stdin(theirs);
            Some(non_blocking(ours.into())?)
        } else {
            command.stdin(Stdio::null());
            None
        };
        let (stdout, theirs) = output(account)?;
        command.stdout(theirs);
        let (stderr, theirs) = output(account)?;
        command.stderr(theirs);
        Ok(Streams {
            stdin,
            stdout,
            stderr: Some(stderr),
            terminal: None,
        })
    }

    fn terminal(command: &mut Command, account: &Account) -> io::Result<Streams> {
        let OpenptyResult { master, slave } = openpty(None, None)?;
        for descriptor in [&master, &slave] {
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        own(slave.as_fd(), account)?;
        command
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave.try_clone()?);
        let master = non_blocking(master)?;
        Ok(Streams {
            stdin: Some(master.try_clone()?),
            stdout: master.try_clone()?,
            stderr: None,
            terminal: Some(Terminal {
                own: master,
                _process: slave,
            }),
        })
    }
}

impl Terminal {
    pub(crate) fn resize(&self, rows: u16, cols: u16) -> io::Result<()> {
        sys::set_terminal_size(self.own.as_fd(), rows, cols)
    }
}

/// A pipe for output: the agent's end and the process's.
fn output(account: &Account) -> io::Result<(File, OwnedFd)> {
    let (ours, theirs) = io::pipe()?;
    own(theirs.as_fd(), account)?;
    Ok((non_blocking(ours.into())?, theirs.into()))
}

fn own(descriptor: BorrowedFd<'_>, account: &Account) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    Ok(fchown(descriptor, Some(user), Some(group))?)
}

fn non_blocking(descriptor: OwnedFd) -> io::Result<File> {
    let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
    fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(descriptor.into())
}

/// Waits until one of `descriptors` is in a state asked for (of poll(2)), has failed or was hung up,
/// or for the whole of `timeout`, and says for each which states it is in.
pub(crate) fn wait<const N: usize>(
    descriptors: [(BorrowedFd<'_>, i16); N],
    timeout: Option<Duration>,
) -> io::Result<[i16; N]> {
    let mut polled = descriptors.map(|(descriptor, events)| libc::pollfd {
        fd: descriptor.as_raw_fd(),
        events,
        revents: 0,
    });
    let timeout_ms = match timeout {
        Some(timeout) => i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX),
        None => -1,
    };
    loop {
        match sys::poll(&mut polled, timeout_ms) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(()) => return Ok(polled.map(|polled| polled.revents)),
        }
    }
}

/// Hands everything that a process writes to `sink`, until the stream ends, or until the process has
/// ended and all that it had written was handed over, or until `sink` fails.
pub(crate) fn pump(
    mut source: &File,
    ended: BorrowedFd<'_>,
    mut sink: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut drained = 0;
    loop {
        let wanted = [(source.as_fd(), libc::POLLIN), (ended, libc::POLLIN)];
        let [_, state] = wait(wanted, None)?;
        let has_ended = state != 0;
        match source.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                sink(&chunk[..count])?;
                drained += if has_ended { count } else { 0 };
                if drained > DRAIN_BYTES_MAX {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if has_ended {
                    return Ok(());
                }
            }
            Err(error) => return Err(error),
        }
    }
}
