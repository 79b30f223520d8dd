//! Whether an instance as asked for makes sense, before anything is done about it.
//!
//! What needs the image (its users, its programs) is found out at the start.

use std::collections::BTreeSet;
use std::fmt;

use crate::api::types::{
    InstanceSpec, MountSpec, NetworkMode, NetworkSpec, PortSpec, RestartPolicy,
};
use crate::limits::{self, Capacity, Rules};
use crate::paths::is_plain_absolute;

/// As the label of a host name (RFC 1123).
pub const NAME_BYTES_MAX: usize = 63;
pub const STOP_TIMEOUT_MAX_S: u32 = 3600;
/// The kernel's bound on a host name.
const HOSTNAME_BYTES_MAX: usize = 64;
const ARGS_MAX: usize = 1024;
/// Arguments and environment together; the kernel's own bound (a quarter of the stack) is larger.
const ARGS_BYTES_MAX: usize = 512 * 1024;
const LABELS_MAX: usize = 64;
const LABEL_KEY_BYTES_MAX: usize = 128;
const LABEL_VALUE_BYTES_MAX: usize = 1024;
const MOUNTS_MAX: usize = 64;
const PORTS_MAX: usize = 128;
const USER_BYTES_MAX: usize = 128;

/// A field that is not as it should be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FieldError {
    /// JSON pointer from the root of the instance's spec.
    pub field: String,
    /// What is wrong with it, for a person.
    pub detail: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl FieldError {
    pub fn new(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            detail: detail.into(),
            hint: None,
        }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.field, self.detail)
    }
}

impl std::error::Error for FieldError {}

/// Checks everything of `spec` that can be checked without the image.
///
/// # Errors
/// The first field at fault.
pub fn check(spec: &InstanceSpec, rules: &Rules, host: &Capacity) -> Result<(), FieldError> {
    if let Some(name) = &spec.name {
        check_name("/name", name)?;
    }
    if spec.image.is_empty() || spec.image.len() > 512 {
        return Err(FieldError::new(
            "/image",
            "must be the reference of an image",
        ));
    }
    check_process(spec)?;
    if let Some(hostname) = &spec.hostname
        && !is_hostname(hostname)
    {
        return Err(FieldError::new(
            "/hostname",
            format!("must be 1 to {HOSTNAME_BYTES_MAX} of letters, digits, `-` and `.`"),
        ));
    }
    limits::check(&spec.limits, rules, host)?;
    check_network(&spec.network)?;
    check_mounts(&spec.mounts, rules)?;
    if spec.user_namespace.is_some() && !rules.user_namespace {
        return Err(FieldError::new(
            "/user_namespace",
            "this kind of isolation shares no users with the host",
        )
        .hint("leave `user_namespace` out, or use isolation `container`"));
    }
    check_labels(spec.labels.iter())?;
    if let Some(seconds) = spec.stop_timeout_s
        && seconds > STOP_TIMEOUT_MAX_S
    {
        return Err(FieldError::new(
            "/stop_timeout_s",
            format!("must be at most {STOP_TIMEOUT_MAX_S}, not {seconds}"),
        ));
    }
    if spec.auto_remove && spec.restart != RestartPolicy::No {
        return Err(FieldError::new(
            "/auto_remove",
            "an instance that is restarted cannot be removed when it stops",
        )
        .hint("leave out `restart` or `auto_remove`"));
    }
    Ok(())
}

/// Checks that a name can be a host name, a file name and part of an interface's.
///
/// # Errors
/// It cannot; `field` is named.
pub fn check_name(field: &str, name: &str) -> Result<(), FieldError> {
    let fits = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && !name.ends_with('-')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if fits {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        format!(
            "must be 1 to {NAME_BYTES_MAX} of `a-z`, `0-9` and `-`, first a letter, last not `-`"
        ),
    ))
}

fn check_process(spec: &InstanceSpec) -> Result<(), FieldError> {
    let mut bytes = 0;
    for (field, list) in [
        ("/entrypoint", &spec.entrypoint),
        ("/command", &spec.command),
    ] {
        let Some(list) = list else { continue };
        check_args(field, list)?;
        bytes += list.iter().map(String::len).sum::<usize>();
    }
    for (key, value) in &spec.env {
        check_env(&pointer("/env", key), key, value)?;
        bytes += key.len() + value.len();
    }
    if bytes > ARGS_BYTES_MAX {
        return Err(FieldError::new(
            "/env",
            format!("arguments and environment must be at most {ARGS_BYTES_MAX} bytes together"),
        ));
    }
    if let Some(user) = &spec.user {
        check_user("/user", user)?;
    }
    if let Some(directory) = &spec.working_dir {
        check_absolute("/working_dir", directory)?;
    }
    Ok(())
}

/// Checks the arguments of a process.
///
/// # Errors
/// Too many, or a NUL in one of them.
pub fn check_args(field: &str, list: &[String]) -> Result<(), FieldError> {
    if list.len() > ARGS_MAX {
        return Err(FieldError::new(
            field,
            format!("must be at most {ARGS_MAX} arguments"),
        ));
    }
    match list.iter().position(|argument| argument.contains('\0')) {
        Some(index) => Err(FieldError::new(
            format!("{field}/{index}"),
            "must not contain a NUL character",
        )),
        None => Ok(()),
    }
}

/// Checks one variable of an environment.
///
/// # Errors
/// It is no name, or there is a NUL in it.
pub fn check_env(field: &str, key: &str, value: &str) -> Result<(), FieldError> {
    if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
        return Err(FieldError::new(
            field,
            "must be a name without `=` and a value, both without NUL characters",
        ));
    }
    Ok(())
}

/// Checks the form of a user; whether there is one is known to the image.
///
/// # Errors
/// It cannot be a user.
pub fn check_user(field: &str, user: &str) -> Result<(), FieldError> {
    let parts: Vec<&str> = user.split(':').collect();
    let fits = user.len() <= USER_BYTES_MAX
        && parts.len() <= 2
        && parts.iter().all(|part| {
            !part.is_empty() && !part.contains(|c: char| c.is_control() || c.is_whitespace())
        });
    if fits {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        "must be `user`, `uid`, `user:group` or `uid:gid`",
    ))
}

/// Checks a path inside an instance.
///
/// # Errors
/// It is not absolute, or has `.` or `..` in it.
pub fn check_absolute(field: &str, path: &str) -> Result<(), FieldError> {
    if is_plain_absolute(path) {
        return Ok(());
    }
    Err(FieldError::new(
        field,
        "must be an absolute path without `.` and `..`",
    ))
}

fn is_hostname(text: &str) -> bool {
    (1..=HOSTNAME_BYTES_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.')
        && text
            .split('.')
            .all(|label| !label.is_empty() && !label.starts_with('-') && !label.ends_with('-'))
}

fn check_network(network: &NetworkSpec) -> Result<(), FieldError> {
    if network.mode == NetworkMode::None && !network.ports.is_empty() {
        return Err(FieldError::new(
            "/network/ports",
            "an instance without a network cannot publish ports",
        ));
    }
    if network.ports.len() > PORTS_MAX {
        return Err(FieldError::new(
            "/network/ports",
            format!("must be at most {PORTS_MAX} ports"),
        ));
    }
    for (index, port) in network.ports.iter().enumerate() {
        let field = format!("/network/ports/{index}");
        if port.host == 0 {
            return Err(FieldError::new(
                format!("{field}/host"),
                "must be from 1 to 65535",
            ));
        }
        if port.instance == 0 {
            return Err(FieldError::new(
                format!("{field}/instance"),
                "must be from 1 to 65535",
            ));
        }
        if network.ports[..index]
            .iter()
            .any(|other| ports_collide(other, port))
        {
            return Err(FieldError::new(
                format!("{field}/host"),
                format!("port {} is published twice", port.host),
            ));
        }
    }
    Ok(())
}

/// Whether both want the same port of the same address of the host.
pub fn ports_collide(one: &PortSpec, other: &PortSpec) -> bool {
    one.host == other.host
        && one.protocol == other.protocol
        && (one.host_ip.is_none() || other.host_ip.is_none() || one.host_ip == other.host_ip)
}

fn check_mounts(mounts: &[MountSpec], rules: &Rules) -> Result<(), FieldError> {
    if !mounts.is_empty() && !rules.mounts {
        return Err(FieldError::new(
            "/mounts",
            "this kind of isolation cannot have mounts of the host",
        )
        .hint("leave `mounts` out, or use isolation `container`"));
    }
    if mounts.len() > MOUNTS_MAX {
        return Err(FieldError::new(
            "/mounts",
            format!("must be at most {MOUNTS_MAX} mounts"),
        ));
    }
    let mut targets = BTreeSet::new();
    for (index, mount) in mounts.iter().enumerate() {
        if mount.source.starts_with('/') {
            check_absolute(&format!("/mounts/{index}/source"), &mount.source)?;
        } else {
            check_name(&format!("/mounts/{index}/source"), &mount.source).map_err(|error| {
                error.hint("a source is an absolute path of the host or the name of a volume")
            })?;
        }
        let field = format!("/mounts/{index}/target");
        check_absolute(&field, &mount.target)?;
        let target = mount.target.trim_end_matches('/');
        if target.is_empty() {
            return Err(FieldError::new(field, "must not be the root directory"));
        }
        if !targets.insert(target) {
            return Err(FieldError::new(field, "another mount has the same target"));
        }
    }
    Ok(())
}

/// Checks an instance's labels.
///
/// # Errors
/// Too many, or one is out of bounds.
pub fn check_labels<'a>(
    labels: impl ExactSizeIterator<Item = (&'a String, &'a String)>,
) -> Result<(), FieldError> {
    if labels.len() > LABELS_MAX {
        return Err(FieldError::new(
            "/labels",
            format!("must be at most {LABELS_MAX} labels"),
        ));
    }
    for (key, value) in labels {
        let fits = (1..=LABEL_KEY_BYTES_MAX).contains(&key.len())
            && !key.contains(|c: char| c.is_control() || c == '=')
            && value.len() <= LABEL_VALUE_BYTES_MAX;
        if !fits {
            return Err(FieldError::new(
                pointer("/labels", key),
                format!(
                    "must be a key of 1 to {LABEL_KEY_BYTES_MAX} bytes without `=` and a value of \
                     at most {LABEL_VALUE_BYTES_MAX} bytes"
                ),
            ));
        }
    }
    Ok(())
}

/// The JSON pointer (RFC 6901) of the member `key` of `parent`.
pub fn pointer(parent: &str, key: &str) -> String {
    format!("{parent}/{}", key.replace('~', "~0").replace('/', "~1"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::api::types::Effect;
    use crate::limits::Overhead;

    fn verdict(change: &Value) -> Result<(), FieldError> {
        let rules = Rules {
            memory_min_bytes: 1,
            memory_overhead: Overhead::NONE,
            memory_default_bytes: None,
            mounts: true,
            user_namespace: true,
            disk_size: true,
            memory_snapshots: true,
            no_console: None,
            effect: |_, _, _| Ok(Effect::Live),
        };
        let host = Capacity {
            cpus: [0].into(),
            memory_bytes: 1 << 30,
            cgroup_v2: false,
        };
        let mut spec = json!({"image": "busybox"});
        spec.as_object_mut()
            .unwrap()
            .extend(change.as_object().unwrap().clone());
        check(&serde_json::from_value(spec).unwrap(), &rules, &host)
    }

    #[test]
    fn a_bad_field_is_refused_by_its_pointer() {
        let long = "x".repeat(600 * 1024);
        for (change, field) in [
            (json!({"name": ""}), "/name"),
            (json!({"name": "a/b"}), "/name"),
            (json!({"name": "1a"}), "/name"),
            (json!({"name": "a-"}), "/name"),
            (json!({"name": "A"}), "/name"),
            (json!({"name": "x".repeat(64)}), "/name"),
            (json!({"image": ""}), "/image"),
            (json!({"command": ["sh", "a\0b"]}), "/command/1"),
            (json!({"env": {"A=B": "c"}}), "/env/A=B"),
            (json!({"env": {"a/b": "\0"}}), "/env/a~1b"),
            (json!({"env": {"A": long}}), "/env"),
            (json!({"user": "a:b:c"}), "/user"),
            (json!({"user": "a b"}), "/user"),
            (json!({"working_dir": "tmp"}), "/working_dir"),
            (json!({"working_dir": "/a/../b"}), "/working_dir"),
            (json!({"hostname": "-a"}), "/hostname"),
            (
                json!({"limits": {"cpu": {"cores": 0}}}),
                "/limits/cpu/cores",
            ),
            (
                json!({"network": {"mode": "none", "ports": [{"host": 1, "instance": 1}]}}),
                "/network/ports",
            ),
            (
                json!({"network": {"ports": [{"host": 0, "instance": 1}]}}),
                "/network/ports/0/host",
            ),
            (
                json!({"network": {"ports": [{"host": 8, "instance": 1}, {"host": 8, "instance": 2}]}}),
                "/network/ports/1/host",
            ),
            (
                json!({"mounts": [{"source": "/a", "target": "b"}]}),
                "/mounts/0/target",
            ),
            (
                json!({"mounts": [{"source": "/a", "target": "/"}]}),
                "/mounts/0/target",
            ),
            (
                json!({"mounts": [{"source": "../a", "target": "/b"}]}),
                "/mounts/0/source",
            ),
            (
                json!({"mounts": [
                    {"source": "/a", "target": "/b"}, {"source": "v", "target": "/b/"}]}),
                "/mounts/1/target",
            ),
            (json!({"labels": {"": "a"}}), "/labels/"),
            (json!({"stop_timeout_s": 3601}), "/stop_timeout_s"),
            (
                json!({"auto_remove": true, "restart": "always"}),
                "/auto_remove",
            ),
        ] {
            let error = verdict(&change).expect_err(&change.to_string());
            assert_eq!(error.field, field, "{change}");
        }
    }

    #[test]
    fn a_full_spec_is_accepted() {
        verdict(&json!({
            "name": "web-1", "command": ["sh"], "env": {"A": ""}, "user": "1000:users",
            "working_dir": "/", "hostname": "web.example", "labels": {"team": "a"},
            "mounts": [{"source": "/srv", "target": "/srv"}, {"source": "data", "target": "/data"}],
            "network": {"ports": [
                {"host": 53, "instance": 53}, {"host": 53, "instance": 53, "protocol": "udp"}]},
        }))
        .unwrap();
    }
}
