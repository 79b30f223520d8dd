//! The part of the distribution protocol that a pull needs (OCI distribution-spec, "Pull").
//!
//! Written on an HTTP client rather than on a registry client, for two things that those lack:
//! every answer of a hostile registry is read up to a bound only, and a registry in plain HTTP can
//! be used on a host that has no certificates.

use std::net::IpAddr;
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use oci_spec::distribution::Reference;
use reqwest::header::{ACCEPT, HeaderMap, RANGE, WWW_AUTHENTICATE};
use reqwest::redirect::Policy;
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use rustls::crypto::ring;
use serde::Deserialize;
use tokio::sync::mpsc;

use super::credentials::{self, Credentials};
use super::error::ImageError;
use super::layout::Digest;
use super::manifest::{Content, MANIFEST_BYTES_MAX, MANIFEST_MEDIA_TYPES};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Without a byte for so long, a transfer has failed.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// A blob whose connection breaks is continued as often, after as long.
const RETRY_DELAYS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_secs(2),
    Duration::from_secs(10),
];

const REDIRECTS_MAX: usize = 5;

/// Tokens are a few KiB.
const TOKEN_BYTES_MAX: u64 = 256 * 1024;

/// Of an error's body so much is read, and of its text so much is passed on.
const ERROR_BYTES_MAX: u64 = 64 * 1024;
const ERROR_TEXT_CHARS_MAX: usize = 300;

/// Chunks between the network and the thread that unpacks; each is at most some 400 KiB.
pub(super) const CHUNKS_MAX: usize = 8;

/// What one pull says to one repository.
#[derive(Debug)]
pub(super) struct Session {
    client: Client,
    /// `https://HOST/v2/REPOSITORY`.
    base: String,
    repository: String,
    /// Plain HTTP is allowed.
    plain: bool,
    credentials: Option<Credentials>,
    authorization: Mutex<Authorization>,
}

#[derive(Clone, Debug)]
enum Authorization {
    None,
    Basic(Credentials),
    Bearer(String),
}

/// What a registry asks for in `WWW-Authenticate`.
#[derive(Debug, Eq, PartialEq)]
enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

#[derive(Deserialize)]
struct ErrorBody {
    #[serde(default)]
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

impl Session {
    /// Prepares to talk to the registry of `reference`; nothing is sent yet.
    pub(super) fn new(
        reference: &Reference,
        insecure: bool,
        credentials: Option<Credentials>,
    ) -> Result<Self, ImageError> {
        let registry = reference.registry();
        let loopback = is_loopback(registry);
        let plain = insecure || loopback;
        let host = if registry == "docker.io" {
            "registry-1.docker.io"
        } else {
            registry
        };
        let scheme = if plain { "http" } else { "https" };
        let repository = reference.repository().to_owned();
        Ok(Self {
            client: client(plain, loopback)?,
            base: format!("{scheme}://{host}/v2/{repository}"),
            repository,
            plain,
            credentials: credentials.or_else(|| credentials::find(registry)),
            authorization: Mutex::new(Authorization::None),
        })
    }

    /// The manifest or index that `name`, a tag or a digest, stands for.
    pub(super) async fn manifest(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let accept = MANIFEST_MEDIA_TYPES.join(", ");
        let response = self
            .get(&format!("{}/manifests/{name}", self.base), &accept, 0)
            .await?;
        let what = format!("manifest {name}");
        let bytes = read_body(response, &what, MANIFEST_BYTES_MAX).await?;
        match Digest::parse(name) {
            Some(expected) => check(&expected, bytes),
            None => Ok(bytes),
        }
    }

    /// A small blob, such as a configuration.
    pub(super) async fn blob(
        &self,
        content: &Content,
        bytes_max: u64,
    ) -> Result<Vec<u8>, ImageError> {
        let response = self.get_blob(content, 0).await?;
        let what = format!("blob {}", content.digest);
        let bytes = read_body(response, &what, content.size.min(bytes_max)).await?;
        check(&content.digest, bytes)
    }

    /// Passes a blob on chunk by chunk, until its end or until nobody listens. Where the connection
    /// breaks it goes on at that point: who listens checks the whole by its digest.
    pub(super) async fn stream_blob(
        &self,
        content: &Content,
        chunks: mpsc::Sender<Result<Bytes, ImageError>>,
    ) {
        let mut done = 0;
        let mut delays = RETRY_DELAYS.iter();
        while let Err(error) = self.stream_from(content, &mut done, &chunks).await {
            if done == content.size {
                // It broke after its last byte, but before the server said so.
                return;
            }
            let broke = matches!(error, ImageError::Unreachable { .. }) && !chunks.is_closed();
            let delay = if broke { delays.next() } else { None };
            let Some(delay) = delay else {
                // Whoever has stopped listening has a reason of its own to report.
                let _closed = chunks.send(Err(error)).await;
                return;
            };
            tracing::debug!(%error, done, "a transfer broke off and goes on");
            tokio::time::sleep(*delay).await;
        }
    }

    /// Passes on what is after `done` bytes, and counts them.
    async fn stream_from(
        &self,
        content: &Content,
        done: &mut u64,
        chunks: &mpsc::Sender<Result<Bytes, ImageError>>,
    ) -> Result<(), ImageError> {
        let mut response = self.get_blob(content, *done).await?;
        let url = shown(response.url());
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| unreachable_at(&url, error))?
        {
            *done += chunk.len() as u64;
            if chunks.send(Ok(chunk)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The answer that holds what is after `done` bytes of a blob.
    async fn get_blob(&self, content: &Content, done: u64) -> Result<Response, ImageError> {
        let url = format!("{}/blobs/{}", self.base, content.digest);
        let response = self.get(&url, "*/*", done).await?;
        if done > 0 && response.status() != StatusCode::PARTIAL_CONTENT {
            let what = format!("blob {}", content.digest);
            return Err(ImageError::malformed(
                what,
                "it broke off, and cannot be continued",
            ));
        }
        let rest = content.size.saturating_sub(done);
        let problem = match response.content_length() {
            Some(length) if length > rest => "longer",
            Some(length) if length < rest => "shorter",
            _ => return Ok(response),
        };
        let (digest, expected) = (content.digest.to_string(), content.size);
        Err(ImageError::SizeMismatch {
            digest,
            expected,
            problem,
        })
    }

    /// GET of what is after `done` bytes, with one attempt to give the registry the authorization
    /// that it asks for.
    async fn get(&self, url: &str, accept: &str, done: u64) -> Result<Response, ImageError> {
        let mut asked = false;
        loop {
            let authorization = self.authorization();
            let mut request = self.client.get(url).header(ACCEPT, accept);
            if done > 0 {
                request = request.header(RANGE, format!("bytes={done}-"));
            }
            let response = authorize(request, &authorization)
                .send()
                .await
                .map_err(|error| unreachable_at(url, error))?;
            if response.status().is_success() {
                return Ok(response);
            }
            if response.status() != StatusCode::UNAUTHORIZED || asked {
                return Err(refusal(response).await);
            }
            asked = true;
            match challenge(response.headers()) {
                Some(challenge) => self.answer(challenge, response).await?,
                None => return Err(refusal(response).await),
            }
        }
    }

    /// Gets the authorization that `challenge` asks for; `response` is what it came with.
    async fn answer(&self, challenge: Challenge, response: Response) -> Result<(), ImageError> {
        let authorization = match (challenge, &self.credentials) {
            (Challenge::Basic, Some(credentials)) => Authorization::Basic(credentials.clone()),
            (Challenge::Basic, None) => return Err(refusal(response).await),
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                },
                _,
            ) => Authorization::Bearer(self.token(&realm, service, scope).await?),
        };
        *self
            .authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = authorization;
        Ok(())
    }

    /// Asks the token server (distribution's "Token Authentication Specification").
    async fn token(
        &self,
        realm: &str,
        service: Option<String>,
        scope: Option<String>,
    ) -> Result<String, ImageError> {
        let bad = |reason: &str| ImageError::malformed("the registry's token server", reason);
        let mut url = Url::parse(realm).map_err(|error| bad(&error.to_string()))?;
        // The password goes there: a registry in HTTPS must not send it in the clear.
        if url.scheme() != "https" && !self.plain {
            return Err(bad("it is not in HTTPS"));
        }
        let scope = scope.unwrap_or_else(|| format!("repository:{}:pull", self.repository));
        url.query_pairs_mut().append_pair("scope", &scope);
        if let Some(service) = service {
            url.query_pairs_mut().append_pair("service", &service);
        }
        let name = shown(&url);
        let authorization = match &self.credentials {
            Some(credentials) => Authorization::Basic(credentials.clone()),
            None => Authorization::None,
        };
        let response = authorize(self.client.get(url), &authorization)
            .send()
            .await
            .map_err(|error| unreachable_at(&name, error))?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let body = read_body(response, "the registry's token", TOKEN_BYTES_MAX).await?;
        let token: Token =
            serde_json::from_slice(&body).map_err(|error| bad(&error.to_string()))?;
        token
            .token
            .or(token.access_token)
            .ok_or_else(|| bad("it sent no token"))
    }

    fn authorization(&self) -> Authorization {
        self.authorization
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn client(plain: bool, loopback: bool) -> Result<Client, ImageError> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Fails only if the process has chosen one already, which is as good.
        let _chosen = ring::default_provider().install_default();
    });
    let redirects = Policy::custom(move |attempt| {
        let downgrade = attempt.url().scheme() != "https" && !plain;
        if downgrade || attempt.previous().len() > REDIRECTS_MAX {
            attempt.stop()
        } else {
            attempt.follow()
        }
    });
    let mut builder = Client::builder()
        .user_agent(concat!("hostd/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(redirects);
    if plain {
        // The host may have no certificates at all, which would be an error.
        builder = builder.tls_certs_only([]);
    }
    if loopback {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|source| ImageError::Tls { source })
}

fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn authorize(request: RequestBuilder, authorization: &Authorization) -> RequestBuilder {
    match authorization {
        Authorization::None => request,
        Authorization::Basic(user) => request.basic_auth(&user.username, Some(&user.password)),
        Authorization::Bearer(token) => request.bearer_auth(token),
    }
}

/// The challenge that can be answered best (RFC 9110, section 11.6.1).
fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut basic = None;
    for header in headers.get_all(WWW_AUTHENTICATE) {
        let Ok(text) = header.to_str() else { continue };
        let (scheme, rest) = text.split_once(' ').unwrap_or((text, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            basic = Some(Challenge::Basic);
        } else if scheme.eq_ignore_ascii_case("bearer")
            && let Some(realm) = parameter(rest, "realm")
        {
            let (service, scope) = (parameter(rest, "service"), parameter(rest, "scope"));
            return Some(Challenge::Bearer {
                realm,
                service,
                scope,
            });
        }
    }
    basic
}

/// The value of `name` in `name="value",other="value"`.
fn parameter(mut text: &str, name: &str) -> Option<String> {
    loop {
        let (key, rest) = text.split_once('=')?;
        let rest = rest.trim_start();
        let (value, rest) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => rest.split_once(',').unwrap_or((rest, "")),
        };
        if key.trim_matches([' ', ',']).eq_ignore_ascii_case(name) {
            return Some(value.to_owned());
        }
        text = rest;
    }
}

async fn read_body(
    mut response: Response,
    what: &str,
    bytes_max: u64,
) -> Result<Vec<u8>, ImageError> {
    let url = shown(response.url());
    let mut body = Vec::new();
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|error| unreachable_at(&url, error))?
    {
        body.extend_from_slice(&chunk);
        if body.len() as u64 > bytes_max {
            let reason = format!("it is longer than {bytes_max} bytes");
            return Err(ImageError::malformed(what, reason));
        }
    }
    Ok(body)
}

fn check(expected: &Digest, bytes: Vec<u8>) -> Result<Vec<u8>, ImageError> {
    let actual = Digest::of(&bytes);
    if actual == *expected {
        return Ok(bytes);
    }
    let (expected, actual) = (expected.to_string(), actual.to_string());
    Err(ImageError::DigestMismatch { expected, actual })
}

/// What a registry's error says, in its own words if they can be had.
async fn refusal(response: Response) -> ImageError {
    let status = response.status();
    let url = shown(response.url());
    let body = read_body(response, "error", ERROR_BYTES_MAX)
        .await
        .unwrap_or_default();
    let message = match serde_json::from_slice::<ErrorBody>(&body) {
        Ok(body) if !body.errors.is_empty() => {
            let entries = body.errors.iter();
            let texts = entries.map(|e| {
                if e.message.is_empty() {
                    &*e.code
                } else {
                    &*e.message
                }
            });
            texts.collect::<Vec<_>>().join("; ")
        }
        _ => status
            .canonical_reason()
            .unwrap_or("an unknown error")
            .to_owned(),
    };
    let message = message
        .chars()
        .filter(|c| !c.is_control())
        .take(ERROR_TEXT_CHARS_MAX)
        .collect();
    ImageError::Registry {
        status: status.as_u16(),
        url,
        message,
    }
}

/// An address for a person: names and signatures in it may be credentials.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    // Both fail only for addresses that have no host.
    let _no_host = url.set_username("");
    let _no_host = url.set_password(None);
    url.to_string()
}

fn unreachable_at(url: &str, error: reqwest::Error) -> ImageError {
    ImageError::Unreachable {
        url: url.to_owned(),
        source: error.without_url(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_spoken_to_in_plain_http_unasked() {
        for (registry, loopback) in [
            ("localhost:5000", true),
            ("localhost", true),
            ("127.0.0.1:5000", true),
            ("127.9.9.9", true),
            ("10.0.0.1:5000", false),
            ("localhost.example", false),
            ("registry.example:5000", false),
        ] {
            assert_eq!(is_loopback(registry), loopback, "{registry}");
        }
    }

    #[test]
    fn a_challenge_is_understood() {
        let parse = |texts: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for text in texts {
                headers.append(WWW_AUTHENTICATE, text.parse().unwrap());
            }
            challenge(&headers)
        };
        let text = r#"Bearer realm="https://auth.example/token?a=b",service="r.example", scope="repository:a/b:pull,push""#;
        let bearer = Challenge::Bearer {
            realm: "https://auth.example/token?a=b".to_owned(),
            service: Some("r.example".to_owned()),
            scope: Some("repository:a/b:pull,push".to_owned()),
        };
        assert_eq!(parse(&["Basic realm=x", text]), Some(bearer));
        assert_eq!(parse(&["basic realm=\"x\""]), Some(Challenge::Basic));
        assert_eq!(parse(&["Bearer service=x"]), None);
        assert_eq!(parse(&["Negotiate"]), None);
        assert_eq!(parse(&[]), None);
    }

    #[test]
    fn an_address_is_shown_without_credentials() {
        let url = Url::parse("https://user:pass@cdn.example/blob?signature=secret").unwrap();
        assert_eq!(shown(&url), "https://cdn.example/blob");
    }
}
