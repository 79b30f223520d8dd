//! Credentials for registries, from where `docker login` and `skopeo login` put them.
//!
//! Credential helpers are not supported: hostd runs no program that a file in a home directory names.

use std::fmt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;

use super::layout::read_bounded;

const CONFIG_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// A user's name and password, or a token in the place of one.
#[derive(Clone, Deserialize, Eq, PartialEq)]
pub struct Credentials {
    pub username: String,
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials")
            .field("username", &self.username)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    auths: std::collections::HashMap<String, ConfigEntry>,
}

#[derive(Deserialize)]
struct ConfigEntry {
    auth: Option<String>,
}

/// The credentials for `registry` in the configuration of the user that hostd runs as.
pub(super) fn find(registry: &str) -> Option<Credentials> {
    let directory = std::env::var_os("DOCKER_CONFIG")
        .map(PathBuf::from)
        .or_else(|| {
            let home = std::env::var_os("HOME").map(PathBuf::from)?;
            Some(home.join(".docker"))
        })?;
    find_in(&directory.join("config.json"), registry)
}

fn find_in(file: &Path, registry: &str) -> Option<Credentials> {
    // Most registries need no credentials, so a bad file must not keep one from using them.
    let bytes = read_bounded(file, CONFIG_FILE_BYTES_MAX)
        .inspect_err(|error| tracing::warn!(%error, "could not read registry credentials"))
        .ok()??;
    let config: ConfigFile = serde_json::from_slice(&bytes)
        .inspect_err(|error| tracing::warn!(%error, "could not read registry credentials"))
        .ok()?;
    let names: &[&str] = match registry {
        "docker.io" => &["https://index.docker.io/v1/", "docker.io"],
        other => &[other],
    };
    let entry = names.iter().find_map(|name| config.auths.get(*name))?;
    let decoded = STANDARD.decode(entry.auth.as_ref()?).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(Credentials {
        username: username.to_owned(),
        password: password.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_found_by_registry_and_never_shown() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let auth = STANDARD.encode("user:secret:with:colons");
        let config = serde_json::json!({"auths": {
            "registry.example:5000": {"auth": auth},
            "https://index.docker.io/v1/": {"auth": STANDARD.encode("hub:pass")},
            "helper.example": {},
        }});
        std::fs::write(file.path(), config.to_string()).unwrap();
        let found = find_in(file.path(), "registry.example:5000").unwrap();
        assert_eq!(
            (&*found.username, &*found.password),
            ("user", "secret:with:colons")
        );
        assert!(!format!("{found:?}").contains("secret"));
        assert_eq!(find_in(file.path(), "docker.io").unwrap().username, "hub");
        assert_eq!(find_in(file.path(), "helper.example"), None);
        assert_eq!(find_in(file.path(), "other.example"), None);
        assert_eq!(
            find_in(Path::new("/nonexistent/config.json"), "docker.io"),
            None
        );
    }
}
