//! The command line beyond the life of a container: what it says about containers, and what it refuses.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use container::cgroup::Cgroup;
use serde_json::{Value, json};

use crate::bundle::{Bundle, Ended, PATIENCE, finish, finish_child, is_own};

pub(crate) fn running() -> Bundle {
    let bundle = Bundle::new("while true; do sleep 1; done");
    bundle.start();
    bundle
}

fn parse(ended: &Ended) -> Value {
    assert_eq!(ended.status, 0, "{ended:?}");
    serde_json::from_str(&ended.stdout).unwrap()
}

#[test]
fn events_shows_once_what_the_container_uses() {
    let bundle = running();
    let event = parse(&bundle.verb(&["events", "--stats"], &[]));
    assert_eq!(event["type"], "stats");
    assert_eq!(event["id"], bundle.id.as_str());
    let data = &event["data"];
    assert!(
        data["cpu"]["usage"]["total"].as_u64().unwrap() > 0,
        "{data}"
    );
    assert!(
        data["memory"]["usage"]["usage"].as_u64().unwrap() > 0,
        "{data}"
    );
    assert!(
        data["memory"]["raw"].as_object().unwrap().len() > 5,
        "{data}"
    );
    assert!(data["pids"]["current"].as_u64().unwrap() >= 1, "{data}");
}

#[test]
fn events_tells_of_the_shortage_of_memory_and_ends_with_the_container() {
    let bundle = Bundle::new(
        "while ! test -e /go/now; do sleep 0.01; done; \
        dd if=/dev/zero of=/dev/null bs=200M count=1; while true; do sleep 1; done",
    );
    let bundle = bundle.with(|config| {
        config["linux"]["resources"]["memory"] = json!({"limit": 33_554_432, "swap": 33_554_432});
        let mount = json!({"destination": "/go", "source": "go", "options": ["bind"]});
        config["mounts"].as_array_mut().unwrap().push(mount);
    });
    fs::create_dir(bundle.path().join("go")).unwrap();
    bundle.start();
    let mut command = bundle.command(&["events", "--interval", "20ms"]);
    let mut child = command
        .arg(&bundle.id)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut events = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    assert_eq!(events.next().unwrap()["type"], "stats");
    fs::write(bundle.path().join("go/now"), "").unwrap();
    let mut overdue = || {
        // It would outlive the test, and keep whoever waits for the tests' output waiting.
        child.kill().unwrap();
        panic!("the event has not come");
    };
    let start = Instant::now();
    let shortage = events
        .by_ref()
        .take_while(|_| start.elapsed() < PATIENCE)
        .find(|event| event["type"] == "oom")
        .unwrap_or_else(&mut overdue);
    assert_eq!(shortage["id"], bundle.id.as_str());
    assert_eq!(bundle.verb(&["kill"], &["KILL"]).status, 0);
    let start = Instant::now();
    for event in events {
        assert!(
            event["type"] == "stats" || event["type"] == "oom",
            "{event}"
        );
        if start.elapsed() > PATIENCE {
            overdue();
        }
    }
    assert_eq!(finish_child(child).status, 0);
    let ended = bundle.verb(&["events"], &[]);
    assert!(ended.stderr.contains("not running"), "{ended:?}");
}

#[test]
fn list_and_ps_show_containers_and_processes_in_every_format() {
    let bundle = running();
    let list = |options: &[&str]| {
        let mut command = bundle.command(&["list"]);
        command.args(options);
        finish(command)
    };
    assert_eq!(list(&["--quiet"]).stdout, format!("{}\n", bundle.id));
    let state = &parse(&list(&["--format", "json"]))[0];
    assert_eq!(state["id"], bundle.id.as_str());
    assert_eq!(state["status"], "running");
    assert_eq!(state["pid"], bundle.state()["pid"]);
    let table = list(&[]).stdout;
    let words: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        words[0],
        ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]
    );
    assert_eq!(
        (words[1][0], words[1][2], words[1][5]),
        (bundle.id.as_str(), "running", "root")
    );

    let pids = parse(&bundle.verb(&["ps", "--format", "json"], &[]));
    assert!(pids.as_array().unwrap().contains(&state["pid"]), "{pids}");
    let table = bundle.verb(&["ps"], &[]).stdout;
    assert!(
        table
            .lines()
            .any(|line| line.contains(&format!(" {} ", state["pid"]))),
        "{table}"
    );
    let table = bundle.verb(&["ps"], &["-o", "pid,comm"]).stdout;
    assert!(table.contains(" sh\n"), "{table}");
}

#[test]
fn state_has_what_the_specification_asks_for() {
    let bundle = Bundle::new("exec sleep 100").with(|config| {
        config["annotations"] = json!({"org.example.key": "value"});
    });
    assert_eq!(bundle.quiet(&["create"]).status, 0);
    let state = bundle.state();
    assert_eq!(state["ociVersion"], bundle.config["ociVersion"]);
    assert_eq!(state["id"], bundle.id.as_str());
    assert_eq!(state["status"], "created");
    assert!(state["pid"].as_i64().unwrap() > 0);
    assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
    assert_eq!(state["annotations"], json!({"org.example.key": "value"}));
    // Changes of the file have no effect any more.
    fs::write(bundle.path().join("config.json"), "{}").unwrap();
    let ended = finish(bundle.bare_command(&["start", &bundle.id]));
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(bundle.state()["status"], "running");
}

#[test]
fn verbs_without_a_container_say_so() {
    let bundle = Bundle::new("true");
    for (verb, arguments) in [
        (&["state"][..], &[][..]),
        (&["start"], &[]),
        (&["kill"], &["TERM"]),
        (&["delete"], &[]),
        (&["exec"], &["true"]),
        (&["pause"], &[]),
        (&["resume"], &[]),
        (&["ps"], &[]),
        (&["events", "--stats"], &[]),
        (&["update", "--pids-limit", "5"], &[]),
    ] {
        let ended = bundle.verb(verb, arguments);
        assert_ne!(ended.status, 0, "{verb:?}: {ended:?}");
        assert!(
            ended.stderr.contains("does not exist"),
            "{verb:?}: {ended:?}"
        );
        let mut command = bundle.command(verb);
        command.args(arguments);
        assert_ne!(finish(command).status, 0, "{verb:?} without an id");
    }
    for id in ["", "a/b", "..", "a b"] {
        let mut command = bundle.command(&["create"]);
        let ended = finish({
            command.arg(id);
            command
        });
        assert_ne!(ended.status, 0, "`{id}`: {ended:?}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_what_to_do_instead() {
    let bundle = Bundle::new("true");
    for (arguments, words) in [
        (
            &["--systemd-cgroup", "run", "x"][..],
            "with systemd it must be SLICE:PREFIX:NAME",
        ),
        (
            &["--cgroup-manager", "moon", "run", "x"],
            "[possible values: cgroupfs, systemd, disabled]",
        ),
        (
            &["checkpoint", "--page-server", "nowhere", "x"],
            "it must be ADDRESS:PORT",
        ),
        (
            &["restore", "--manage-cgroups-mode", "moon", "x"],
            "[possible values: soft, full, strict, ignore]",
        ),
    ] {
        let ended = finish(bundle.command(arguments));
        assert!(
            ended.status != 0 && ended.stderr.contains(words),
            "{arguments:?}: {ended:?}"
        );
    }
}

#[test]
fn spec_writes_a_configuration_that_runs_and_overwrites_none() {
    let bundle = Bundle::new("true");
    // The bundle has one already.
    let ended = finish(bundle.command(&["spec"]));
    assert!(
        ended.status == 1 && ended.stderr.contains("file exists"),
        "{ended:?}"
    );
    for (directory, options) in [("plain", &[][..]), ("rootless", &["--rootless"])] {
        let directory = bundle.path().join(directory);
        fs::create_dir(&directory).unwrap();
        let mut command = bundle.command(&["spec"]);
        command.arg("--bundle").arg(&directory).args(options);
        assert_eq!(finish(command).status, 0);
        let text = fs::read(directory.join("config.json")).unwrap();
        let config: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(config["process"]["args"], json!(["sh"]));
        let mut bundle = Bundle::new("");
        bundle.config = config;
        bundle.config["process"]["terminal"] = json!(false);
        bundle.config["process"]["args"] = json!(["echo", "ran"]);
        bundle.config["linux"]["cgroupsPath"] = json!(format!("/{}", bundle.id));
        assert_eq!(bundle.output(), "ran\n");
    }
}

#[test]
fn features_are_those_of_the_configurations_that_are_taken() {
    let bundle = Bundle::new("true");
    let features = parse(&finish(bundle.command(&["features"])));
    for pointer in [
        "/linux/cgroup/v1",
        "/linux/cgroup/v2",
        "/linux/seccomp/enabled",
        "/linux/mountExtensions/idmap/enabled",
        "/linux/netDevices/enabled",
    ] {
        assert_eq!(features.pointer(pointer), Some(&json!(true)), "{pointer}");
    }
    assert_eq!(features["hooks"].as_array().unwrap().len(), 6);
    assert_eq!(features["linux"]["namespaces"].as_array().unwrap().len(), 8);
    let unsafe_annotations = &features["potentiallyUnsafeConfigAnnotations"];
    for annotation in [
        "org.criu.config",
        "org.systemd.property.",
        "run.oci.keep_original_groups",
    ] {
        let listed = unsafe_annotations.as_array().unwrap();
        assert!(listed.contains(&json!(annotation)), "{annotation}");
    }
    let last = features["ociVersionMax"].as_str().unwrap().to_owned();
    let bundle = Bundle::new("echo ran").with(|config| config["ociVersion"] = json!(last));
    assert_eq!(bundle.output(), "ran\n");
    let version = finish(bundle.command(&["--version"])).stdout;
    // As engines read runc's.
    let lines: Vec<&str> = version.lines().collect();
    for (line, start) in lines
        .iter()
        .zip(["hostd-oci version 0.", "commit: ", "spec: 1."])
    {
        assert!(line.starts_with(start), "{version}");
    }
    assert_eq!(finish(bundle.command(&["-v"])).stdout, version);
}

#[test]
fn run_can_keep_the_container_and_detach_from_it() {
    let bundle = Bundle::new("exit 3");
    assert_eq!(bundle.verb(&["run", "--keep"], &[]).status, 3);
    assert_eq!(bundle.state()["status"], "stopped");
    assert_eq!(bundle.verb(&["delete"], &[]).status, 0);
    let bundle = Bundle::new("exec sleep 100");
    assert_eq!(bundle.quiet(&["run", "--detach"]).status, 0);
    assert_eq!(bundle.state()["status"], "running");
}

#[test]
fn exec_runs_in_a_group_below() {
    let bundle = running();
    let cgroup = Cgroup::open(&format!("/{}", bundle.id)).unwrap();
    for (name, path) in cgroup.views() {
        fs::create_dir(path.join("below")).unwrap();
        if name == "cpuset" {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(path.join("below").join(file), "0").unwrap();
            }
        }
    }
    let ended = bundle.verb(
        &["exec", "--cgroup", "/below"],
        &["cat", "/proc/self/cgroup"],
    );
    assert_eq!(ended.status, 0, "{ended:?}");
    assert!(ended.stdout.contains(":/below"), "{ended:?}");
    let controllers = cgroup.views().len() > 1;
    if controllers {
        let verb = [
            "exec",
            "--cgroup",
            "cpu,cpuacct:below",
            "--cgroup",
            "pids:/",
        ];
        let ended = bundle.verb(&verb, &["cat", "/proc/self/cgroup"]);
        let in_below = |line: &&str| line.ends_with(":/below");
        let below: Vec<&str> = ended.stdout.lines().filter(in_below).collect();
        assert!(
            !below.is_empty() && below.iter().all(|line| line.contains("cpu")),
            "{ended:?}"
        );
    }
    for (path, words) in [
        ("/gone", "/gone/cgroup.procs: no such file"),
        ("/../x", "/../x is not a sub cgroup path"),
        ("cpu,moon:/below", "unknown controller \"moon\""),
        ("moon:/x", "unknown controller"),
    ] {
        let ended = bundle.verb(&["exec", "--cgroup", path], &["true"]);
        assert!(
            ended.status == 255 && ended.stderr.contains(words),
            "{path}: {ended:?}"
        );
    }
}

/// A container that manages groups of its own may have nobody in the group itself, and its first process
/// may be anywhere.
#[test]
fn exec_goes_to_the_containers_group_or_to_that_of_its_first_process() {
    let bundle = Bundle::new("exec sleep 100");
    bundle.start();
    let cgroup = Cgroup::open(&format!("/{}", bundle.id)).unwrap();
    let views = cgroup.views();
    let unified = views
        .iter()
        .find(|(_, path)| path.join("cgroup.kill").exists());
    let Some((_, own)) = unified.filter(|_| is_own()) else {
        return;
    };
    let pid = bundle.state()["pid"].to_string();
    let entered = || {
        let ended = bundle.quiet_with(&["exec", "--detach"], &["sleep", "101"]);
        assert_eq!(ended.status, 0, "{ended:?}");
    };
    let count = |group: &Path| {
        let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap();
        procs.lines().filter(|line| *line != pid).count()
    };
    let inside = own.join("inside");
    fs::create_dir(&inside).unwrap();
    fs::write(inside.join("cgroup.procs"), &pid).unwrap();
    entered();
    assert_eq!(
        (count(own), count(&inside)),
        (1, 0),
        "into the group itself"
    );

    fs::write(
        inside.join("cgroup.procs"),
        fs::read_to_string(own.join("cgroup.procs")).unwrap(),
    )
    .unwrap();
    // The group's parent lets it have one only if a container needed that before.
    let parent = own.parent().unwrap();
    let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap();
    let controller = controllers.split_whitespace().next().unwrap();
    for group in [parent, own] {
        fs::write(
            group.join("cgroup.subtree_control"),
            format!("+{controller}"),
        )
        .unwrap();
    }
    entered();
    assert_eq!(count(&inside), 2, "the group itself lets nobody in");

    let outside = own.with_file_name(format!("{}-outside", bundle.id));
    fs::create_dir(&outside).unwrap();
    for pid in fs::read_to_string(inside.join("cgroup.procs"))
        .unwrap()
        .lines()
    {
        fs::write(outside.join("cgroup.procs"), pid).unwrap();
    }
    fs::remove_dir(&inside).unwrap();
    fs::remove_dir(own).unwrap();
    entered();
    let found = count(&outside);
    assert_eq!(bundle.verb(&["delete", "--force"], &[]).status, 0);
    fs::write(outside.join("cgroup.kill"), "1").unwrap();
    while fs::remove_dir(&outside).is_err() {
        std::thread::yield_now();
    }
    assert_eq!(found, 3, "the group itself is gone");
}

#[test]
fn a_wrong_command_line_is_an_error_as_any_other() {
    let bundle = Bundle::new("true");
    let log = bundle.path().join("log");
    let global = ["--log", log.to_str().unwrap(), "--log-format", "json"];
    let mut command = bundle.command(&global);
    let ended = finish({
        command.args(["run", "--no-such-option", "a"]);
        command
    });
    assert_eq!(ended.status, 1, "{ended:?}");
    let text = fs::read_to_string(log).unwrap();
    let line: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(
        line["msg"].as_str().unwrap().contains("--no-such-option"),
        "{line}"
    );
    assert_eq!(bundle.verb(&["run", "--help"], &[]).status, 0);
}

#[test]
fn exec_detaches_and_writes_its_pid() {
    let bundle = running();
    let pid_file = bundle.path().join("exec.pid");
    let verb = ["exec", "--detach", "--pid-file", pid_file.to_str().unwrap()];
    let ended = bundle.quiet_with(&verb, &["sleep", "100"]);
    assert_eq!(ended.status, 0, "{ended:?}");
    let pid: Value = fs::read_to_string(pid_file)
        .unwrap()
        .parse::<u32>()
        .unwrap()
        .into();
    let pids = parse(&bundle.verb(&["ps", "-f", "json"], &[]));
    assert!(pids.as_array().unwrap().contains(&pid), "{pid}: {pids}");
}

#[test]
fn exec_refuses_what_it_cannot_give() {
    let bundle = running();
    for flag in ["--apparmor", "--process-label"] {
        let enforced = Path::new("/sys/fs/selinux/enforce").exists()
            || Path::new("/sys/kernel/security/apparmor/profiles").exists();
        let ended = bundle.verb(&["exec", flag, "moon"], &["true"]);
        assert!(
            enforced || ended.stderr.contains("is not enabled on this host"),
            "{ended:?}"
        );
    }
}

#[test]
fn exec_has_a_terminal_if_asked_and_waits_for_a_paused_container_if_asked() {
    let bundle = running();
    let ended = bundle.verb(&["exec", "--tty"], &["sh", "-c", "test -t 0 && echo tty"]);
    assert_eq!(ended.stdout, "tty\n", "{ended:?}");
    assert_eq!(bundle.verb(&["pause"], &[]).status, 0);
    assert!(
        bundle
            .verb(&["exec"], &["true"])
            .stderr
            .contains("it is paused")
    );
    let mut command = bundle.command(&["exec", "--ignore-paused"]);
    command
        .args([&bundle.id, "echo", "later"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    assert_eq!(bundle.verb(&["resume"], &[]).status, 0);
    assert_eq!(finish_child(child).stdout, "later\n");
}
