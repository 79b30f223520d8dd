//! Joins this program's terminal to a container's.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read, write};
use rustix::termios::{
    OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
};

/// What is read at once, and at most waits to be written in each direction.
const BUFFER_BYTES: usize = 16 * 1024;

/// Copies bytes both ways until the container's side closes. This program's terminal is raw
/// meanwhile, so that keys like ^C reach the container.
#[derive(Debug)]
pub(crate) struct Relay {
    master: OwnedFd,
    /// Towards the container, and what was read for it.
    input: Vec<u8>,
    input_ended: bool,
    /// From the container.
    output: Vec<u8>,
    output_ended: bool,
    saved: Option<Termios>,
}

impl Relay {
    pub(crate) fn new(master: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
        let shown = isatty(rustix::stdio::stdout());
        let stdin = rustix::stdio::stdin();
        let saved = if isatty(stdin) {
            let saved = tcgetattr(stdin)?;
            let mut raw = saved.clone();
            raw.make_raw();
            if !shown {
                // What is written there is no terminal's output, but what somebody has to say.
                raw.output_modes = saved.output_modes;
            }
            tcsetattr(stdin, OptionalActions::Now, &raw)?;
            Some(saved)
        } else {
            None
        };
        let relay = Self {
            master,
            input: Vec::new(),
            input_ended: false,
            output: Vec::new(),
            output_ended: false,
            saved,
        };
        relay.resize()?;
        Ok(relay)
    }

    /// Gives the container's terminal the size of this program's.
    pub(crate) fn resize(&self) -> io::Result<()> {
        match tcgetwinsize(rustix::stdio::stdin()) {
            Ok(size) => Ok(tcsetwinsize(&self.master, size)?),
            // Not a terminal: then there is no size to follow.
            Err(_) => Ok(()),
        }
    }

    /// What to wait for now.
    pub(crate) fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let mut fds = Vec::new();
        let mut master = PollFlags::empty();
        if self.input.is_empty() && !self.input_ended {
            fds.push(PollFd::from_borrowed_fd(
                rustix::stdio::stdin(),
                PollFlags::IN,
            ));
        } else if !self.input.is_empty() {
            master |= PollFlags::OUT;
        }
        if self.output.is_empty() {
            master |= PollFlags::IN;
        } else {
            fds.push(PollFd::from_borrowed_fd(
                rustix::stdio::stdout(),
                PollFlags::OUT,
            ));
        }
        // Without flags a terminal that was closed would be reported again and again.
        if !self.output_ended && !master.is_empty() {
            fds.push(PollFd::from_borrowed_fd(self.master.as_fd(), master));
        }
        fds
    }

    /// Copies what can be copied without waiting.
    pub(crate) fn turn(&mut self) -> io::Result<()> {
        self.read_input()?;
        match write_some(&self.master, &mut self.input) {
            // The container has closed its side.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => self.input.clear(),
            result => result?,
        }
        self.read_output();
        if !self.output.is_empty() && is_ready(rustix::stdio::stdout(), PollFlags::OUT)? {
            write_some(rustix::stdio::stdout(), &mut self.output)?;
        }
        Ok(())
    }

    /// Writes what the container's terminal still holds, now that the process has ended.
    pub(crate) fn drain(&mut self) {
        loop {
            self.read_output();
            // Whoever read the output may be gone: then there is nothing more to do for it.
            if self.output.is_empty()
                || write_some(rustix::stdio::stdout(), &mut self.output).is_err()
            {
                return;
            }
        }
    }

    fn read_input(&mut self) -> io::Result<()> {
        let stdin = rustix::stdio::stdin();
        if !self.input.is_empty() || self.input_ended || !is_ready(stdin, PollFlags::IN)? {
            return Ok(());
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        match read(stdin, &mut buffer) {
            Ok(0) => {
                self.input_ended = true;
                // What a terminal's user types to end the input.
                self.input = vec![0x04];
            }
            Ok(length) => self.input = buffer[..length].to_vec(),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.input_ended = true,
        }
        Ok(())
    }

    fn read_output(&mut self) {
        if !self.output.is_empty() || self.output_ended {
            return;
        }
        let mut buffer = vec![0; BUFFER_BYTES];
        match read(&self.master, &mut buffer) {
            Ok(0) => self.output_ended = true,
            Ok(length) => self.output = buffer[..length].to_vec(),
            Err(Errno::INTR | Errno::AGAIN) => {}
            // EIO: every process of the container has closed its side.
            Err(_) => self.output_ended = true,
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            // The terminal may be gone.
            let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, saved);
        }
    }
}

fn is_ready(fd: impl AsFd, flags: PollFlags) -> io::Result<bool> {
    let mut fds = [PollFd::new(&fd, flags)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    match rustix::event::poll(&mut fds, Some(&now)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn write_some(fd: impl AsFd, bytes: &mut Vec<u8>) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    match write(fd, bytes) {
        Ok(length) => {
            bytes.drain(..length);
            Ok(())
        }
        Err(Errno::INTR | Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
