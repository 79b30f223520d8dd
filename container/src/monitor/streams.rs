//! The monitor's ends of the workload's standard streams: pipes, or a terminal.
//!
//! All are non-blocking: the monitor waits in one place only.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    io::{Errno, ioctl_fionbio},
    termios::{Winsize, tcsetwinsize},
};

use super::log::Stream;
use crate::create::Stdio;

/// Input that the workload has not taken yet: from this much on clients are not read.
const INPUT_BYTES_MAX: usize = 64 * 1024;

/// What tells the reader of a terminal that the input has ended.
const END_OF_TRANSMISSION: u8 = 4;

#[derive(Debug, Default)]
pub(super) struct Streams {
    pub(super) input: Option<Input>,
    pub(super) outputs: Vec<Output>,
    terminal: Option<OwnedFd>,
}

#[derive(Debug)]
pub(super) struct Output {
    pub(super) stream: Stream,
    file: File,
}

/// What a look at an output found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Got {
    Bytes(usize),
    /// For now.
    Nothing,
    End,
}

/// The workload's standard input, with what waits to be taken.
#[derive(Debug)]
pub(super) struct Input {
    file: File,
    queue: VecDeque<u8>,
    /// To be closed when the queue is empty.
    ended: bool,
    terminal: bool,
}

impl Streams {
    /// Makes pipes, and returns what the workload gets of them. Without `stdin` it reads end of
    /// file.
    pub(super) fn pipes(stdin: bool) -> io::Result<(Streams, Stdio)> {
        let (input, their_input) = if stdin {
            let (read, write) = io::pipe()?;
            (Some(Input::new(write.into(), false)?), read.into())
        } else {
            (None, File::open("/dev/null")?.into())
        };
        let (stdout, their_stdout) = io::pipe()?;
        let (stderr, their_stderr) = io::pipe()?;
        let streams = Streams {
            input,
            outputs: vec![
                Output::new(Stream::Stdout, stdout.into())?,
                Output::new(Stream::Stderr, stderr.into())?,
            ],
            terminal: None,
        };
        let stdio = Stdio::Fds {
            stdin: their_input,
            stdout: their_stdout.into(),
            stderr: their_stderr.into(),
        };
        Ok((streams, stdio))
    }

    /// Takes the master of the workload's terminal. Without `stdin` nothing is ever typed.
    pub(super) fn terminal(master: OwnedFd, stdin: bool) -> io::Result<Streams> {
        Ok(Streams {
            input: if stdin {
                Some(Input::new(master.try_clone()?, true)?)
            } else {
                None
            },
            outputs: vec![Output::new(Stream::Stdout, master.try_clone()?)?],
            terminal: Some(master),
        })
    }

    /// Sets the size of the terminal; false if there is none.
    pub(super) fn resize(&self, rows: u16, cols: u16) -> io::Result<bool> {
        let Some(terminal) = &self.terminal else {
            return Ok(false);
        };
        let size = Winsize {
            ws_row: rows,
            ws_col: cols,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(terminal, size)?;
        Ok(true)
    }
}

impl Output {
    fn new(stream: Stream, fd: OwnedFd) -> io::Result<Output> {
        ioctl_fionbio(&fd, true)?;
        Ok(Output {
            stream,
            file: fd.into(),
        })
    }

    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Got {
        loop {
            return match self.file.read(buffer) {
                Ok(0) => Got::End,
                Ok(count) => Got::Bytes(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Got::Nothing,
                // A terminal that nobody has open any more says EIO; nothing else can happen.
                Err(_) => Got::End,
            };
        }
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Input {
    fn new(fd: OwnedFd, terminal: bool) -> io::Result<Input> {
        ioctl_fionbio(&fd, true)?;
        Ok(Input {
            file: fd.into(),
            queue: VecDeque::new(),
            ended: false,
            terminal,
        })
    }

    /// Adds what a client sent; nothing means end of file.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        if self.ended {
            return;
        }
        match (bytes.is_empty(), self.terminal) {
            (false, _) => self.queue.extend(bytes),
            (true, true) => self.queue.push_back(END_OF_TRANSMISSION),
            (true, false) => self.ended = true,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.queue.len() >= INPUT_BYTES_MAX
    }

    /// Whether there is something to write.
    pub(super) fn is_pending(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Writes what the workload takes. False if that was the last: it has closed its end, or is to
    /// read end of file now.
    pub(super) fn write(&mut self) -> bool {
        while !self.queue.is_empty() {
            match self.file.write(self.queue.as_slices().0) {
                Ok(count) => drop(self.queue.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(Errno::AGAIN.raw_os_error()) => {
                    return true;
                }
                Err(_) => return false,
            }
        }
        !self.ended
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
