//! From create to delete: states, signals, races, crashes and what is said when something is wrong.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use container::cgroup::Cgroup;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::bundle::{Bundle, finish_child};

#[test]
fn a_container_goes_from_created_to_running_to_stopped_to_gone() {
    let bundle = Bundle::new("echo ran >/out; while true; do sleep 1; done")
        .with(|config| config["root"]["readonly"] = json!(false));
    let pid_file = bundle.path().join("pid");
    let ended = bundle.quiet(&["create", "--pid-file", pid_file.to_str().unwrap()]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let state = bundle.state();
    assert_eq!(state["status"], "created");
    assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
    assert_eq!(
        fs::read_to_string(pid_file).unwrap(),
        state["pid"].to_string()
    );
    assert!(
        !bundle.rootfs().join("out").exists(),
        "the program ran before start"
    );

    assert_eq!(bundle.verb(&["start"], &[]).status, 0);
    bundle.wait_for_status("running");
    let message = bundle.verb(&["start"], &[]).stderr;
    assert!(message.contains("it is running, not created"), "{message}");
    let message = bundle.verb(&["delete"], &[]).stderr;
    assert!(message.contains("it is running, not stopped"), "{message}");

    assert_eq!(bundle.verb(&["kill"], &["KILL"]).status, 0);
    bundle.wait_for_status("stopped");
    assert_eq!(bundle.state()["pid"], 0);
    let message = bundle.verb(&["kill"], &["KILL"]).stderr;
    assert!(message.contains("container not running"), "{message}");
    assert_eq!(bundle.verb(&["delete"], &[]).status, 0);
    bundle.assert_nothing_is_left();
    assert_eq!(bundle.verb(&["delete"], &[]).status, 1);
    assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
}

#[test]
fn the_exit_status_is_the_programs() {
    for (script, status) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 0),
        ("kill -9 $$; exit 3", 3),
    ] {
        // Process 1 is not killed by its own namespace's signals.
        assert_eq!(Bundle::new(script).run().status, status, "{script}");
    }
    let bundle = Bundle::new("exec sleep 100");
    let child = bundle.command(&["run"]).arg(&bundle.id).spawn().unwrap();
    // At first there is no container to ask for.
    let running = || bundle.verb(&["state"], &[]).stdout.contains("\"running\"");
    while !running() {
        std::thread::yield_now();
    }
    assert_eq!(bundle.verb(&["kill"], &["9"]).status, 0);
    assert_eq!(finish_child(child).status, 128 + 9);
    bundle.assert_nothing_is_left();
}

#[test]
fn a_container_that_exits_at_once_is_never_waited_for_in_vain() {
    let bundle = Bundle::new("unused").with(|config| config["process"]["args"] = json!(["true"]));
    for _ in 0..20 {
        assert_eq!(bundle.run().status, 0);
    }
    bundle.assert_nothing_is_left();
}

#[test]
fn signals_to_run_reach_the_program() {
    let bundle =
        Bundle::new("trap 'echo got; exit 3' USR1; echo ready; while true; do sleep 0.1; done");
    let mut command = bundle.command(&["run"]);
    let mut child = command
        .arg(&bundle.id)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "ready");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGUSR1).unwrap();
    assert_eq!(lines.next().unwrap().unwrap(), "got");
    assert_eq!(finish_child(child).status, 3);
}

#[test]
fn a_program_that_is_not_there_is_told_in_the_words_that_engines_look_for() {
    for (program, words) in [
        (
            "nope",
            "executable file `nope` not found in $PATH: no such file or directory",
        ),
        (
            "/bin/nope",
            "cannot exec `/bin/nope`: no such file or directory",
        ),
        ("/bin", "cannot exec `/bin`: permission denied"),
        ("/plain", "cannot exec `/plain`: permission denied"),
    ] {
        let bundle = Bundle::new("").with(|config| config["process"]["args"] = json!([program]));
        fs::write(bundle.rootfs().join("plain"), "text").unwrap();
        let message = bundle.refusal();
        assert!(message.contains(words), "{program}: {message}");
        let log = bundle.path().join("log");
        let mut command = bundle.command(&[]);
        command
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json", "create", &bundle.id]);
        assert!(!command.output().unwrap().status.success());
        let line: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(log).unwrap()).unwrap();
        assert_eq!(line["level"], "error");
        assert!(line["msg"].as_str().unwrap().contains(words), "{line}");
        bundle.assert_nothing_is_left();
    }
}

#[test]
fn what_the_kernel_cannot_execute_is_told_by_start() {
    let bundle = Bundle::new("").with(|config| config["process"]["args"] = json!(["/garbage"]));
    let path = bundle.rootfs().join("garbage");
    fs::write(&path, "\u{1}\u{2}\u{3}").unwrap();
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert_eq!(bundle.quiet(&["create"]).status, 0);
    let ended = bundle.verb(&["start"], &[]);
    assert_eq!(ended.status, 1);
    assert!(
        ended
            .stderr
            .contains("cannot exec `/garbage`: exec format error"),
        "{ended:?}"
    );
    bundle.wait_for_status("stopped");
}

#[test]
fn a_wrong_configuration_is_refused_with_its_field() {
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, Change); 8] = [
        ("ociVersion", |config| config["ociVersion"] = json!("2.0.0")),
        ("process.cwd", |config| {
            config["process"]["cwd"] = json!("relative");
        }),
        ("root.path", |config| {
            config["root"]["path"] = json!("nowhere");
        }),
        ("linux.namespaces[1]", |config| {
            config["linux"]["namespaces"][1] = json!({"type": "pid"});
        }),
        ("mounts[0].destination", |config| {
            config["mounts"][0]["destination"] = json!("");
        }),
        ("linux.rootfsPropagation", |config| {
            config["linux"]["rootfsPropagation"] = json!("loud");
        }),
        ("linux.intelRdt", |config| {
            config["linux"]["intelRdt"] = json!({"closID": "a"});
        }),
        ("process.user.uid", |config| {
            config["process"]["user"]["uid"] = json!("root");
        }),
    ];
    for (field, change) in cases {
        let message = Bundle::new("echo ran").with(change).refusal();
        assert!(message.contains(field), "{field}: {message}");
    }
}

#[test]
fn of_two_creates_of_one_id_exactly_one_succeeds() {
    let bundle = Bundle::new("sleep 100");
    for _ in 0..5 {
        let create = || {
            let mut command = bundle.command(&["create"]);
            command
                .arg(&bundle.id)
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command.spawn().unwrap()
        };
        let children = [create(), create(), create()];
        let ended = children.map(|mut child| child.wait().unwrap().success());
        assert_eq!(ended.iter().filter(|success| **success).count(), 1);
        assert_eq!(bundle.state()["status"], "created");
        assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
        bundle.assert_nothing_is_left();
    }
}

#[test]
fn of_two_starts_exactly_one_succeeds() {
    let bundle = Bundle::new("sleep 100");
    for _ in 0..5 {
        assert_eq!(bundle.quiet(&["create"]).status, 0);
        let start = || {
            let mut command = bundle.command(&["start"]);
            command
                .arg(&bundle.id)
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        let ended = [start(), start(), start()].map(finish_child);
        let started = ended.iter().filter(|ended| ended.status == 0).count();
        assert_eq!(started, 1, "{ended:?}");
        assert_eq!(bundle.state()["status"], "running");
        assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
    }
}

#[test]
fn a_creator_that_is_killed_leaves_nothing_that_runs_or_blocks_the_id() {
    let bundle = Bundle::new("sleep 100");
    for delay_microseconds in (0..8000).step_by(500) {
        let mut command = bundle.command(&["create"]);
        let mut child = command
            .arg(&bundle.id)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_micros(delay_microseconds));
        let _ = child.kill();
        let finished = child.wait().unwrap().success();
        if !finished && bundle.states().join(&bundle.id).join("state.json").exists() {
            // Created if all was done but for the creator's own end.
            bundle.wait_for_one_of(&["stopped", "created"]);
        }
        let ended = bundle.verb(&["delete", "--force"], &[]);
        assert_eq!(ended.status, 0, "after {delay_microseconds} us: {ended:?}");
        bundle.assert_nothing_is_left();
    }
    bundle.start();
}

#[test]
fn what_a_creator_left_that_was_killed_is_in_nobodys_way() {
    let bundle = Bundle::new("sleep 100");
    let (mark, pid) = (bundle.path().join("mark"), bundle.path().join("pid"));
    // The first process is recorded, and its creator waits for this hook; the second time it does not.
    let hook = format!(
        "[ ! -e {mark} ] || exit 0; touch {mark}; while [ -d /proc/$PPID ]; do sleep 0.01; done",
        mark = mark.display()
    );
    let bundle = bundle.with(|config| {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", hook]});
        config["hooks"] = json!({"createRuntime": [hook]});
    });
    let mut command = bundle.command(&["create"]);
    command.args(["--pid-file", pid.to_str().unwrap(), &bundle.id]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut creator = command.spawn().unwrap();
    while !mark.exists() {
        std::thread::yield_now();
    }
    let state = bundle.verb(&["state"], &[]);
    // In any case: it would wait for ever.
    creator.kill().unwrap();
    creator.wait().unwrap();
    assert!(state.stdout.contains("creating"), "{state:?}");
    bundle.wait_for_status("stopped");
    bundle.start();
    assert_eq!(bundle.state()["status"], "running");
}

#[test]
fn a_paused_container_can_be_resumed_and_deleted() {
    let bundle = Bundle::new("while true; do sleep 1; done");
    bundle.start();
    assert_eq!(bundle.verb(&["pause"], &[]).status, 0);
    assert_eq!(bundle.state()["status"], "paused");
    let message = bundle.verb(&["exec"], &["true"]).stderr;
    assert!(message.contains("it is paused"), "{message}");
    assert_eq!(bundle.verb(&["resume"], &[]).status, 0);
    assert_eq!(bundle.state()["status"], "running");
    assert_eq!(bundle.verb(&["pause"], &[]).status, 0);
    let ended = bundle.verb(&["delete", "--force"], &[]);
    assert_eq!(ended.status, 0, "{ended:?}");
    bundle.assert_nothing_is_left();
}

#[test]
fn a_container_that_was_never_started_ends_when_it_is_asked_to() {
    for signal in ["HUP", "INT", "QUIT", "TERM"] {
        let bundle = Bundle::new("echo ran >/dev/shm/ran");
        assert_eq!(bundle.quiet(&["create"]).status, 0);
        assert_eq!(bundle.verb(&["kill"], &[signal]).status, 0);
        bundle.wait_for_status("stopped");
        assert_eq!(bundle.verb(&["delete"], &[]).status, 0);
        bundle.assert_nothing_is_left();
    }
}

#[test]
fn kill_all_reaches_processes_outside_of_the_pid_namespace() {
    let bundle = Bundle::new("sleep 100 & sleep 100").with(|config| {
        config["linux"]["namespaces"] =
            json!([{"type": "mount"}, {"type": "uts"}, {"type": "network"}, {"type": "ipc"}]);
    });
    bundle.start();
    let count = || {
        let text = bundle.verb(&["ps", "-f", "json"], &[]).stdout;
        serde_json::from_str::<Vec<i32>>(&text).unwrap().len()
    };
    while count() < 2 {
        std::thread::yield_now();
    }
    assert_eq!(bundle.verb(&["kill", "--all"], &["KILL"]).status, 0);
    bundle.wait_for_status("stopped");
    // The first process may be gone before the other, which has its signal.
    while count() > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn limits_change_while_it_runs() {
    let bundle = Bundle::new("sleep 100");
    bundle.start();
    let ended = bundle.verb(&["update", "--memory", "20m", "--pids-limit", "9"], &[]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let cgroup = Cgroup::open(&format!("/{}", bundle.id)).unwrap();
    let stats = cgroup.stats().unwrap();
    assert_eq!(
        (stats.memory.limit, stats.pids.limit),
        (Some(20 << 20), Some(9))
    );
    let ended = bundle.verb(&["update", "--resources", "-"], &[]);
    assert!(ended.stderr.contains("not JSON"), "{ended:?}");
}

#[test]
fn hooks_run_in_their_places_with_the_state_on_standard_input() {
    // The program and the poststart hook run side by side, so the program lets the hook go first.
    let program = "until grep -q running /log; do sleep 0.01; done; echo program >>/log";
    let bundle = Bundle::new(program).with(|config| config["root"]["readonly"] = json!(false));
    let log = bundle.rootfs().join("log");
    let host = |name: &str| {
        let script = format!(
            "printf '{name} ' >>{0}; grep -o '\"status\":\"[a-z]*\"' >>{0}",
            log.display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}])
    };
    let inside = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo startContainer >>/log"], "env": ["PATH=/bin"]}]);
    let hooks = json!({
        "prestart": host("prestart"),
        "createRuntime": host("createRuntime"),
        "createContainer": host("createContainer"),
        "startContainer": inside,
        "poststart": host("poststart"),
        "poststop": host("poststop"),
    });
    let bundle = bundle.with(|config| config["hooks"] = hooks);
    bundle.output();
    let text = fs::read_to_string(log).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "prestart \"status\":\"created\"",
            "createRuntime \"status\":\"created\"",
            "createContainer \"status\":\"created\"",
            "startContainer",
            "poststart \"status\":\"running\"",
            "program",
            "poststop \"status\":\"stopped\"",
        ]
    );
}

#[test]
fn a_hook_that_fails_stops_the_creation() {
    for name in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
    ] {
        let bundle = Bundle::new("echo ran").with(|config| {
            config["hooks"] = json!({name: [{"path": "/bin/false"}]});
        });
        let message = bundle.refusal();
        assert!(
            message.contains(&format!(
                "error running {name} hook #0: `/bin/false` ended with"
            )),
            "{message}"
        );
    }
}

#[test]
fn a_user_may_open_the_standard_streams_that_are_pipes() {
    let bundle = Bundle::new("echo out >/dev/stdout; echo err >/proc/self/fd/2").with(|config| {
        config["process"]["user"] = json!({"uid": 7, "gid": 7});
    });
    let ended = bundle.run();
    assert_eq!(
        (ended.stdout.as_str(), ended.stderr.as_str()),
        ("out\n", "err\n")
    );
}

#[test]
fn descriptors_are_passed_only_when_asked_for() {
    let bundle = Bundle::new("ls /proc/self/fd; cat <&3");
    let mut shell = Command::new("/bin/sh");
    let run = bundle.command(&["run", "--preserve-fds", "1"]);
    let words: Vec<String> = std::iter::once(run.get_program())
        .chain(run.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    fs::write(bundle.path().join("file"), "text\n").unwrap();
    let script = format!("exec 3<file 4<file; exec {} {}", words.join(" "), bundle.id);
    shell
        .args(["-c", &script])
        .current_dir(bundle.path())
        .stdin(Stdio::null());
    let ended = crate::bundle::finish(shell);
    // 4 is the directory that ls reads.
    assert_eq!(ended.stdout, "0\n1\n2\n3\n4\ntext\n", "{ended:?}");
}
