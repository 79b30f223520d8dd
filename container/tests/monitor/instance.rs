//! An instance under a monitor, and a client's connection to it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{fs::symlink, net::UnixStream},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use container::{
    cgroup::Cgroup,
    monitor::protocol::{ExitRecord, Frame, LogSpec, MonitorSpec, Ready, Request, Response},
};
use nix::unistd::Pid;
use serde_json::{Value, json};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_hostd-oci");

/// Nothing here takes long; who waits longer has found a hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A directory with a specification, and the monitor once it is started. All is removed at the end.
pub(crate) struct Instance {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) group: String,
    pub(crate) spec: MonitorSpec,
    pub(crate) config: Value,
    pub(crate) monitor: Option<Child>,
}

impl Instance {
    pub(crate) fn new(script: &str) -> Instance {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "hostd-test-monitor-{}-{}",
            process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = tempfile::tempdir().unwrap();
        let path = |part: &str| dir.path().join(part);
        let root = path("bundle/rootfs");
        fs::create_dir_all(root.join("usr")).unwrap();
        for directory in ["proc", "dev", "tmp"] {
            fs::create_dir(root.join(directory)).unwrap();
        }
        for link in ["bin", "lib", "lib64", "sbin"] {
            symlink(Path::new("usr").join(link), root.join(link)).unwrap();
        }
        let spec = MonitorSpec {
            id: name.clone(),
            root: path("states"),
            bundle: path("bundle"),
            log: LogSpec {
                path: path("log"),
                bytes_max: 64 << 20,
            },
            stdin: false,
            await_client: false,
            executable: None,
            descriptors: Vec::new(),
        };
        let config = json!({
            "ociVersion": "1.2.0",
            "root": { "path": "rootfs" },
            "process": {
                "args": ["/bin/sh", "-c", script],
                "cwd": "/",
                "user": { "uid": 0, "gid": 0 },
                "env": ["PATH=/usr/bin:/bin"],
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/usr", "source": "/usr", "options": ["rbind", "ro"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["newinstance", "ptmxmode=0666", "mode=0620"] },
            ],
            "linux": {
                "cgroupsPath": format!("/{name}/leaf"),
                "namespaces": [
                    { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" },
                ],
            },
        });
        Instance {
            dir,
            group: format!("/{name}"),
            spec,
            config,
            monitor: None,
        }
    }

    pub(crate) fn path(&self, part: &str) -> PathBuf {
        self.dir.path().join(part)
    }

    /// Starts a monitor for the directory, and returns it with its one line.
    pub(crate) fn spawn(&self) -> (Child, Ready) {
        let write = |name: &str, text: String| fs::write(self.path(name), text).unwrap();
        write("bundle/config.json", self.config.to_string());
        write("monitor.json", serde_json::to_string(&self.spec).unwrap());
        let mut monitor = Command::new(PROGRAM)
            .args(["monitor", "--dir"])
            .arg(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // To the end of file: the monitor closes its output after the line.
        let line = std::io::read_to_string(monitor.stdout.take().unwrap()).unwrap();
        (monitor, serde_json::from_str(&line).unwrap())
    }

    pub(crate) fn start(&mut self) -> i32 {
        let (monitor, ready) = self.spawn();
        self.monitor = Some(monitor);
        match ready {
            Ready::Running { pid, .. } => pid,
            Ready::Failed { message, .. } => panic!("{message}"),
        }
    }

    pub(crate) fn started(script: &str) -> Instance {
        let mut instance = Instance::new(script);
        instance.start();
        instance
    }

    pub(crate) fn monitor_pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.monitor.as_ref().unwrap().id()).unwrap())
    }

    pub(crate) fn connect(&self, request: &Request) -> Connection {
        let stream = UnixStream::connect(self.path("monitor.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut connection = Connection {
            reader: BufReader::new(stream),
        };
        connection.send(request);
        connection
    }

    pub(crate) fn ask(&self, request: &Request) -> Response {
        let mut connection = self.connect(request);
        let response = connection.receive().unwrap();
        assert_eq!(
            connection.receive::<Response>(),
            None,
            "one answer, and the end"
        );
        response
    }

    pub(crate) fn attach(&self, stdin: bool) -> Connection {
        let mut connection = self.connect(&Request::Attach { stdin });
        assert_eq!(connection.receive(), Some(Response::Done {}));
        connection
    }

    /// Waits for the monitor's end, and returns what it left.
    pub(crate) fn end(&mut self) -> ExitRecord {
        let deadline = Instant::now() + PATIENCE;
        let monitor = self.monitor.as_mut().unwrap();
        let process = rustix::process::Pid::from_child(monitor);
        let process =
            rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty()).unwrap();
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [rustix::event::PollFd::new(
            &process,
            rustix::event::PollFlags::IN,
        )];
        let timeout = left.try_into().unwrap();
        assert_eq!(
            rustix::event::poll(&mut fds, Some(&timeout)),
            Ok(1),
            "the monitor hangs"
        );
        assert!(monitor.wait().unwrap().success());
        assert!(!self.path("monitor.sock").exists());
        self.assert_nothing_is_left();
        serde_json::from_slice(&fs::read(self.path("exit.json")).unwrap()).unwrap()
    }

    /// Kills the process, and waits as [`Instance::end`] does.
    pub(crate) fn kill(&mut self) -> ExitRecord {
        self.ask(&Request::Kill { signal: 9 });
        self.end()
    }

    pub(crate) fn assert_running(&self) {
        let state = self.ask(&Request::State {});
        assert!(matches!(state, Response::Running { .. }), "{state:?}");
    }

    pub(crate) fn assert_nothing_is_left(&self) {
        assert!(!self.path("states").join(&self.spec.id).exists());
        assert!(!self.cgroup().exists());
    }

    pub(crate) fn cgroup(&self) -> Cgroup {
        Cgroup::open(&format!("{}/leaf", self.group)).unwrap()
    }

    pub(crate) fn log(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        for name in ["log.1", "log"] {
            let text = fs::read_to_string(self.path(name)).unwrap_or_default();
            lines.extend(text.lines().map(|line| {
                let line: Value = serde_json::from_str(line).unwrap();
                let field = |name: &str| line[name].as_str().unwrap().to_owned();
                field("at").parse::<jiff::Timestamp>().unwrap();
                (field("stream"), field("text"))
            }));
        }
        lines
    }

    pub(crate) fn delete(&self) {
        let status = Command::new(PROGRAM)
            .arg("--root")
            .arg(&self.spec.root)
            .args(["delete", "--force", &self.spec.id])
            .status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(monitor) = &mut self.monitor {
            monitor.kill().ok();
            monitor.wait().ok();
        }
        self.delete();
        Cgroup::open(&self.group).unwrap().remove().unwrap();
    }
}

pub(crate) struct Connection {
    pub(crate) reader: BufReader<UnixStream>,
}

impl Connection {
    pub(crate) fn send(&mut self, message: &impl serde::Serialize) {
        let line = serde_json::to_string(message).unwrap() + "\n";
        self.reader.get_mut().write_all(line.as_bytes()).unwrap();
    }

    /// The next line; nothing at the end.
    pub(crate) fn receive<T: serde::de::DeserializeOwned>(&mut self) -> Option<T> {
        let mut line = String::new();
        if self.reader.read_line(&mut line).unwrap() == 0 {
            return None;
        }
        Some(serde_json::from_str(&line).unwrap())
    }

    pub(crate) fn type_in(&mut self, text: &str) {
        self.send(&Frame::Stdin(BASE64_STANDARD.encode(text)));
    }

    /// Output until it contains `text`.
    pub(crate) fn read_until(&mut self, text: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.receive::<Frame>() {
                Some(Frame::Stdout(data) | Frame::Stderr(data)) => {
                    let bytes = BASE64_STANDARD.decode(data).unwrap();
                    seen += &String::from_utf8_lossy(&bytes);
                }
                other => panic!("{other:?} after {seen:?}, and no {text:?}"),
            }
        }
        seen
    }

    /// All output, and the last frame.
    pub(crate) fn read_all(&mut self) -> (usize, Option<Frame>) {
        let mut count = 0;
        loop {
            match self.receive::<Frame>() {
                Some(Frame::Stdout(data) | Frame::Stderr(data)) => {
                    count += BASE64_STANDARD.decode(data).unwrap().len();
                }
                last => return (count, last),
            }
        }
    }

    /// As `read_all`, of a connection that may end within a line.
    pub(crate) fn read_all_lossy(&mut self) -> (usize, Option<Frame>) {
        let mut text = String::new();
        self.reader.read_to_string(&mut text).ok();
        let last = text
            .lines()
            .last()
            .and_then(|line| serde_json::from_str(line).ok());
        (
            text.len(),
            last.filter(|frame| matches!(frame, Frame::Exit { .. })),
        )
    }
}
