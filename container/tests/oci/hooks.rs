//! Hooks: their order and time, and what a failing one stops (config.md, "POSIX-platform Hooks").

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use crate::bundle::{Bundle, PATIENCE, share_namespace};

fn shell(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]})
}

fn with_hooks(script: &str, hooks: Value) -> Bundle {
    Bundle::new(script).with(|config| {
        config["hooks"] = hooks;
        config["root"]["readonly"] = json!(false);
    })
}

/// As hooks that give a container devices and libraries do.
#[test]
fn a_hook_that_enters_the_mounts_finds_the_root_where_the_host_has_it() {
    let bundle = Bundle::new("cat /etc/given");
    fs::create_dir(bundle.rootfs().join("etc")).unwrap();
    fs::write(bundle.rootfs().join("etc/given"), "nothing\n").unwrap();
    let given = bundle.path().join("given");
    fs::write(&given, "something\n").unwrap();
    let script = format!(
        r#"pid=$(grep -o '"pid": *[0-9]*' | grep -o '[0-9]*$' | head -n1)
        nsenter -t $pid -m mount --bind {} {}/etc/given"#,
        given.display(),
        bundle.rootfs().display()
    );
    let bundle = bundle.with(|config| {
        let hook = json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/sbin:/usr/bin:/bin"]});
        config["hooks"] = json!({"createRuntime": [hook]});
    });
    assert_eq!(bundle.output(), "something\n");
    let text = fs::read_to_string(bundle.rootfs().join("etc/given")).unwrap();
    assert_eq!(text, "nothing\n");
}

#[test]
fn hooks_of_one_kind_run_in_their_order() {
    let bundle = Bundle::new("true");
    let log = bundle.path().join("log");
    let hook = |number: u32| shell(&format!("echo {number} >>{}", log.display()));
    let bundle = bundle.with(|config| {
        config["hooks"] = json!({
            "createRuntime": [hook(1), hook(2), hook(3)],
            "poststop": [hook(4), shell("exit 1"), hook(5)]
        });
    });
    // A poststop hook that fails is reported, and changes nothing.
    let ended = bundle.run();
    assert_eq!(ended.status, 0, "{ended:?}");
    assert_eq!(fs::read_to_string(&log).unwrap(), "1\n2\n3\n4\n5\n");
    bundle.assert_nothing_is_left();
}

#[test]
fn a_hook_has_its_arguments_its_environment_and_the_state() {
    let bundle = Bundle::new("true");
    let log = bundle.path().join("log");
    let script = format!("{{ echo \"$0 $1 $A $HOME\"; cat; }} >{}", log.display());
    let bundle = bundle.with(|config| {
        config["annotations"] = json!({"key": "value"});
        config["hooks"] = json!({"createRuntime": [{
            "path": "/bin/sh", "args": ["sh", "-c", script, "zero", "one"], "env": ["A=b", "PATH=/bin"]
        }]});
    });
    bundle.output();
    let text = fs::read_to_string(log).unwrap();
    let (line, state) = text.split_once('\n').unwrap();
    assert_eq!(line, "zero one b ");
    let state: Value = serde_json::from_str(state).unwrap();
    assert_eq!(state["id"], bundle.id.as_str());
    assert_eq!(state["bundle"], bundle.path().to_str().unwrap());
    assert_eq!(state["annotations"], json!({"key": "value"}));
    assert!(state["pid"].as_i64().unwrap() > 1, "{state}");
    assert!(state["ociVersion"].is_string(), "{state}");
    assert!(
        ["creating", "created"].contains(&state["status"].as_str().unwrap()),
        "{state}"
    );
}

#[test]
fn a_hook_that_takes_longer_than_its_time_is_killed_and_stops_the_creation() {
    for name in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
    ] {
        let start = Instant::now();
        // Found on the host and in the container.
        let hook = json!([{"path": "/bin/sleep", "args": ["sleep", "100"], "timeout": 1}]);
        with_hooks("echo ran", json!({name: hook})).assert_refused("took longer than 1 s");
        assert!(start.elapsed() < PATIENCE, "{name}");
    }
}

#[test]
fn a_hook_that_cannot_be_is_refused() {
    for (hook, words) in [
        (
            json!({"path": "sleep"}),
            "hooks.createRuntime[0].path: `sleep`: it must be absolute",
        ),
        (
            json!({"path": "/bin/true", "timeout": 0}),
            "hooks.createRuntime[0].timeout",
        ),
        (
            json!({"path": "/bin/true", "timeout": -1}),
            "hooks.createRuntime[0].timeout",
        ),
        (json!({"path": "/nowhere"}), "/nowhere"),
    ] {
        with_hooks("echo ran", json!({"createRuntime": [hook]})).assert_refused(words);
    }
}

#[test]
fn a_hook_of_the_start_that_fails_is_the_containers_end() {
    for kind in ["startContainer", "poststart"] {
        let directory = tempfile::tempdir().unwrap();
        let ended = directory.path().join("ended");
        let stop = shell(&format!("cat >{}; exit 7", ended.display()));
        let hooks = json!({kind: [shell("exit 3")], "poststop": [stop]});
        let bundle = with_hooks("exec sleep 100", hooks);
        assert_eq!(bundle.quiet(&["create"]).status, 0);
        let started = bundle.quiet(&["start"]);
        assert_ne!(started.status, 0, "{started:?}");
        for words in [kind, "poststop"] {
            let words = format!("error running {words} hook #0");
            assert!(started.stderr.contains(&words), "{started:?}");
        }
        bundle.assert_nothing_is_left();
        let state: Value = serde_json::from_str(&fs::read_to_string(ended).unwrap()).unwrap();
        assert_eq!(state["status"], "stopped", "{kind}");
    }
}

#[test]
fn what_a_hook_of_the_start_says_is_heard_also_with_a_terminal() {
    let says = shell("echo what is wrong >&2; exit 3");
    let bundle = with_hooks("echo ran", json!({"startContainer": [says]}))
        .with(|config| config["process"]["terminal"] = json!(true));
    let ended = bundle.run();
    assert_eq!(
        (ended.status, ended.stdout.as_str()),
        (1, "what is wrong\n"),
        "{ended:?}"
    );
    bundle.assert_nothing_is_left();
}

/// In which mount and pid namespace each kind of hook runs, by what it sees as `/`.
#[test]
fn hooks_run_in_the_namespaces_that_are_theirs() {
    let bundle = Bundle::new("true");
    fs::write(bundle.rootfs().join("inside"), "").unwrap();
    let log = bundle.rootfs().join("log");
    let hook = |name: &str, path: &str| {
        let script = format!(
            "test -e /inside && place=inside || place=outside; \
             echo {name} $place $(readlink /proc/self/ns/uts) >>{path}"
        );
        json!([shell(&script)])
    };
    let outside = log.display().to_string();
    let bundle = bundle.with(|config| {
        config["root"]["readonly"] = json!(false);
        config["hooks"] = json!({
            "createRuntime": hook("createRuntime", &outside),
            "createContainer": hook("createContainer", &outside),
            "startContainer": hook("startContainer", "/log"),
            "poststop": hook("poststop", &outside),
        });
    });
    bundle.output();
    let own = fs::read_link("/proc/self/ns/uts")
        .unwrap()
        .display()
        .to_string();
    let text = fs::read_to_string(log).unwrap();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
    for (line, (name, place, host)) in lines.iter().zip([
        ("createRuntime", "outside", true),
        ("createContainer", "outside", false),
        ("startContainer", "inside", false),
        ("poststop", "outside", true),
    ]) {
        assert_eq!(line[..2], [name, place], "{text}");
        assert_eq!(line[2] == own, host, "{text}");
    }
    assert_eq!(lines.len(), 4, "{text}");
}

/// `createContainer` and `startContainer` see the container's processes, the others those of the host.
#[test]
fn the_state_has_the_pid_that_its_hook_sees_and_is_whole_however_long() {
    let bundle = Bundle::new("true");
    let file = |name: &str| bundle.rootfs().join(name);
    let hook = |path: String| json!([shell(&format!("cat >{path}"))]);
    let hooks = json!({
        "createRuntime": hook(file("runtime").display().to_string()),
        "createContainer": hook(file("container").display().to_string()),
        "startContainer": hook("/start".to_owned()),
    });
    let (runtime, container, start) = (file("runtime"), file("container"), file("start"));
    let long = "é".repeat(20 * 1024);
    let bundle = bundle.with(|config| {
        config["root"]["readonly"] = json!(false);
        config["annotations"] = json!({"long": long});
        config["hooks"] = hooks;
    });
    bundle.output();
    for (path, is_first) in [(runtime, false), (container, true), (start, true)] {
        let state: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(state["annotations"]["long"], long, "{}", path.display());
        assert_eq!(state["pid"] == 1, is_first, "{}", path.display());
    }
}

#[test]
fn a_hook_has_no_more_than_its_time_without_proc() {
    let start = Instant::now();
    let hook = json!([{"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1}]);
    with_hooks("echo ran", json!({"startContainer": hook}))
        .with(|config| {
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["destination"] != "/proc");
            config["linux"]["maskedPaths"] = json!([]);
            config["linux"]["readonlyPaths"] = json!([]);
        })
        .assert_refused("took longer than 1 s");
    assert!(start.elapsed() < PATIENCE);
}

/// More than a pipe holds.
const LONG: usize = 200 * 1024;

#[test]
fn a_hook_that_does_not_read_a_long_state_has_no_more_than_its_time() {
    for name in ["createRuntime", "createContainer", "startContainer"] {
        let start = Instant::now();
        let hook = json!([{"path": "/bin/sleep", "args": ["sleep", "60"], "timeout": 1}]);
        with_hooks("echo ran", json!({name: hook}))
            .with(|config| config["annotations"] = json!({"long": "x".repeat(LONG)}))
            .assert_refused("took longer than 1 s");
        assert!(start.elapsed() < PATIENCE, "{name}");
    }
}

#[test]
fn a_hook_need_not_read_the_state_whatever_the_namespaces_are() {
    for timeout in [json!(null), json!(20)] {
        for name in ["createRuntime", "createContainer", "startContainer"] {
            let mut hook = json!({"path": "/bin/true"});
            if !timeout.is_null() {
                hook["timeout"] = timeout.clone();
            }
            let bundle = with_hooks("echo ran", json!({name: [hook]})).with(|config| {
                config["annotations"] = json!({"long": "x".repeat(LONG)});
                share_namespace(config, "pid");
            });
            assert_eq!(bundle.output(), "ran\n", "{name}");
        }
    }
}

#[test]
fn what_hooks_did_is_undone_by_poststop_when_the_creation_fails() {
    for name in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
    ] {
        let bundle = Bundle::new("echo ran");
        let log = bundle.path().join("log");
        let poststop = shell(&format!(
            "grep -o '\"status\":\"[a-z]*\"' >>{}",
            log.display()
        ));
        let bundle = bundle.with(|config| {
            config["hooks"] = json!({
                name: [{"path": "/bin/false"}], "poststop": [shell("exit 1"), poststop]
            });
        });
        let message = bundle.refusal();
        assert!(
            message.contains(&format!("error running {name} hook #0")),
            "{message}"
        );
        assert_eq!(
            fs::read_to_string(log).unwrap(),
            "\"status\":\"stopped\"\n",
            "{name}"
        );
    }
}
