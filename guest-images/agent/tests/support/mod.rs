//! Runs the agent's serving half in namespaces of its own and plays the host: listens for the
//! workload's streams and sends requests. Needs root.
#![expect(clippy::unwrap_used, reason = "a step that fails fails the test")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::protocol::{
    Config, Frame, Process, Request, Response, STDERR_PORT, STDIN_PORT, STDOUT_PORT,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

/// An answer that takes longer never comes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running agent.
pub(crate) struct Agent {
    process: Child,
    cgroup: PathBuf,
    folder: TempDir,
    pub(crate) stdin: Option<UnixStream>,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

/// What came of a workload.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// One conversation of exec.
pub(crate) struct Exec {
    stream: UnixStream,
    frames: BufReader<UnixStream>,
}

/// What came of an exec.
#[derive(Debug, PartialEq)]
pub(crate) struct ExecOutcome {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) last: Frame,
}

pub(crate) fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        ..Process::default()
    }
}

pub(crate) fn shell(script: &str) -> Process {
    process(&["sh", "-c", script])
}

pub(crate) fn exit(code: i32) -> Frame {
    Frame::Exit {
        code: Some(code),
        signal: None,
        oom: false,
    }
}

pub(crate) fn killed(signal: i32) -> Frame {
    Frame::Exit {
        code: None,
        signal: Some(signal),
        oom: false,
    }
}

impl Agent {
    /// Starts an agent with a workload and waits until it can be reached, or has given up.
    pub(crate) fn start(workload: Process) -> Agent {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let listen = |port: u32| UnixListener::bind(with_port(&socket, port)).unwrap();
        let (stdin, stdout, stderr) =
            (listen(STDIN_PORT), listen(STDOUT_PORT), listen(STDERR_PORT));
        let (has_stdin, has_stderr) = (workload.stdin, !workload.tty);
        let config = Config {
            hostname: "test".into(),
            process: workload,
            ..Config::default()
        };
        let config_path = folder.path().join("config.json");
        fs::write(&config_path, serde_json::to_vec(&config).unwrap()).unwrap();
        let cgroup = make_cgroup();
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            // As a shell starts what runs in the background.
            .args(["env", "--ignore-signal=INT", "--ignore-signal=QUIT"])
            .args(["unshare", "--fork", "--pid", "--mount", "--kill-child"])
            .arg(env!("CARGO_BIN_EXE_hostd-agent"))
            .arg("--serve")
            .args([&socket, &cgroup, &config_path])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let messages = BufReader::new(process.stderr.take().unwrap());
        // The streams are connected before the agent says that it is ready.
        let stdin = has_stdin.then(|| stdin.accept().unwrap().0);
        let stdout = collect(&stdout);
        let stderr = has_stderr.then(|| collect(&stderr));
        let _ready = messages.lines().find(|line| {
            let line = line.as_ref().unwrap();
            line.ends_with("Ready")
        });
        Agent {
            process,
            cgroup,
            folder,
            stdin,
            stdout: Some(stdout),
            stderr,
        }
    }

    /// Waits for the end of the workload and of its output.
    pub(crate) fn finish(mut self) -> Outcome {
        let text = |output: Option<JoinHandle<Vec<u8>>>| {
            let bytes = output.map_or_else(Vec::new, |output| output.join().unwrap());
            String::from_utf8(bytes).unwrap()
        };
        Outcome {
            stdout: text(self.stdout.take()),
            stderr: text(self.stderr.take()),
            code: self.process.wait().unwrap().code(),
        }
    }

    pub(crate) fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("agent.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    pub(crate) fn ask(&self, request: &Request) -> Response {
        let mut stream = self.connect();
        say(&mut stream, request);
        serde_json::from_str(&read_line(&mut BufReader::new(stream))).unwrap()
    }

    /// Sends bytes as they are and reads the answer to its end.
    pub(crate) fn ask_raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The agent may close the connection before it has read all.
        let _ = stream.write_all(bytes);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    pub(crate) fn exec(&self, process: Process) -> Exec {
        let mut stream = self.connect();
        say(&mut stream, &Request::Exec(process));
        let frames = BufReader::new(stream.try_clone().unwrap());
        Exec { stream, frames }
    }

    /// A path that the workload, which shares this machine's files, can be told of.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The control groups of exec'd processes.
    pub(crate) fn exec_groups(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cgroup.join("workload")).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let is_exec = |path: &PathBuf| path.to_string_lossy().contains("/exec-");
        paths.filter(is_exec).collect()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let workload = self.cgroup.join("workload");
        // The agent follows its workload, and all groups are empty then.
        let _ = fs::write(workload.join("cgroup.kill"), "1");
        let _ = self.process.wait();
        for entry in fs::read_dir(&workload).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(entry.path());
        }
        let _ = fs::remove_dir(&workload);
        let _ = fs::remove_dir(&self.cgroup);
    }
}

impl Exec {
    pub(crate) fn send(&mut self, frame: &Frame) {
        say(&mut self.stream, frame);
    }

    pub(crate) fn send_input(&mut self, data: &[u8]) {
        self.send(&Frame::Stdin(STANDARD.encode(data)));
    }

    pub(crate) fn receive(&mut self) -> Frame {
        serde_json::from_str(&read_line(&mut self.frames)).unwrap()
    }

    /// Reads output until it ends in `text`.
    #[track_caller]
    pub(crate) fn expect(&mut self, text: &str) -> String {
        let mut output = String::new();
        while !output.ends_with(text) {
            let mut line = String::new();
            if let Err(error) = self.frames.read_line(&mut line) {
                panic!("{error} after {output:?}");
            }
            let Ok(Frame::Stdout(data)) = serde_json::from_str(&line) else {
                panic!("{line:?} after {output:?}");
            };
            let data = STANDARD.decode(data).unwrap();
            output.push_str(str::from_utf8(&data).unwrap());
        }
        output
    }

    /// Reads to the last frame.
    pub(crate) fn finish(mut self) -> ExecOutcome {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        loop {
            let frame = self.receive();
            if let Frame::Stdout(data) = frame {
                stdout.extend(STANDARD.decode(data).unwrap());
            } else if let Frame::Stderr(data) = frame {
                stderr.extend(STANDARD.decode(data).unwrap());
            } else {
                return ExecOutcome {
                    stdout,
                    stderr,
                    last: frame,
                };
            }
        }
    }

    /// A second handle, for writing from another thread.
    pub(crate) fn writer(&self) -> Exec {
        let stream = self.stream.try_clone().unwrap();
        let frames = BufReader::new(self.stream.try_clone().unwrap());
        Exec { stream, frames }
    }

    pub(crate) fn disconnect(self) {
        self.stream.shutdown(Shutdown::Both).unwrap();
    }
}

impl ExecOutcome {
    pub(crate) fn new(stdout: &str, stderr: &str, last: Frame) -> Self {
        Self {
            stdout: stdout.into(),
            stderr: stderr.into(),
            last,
        }
    }
}

fn say(stream: &mut UnixStream, value: &impl serde::Serialize) {
    let mut line = serde_json::to_vec(value).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
}

fn read_line(stream: &mut impl BufRead) -> String {
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    assert!(
        line.ends_with('\n'),
        "the agent closed the connection: {line:?}"
    );
    line
}

/// Reads one connection to its end, as the VMM does, and only then closes it.
fn collect(listener: &UnixListener) -> JoinHandle<Vec<u8>> {
    let (mut stream, _) = listener.accept().unwrap();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

fn with_port(path: &Path, port: u32) -> PathBuf {
    PathBuf::from(format!("{}_{port}", path.display()))
}

/// A new group of version 2, which on a hybrid host is mounted elsewhere.
fn make_cgroup() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|root| Path::new(root).join("cgroup.controllers").exists())
        .expect("a cgroup2 file system is mounted");
    let path = Path::new(root).join(format!("agent-test-{}-{number}", std::process::id()));
    fs::create_dir(&path).unwrap();
    path
}
