//! What requests are answered, and above all which are refused.

use super::*;

#[tokio::test]
async fn bad_input_gets_one_4xx_that_names_the_field_and_nothing_is_made() {
    let daemon = Daemon::new().await;
    let long = json!({"image": "busybox", "user": "x".repeat(2 * REQUEST_BYTES_MAX)}).to_string();
    for (body, status, code, field) in [
        ("{", 400, "malformed_json", Value::Null),
        ("", 400, "invalid_field", json!("/image")),
        (
            r#"{"image":"busybox","colour":1}"#,
            400,
            "unknown_field",
            json!("/colour"),
        ),
        (
            r#"{"image":"busybox","limits":{"cpu":{"cpus":1}}}"#,
            400,
            "unknown_field",
            json!("/limits/cpu/cpus"),
        ),
        (
            r#"{"image":"busybox","limits":{"cpu":{"cores":0}}}"#,
            400,
            "invalid_field",
            json!("/limits/cpu/cores"),
        ),
        (
            r#"{"image":"busybox","limits":{"memory":{"max":9223372036854775807}}}"#,
            400,
            "invalid_field",
            json!("/limits/memory/max"),
        ),
        (
            r#"{"image":"busybox","name":"../a"}"#,
            400,
            "invalid_field",
            json!("/name"),
        ),
        (
            r#"{"image":"nothing"}"#,
            404,
            "image_not_found",
            json!("/image"),
        ),
        (&long, 413, "too_large", Value::Null),
    ] {
        let (got, problem) = daemon
            .ask_raw("POST", "/v1/instances", body.to_owned())
            .await;
        let shown = &body[..body.len().min(80)];
        assert_eq!(
            (got, &problem["code"]),
            (status, &json!(code)),
            "{shown}: {problem}"
        );
        assert_eq!(problem["field"], field, "{shown}");
        assert!(
            problem["request_id"]
                .as_str()
                .is_some_and(|id| !id.is_empty())
        );
    }
    assert_eq!(daemon.get("/v1/instances").await.1, json!([]));
    assert!(daemon.fake.traces().is_empty());
}

#[tokio::test]
async fn what_is_not_there_is_said_not_to_be_there() {
    let daemon = Daemon::new().await;
    for (method, path, status, code) in [
        ("GET", "/v1/nothing", 404, "no_such_path"),
        ("DELETE", "/v1/host", 405, "no_such_method"),
        ("GET", "/v1/instances?colour=red", 400, "invalid_query"),
        ("GET", "/v1/instances?state=dead", 400, "invalid_query"),
        ("GET", "/v1/instances/none", 404, "not_found"),
        ("POST", "/v1/instances/none/start", 404, "not_found"),
        ("GET", "/v1/instances/none/logs", 404, "not_found"),
        ("DELETE", "/v1/instances/none", 404, "not_found"),
    ] {
        let (got, problem) = daemon.ask_raw(method, path, String::new()).await;
        assert_eq!(
            (got, &problem["code"]),
            (status, &json!(code)),
            "{method} {path}: {problem}"
        );
    }
}

#[tokio::test]
async fn a_name_is_taken_once_and_a_free_one_is_chosen() {
    let daemon = Daemon::new().await;
    let spec = json!({"name": "a", "image": "busybox"});
    assert_eq!(daemon.ask("POST", "/v1/instances", &spec).await.0, 201);
    let (status, problem) = daemon.ask("POST", "/v1/instances", &spec).await;
    assert_eq!((status, &problem["code"]), (409, &json!("name_taken")));
    let (_, nameless) = daemon
        .ask("POST", "/v1/instances", &json!({"image": "busybox"}))
        .await;
    assert_eq!(nameless["spec"]["name"], nameless["name"]);
    assert_eq!(nameless["address"], "10.0.0.3");
}

#[tokio::test]
async fn addresses_run_out_politely_and_come_back() {
    let daemon = Daemon::new().await;
    for number in 0..5 {
        daemon.run(&format!("a{number}"), "serve").await;
    }
    let spec = json!({"name": "b", "image": "busybox"});
    let (status, problem) = daemon.ask("POST", "/v1/instances", &spec).await;
    assert_eq!((status, &problem["code"]), (507, &json!("no_address")));
    let (status, _) = daemon
        .ask_raw("DELETE", "/v1/instances/a2?force=true", String::new())
        .await;
    assert_eq!(status, 204);
    let (_, created) = daemon.ask("POST", "/v1/instances", &spec).await;
    assert_eq!(created["address"], "10.0.0.4");
}

#[tokio::test]
async fn a_workload_that_cannot_run_is_the_callers_fault_and_leaves_nothing_running() {
    let daemon = Daemon::new().await;
    let spec = json!({"name": "a", "image": "busybox", "command": ["absent"]});
    let (status, problem) = daemon.ask("POST", "/v1/instances?start=true", &spec).await;
    assert_eq!(
        (status, &problem["code"]),
        (422, &json!("no_such_program")),
        "{problem}"
    );
    let (_, instance) = daemon.get("/v1/instances/a").await;
    assert_eq!(
        (&instance["state"], &instance["reason"]),
        (&json!("failed"), &json!("start_failed"))
    );
    assert!(daemon.fake.traces().is_empty());
}

#[tokio::test]
async fn limits_change_live_or_not_at_all() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    let patch = json!({"limits": {"cpu": {"cores": 0.5}, "memory": {"max": 65536}}});
    let (_, dry) = daemon
        .ask("PATCH", "/v1/instances/a?dry_run=true", &patch)
        .await;
    assert_eq!(
        dry["plan"],
        json!({"/limits/cpu/cores": "live", "/limits/memory/max": "at_restart"})
    );
    assert_eq!(daemon.fake.limits("a").unwrap().cpu.cores, None);

    let (status, done) = daemon.ask("PATCH", "/v1/instances/a", &patch).await;
    assert_eq!((status, &done["plan"]), (200, &dry["plan"]));
    assert_eq!(daemon.fake.limits("a").unwrap().cpu.cores, Some(0.5));

    for (patch, field) in [
        (
            json!({"limits": {"cpu": {"cores": 0.25, "weight": 0}}}),
            "/limits/cpu/weight",
        ),
        (
            json!({"limits": {"cpu": {"cores": 0.25, "speed": 0}}}),
            "/limits/cpu/speed",
        ),
        (
            json!({"limits": {"cpu": {"cores": 0.25}, "disk": {"size": 1 << 30}}}),
            "/limits/disk/size",
        ),
        (json!({"limit": {}}), "/limit"),
    ] {
        let (status, problem) = daemon.ask("PATCH", "/v1/instances/a", &patch).await;
        assert_eq!(
            (status, &problem["field"]),
            (400, &json!(field)),
            "{patch}: {problem}"
        );
    }
    daemon.fake.refuse_limits();
    let patch = json!({"limits": {"cpu": {"cores": 0.25}}});
    let (status, problem) = daemon.ask("PATCH", "/v1/instances/a", &patch).await;
    assert_eq!((status, &problem["code"]), (500, &json!("driver_failed")));
    let (_, instance) = daemon.get("/v1/instances/a").await;
    assert_eq!(instance["spec"]["limits"]["cpu"]["cores"], 0.5);
}

#[tokio::test]
async fn a_change_of_what_has_changed_meanwhile_is_refused() {
    let daemon = Daemon::new().await;
    let spec = json!({"name": "a", "image": "busybox"});
    let (_, created) = daemon.ask("POST", "/v1/instances", &spec).await;
    let tag = format!("\"{}\"", created["generation"]);
    let patch = json!({"labels": {"a": "1"}}).to_string();
    let headers = [("if-match", tag.as_str())];
    let (status, _) = daemon
        .exchange("PATCH", "/v1/instances/a", patch.clone(), &headers)
        .await;
    assert_eq!(status, 200);
    let (status, _) = daemon
        .exchange("PATCH", "/v1/instances/a", patch, &headers)
        .await;
    assert_eq!(status, 412);
}

#[tokio::test]
async fn lists_are_filtered_by_label_and_state() {
    let daemon = Daemon::new().await;
    for (name, team) in [("a", "red"), ("b", "blue")] {
        let spec = json!({"name": name, "image": "busybox", "labels": {"team": team}});
        daemon.ask("POST", "/v1/instances", &spec).await;
    }
    daemon.post("/v1/instances/b/start").await;
    for (query, names) in [
        ("label=team=red", vec!["a"]),
        ("label=team", vec!["a", "b"]),
        ("state=running,paused", vec!["b"]),
        ("label=team=red&state=running", vec![]),
    ] {
        let (_, list) = daemon.get(&format!("/v1/instances?{query}")).await;
        let found: Vec<&str> = list
            .as_array()
            .unwrap()
            .iter()
            .map(|item| item["name"].as_str().unwrap())
            .collect();
        assert_eq!(found, names, "{query}");
    }
}

#[tokio::test]
async fn metrics_and_stats_tell_of_what_runs() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    assert_eq!(daemon.get("/v1/instances/a/stats").await.1["pids"], 1);
    let (_, text) = daemon
        .exchange("GET", "/v1/metrics", String::new(), &[])
        .await;
    assert!(
        text.contains("hostd_instance_pids{name=\"a\"} 1\n"),
        "{text}"
    );
    assert!(
        !text.contains("vcpu=") && !text.contains("device="),
        "{text}"
    );
    assert_eq!(daemon.get("/v1/host").await.1["instances"], 1);

    // What both have, both have in the same place; the rest is a machine's.
    let spec = json!({"name": "b", "image": "busybox", "command": ["serve"], "isolation": "vm"});
    daemon.ask("POST", "/v1/instances?start=true", &spec).await;
    let container = daemon.get("/v1/instances/a/stats").await.1;
    let mut vm = daemon.get("/v1/instances/b/stats").await.1;
    let own = vm.as_object_mut().unwrap().remove("vm").unwrap();
    assert_eq!(container, vm);
    assert_eq!(own["vcpus"][1]["run_us"], 5);
    assert_eq!(own["devices"]["disk1"]["disk"]["read_ops"], 2);
    let (_, text) = daemon
        .exchange("GET", "/v1/metrics", String::new(), &[])
        .await;
    for sample in [
        "hostd_instance_vcpu_run_microseconds_total{name=\"b\",vcpu=\"1\"} 5\n",
        "hostd_instance_device_read_operations_total{name=\"b\",device=\"disk1\"} 2\n",
        "hostd_instance_guest_memory_bytes{name=\"b\"} 0\n",
    ] {
        assert!(text.contains(sample), "{sample}{text}");
    }
    // It is not known how long they waited, and nothing is made up.
    assert!(!text.contains("vcpu_steal_microseconds_total{"), "{text}");
}

/// The committed description is that of the code: `UPDATE_GOLDEN=1` writes it anew.
#[test]
fn the_committed_openapi_document_is_that_of_the_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
    let document = document().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, &document).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        document == committed,
        "docs/openapi.json is not up to date; run this test with UPDATE_GOLDEN=1"
    );
}
