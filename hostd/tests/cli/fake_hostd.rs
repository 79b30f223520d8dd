//! A hostd without instances: it keeps what it is told, and its workloads are the ones below.
//!
//! The first word of a command says what a process does:
//! - `early CODE`: writes `early` to its output the moment it starts, then its input to its output,
//!   then `bye` to its errors, and ends with CODE
//! - `signalled`: ends by the first signal that it gets
//! - `size`: writes the sizes of its terminal, and ends after the second
//! - `count`: writes how many bytes of input it got, and ends
//! - `absent`: there is no such program

use std::collections::BTreeMap;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use agent::protocol::Frame;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hostd::api::types::{
    Event, ExecRequest, Image, ImportRequest, Instance, InstanceSpec, InstanceState, Isolation,
    LogLine, PatchResult, Problem, PullRequest, Stats, TransferEvent,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;

type Query_ = Query<BTreeMap<String, String>>;

/// What hostd knows.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) instances: BTreeMap<String, Instance>,
    pub(crate) images: Vec<String>,
    /// Method, path and query of every request, in order.
    pub(crate) requests: Vec<String>,
}

#[derive(Clone, Debug)]
struct Server {
    known: Arc<Mutex<Known>>,
    /// Names of what was started, to tell those who wait for it.
    started: watch::Sender<Vec<String>>,
}

impl Server {
    fn instance(&self, name: &str) -> Option<Instance> {
        self.known.lock().unwrap().instances.get(name).cloned()
    }
}

/// A running fake, and the socket that it listens on.
#[derive(Debug)]
pub(crate) struct FakeHostd {
    pub(crate) known: Arc<Mutex<Known>>,
    dir: TempDir,
    _runtime: Runtime,
}

impl FakeHostd {
    pub(crate) fn start() -> FakeHostd {
        let dir = tempfile::tempdir().unwrap();
        let known = Arc::new(Mutex::new(Known {
            images: vec!["busybox".into()],
            ..Known::default()
        }));
        let server = Server {
            known: known.clone(),
            started: watch::Sender::default(),
        };
        let runtime = Runtime::new().unwrap();
        let listener =
            runtime.block_on(async { UnixListener::bind(dir.path().join("socket")).unwrap() });
        runtime.spawn(async move { axum::serve(listener, router(server)).await });
        FakeHostd {
            known,
            dir,
            _runtime: runtime,
        }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hostctl"));
        command
            .env("HOSTD_SOCKET", self.dir.path().join("socket"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn hostctl(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// An instance that runs already.
    pub(crate) fn has(&self, name: &str, spec: &InstanceSpec) {
        let mut instance = new_instance(name, spec);
        instance.state = InstanceState::Running;
        self.known
            .lock()
            .unwrap()
            .instances
            .insert(name.into(), instance);
    }

    /// A machine that runs.
    pub(crate) fn has_vm(&self, name: &str) {
        let spec = InstanceSpec {
            isolation: Isolation::Vm,
            ..InstanceSpec::default()
        };
        self.has(name, &spec);
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.known.lock().unwrap().requests.clone()
    }
}

fn new_instance(name: &str, spec: &InstanceSpec) -> Instance {
    let instance = json!({
        "name": name, "state": "created", "spec": spec, "image_digest": "sha256:00",
        "created_at": "2026-01-01T00:00:00Z", "generation": 1,
    });
    serde_json::from_value(instance).unwrap()
}

fn router(server: Server) -> Router {
    Router::new()
        .route("/v1/instances", get(list).post(create))
        .route(
            "/v1/instances/{name}",
            get(show).patch(update).delete(remove),
        )
        .route("/v1/instances/{name}/start", post(start))
        .route("/v1/instances/{name}/stop", post(show))
        .route("/v1/instances/{name}/attach", get(attach))
        .route("/v1/instances/{name}/console", get(console))
        .route("/v1/instances/{name}/exec", get(exec))
        .route("/v1/instances/{name}/logs", get(logs))
        .route(
            "/v1/instances/{name}/stats",
            get(async || Json(Stats::default())),
        )
        .route("/v1/instances/{name}/wait", get(wait))
        .route("/v1/images", get(images))
        .route("/v1/images/pull", post(pull))
        .route("/v1/images/import", post(import))
        .route("/v1/events", get(events))
        .layer(middleware::from_fn_with_state(server.clone(), note))
        .with_state(server)
}

/// Keeps what was asked for.
async fn note(State(server): State<Server>, request: Request, next: Next) -> Response {
    let line = format!("{} {}", request.method(), request.uri());
    server.known.lock().unwrap().requests.push(line);
    next.run(request).await
}

fn problem(status: StatusCode, code: &str, detail: &str) -> Response {
    let problem = Problem {
        code: code.into(),
        status: status.as_u16(),
        detail: detail.into(),
        field: None,
        hint: Some("Do something else.".into()),
        retryable: false,
        request_id: "1".into(),
    };
    (status, Json(problem)).into_response()
}

fn not_found(name: &str) -> Response {
    problem(
        StatusCode::NOT_FOUND,
        "not_found",
        &format!("there is no instance `{name}`"),
    )
}

async fn list(State(server): State<Server>) -> Json<Vec<Instance>> {
    Json(
        server
            .known
            .lock()
            .unwrap()
            .instances
            .values()
            .cloned()
            .collect(),
    )
}

async fn create(State(server): State<Server>, Json(spec): Json<InstanceSpec>) -> Response {
    let mut known = server.known.lock().unwrap();
    if !known.images.contains(&spec.image) {
        return problem(
            StatusCode::NOT_FOUND,
            "image_not_found",
            "there is no such image",
        );
    }
    let name = spec.name.clone().unwrap_or_else(|| "chosen".into());
    let instance = new_instance(&name, &spec);
    known.instances.insert(name, instance.clone());
    (StatusCode::CREATED, Json(instance)).into_response()
}

async fn show(State(server): State<Server>, Path(name): Path<String>) -> Response {
    match server.instance(&name) {
        Some(instance) => Json(instance).into_response(),
        None => not_found(&name),
    }
}

async fn update(
    State(server): State<Server>,
    Path(name): Path<String>,
    Json(patch): Json<Value>,
) -> Response {
    let Some(mut instance) = server.instance(&name) else {
        return not_found(&name);
    };
    instance.spec.limits = serde_json::from_value(patch["limits"].clone()).unwrap();
    let plan = json!({"/limits/pids/max": "live", "/limits/memory/max": "at_restart"});
    let plan = serde_json::from_value(plan).unwrap();
    Json(PatchResult { plan, instance }).into_response()
}

async fn remove(State(server): State<Server>, Path(name): Path<String>) -> Response {
    match server.known.lock().unwrap().instances.remove(&name) {
        Some(_) => StatusCode::NO_CONTENT.into_response(),
        None => not_found(&name),
    }
}

async fn start(State(server): State<Server>, Path(name): Path<String>) -> Response {
    let refused = {
        let mut known = server.known.lock().unwrap();
        let Some(instance) = known.instances.get_mut(&name) else {
            return not_found(&name);
        };
        instance.state = InstanceState::Running;
        first_word(&instance.spec) == "absent"
    };
    if refused {
        return problem(
            StatusCode::BAD_REQUEST,
            "no_such_program",
            "there is no such program",
        );
    }
    server.started.send_modify(|names| names.push(name.clone()));
    show(State(server), Path(name)).await
}

fn first_word(spec: &InstanceSpec) -> String {
    spec.command
        .as_ref()
        .and_then(|words| words.first().cloned())
        .unwrap_or_default()
}

async fn wait(State(server): State<Server>, Path(name): Path<String>) -> Response {
    let Some(mut instance) = server.instance(&name) else {
        return not_found(&name);
    };
    instance.state = InstanceState::Stopped;
    instance.exit = serde_json::from_value(json!({"code": 7, "signal": null, "oom": false})).ok();
    Json(instance).into_response()
}

async fn attach(
    State(server): State<Server>,
    Path(name): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let Some(instance) = server.instance(&name) else {
        return not_found(&name);
    };
    let command = instance.spec.command.unwrap_or_default();
    upgrade.on_upgrade(async move |socket| {
        if instance.state == InstanceState::Created {
            let mut started = server.started.subscribe();
            started
                .wait_for(|names| names.contains(&name))
                .await
                .unwrap();
        }
        work(socket, &command).await;
    })
}

async fn console(
    State(server): State<Server>,
    Path(name): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let Some(instance) = server.instance(&name) else {
        return not_found(&name);
    };
    if instance.spec.isolation == Isolation::Container {
        let detail = "a container has no console";
        return problem(StatusCode::CONFLICT, "no_console", detail);
    }
    upgrade.on_upgrade(async |socket| work(socket, &["early".into(), "0".into()]).await)
}

async fn exec(
    State(server): State<Server>,
    Path(name): Path<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    if !server.known.lock().unwrap().instances.contains_key(&name) {
        return not_found(&name);
    }
    upgrade.on_upgrade(async move |mut socket| {
        let Some(Ok(Message::Text(text))) = socket.recv().await else {
            return;
        };
        let request: ExecRequest = serde_json::from_str(&text).unwrap();
        work(socket, &request.command).await;
    })
}

/// Is the process that `command` asks for, until it ends or its user goes.
async fn work(mut socket: WebSocket, command: &[String]) {
    let word = command.first().map(String::as_str).unwrap_or_default();
    if word == "absent" {
        let message = "absent: no such program".to_owned();
        return send(&mut socket, Frame::Error { code: 127, message }).await;
    }
    if word == "early" {
        send(
            &mut socket,
            Frame::Stdout(BASE64_STANDARD.encode("early\n")),
        )
        .await;
    }
    let exit = |code, signal| Frame::Exit {
        code,
        signal,
        oom: false,
    };
    let (mut count, mut sizes) = (0, 0);
    while let Some(Ok(Message::Text(text))) = socket.recv().await {
        match (word, serde_json::from_str(&text).unwrap()) {
            ("early", Frame::Stdin(data)) if data.is_empty() => {
                send(&mut socket, Frame::Stderr(BASE64_STANDARD.encode("bye\n"))).await;
                let code = command.get(1).and_then(|code| code.parse().ok());
                return send(&mut socket, exit(code, None)).await;
            }
            ("early", Frame::Stdin(data)) => send(&mut socket, Frame::Stdout(data)).await,
            ("count", Frame::Stdin(data)) if data.is_empty() => {
                let text = BASE64_STANDARD.encode(format!("{count}\n"));
                send(&mut socket, Frame::Stdout(text)).await;
                return send(&mut socket, exit(Some(0), None)).await;
            }
            ("count", Frame::Stdin(data)) => {
                count += BASE64_STANDARD.decode(data).unwrap().len();
            }
            ("size", Frame::Resize { rows, cols }) => {
                let text = BASE64_STANDARD.encode(format!("{rows}x{cols}\n"));
                send(&mut socket, Frame::Stdout(text)).await;
                sizes += 1;
                if sizes == 2 {
                    return send(&mut socket, exit(Some(0), None)).await;
                }
            }
            (_, Frame::Signal(signal)) => return send(&mut socket, exit(None, Some(signal))).await,
            (_, _) => {}
        }
    }
}

async fn send(socket: &mut WebSocket, frame: Frame) {
    let text = serde_json::to_string(&frame).unwrap();
    // The user may have gone.
    let _ = socket.send(Message::Text(text.into())).await;
}

async fn logs(
    State(server): State<Server>,
    Path(name): Path<String>,
    Query(_): Query_,
) -> Response {
    if !server.known.lock().unwrap().instances.contains_key(&name) {
        return not_found(&name);
    }
    let line = |stream: &str, text: &str| {
        let at = "2026-01-01T00:00:00Z".parse().unwrap();
        let line = LogLine {
            at,
            stream: stream.into(),
            text: text.into(),
        };
        serde_json::to_string(&line).unwrap() + "\n"
    };
    let body = line("stdout", "one\n") + &line("stderr", "two\n") + &line("stdout", "no end");
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

async fn images(State(server): State<Server>) -> Json<Vec<Image>> {
    Json(
        server
            .known
            .lock()
            .unwrap()
            .images
            .iter()
            .map(|name| image(name))
            .collect(),
    )
}

fn image(reference: &str) -> Image {
    Image {
        reference: reference.into(),
        digest: "sha256:0123456789abcdef".into(),
        size: 3 << 20,
        architecture: "amd64".into(),
        created_at: "2026-01-01T00:00:00Z".parse().unwrap(),
    }
}

async fn pull(State(server): State<Server>, Json(request): Json<PullRequest>) -> Response {
    if request.reference.contains("broken") {
        let body = json!({"failed": {
            "code": "digest_mismatch", "status": 502, "detail": "the digest does not match",
            "retryable": true, "request_id": "1",
        }});
        return lines(&[progress(1), body.to_string()]);
    }
    server
        .known
        .lock()
        .unwrap()
        .images
        .push(request.reference.clone());
    let done = TransferEvent::Done(image(&request.reference));
    lines(&[
        progress(1),
        progress(2),
        serde_json::to_string(&done).unwrap(),
    ])
}

async fn import(State(server): State<Server>, Json(request): Json<ImportRequest>) -> Response {
    assert!(
        request.path.starts_with('/'),
        "hostd has a working directory of its own"
    );
    let reference = request.reference.unwrap_or_else(|| "its-own".into());
    server.known.lock().unwrap().images.push(reference.clone());
    lines(&[serde_json::to_string(&TransferEvent::Done(image(&reference))).unwrap()])
}

fn progress(done_bytes: u64) -> String {
    let digest = "sha256:0123456789abcdef".to_owned();
    let event = TransferEvent::Progress {
        digest,
        done_bytes,
        total_bytes: 2,
    };
    serde_json::to_string(&event).unwrap()
}

fn lines(lines: &[String]) -> Response {
    (
        [(header::CONTENT_TYPE, "application/x-ndjson")],
        lines.join("\n") + "\n",
    )
        .into_response()
}

async fn events(Query(query): Query_) -> Response {
    let since: u64 = query.get("since").map_or(0, |since| since.parse().unwrap());
    let body: String = (since + 1..=3)
        .map(|sequence| {
            let event = Event {
                sequence,
                at: "2026-01-01T00:00:00Z".parse().unwrap(),
                kind: "instance.created".into(),
                subject: format!("web-{sequence}"),
                data: json!({}),
            };
            let data = serde_json::to_string(&event).unwrap();
            format!("id: {sequence}\nevent: {}\ndata: {data}\n\n", event.kind)
        })
        .collect();
    (
        [(header::CONTENT_TYPE, "text/event-stream")],
        format!(":\n\n{body}"),
    )
        .into_response()
}
