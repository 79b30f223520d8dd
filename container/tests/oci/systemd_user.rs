//! Control groups that a user's own systemd manages, for an engine without rights: below a systemd of the
//! tests' own, which delegates to it as distributions do.

use std::fs;

use serde_json::{Value, json};

use crate::bundle::{Bundle, finish, is_own};
use crate::rootless::{self, NOBODY};
use crate::systemd::{beside_systemd, is_possible, is_unified};

/// As Debian's, but for what this host lacks, and with fewer controllers than the host has.
const MANAGER: &str = "\
[Unit]
DefaultDependencies=no
[Service]
Type=notify
User=%i
Slice=user.slice
Delegate=pids memory cpu
KillMode=mixed
Environment=HOME=/ XDG_RUNTIME_DIR=/run/user/%i
Environment=SYSTEMD_UNIT_PATH=BUNDLE/session:/run/user/%i/systemd/transient:/run/user/%i/systemd/user.control
Environment=SYSTEMD_GENERATOR_PATH=/nonexistent SYSTEMD_USER_ENVIRONMENT_GENERATOR_PATH=/nonexistent
ExecStart=/usr/lib/systemd/systemd --user --unit=default.target --log-target=console
StandardError=file:BUNDLE/manager-log
";

/// A service of the user, of the user's systemd or of the system's.
const SERVICE: &str = "\
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
WorkingDirectory=BUNDLE
Environment=XDG_RUNTIME_DIR=/run/user/UID PATH=/usr/sbin:/usr/bin:/sbin:/bin ID=CONTAINER
Environment=\"R=./runtime --root BUNDLE/states --systemd-cgroup\"
StandardOutput=append:BUNDLE/output
StandardError=append:BUNDLE/errors
ExecStart=COMMAND
";

/// Where the runtime of an engine runs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// A service of the user's systemd.
    Session,
    /// There, and in a user namespace in which the user is root, as with podman.
    UserNamespace,
    /// Elsewhere, in a group of root's.
    Outside,
}

/// Runs a script as the user's engine, and returns what it printed. `$R` is the runtime with its options.
fn as_engine(bundle: &Bundle, place: Place, script: &str) -> String {
    let session = bundle.path().join("session");
    let units = bundle.path().join("units");
    for directory in [&session, &units] {
        fs::create_dir_all(directory).unwrap();
    }
    let fill = |text: &str, command: &str| {
        let path = bundle.path().display().to_string();
        text.replace("BUNDLE", &path)
            .replace("UID", &NOBODY.to_string())
            .replace("CONTAINER", &bundle.id)
            .replace("COMMAND", command)
    };
    fs::write(units.join("user@.service"), fill(MANAGER, "")).unwrap();
    fs::write(session.join("default.target"), "[Unit]\n").unwrap();
    let run = match place {
        Place::UserNamespace => {
            "/usr/bin/unshare --user --map-root-user --mount /bin/sh -eu script"
        }
        Place::Session | Place::Outside => "/bin/sh -eu script",
    };
    // A user's systemd listens to nobody else.
    let outside = match place {
        Place::Outside => run,
        Place::Session | Place::UserNamespace => "/bin/systemctl --user start engine.service",
    };
    let outside = format!("{}User={NOBODY}\n", fill(SERVICE, outside));
    fs::write(units.join("engine.service"), outside).unwrap();
    fs::write(session.join("engine.service"), fill(SERVICE, run)).unwrap();
    fs::write(bundle.path().join("script"), script).unwrap();
    beside_systemd(
        bundle,
        true,
        &format!(
            "mkdir -p /run/user/{NOBODY}
            chown {NOBODY}:{NOBODY} /run/user/{NOBODY}
            touch output errors
            chown {NOBODY}:{NOBODY} output errors
            systemctl start user@{NOBODY}.service && systemctl start engine.service || {{ cat errors manager-log >&2; exit 1; }}
            cat output"
        ),
    )
}

/// As [`as_engine`] outside of the user's systemd, whose `engine.service` carries out `within`.
fn beside_session(bundle: &Bundle, within: &str, script: &str) -> String {
    // Both services run one script.
    let script = format!("if ! mkdir once 2>/dev/null; then {within}; exit; fi\n{script}");
    as_engine(bundle, Place::Outside, &script)
}

fn scoped(place: Place, resources: Value) -> Bundle {
    let bundle = rootless::bundle("exec sleep 100");
    bundle.with(|config| {
        if place == Place::UserNamespace {
            rootless::leave_user_namespace(config);
        }
        config["linux"]["cgroupsPath"] = json!(":unit:name");
        config["linux"]["resources"] = resources;
    })
}

#[test]
fn a_users_systemd_has_the_scope_and_its_limits() {
    if !is_possible() || !is_unified() {
        return;
    }
    for place in [Place::Session, Place::UserNamespace] {
        let resources = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 33}});
        let bundle = scoped(place, resources);
        let output = as_engine(
            &bundle,
            place,
            r#"show() { systemctl --user show unit-name.scope -p $1; }
            $R create $ID >/dev/null </dev/null
            show Slice
            group=$(show ControlGroup | sed s/ControlGroup=//)
            echo $group
            shown() { show MemoryMax; show TasksMax; cat /sys/fs/cgroup$group/memory.max /sys/fs/cgroup$group/pids.max; }
            shown
            $R start $ID
            cat /proc/$($R ps --format json $ID | tr -d '[]')/cgroup
            $R update --memory 134217728 --memory-swap 134217728 --pids-limit 44 $ID
            systemctl --user daemon-reload
            shown
            $R pause $ID; $R resume $ID
            $R exec $ID echo inside
            $R delete --force $ID
            show LoadState
            [ -e /sys/fs/cgroup$group ] || echo gone"#,
        );
        let lines: Vec<&str> = output.lines().collect();
        let group = lines[1];
        assert!(
            group.ends_with(".service/user.slice/unit-name.scope"),
            "{output}"
        );
        let inhabited = format!("0::{group}");
        let expected = [
            "Slice=user.slice",
            group,
            "MemoryMax=67108864",
            "TasksMax=33",
            "67108864",
            "33",
            &inhabited,
            "MemoryMax=134217728",
            "TasksMax=44",
            "134217728",
            "44",
            "inside",
            "LoadState=not-found",
            "gone",
        ];
        assert_eq!(lines, expected, "{place:?}");
    }
}

#[test]
fn a_limit_whose_controller_is_not_delegated_is_refused_by_name() {
    if !is_possible() || !is_unified() {
        return;
    }
    let bundle = scoped(Place::Session, json!({"cpu": {"cpus": "0"}}));
    let script = "$R run $ID </dev/null 2>&1 || systemctl --user show unit-name.scope -p LoadState";
    let output = as_engine(&bundle, Place::Session, script);
    let words = "it is not delegated to this user";
    assert!(
        output.contains("linux.resources.cpu.cpus") && output.contains(words),
        "{output}"
    );
    assert!(output.ends_with("LoadState=not-found\n"), "{output}");
}

#[test]
fn from_a_group_of_roots_nobody_gets_into_a_scope_without_the_systems_bus() {
    if !is_possible() || !is_unified() {
        return;
    }
    let bundle = scoped(Place::Outside, json!({}));
    let script = r#"
        $R run $ID </dev/null 2>&1 || ls states
        systemctl --user start engine.service
        $R exec $ID true 2>&1 || echo refused
        $R delete --force $ID
        systemctl --user show unit-name.scope -p LoadState"#;
    let within = "$R create $ID >/dev/null </dev/null; $R start $ID";
    let output = beside_session(&bundle, within, script);
    let expected = [
        "this user's systemd could not start unit-name.scope: it may move processes that run below",
        "systemd refuses to move a process into the container's scope",
        "refused",
        "LoadState=not-found",
    ];
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{output}");
    for (line, words) in lines.iter().zip(expected) {
        assert!(line.contains(words), "{words}: {output}");
    }
}

#[test]
fn what_ended_with_a_users_systemd_can_be_deleted_without_it() {
    if !is_possible() || !is_unified() {
        return;
    }
    let bundle = scoped(Place::Outside, json!({}));
    let script = r#"
        systemctl --user start engine.service
        group=$(systemctl --user show unit-name.scope -p ControlGroup --value)
        XDG_RUNTIME_DIR=/nonexistent $R delete --force $ID 2>&1 || echo kept
        systemctl --user exit --force
        while [ -e /sys/fs/cgroup$group ]; do sleep 0.05; done
        $R delete $ID && ls states && echo $group"#;
    let output = beside_session(&bundle, "$R create $ID >/dev/null </dev/null", script);
    let lines: Vec<&str> = output.lines().collect();
    let [refusal, kept, group] = lines.as_slice() else {
        panic!("{output}");
    };
    assert!(group.ends_with("/unit-name.scope"), "{output}");
    assert!(
        refusal.contains("cannot connect to this user's systemd"),
        "{output}"
    );
    assert_eq!(*kept, "kept", "{output}");
}

#[test]
fn without_a_users_systemd_the_request_is_refused_with_what_to_do() {
    if !is_own() {
        return;
    }
    let bundle = rootless::bundle("true");
    let mut command = rootless::command(&bundle, &["--systemd-cgroup", "run"], &[]);
    command.env("XDG_RUNTIME_DIR", bundle.path());
    let ended = finish(command);
    let path = bundle.path().join("systemd/private");
    for words in [
        format!(
            "cannot connect to this user's systemd at {}",
            path.display()
        ),
        "`loginctl enable-linger`".to_owned(),
        "no such file".to_owned(),
    ] {
        assert!(ended.stderr.contains(&words), "{words}: {ended:?}");
    }
    assert!(!bundle.states().join(&bundle.id).exists());
}
