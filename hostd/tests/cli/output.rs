//! What is printed, and the exit status.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::thread;

use hostd::api::types::InstanceSpec;
use serde_json::{Value, json};

use crate::fake_hostd::FakeHostd;

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json_of(output: &Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_refusal_is_told_with_its_remedy_and_the_status_is_125() {
    let hostd = FakeHostd::start();
    for verb in ["inspect", "stop", "logs", "attach", "wait", "rm"] {
        let output = hostd.hostctl(&[verb, "nobody"]);
        assert_eq!(output.status.code(), Some(125), "{verb}");
        assert_eq!(
            err(&output),
            "error: there is no instance `nobody`\nhint: Do something else.\n",
            "{verb}"
        );
        assert_eq!(out(&output), "", "{verb}");
    }
}

#[test]
fn without_hostd_the_error_says_where_it_was_looked_for() {
    let output = Command::new(env!("CARGO_BIN_EXE_hostctl"))
        .args(["--socket", "/nonexistent/socket", "list"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125));
    assert!(err(&output).contains("/nonexistent/socket"), "{output:?}");
    assert!(err(&output).contains("hint:"), "{output:?}");
}

#[test]
fn a_wrong_command_line_has_status_125_and_help_has_0() {
    let hostd = FakeHostd::start();
    for arguments in [
        &["run"][..],
        &["nonsense"],
        &["run", "-p", "80", "busybox"],
        &["update", "x"],
    ] {
        let output = hostd.hostctl(arguments);
        assert_eq!(output.status.code(), Some(125), "{arguments:?}");
        assert!(err(&output).starts_with("error: "), "{output:?}");
    }
    let help = hostd.hostctl(&["run", "--help"]);
    assert!(
        help.status.success() && out(&help).contains("Examples:"),
        "{help:?}"
    );
    assert_eq!(hostd.requests(), Vec::<String>::new());
}

#[test]
fn several_names_are_all_tried_and_the_status_tells_of_the_one_that_failed() {
    let hostd = FakeHostd::start();
    hostd.has("one", &InstanceSpec::default());
    hostd.has("two", &InstanceSpec::default());
    let output = hostd.hostctl(&["rm", "--force", "one", "nobody", "two"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(out(&output), "one\ntwo\n");
    assert!(
        err(&output).contains("there is no instance `nobody`"),
        "{output:?}"
    );
    assert!(
        hostd
            .requests()
            .contains(&"DELETE /v1/instances/two?force=true".to_owned())
    );
}

#[test]
fn one_instance_is_inspected_as_an_object_and_several_as_a_list() {
    let hostd = FakeHostd::start();
    hostd.has("one", &InstanceSpec::default());
    hostd.has("two", &InstanceSpec::default());
    assert_eq!(
        json_of(&hostd.hostctl(&["inspect", "--json", "one"]))["name"],
        "one"
    );
    assert_eq!(
        json_of(&hostd.hostctl(&["inspect", "--json", "one", "two"]))[1]["name"],
        "two"
    );
    let text = out(&hostd.hostctl(&["inspect", "one"]));
    assert!(
        text.starts_with("name") && text.contains("running"),
        "{text}"
    );
}

#[test]
fn lists_are_tables_for_people_and_json_for_programs() {
    let hostd = FakeHostd::start();
    hostd.has(
        "web",
        &InstanceSpec {
            image: "busybox".into(),
            ..InstanceSpec::default()
        },
    );
    for verb in ["list", "ls", "ps"] {
        let text = out(&hostd.hostctl(&[verb]));
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[0].starts_with("NAME   STATE     ISOLATION   IMAGE"),
            "{text}"
        );
        assert!(
            lines[1].starts_with("web    running   container   busybox"),
            "{text}"
        );
    }
    assert_eq!(
        json_of(&hostd.hostctl(&["list", "--json"]))[0]["spec"]["image"],
        "busybox"
    );
    assert_eq!(out(&hostd.hostctl(&["list", "--quiet"])), "web\n");
    assert_eq!(
        json_of(&hostd.hostctl(&["image", "list", "--json"]))[0]["reference"],
        "busybox"
    );
    let stats = json_of(&hostd.hostctl(&["stats", "--no-stream", "--json", "web"]));
    assert_eq!(
        (&stats[0]["name"], &stats[0]["pids"]),
        (&json!("web"), &json!(0))
    );
    hostd.hostctl(&["list", "--running", "--label", "a=b", "--label", "c"]);
    let query = "label=a%3Db%2Cc&state=starting%2Crunning%2Cpaused%2Cstopping";
    assert!(
        hostd
            .requests()
            .contains(&format!("GET /v1/instances?{query}"))
    );
}

#[test]
fn logs_go_to_the_stream_that_they_came_from() {
    let hostd = FakeHostd::start();
    hostd.has("web", &InstanceSpec::default());
    let output = hostd.hostctl(&["logs", "--follow", "--tail", "5", "web"]);
    assert_eq!(
        (out(&output), err(&output)),
        ("one\nno end".into(), "two\n".into())
    );
    assert_eq!(
        hostd.requests(),
        ["GET /v1/instances/web/logs?follow=true&tail=5"]
    );
    let stamped = out(&hostd.hostctl(&["logs", "-t", "web"]));
    assert!(
        stamped.starts_with("2026-01-01T00:00:00Z one\n"),
        "{stamped}"
    );
}

#[test]
fn events_are_lines() {
    let hostd = FakeHostd::start();
    let text = out(&hostd.hostctl(&["events", "--since", "1", "--no-follow", "--json"]));
    let subjects: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["subject"].clone())
        .collect();
    assert_eq!(subjects, ["web-2", "web-3"]);
    assert_eq!(hostd.requests(), ["GET /v1/events?since=1&follow=false"]);
    let text = out(&hostd.hostctl(&["events", "--since", "2", "--no-follow"]));
    assert!(
        text.contains("instance.created") && text.contains("web-3"),
        "{text}"
    );
}

#[test]
fn an_update_says_what_takes_effect_when() {
    let hostd = FakeHostd::start();
    hostd.has("web", &InstanceSpec::default());
    let output = hostd.hostctl(&["update", "--pids", "40", "--memory", "none", "web"]);
    assert_eq!(
        out(&output),
        "web\n  memory/max = none: in force at the next start\n  pids/max = 40: in force now\n"
    );
}

#[test]
fn wait_ends_as_the_workload_did() {
    let hostd = FakeHostd::start();
    hostd.has("job", &InstanceSpec::default());
    assert_eq!(hostd.hostctl(&["wait", "job"]).status.code(), Some(7));
    assert_eq!(
        hostd
            .hostctl(&["wait", "--state", "running", "job"])
            .status
            .code(),
        Some(0)
    );
}

#[test]
fn a_transfer_ends_with_the_image_or_with_why_there_is_none() {
    let hostd = FakeHostd::start();
    let pulled = hostd.hostctl(&["image", "pull", "registry/app:1"]);
    assert_eq!(out(&pulled), "registry/app:1 (sha256:0123456789abcdef)\n");
    assert_eq!(err(&pulled), "", "no bars where nobody watches");
    let broken = hostd.hostctl(&["image", "pull", "broken"]);
    assert_eq!(broken.status.code(), Some(125));
    assert_eq!(err(&broken), "error: the digest does not match\n");

    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("layout")).unwrap();
    let mut import = hostd.command(&["image", "import", "--json", "--name", "app:dev", "layout"]);
    let imported = import.current_dir(dir.path()).output().unwrap();
    assert_eq!(json_of(&imported)["reference"], "app:dev");
}

#[test]
fn a_missing_image_is_pulled_unless_that_is_forbidden() {
    let hostd = FakeHostd::start();
    let refused = hostd.hostctl(&["create", "--pull", "never", "registry/app:1"]);
    assert_eq!(refused.status.code(), Some(125));
    let created = hostd.hostctl(&["create", "registry/app:1"]);
    assert_eq!(out(&created), "chosen\n", "{created:?}");
    assert!(err(&created).contains("pulling"), "{created:?}");
}

#[test]
fn doctor_works_without_hostd() {
    let output = Command::new(env!("CARGO_BIN_EXE_hostctl"))
        .args(["--socket", "/nonexistent", "doctor", "--json"])
        .output()
        .unwrap();
    let findings: Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = findings.as_array().unwrap();
    assert!(
        checks.iter().any(|finding| finding["check"] == "kvm"),
        "{findings}"
    );
}

#[test]
fn with_patience_a_hostd_that_comes_up_later_or_again_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let child = Command::new(env!("CARGO_BIN_EXE_hostctl"))
        .arg("--socket")
        .arg(&path)
        .args(["--wait", "30s", "version", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Whether hostctl looks before or after the socket is there, it must find it.
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        use std::io::{Read, Write};
        // A hostd that is killed drops what it has accepted, with the request unread or read.
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        assert_ne!(stream.read(&mut [0; 1024]).unwrap(), 0);
        drop(stream);
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let length = stream.read(&mut request).unwrap();
        assert!(request[..length].starts_with(b"GET /v1/host HTTP/1.1\r\n"));
        stream
            .write_all(b"HTTP/1.1 503 x\r\ncontent-length: 0\r\n\r\n")
            .unwrap();
    });
    let output = child.wait_with_output().unwrap();
    server.join().unwrap();
    assert_eq!(json_of(&output)["hostd"], Value::Null);
}
