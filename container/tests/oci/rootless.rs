//! The runtime in the hands of a user without rights: a user namespace with the one mapping that such a
//! user may write, and no control group.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use container::verbs::spec::spec;
use serde_json::{Value, json};

use crate::bundle::{
    Bundle, Ended, copy_program, finish, finish_child, own_runtime, share_namespace,
};

pub(crate) const NOBODY: u32 = 65534;

/// A bundle that belongs to a user without rights, with a copy of the runtime that the user can reach.
pub(crate) fn bundle(script: &str) -> Bundle {
    let bundle = Bundle::new(script).with(|config| {
        let args = config["process"]["args"].take();
        *config = spec(Some((NOBODY, NOBODY)));
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = args;
    });
    bundle.command(&["features"]);
    copy_program(Path::new(&own_runtime()), &bundle.path().join("runtime"));
    let owner = format!("{NOBODY}:{NOBODY}");
    let chown = Command::new("chown")
        .arg("-R")
        .arg(owner)
        .arg(bundle.path())
        .status();
    assert!(chown.unwrap().success());
    bundle
}

pub(crate) fn command(bundle: &Bundle, verb: &[&str], arguments: &[&str]) -> Command {
    let mut command = Command::new(bundle.path().join("runtime"));
    command
        .arg("--root")
        .arg(bundle.states())
        .args(verb)
        .arg(&bundle.id)
        .args(arguments);
    command.current_dir(bundle.path()).stdin(Stdio::null());
    command.uid(NOBODY).gid(NOBODY);
    command
}

fn verb(bundle: &Bundle, verb: &[&str], arguments: &[&str]) -> Ended {
    finish(command(bundle, verb, arguments))
}

#[test]
fn a_user_without_rights_is_root_in_a_container_and_nobody_outside() {
    let bundle = bundle("id -u; id -g; hostname; cat /proc/self/uid_map; echo 1 > /new; echo $$");
    let ended = verb(&bundle, &["run"], &[]);
    let words: Vec<&str> = ended.stdout.split_whitespace().collect();
    assert_eq!(
        words,
        ["0", "0", "hostd", "0", "65534", "1", "1"],
        "{ended:?}"
    );
    assert!(ended.stderr.contains("Read-only file system"), "{ended:?}");
    assert!(!bundle.states().join(&bundle.id).exists());
}

#[test]
fn its_verbs_work_without_a_control_group() {
    let bundle = bundle("exec sleep 100");
    let mut create = command(&bundle, &["create"], &[]);
    create.stdout(Stdio::null()).stderr(Stdio::null());
    assert!(create.status().unwrap().success());
    assert_eq!(verb(&bundle, &["start"], &[]).status, 0);
    let state: Value = serde_json::from_str(&verb(&bundle, &["state"], &[]).stdout).unwrap();
    assert_eq!(state["status"], "running", "{state}");
    let ended = verb(
        &bundle,
        &["exec"],
        &["sh", "-c", "id -u; ps | grep -c sleep"],
    );
    assert!(ended.stdout.starts_with("0\n"), "{ended:?}");
    let ended = verb(&bundle, &["ps", "--format=json"], &[]);
    assert_eq!(
        ended.stdout.trim(),
        format!("[{}]", state["pid"]),
        "{ended:?}"
    );
    let ended = verb(&bundle, &["pause"], &[]);
    assert!(ended.stderr.contains("freezer"), "{ended:?}");
    assert_eq!(verb(&bundle, &["delete", "--force"], &[]).status, 0);
    assert!(!bundle.states().join(&bundle.id).exists());
}

#[test]
fn what_needs_a_control_group_is_refused_by_name() {
    for (field, change) in [
        (
            "linux.resources.memory",
            json!({"resources": {"memory": {"limit": 1 << 26}}}),
        ),
        (
            "linux.cgroupsPath",
            json!({"cgroupsPath": "/hostd-test-rootless"}),
        ),
    ] {
        let bundle = bundle("echo ran");
        let path = bundle.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (key, value) in change.as_object().unwrap() {
            config["linux"][key] = value.clone();
        }
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        let ended = verb(&bundle, &["run"], &[]);
        assert_eq!(ended.status, 1, "{ended:?}");
        assert!(ended.stderr.contains(field), "{ended:?}");
        assert!(ended.stderr.contains("control groups"), "{ended:?}");
    }
}

#[test]
fn without_a_group_a_signal_for_all_reaches_the_pid_namespace() {
    // The first process ends only when its child does, which is there before it says so.
    let script = "trap : TERM; \
                  sh -c 'trap \"exit 3\" TERM; echo ready; while :; do sleep 0.01; done' & \
                  while kill -0 $! 2>/dev/null; do wait $!; done; exit 5";
    for (signal, status) in [("TERM", 5), ("KILL", 137)] {
        let bundle = bundle(script);
        let mut run = command(&bundle, &["run"], &[]);
        let mut child = run.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let ended = verb(&bundle, &["kill", "--all"], &[signal]);
        assert_eq!(ended.status, 0, "{ended:?}");
        assert_eq!(finish_child(child).status, status, "{signal}");
    }
}

/// A shell of the bundle's user who is root in a user and a mount namespace, as rootless engines are. `$R`
/// is the runtime, `$ID` the container.
fn within_user_namespace(bundle: &Bundle, script: &str) -> Ended {
    let mut shell = Command::new("unshare");
    shell
        .args(["--user", "--map-root-user", "--mount", "sh", "-euc", script])
        .env(
            "R",
            format!("./runtime --root {}", bundle.states().display()),
        )
        .env("ID", &bundle.id)
        .current_dir(bundle.path())
        .stdin(Stdio::null())
        .uid(NOBODY)
        .gid(NOBODY);
    finish(shell)
}

/// Has the container stay in the user namespace of the runtime.
pub(crate) fn leave_user_namespace(config: &mut Value) {
    let linux = config["linux"].as_object_mut().unwrap();
    linux.remove("uidMappings");
    linux.remove("gidMappings");
    share_namespace(config, "user");
}

/// In a user namespace the user is root, and may still no more than before.
#[test]
fn root_in_a_user_namespace_runs_containers_without_a_group_and_without_device_rules() {
    let bundle = bundle("id -u; echo lost >/dev/null; ls /proc/1/exe >/dev/null && echo ran");
    let path = bundle.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    leave_user_namespace(&mut config);
    config["linux"]["resources"] = json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
    ]});
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    let script = "$R run $ID
        sed -i 's/\"id -u;/\"sleep 100;/' config.json
        $R run --detach $ID >/dev/null 2>&1
        $R exec $ID echo inside
        $R delete --force $ID";
    let ended = within_user_namespace(&bundle, script);
    assert_eq!(ended.stdout, "0\nran\ninside\n", "{ended:?}");

    config["linux"]["resources"] = json!({"pids": {"limit": 9}});
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    let ended = within_user_namespace(&bundle, "$R run $ID");
    let words = "linux.resources.pids.limit: this user may not make control groups";
    assert!(
        ended.status == 1 && ended.stderr.contains(words),
        "{ended:?}"
    );
}

#[test]
fn the_states_of_a_user_are_where_the_session_has_its_files() {
    let bundle = bundle("exec sleep 100");
    let session = bundle.path().join("session");
    fs::create_dir(&session).unwrap();
    std::os::unix::fs::chown(&session, Some(NOBODY), Some(NOBODY)).unwrap();
    let verb = |verb: &[&str]| {
        let mut command = Command::new(bundle.path().join("runtime"));
        command.args(verb).arg(&bundle.id);
        command.env("XDG_RUNTIME_DIR", &session);
        command.current_dir(bundle.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.uid(NOBODY).gid(NOBODY);
        command.status().unwrap().success()
    };
    assert!(verb(&["create"]));
    let state = session.join("hostd-oci").join(&bundle.id);
    assert!(state.join("state.json").exists());
    assert!(verb(&["delete", "--force"]));
    assert!(!state.exists());
}

#[test]
fn without_control_groups_no_limit_is_taken() {
    let bundle = bundle("cat /proc/self/cgroup");
    let verb = ["--cgroup-manager", "disabled", "run"];
    let ended = finish(command(&bundle, &verb, &[]));
    assert_eq!(ended.status, 0, "{ended:?}");
    let path = bundle.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["linux"]["resources"] = json!({"pids": {"limit": 9}});
    fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    let ended = finish(command(&bundle, &verb, &[]));
    assert!(
        ended.stderr.contains("control groups are disabled"),
        "{ended:?}"
    );
}
