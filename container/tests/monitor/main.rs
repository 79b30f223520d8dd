//! The monitor, as a daemon sees it: real containers, the real program, and its socket. Needs root.
//!
//! The containers' root has nothing but the host's /usr, read-only.
//!
//! UNSAFETY: the program in the empty root takes the descriptors that it was started with.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![expect(unsafe_code, reason = "inherited descriptors have no owner yet")]

mod instance;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::UnixStream,
};

use container::monitor::protocol::{Descriptor, Frame, Ready, Request, Response};
use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use instance::Instance;

fn exited(code: i32) -> Option<Frame> {
    Some(Frame::Exit {
        code: Some(code),
        signal: None,
        oom: false,
    })
}

#[test]
fn a_process_that_ends_at_once_leaves_its_status_and_its_last_words() {
    let mut instance = Instance::started("echo out; echo err >&2; exit 7");
    let record = instance.end();
    assert_eq!(
        (record.code, record.signal, record.oom),
        (Some(7), None, false)
    );
    let mut log = instance.log();
    log.sort();
    let line = |stream: &str, text: &str| (stream.to_owned(), text.to_owned());
    assert_eq!(log, [line("stderr", "err\n"), line("stdout", "out\n")]);
}

#[test]
fn a_client_that_is_awaited_hears_the_first_word_of_the_shortest_life() {
    let mut instance = Instance::new("echo first; exit 3");
    instance.spec.await_client = true;
    instance.start();
    let mut client = instance.attach(false);
    assert_eq!(client.read_until("\n"), "first\n");
    assert_eq!(client.receive(), exited(3));
    assert_eq!(instance.end().code, Some(3));
}

#[test]
fn output_larger_than_a_pipe_right_before_the_end_is_all_logged() {
    let mut instance = Instance::started("head -c 1000000 /dev/zero | tr '\\0' x; echo; echo end");
    assert_eq!(instance.end().code, Some(0));
    let log = instance.log();
    assert_eq!(log.last().unwrap().1, "end\n");
    let bytes: usize = log.iter().map(|(_, text)| text.len()).sum();
    assert_eq!(bytes, 1_000_005);
}

#[test]
fn the_log_is_renamed_when_it_is_full() {
    let mut instance =
        Instance::new("i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done");
    instance.spec.log.bytes_max = 20_000;
    instance.start();
    assert_eq!(instance.end().code, Some(0));
    assert_eq!(instance.log().last().unwrap().1, "line 1999\n");
    for name in ["log", "log.1"] {
        assert!(fs::metadata(instance.path(name)).unwrap().len() <= 20_000);
    }
}

#[test]
fn input_is_passed_on_to_its_end_by_one_client_at_a_time() {
    let mut instance = Instance::new("read line; echo \"$line\"; wc -c; echo done");
    instance.spec.stdin = true;
    instance.start();
    let mut first = instance.attach(true);
    let mut watcher = instance.attach(false);
    first.type_in("hello\n");
    first.read_until("hello\n");
    let refused = instance.ask(&Request::Attach { stdin: true });
    assert!(matches!(refused, Response::Error { .. }), "{refused:?}");
    // Much more than pipe and queue hold, while the process takes it.
    let text = "x".repeat(100_000);
    for _ in 0..20 {
        first.type_in(&text);
    }
    // Its place is free once the monitor has passed everything on, and not before.
    drop(first);
    watcher.read_until("hello\n");
    let mut second = loop {
        let mut second = instance.connect(&Request::Attach { stdin: true });
        if second.receive() == Some(Response::Done {}) {
            break second;
        }
    };
    second.type_in("second\n");
    second.type_in("");
    second.read_until("2000007\ndone\n");
    assert_eq!(second.receive(), exited(0));
    assert_eq!(watcher.read_all().1, exited(0));
    assert_eq!(instance.end().code, Some(0));
}

#[test]
fn without_input_the_process_reads_end_of_file() {
    let mut instance = Instance::started("cat; echo done");
    assert_eq!(instance.end().code, Some(0));
    assert_eq!(instance.log()[0].1, "done\n");
    let mut instance = Instance::started("sleep 60");
    let refused = instance.ask(&Request::Attach { stdin: true });
    assert!(matches!(refused, Response::Error { .. }), "{refused:?}");
    instance.kill();
}

#[test]
fn a_terminal_has_a_size_and_an_end_of_input() {
    let script = "read line; stty size; read line; tty; cat; echo over";
    let mut instance = Instance::new(script);
    instance.spec.stdin = true;
    instance.config["process"]["terminal"] = json!(true);
    instance.start();
    let mut client = instance.attach(true);
    assert_eq!(
        instance.ask(&Request::Resize { rows: 33, cols: 77 }),
        Response::Done {}
    );
    client.type_in("\n");
    client.read_until("33 77");
    client.send(&Frame::Resize { rows: 20, cols: 50 });
    client.type_in("\n");
    client.read_until("/dev/pts/0");
    client.type_in("");
    client.read_until("over");
    assert_eq!(client.read_all().1, exited(0));
    assert_eq!(instance.end().code, Some(0));
    assert!(instance.log().iter().all(|(stream, _)| stream == "stdout"));
}

#[test]
fn a_client_that_goes_in_the_middle_is_nothing_to_the_process() {
    let mut instance = Instance::new(
        "cat > /dev/null & while read line; do :; done; \
                                      head -c 3000000 /dev/zero; exit 3",
    );
    instance.spec.stdin = true;
    instance.start();
    for _ in 0..3 {
        drop(instance.attach(true));
        let mut half = UnixStream::connect(instance.path("monitor.sock")).unwrap();
        half.write_all(b"{\"atta").unwrap();
    }
    let mut client = instance.attach(true);
    client.type_in("");
    let mut piece = [0; 1000];
    client.reader.get_mut().read_exact(&mut piece).unwrap();
    drop(client);
    assert_eq!(instance.end().code, Some(3));
}

#[test]
fn a_client_that_does_not_read_is_dropped_and_the_process_goes_on() {
    let mut instance = Instance::new("read line; head -c 20000000 /dev/zero | tr '\\0' x");
    instance.spec.stdin = true;
    instance.start();
    let mut deaf = instance.attach(false);
    let mut watcher = instance.attach(true);
    watcher.type_in("\n");
    assert_eq!(watcher.read_all(), (20_000_000, exited(0)));
    assert_eq!(instance.end().code, Some(0));
    let (count, last) = deaf.read_all_lossy();
    assert!(count < 20_000_000 && last.is_none(), "{count} {last:?}");
}

#[test]
fn a_killed_process_is_waited_for_and_the_connection_tells_when_all_is_gone() {
    let mut instance = Instance::new("sleep 60");
    let pid = instance.start();
    let mut waiting = instance.connect(&Request::Wait {});
    let Response::Running {
        pid: told,
        start_time,
    } = instance.ask(&Request::State {})
    else {
        panic!("it runs");
    };
    assert_eq!(told, pid);
    assert!(start_time > 0);
    let nonsense = instance.ask(&Request::Kill { signal: 1000 });
    assert!(matches!(nonsense, Response::Error { .. }), "{nonsense:?}");
    assert_eq!(
        instance.ask(&Request::Kill { signal: 9 }),
        Response::Done {}
    );
    let Some(Response::Exited(record)) = waiting.receive() else {
        panic!("it has ended");
    };
    assert_eq!(record.signal, Some(9));
    assert_eq!(waiting.receive::<Response>(), None);
    instance.assert_nothing_is_left();
    assert_eq!(instance.end(), record);
}

#[test]
fn want_of_memory_is_in_the_record() {
    let mut instance = Instance::new("exec tail /dev/zero");
    instance.config["linux"]["resources"] =
        json!({ "memory": { "limit": 32 << 20, "swap": 32 << 20 } });
    instance.start();
    let record = instance.end();
    assert_eq!((record.signal, record.oom), (Some(9), true));
}

#[test]
fn a_bad_request_is_answered_with_what_is_wrong() {
    let mut instance = Instance::started("sleep 60");
    for bad in [
        "nonsense",
        r#"{"kill":{}}"#,
        r#"{"kill":{"signal":1,"more":2}}"#,
    ] {
        let mut stream = UnixStream::connect(instance.path("monitor.sock")).unwrap();
        stream.write_all(format!("{bad}\n").as_bytes()).unwrap();
        let text = std::io::read_to_string(stream).unwrap();
        let response: Response = serde_json::from_str(&text).unwrap();
        assert!(matches!(response, Response::Error { .. }), "{text}");
    }
    let mut endless = UnixStream::connect(instance.path("monitor.sock")).unwrap();
    let sent = endless.write_all(&vec![b'x'; 10 << 20]);
    assert!(sent.is_err(), "a line without an end is cut off");
    instance.kill();
}

#[test]
fn what_stops_a_service_does_not_stop_the_workload() {
    let mut instance = Instance::started("sleep 60");
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        kill(instance.monitor_pid(), signal).unwrap();
    }
    instance.assert_running();
    assert_eq!(instance.kill().signal, Some(9));
}

#[test]
fn a_directory_has_one_monitor() {
    let mut instance = Instance::started("sleep 60");
    let (mut second, ready) = instance.spawn();
    assert!(!second.wait().unwrap().success());
    let Ready::Failed { message, .. } = ready else {
        panic!("{ready:?}");
    };
    assert!(message.contains("already has a monitor"), "{message}");
    instance.assert_running();
    instance.kill();
}

#[test]
fn a_killed_monitor_leaves_the_workload_and_its_absence_is_seen() {
    let mut instance = Instance::new("sleep 60");
    let pid = Pid::from_raw(instance.start());
    let is_free = |instance: &Instance| {
        let file = File::open(instance.path("monitor.json")).unwrap();
        Flock::lock(file, FlockArg::LockSharedNonblock).is_ok()
    };
    assert!(!is_free(&instance));
    kill(instance.monitor_pid(), Signal::SIGKILL).unwrap();
    instance.monitor.as_mut().unwrap().wait().unwrap();
    instance.monitor = None;
    assert!(is_free(&instance));
    assert!(!instance.path("exit.json").exists());
    assert_eq!(kill(pid, None), Ok(()), "the workload runs on");
    instance.delete();
    instance.assert_nothing_is_left();
    // And the same directory can be used again.
    instance.start();
    instance.assert_running();
    assert_eq!(instance.kill().signal, Some(9));
}

#[test]
fn a_workload_that_does_not_start_leaves_nothing() {
    let mut missing = Instance::new("");
    missing.config["process"]["args"] = json!(["/no/such/program"]);
    let mut unfound = Instance::new("");
    unfound.config["process"]["args"] = json!(["no-such-program"]);
    let mut folder = Instance::new("");
    folder.config["process"]["args"] = json!(["/usr"]);
    let mut directory = Instance::new("true");
    directory.config["process"]["cwd"] = json!("/proc/version");
    let mut limit = Instance::new("true");
    limit.config["linux"]["resources"] = json!({ "cpu": { "cpus": "banana" } });
    let mut descriptor = Instance::new("true");
    descriptor.spec.descriptors = vec![
        Descriptor::Listener {
            path: descriptor.path("listener"),
        },
        Descriptor::Create {
            path: descriptor.path("created"),
        },
        Descriptor::File {
            path: "/no/such/file".into(),
            write: false,
        },
    ];
    let mut log = Instance::new("true");
    log.spec.log.bytes_max = 0;
    for (instance, part, code) in [
        (missing, "/no/such/program", Some(127)),
        (unfound, "no-such-program", Some(127)),
        (folder, "/usr", Some(126)),
        (directory, "/proc/version", None),
        (limit, "linux.resources.cpu.cpus", None),
        (descriptor, "descriptors[2]", None),
        (log, "log.bytes_max", None),
    ] {
        let (mut monitor, ready) = instance.spawn();
        let Ready::Failed { message, exit_code } = ready else {
            panic!("{ready:?}");
        };
        assert!(message.contains(part), "{message}");
        assert_eq!(exit_code, code, "{message}");
        assert!(!monitor.wait().unwrap().success());
        instance.assert_nothing_is_left();
        for trace in ["monitor.sock", "exit.json", "listener", "created"] {
            assert!(!instance.path(trace).exists(), "{trace}");
        }
    }
}

/// What the next test runs in a container that has nothing but this program.
const CONFINED: &str = "HOSTD_TEST_CONFINED";

#[test]
fn a_program_of_the_host_runs_in_an_empty_root_with_its_descriptors() {
    if std::env::var_os(CONFINED).is_some() {
        return confined();
    }
    let mut instance = Instance::new("");
    fs::remove_dir_all(instance.path("bundle/rootfs")).unwrap();
    fs::create_dir(instance.path("bundle/rootfs")).unwrap();
    fs::write(instance.path("input"), "from the host").unwrap();
    let name = "a_program_of_the_host_runs_in_an_empty_root_with_its_descriptors";
    instance.config["process"]["args"] = json!(["test", "--exact", name, "--test-threads=1"]);
    instance.config["process"]["env"] = json!([format!("{CONFINED}=1")]);
    instance.config["mounts"] = json!([]);
    instance.spec.executable = Some(std::env::current_exe().unwrap());
    instance.spec.descriptors = vec![
        Descriptor::File {
            path: instance.path("input"),
            write: false,
        },
        Descriptor::Create {
            path: instance.path("created"),
        },
        Descriptor::Listener {
            path: instance.path("listener"),
        },
    ];
    instance.start();
    // The listener is the process's: who connects is queued until it accepts.
    let client = UnixStream::connect(instance.path("listener")).unwrap();
    assert_eq!(std::io::read_to_string(client).unwrap(), "from inside");
    assert_eq!(instance.end().code, Some(0));
    assert_eq!(
        fs::read_to_string(instance.path("created")).unwrap(),
        "from the host"
    );
}

/// Copies descriptor 3 to 4, answers at 5, and finds its root empty.
fn confined() {
    use std::os::{fd::FromRawFd, unix::net::UnixListener};
    // SAFETY: the container was started with this descriptor, which nobody else here knows.
    let mut input = unsafe { File::from_raw_fd(3) };
    // SAFETY: as above.
    let mut output = unsafe { File::from_raw_fd(4) };
    std::io::copy(&mut input, &mut output).unwrap();
    // SAFETY: as above.
    let listener = unsafe { UnixListener::from_raw_fd(5) };
    listener
        .accept()
        .unwrap()
        .0
        .write_all(b"from inside")
        .unwrap();
    let found: Vec<_> = fs::read_dir("/")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(
        found
            .iter()
            .all(|path| path.ends_with("dev") || path.ends_with("proc")),
        "{found:?}"
    );
}
