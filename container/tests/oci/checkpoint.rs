//! Checkpoints, where this host has CRIU, and it works with the kernel.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::bundle::{Bundle, Ended, finish, finish_child, is_own};
use crate::terminal::receive_descriptor;

/// Answers each line with it and how many there were before, which is nowhere but in its memory.
pub(crate) const COUNTING: &str = "n=0; while read line; do echo $n $line; n=$((n+1)); done";

/// Whether CRIU can be used here. Not every kernel is one that Debian's version works with.
pub(crate) fn is_possible() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    is_own()
        && *FOUND.get_or_init(|| {
            let check = Command::new("criu").arg("check").output();
            check.is_ok_and(|output| output.status.success())
        })
}

/// Ends of pipes that are the standard streams of a container.
pub(crate) struct Talk {
    pub(crate) input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Talk {
    /// Makes a container with them by a verb that returns when it runs.
    pub(crate) fn start(bundle: &Bundle, verb: &[&str]) -> Talk {
        let log = bundle.path().join("log");
        let mut command = bundle.command(&[&["--log", log.to_str().unwrap()], verb].concat());
        command.arg(&bundle.id).stdin(Stdio::piped());
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let status = child.wait().unwrap();
        let log = || fs::read_to_string(log).unwrap_or_default();
        assert!(status.success(), "{}", log());
        Talk {
            input,
            output: BufReader::new(output),
        }
    }

    pub(crate) fn run(bundle: &Bundle) -> Talk {
        Talk::start(bundle, &["run", "--detach"])
    }

    pub(crate) fn restore(bundle: &Bundle, images: &Path, options: &[&str]) -> Talk {
        Talk::start(bundle, &[&restoring(images), options].concat())
    }

    pub(crate) fn say(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        self.hear()
    }

    fn hear(&mut self) -> String {
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

/// The verb that makes a container from images, in the background.
pub(crate) fn restoring(images: &Path) -> [&str; 4] {
    let images = images.to_str().unwrap();
    ["restore", "--detach", "--image-path", images]
}

pub(crate) fn images(bundle: &Bundle, name: &str) -> PathBuf {
    bundle.path().join(name)
}

pub(crate) fn checkpoint(bundle: &Bundle, images: &Path, options: &[&str]) -> Ended {
    let verb = ["checkpoint", "--image-path", images.to_str().unwrap()];
    bundle.verb(&[&verb, options].concat(), &[])
}

pub(crate) fn assert_checkpointed(bundle: &Bundle, images: &Path, options: &[&str]) {
    let ended = checkpoint(bundle, images, options);
    assert_eq!(ended.status, 0, "{ended:?}");
}

pub(crate) fn exec(bundle: &Bundle, script: &str) -> String {
    let ended = bundle.verb(&["exec"], &["sh", "-c", script]);
    assert_eq!(ended.status, 0, "{ended:?}");
    ended.stdout
}

#[test]
fn a_container_goes_on_where_it_was_with_all_that_it_had() {
    if !is_possible() {
        return;
    }
    let script = format!("echo kept >/dev/shm/file; cd /dev/shm; {COUNTING}");
    let bundle = Bundle::new(&script).with(|config| {
        config["hostname"] = json!("counter");
        config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        config["linux"]["maskedPaths"] = json!(["/proc/keys", "/proc/acpi", "/proc/no-such"]);
        config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 77}]);
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5}]
        });
        config["mounts"].as_array_mut().unwrap().extend([
            json!({"destination": "/data", "type": "bind", "source": "data", "options": ["rbind"]}),
            json!({"destination": "/data/inside", "type": "tmpfs", "source": "tmpfs"}),
            json!({"destination": "/etc/file", "source": "file", "options": ["bind", "ro"]}),
        ]);
    });
    fs::create_dir(images(&bundle, "data")).unwrap();
    fs::write(images(&bundle, "file"), "of the host\n").unwrap();
    let mut talk = Talk::run(&bundle);
    assert_eq!(talk.say("one"), "0 one");
    let seen = || {
        let shown = exec(&bundle, "mount; cat /etc/file; ls /data; echo $(hostname)");
        let mut lines: Vec<_> = shown.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let before = seen();
    let place = images(&bundle, "images");
    assert_checkpointed(&bundle, &place, &[]);
    bundle.assert_nothing_is_left();
    // Whoever has only the image of the container has not the places of its mounts.
    fs::remove_dir(bundle.rootfs().join("data")).unwrap();
    fs::remove_file(bundle.rootfs().join("etc/file")).unwrap();

    let mut talk = Talk::restore(&bundle, &place, &[]);
    assert_eq!(talk.say("two"), "1 two");
    assert_eq!(seen(), before);
    assert_eq!(exec(&bundle, "cat /dev/shm/file; cat /proc/keys"), "kept\n");
    let state = bundle.state();
    assert_eq!(state["status"], "running");
    let own = fs::read_to_string(format!("/proc/{}/cgroup", state["pid"])).unwrap();
    assert!(own.contains(&bundle.id), "{own}");
    let status = fs::read_to_string(format!("/proc/{}/status", state["pid"])).unwrap();
    assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", state["pid"])).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    assert!(files.unwrap().contains(" 77 "), "{limits}");
    let memory = format!("/sys/fs/cgroup/{}/memory.max", bundle.id);
    assert_eq!(fs::read_to_string(memory).unwrap(), "67108864\n");
    // Nothing of CRIU's is left, in the state or among the host's mounts.
    assert!(!bundle.states().join(&bundle.id).join("criu-root").exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("criu"), "{mounts}");
    drop(talk);
    bundle.wait_for_status("stopped");
    assert_eq!(bundle.verb(&["delete"], &[]).status, 0);
    bundle.assert_nothing_is_left();
}

#[test]
fn a_container_can_go_on_and_live_again_as_another() {
    if !is_possible() {
        return;
    }
    let first = Bundle::new(COUNTING);
    let mut talk = Talk::run(&first);
    assert_eq!(talk.say("one"), "0 one");
    let place = images(&first, "images");
    assert_checkpointed(&first, &place, &["--leave-running"]);
    assert_eq!(talk.say("two"), "1 two");

    let second = Bundle::new(COUNTING);
    let mut other = Talk::restore(&second, &place, &[]);
    assert_eq!(other.say("again"), "1 again");
    assert_eq!(talk.say("three"), "2 three");
    let own = |bundle: &Bundle| {
        let pid = &bundle.state()["pid"];
        fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap()
    };
    assert!(own(&second).contains(&second.id), "{}", own(&second));
    assert!(own(&first).contains(&first.id), "{}", own(&first));
    // CRIU is not asked about groups: all are then in the container's.
    assert_eq!(second.verb(&["delete", "--force"], &[]).status, 0);
    let options = ["--manage-cgroups-mode", "ignore"];
    let mut other = Talk::restore(&second, &place, &options);
    assert_eq!(other.say("again"), "1 again");
    assert!(own(&second).contains(&second.id), "{}", own(&second));
}

#[test]
fn memory_that_was_written_before_is_not_written_again() {
    if !is_possible() {
        return;
    }
    let script = format!("big=$(head -c 4000000 /dev/zero | tr '\\0' x); {COUNTING}");
    let bundle = Bundle::new(&script);
    std::os::unix::fs::symlink("busybox", bundle.rootfs().join("bin/tr")).unwrap();
    let mut talk = Talk::run(&bundle);
    assert_eq!(talk.say("one"), "0 one");
    let (early, late) = (images(&bundle, "early"), images(&bundle, "late"));
    assert_checkpointed(&bundle, &early, &["--pre-dump"]);
    assert_eq!(talk.say("two"), "1 two");
    let ended = checkpoint(&bundle, &late, &["--parent-path", "../no-such"]);
    assert!(ended.stderr.contains("it is no directory"), "{ended:?}");
    assert_checkpointed(&bundle, &late, &["--parent-path", "../early"]);
    let pages = |place: &Path| {
        let files = fs::read_dir(place).unwrap().map(|entry| entry.unwrap());
        let pages = files.filter(|entry| {
            let name = entry.file_name().into_string().unwrap();
            name.starts_with("pages-")
        });
        pages
            .map(|entry| entry.metadata().unwrap().len())
            .sum::<u64>()
    };
    assert!(
        pages(&late) * 4 < pages(&early),
        "{} bytes after {}",
        pages(&late),
        pages(&early)
    );
    let mut talk = Talk::restore(&bundle, &late, &[]);
    assert_eq!(talk.say("three"), "2 three");
}

#[test]
fn a_terminal_is_handed_over_again() {
    if !is_possible() {
        return;
    }
    let script = format!("stty -echo; echo $(tty); {COUNTING}");
    let bundle = Bundle::new(&script).with(|config| {
        config["process"]["terminal"] = json!(true);
    });
    let socket = bundle.path().join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let path = socket.to_str().unwrap();
    let master = |verb: &[&str]| {
        let ended = bundle.quiet(&[verb, &["--console-socket", path]].concat());
        assert_eq!(ended.status, 0, "{ended:?}");
        let (connection, _) = listener.accept().unwrap();
        let master = receive_descriptor(&connection);
        (master.try_clone().unwrap(), BufReader::new(master).lines())
    };
    let (mut input, mut lines) = master(&["run", "--detach"]);
    assert_eq!(lines.next().unwrap().unwrap(), "/dev/pts/0");
    writeln!(input, "one").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "0 one");
    let place = images(&bundle, "images");
    assert_checkpointed(&bundle, &place, &[]);
    let (mut input, mut lines) = master(&restoring(&place));
    writeln!(input, "two").unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "1 two");
    assert_eq!(
        exec(&bundle, "test -c /dev/console && echo it is"),
        "it is\n"
    );
}

#[test]
fn in_the_foreground_the_status_is_the_programs() {
    if !is_possible() {
        return;
    }
    let bundle = Bundle::new("read line; echo got $line; exit 7");
    let talk = Talk::run(&bundle);
    let place = images(&bundle, "images");
    assert_checkpointed(&bundle, &place, &[]);
    drop(talk);
    let mut command = bundle.command(&["restore", "--image-path", place.to_str().unwrap()]);
    command.arg(&bundle.id).stdin(Stdio::piped());
    command.stdout(Stdio::piped());
    command.stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    writeln!(child.stdin.take().unwrap(), "it").unwrap();
    let ended = finish_child(child);
    assert_eq!(
        (ended.status, ended.stdout.as_str()),
        (7, "got it\n"),
        "{ended:?}"
    );
    bundle.assert_nothing_is_left();
}

#[test]
fn a_stream_that_was_a_file_can_only_be_a_file_again() {
    if !is_possible() {
        return;
    }
    let bundle = Bundle::new("exec sleep 1000");
    assert_eq!(bundle.quiet(&["run", "--detach"]).status, 0);
    let place = images(&bundle, "images");
    assert_checkpointed(&bundle, &place, &[]);
    let ended = bundle.verb(&restoring(&place), &[]);
    let message = "standard error was a file, and can only be a file again";
    assert!(ended.stderr.contains(message), "{ended:?}");
    bundle.assert_nothing_is_left();
    let ended = bundle.quiet(&restoring(&place));
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(bundle.state()["status"], "running");
}

#[test]
fn a_file_without_a_name_is_kept() {
    if !is_possible() {
        return;
    }
    let script = format!("cd /dev/shm; echo kept >gone; exec 7<gone; busybox rm gone; {COUNTING}");
    let bundle = Bundle::new(&script);
    let mut talk = Talk::run(&bundle);
    assert_eq!(talk.say("one"), "0 one");
    let place = images(&bundle, "images");
    assert_checkpointed(&bundle, &place, &[]);
    let mut talk = Talk::restore(&bundle, &place, &[]);
    assert_eq!(talk.say("two"), "1 two");
    let seen = exec(&bundle, "cat /proc/1/fd/7; ls /dev/shm");
    assert_eq!(seen, "kept\n");
}

#[test]
fn users_are_mapped_again_and_groups_of_its_own_come_back() {
    if !is_possible() {
        return;
    }
    let script = format!(
        "mkdir /sys/fs/cgroup/below; echo $$ >/sys/fs/cgroup/below/cgroup.procs; {COUNTING}"
    );
    let bundle = Bundle::new(&script).with(|config| {
        let linux = &mut config["linux"];
        let namespaces = linux["namespaces"].as_array_mut().unwrap();
        namespaces.push(json!({"type": "user"}));
        linux["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 1000}]);
        linux["gidMappings"] = json!([{"containerID": 0, "hostID": 200_000, "size": 1000}]);
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
    });
    std::os::unix::fs::chown(bundle.rootfs(), Some(100_000), Some(200_000)).unwrap();
    let mut talk = Talk::run(&bundle);
    assert_eq!(talk.say("one"), "0 one");
    let place = images(&bundle, "images");
    assert_checkpointed(&bundle, &place, &[]);
    let mut talk = Talk::restore(&bundle, &place, &[]);
    assert_eq!(talk.say("two"), "1 two");
    let pid = &bundle.state()["pid"];
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    assert!(read("uid_map").contains("100000"), "{}", read("uid_map"));
    assert!(read("gid_map").contains("200000"), "{}", read("gid_map"));
    let below = format!("0::/{}/below", bundle.id);
    assert_eq!(read("cgroup").trim_end(), below);
    assert_eq!(exec(&bundle, "id -u; cat /dev/null"), "0\n");
}

#[test]
fn a_network_that_was_joined_is_joined_again_and_hooks_see_it() {
    if !is_possible() {
        return;
    }
    let holder = Bundle::new("exec sleep 1000");
    holder.start();
    let namespace = format!("/proc/{}/ns/net", holder.state()["pid"]);
    let link = |pid: &Value| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    let bundle = Bundle::new(COUNTING);
    let log = bundle.path().join("hooks");
    let hook = format!("cat >>{0}; echo >>{0}", log.display());
    let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", hook]}]);
    let bundle = bundle.with(|config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({"type": "network", "path": namespace}));
        config["hooks"] = json!({"createRuntime": hook, "poststop": hook});
    });
    let mut talk = Talk::run(&bundle);
    assert_eq!(talk.say("one"), "0 one");
    let place = images(&bundle, "images");
    assert_checkpointed(&bundle, &place, &[]);
    let mut talk = Talk::restore(&bundle, &place, &[]);
    assert_eq!(talk.say("two"), "1 two");
    let state = bundle.state();
    assert_eq!(link(&state["pid"]), link(&holder.state()["pid"]));
    let told = fs::read_to_string(&log).unwrap();
    let told: Vec<Value> = told
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let seen: Vec<_> = told
        .iter()
        .map(|state| state["status"].as_str().unwrap())
        .collect();
    assert_eq!(seen, ["created", "stopped", "created"]);
    assert_eq!(told[2]["pid"], state["pid"]);
}

#[test]
fn without_criu_both_are_refused_and_a_container_stays_as_it_is() {
    let bundle = Bundle::new("exec sleep 1000");
    let refused = |criu: &str, verb: &str| {
        let ended = finish({
            let mut command = bundle.command(&["--criu", criu, verb]);
            command.arg(&bundle.id);
            command
        });
        assert_ne!(ended.status, 0, "{ended:?}");
        ended.stderr
    };
    if is_own() {
        let ended = checkpoint(&bundle, &images(&bundle, "images"), &[]);
        assert!(ended.stderr.contains("does not exist"), "{ended:?}");
        bundle.start();
        let missing = "there is no program `/no/criu`: install it";
        let message = refused("/no/criu", "checkpoint");
        assert!(message.contains(missing), "{message}");
        assert_eq!(bundle.state()["status"], "running");
        assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
        let message = refused("/no/criu", "restore");
        assert!(message.contains(missing), "{message}");
        // What does not speak CRIU's language is none.
        let message = refused("/bin/true", "restore");
        assert!(message.contains("cannot hear from CRIU"), "{message}");
        bundle.assert_nothing_is_left();
    }
}

#[test]
fn what_is_no_checkpoint_and_who_cannot_have_one_is_refused_by_name() {
    if !is_possible() {
        return;
    }
    let bundle = Bundle::new("exec sleep 1000");
    assert_eq!(bundle.quiet(&["create"]).status, 0);
    let place = images(&bundle, "images");
    let ended = checkpoint(&bundle, &place, &[]);
    assert!(
        ended.stderr.contains("it is created, and neither running"),
        "{ended:?}"
    );
    let ended = bundle.quiet(&["restore", "--detach"]);
    assert!(ended.stderr.contains("already exists"), "{ended:?}");
    assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
    let ended = bundle.quiet(&restoring(Path::new("/no/images")));
    assert!(
        ended
            .stderr
            .contains("cannot open the directory /no/images"),
        "{ended:?}"
    );
    bundle.assert_nothing_is_left();
    fs::create_dir(&place).unwrap();
    fs::write(place.join("descriptors.json"), "[]").unwrap();
    let ended = bundle.quiet(&restoring(&place));
    assert!(
        ended
            .stderr
            .contains("CRIU could not restore the container: "),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("restore.log"), "{ended:?}");
    bundle.assert_nothing_is_left();
}
