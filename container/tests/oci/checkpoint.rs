//! Checkpoints, where this host has CRIU, and it works with the kernel.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use serde_json::{Value, json};

use crate::bundle::{Bundle, Ended, PATIENCE, finish, finish_child, is_own};
use crate::lifecycle::receive_descriptor;

/// Answers each line with it and how many there were before, which is nowhere but in its memory.
const COUNTING: &str = "n=0; while read line; do echo $n $line; n=$((n+1)); done";

/// Whether CRIU can be used here. Not every kernel is one that Debian's version works with.
fn is_possible() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    is_own()
        && *FOUND.get_or_init(|| {
            let check = Command::new("criu").arg("check").output();
            check.is_ok_and(|output| output.status.success())
        })
}

/// Ends of pipes that are the standard streams of a container.
struct Talk {
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Talk {
    /// Makes a container with them by a verb that returns when it runs.
    fn start(bundle: &Bundle, verb: &[&str]) -> Talk {
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

    fn run(bundle: &Bundle) -> Talk {
        Talk::start(bundle, &["run", "--detach"])
    }

    fn restore(bundle: &Bundle, images: &Path) -> Talk {
        let images = images.to_str().unwrap();
        Talk::start(bundle, &["restore", "--detach", "--image-path", images])
    }

    fn say(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        self.hear()
    }

    fn hear(&mut self) -> String {
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }
}

fn images(bundle: &Bundle, name: &str) -> PathBuf {
    bundle.path().join(name)
}

fn checkpoint(bundle: &Bundle, images: &Path, options: &[&str]) -> Ended {
    let verb = ["checkpoint", "--image-path", images.to_str().unwrap()];
    bundle.verb(&[&verb, options].concat(), &[])
}

fn assert_checkpointed(bundle: &Bundle, images: &Path, options: &[&str]) {
    let ended = checkpoint(bundle, images, options);
    assert_eq!(ended.status, 0, "{ended:?}");
}

fn exec(bundle: &Bundle, script: &str) -> String {
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

    let mut talk = Talk::restore(&bundle, &place);
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
    let mut other = Talk::restore(&second, &place);
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
    let place = place.to_str().unwrap();
    let verb = [
        "restore",
        "-d",
        "--manage-cgroups-mode",
        "ignore",
        "--image-path",
        place,
    ];
    let mut other = Talk::start(&second, &verb);
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
    let mut talk = Talk::restore(&bundle, &late);
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
    let images = place.to_str().unwrap();
    let (mut input, mut lines) = master(&["restore", "--detach", "--image-path", images]);
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
    let restore = [
        "restore",
        "--detach",
        "--image-path",
        place.to_str().unwrap(),
    ];
    let ended = bundle.verb(&restore, &[]);
    let message = "standard error was a file, and can only be a file again";
    assert!(ended.stderr.contains(message), "{ended:?}");
    bundle.assert_nothing_is_left();
    let ended = bundle.quiet(&restore);
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(bundle.state()["status"], "running");
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
    let mut talk = Talk::restore(&bundle, &place);
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
    let mut talk = Talk::restore(&bundle, &place);
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
fn connections_are_kept_where_that_is_asked_for_and_else_the_container_goes_on() {
    if !is_possible() {
        return;
    }
    let script = "ip link set lo up
        sleep 1000 | busybox nc -l -p 2000 >/dev/shm/heard &
        while ! busybox netstat -ltn | grep -q :2000; do busybox usleep 1000; done
        while read line; do echo $line; echo said $line >&2; done | busybox nc 127.0.0.1 2000";
    let bundle = Bundle::new(script).with(|config| {
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_NET_ADMIN"]);
        }
    });
    let mut talk = Talk::run(&bundle);
    let heard = |count: usize| {
        let start = Instant::now();
        loop {
            let heard = exec(&bundle, "cat /dev/shm/heard 2>/dev/null || true");
            if heard.lines().count() >= count || start.elapsed() > PATIENCE {
                return heard;
            }
        }
    };
    writeln!(talk.input, "one").unwrap();
    assert_eq!(heard(1), "one\n");
    let place = images(&bundle, "images");
    let ended = checkpoint(&bundle, &place, &[]);
    assert!(
        ended.status != 0 && ended.stderr.contains("--tcp-established"),
        "{ended:?}"
    );
    writeln!(talk.input, "two").unwrap();
    assert_eq!(heard(2), "one\ntwo\n");
    assert_checkpointed(&bundle, &place, &["--tcp-established"]);
    let images = place.to_str().unwrap();
    let verb = ["restore", "-d", "--tcp-established", "--image-path", images];
    let mut talk = Talk::start(&bundle, &verb);
    writeln!(talk.input, "three").unwrap();
    assert_eq!(heard(3), "one\ntwo\nthree\n");
}

#[test]
fn without_criu_both_are_refused_and_a_container_stays_as_it_is() {
    let bundle = Bundle::new("exec sleep 1000");
    let none = |verb: &[&str]| {
        let ended = finish({
            let mut command = bundle.command(&[&["--criu", "/no/criu"], verb].concat());
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
        let message = none(&["checkpoint"]);
        assert!(message.contains(missing), "{message}");
        assert_eq!(bundle.state()["status"], "running");
        assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
        let message = none(&["restore"]);
        assert!(message.contains(missing), "{message}");
        // What does not speak CRIU's language is none.
        let ended = finish({
            let mut command = bundle.command(&["--criu", "/bin/true", "restore"]);
            command.arg(&bundle.id);
            command
        });
        assert!(ended.stderr.contains("cannot hear from CRIU"), "{ended:?}");
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
    let ended = bundle.quiet(&["restore", "--detach", "--image-path", "/no/images"]);
    assert!(
        ended
            .stderr
            .contains("cannot open the directory /no/images"),
        "{ended:?}"
    );
    bundle.assert_nothing_is_left();
    fs::create_dir(&place).unwrap();
    fs::write(place.join("descriptors.json"), "[]").unwrap();
    let ended = bundle.quiet(&[
        "restore",
        "--detach",
        "--image-path",
        place.to_str().unwrap(),
    ]);
    assert!(
        ended
            .stderr
            .contains("CRIU could not restore the container: "),
        "{ended:?}"
    );
    assert!(ended.stderr.contains("restore.log"), "{ended:?}");
    bundle.assert_nothing_is_left();
}

#[test]
fn memory_can_stay_where_it_is_until_it_is_used() {
    if !is_possible() {
        return;
    }
    let (first, second) = (Bundle::new(COUNTING), Bundle::new(COUNTING));
    let mut talk = Talk::run(&first);
    assert_eq!(talk.say("one"), "0 one");
    // Free a moment ago.
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port().to_string()
    };
    let (place, status, work) = (
        images(&first, "images"),
        images(&first, "status"),
        images(&second, "work"),
    );
    fs::create_dir(&work).unwrap();
    mkfifo(&status, Mode::S_IRWXU).unwrap();
    let address = format!("127.0.0.1:{port}");
    let options = [
        "--lazy-pages",
        "--status-fd",
        "9",
        "--page-server",
        &address,
    ];
    let verb = ["checkpoint", "--image-path", place.to_str().unwrap()];
    let mut command = first.command(&[&verb[..], &options].concat());
    command.arg(&first.id);
    let mut shell = Command::new("sh");
    let script = format!("exec 9>{}; exec \"$@\"", status.display());
    shell.args(["-c", &script, "sh"]).arg(command.get_program());
    let mut dump = shell.args(command.get_args()).spawn().unwrap();
    let mut byte = [1];
    let mut ready = fs::File::open(&status).unwrap();
    ready.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0]);

    let mut daemon = Command::new("criu");
    daemon.args([
        "lazy-pages",
        "--page-server",
        "--address",
        "127.0.0.1",
        "--port",
        &port,
    ]);
    daemon.arg("-D").arg(&place).arg("-W").arg(&work);
    let mut daemon = daemon.stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !work.join("lazy-pages.socket").exists() {
        assert!(start.elapsed() < PATIENCE, "nobody listens for faults");
        std::thread::yield_now();
    }
    let (images, work) = (place.to_str().unwrap(), work.to_str().unwrap());
    let verb = [
        "restore",
        "-d",
        "--lazy-pages",
        "--image-path",
        images,
        "--work-path",
        work,
    ];
    let mut other = Talk::start(&second, &verb);
    assert_eq!(other.say("two"), "1 two");
    assert!(daemon.wait().unwrap().success());
    assert!(dump.wait().unwrap().success());
    first.assert_nothing_is_left();
}

/// As its users do it: a container goes on where it was, and as another from an archive.
#[test]
fn podman_checkpoints_and_restores() {
    let has_podman = Command::new("podman").arg("--version").output().is_ok();
    if !(is_possible() && has_podman) {
        return;
    }
    let bundle = Bundle::new("true");
    let ended = bundle.script(
        r#"podman() {
            command podman --root $PWD/storage --runroot $PWD/run --storage-driver vfs --log-level error \
                --runtime ${R%% *} --cgroup-manager cgroupfs --events-backend none "$@"
        }
        export HOME=$PWD
        mkdir -p .config/containers
        echo '{"default": [{"type": "insecureAcceptAnything"}]}' >.config/containers/policy.json
        trap 'podman rm --force --time 0 --all >/dev/null' EXIT
        # Until a container has counted further than that, or for a while.
        reached() {
            for i in $(seq 200); do
                last=$(podman logs $1 | tail -n 1)
                [ "${last##* }" -gt $2 ] && return
            done
            echo "$1 is at $last" >&2
            false
        }
        tar -cf image.tar -C rootfs .
        podman import --quiet image.tar counting >/dev/null
        podman run --detach --name first --network none --memory 64m counting \
            sh -c 'read name </proc/sys/kernel/random/uuid; n=0
                while echo $name $n; do n=$((n+1)); sleep 0.1; done' >/dev/null
        reached first 0
        name=${last%% *}
        podman container checkpoint --export $PWD/archive.tar.gz first >/dev/null
        podman ps --all --format '{{.Names}} {{.ExitCode}}'
        reached first 0
        podman rm first >/dev/null
        podman container restore --import $PWD/archive.tar.gz --name second >/dev/null
        reached second ${last##* }
        podman ps --format '{{.Names}}'
        # What was in its memory still is.
        [ "${last%% *}" = "$name" ]"#,
    );
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(ended.stdout, "first 0\nsecond\n");
}

/// Whoever dies in the middle of a checkpoint or a restore leaves a container that runs or one that is
/// gone, and never half of one.
#[test]
fn a_runtime_that_is_killed_leaves_a_whole_container_or_none() {
    if !is_possible() {
        return;
    }
    let bundle = Bundle::new(COUNTING);
    let mut talk = Some(Talk::run(&bundle));
    let mut said = 0;
    for milliseconds in (0..600).step_by(120) {
        let place = images(&bundle, "images");
        let arguments = ["checkpoint", "--image-path", place.to_str().unwrap()];
        killed_after(bundle.command(&arguments).arg(&bundle.id), milliseconds);
        wait_for_criu(&place);
        let state = bundle.verb(&["state"], &[]);
        let runs = state.stdout.contains("running");
        if let (Some(talk), true) = (&mut talk, runs) {
            assert_eq!(talk.say("on"), format!("{said} on"), "{milliseconds} ms");
            said += 1;
            continue;
        }
        // It was dumped, whether there was still somebody to delete it or not.
        let ended = bundle.verb(&["delete", "--force"], &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
        bundle.assert_nothing_is_left();
        let mut restored = Talk::restore(&bundle, &place);
        assert_eq!(
            restored.say("on"),
            format!("{said} on"),
            "{milliseconds} ms"
        );
        said += 1;
        talk = Some(restored);
    }
    let place = images(&bundle, "last");
    assert_checkpointed(&bundle, &place, &[]);
    for milliseconds in (0..600).step_by(120) {
        let images = place.to_str().unwrap();
        let arguments = ["restore", "--detach", "--image-path", images];
        killed_after(bundle.command(&arguments).arg(&bundle.id), milliseconds);
        wait_for_criu(&place);
        let state = bundle.verb(&["state"], &[]);
        let group = format!("/sys/fs/cgroup/{}/cgroup.procs", bundle.id);
        let members = fs::read_to_string(group).unwrap_or_default();
        let runs = state.stdout.contains("\"running\"");
        assert_eq!(
            runs,
            !members.is_empty(),
            "{milliseconds} ms: {state:?}, {members}"
        );
        let ended = bundle.verb(&["delete", "--force"], &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
        bundle.assert_nothing_is_left();
    }
}

fn killed_after(command: &mut Command, milliseconds: u64) {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(milliseconds));
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
    child.wait().unwrap();
}

/// Waits until no CRIU has these images open.
fn wait_for_criu(images: &Path) {
    let uses = |process: &Path| {
        let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
        let links = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let mut targets = links.filter_map(|link| fs::read_link(link.path()).ok());
        name.trim_end() == "criu" && targets.any(|target| target.starts_with(images))
    };
    let start = Instant::now();
    loop {
        let processes = fs::read_dir("/proc")
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let users: Vec<PathBuf> = processes.filter(|process| uses(process)).collect();
        if users.is_empty() {
            return;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "{users:?} still uses the images"
        );
        std::thread::yield_now();
    }
}
