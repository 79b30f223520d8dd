//! A hostd to test: one of our own, or the one that is installed.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use tempfile::TempDir;

use crate::output::Output;

/// A kind of isolation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    Container,
    Vm,
}

impl Kind {
    /// As `--isolation` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Vm => "vm",
        }
    }
}

/// The kinds that are tested in this run.
pub fn kinds() -> Vec<Kind> {
    let wanted = std::env::var("HOSTD_E2E_KINDS").unwrap_or_else(|_| "container".to_owned());
    wanted
        .split(',')
        .map(|name| match name {
            "container" => Kind::Container,
            "vm" => Kind::Vm,
            other => panic!("HOSTD_E2E_KINDS names `{other}`; it knows `container` and `vm`"),
        })
        .collect()
}

/// A hostd that answers, with the image `busybox:latest` in its store.
#[derive(Debug)]
pub struct Host {
    socket: PathBuf,
    binaries: PathBuf,
    own: Option<OwnDaemon>,
}

/// A daemon that this process started.
#[derive(Debug)]
struct OwnDaemon {
    /// Holds the network namespace for as long as the tests run, across restarts of the daemon.
    keeper: Child,
    dir: TempDir,
    daemon: Mutex<Child>,
}

impl Host {
    /// The host that the environment names: the installed one, or one that is started now.
    pub fn from_environment() -> Self {
        match std::env::var("HOSTD_E2E_HOST").as_deref() {
            Ok("installed") => Self::installed(),
            _ => Self::start(),
        }
    }

    fn installed() -> Self {
        Self {
            socket: "/run/hostd/hostd.sock".into(),
            binaries: "/usr/bin".into(),
            own: None,
        }
    }

    fn start() -> Self {
        let binaries = binaries();
        // On a disk: the owners of a tmpfs's files cannot be mapped before Linux 6.3.
        let dir = TempDir::with_prefix_in("hostd-e2e-", "/var/tmp");
        let dir = dir.expect("a directory can be made");
        let keeper = keep_namespace();
        let daemon = spawn_daemon(&binaries, dir.path(), &keeper);
        let socket = dir.path().join("run/hostd.sock");
        let own = OwnDaemon {
            keeper,
            dir,
            daemon: daemon.into(),
        };
        let host = Self {
            socket,
            binaries,
            own: Some(own),
        };
        host.wait_until_it_answers();
        let layout = std::env::var("HOSTD_E2E_IMAGE").unwrap_or_else(|_| {
            let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("../build/images/busybox-1");
            build.display().to_string()
        });
        host.hostctl(&["image", "import", "--name", "busybox:latest", &layout])
            .ok();
        host
    }

    /// Where the API listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where an instance has what is there while it runs.
    pub fn run_of(&self, name: &str) -> PathBuf {
        let run = match &self.own {
            Some(own) => own.dir.path().join("run"),
            None => "/run/hostd".into(),
        };
        run.join("instances").join(name)
    }

    /// Kills the daemon without a warning and starts it again.
    pub fn kill_and_restart_daemon(&self) {
        match &self.own {
            Some(own) => {
                let mut daemon = own
                    .daemon
                    .lock()
                    .expect("no test panics with the daemon in hand");
                daemon.kill().expect("the daemon can be killed");
                daemon.wait().expect("the daemon can be awaited");
                *daemon = spawn_daemon(&self.binaries, own.dir.path(), &own.keeper);
            }
            None => {
                // The host's init starts it again.
                let pid = self.run("pidof", &["hostd"]).ok();
                let pid = pid.trim().parse().ok().and_then(Pid::from_raw);
                kill_and_await(pid.expect("one hostd runs")).expect("the daemon can be killed");
            }
        }
        self.wait_until_it_answers();
    }

    fn wait_until_it_answers(&self) {
        self.hostctl(&["--wait", "60s", "info"]).ok();
    }

    /// Runs `hostctl` to its end.
    #[track_caller]
    pub fn hostctl(&self, arguments: &[&str]) -> Output {
        self.finish(&mut self.hostctl_command(arguments))
    }

    /// A `hostctl` whose streams are the caller's affair.
    pub fn hostctl_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.binaries.join("hostctl"));
        command
            .arg("--socket")
            .arg(&self.socket)
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs a program in the host's network namespace.
    #[track_caller]
    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        let mut command = match &self.own {
            Some(own) => in_namespace_of(&own.keeper, program),
            None => Command::new(program),
        };
        command.args(arguments).stdin(Stdio::null());
        self.finish(&mut command)
    }

    #[track_caller]
    pub fn finish(&self, command: &mut Command) -> Output {
        let shown = format!("{command:?}");
        let output = command
            .output()
            .unwrap_or_else(|error| panic!("{shown}: {error}"));
        Output::new(shown, &output)
    }
}

/// The release directory that holds this test's own executable in `deps`.
fn binaries() -> PathBuf {
    let me = std::env::current_exe().expect("a process knows its executable");
    let dir = me
        .ancestors()
        .nth(2)
        .expect("tests lie in `deps`")
        .to_owned();
    for name in ["hostd", "hostctl", "hostd-oci", "hostd-vmm"] {
        assert!(
            dir.join(name).exists(),
            "{name} is not built; run `cargo build --release` first"
        );
    }
    dir
}

/// A process that does nothing but hold a network namespace with loopback up, until its standard
/// input closes: so it ends with this process, however that ends.
fn keep_namespace() -> Child {
    let script = "ip link set lo up && echo ready && exec cat >/dev/null";
    let mut keeper = Command::new("unshare")
        .args(["--net", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare runs; the end-to-end tests need root");
    let mut line = String::new();
    let out = keeper.stdout.as_mut().expect("the stream is piped");
    BufReader::new(out)
        .read_line(&mut line)
        .expect("the keeper says that it is ready");
    assert_eq!(
        line, "ready\n",
        "no network namespace; the end-to-end tests need root"
    );
    keeper
}

fn in_namespace_of(keeper: &Child, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/proc/{}/ns/net", keeper.id()))
        .arg("--")
        .arg(program);
    command
}

fn spawn_daemon(binaries: &Path, dir: &Path, keeper: &Child) -> Child {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("hostd.log"))
        .expect("a log can be written");
    let hostd = binaries.join("hostd");
    let mut command = in_namespace_of(keeper, &hostd.display().to_string());
    command
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--run-dir")
        .arg(dir.join("run"))
        .arg("--socket")
        .arg(dir.join("run/hostd.sock"))
        .arg("--cgroup-parent")
        .arg(format!("/{}", group()))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a descriptor can be duplicated"))
        .stderr(log)
        .spawn()
        .expect("hostd runs")
}

impl Drop for Host {
    /// Removes every instance, and takes the daemon down if it is ours.
    fn drop(&mut self) {
        let names = self.hostctl(&["list", "--all", "--quiet"]);
        for name in names.stdout.split_whitespace() {
            let _ = self.hostctl(&["rm", "--force", name]);
        }
        if let Some(own) = &mut self.own {
            if let Ok(daemon) = own.daemon.get_mut() {
                let _ = end(daemon);
                let _ = daemon.wait();
            }
            let _ = own.keeper.kill();
            let _ = own.keeper.wait();
            if !thread::panicking() {
                let left = left_groups();
                assert!(left.is_empty(), "groups are left: {left:?}");
            }
        }
    }
}

/// Politely: a daemon without instances then removes what was for all of them.
fn end(daemon: &Child) -> rustix::io::Result<()> {
    kill_process(Pid::from_child(daemon), Signal::TERM)
}

/// Kills a process that is not our child; it is gone when this returns.
fn kill_and_await(pid: Pid) -> rustix::io::Result<()> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_send_signal(&process, Signal::KILL)?;
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    while poll(&mut ended, None) == Err(Errno::INTR) {}
    Ok(())
}

/// What the daemon was told to put its instances' control groups into.
fn group() -> String {
    format!("hostd-e2e-{}", std::process::id())
}

fn left_groups() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten();
    let places = hierarchies.map(|entry| entry.path()).chain([root.into()]);
    places
        .map(|place| place.join(group()))
        .filter(|path| path.exists())
        .collect()
}
