//! Filters of system calls in a container, and the agent that decides for one (config-linux.md,
//! "Seccomp").

use std::os::unix::net::UnixListener;
use std::process::Stdio;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

use crate::bundle::{Bundle, finish_child};

fn filtered(script: &str, seccomp: Value) -> Bundle {
    Bundle::new(script).with(|config| {
        config["linux"]["seccomp"] = seccomp;
        config["root"]["readonly"] = json!(false);
    })
}

fn rule(action: &str) -> Value {
    json!({"names": ["mkdir", "mkdirat"], "action": action})
}

#[test]
fn every_action_does_what_it_is_called() {
    for (action, errno, status, words) in [
        ("SCMP_ACT_ALLOW", None, 0, ""),
        ("SCMP_ACT_LOG", None, 0, ""),
        ("SCMP_ACT_ERRNO", None, 1, "Operation not permitted"),
        ("SCMP_ACT_ERRNO", Some(28), 1, "No space left on device"),
        // Nobody traces it.
        ("SCMP_ACT_TRACE", None, 1, "Function not implemented"),
        ("SCMP_ACT_TRAP", None, 128 + 31, ""),
        ("SCMP_ACT_KILL", None, 128 + 31, ""),
        ("SCMP_ACT_KILL_THREAD", None, 128 + 31, ""),
        ("SCMP_ACT_KILL_PROCESS", None, 128 + 31, ""),
    ] {
        let mut rule = rule(action);
        if let Some(errno) = errno {
            rule["errnoRet"] = json!(errno);
        }
        let default = if action == "SCMP_ACT_ALLOW" {
            "SCMP_ACT_LOG"
        } else {
            "SCMP_ACT_ALLOW"
        };
        let seccomp = json!({"defaultAction": default, "syscalls": [rule]});
        let ended = filtered("mkdir /made; exit $?", seccomp).run();
        assert_eq!(ended.status, status, "{action}: {ended:?}");
        assert!(ended.stderr.contains(words), "{action}: {ended:?}");
    }
}

#[test]
fn a_profile_that_cannot_be_meant_is_refused() {
    for (seccomp, words) in [
        (
            json!({"defaultAction": "SCMP_ACT_MOON"}),
            "linux.seccomp.defaultAction",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1}),
            "linux.seccomp.defaultErrnoRet",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": ["mkdir"], "action": "SCMP_ACT_KILL", "errnoRet": 1}
            ]}),
            "linux.seccomp.syscalls[0].errnoRet",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
                {"names": [], "action": "SCMP_ACT_KILL"}
            ]}),
            "linux.seccomp.syscalls[0].names",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_MOON"]}),
            "linux.seccomp.architectures[0]",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_MOON"]}),
            "linux.seccomp.flags[0]",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("SCMP_ACT_NOTIFY")]}),
            "linux.seccomp.listenerPath",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerMetadata": "x"}),
            "linux.seccomp.listenerMetadata",
        ),
    ] {
        filtered("echo ran", seccomp).assert_refused(words);
    }
}

#[test]
fn a_listener_that_is_not_used_is_ignored() {
    let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/nowhere"});
    assert_eq!(filtered("echo ran", seccomp).output(), "ran\n");
}

#[test]
fn an_agent_gets_the_state_of_the_process_and_decides() {
    let bundle = filtered("mkdir /made; echo $?", json!({})).with(|config| {
        config["annotations"] = json!({"key": "value"});
    });
    let socket = bundle.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let bundle = bundle.with(|config| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": socket,
            "listenerMetadata": "opaque",
            "syscalls": [rule("SCMP_ACT_NOTIFY")]
        });
    });
    let mut command = bundle.command(&["run"]);
    command
        .arg(&bundle.id)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();

    let (connection, _) = listener.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 4096];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let received = recvmsg(
        &connection,
        &mut parts,
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    assert_eq!(descriptors.len(), 1);
    let state: Value = serde_json::from_slice(&bytes[..received.bytes]).unwrap();
    assert_eq!(state["fds"], json!(["seccompFd"]));
    assert_eq!(state["metadata"], "opaque");
    assert_eq!(state["ociVersion"], bundle.config["ociVersion"]);
    assert_eq!(state["state"]["id"], bundle.id.as_str());
    assert_eq!(state["state"]["pid"], state["pid"]);
    assert_eq!(state["state"]["annotations"], json!({"key": "value"}));
    // An agent that goes away answers with ENOSYS.
    drop(descriptors);
    let ended = finish_child(child);
    assert_eq!(ended.stdout, "1\n", "{ended:?}");
    assert!(
        ended.stderr.contains("Function not implemented"),
        "{ended:?}"
    );
}

#[test]
fn an_agent_that_cannot_be_reached_stops_the_container() {
    let seccomp = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": "/nowhere",
        "syscalls": [rule("SCMP_ACT_NOTIFY")]
    });
    filtered("echo ran", seccomp).assert_refused("hand over the listener of the seccomp filter");
}

#[test]
fn the_filter_holds_for_exec_too() {
    let seccomp = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule("SCMP_ACT_ERRNO")]});
    let bundle = filtered("exec sleep 100", seccomp);
    bundle.start();
    let ended = bundle.verb(&["exec"], &["mkdir", "/made"]);
    assert!(
        ended.stderr.contains("Operation not permitted"),
        "{ended:?}"
    );
}
