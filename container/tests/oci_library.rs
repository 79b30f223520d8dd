//! The runtime as a library, as the monitor uses it: a program of the host in an empty root, with
//! descriptors. Needs root.
//!
//! It has a `main` of its own, since a container can only be created from a process with one thread,
//! and a test of the usual harness has several.

#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![expect(clippy::print_stdout, reason = "it reports as the usual harness does")]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use container::cgroup::Cgroup;
use container::create::{CreateError, CreateOptions, Grouping, Stdio, create, create_started};
use container::process::Exit;
use container::verbs::delete::{DeleteOptions, delete};
use container::verbs::spec::spec;
use container::verbs::start::start;
use container::verbs::state::state;
use serde_json::{Value, json};

/// How long anything may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() {
    let tests: [(&str, fn()); 5] = [
        (
            "a_program_of_the_host_runs_in_an_empty_root",
            a_program_of_the_host_runs_in_an_empty_root,
        ),
        ("descriptors_come_in_order", descriptors_come_in_order),
        (
            "a_created_container_is_a_child_and_can_be_deleted",
            a_created_container_is_a_child_and_can_be_deleted,
        ),
        (
            "a_failure_leaves_neither_process_nor_state",
            a_failure_leaves_neither_process_nor_state,
        ),
        ("several_threads_are_refused", several_threads_are_refused),
    ];
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|it| name.contains(it));
    for (name, test) in tests.into_iter().filter(|(name, _)| wanted(name)) {
        wait_for_threads();
        test();
        println!("test {name} ... ok");
    }
}

/// Waits until threads that were joined are gone for the kernel, too: that is a moment later.
fn wait_for_threads() {
    let start = Instant::now();
    while fs::read_dir("/proc/self/task").unwrap().count() > 1 {
        assert!(start.elapsed() < PATIENCE, "a thread does not end");
        thread::yield_now();
    }
}

/// A bundle with an empty root, removed with its container at the end.
struct Bare {
    directory: tempfile::TempDir,
    id: String,
}

impl Bare {
    fn new(script: &str, change: impl FnOnce(&mut Value)) -> Bare {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("rootfs")).unwrap();
        let id = format!("hostd-test-library-{}", std::process::id());
        let mut config = spec(None);
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["mounts"] = json!([]);
        change(&mut config);
        fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        Bare { directory, id }
    }

    fn options(&self, stdio: Stdio) -> CreateOptions {
        CreateOptions {
            root: self.states(),
            id: self.id.clone(),
            bundle: self.directory.path().to_path_buf(),
            stdio,
            executable: Some(File::open("/bin/busybox").unwrap().into()),
            descriptors: Vec::new(),
            pid_file: None,
            pidfd_socket: None,
            config: None,
            env: Vec::new(),
            no_new_keyring: false,
            grouping: Grouping::Files,
            service_manager: None,
        }
    }

    fn states(&self) -> PathBuf {
        self.directory.path().join("states")
    }

    fn delete(&self) {
        let (root, id) = (self.states(), self.id.clone());
        delete(&DeleteOptions {
            root,
            id,
            force: true,
        })
        .unwrap();
        assert!(!self.states().join(&self.id).exists());
        assert!(!Cgroup::open(&format!("/{}", self.id)).unwrap().exists());
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.delete();
    }
}

/// Standard streams whose output can be read.
fn streams() -> (Stdio, File) {
    let (output, writer) = std::io::pipe().unwrap();
    let stdio = Stdio::Fds {
        stdin: File::open("/dev/null").unwrap().into(),
        stdout: writer.try_clone().unwrap().into(),
        stderr: OwnedFd::from(writer),
    };
    (stdio, OwnedFd::from(output).into())
}

fn read(mut output: File) -> String {
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    text
}

fn a_program_of_the_host_runs_in_an_empty_root() {
    let bare = Bare::new("echo /*; echo x >/y; echo $$; exit 9", |_| {});
    let (stdio, output) = streams();
    let created = create_started(bare.options(stdio)).unwrap();
    assert!(created.console.is_none());
    assert_eq!(created.process.wait().unwrap(), Exit::Code(9));
    let text = read(output);
    assert!(text.starts_with("/*\n"), "the root is not empty: {text}");
    assert!(text.contains("Read-only file system"), "{text}");
    assert!(text.ends_with("1\n"), "{text}");
    assert_eq!(
        fs::read_dir(bare.directory.path().join("rootfs"))
            .unwrap()
            .count(),
        0
    );
}

fn descriptors_come_in_order() {
    let bare = Bare::new(
        "for n in 5 3 4; do read line <&$n; echo $line; done; read line <&6",
        |config| {
            // Fewer than this program has open.
            config["process"]["rlimits"] =
                json!([{"type": "RLIMIT_NOFILE", "soft": 11, "hard": 11}]);
        },
    );
    let (stdio, output) = streams();
    let mut options = bare.options(stdio);
    for text in ["one\n", "two\n", "three\n"] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(text.as_bytes()).unwrap();
        options.descriptors.push(reader.into());
    }
    let created = create_started(options).unwrap();
    assert_eq!(created.process.wait().unwrap(), Exit::Code(1));
    let text = read(output);
    assert!(text.starts_with("three\none\ntwo\n"), "{text}");
    // There is no fourth.
    assert!(text.contains("6: Bad file descriptor"), "{text}");
}

fn a_created_container_is_a_child_and_can_be_deleted() {
    let bare = Bare::new("exit 3", |_| {});
    let (stdio, output) = streams();
    let created = create(bare.options(stdio)).unwrap();
    let state_of = || serde_json::to_value(state(&bare.states(), &bare.id).unwrap()).unwrap();
    assert_eq!(state_of()["status"], "created");
    // From another thread, as a daemon would: nothing is forked.
    thread::scope(|scope| {
        scope.spawn(|| start(&bare.states(), &bare.id, None).unwrap());
    });
    assert_eq!(created.process.wait().unwrap(), Exit::Code(3));
    assert_eq!(state_of()["status"], "stopped");
    assert_eq!(read(output), "");

    bare.delete();
    wait_for_threads();
    let (stdio, _output) = streams();
    let created = create(bare.options(stdio)).unwrap();
    bare.delete();
    assert_eq!(created.process.wait().unwrap(), Exit::Signal(libc::SIGKILL));
}

fn a_failure_leaves_neither_process_nor_state() {
    let bare = Bare::new("true", |config| {
        config["mounts"] = json!([{"destination": "/x", "type": "no-such-type", "source": "x"}]);
        config["root"]["readonly"] = json!(false);
    });
    let (stdio, _output) = streams();
    let error = create(bare.options(stdio)).unwrap_err();
    assert!(matches!(error, CreateError::Init(_)), "{error}");
    assert!(
        error
            .to_string()
            .contains("mounts[0]: cannot mount no-such-type on `/x`"),
        "{error}"
    );
    assert!(!bare.states().join(&bare.id).exists());
    assert!(!Cgroup::open(&format!("/{}", bare.id)).unwrap().exists());
    let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    assert_eq!(children, "");
}

fn several_threads_are_refused() {
    let bare = Bare::new("true", |_| {});
    let (stdio, _output) = streams();
    let options = bare.options(stdio);
    thread::scope(|scope| {
        let error = scope.spawn(|| create(options).unwrap_err()).join().unwrap();
        assert!(matches!(error, CreateError::Threads), "{error}");
    });
}
