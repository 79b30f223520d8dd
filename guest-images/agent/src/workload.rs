//! The workload: the process that the machine exists for, and its streams to the host.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::cgroup::{Cgroup, Cgroups};
use crate::console::{chain, say};
use crate::launch::LaunchError;
use crate::protocol::{self, STDERR_PORT, STDIN_PORT, STDOUT_PORT};
use crate::reaper::{PidNamespace, Process, Reaper, STACK_BYTES};
use crate::start::{Started, start};
use crate::status::End;
use crate::streams::{END_OF_INPUT, Streams, Terminal, pump, wait};
use crate::transport::Transport;

/// How long the host may take to acknowledge that it has written the last output away. The streams
/// are then given up; what the host does with them cannot keep a machine from ending.
const ACKNOWLEDGE_MAX: Duration = Duration::from_secs(30);

/// How often a stream is connected again: more often than a machine is restored, and not for ever
/// where the host takes each connection away.
const CONNECTIONS_MAX: u32 = 1000;

/// The most input that is taken from the host at once.
const INPUT_BYTES: usize = 64 * 1024;

/// The running workload.
#[derive(Debug)]
pub(crate) struct Workload {
    process: Process,
    terminal: Option<Terminal>,
    cgroup: Cgroup,
}

/// The threads that carry the workload's output to the host.
#[derive(Debug)]
pub(crate) struct Outputs {
    threads: Vec<JoinHandle<()>>,
}

/// Where output goes: to the host, or where the host cannot be reached, to the console.
#[derive(Debug)]
enum Sink {
    Host(HostStream),
    Console,
}

/// A connection to a port of the host, which is made again when the machine goes on from a snapshot:
/// the host of that machine is another, and has no connections of the one before.
#[derive(Debug)]
struct HostStream {
    stream: UnixStream,
    transport: Transport,
    port: u32,
    /// How often it may still be made again.
    again: u32,
}

/// The host's ends of the streams.
#[derive(Debug)]
pub(crate) struct HostStreams {
    stdin: Option<HostStream>,
    stdout: Sink,
    /// Absent with a terminal.
    stderr: Option<Sink>,
}

impl HostStreams {
    /// Connects the streams that `description` has.
    pub(crate) fn connect(description: &protocol::Process, transport: &Transport) -> Self {
        let stdin = description
            .stdin
            .then(|| HostStream::connect(transport, STDIN_PORT));
        Self {
            stdin: stdin.and_then(Result::ok),
            stdout: Sink::connect(transport, STDOUT_PORT),
            stderr: (!description.tty).then(|| Sink::connect(transport, STDERR_PORT)),
        }
    }

    /// Says to the workload's reader why there is no workload.
    pub(crate) fn explain(self, message: &str) {
        let mut sink = self.stderr.unwrap_or(self.stdout);
        // The console has it as well.
        let _ = sink.write(format!("{message}\n").as_bytes());
        sink.finish();
    }
}

impl Workload {
    /// Starts the workload in the group `main`, as the first process of a pid namespace, as it would
    /// be in a container.
    pub(crate) fn start(
        description: &protocol::Process,
        cgroups: &Cgroups,
        reaper: &Reaper,
    ) -> Result<(Workload, Streams), LaunchError> {
        let cgroup = cgroups.main()?;
        let Started { process, streams } = start(description, &cgroup, PidNamespace::New, reaper)?;
        let workload = Workload {
            process,
            terminal: None,
            cgroup,
        };
        Ok((workload, streams))
    }

    /// Joins the streams of the workload to the host's.
    pub(crate) fn join(&mut self, streams: Streams, host: HostStreams) -> io::Result<Outputs> {
        self.terminal = streams.terminal;
        if let (Some(source), Some(stdin)) = (host.stdin, streams.stdin) {
            let is_terminal = self.terminal.is_some();
            // Ends with the machine if not before.
            spawn("stdin", move || feed(source, stdin, is_terminal))?;
        }
        let mut threads = Vec::new();
        let outputs = [
            ("stdout", Some(streams.stdout), Some(host.stdout)),
            ("stderr", streams.stderr, host.stderr),
        ];
        for (name, source, sink) in outputs {
            if let (Some(source), Some(sink)) = (source, sink) {
                let ended = self.process.ended().try_clone_to_owned()?;
                threads.push(spawn(name, move || carry(&source, &ended, sink))?);
            }
        }
        Ok(Outputs { threads })
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    /// Sets the size of the terminal, if there is one.
    pub(crate) fn resize(&self, rows: u16, cols: u16) -> io::Result<()> {
        match &self.terminal {
            Some(terminal) => terminal.resize(rows, cols),
            None => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "The workload has no terminal",
            )),
        }
    }

    /// Waits for the end of the workload. Its children have ended then too: the kernel ends a pid
    /// namespace with its first process.
    pub(crate) fn wait(&self) -> io::Result<End> {
        let end = self.process.wait()?;
        Ok(End {
            code: end.shell_code(),
            oom: end.is_kill() && self.cgroup.oom_killed(),
        })
    }
}

impl Outputs {
    /// Waits until the host has written all output away.
    pub(crate) fn finish(self) {
        for thread in self.threads {
            if thread.join().is_err() {
                say("A thread that carried output has failed");
            }
        }
    }
}

impl Sink {
    fn connect(transport: &Transport, port: u32) -> Sink {
        match HostStream::connect(transport, port) {
            Ok(stream) => Sink::Host(stream),
            Err(error) => {
                say(&format!(
                    "Output goes to the console; the host's port {port} cannot be reached: {error}"
                ));
                Sink::Console
            }
        }
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Sink::Host(stream) => stream.write_all(data),
            Sink::Console => io::stderr().write_all(data),
        }
    }

    /// Says that there is no more, and waits until the host has answered by ending the connection.
    fn finish(self) {
        let Sink::Host(HostStream { mut stream, .. }) = self else {
            return;
        };
        let told = stream
            .set_read_timeout(Some(ACKNOWLEDGE_MAX))
            .and_then(|()| stream.shutdown(Shutdown::Write));
        // A connection that fails has ended as well.
        if told.is_ok() {
            let _ = io::copy(&mut stream, &mut io::sink());
        }
    }
}

impl HostStream {
    fn connect(transport: &Transport, port: u32) -> io::Result<Self> {
        Ok(Self {
            stream: transport.connect(port)?,
            transport: transport.clone(),
            port,
            again: CONNECTIONS_MAX,
        })
    }

    fn read(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(chunk) {
                Err(error) if is_reset(&error) => self.connect_again()?,
                result => return result,
            }
        }
    }

    fn write_all(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            match self.stream.write(data) {
                Ok(count) => data = &data[count..],
                Err(error) if is_reset(&error) => self.connect_again()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn connect_again(&mut self) -> io::Result<()> {
        let left = self.again.checked_sub(1);
        self.again = left.ok_or(io::ErrorKind::ConnectionReset)?;
        self.stream = self.transport.connect(self.port)?;
        Ok(())
    }
}

/// Whether a connection was taken away, and not ended: what vsock says after
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.
fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.into());
    thread.stack_size(STACK_BYTES).spawn(work)
}

/// Carries output to its end. A host that stops listening does not stop the workload: the rest is
/// dropped.
fn carry(source: &File, ended: &OwnedFd, mut sink: Sink) {
    let mut broken = false;
    let result = pump(source, ended.as_fd(), |data| {
        broken = broken || sink.write(data).is_err();
        Ok(())
    });
    if let Err(error) = result {
        say(&format!("Output cannot be read: {}", chain(&error)));
    }
    sink.finish();
}

/// Carries input until the host's end, or until the workload does not read any more.
fn feed(mut source: HostStream, mut stdin: File, is_terminal: bool) {
    let mut chunk = vec![0; INPUT_BYTES];
    while let Ok(count @ 1..) = source.read(&mut chunk) {
        if write_all(&mut stdin, &chunk[..count]).is_err() {
            return;
        }
    }
    if is_terminal {
        let _ = write_all(&mut stdin, &[END_OF_INPUT]);
    }
}

/// Writes all to a file that does not block.
fn write_all(file: &mut File, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match file.write(data) {
            Ok(count) => data = &data[count..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait([(file.as_fd(), libc::POLLOUT)], None)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
