//! Exec, attach, logs and events: what goes on while a client listens.

use super::*;

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

/// Goes to the console of an instance, over a WebSocket.
async fn console(
    daemon: &Daemon,
    name: &str,
) -> Result<tokio_tungstenite::WebSocketStream<UnixStream>, Value> {
    let stream = UnixStream::connect(daemon.dir.path().join("socket"))
        .await
        .unwrap();
    let url = format!("ws://host/v1/instances/{name}/console?stdin=true");
    match tokio_tungstenite::client_async(url, stream).await {
        Ok((socket, _)) => Ok(socket),
        Err(tokio_tungstenite::tungstenite::Error::Http(response)) => {
            Err(serde_json::from_slice(response.body().as_deref().unwrap()).unwrap())
        }
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_console_is_a_machines_that_runs_also_for_a_hostd_that_came_later() {
    use futures::{SinkExt, StreamExt};
    use tokio_tungstenite::tungstenite::Message;

    let daemon = Daemon::new().await;
    daemon.run("a", "serve").await;
    let refused = console(&daemon, "a").await.unwrap_err();
    assert_eq!(refused["code"], "no_console");
    assert!(refused["hint"].as_str().unwrap().contains("exec -t"));
    let refused = console(&daemon, "none").await.unwrap_err();
    assert_eq!(refused["code"], "not_found");

    let spec = json!({"name": "b", "image": "busybox", "command": ["serve"], "isolation": "vm"});
    daemon.ask("POST", "/v1/instances", &spec).await;
    let refused = console(&daemon, "b").await.unwrap_err();
    assert_eq!(
        (&refused["code"], &refused["status"]),
        (&json!("not_running"), &json!(409))
    );
    let (status, refused) = daemon.post("/v1/instances/b/console").await;
    assert_eq!((status, &refused["code"]), (409, &json!("not_running")));

    daemon.post("/v1/instances/b/start").await;
    let daemon = daemon.restart().await;
    let mut socket = console(&daemon, "b").await.unwrap();
    // Also while its processors are held.
    daemon.post("/v1/instances/b/pause").await;
    let mut other = console(&daemon, "b").await.unwrap();
    for socket in [&mut socket, &mut other] {
        let typed = json!({"stdin": "aGk="}).to_string();
        socket.send(Message::text(typed)).await.unwrap();
        let heard = socket.next().await.unwrap().unwrap().into_text().unwrap();
        assert_eq!(heard.as_str(), r#"{"stdout":"aGk="}"#);
    }
    let signal = json!({"signal": 15}).to_string();
    socket.send(Message::text(signal)).await.unwrap();
    let heard = socket.next().await.unwrap().unwrap().into_text().unwrap();
    assert!(heard.contains(r#""signal":15"#), "{heard}");
    assert_eq!(daemon.state("b").await, "paused");
}
