//! Runs `hostd-vmm` in a folder of its own, and ends it whatever becomes of the test.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use vmm::control::{ExitStatus, Request, Response, SnapshotReport};
use vmm::snapshot::client::{self, ClientError};
use vmm::snapshot::file::Kind;
use vmm::snapshot::restore::SnapshotFiles;

use crate::guest::Guest;

/// The longest that a machine of a few instructions may take on a busy computer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long a machine that does not take a request is waited for before it counts as full.
const DEAF: Duration = Duration::from_millis(500);

/// A machine to be.
pub(crate) struct Machine {
    folder: TempDir,
    pub(crate) spec: Value,
    pub(crate) arguments: Vec<String>,
    /// Redirections of a shell in the machine's folder.
    pub(crate) shell: String,
    /// Standard input and output, if not nothing.
    pub(crate) terminal: Option<OwnedFd>,
    /// As nobody, and with the machine's folder as root, in which is nothing but the program.
    pub(crate) jail: bool,
}

/// What a machine left behind.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stderr: String,
    /// What the guest wrote to the serial port.
    pub(crate) console: Vec<u8>,
    pub(crate) status: Option<ExitStatus>,
}

impl Machine {
    /// A small machine with `guest` as its kernel.
    pub(crate) fn new(guest: Guest) -> Self {
        Self::with_kernel(&guest.elf())
    }

    /// A small machine with this kernel file.
    pub(crate) fn with_kernel(kernel: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("kernel"), kernel).unwrap();
        let spec = json!({
            "boot": {"kernel": path("kernel")},
            "memory": {"size_mib": 16},
            "console": {"path": path("console")},
            "control": path("control"),
            "exit_status": path("status"),
        });
        Self {
            folder,
            spec,
            arguments: Vec::new(),
            shell: String::new(),
            terminal: None,
            jail: false,
        }
    }

    /// The guest's console becomes a terminal, of which this is the other end.
    pub(crate) fn put_at_a_terminal(&mut self) -> File {
        let pty = openpty(None, None).unwrap();
        self.spec["console"] = json!("stdio");
        self.terminal = Some(pty.slave);
        File::from(pty.master)
    }

    /// What becomes of snapshots, the oldest first.
    pub(crate) fn restored(snapshots: &[&Path]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let files = |folder: &&Path| SnapshotFiles::of_folder(folder);
        let spec = json!({
            "snapshots": snapshots.iter().map(files).collect::<Vec<_>>(),
            "console": {"path": path("console")},
            "control": path("control"),
            "exit_status": path("status"),
        });
        Self {
            folder,
            spec,
            arguments: vec!["--restore".to_owned()],
            shell: String::new(),
            terminal: None,
            jail: false,
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn start(self) -> Running {
        let config = self.path("config");
        fs::write(&config, self.spec.to_string()).unwrap();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("exec \"$0\" \"$@\" {}", self.shell))
            .current_dir(self.folder.path());
        let program = env!("CARGO_BIN_EXE_hostd-vmm");
        if self.jail {
            fs::create_dir(self.path("root")).unwrap();
            fs::copy(program, self.path("root/hostd-vmm")).unwrap();
            let jail = ["chroot", "--userspec=65534:65534", "root", "/hostd-vmm"];
            command.args(jail).arg("--config=fd:8");
        } else {
            command.arg(program).arg("--config").arg(config);
        }
        let child = command
            .args(&self.arguments)
            .stdin(self.stdio())
            .stdout(self.stdio())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running {
            machine: self,
            child,
        }
    }

    fn stdio(&self) -> Stdio {
        match &self.terminal {
            Some(terminal) => terminal.try_clone().unwrap().into(),
            None => Stdio::null(),
        }
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> Ended {
        self.start().wait()
    }
}

/// A machine that runs.
pub(crate) struct Running {
    machine: Machine,
    child: Child,
}

impl Running {
    pub(crate) fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    /// A client of the control socket.
    pub(crate) fn control(&self) -> Client {
        Client::new(self.connect())
    }

    /// Takes a snapshot into a new folder beside the machine's files.
    pub(crate) fn snapshot(&self, name: &str, kind: Kind) -> Result<Snapshot, ClientError> {
        let folder = self.machine.path(name);
        let report = client::snapshot(&self.connect(), &folder, kind)?;
        Ok(Snapshot { folder, report })
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let path = self.machine.path("control");
        let start = Instant::now();
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return stream,
                Err(error) if self.has_ended() => panic!("{error}: {}", self.last_words()),
                Err(error) if start.elapsed() > PATIENCE => panic!("no control socket: {error}"),
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    /// Whether it has, for whoever waits for it later.
    fn has_ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        let status = waitid(Id::Pid(Pid::from_raw(self.pid())), flags);
        status.unwrap() != WaitStatus::StillAlive
    }

    /// What it has said to standard error, once it has ended.
    fn last_words(&self) -> String {
        let stderr = self.child.stderr.as_ref().unwrap().as_fd();
        let mut stderr = File::from(stderr.try_clone_to_owned().unwrap());
        let mut words = String::new();
        stderr.read_to_string(&mut words).unwrap();
        words
    }

    /// Ends it. What it left in its folder stays.
    pub(crate) fn end(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(mut self) -> Ended {
        let mut stderr = self.child.stderr.take().unwrap();
        let start = Instant::now();
        let mut text = Vec::new();
        let mut bytes = [0; 4096];
        // The end of the stream is the end of the process.
        loop {
            let left = PATIENCE.saturating_sub(start.elapsed());
            let timeout = PollTimeout::try_from(left).unwrap();
            let mut waiting = [PollFd::new(stderr.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut waiting, timeout).unwrap();
            assert!(ready > 0, "still running; stderr so far: {text:?}");
            match stderr.read(&mut bytes).unwrap() {
                0 => break,
                count => text.extend(&bytes[..count]),
            }
        }
        let read = |name| fs::read(self.machine.path(name)).unwrap_or_default();
        Ended {
            code: self.child.wait().unwrap().code(),
            stderr: String::from_utf8(text).unwrap(),
            console: read("console"),
            status: serde_json::from_slice(&read("status")).ok(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A snapshot that was taken. Its files go with the machine's.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) folder: PathBuf,
    pub(crate) report: SnapshotReport,
}

impl Snapshot {
    /// What memory was there.
    pub(crate) fn memory<const N: usize>(&self, address: u64) -> [u8; N] {
        let file = File::open(self.folder.join("memory")).unwrap();
        let mut bytes = [0; N];
        file.read_exact_at(&mut bytes, address).unwrap();
        bytes
    }

    /// A number in memory.
    pub(crate) fn long(&self, address: u32) -> u32 {
        u32::from_le_bytes(self.memory(address.into()))
    }
}

/// A connection to the control socket.
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream: BufReader::new(stream),
        }
    }

    pub(crate) fn ask(&mut self, request: &Request) -> Response {
        self.send(&serde_json::to_string(request).unwrap());
        self.answer().unwrap()
    }

    pub(crate) fn send(&mut self, line: &str) {
        // A machine that has closed the connection in between does not answer: that is the test's.
        let _ = writeln!(self.stream.get_mut(), "{line}");
    }

    /// Sends a request and what belongs to it.
    pub(crate) fn send_with(&mut self, request: &Request, files: &[File]) {
        let line = format!("{}\n", serde_json::to_string(request).unwrap());
        let descriptors: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let (socket, text) = (self.stream.get_ref().as_raw_fd(), line.as_bytes());
        let flags = MsgFlags::empty();
        sendmsg::<()>(socket, &[IoSlice::new(text)], &rights, flags, None).unwrap();
    }

    /// Sends `line` as often as the machine takes it, and returns how often that was.
    pub(crate) fn send_until_full(&mut self, line: &str) -> usize {
        let line = format!("{line}\n");
        let stream = self.stream.get_mut();
        stream.set_write_timeout(Some(DEAF)).unwrap();
        let mut sent = 0;
        while stream.write_all(line.as_bytes()).is_ok() {
            sent += 1;
            assert!(sent < 1_000_000, "the machine takes everything");
        }
        // The line that was cut is finished when there is room again; nobody can tell how much of
        // it was sent, so it is left to be no request at all.
        sent
    }

    /// It will send no more.
    pub(crate) fn finish_sending(&self) {
        self.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    }

    /// What comes on a connection that has become something else, as long as this text is.
    pub(crate) fn expect(&mut self, text: &str) {
        let mut bytes = vec![0; text.len()];
        self.stream.read_exact(&mut bytes).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), text);
    }

    /// Sends bytes that are no line.
    pub(crate) fn type_in(&mut self, keys: &[u8]) {
        self.stream.get_mut().write_all(keys).unwrap();
    }

    /// The next answer, or nothing if the machine has closed the connection.
    pub(crate) fn answer(&mut self) -> Option<Response> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    }
}
