//! The API over a real unix socket, with a fake driver: what a client sees, and what a restarted
//! hostd finds.

mod answers;
mod life;
mod snapshots;
mod streams;

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
            container: Kind {
                rules: &fake::RULES_WITHOUT_CONSOLE,
                ..kind.clone()
            },
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
