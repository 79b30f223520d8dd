//! Snapshots as a client sees them, and as a restarted hostd finds them.

use serde_json::{Value, json};

use super::Daemon;
use crate::instance::SNAPSHOTS_MAX;

const SNAPSHOTS: &str = "/v1/instances/a/snapshots";

async fn take(daemon: &Daemon, request: &Value) -> Value {
    let (status, snapshot) = daemon.ask("POST", SNAPSHOTS, request).await;
    assert_eq!(status, 201, "{snapshot}");
    snapshot
}

async fn names(daemon: &Daemon) -> Value {
    daemon.get("/v1/instances/a").await.1["snapshots"].clone()
}

#[tokio::test]
async fn an_instance_goes_back_to_what_it_was() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    daemon.fake.write("a", "old");
    let limits = json!({"limits": {"pids": {"max": 5}}});
    daemon.ask("PATCH", "/v1/instances/a", &limits).await;
    let snapshot = take(&daemon, &json!({"name": "one"})).await;
    assert_eq!(snapshot["instance"], "a");
    assert_eq!(
        (&snapshot["stateful"], &snapshot["size_bytes"]),
        (&json!(false), &json!(3))
    );
    assert_eq!(daemon.state("a").await, "running");
    assert!(!daemon.fake.is_paused("a"));

    daemon.fake.write("a", "new");
    let limits = json!({"limits": {"pids": {"max": 9}}});
    daemon.ask("PATCH", "/v1/instances/a", &limits).await;
    let path = format!("{SNAPSHOTS}/one/restore");
    let (status, restored) = daemon.post(&path).await;
    assert_eq!(
        (status, &restored["state"]),
        (200, &json!("running")),
        "{restored}"
    );
    assert_eq!(restored["spec"]["limits"]["pids"]["max"], 5);
    assert_eq!(daemon.fake.written("a").unwrap(), "old");
    assert!(!daemon.fake.has_resumed("a"));

    daemon.post("/v1/instances/a/stop").await;
    daemon.fake.write("a", "new");
    let (_, restored) = daemon.post(&path).await;
    assert_eq!(
        restored["state"], "stopped",
        "what does not run is not started"
    );
    assert_eq!(daemon.fake.written("a").unwrap(), "old");
    let kinds = daemon.kinds_of_events("a").await;
    let told = |kind: &str| kinds.iter().filter(|told| *told == kind).count();
    assert_eq!(
        (told("snapshot.created"), told("instance.restored")),
        (1, 2)
    );
}

#[tokio::test]
async fn with_memory_an_instance_goes_on_from_there_unless_told_otherwise() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    take(&daemon, &json!({"name": "one", "stateful": true})).await;
    daemon.post("/v1/instances/a/kill").await;
    let path = format!("{SNAPSHOTS}/one/restore");
    let (_, restored) = daemon.post(&path).await;
    assert_eq!(restored["state"], "running");
    assert!(daemon.fake.has_resumed("a"));
    for (query, resumed) in [("", true), ("&stateful=false", false)] {
        let clone = json!({"from_snapshot": "a/one"});
        let path = format!("/v1/instances?start=true{query}");
        let (status, made) = daemon.ask("POST", &path, &clone).await;
        assert_eq!(status, 201, "{made}");
        let name = made["name"].as_str().unwrap();
        assert_eq!(daemon.fake.has_resumed(name), resumed);
        daemon.post(&format!("/v1/instances/{name}/restart")).await;
        assert!(
            !daemon.fake.has_resumed(name),
            "memory is there for one start"
        );
    }
    let without = json!({"stateful": false});
    daemon.ask("POST", &path, &without).await;
    assert!(!daemon.fake.has_resumed("a"));
}

#[tokio::test]
async fn a_clone_has_the_files_and_what_is_its_own() {
    let daemon = Daemon::new().await;
    let spec = json!({"name": "a", "image": "busybox", "command": ["serve"], "hostname": "a-host",
        "network": {"ports": [{"host": 8080, "instance": 80}]}, "env": {"A": "1"}});
    daemon.ask("POST", "/v1/instances?start=true", &spec).await;
    daemon.fake.write("a", "text");
    take(&daemon, &json!({})).await;
    daemon.fake.write("a", "later");
    let clone = json!({"name": "b", "from_snapshot": "a/snap0", "labels": {"x": "1"}});
    let (status, made) = daemon.ask("POST", "/v1/instances?start=true", &clone).await;
    assert_eq!((status, &made["state"]), (201, &json!("running")), "{made}");
    assert_eq!(daemon.fake.written("b").unwrap(), "text");
    let (_, source) = daemon.get("/v1/instances/a").await;
    assert_ne!(made["address"], source["address"]);
    assert_eq!(made["image_digest"], source["image_digest"]);
    let spec = &made["spec"];
    assert_eq!(
        (&spec["env"]["A"], &spec["labels"]["x"]),
        (&json!("1"), &json!("1"))
    );
    assert_eq!(
        (&spec["hostname"], &spec["network"]["ports"]),
        (&Value::Null, &json!([]))
    );

    // The original may go.
    daemon
        .ask_raw("DELETE", "/v1/instances/a?force=true", String::new())
        .await;
    assert_eq!(daemon.post("/v1/instances/b/restart").await.0, 200);
    assert_eq!(daemon.fake.written("b").unwrap(), "text");
    let put = json!({"from_snapshot": "a/snap0"});
    assert_eq!(daemon.ask("PUT", "/v1/instances/c", &put).await.0, 404);
}

#[tokio::test]
async fn what_goes_on_from_memory_keeps_its_size_until_it_runs() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    take(&daemon, &json!({"stateful": true})).await;
    let clone = json!({"name": "b", "from_snapshot": "a/snap0"});
    daemon.ask("POST", "/v1/instances", &clone).await;
    let path = "/v1/instances/b";
    for (field, limits) in [
        ("/limits/memory/max", json!({"memory": {"max": 1 << 26}})),
        ("/limits/cpu/cores", json!({"cpu": {"cores": 1.0}})),
    ] {
        let patch = json!({"limits": limits});
        let (status, problem) = daemon.ask("PATCH", path, &patch).await;
        assert_eq!((status, &problem["field"]), (400, &json!(field)));
    }
    let patch = json!({"limits": {"pids": {"max": 9}}});
    assert_eq!(daemon.ask("PATCH", path, &patch).await.0, 200);

    daemon.post("/v1/instances/b/start").await;
    assert!(daemon.fake.has_resumed("b"));
    let patch = json!({"limits": {"memory": {"max": 1 << 26}}});
    assert_eq!(daemon.ask("PATCH", path, &patch).await.0, 200);
}

/// Requests, and the status, code and field of what they are answered with. Paths are below
/// `/v1/instances`.
const REFUSALS: &str = r#"
    POST   /a/snapshots              {"name": "One"}                           400 invalid_field      /name
    POST   /a/snapshots              {"name": "../x"}                          400 invalid_field      /name
    POST   /a/snapshots              {"name": ".new-x"}                        400 invalid_field      /name
    POST   /a/snapshots              {"memory": true}                          400 unknown_field      /memory
    POST   /a/snapshots              {"name": "one"}                           409 name_taken         /name
    POST   /b/snapshots              {}                                        404 not_found          -
    GET    /b/snapshots              {}                                        404 not_found          -
    GET    /a/snapshots/two          {}                                        404 snapshot_not_found -
    DELETE /a/snapshots/two          {}                                        404 snapshot_not_found -
    POST   /a/snapshots/two/restore  {}                                        404 snapshot_not_found -
    POST   /a/snapshots/one/restore  {"stateful": true}                        400 invalid_field      /stateful
    POST   /                         {"from_snapshot": "a"}                    400 invalid_field      /from_snapshot
    POST   /                         {"from_snapshot": 7}                      400 invalid_field      /from_snapshot
    POST   /                         {"from_snapshot": "b/one"}                404 not_found          -
    POST   /                         {"from_snapshot": "a/two"}                404 snapshot_not_found -
    POST   /                         {"from_snapshot": "a/one", "image": "x"}  400 invalid_field      /image
    POST   /                         {"from_snapshot": "a/one", "name": "a"}   409 name_taken         /name
"#;

#[tokio::test]
async fn what_cannot_be_is_refused_with_a_reason_and_changes_nothing() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    take(&daemon, &json!({"name": "one"})).await;
    for row in REFUSALS.lines().filter(|row| !row.trim().is_empty()) {
        let (request, rest) = row.split_once('{').unwrap();
        let (body, answer) = rest.rsplit_once('}').unwrap();
        let request: Vec<&str> = request.split_whitespace().collect();
        let answer: Vec<&str> = answer.split_whitespace().collect();
        let path = format!("/v1/instances{}", request[1].trim_end_matches('/'));
        let body = format!("{{{body}}}");
        let (status, problem) = daemon.ask_raw(request[0], &path, body).await;
        let (status, code) = (status.to_string(), problem["code"].as_str());
        let field = problem["field"].as_str().unwrap_or("-");
        let found = [&status, code.unwrap_or_default(), field];
        assert_eq!(found, answer[..], "{row}: {problem}");
    }
    assert_eq!(names(&daemon).await, json!(["one"]));
    let all = daemon.get("/v1/instances").await.1;
    assert_eq!(all.as_array().unwrap().len(), 1);
    daemon.post("/v1/instances/a/stop").await;
    let stateful = json!({"stateful": true});
    let (status, problem) = daemon.ask("POST", SNAPSHOTS, &stateful).await;
    assert_eq!((status, &problem["code"]), (409, &json!("not_running")));
}

#[tokio::test]
async fn there_are_so_many_snapshots_and_no_more_and_they_go_with_their_instance() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    for _ in 0..SNAPSHOTS_MAX {
        take(&daemon, &json!({})).await;
    }
    let (status, problem) = daemon.ask("POST", SNAPSHOTS, &json!({})).await;
    assert_eq!((status, &problem["code"]), (507, &json!("full")));
    let path = format!("{SNAPSHOTS}/snap3");
    assert_eq!(daemon.ask_raw("DELETE", &path, String::new()).await.0, 204);
    assert_eq!(daemon.get(&path).await.0, 404);
    assert_eq!(daemon.fake.snapshots("a").len(), SNAPSHOTS_MAX - 1);
    take(&daemon, &json!({})).await;
    let (_, listed) = daemon.get(SNAPSHOTS).await;
    assert_eq!(listed.as_array().unwrap().len(), SNAPSHOTS_MAX);
    daemon
        .ask_raw("DELETE", "/v1/instances/a?force=true", String::new())
        .await;
    assert!(daemon.fake.snapshots("a").is_empty());
    daemon.run("a", "serve").await;
    assert_eq!(names(&daemon).await, json!([]));
}

#[tokio::test]
async fn a_full_disk_leaves_everything_as_it_was() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    daemon.fake.write("a", "old");
    take(&daemon, &json!({"name": "one"})).await;
    daemon.fake.write("a", "new");
    daemon.fake.fill_up(true);
    let (status, problem) = daemon.ask("POST", SNAPSHOTS, &json!({})).await;
    assert_eq!((status, &problem["code"]), (500, &json!("driver_failed")));
    let (status, _) = daemon.post(&format!("{SNAPSHOTS}/one/restore")).await;
    assert_eq!((status, daemon.state("a").await), (500, json!("running")));
    let clone = json!({"name": "b", "from_snapshot": "a/one"});
    assert_eq!(daemon.ask("POST", "/v1/instances", &clone).await.0, 500);
    assert_eq!(daemon.get("/v1/instances/b").await.0, 404);
    assert_eq!(daemon.fake.written("a").unwrap(), "new");
    assert_eq!(names(&daemon).await, json!(["one"]));

    daemon.fake.fill_up(false);
    assert_eq!(daemon.ask("POST", "/v1/instances", &clone).await.0, 201);
}

#[tokio::test]
async fn a_snapshot_that_was_cut_off_is_undone_by_the_next_hostd() {
    let daemon = Daemon::new().await;
    for name in ["a", "b"] {
        daemon.run(name, "serve").await;
    }
    daemon.fake.write("a", "text");
    take(&daemon, &json!({"name": "whole"})).await;
    let clone = json!({"name": "c", "from_snapshot": "a/whole"});
    daemon.ask("POST", "/v1/instances", &clone).await;
    daemon.post("/v1/instances/b/pause").await;
    let (dir, fake) = daemon.end().await;
    for name in ["a", "b"] {
        fake.cut_off_snapshot(name, "half");
    }
    let database = rusqlite::Connection::open(dir.path().join("db")).unwrap();
    let changed = database.execute(
        "UPDATE instances SET body = replace(body, '\"held\":false', '\"held\":true')
         WHERE name = 'a'",
        [],
    );
    assert_eq!(changed.unwrap(), 1);
    let changed = database.execute(
        "UPDATE instances SET body = replace(body, '\"removing\":false', '\"removing\":true')
         WHERE name = 'c'",
        [],
    );
    assert_eq!(changed.unwrap(), 1);
    drop(database);

    let daemon = Daemon::on(dir, fake).await;
    assert_eq!(daemon.state("a").await, "running");
    assert!(!daemon.fake.is_paused("a"), "it was held, and runs again");
    assert_eq!(
        daemon.state("b").await,
        "paused",
        "who asked for a pause has it"
    );
    let missing = daemon.get("/v1/instances/c").await;
    assert_eq!(missing.0, 404, "a clone without all of its files is none");
    // A request is answered after what there was to tidy.
    take(&daemon, &json!({"name": "new"})).await;
    assert_eq!(daemon.fake.snapshots("a"), ["new", "whole"]);
    assert_eq!(names(&daemon).await, json!(["whole", "new"]));
}
