//! Readiness for a service manager: NOTIFY_SOCKET.

use std::fs;
use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::json;

use crate::bundle::{Bundle, Ended, PATIENCE, finish, finish_child, is_own};
use crate::namespaces::with_user_namespace;

/// In the container: has busybox's logger say a line to the runtime. It knows no socket but /dev/log, and
/// writes a line of its own before.
const SAY: &str = r#"busybox ln -s "$NOTIFY_SOCKET" /dev/log
say() { busybox logger "$(echo; echo "$1")"; }
"#;

const PLACE: &str = "/run/notify/notify.sock";

/// A service manager: its socket, and where that is.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Manager {
    fn new(bundle: &Bundle) -> Manager {
        let path = bundle.path().join("manager");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Manager { socket, path }
    }

    /// The next message, with what came with it closed.
    fn hear(&self) -> String {
        let mut bytes = [0; 4096];
        loop {
            match self.socket.recv(&mut bytes) {
                // Where it may take only so long, the kernel does not begin again by itself.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                length => return String::from_utf8_lossy(&bytes[..length.unwrap()]).into_owned(),
            }
        }
    }

    /// Hears that the container is ready, and lets its starter end.
    fn hears_all_of(&self, starter: Child) {
        assert_eq!(self.hear(), "READY=1");
        assert!(self.hear().starts_with("MAINPID="));
        assert_eq!(self.hear(), "BARRIER=1");
        assert_eq!(finish_child(starter).status, 0);
    }

    fn assert_hears_nothing_more(&self) {
        self.socket.set_nonblocking(true).unwrap();
        let error = self.socket.recv(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}

/// A verb on the container for this manager; its own streams, which the container has too, are none of ours.
fn verb(bundle: &Bundle, verb: &[&str], manager: &Path) -> Command {
    let mut command = bundle.command(verb);
    command.arg(&bundle.id).env("NOTIFY_SOCKET", manager);
    command.stdout(Stdio::null());
    command.stderr(fs::File::create(bundle.path().join("errors")).unwrap());
    command
}

fn done(bundle: &Bundle, words: &[&str], manager: &Path) -> Ended {
    let ended = finish_child(verb(bundle, words, manager).spawn().unwrap());
    let stderr = fs::read_to_string(bundle.path().join("errors")).unwrap();
    Ended { stderr, ..ended }
}

fn created(script: &str) -> (Bundle, Manager) {
    let bundle = Bundle::new(&format!("{SAY}{script}"));
    let manager = Manager::new(&bundle);
    let ended = done(&bundle, &["create"], &manager.path);
    assert_eq!(ended.status, 0, "{ended:?}");
    (bundle, manager)
}

/// Where the runtime listens, seen from the host.
fn place(bundle: &Bundle) -> PathBuf {
    bundle.states().join(&bundle.id).join("notify/notify.sock")
}

/// A socket that is connected to the runtime's, once somebody listens there.
fn connected(bundle: &Bundle) -> UnixDatagram {
    let socket = UnixDatagram::unbound().unwrap();
    let start = Instant::now();
    while let Err(error) = socket.connect(place(bundle)) {
        assert!(start.elapsed() < PATIENCE, "nobody listens: {error}");
        std::thread::yield_now();
    }
    socket
}

fn is_running(child: &mut Child) -> bool {
    child.try_wait().unwrap().is_none()
}

#[test]
fn a_container_in_the_foreground_says_that_it_is_ready_and_nothing_else() {
    let bundle = Bundle::new(&format!(
        r#"{SAY}echo "$NOTIFY_SOCKET"
        touch /run/notify/other 2>/dev/null || echo read-only
        say STATUS=starting; say READY=0; say READY=1; say READY=1; say MAINPID=1; say STOPPING=1"#
    ));
    let manager = Manager::new(&bundle);
    let mut command = bundle.command(&["run"]);
    command.arg(&bundle.id).env("NOTIFY_SOCKET", &manager.path);
    let hears = std::thread::spawn(move || {
        let heard = [manager.hear(), manager.hear()];
        (heard, manager)
    });
    let ended = finish(command);
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(ended.stdout, format!("{PLACE}\nread-only\n"), "{ended:?}");
    let (heard, manager) = hears.join().unwrap();
    // The service is still this program, so no other process is named.
    assert_eq!(heard, ["READY=1", "BARRIER=1"]);
    manager.assert_hears_nothing_more();
    bundle.assert_nothing_is_left();
}

#[test]
fn start_and_a_detached_run_wait_until_the_manager_knows_that_the_container_is_ready() {
    for words in [&["start"][..], &["run", "--detach"]] {
        let bundle = Bundle::new(&format!("{SAY}say READY=1; exec sleep 100"));
        let manager = Manager::new(&bundle);
        if words == ["start"] {
            let ended = done(&bundle, &["create"], &manager.path);
            assert_eq!(ended.status, 0, "{ended:?}");
        }
        let mut starter = verb(&bundle, words, &manager.path).spawn().unwrap();
        assert_eq!(manager.hear(), "READY=1");
        let pid = &bundle.state()["pid"];
        assert_eq!(manager.hear(), format!("MAINPID={pid}"));
        // As long as the barrier is not read.
        assert!(is_running(&mut starter));
        assert_eq!(manager.hear(), "BARRIER=1");
        assert_eq!(finish_child(starter).status, 0);
        manager.assert_hears_nothing_more();
        assert_eq!(bundle.state()["status"], "running");
        let ended = bundle.verb(&["delete", "--force"], &[]);
        assert_eq!(ended.status, 0, "{ended:?}");
        bundle.assert_nothing_is_left();
    }
}

#[test]
fn a_container_that_ends_is_not_waited_for_but_heard() {
    let (bundle, manager) = created("exit 3");
    let ended = done(&bundle, &["start"], &manager.path);
    assert_eq!(ended.status, 0, "{ended:?}");
    manager.assert_hears_nothing_more();

    let (bundle, manager) = created("say READY=1");
    let starter = verb(&bundle, &["start"], &manager.path).spawn().unwrap();
    manager.hears_all_of(starter);
}

#[test]
fn what_else_is_sent_has_no_effect() {
    let (bundle, manager) = created("exec sleep 100");
    let mut starter = verb(&bundle, &["start"], &manager.path).spawn().unwrap();
    let socket = connected(&bundle);
    for bytes in [
        &b""[..],
        b"READY",
        b"READY=1READY=1",
        b"X=\0READY=1",
        b"\xff\xfe\n\n",
        &[&b"READY=1\n"[..], &[b'x'; 60_000]].concat(),
    ] {
        socket.send(bytes).unwrap();
    }
    // More than fit into any queue: they are read.
    for _ in 0..2000 {
        socket.send(b"WATCHDOG=1").unwrap();
    }
    // A descriptor that nobody holds on to.
    let (reader, writer) = io::pipe().unwrap();
    let descriptors = [writer.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
    let text = [IoSlice::new(b"BARRIER=1")];
    sendmsg(&socket, &text, &mut ancillary, SendFlags::empty()).unwrap();
    drop(writer);
    assert_eq!(io::read_to_string(reader).unwrap(), "");

    assert!(is_running(&mut starter));
    manager.assert_hears_nothing_more();
    manager.socket.set_nonblocking(false).unwrap();
    socket.send(b"STATUS=up\nREADY=1\nMAINPID=1").unwrap();
    assert_eq!(manager.hear(), "READY=1");
    assert_eq!(manager.hear(), format!("MAINPID={}", bundle.state()["pid"]));
    assert_eq!(manager.hear(), "BARRIER=1");
    assert_eq!(finish_child(starter).status, 0);
}

#[test]
fn a_starter_that_is_killed_leaves_a_container_that_runs_and_is_deleted_as_any_other() {
    let (bundle, manager) = created("exec sleep 100");
    let mut starter = verb(&bundle, &["start"], &manager.path).spawn().unwrap();
    connected(&bundle);
    bundle.wait_for_one_of(&["running"]);
    // Nobody listens in its place.
    let ended = done(&bundle, &["start"], &manager.path);
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(is_running(&mut starter));
    starter.kill().unwrap();
    starter.wait().unwrap();
    assert_eq!(bundle.state()["status"], "running");
    let socket = UnixDatagram::unbound().unwrap();
    let refused = socket.connect(place(&bundle)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let ended = bundle.verb(&["delete", "--force"], &[]);
    assert_eq!(ended.status, 0, "{ended:?}");
    bundle.assert_nothing_is_left();
    manager.assert_hears_nothing_more();
}

#[test]
fn a_socket_that_a_starter_left_is_not_in_the_way_of_the_next() {
    let (bundle, manager) = created("say READY=1; exec sleep 100");
    drop(UnixDatagram::bind(place(&bundle)).unwrap());
    let starter = verb(&bundle, &["start"], &manager.path).spawn().unwrap();
    manager.hears_all_of(starter);
}

#[test]
fn only_who_starts_for_a_manager_what_was_created_for_one_waits() {
    let (bundle, manager) = created("exec sleep 100");
    let ended = bundle.quiet(&["start"]);
    assert_eq!(ended.status, 0, "{ended:?}");
    manager.assert_hears_nothing_more();

    let bundle = Bundle::new("exec sleep 100");
    let manager = Manager::new(&bundle);
    let ended = bundle.quiet(&["create"]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let ended = done(&bundle, &["start"], &manager.path);
    assert_eq!(ended.status, 0, "{ended:?}");
    manager.assert_hears_nothing_more();
}

#[test]
fn a_manager_that_is_not_there_is_warned_of() {
    let (bundle, manager) = created("say READY=1; exec sleep 100");
    fs::remove_file(&manager.path).unwrap();
    let ended = done(&bundle, &["start"], &manager.path);
    assert_eq!(ended.status, 0, "{ended:?}");
    let words = "warning: NOTIFY_SOCKET: cannot tell the service manager: no such file";
    assert!(!is_own() || ended.stderr.contains(words), "{ended:?}");
    assert_eq!(bundle.state()["status"], "running");
}

#[test]
fn an_address_that_is_none_is_refused_and_an_empty_one_is_none() {
    let bundle = Bundle::new("echo \"<$NOTIFY_SOCKET>\"");
    let run = |value: &str| {
        let mut command = bundle.command(&["run"]);
        command.arg(&bundle.id).env("NOTIFY_SOCKET", value);
        finish(command)
    };
    let ended = run("");
    assert_eq!(ended.stdout, "<>\n", "{ended:?}");
    let ended = run("vsock:2:1234");
    assert_eq!((ended.status, ended.stdout.as_str()), (1, ""), "{ended:?}");
    let words = "NOTIFY_SOCKET: `vsock:2:1234`: it must be an absolute path, or `@` and a name";
    assert!(ended.stderr.contains(words), "{ended:?}");
    bundle.assert_nothing_is_left();
}

#[test]
fn a_program_without_rights_in_a_user_namespace_of_its_own_can_say_it() {
    let bundle = Bundle::new(&format!("{SAY}say READY=1; exec sleep 100"));
    let bundle = with_user_namespace(bundle).with(|config| {
        config["process"]["user"] = json!({"uid": 500, "gid": 500});
        config["process"]["capabilities"] = json!({});
        for mount in config["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/dev" {
                mount["options"] = json!(["mode=777"]);
            }
        }
    });
    // Whoever looks at the root is somebody else's user.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(bundle.path(), mode).unwrap();
    let manager = Manager::new(&bundle);
    let starter = verb(&bundle, &["run", "--detach"], &manager.path).spawn();
    manager.hears_all_of(starter.unwrap());
}

#[test]
fn hooks_and_exec_have_nothing_to_do_with_it() {
    let bundle = Bundle::new("exec sleep 100").with(|config| {
        let hook = |name: &str| {
            let script = format!("echo {name} $NOTIFY_SOCKET >>hooks");
            json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
        };
        let kinds = ["createRuntime", "poststart", "poststop"];
        config["hooks"] = kinds.iter().map(|kind| (*kind, hook(kind))).collect();
    });
    let heard = || fs::read_to_string(bundle.path().join("hooks")).unwrap();
    let manager = Manager::new(&bundle);
    for words in [&["create"][..], &["start"], &["delete", "--force"]] {
        let mut starter = verb(&bundle, words, &manager.path).spawn().unwrap();
        if words == ["start"] {
            connected(&bundle);
            bundle.wait_for_status("running");
            let mut exec = verb(&bundle, &["exec"], &manager.path);
            exec.args(["sh", "-c", "echo \"<$NOTIFY_SOCKET>\""]);
            exec.stdout(Stdio::piped());
            let output = exec.spawn().unwrap().wait_with_output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "<>\n");
            // It runs before its hooks do.
            let start = Instant::now();
            while !heard().contains("poststart") {
                assert!(start.elapsed() < PATIENCE, "{}", heard());
                std::thread::yield_now();
            }
            starter.kill().unwrap();
            starter.wait().unwrap();
        } else {
            assert_eq!(finish_child(starter).status, 0);
        }
    }
    let path = manager.path.display();
    let expected = ["createRuntime", "poststart", "poststop"].map(|kind| format!("{kind} {path}"));
    assert_eq!(heard().lines().collect::<Vec<_>>(), expected);
    manager.assert_hears_nothing_more();
}
