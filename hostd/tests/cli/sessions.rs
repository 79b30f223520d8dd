//! Streams, signals and statuses of `run`, `attach` and `exec`.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, Output, Stdio};
use std::thread;

use hostd::api::types::{InstanceSpec, Isolation, NetworkMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::fake_hostd::FakeHostd;

/// Runs hostctl to its end with this input.
fn with_input(hostd: &FakeHostd, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = hostd
        .command(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // Written beside, since a pipe is shorter than some inputs. Who wants no input may be gone by then.
    let writer = thread::spawn(move || match stdin.write_all(&input) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written.unwrap(),
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

fn texts(output: &Output) -> (String, String, Option<i32>) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        text(&output.stdout),
        text(&output.stderr),
        output.status.code(),
    )
}

#[test]
fn a_run_loses_no_early_output_and_ends_as_its_workload() {
    let hostd = FakeHostd::start();
    let run = [
        "run", "-i", "--rm", "--name", "job", "busybox", "early", "3",
    ];
    let output = with_input(&hostd, &run, b"in\n");
    assert_eq!(
        texts(&output),
        ("early\nin\n".into(), "bye\n".into(), Some(3))
    );
    let requests = hostd.requests();
    assert_eq!(
        requests,
        [
            "POST /v1/instances",
            "GET /v1/instances/job/attach?stdin=true",
            "POST /v1/instances/job/start",
        ]
    );
}

#[test]
fn the_flags_of_run_become_the_instance() {
    let hostd = FakeHostd::start();
    let output = hostd.hostctl(&[
        "run",
        "-d",
        "--name",
        "web",
        "--isolation",
        "vm",
        "--cpus",
        "0.5",
        "--memory",
        "256M",
        "-p",
        "8080:80",
        "-v",
        "/srv:/data:ro",
        "-e",
        "A=b",
        "-u",
        "1:2",
        "-w",
        "/tmp",
        "--hostname",
        "here",
        "--label",
        "tier=web",
        "--restart",
        "on-failure",
        "--entrypoint",
        "/bin/sh",
        "--network",
        "none",
        "busybox",
        "-c",
        "exit",
    ]);
    assert_eq!(texts(&output), ("web\n".into(), String::new(), Some(0)));
    let spec = hostd.known.lock().unwrap().instances["web"].spec.clone();
    assert_eq!(spec.isolation, Isolation::Vm);
    assert_eq!(spec.limits.memory.max, Some(256 << 20));
    assert_eq!(spec.network.mode, NetworkMode::None);
    assert_eq!(spec.network.ports[0].host, 8080);
    assert!(spec.mounts[0].read_only && spec.mounts[0].target == "/data");
    assert_eq!(spec.entrypoint.unwrap(), ["/bin/sh"]);
    assert_eq!(spec.command.unwrap(), ["-c", "exit"]);
    assert_eq!(spec.labels["tier"], "web");
    assert!(!spec.tty && !spec.stdin && !spec.auto_remove);
}

#[test]
fn a_start_that_is_refused_is_told_and_leaves_nothing() {
    let hostd = FakeHostd::start();
    let output = hostd.hostctl(&["run", "--name", "job", "busybox", "absent"]);
    let (_, stderr, code) = texts(&output);
    assert_eq!(code, Some(127));
    assert!(stderr.contains("there is no such program"), "{stderr}");
    assert!(hostd.known.lock().unwrap().instances.is_empty());
}

#[test]
fn exec_passes_megabytes_and_statuses_on() {
    let hostd = FakeHostd::start();
    hostd.has("web", &InstanceSpec::default());
    let input = vec![b'x'; 3 << 20];
    let output = with_input(&hostd, &["exec", "-i", "web", "count"], &input);
    assert_eq!(
        texts(&output),
        (format!("{}\n", 3 << 20), String::new(), Some(0))
    );
    let output = with_input(&hostd, &["exec", "web", "count"], b"not asked for");
    assert_eq!(
        texts(&output).0,
        "0\n",
        "without -i the process reads end of file"
    );
    let output = hostd.hostctl(&["exec", "web", "absent"]);
    let expected = (
        "".into(),
        "error: absent: no such program\n".into(),
        Some(127),
    );
    assert_eq!(texts(&output), expected);
}

/// Starts hostctl and waits until its workload has said something, so that it surely listens.
fn until_it_speaks(mut child: Child) -> Child {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "early\n");
    child
}

#[test]
fn a_signal_to_hostctl_is_the_workloads() {
    let hostd = FakeHostd::start();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let child = hostd.command(&["run", "busybox", "early"]).spawn().unwrap();
        let mut child = until_it_speaks(child);
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        let code = child.wait().unwrap().code();
        assert_eq!(code, Some(128 + signal as i32), "{signal}");
    }
}

#[test]
fn attach_joins_a_workload_that_runs() {
    let hostd = FakeHostd::start();
    let command = Some(vec!["early".to_owned(), "5".to_owned()]);
    hostd.has(
        "web",
        &InstanceSpec {
            command,
            stdin: true,
            ..InstanceSpec::default()
        },
    );
    let output = with_input(&hostd, &["attach", "web"], b"typed\n");
    assert_eq!(
        texts(&output),
        ("early\ntyped\n".into(), "bye\n".into(), Some(5))
    );
}

#[test]
fn a_console_shows_and_takes_what_is_typed_and_containers_have_none() {
    let hostd = FakeHostd::start();
    hostd.has("web", &InstanceSpec::default());
    hostd.has_vm("box");
    let output = with_input(&hostd, &["console", "box"], b"typed\n");
    assert_eq!(
        texts(&output),
        ("early\ntyped\n".into(), "bye\n".into(), Some(0))
    );
    let (_, stderr, code) = texts(&hostd.hostctl(&["console", "web"]));
    assert_eq!(code, Some(125));
    assert!(stderr.contains("a container has no console"), "{stderr}");
    let watching = hostd.command(&["console", "--no-stdin", "box"]).spawn();
    let mut watching = until_it_speaks(watching.unwrap());
    let pid = Pid::from_raw(watching.id().cast_signed());
    kill(pid, Signal::SIGINT).unwrap();
    assert_eq!(watching.wait().unwrap().code(), Some(130));
    assert_eq!(
        hostd.requests(),
        [
            "GET /v1/instances/box/console?stdin=true",
            "GET /v1/instances/web/console?stdin=true",
            "GET /v1/instances/box/console",
        ]
    );
}

#[test]
fn a_terminal_cannot_be_asked_for_without_having_one() {
    let hostd = FakeHostd::start();
    hostd.has("web", &InstanceSpec::default());
    for arguments in [
        &["run", "-it", "busybox", "sh"][..],
        &["exec", "-it", "web", "sh"],
    ] {
        let (_, stderr, code) = texts(&hostd.hostctl(arguments));
        assert_eq!(code, Some(125));
        assert!(stderr.contains("not a terminal"), "{stderr}");
    }
    assert_eq!(
        hostd.requests(),
        Vec::<String>::new(),
        "nothing was created"
    );
}
