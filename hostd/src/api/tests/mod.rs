//! The API over a real unix socket, with a fake driver: what a client sees, and what a restarted
//! hostd finds.

mod snapshots;

use std::collections::{BTreeSet, HashSet};
use std::io::Write;
use std::net::Ipv4Addr;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::*;
use crate::driver::fake::{self, FakeHost};
use crate::driver::{Kind, Kinds};
use crate::instance::{Supplies, SupplyError};
use crate::limits::Capacity;
use crate::store::Store;

/// One image, and a /29's worth of addresses.
struct Shelf;

impl Supplies for Shelf {
    fn digest<'a>(
        &'a self,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Option<String>, SupplyError>> {
        let digest = (reference == "busybox").then(|| "sha256:00".to_owned());
        std::future::ready(Ok(digest)).boxed()
    }

    fn address(&self, used: &HashSet<Ipv4Addr>) -> Result<Ipv4Addr, SupplyError> {
        (2..7)
            .map(|last| Ipv4Addr::new(10, 0, 0, last))
            .find(|address| !used.contains(address))
            .ok_or(SupplyError::NoAddress)
    }
}

/// A hostd on a directory, which outlives it.
struct Daemon {
    dir: Arc<TempDir>,
    fake: FakeHost,
    context: Context,
    serving: JoinHandle<()>,
}

impl Daemon {
    async fn new() -> Self {
        Self::on(Arc::new(TempDir::new().unwrap()), FakeHost::default()).await
    }

    async fn on(dir: Arc<TempDir>, fake: FakeHost) -> Self {
        let store = Store::open(&dir.path().join("db")).unwrap();
        let events = Events::open(store.clone()).await.unwrap();
        let kind = Kind {
            rules: &fake::RULES,
            driver: Arc::new(fake.clone()),
        };
        let kinds = Kinds {
            container: kind.clone(),
            vm: kind,
        };
        let capacity = Capacity {
            cpus: BTreeSet::from([0, 1]),
            memory_bytes: 1 << 30,
            cgroup_v2: false,
        };
        let instances = Instances::open(store, events.clone(), kinds, capacity, Arc::new(Shelf))
            .await
            .unwrap();
        let context = Context {
            instances,
            events,
            images: ImageStore::open(&dir.path().join("images")).unwrap(),
            paths: Arc::new(Paths {
                state: dir.path().into(),
                run: dir.path().join("run"),
                helpers: "/nonexistent".into(),
                guest: "/nonexistent".into(),
            }),
            stopping: CancellationToken::new(),
        };
        let socket = dir.path().join("socket");
        // The one before has not removed it if it was killed.
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let serving = tokio::spawn({
            let context = context.clone();
            async move { serve(listener, context).await.unwrap() }
        });
        Self {
            dir,
            fake,
            context,
            serving,
        }
    }

    /// hostd ends; the host and its instances go on.
    async fn end(self) -> (Arc<TempDir>, FakeHost) {
        self.context.stopping.cancel();
        self.context.instances.close().await;
        self.serving.abort();
        (self.dir, self.fake)
    }

    async fn restart(self) -> Self {
        let (dir, fake) = self.end().await;
        Self::on(dir, fake).await
    }

    async fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        self.ask_raw(method, path, body.to_string()).await
    }

    async fn ask_raw(&self, method: &str, path: &str, body: String) -> (u16, Value) {
        let (status, text) = self.exchange(method, path, body, &[]).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    async fn exchange(
        &self,
        method: &str,
        path: &str,
        body: String,
        headers: &[(&str, &str)],
    ) -> (u16, String) {
        let stream = UnixStream::connect(self.dir.path().join("socket"))
            .await
            .unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(path)
            .header("host", "a");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body))).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8_lossy(&bytes).into_owned())
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.ask_raw("GET", path, String::new()).await
    }

    async fn post(&self, path: &str) -> (u16, Value) {
        self.ask_raw("POST", path, String::new()).await
    }

    /// Makes and starts an instance whose workload does `word`.
    async fn run(&self, name: &str, word: &str) {
        let spec = json!({"name": name, "image": "busybox", "command": [word]});
        let (status, body) = self.ask("POST", "/v1/instances?start=true", &spec).await;
        assert_eq!(status, 201, "{body}");
    }

    async fn state(&self, name: &str) -> Value {
        self.get(&format!("/v1/instances/{name}")).await.1["state"].clone()
    }

    async fn kinds_of_events(&self, name: &str) -> Vec<String> {
        let mut listener = self.context.events.listen(Some(0)).up_to_now();
        let events = listener.next().await.unwrap();
        events
            .into_iter()
            .filter(|event| event.subject == name)
            .map(|event| event.kind)
            .collect()
    }
}

#[tokio::test]
async fn an_instance_goes_through_its_life() {
    let daemon = Daemon::new().await;
    let spec = json!({"name": "a", "image": "busybox", "command": ["serve"]});
    let (status, created) = daemon.ask("POST", "/v1/instances", &spec).await;
    assert_eq!((status, &created["state"]), (201, &json!("created")));
    assert_eq!(created["address"], "10.0.0.2");
    assert!(
        daemon.fake.traces().is_empty(),
        "creating prepares nothing that runs"
    );

    for (verb, state) in [
        ("start", "running"),
        ("start", "running"),
        ("pause", "paused"),
        ("resume", "running"),
        ("restart", "running"),
        ("stop", "stopped"),
        ("stop", "stopped"),
        ("start", "running"),
        ("kill", "stopped"),
    ] {
        let (status, body) = daemon.post(&format!("/v1/instances/a/{verb}")).await;
        assert_eq!(
            (status, &body["state"]),
            (200, &json!(state)),
            "{verb}: {body}"
        );
    }
    let (_, killed) = daemon.get("/v1/instances/a").await;
    assert_eq!(
        killed["exit"],
        json!({"code": null, "signal": 9, "oom": false})
    );
    assert_eq!(killed["reason"], "requested");

    let (status, _) = daemon
        .ask_raw("DELETE", "/v1/instances/a", String::new())
        .await;
    assert_eq!(status, 204);
    assert_eq!(daemon.get("/v1/instances/a").await.0, 404);
    assert!(daemon.fake.traces().is_empty());
    let kinds = daemon.kinds_of_events("a").await;
    assert_eq!(kinds.first().unwrap(), "instance.created");
    assert_eq!(kinds.last().unwrap(), "instance.removed");
}

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
async fn put_makes_an_instance_once() {
    let daemon = Daemon::new().await;
    let spec = json!({"image": "busybox", "labels": {"a": "1"}});
    assert_eq!(daemon.ask("PUT", "/v1/instances/a", &spec).await.0, 201);
    assert_eq!(daemon.ask("PUT", "/v1/instances/a", &spec).await.0, 200);
    let other = json!({"image": "busybox"});
    assert_eq!(daemon.ask("PUT", "/v1/instances/a", &other).await.0, 409);
    let renamed = json!({"image": "busybox", "name": "b"});
    assert_eq!(daemon.ask("PUT", "/v1/instances/c", &renamed).await.0, 400);
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
async fn a_running_instance_is_removed_only_by_force() {
    let daemon = Daemon::new().await;
    daemon.run("a", "stubborn").await;
    let (status, problem) = daemon
        .ask_raw("DELETE", "/v1/instances/a", String::new())
        .await;
    assert_eq!((status, &problem["code"]), (409, &json!("refused")));
    let (status, _) = daemon
        .ask_raw("DELETE", "/v1/instances/a?force=true", String::new())
        .await;
    assert_eq!(status, 204);
    assert!(daemon.fake.traces().is_empty());
}

#[tokio::test]
async fn what_does_not_stop_when_asked_is_killed() {
    let daemon = Daemon::new().await;
    daemon.run("a", "stubborn").await;
    let (_, stopped) = daemon.post("/v1/instances/a/stop?timeout_s=0").await;
    assert_eq!(stopped["exit"]["signal"], 9);
    daemon.run("b", "polite").await;
    let (_, stopped) = daemon.post("/v1/instances/b/stop").await;
    assert_eq!(stopped["exit"]["code"], 143);
}

#[tokio::test]
async fn a_signal_other_than_kill_is_delivered_and_no_more() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    assert_eq!(daemon.post("/v1/instances/a/kill?signal=HUP").await.0, 200);
    assert_eq!(daemon.state("a").await, "running");
    assert_eq!(
        daemon.post("/v1/instances/a/kill?signal=nonsense").await.0,
        400
    );
}

#[tokio::test]
async fn a_start_that_does_not_get_ready_can_be_called_off() {
    let daemon = Arc::new(Daemon::new().await);
    let spec = json!({"name": "a", "image": "busybox", "command": ["unready"]});
    daemon.ask("POST", "/v1/instances", &spec).await;
    let starter = Arc::clone(&daemon);
    let starting = tokio::spawn(async move { starter.post("/v1/instances/a/start").await });
    let (status, _) = daemon.get("/v1/instances/a/wait?state=starting").await;
    assert_eq!(status, 200);
    assert_eq!(daemon.post("/v1/instances/a/pause").await.0, 409);
    let (status, stopped) = daemon.post("/v1/instances/a/kill").await;
    assert_eq!((status, &stopped["state"]), (200, &json!("stopped")));
    let (status, problem) = starting.await.unwrap();
    assert_eq!((status, &problem["code"]), (409, &json!("called_off")));
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
async fn exec_in_one_call_gives_output_exit_and_what_went_wrong() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    let path = "/v1/instances/a/exec";
    let (_, echo) = daemon
        .ask("POST", path, &json!({"command": ["echo", "hi"]}))
        .await;
    assert_eq!(
        (&echo["stdout"], &echo["exit"]["code"]),
        (&json!("hi\n"), &json!(0))
    );
    let cat = json!({"command": ["cat"], "input": "x".repeat(200_000)});
    let (_, cat) = daemon.ask("POST", path, &cat).await;
    assert_eq!(cat["stdout"].as_str().unwrap().len(), 200_000);
    let (_, failed) = daemon
        .ask("POST", path, &json!({"command": ["false"]}))
        .await;
    assert_eq!(failed["exit"]["code"], 1);
    let (status, absent) = daemon
        .ask("POST", path, &json!({"command": ["absent"]}))
        .await;
    assert_eq!((status, &absent["code"]), (422, &json!("no_such_program")));
    let (status, empty) = daemon.ask("POST", path, &json!({"command": []})).await;
    assert_eq!((status, &empty["field"]), (400, &json!("/command")));
    let flood = json!({"command": ["flood"], "timeout_ms": 100});
    let (_, flood) = daemon.ask("POST", path, &flood).await;
    assert_eq!(
        (&flood["timed_out"], &flood["truncated"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(flood["exit"]["signal"], 9);
    daemon.post("/v1/instances/a/stop").await;
    let (status, problem) = daemon
        .ask("POST", path, &json!({"command": ["true"]}))
        .await;
    assert_eq!((status, &problem["code"]), (409, &json!("not_running")));
}

#[tokio::test]
async fn exec_as_lines_gives_the_frames() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    let body = json!({"command": ["cat"], "input": "hi"}).to_string();
    let headers = [("accept", "application/x-ndjson")];
    let (_, text) = daemon
        .exchange("POST", "/v1/instances/a/exec", body, &headers)
        .await;
    let frames: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        frames,
        [
            json!({"stdout": "aGk="}),
            json!({"exit": {"code": 0, "signal": null, "oom": false}})
        ]
    );
}

#[tokio::test]
async fn exec_over_a_websocket_goes_both_ways() {
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;

    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    let stream = UnixStream::connect(daemon.dir.path().join("socket"))
        .await
        .unwrap();
    let url = "ws://host/v1/instances/a/exec";
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    for text in [
        json!({"command": ["cat"]}),
        json!({"stdin": "aGk="}),
        json!({"stdin": ""}),
    ] {
        socket.send(Message::text(text.to_string())).await.unwrap();
    }
    let mut frames = Vec::new();
    while let Some(Ok(Message::Text(text))) = socket.next().await {
        frames.push(serde_json::from_str::<Value>(&text).unwrap());
    }
    assert_eq!(frames[0], json!({"stdout": "aGk="}));
    assert_eq!(frames[1]["exit"]["code"], 0);

    let stream = UnixStream::connect(daemon.dir.path().join("socket"))
        .await
        .unwrap();
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    socket
        .send(Message::text(r#"{"command":["cat"],"colour":1}"#))
        .await
        .unwrap();
    let refused = socket.next().await.unwrap().unwrap().into_text().unwrap();
    assert!(refused.contains("/colour"), "{refused}");
}

#[tokio::test]
async fn waiting_ends_with_the_state_or_the_time() {
    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    let (status, problem) = daemon.get("/v1/instances/a/wait?timeout_s=0").await;
    assert_eq!((status, &problem["code"]), (408, &json!("wait_timeout")));
    daemon.fake.finish("a", 3);
    let (status, stopped) = daemon.get("/v1/instances/a/wait").await;
    assert_eq!((status, &stopped["exit"]["code"]), (200, &json!(3)));
    assert_eq!(stopped["reason"], "exited");
}

#[tokio::test]
async fn policies_restart_and_remove() {
    let daemon = Daemon::new().await;
    let always = json!({"name": "a", "image": "busybox", "restart": "always"});
    daemon
        .ask("POST", "/v1/instances?start=true", &always)
        .await;
    daemon.fake.finish("a", 0);
    daemon
        .get("/v1/instances/a/wait?state=stopped,starting")
        .await;
    let (status, again) = daemon.get("/v1/instances/a/wait?state=running").await;
    assert_eq!((status, &again["exit"]), (200, &Value::Null));
    let (_, stopped) = daemon.post("/v1/instances/a/stop").await;
    assert_eq!(stopped["state"], "stopped");
    let daemon = daemon.restart().await;
    assert_eq!(
        daemon.state("a").await,
        "stopped",
        "who asked for a stop gets one"
    );

    let once = json!({"name": "b", "image": "busybox", "command": ["serve"], "auto_remove": true});
    daemon.ask("POST", "/v1/instances?start=true", &once).await;
    let handle = daemon.context.instances.find("b").unwrap();
    daemon.fake.finish("b", 0);
    handle.closed().await;
    assert_eq!(daemon.get("/v1/instances/b").await.0, 404);
}

#[tokio::test]
async fn a_new_hostd_finds_what_the_old_one_left() {
    let daemon = Daemon::new().await;
    for name in ["runs", "ends", "paused", "lost"] {
        daemon.run(name, "serve").await;
    }
    daemon.post("/v1/instances/paused/pause").await;
    let (_, before) = daemon.get("/v1/instances/runs").await;
    let (dir, fake) = daemon.end().await;
    fake.finish("ends", 5);
    fake.lose("lost");
    let daemon = Daemon::on(dir, fake).await;

    let (_, after) = daemon.get("/v1/instances/runs").await;
    assert_eq!(
        (&after["state"], &after["pid"]),
        (&json!("running"), &before["pid"])
    );
    assert_eq!(daemon.state("paused").await, "paused");
    let (_, ended) = daemon.get("/v1/instances/ends").await;
    assert_eq!(
        (&ended["state"], &ended["exit"]["code"]),
        (&json!("stopped"), &json!(5))
    );
    let (_, lost) = daemon.get("/v1/instances/lost").await;
    assert_eq!(
        (&lost["state"], &lost["reason"]),
        (&json!("failed"), &json!("lost"))
    );
    assert_eq!(daemon.fake.traces(), ["paused", "runs"]);
    assert_eq!(daemon.post("/v1/instances/runs/stop").await.0, 200);
}

#[tokio::test]
async fn a_stop_that_was_cut_off_is_finished_by_the_next_hostd() {
    let daemon = Arc::new(Daemon::new().await);
    daemon.run("a", "stubborn").await;
    let stopper = Arc::clone(&daemon);
    let stopping = tokio::spawn(async move { stopper.post("/v1/instances/a/stop").await });
    daemon.get("/v1/instances/a/wait?state=stopping").await;
    stopping.abort();
    let _ = stopping.await;
    let daemon = Arc::into_inner(daemon).unwrap().restart().await;
    assert_eq!(daemon.state("a").await, "stopping");
    let (status, stopped) = daemon.post("/v1/instances/a/kill").await;
    assert_eq!((status, &stopped["state"]), (200, &json!("stopped")));
}

#[tokio::test]
async fn events_are_sent_in_order_from_where_the_client_was() {
    let daemon = Daemon::new().await;
    daemon.run("a", "true").await;
    daemon.get("/v1/instances/a/wait").await;
    let (_, text) = daemon
        .exchange("GET", "/v1/events?since=1&follow=false", String::new(), &[])
        .await;
    let ids: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("id: "))
        .collect();
    assert_eq!(ids, ["2", "3", "4"]);
    let kinds: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("event: "))
        .collect();
    assert_eq!(
        kinds,
        ["instance.starting", "instance.running", "instance.stopped"]
    );
}

#[tokio::test]
async fn a_log_is_followed_to_the_end_of_the_instance() {
    let daemon = Arc::new(Daemon::new().await);
    daemon.run("a", "serve").await;
    let path = daemon.context.paths.log("a");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let line = |text: &str| {
        let at = jiff::Timestamp::now();
        json!({"at": at, "stream": "stdout", "text": text}).to_string() + "\n"
    };
    std::fs::write(&path, line("first")).unwrap();
    let reader = Arc::clone(&daemon);
    let reading = tokio::spawn(async move {
        reader
            .exchange(
                "GET",
                "/v1/instances/a/logs?follow=true",
                String::new(),
                &[],
            )
            .await
            .1
    });
    let mut log = std::fs::File::options().append(true).open(&path).unwrap();
    log.write_all(line("second").as_bytes()).unwrap();
    daemon.fake.finish("a", 0);
    let text = reading.await.unwrap();
    assert_eq!(text.lines().count(), 2, "{text}");
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
    assert_eq!(daemon.get("/v1/host").await.1["instances"], 1);
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

#[tokio::test]
async fn a_client_may_attach_before_the_start() {
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;

    let daemon = Daemon::new().await;
    let spec = json!({"name": "a", "image": "busybox", "command": ["serve"], "stdin": true});
    daemon.ask("POST", "/v1/instances", &spec).await;
    let stream = UnixStream::connect(daemon.dir.path().join("socket"))
        .await
        .unwrap();
    let url = "ws://host/v1/instances/a/attach?stdin=true";
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.unwrap();
    socket
        .send(Message::text(json!({"stdin": "aGk="}).to_string()))
        .await
        .unwrap();
    daemon.post("/v1/instances/a/start").await;
    let heard = socket.next().await.unwrap().unwrap().into_text().unwrap();
    assert_eq!(heard.as_str(), r#"{"stdout":"aGk="}"#);
}
