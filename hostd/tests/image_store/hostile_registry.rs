//! Registries that lie, stall, never end, or ask for credentials.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::stream::{self, StreamExt};
use hostd::api::types;
use hostd::image::{Credentials, ImageError, PullOptions};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::fixture::{Image, Layer, Packing, Store, demo_layers, unheard};

/// How a blob is answered.
#[derive(Clone)]
enum Answer {
    Bytes(Vec<u8>),
    /// Without a length, and without an end.
    Endless,
    /// Half of it, and then the connection breaks; the rest to who asks for it.
    Broken(Vec<u8>),
    /// All of it, but only when it is released.
    Held(Vec<u8>),
    /// Some bytes, and then nothing.
    Stalled(Vec<u8>),
}

#[derive(Clone)]
struct Server {
    manifest: Answer,
    blobs: Arc<HashMap<String, Answer>>,
    requests: Arc<Mutex<HashMap<String, usize>>>,
    stalled: Arc<Notify>,
    release: Arc<Notify>,
    /// A token that is asked for, if any.
    token: Option<&'static str>,
    address: SocketAddr,
    tokens_given: Arc<AtomicUsize>,
}

impl Server {
    async fn start(
        image: &Image,
        change: impl FnOnce(&mut Server, &mut HashMap<String, Answer>),
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let blobs = image.blobs.iter();
        let mut blobs = blobs
            .map(|(digest, bytes)| (digest.clone(), Answer::Bytes(bytes.clone())))
            .collect();
        let mut server = Self {
            manifest: Answer::Bytes(image.manifest.clone()),
            blobs: Arc::default(),
            requests: Arc::default(),
            stalled: Arc::default(),
            release: Arc::default(),
            token: None,
            address: listener.local_addr().unwrap(),
            tokens_given: Arc::default(),
        };
        change(&mut server, &mut blobs);
        server.blobs = Arc::new(blobs);
        let routes = Router::new()
            .route("/token", get(token))
            .route("/v2/{name}/manifests/{tag}", get(manifest))
            .route("/v2/{name}/blobs/{digest}", get(blob))
            .with_state(server.clone());
        tokio::spawn(async { axum::serve(listener, routes).await });
        server
    }

    fn reference(&self) -> String {
        format!("{}/demo:1", self.address)
    }

    async fn pull(&self, store: &Store) -> Result<types::Image, ImageError> {
        store
            .store
            .pull(&self.reference(), PullOptions::default(), unheard())
            .await
    }

    /// The challenge to a request without the token.
    fn refuse(&self, headers: &HeaderMap) -> Option<Response> {
        let token = self.token?;
        let given = headers
            .get("authorization")
            .and_then(|value| value.to_str().ok());
        if given == Some(&format!("Bearer {token}")) {
            return None;
        }
        let realm = format!("http://{}/token", self.address);
        let challenge =
            format!(r#"Bearer realm="{realm}",service="demo",scope="repository:demo:pull""#);
        Some((StatusCode::UNAUTHORIZED, [("www-authenticate", challenge)]).into_response())
    }

    fn answer(&self, answer: &Answer, headers: &HeaderMap) -> Response {
        let chunk = Ok::<_, io::Error>(Bytes::from(vec![0; 64 * 1024]));
        match answer {
            Answer::Bytes(bytes) => bytes.clone().into_response(),
            Answer::Endless => {
                let chunks = stream::repeat_with(move || {
                    Ok::<_, io::Error>(chunk.as_ref().unwrap().clone())
                });
                Body::from_stream(chunks).into_response()
            }
            Answer::Broken(bytes) => {
                let half = bytes.len() / 2;
                if headers.contains_key("range") {
                    assert_eq!(headers["range"], format!("bytes={half}-"));
                    return (StatusCode::PARTIAL_CONTENT, bytes[half..].to_vec()).into_response();
                }
                let head = Ok(Bytes::from(bytes[..half].to_vec()));
                // Told apart from an end by the length.
                let length = [("content-length", bytes.len().to_string())];
                let cut = stream::once(async {
                    tokio::task::yield_now().await;
                    Err(io::Error::other("the connection breaks"))
                });
                (length, Body::from_stream(stream::iter([head]).chain(cut))).into_response()
            }
            Answer::Held(bytes) => {
                let (stalled, release) = (Arc::clone(&self.stalled), Arc::clone(&self.release));
                let bytes = Bytes::from(bytes.clone());
                let body = stream::once(async move {
                    stalled.notify_one();
                    release.notified().await;
                    Ok::<_, io::Error>(bytes)
                });
                Body::from_stream(body).into_response()
            }
            Answer::Stalled(bytes) => {
                let stalled = Arc::clone(&self.stalled);
                let head = stream::iter([Ok::<_, io::Error>(Bytes::from(bytes.clone()))]);
                let tail = stream::once(async move {
                    stalled.notify_one();
                    std::future::pending().await
                });
                Body::from_stream(head.chain(tail)).into_response()
            }
        }
    }
}

async fn token(State(server): State<Server>, headers: HeaderMap) -> Response {
    // user:secret
    if headers
        .get("authorization")
        .is_none_or(|value| value != "Basic dXNlcjpzZWNyZXQ=")
    {
        return (
            StatusCode::UNAUTHORIZED,
            r#"{"errors":[{"code":"DENIED","message":"who are you"}]}"#,
        )
            .into_response();
    }
    server.tokens_given.fetch_add(1, Ordering::Relaxed);
    format!(r#"{{"token":"{}"}}"#, server.token.unwrap()).into_response()
}

async fn manifest(State(server): State<Server>, headers: HeaderMap) -> Response {
    server
        .refuse(&headers)
        .unwrap_or_else(|| server.answer(&server.manifest, &headers))
}

async fn blob(
    State(server): State<Server>,
    Path((_, digest)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Some(refusal) = server.refuse(&headers) {
        return refusal;
    }
    *server
        .requests
        .lock()
        .unwrap()
        .entry(digest.clone())
        .or_default() += 1;
    match server.blobs.get(&digest) {
        Some(answer) => server.answer(answer, &headers),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_without_end_is_left_at_its_size_and_nothing_is_kept() {
    let image = Image::demo(Packing::Gzip);
    let victim = image.layers[0].clone();
    let server = Server::start(&image, |_, blobs| {
        drop(blobs.insert(victim.clone(), Answer::Endless));
    })
    .await;
    let store = Store::new();
    match server.pull(&store).await {
        Err(ImageError::SizeMismatch {
            digest,
            problem: "longer",
            ..
        }) => assert_eq!(digest, victim),
        other => panic!("{other:?}"),
    }
    store.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_of_another_length_or_content_is_refused() {
    let image = Image::demo(Packing::Gzip);
    let victim = image.layers[1].clone();
    let good = image.blobs[&victim].clone();
    let longer = [&good[..], b"x"].concat();
    let shorter = good[..good.len() - 1].to_vec();
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    for (bytes, problem) in [
        (longer, Some("longer")),
        (shorter, Some("shorter")),
        (other, None),
    ] {
        let answer = Answer::Bytes(bytes);
        let server = Server::start(&image, |_, blobs| {
            drop(blobs.insert(victim.clone(), answer));
        })
        .await;
        let store = Store::new();
        match (server.pull(&store).await, problem) {
            (Err(ImageError::SizeMismatch { problem, .. }), Some(expected)) => {
                assert_eq!(problem, expected);
            }
            (Err(ImageError::DigestMismatch { expected, .. }), None) => {
                assert_eq!(expected, victim);
            }
            (other, _) => panic!("{problem:?}: {other:?}"),
        }
        store.assert_empty();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_without_end_costs_bounded_memory() {
    let image = Image::demo(Packing::Gzip);
    let server = Server::start(&image, |server, _| server.manifest = Answer::Endless).await;
    let store = Store::new();
    assert!(matches!(
        server.pull(&store).await,
        Err(ImageError::Malformed { .. })
    ));
    store.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_breaks_a_rule_is_refused_by_the_store() {
    let evil = Layer::default().file("../evil", 0o644, b"x");
    let image = Image::new(&[evil], Packing::Gzip, "amd64");
    let server = Server::start(&image, |_, _| ()).await;
    let store = Store::new();
    match server.pull(&store).await {
        Err(ImageError::Refused { entry, .. }) => assert_eq!(entry, "../evil"),
        other => panic!("{other:?}"),
    }
    store.assert_empty();
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_of_one_image_at_one_time_fetch_each_blob_once() {
    let image = Image::demo(Packing::Gzip);
    let server = Server::start(&image, |_, _| ()).await;
    let store = Store::new();
    let (one, two, three) = tokio::join!(
        server.pull(&store),
        server.pull(&store),
        server.pull(&store)
    );
    let one = one.unwrap();
    assert_eq!((&one, &one), (&two.unwrap(), &three.unwrap()));
    let requests = server.requests.lock().unwrap();
    for layer in &image.layers {
        assert_eq!(requests[layer], 1, "{layer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_pull_leaves_nothing_and_does_not_hinder_the_next() {
    let image = Image::demo(Packing::Gzip);
    let victim = image.layers[0].clone();
    let half = image.blobs[&victim][..100_000].to_vec();
    let stalling = Server::start(&image, |_, blobs| {
        drop(blobs.insert(victim, Answer::Stalled(half)));
    })
    .await;
    let store = Store::new();
    tokio::select! {
        result = stalling.pull(&store) => panic!("{result:?}"),
        () = stalling.stalled.notified() => {}
    }
    store.assert_empty();

    let server = Server::start(&image, |_, _| ()).await;
    server.pull(&store).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_asked_for_once_with_the_credentials() {
    let image = Image::demo(Packing::Gzip);
    let server = Server::start(&image, |server, _| server.token = Some("open-sesame")).await;
    let store = Store::new();
    match server.pull(&store).await {
        Err(error @ ImageError::Registry { status: 401, .. }) => {
            assert!(error.to_string().contains("who are you"), "{error}");
            assert!(error.hint().unwrap().contains("config.json"));
        }
        other => panic!("{other:?}"),
    }
    let credentials = Credentials {
        username: "user".to_owned(),
        password: "secret".to_owned(),
    };
    let options = PullOptions {
        credentials: Some(credentials),
        ..PullOptions::default()
    };
    store
        .store
        .pull(&server.reference(), options, unheard())
        .await
        .unwrap();
    assert_eq!(server.tokens_given.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_collection_leaves_what_a_pull_relies_on() {
    let base = Image::new(&demo_layers()[..1], Packing::Gzip, "amd64");
    let whole = Image::demo(Packing::Gzip);
    let store = Store::new();
    let first = Server::start(&base, |_, _| ())
        .await
        .pull(&store)
        .await
        .unwrap();
    let held = Answer::Held(whole.blobs[&whole.layers[1]].clone());
    let server = Server::start(&whole, |_, blobs| {
        drop(blobs.insert(whole.layers[1].clone(), held));
    })
    .await;
    let collect = async {
        server.stalled.notified().await;
        store.store.remove(&first.digest).await.unwrap();
        let collected = store.store.collect_garbage(&HashSet::new()).await.unwrap();
        assert_eq!(
            collected.files, 2,
            "the manifest and the configuration of the base"
        );
        server.release.notify_one();
    };
    let (pulled, ()) = tokio::join!(server.pull(&store), collect);
    let layers = store
        .store
        .unpacked(&pulled.unwrap().digest)
        .unwrap()
        .layers;
    assert!(layers.iter().all(|layer| layer.is_dir()));
    assert!(
        !server
            .requests
            .lock()
            .unwrap()
            .contains_key(&whole.layers[0])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_goes_on_where_its_connection_broke() {
    let image = Image::demo(Packing::Gzip);
    let victim = image.layers[0].clone();
    let answer = Answer::Broken(image.blobs[&victim].clone());
    let server = Server::start(&image, |_, blobs| {
        drop(blobs.insert(victim.clone(), answer));
    })
    .await;
    let store = Store::new();
    server.pull(&store).await.unwrap();
    assert_eq!(server.requests.lock().unwrap()[&victim], 2);
}

#[tokio::test]
async fn a_registry_that_is_not_there_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let store = Store::new();
    let reference = format!("{address}/demo:1");
    match store
        .store
        .pull(&reference, PullOptions::default(), unheard())
        .await
    {
        Err(ImageError::Unreachable { url, .. }) => assert!(url.contains(&address.to_string())),
        other => panic!("{other:?}"),
    }
}
