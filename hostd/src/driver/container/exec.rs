//! A process beside a container's workload: `hostd-oci exec` with its streams in hostd's hands.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use agent::protocol::{FRAME_DATA_BYTES_MAX, Frame};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures::future::join_all;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::termios::{OptionalActions, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time;

use super::{user, users};
use crate::api::types::ExecRequest;
use crate::driver::stdin::Stdin;
use crate::driver::{DriverError, SESSION_FRAMES_MAX, Session};
use crate::paths::Paths;

/// After the end of the process, how long its output is read on: something that it left running
/// may hold the streams open for ever.
const DRAIN_DEADLINE: Duration = Duration::from_secs(2);

type Output = Box<dyn AsyncRead + Send + Unpin>;
/// How the runtime's own complaints begin.
const RUNTIME_PREFIX: &[u8] = b"hostd-oci: ";
/// Of the runtime's complaints, what is held back until it is known whether the process runs.
const RUNTIME_WORDS_BYTES_MAX: usize = 16 * 1024;

type ToFrame = fn(String) -> Frame;

/// The files of one exec; they go with it.
struct Files {
    process: PathBuf,
    pid: PathBuf,
    log: PathBuf,
}

impl Files {
    fn new(run: &Path) -> io::Result<Self> {
        let directory = run.join("exec");
        fs::create_dir_all(&directory)?;
        let id = format!("{:016x}", crate::random::number());
        let file = |kind: &str| directory.join(format!("{id}.{kind}"));
        Ok(Self {
            process: file("json"),
            pid: file("pid"),
            log: file("log"),
        })
    }

    /// The process's pid, once its program runs.
    fn pid(&self) -> Option<Pid> {
        let text = fs::read_to_string(&self.pid).ok()?;
        text.trim().parse().ok().map(Pid::from_raw)
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for file in [&self.process, &self.pid, &self.log] {
            // Not all of them were made.
            let _ = fs::remove_file(file);
        }
    }
}

/// Runs a process in the container `name`.
///
/// # Errors
/// The request does not fit the image, or the runtime cannot be started. What the runtime makes of
/// it is told by the session's last frame.
pub(super) fn open(
    paths: &Paths,
    name: &str,
    request: &ExecRequest,
) -> Result<Session, DriverError> {
    let run = paths.instance_run(name);
    let files = Files::new(&run).map_err(DriverError::io("preparing an exec"))?;
    let process = process(&run, request)?;
    fs::write(&files.process, process.to_string())
        .map_err(DriverError::io("writing the process"))?;
    let mut command = Command::new(paths.runtime_program());
    command
        .arg("--root")
        .arg(paths.runtime_root())
        .arg("--log")
        .arg(&files.log)
        .args(["--log-format", "json", "exec", "--process"])
        .arg(&files.process)
        .arg("--pid-file")
        .arg(&files.pid)
        .arg(name)
        .current_dir("/")
        .process_group(0);
    let streams =
        Streams::spawn(command, request.tty).map_err(DriverError::io("starting the runtime"))?;
    let (input, towards) = mpsc::channel(SESSION_FRAMES_MAX);
    let (from, output) = mpsc::channel(SESSION_FRAMES_MAX);
    tokio::spawn(streams.run(files, towards, from));
    Ok(Session { input, output })
}

/// The container's own process, with what the request changes.
fn process(run: &Path, request: &ExecRequest) -> Result<Value, DriverError> {
    let bundle = run.join("bundle");
    let text = fs::read(bundle.join("config.json"))
        .map_err(DriverError::io("reading the container's configuration"))?;
    let mut config: Value = serde_json::from_slice(&text)
        .map_err(|error| DriverError::io("reading the container's configuration")(error.into()))?;
    let mut process = config["process"].take();
    process["args"] = json!(request.command);
    process["terminal"] = json!(request.tty);
    if let Some(directory) = &request.working_dir {
        process["cwd"] = json!(directory);
    }
    let mut env = request.env.clone();
    if request.tty {
        env.entry("TERM".to_owned())
            .or_insert_with(|| "xterm".to_owned());
    }
    if let Some(wanted) = &request.user {
        let user =
            user::resolve(&bundle.join("rootfs"), Some(wanted)).map_err(DriverError::Field)?;
        if has_users(&config) {
            users::check(&user).map_err(DriverError::Field)?;
        }
        process["user"] = json!({
            "uid": user.uid, "gid": user.gid, "additionalGids": user.groups,
        });
        env.entry("HOME".to_owned()).or_insert(user.home);
    }
    if let Value::Array(own) = &mut process["env"] {
        own.retain(|pair| {
            let name = pair.as_str().and_then(|pair| pair.split('=').next());
            name.is_none_or(|name| !env.contains_key(name))
        });
        own.extend(
            env.iter()
                .map(|(name, value)| json!(format!("{name}={value}"))),
        );
    }
    Ok(process)
}

/// Whether the container has users of its own.
fn has_users(config: &Value) -> bool {
    let namespaces = config["linux"]["namespaces"].as_array();
    namespaces.is_some_and(|all| all.iter().any(|one| one["type"] == "user"))
}

/// The runtime's process and its streams.
struct Streams {
    child: Child,
    input: Stdin,
    /// Each with the frame that its bytes go into.
    outputs: Vec<(Output, ToFrame)>,
    /// Our side of the terminal, if there is one.
    terminal: Option<OwnedFd>,
    /// Whether the client is still there.
    listened: bool,
}

impl Streams {
    fn spawn(mut command: Command, tty: bool) -> io::Result<Self> {
        if tty {
            return Self::spawn_on_terminal(command);
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        Ok(Self {
            child,
            input: Stdin::new(Box::new(stdin), false),
            outputs: vec![
                (Box::new(stdout), Frame::Stdout),
                (Box::new(stderr), Frame::Stderr),
            ],
            terminal: None,
            listened: true,
        })
    }

    fn spawn_on_terminal(mut command: Command) -> io::Result<Self> {
        let pair = openpty(None, None)?;
        // The process has a terminal of its own inside, which does what terminals do.
        let mut settings = tcgetattr(&pair.slave)?;
        settings.make_raw();
        tcsetattr(&pair.slave, OptionalActions::Now, &settings)?;
        for fd in [&pair.master, &pair.slave] {
            fcntl(fd, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        }
        fcntl(
            &pair.master,
            FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK),
        )?;
        command
            .stdin(pair.slave.try_clone()?)
            .stdout(pair.slave.try_clone()?)
            .stderr(pair.slave);
        let child = command.spawn()?;
        // A terminal reads and writes like pipes do.
        let reader = pipe::Receiver::from_owned_fd_unchecked(pair.master.try_clone()?)?;
        let writer = pipe::Sender::from_owned_fd_unchecked(pair.master.try_clone()?)?;
        Ok(Self {
            child,
            input: Stdin::new(Box::new(writer), true),
            outputs: vec![(Box::new(reader), Frame::Stdout)],
            terminal: Some(pair.master),
            listened: true,
        })
    }

    /// Passes frames on until the process has ended and its output is read.
    async fn run(
        mut self,
        files: Files,
        mut towards: mpsc::Receiver<Frame>,
        from: mpsc::Sender<Frame>,
    ) {
        let pumps: Vec<JoinHandle<()>> = std::mem::take(&mut self.outputs)
            .into_iter()
            .map(|(stream, frame)| {
                tokio::spawn(pump(stream, from.clone(), frame, files.pid.clone()))
            })
            .collect();
        let mut talking = true;
        let status = loop {
            tokio::select! {
                status = self.child.wait() => break status,
                () = self.input.write(), if self.input.is_pending() => {}
                frame = towards.recv(), if talking && self.input.has_room() => match frame {
                    Some(Frame::Stdin(data)) => self.input.add(&data),
                    Some(frame) => accept(&frame, self.terminal.as_ref(), &self.child, &files),
                    None => {
                        talking = false;
                        self.input.finish();
                    }
                },
                () = from.closed(), if self.listened => {
                    self.listened = false;
                    self.leave(&files);
                }
            }
        };
        drop((self.input, self.terminal));
        drain(pumps).await;
        // A client that has gone needs no word of the end.
        let _ = from.send(last_frame(status, &files)).await;
    }

    /// The client has gone: a terminal hangs up, and a process that does not take its input is not
    /// waited for. Any other goes on without anybody to talk to.
    fn leave(&mut self, files: &Files) {
        let number = match self.terminal.take() {
            Some(_) => Signal::SIGHUP,
            None if !self.input.has_room() => Signal::SIGKILL,
            None => return self.input.finish(),
        };
        if let Some(pid) = files.pid().or_else(|| pid_of(&self.child)) {
            signal(pid, number);
        }
    }
}

/// Does what is not input.
fn accept(frame: &Frame, terminal: Option<&OwnedFd>, child: &Child, files: &Files) {
    match frame {
        Frame::Resize { rows, cols } => {
            let size = Winsize {
                ws_row: *rows,
                ws_col: *cols,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            let resized = terminal.is_some_and(|terminal| tcsetwinsize(terminal, size).is_ok());
            if resized && let Some(runtime) = pid_of(child) {
                // It looks at the size of its terminal, and passes it on.
                signal(runtime, Signal::SIGWINCH);
            }
        }
        Frame::Signal(number) => {
            let pid = files.pid().or_else(|| pid_of(child));
            if let (Some(pid), Ok(number)) = (pid, Signal::try_from(*number)) {
                signal(pid, number);
            }
        }
        Frame::Stdin(_)
        | Frame::Stdout(_)
        | Frame::Stderr(_)
        | Frame::Exit { .. }
        | Frame::Error { .. } => {}
    }
}

fn pid_of(child: &Child) -> Option<Pid> {
    child
        .id()
        .and_then(|id| i32::try_from(id).ok())
        .map(Pid::from_raw)
}

/// A process that has just ended needs no signal.
fn signal(pid: Pid, number: Signal) {
    let _ = kill(pid, number);
}

/// Reads a stream to its end. One whose listener has gone is closed, which the process notices
/// when it writes.
///
/// The runtime has the same streams until the process runs, which the file `started` says. What it
/// complains of if the process never does is in the session's last frame, and not told here too.
async fn pump(mut stream: Output, from: mpsc::Sender<Frame>, frame: ToFrame, started: PathBuf) {
    let mut buffer = vec![0; FRAME_DATA_BYTES_MAX];
    let mut held = Vec::new();
    loop {
        let read = tokio::select! {
            read = stream.read(&mut buffer) => read,
            () = from.closed() => return,
        };
        // A terminal whose other side is closed reads as an error.
        let Ok(count @ 1..) = read else { break };
        let first = held.is_empty();
        let holds = if first { &buffer[..count] } else { &held }.starts_with(RUNTIME_PREFIX)
            && held.len() + count <= RUNTIME_WORDS_BYTES_MAX
            && !started.exists();
        if holds {
            held.extend_from_slice(&buffer[..count]);
            continue;
        }
        for data in [std::mem::take(&mut held).as_slice(), &buffer[..count]] {
            if !data.is_empty()
                && from
                    .send(frame(BASE64_STANDARD.encode(data)))
                    .await
                    .is_err()
            {
                return;
            }
        }
    }
    if !held.is_empty() && started.exists() {
        let _ = from.send(frame(BASE64_STANDARD.encode(&held))).await;
    }
}

async fn drain(pumps: Vec<JoinHandle<()>>) {
    let handles: Vec<_> = pumps.iter().map(JoinHandle::abort_handle).collect();
    if time::timeout(DRAIN_DEADLINE, join_all(pumps))
        .await
        .is_err()
    {
        handles.iter().for_each(AbortHandle::abort);
    }
}

fn last_frame(status: io::Result<ExitStatus>, files: &Files) -> Frame {
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            return Frame::Error {
                code: 125,
                message: error.to_string(),
            };
        }
    };
    if files.pid.exists() {
        use std::os::unix::process::ExitStatusExt;
        return Frame::Exit {
            code: status.code(),
            signal: status.signal(),
            oom: false,
        };
    }
    let message = last_message(&files.log)
        .unwrap_or_else(|| format!("the process could not be started ({status})"));
    Frame::Error {
        code: failure_code(&message),
        message,
    }
}

/// The runtime's last word: its log has a JSON object on each line.
fn last_message(log: &Path) -> Option<String> {
    let bound = 64 * 1024;
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(File::open(log).ok()?, bound), &mut text).ok()?;
    let last: Value = serde_json::from_str(text.lines().last()?).ok()?;
    Some(last["msg"].as_str()?.to_owned())
}

/// As a shell's: 127 for no such program, 126 for one that cannot be executed, 125 for the rest.
fn failure_code(message: &str) -> i32 {
    let message = message.to_ascii_lowercase();
    if message.contains("not found") || message.contains("no such file") {
        127
    } else if message.contains("permission denied") || message.contains("exec format") {
        126
    } else {
        125
    }
}
