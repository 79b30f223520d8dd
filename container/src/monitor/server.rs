//! The loop that a monitor spends its life in, and its end.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::net::UnixListener},
    path::PathBuf,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    MonitorError,
    client::{Client, Gone, Role},
    log::{Log, Stream},
    protocol::{ExitRecord, Frame, Request, Response},
    record, step,
    streams::Got,
    workload::Workload,
};
use crate::{cgroup::Cgroup, error::chain, verbs::delete::delete};

/// Further connections wait in the socket's queue.
const CLIENTS_MAX: usize = 64;

/// What is read of an output at once.
const OUTPUT_BYTES: usize = 16 * 1024;

/// Output after the end of the workload: a process that outlived it, in a container without a pid
/// namespace, must not hold the end up. A pipe holds at most 1 MiB.
const DRAIN_READS_MAX: usize = 256;

/// How long the output of a terminal may take from the workload to the monitor's end of it.
const TERMINAL_WAIT: Duration = Duration::from_millis(100);

/// How long clients have for the last of the output when everything is over.
const FAREWELL_WAIT: Duration = Duration::from_secs(5);

/// How long a client that was announced may take to attach.
const FIRST_CLIENT_WAIT: Duration = Duration::from_secs(5);

/// A pause before the next connection is accepted where that failed, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Server {
    dir: PathBuf,
    socket: PathBuf,
    /// Says that this monitor lives, for as long as it is open.
    _lock: File,
    listener: UnixListener,
    log: Log,
    /// The log could not be written the last time, which has been reported.
    log_failed: bool,
    workload: Workload,
    clients: Vec<Client>,
    accept_after: Option<Instant>,
    /// Until then the workload is not listened to, unless a client attaches before.
    held_until: Option<Instant>,
}

/// What poll(2) watches.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Source {
    Process,
    Output(usize),
    Input,
    Listener,
    Client(usize),
}

impl Server {
    pub(super) fn new(
        dir: PathBuf,
        socket: PathBuf,
        lock: File,
        listener: UnixListener,
        log: Log,
        workload: Workload,
    ) -> Server {
        Server {
            dir,
            socket,
            _lock: lock,
            listener,
            log,
            log_failed: false,
            workload,
            clients: Vec::new(),
            accept_after: None,
            held_until: None,
        }
    }

    /// Leaves the workload's output and end alone until a client attaches, or it takes too long.
    pub(super) fn await_client(&mut self) {
        self.held_until = Some(Instant::now() + FIRST_CLIENT_WAIT);
    }

    /// Serves until the workload has ended and is removed.
    pub(super) fn serve(mut self) -> Result<(), MonitorError> {
        while !self.turn()? {}
        let exit = step("learn how the process ended", self.workload.process.wait())?;
        self.drain();
        self.log
            .finish()
            .unwrap_or_else(|error| self.report_log(&error));
        let kills = self.workload.cgroup.as_ref().map(Cgroup::oom_kills);
        let kills = kills.transpose().unwrap_or_default().unwrap_or_default();
        let record = record::record(exit, kills);
        let recorded = step(
            "record how the process ended",
            record::write(&self.dir, &record),
        );
        self.announce(&record);
        let deleted = delete(&self.workload.delete);
        self.farewell();
        fs::remove_file(&self.socket).ok();
        recorded?;
        for warning in deleted? {
            report(&warning);
        }
        Ok(())
    }

    /// Waits for something to happen, and deals with all that has. True when the workload ended.
    fn turn(&mut self) -> Result<bool, MonitorError> {
        let now = Instant::now();
        self.held_until = self.held_until.filter(|until| *until > now);
        self.clients
            .retain(|client| client.patience_ends().is_none_or(|end| end > now));
        let mut ended = false;
        let happened = self.wait(now)?;
        // Clients last, and from the last to the first: a client that is gone is taken out, and
        // what comes before keeps its place.
        for (source, events) in happened.into_iter().rev() {
            match source {
                Source::Process => ended = true,
                Source::Output(index) => self.read_output(index),
                Source::Input => self.write_input(),
                Source::Listener => self.accept(),
                Source::Client(index) => {
                    if self.serve_client(index, events).is_err() {
                        self.clients.remove(index);
                    }
                }
            }
        }
        self.clients
            .retain_mut(|client| !client.is_pending() || client.flush().is_ok());
        Ok(ended)
    }

    /// What poll(2) is to watch now.
    fn sources(&self, now: Instant) -> Vec<(Source, PollFd<'_>)> {
        let streams = &self.workload.streams;
        let mut sources = Vec::new();
        let mut watch = |source, fd, events| {
            sources.push((source, PollFd::from_borrowed_fd(fd, events)));
        };
        let held = self.held_until.is_some();
        if !held {
            watch(
                Source::Process,
                self.workload.process.as_fd(),
                PollFlags::IN,
            );
        }
        // A client that is behind holds the output up, until it has caught up or is given up.
        let behind = |client: &Client| client.patience_ends().is_some();
        if !held && !self.clients.iter().any(behind) {
            for (index, output) in streams.outputs.iter().enumerate() {
                watch(Source::Output(index), output.as_fd(), PollFlags::IN);
            }
        }
        let input = streams.input.as_ref();
        if let Some(input) = input.filter(|input| input.is_pending()) {
            watch(Source::Input, input.as_fd(), PollFlags::OUT);
        }
        let paused = self.accept_after.is_some_and(|after| after > now);
        if self.clients.len() < CLIENTS_MAX && !paused {
            watch(Source::Listener, self.listener.as_fd(), PollFlags::IN);
        }
        for (index, client) in self.clients.iter().enumerate() {
            let held = self.is_held(client);
            // One that has hung up would say so again and again; it is heard once there is room.
            if held && !client.is_pending() {
                continue;
            }
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, client.sends && !held);
            events.set(PollFlags::OUT, client.is_pending());
            watch(Source::Client(index), client.as_fd(), events);
        }
        sources
    }

    /// Waits for events, or until a client must be given up or a connection may be accepted again.
    fn wait(&self, now: Instant) -> Result<Vec<(Source, PollFlags)>, MonitorError> {
        let (sources, mut fds): (Vec<Source>, Vec<PollFd<'_>>) =
            self.sources(now).into_iter().unzip();
        let pause = self.accept_after.filter(|after| *after > now);
        let patience = self.clients.iter().filter_map(Client::patience_ends);
        let deadline = patience.chain(pause).chain(self.held_until).min();
        let timeout = deadline.map(|deadline| timespec(deadline.saturating_duration_since(now)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return step("wait for events", Err(error)),
        }
        let events = fds.iter().map(PollFd::revents);
        Ok(sources
            .into_iter()
            .zip(events)
            .filter(|(_, events)| !events.is_empty())
            .collect())
    }

    /// Reads a piece of output, for the log and for who is attached.
    fn read_output(&mut self, index: usize) {
        let Some(output) = self.workload.streams.outputs.get_mut(index) else {
            return;
        };
        let mut buffer = [0; OUTPUT_BYTES];
        let stream = output.stream;
        match output.read(&mut buffer) {
            Got::Nothing => {}
            Got::End => drop(self.workload.streams.outputs.remove(index)),
            Got::Bytes(count) => self.pass_on(stream, &buffer[..count]),
        }
    }

    fn pass_on(&mut self, stream: Stream, bytes: &[u8]) {
        match self.log.append(stream, bytes) {
            Ok(()) => self.log_failed = false,
            Err(error) => self.report_log(&error),
        }
        let attached = |client: &&mut Client| matches!(client.role, Role::Attached { .. });
        let mut clients = self.clients.iter_mut().filter(attached).peekable();
        if clients.peek().is_none() {
            return;
        }
        let data = BASE64_STANDARD.encode(bytes);
        let frame = match stream {
            Stream::Stdout => Frame::Stdout(data),
            Stream::Stderr => Frame::Stderr(data),
        };
        for client in clients {
            client.send(&frame);
        }
    }

    fn write_input(&mut self) {
        let streams = &mut self.workload.streams;
        if streams.input.as_mut().is_some_and(|input| !input.write()) {
            streams.input = None;
        }
        // What had to wait for room.
        for index in (0..self.clients.len()).rev() {
            if self.obey(index).is_err() {
                self.clients.remove(index);
            }
        }
    }

    fn accept(&mut self) {
        self.accept_after = None;
        match self
            .listener
            .accept()
            .and_then(|(stream, _)| Client::new(stream))
        {
            Ok(client) => self.clients.push(client),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => self.accept_after = Some(Instant::now() + ACCEPT_PAUSE),
        }
    }

    fn serve_client(&mut self, index: usize, events: PollFlags) -> Result<(), Gone> {
        let client = &mut self.clients[index];
        if events.intersects(PollFlags::IN) {
            client.receive()?;
        }
        if events.intersects(PollFlags::OUT) {
            client.flush()?;
        }
        self.obey(index)?;
        let client = &self.clients[index];
        // Both directions are closed, and all that was sent is obeyed; one alone may still be of use.
        let closed = events.intersects(PollFlags::HUP | PollFlags::ERR)
            && !client.sends
            && !self.is_held(client);
        let silent = client.role == Role::New && !client.sends;
        if closed || silent { Err(Gone) } else { Ok(()) }
    }

    /// Does what the lines say that have come, as far as there is room.
    fn obey(&mut self, index: usize) -> Result<(), Gone> {
        loop {
            if self.is_held(&self.clients[index]) {
                return Ok(());
            }
            let client = &mut self.clients[index];
            let line = match client.role {
                Role::New | Role::Attached { .. } => client.next_line(),
                Role::Waits | Role::Answered => None,
            };
            let Some(line) = line else {
                return Ok(());
            };
            if client.role == Role::New {
                self.answer(index, &line);
            } else {
                self.obey_frame(index, &line)?;
            }
        }
    }

    /// Whether what the client sends has to wait for room in the workload's input.
    fn is_held(&self, client: &Client) -> bool {
        let input = self.workload.streams.input.as_ref();
        input.is_some_and(|input| input.is_full()) && has_input(client)
    }

    fn answer(&mut self, index: usize, line: &[u8]) {
        let process = &self.workload.process;
        let done = |result: Result<(), String>| match result {
            Ok(()) => Response::Done {},
            Err(message) => Response::Error { message },
        };
        let (response, role) = match serde_json::from_slice(line) {
            Err(error) => {
                let message = format!("this is no request: {error}");
                (Some(Response::Error { message }), Role::Answered)
            }
            Ok(Request::State {}) => {
                let response = Response::Running {
                    pid: process.pid(),
                    start_time: process.start_time(),
                };
                (Some(response), Role::Answered)
            }
            Ok(Request::Wait {}) => (None, Role::Waits),
            Ok(Request::Kill { signal }) => {
                (Some(done(self.workload.kill(signal))), Role::Answered)
            }
            Ok(Request::Resize { rows, cols }) => {
                (Some(done(self.workload.resize(rows, cols))), Role::Answered)
            }
            Ok(Request::Attach { stdin }) => match self.may_attach(stdin) {
                Ok(()) => (Some(Response::Done {}), Role::Attached { input: stdin }),
                Err(message) => (Some(Response::Error { message }), Role::Answered),
            },
        };
        if matches!(role, Role::Attached { .. }) {
            self.held_until = None;
        }
        let client = &mut self.clients[index];
        client.role = role;
        if let Some(response) = response {
            client.send(&response);
        }
    }

    fn may_attach(&self, stdin: bool) -> Result<(), String> {
        if !stdin {
            return Ok(());
        }
        if self.workload.streams.input.is_none() {
            return Err("standard input is not open".to_owned());
        }
        if self.clients.iter().any(has_input) {
            return Err("another client has the standard input".to_owned());
        }
        Ok(())
    }

    fn obey_frame(&mut self, index: usize, line: &[u8]) -> Result<(), Gone> {
        let frame = serde_json::from_slice(line).map_err(|_| Gone)?;
        match frame {
            Frame::Stdin(data) if has_input(&self.clients[index]) => {
                let bytes = BASE64_STANDARD.decode(data).map_err(|_| Gone)?;
                let input = &mut self.workload.streams.input;
                if let Some(open) = input {
                    open.add(&bytes);
                    if !open.write() {
                        *input = None;
                    }
                }
            }
            // A terminal or a process that has gone meanwhile is no fault of the client's.
            Frame::Resize { rows, cols } => drop(self.workload.resize(rows, cols)),
            Frame::Signal(signal) => drop(self.workload.kill(signal)),
            Frame::Stdin(_) | Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit { .. } => {
                return Err(Gone);
            }
        }
        Ok(())
    }

    /// Takes what the workload wrote before it ended.
    fn drain(&mut self) {
        self.workload.streams.input = None;
        for _ in 0..DRAIN_READS_MAX {
            let Some(output) = self.workload.streams.outputs.first_mut() else {
                return;
            };
            let mut buffer = [0; OUTPUT_BYTES];
            let stream = output.stream;
            match output.read(&mut buffer) {
                Got::Bytes(count) => self.pass_on(stream, &buffer[..count]),
                Got::End => drop(self.workload.streams.outputs.remove(0)),
                Got::Nothing => {
                    // Somebody else has it open still, or the terminal has not passed it on yet.
                    let mut fds = [PollFd::new(output, PollFlags::IN)];
                    if poll(&mut fds, Some(&timespec(TERMINAL_WAIT))) == Ok(0) {
                        self.workload.streams.outputs.remove(0);
                    }
                }
            }
        }
    }

    /// Tells who waits or is attached how it ended.
    fn announce(&mut self, record: &ExitRecord) {
        for client in &mut self.clients {
            match client.role {
                Role::Waits => client.send(&Response::Exited(record.clone())),
                Role::Attached { .. } => client.send(&Frame::Exit {
                    code: record.code,
                    signal: record.signal,
                    oom: record.oom,
                }),
                Role::New | Role::Answered => {}
            }
        }
        self.clients.retain_mut(|client| client.flush().is_ok());
    }

    /// Lets clients take what is left for them, and closes the connections.
    fn farewell(&mut self) {
        let deadline = Instant::now() + FAREWELL_WAIT;
        loop {
            self.clients
                .retain_mut(|client| client.is_pending() && client.flush().is_ok());
            self.clients.retain(Client::is_pending);
            let left = deadline.saturating_duration_since(Instant::now());
            if self.clients.is_empty() || left.is_zero() {
                return;
            }
            let mut fds: Vec<PollFd<'_>> = self
                .clients
                .iter()
                .map(|client| PollFd::new(client, PollFlags::OUT))
                .collect();
            match poll(&mut fds, Some(&timespec(left))) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn report_log(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.log_failed, true) {
            report(&chain(&error));
        }
    }
}

fn has_input(client: &Client) -> bool {
    client.role == Role::Attached { input: true }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

/// Standard error is where the starter wants to hear of what goes wrong later.
fn report(message: &str) {
    use io::Write;
    writeln!(io::stderr(), "monitor: {message}").ok();
}
