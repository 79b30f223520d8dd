//! A bundle with busybox as its root file system, and the runtime to run it with; needs root and
//! Debian's busybox-static. Everything of it is gone at the end, also when the test fails.
//!
//! With `HOSTD_OCI_UNDER_TEST` another runtime with runc's command line is tested, to test the tests:
//! the texts of its refusals are then its own (docs/oci.md says where peers differ).

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use container::cgroup::Cgroup;
use container::verbs::spec::spec;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// The runtime under test, if it is not this project's.
fn peer() -> Option<OsString> {
    std::env::var_os("HOSTD_OCI_UNDER_TEST")
}

/// Whether it is this project's runtime that is tested.
pub(crate) fn is_own() -> bool {
    peer().is_none()
}

fn runtime() -> OsString {
    peer().unwrap_or_else(own_runtime)
}

/// This project's: what cargo names when the tests run, on whichever host that is, or has built.
pub(crate) fn own_runtime() -> OsString {
    std::env::var_os("CARGO_BIN_EXE_hostd-oci")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_hostd-oci").into())
}

/// The commands of busybox that the tests use.
const APPLETS: &[&str] = &[
    "cat", "cut", "dd", "echo", "env", "false", "grep", "head", "hostname", "id", "ionice", "ip",
    "kill", "ls", "mkdir", "mknod", "mount", "ps", "pwd", "readlink", "sh", "sleep", "stat",
    "stty", "taskset", "test", "touch", "true", "tty", "umount", "uname", "wc",
];

/// How long anything may take before the test gives up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// One container that can be made from a bundle.
pub(crate) struct Bundle {
    directory: tempfile::TempDir,
    pub(crate) id: String,
    pub(crate) config: Value,
}

/// What a command printed, and how it ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Bundle {
    /// A bundle that runs a script of busybox's shell.
    pub(crate) fn new(script: &str) -> Bundle {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let directory = tempfile::tempdir().unwrap();
        let bin = directory.path().join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        copy_program(Path::new("/bin/busybox"), &bin.join("busybox"));
        for applet in APPLETS {
            symlink("busybox", bin.join(applet)).unwrap();
        }
        let next = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("hostd-test-{}-{next}", std::process::id());
        let mut config = spec(None);
        if !is_own() {
            // Some know no later version, and care.
            config["ociVersion"] = json!("1.0.2");
        }
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["linux"]["cgroupsPath"] = json!(format!("/{id}"));
        Bundle {
            directory,
            id,
            config,
        }
    }

    /// Changes the configuration.
    pub(crate) fn with(mut self, change: impl FnOnce(&mut Value)) -> Bundle {
        change(&mut self.config);
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.path().join("rootfs")
    }

    /// Where the states are.
    pub(crate) fn states(&self) -> PathBuf {
        self.path().join("states")
    }

    /// The runtime with its global options, and the verb. The configuration is there.
    pub(crate) fn command(&self, verb: &[&str]) -> Command {
        let config = serde_json::to_vec_pretty(&self.config).unwrap();
        fs::write(self.path().join("config.json"), config).unwrap();
        self.bare_command(verb)
    }

    /// As [`Bundle::command`], with whatever is the bundle's config.json.
    pub(crate) fn bare_command(&self, verb: &[&str]) -> Command {
        let mut command = Command::new(runtime());
        command.arg("--root").arg(self.states()).args(verb);
        command.current_dir(self.path()).stdin(Stdio::null());
        command
    }

    /// A shell of the host in a mount and network namespace of its own, from which nothing reaches the
    /// host. `$RUN` and `$CREATE` are this container's verbs, `$R` is the runtime, `$ID` the id.
    pub(crate) fn script(&self, script: &str) -> Ended {
        self.script_of_steps(1, script)
    }

    /// The same with a script of as many commands that take their time, such as an engine's: each may take
    /// as long as anything.
    pub(crate) fn script_of_steps(&self, steps: u32, script: &str) -> Ended {
        let words = |verb: &str| {
            let command = self.command(&[verb]);
            let words = std::iter::once(command.get_program()).chain(command.get_args());
            words
                .map(|word| word.to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        let mut shell = Command::new("unshare");
        shell
            .args([
                "--mount",
                "--net",
                "--propagation",
                "private",
                "sh",
                "-euc",
                script,
            ])
            .env("RUN", format!("{} {}", words("run"), self.id))
            .env("CREATE", format!("{} {}", words("create"), self.id))
            .env("R", words("").trim_end())
            .env("ID", &self.id)
            .current_dir(self.path())
            .stdin(Stdio::null());
        finish_within(shell, PATIENCE * steps)
    }

    /// Runs a verb on this container to its end.
    pub(crate) fn verb(&self, verb: &[&str], arguments: &[&str]) -> Ended {
        let mut command = self.command(verb);
        command.arg(&self.id).args(arguments);
        finish(command)
    }

    /// Runs the container in the foreground.
    pub(crate) fn run(&self) -> Ended {
        self.verb(&["run"], &[])
    }

    /// Runs the container, which must succeed, and returns what it printed.
    pub(crate) fn output(&self) -> String {
        let ended = self.run();
        assert_eq!(ended.status, 0, "{ended:?}");
        ended.stdout
    }

    /// Runs the container, which must not come to be, and returns the message.
    pub(crate) fn refusal(&self) -> String {
        self.refusal_of("")
    }

    fn refusal_of(&self, words: &str) -> String {
        let ended = self.run();
        assert_ne!(ended.status, 0, "{words}: {ended:?}");
        assert_eq!(ended.stdout, "", "the program must not have run");
        self.assert_nothing_is_left();
        ended.stderr
    }

    /// Runs the container, which must not come to be for a reason with these words.
    pub(crate) fn assert_refused(&self, words: &str) {
        let message = self.refusal_of(words);
        assert!(!is_own() || message.contains(words), "{words}: {message}");
    }

    /// Creates and starts the container in the background, its output going nowhere.
    pub(crate) fn start(&self) {
        for verb in ["create", "start"] {
            let ended = self.quiet(&[verb]);
            assert_eq!(ended.status, 0, "{verb}: {ended:?}");
        }
    }

    /// Like [`Bundle::verb`], for verbs whose process outlives them: its streams are not pipes of
    /// ours.
    pub(crate) fn quiet(&self, verb: &[&str]) -> Ended {
        self.quiet_with(verb, &[])
    }

    pub(crate) fn quiet_with(&self, verb: &[&str], arguments: &[&str]) -> Ended {
        let errors = self.path().join("errors");
        let mut command = self.command(verb);
        command
            .arg(&self.id)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&errors).unwrap());
        let ended = finish_child(command.spawn().unwrap());
        let stderr = fs::read_to_string(errors).unwrap();
        Ended { stderr, ..ended }
    }

    /// The container's state.
    pub(crate) fn state(&self) -> Value {
        let ended = self.verb(&["state"], &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
        serde_json::from_str(&ended.stdout).unwrap()
    }

    pub(crate) fn wait_for_status(&self, status: &str) {
        self.wait_for_one_of(&[status]);
    }

    pub(crate) fn wait_for_one_of(&self, statuses: &[&str]) {
        let start = Instant::now();
        while !statuses
            .iter()
            .any(|status| self.state()["status"] == *status)
        {
            assert!(
                start.elapsed() < PATIENCE,
                "never {statuses:?}: {}",
                self.state()
            );
            std::thread::yield_now();
        }
    }

    pub(crate) fn assert_nothing_is_left(&self) {
        assert!(!self.states().join(&self.id).exists(), "the state is left");
        let cgroups = Cgroup::open(&format!("/{}", self.id));
        assert!(!cgroups.unwrap().exists(), "the cgroup is left");
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = self.command(&["delete", "--force"]).arg(&self.id).output();
    }
}

/// Leaves the container in its creator's namespace of that kind.
pub(crate) fn share_namespace(config: &mut Value, kind: &str) {
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != kind);
}

/// What a refusal to map the owners of a mount says.
pub(crate) const UNMAPPED: &str = "mounts[7]: cannot map its users and groups: invalid argument";

/// Whether this kernel can map the owners of a tmpfs: since Linux 6.3.
pub(crate) fn tmpfs_maps_owners() -> bool {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split('.')
        .map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(6), Some(3))
}

/// Copies a program by another process: one that this process had open for writing could not be executed
/// as long as a child lives that a test beside this one forked meanwhile.
pub(crate) fn copy_program(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

/// Runs a command to its end, but not for ever.
pub(crate) fn finish(command: Command) -> Ended {
    finish_within(command, PATIENCE)
}

fn finish_within(mut command: Command, limit: Duration) -> Ended {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    end_within(child, limit)
}

/// Waits for a child, but not for ever.
pub(crate) fn finish_child(child: Child) -> Ended {
    end_within(child, PATIENCE)
}

fn end_within(mut child: Child, limit: Duration) -> Ended {
    let pid = Pid::from_raw(child.id().cast_signed());
    let (done, waiter) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if waiter.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    let mut stderr = child.stderr.take();
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(stderr) = &mut stderr {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    });
    let Output { status, stdout, .. } = child.wait_with_output().unwrap();
    drop(done);
    watchdog.join().unwrap();
    Ended {
        status: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: errors.join().unwrap(),
    }
}
