//! How instances come, run, end and go, and what a new hostd makes of them.

use super::*;

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
