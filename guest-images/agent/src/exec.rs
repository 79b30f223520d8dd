//! One exec: a process beside the workload, and the conversation about it on a connection.
//!
//! One thread for each of the process's outputs turns what it writes into frames; the connection's
//! own thread looks after everything that comes from the client, and notices that the process has
//! ended or that the client has gone. A process does not outlive its client's interest: if the
//! connection breaks it is hung up, and killed with its children a moment later.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use crate::cgroup::Cgroup;
use crate::console::{chain, say};
use crate::launch::{self, LaunchError};
use crate::lines::{LineError, LineWriter, Lines, decode, encode};
use crate::protocol::{self, Frame};
use crate::reaper::{PidNamespace, Process, Reaper, STACK_BYTES};
use crate::server::Agent;
use crate::start::{Started, start};
use crate::streams::{END_OF_INPUT, Streams, Terminal, pump, wait};

/// Input that the process has not read yet. The client's frames are not read beyond this, except for
/// what one read holds.
const INPUT_BYTES_MAX: usize = 1 << 20;

/// Between the hang-up and the kill of a process whose client has gone.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);

type ToFrame = fn(String) -> Frame;

/// Why a conversation is over.
enum Outcome {
    /// The process has ended.
    Ended,
    /// The client has gone, or makes no sense.
    Gone(LineError),
}

/// Runs the process and converses until it has ended, or the client has gone.
pub(crate) fn converse(
    agent: &Agent,
    description: &protocol::Process,
    stream: &UnixStream,
    lines: Lines,
) {
    let client = LineWriter::new(stream);
    let result = begin(agent, description).and_then(|(started, cgroup)| {
        let program = description.args.first().map_or("", String::as_str);
        let exec = Exec {
            process: started.process,
            cgroup,
            reaper: &agent.reaper,
        };
        exec.serve(started.streams, &client, stream, lines)
            .map_err(|source| LaunchError::start(program, source))
    });
    let last = match result {
        Ok(last) => last,
        Err(error) => Some(Frame::Error {
            code: error.code().into(),
            message: chain(&error),
        }),
    };
    if let Some(last) = last {
        // A client that has gone meanwhile does not hear it.
        let _ = client.send(&last);
    }
    let _ = stream.shutdown(Shutdown::Both);
}

fn begin(agent: &Agent, description: &protocol::Process) -> Result<(Started, Cgroup), LaunchError> {
    let cgroup = agent.cgroups.exec()?;
    let namespace = PidNamespace::Of(agent.workload.process().descriptor());
    let description = beside(description, &agent.description);
    let started = start(&description, &cgroup, namespace, &agent.reaper)?;
    Ok((started, cgroup))
}

/// What is asked for, completed by what the workload has, as `docker exec` does it.
fn beside(asked: &protocol::Process, workload: &protocol::Process) -> protocol::Process {
    let either = |asked: &Option<String>, workload: &Option<String>| {
        asked.as_ref().or(workload.as_ref()).cloned()
    };
    protocol::Process {
        env: [workload.env.as_slice(), asked.env.as_slice()].concat(),
        user: either(&asked.user, &workload.user),
        working_dir: either(&asked.working_dir, &workload.working_dir),
        ..asked.clone()
    }
}

struct Exec<'a> {
    process: Process,
    cgroup: Cgroup,
    reaper: &'a Reaper,
}

impl Exec<'_> {
    /// Returns the last frame, if there is somebody to send it to.
    fn serve(
        self,
        streams: Streams,
        client: &LineWriter<&UnixStream>,
        stream: &UnixStream,
        lines: Lines,
    ) -> io::Result<Option<Frame>> {
        let Streams {
            stdin,
            stdout,
            stderr,
            terminal,
        } = streams;
        let input = Input {
            lines,
            stdin,
            pending: VecDeque::new(),
            ended: false,
            terminal,
        };
        let outcome = thread::scope(|scope| {
            let stdout = Some((&stdout, Frame::Stdout as ToFrame));
            let stderr = stderr.as_ref().map(|file| (file, Frame::Stderr as ToFrame));
            for (source, frame) in [stdout, stderr].into_iter().flatten() {
                let ended = self.process.ended();
                let send = move |data: &[u8]| client.send(&frame(encode(data)));
                let thread = thread::Builder::new().stack_size(STACK_BYTES);
                thread
                    // The client hears no more if this fails, and its thread finds out by itself.
                    .spawn_scoped(scope, move || drop(pump(source, ended, send)))
                    .inspect_err(|_| self.kill())?;
            }
            let outcome = input.serve(&self.process, self.reaper, stream);
            if let Outcome::Gone(error) = &outcome {
                self.hang_up();
                if error.is_disconnect() {
                    // Releases a thread that still waits for the client to read.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            }
            io::Result::Ok(outcome)
        })?;
        match outcome {
            Outcome::Ended => self.last_frame().map(Some),
            Outcome::Gone(error) if error.is_disconnect() => Ok(None),
            Outcome::Gone(error) => Ok(Some(Frame::Error {
                code: launch::FAILED.into(),
                message: chain(&error),
            })),
        }
    }

    fn last_frame(&self) -> io::Result<Frame> {
        let end = self.process.wait()?;
        Ok(Frame::Exit {
            code: end.code,
            signal: end.signal,
            oom: end.is_kill() && self.cgroup.oom_killed(),
        })
    }

    /// Ends the process and its children, the polite way first.
    fn hang_up(&self) {
        let _ = self.reaper.signal(&self.process, libc::SIGHUP, true);
        let ended = (self.process.ended(), libc::POLLIN);
        let _ = wait([ended], Some(HANG_UP_GRACE));
        self.kill();
    }

    fn kill(&self) {
        if let Err(error) = self.cgroup.kill() {
            say(&chain(&error));
            let _ = self.reaper.signal(&self.process, libc::SIGKILL, true);
        }
    }
}

/// What comes from the client, on its way to the process.
struct Input {
    lines: Lines,
    /// Absent if the process has no input or has closed it, or once all of it was written.
    stdin: Option<File>,
    pending: VecDeque<u8>,
    /// The client has said that there is no more.
    ended: bool,
    terminal: Option<Terminal>,
}

impl Input {
    fn serve(mut self, process: &Process, reaper: &Reaper, stream: &UnixStream) -> Outcome {
        loop {
            match self.step(process, reaper, stream) {
                Ok(true) => {}
                Ok(false) => return Outcome::Ended,
                Err(error) => return Outcome::Gone(error),
            }
        }
    }

    /// Waits for one thing to happen and deals with it. False once the process has ended.
    fn step(
        &mut self,
        process: &Process,
        reaper: &Reaper,
        stream: &UnixStream,
    ) -> Result<bool, LineError> {
        while let Some(frame) = self.lines.next()? {
            self.take(frame, process, reaper)?;
        }
        let [ended, client, stdin] = self
            .wait(process.ended(), stream.as_fd())
            .map_err(LineError::Stream)?;
        if ended != 0 {
            return Ok(false);
        }
        if stdin != 0 {
            self.write();
        }
        if client & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0 {
            return Err(LineError::Ended);
        }
        if client != 0 && !self.lines.fill(stream).map_err(LineError::Stream)? {
            return Err(LineError::Ended);
        }
        Ok(true)
    }

    /// The states of the process's end, the client and the process's input.
    fn wait(&self, ended: BorrowedFd<'_>, stream: BorrowedFd<'_>) -> io::Result<[i16; 3]> {
        let mut wanted = libc::POLLRDHUP;
        if self.pending.len() < INPUT_BYTES_MAX {
            wanted |= libc::POLLIN;
        }
        let ended = (ended, libc::POLLIN);
        let stream = (stream, wanted);
        match &self.stdin {
            Some(stdin) if !self.pending.is_empty() => {
                wait([ended, stream, (stdin.as_fd(), libc::POLLOUT)], None)
            }
            _ => wait([ended, stream], None).map(|[ended, stream]| [ended, stream, 0]),
        }
    }

    fn take(&mut self, frame: Frame, process: &Process, reaper: &Reaper) -> Result<(), LineError> {
        match frame {
            Frame::Stdin(text) => {
                let data = decode(&text)?;
                self.ended |= data.is_empty();
                if self.stdin.is_some() {
                    self.pending.extend(data);
                }
                self.finish();
            }
            Frame::Resize { rows, cols } => {
                if let Some(terminal) = &self.terminal {
                    terminal.resize(rows, cols).map_err(LineError::Stream)?;
                }
            }
            Frame::Signal(signal) => {
                let sent = reaper.signal(process, signal, false);
                sent.map_err(|error| LineError::Malformed {
                    reason: error.to_string(),
                })?;
            }
            Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit { .. } | Frame::Error { .. } => {
                return Err(LineError::Malformed {
                    reason: "this frame is the agent's to send".into(),
                });
            }
        }
        Ok(())
    }

    /// Writes what the process's end takes now.
    fn write(&mut self) {
        let Some(stdin) = &mut self.stdin else { return };
        match stdin.write(self.pending.as_slices().0) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => {
                // The process does not read any more, which is its right.
                self.stdin = None;
                self.pending.clear();
            }
        }
        self.finish();
    }

    /// Once the client's last byte is written: ends the process's input.
    fn finish(&mut self) {
        if !self.ended || !self.pending.is_empty() {
            return;
        }
        if self.terminal.is_some() && self.stdin.is_some() {
            self.pending.push_back(END_OF_INPUT);
            self.ended = false;
        } else {
            self.stdin = None;
        }
    }
}
