//! Reads a bundle's config.json. Shape only: what the values mean is checked by `plan`.

mod location;

use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Capabilities, Capability, LinuxResources, Process, Spec};
use serde_json::Value;

/// A configuration larger than this is refused.
pub const CONFIG_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A configuration as it was asked for.
#[derive(Debug)]
pub struct Config {
    /// The typed form.
    pub spec: Spec,
    /// The file as it was read: kept, since the typed form forgets unknown fields.
    pub text: Vec<u8>,
    /// What the specification wants reported but not refused.
    pub warnings: Vec<String>,
}

/// Why a configuration could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file is missing or cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Where it should have been.
        path: PathBuf,
        source: io::Error,
    },
    #[error("{} is larger than {CONFIG_BYTES_MAX} bytes", path.display())]
    TooLarge { path: PathBuf },
    /// It is no JSON, or a field has the wrong type or an unknown value.
    #[error("{}: {field}: {reason}", path.display())]
    Invalid {
        path: PathBuf,
        /// The JSON path of the field, as `linux.namespaces[2].type`.
        field: String,
        /// What was found and what is allowed.
        reason: String,
    },
    /// A limit for `update` has the wrong type or an unknown value.
    #[error("{field}: {reason}")]
    Resources { field: String, reason: String },
}

impl Config {
    /// Reads `config.json` of a bundle.
    ///
    /// # Errors
    /// Those of [`SpecError`].
    pub fn load(bundle: &Path) -> Result<Self, SpecError> {
        Self::load_file(&bundle.join("config.json"))
    }

    /// Reads a configuration from a file of any name.
    ///
    /// # Errors
    /// Those of [`SpecError`].
    pub fn load_file(path: &Path) -> Result<Self, SpecError> {
        let text = std::fs::read(path).map_err(|source| SpecError::Read {
            path: path.to_path_buf(),
            source,
        })?;
        Self::parse(text, path)
    }

    /// Reads a configuration that came from `path`.
    ///
    /// # Errors
    /// Those of [`SpecError`].
    pub(crate) fn parse(text: Vec<u8>, path: &Path) -> Result<Self, SpecError> {
        if text.len() > CONFIG_BYTES_MAX {
            return Err(SpecError::TooLarge {
                path: path.to_path_buf(),
            });
        }
        // The straight way first: it is several times faster than the one that can name the field.
        if let Ok(mut spec) = serde_json::from_slice::<Spec>(&text) {
            if let Some(resources) = resources_of(&mut spec).filter(|it| may_lack_pids_limit(it)) {
                let value: Value = serde_json::from_slice(&text).unwrap_or_default();
                drop_missing_pids_limit(resources, value.pointer(RESOURCES));
            }
            return Ok(Self {
                warnings: ambient_in_vain(&spec),
                spec,
                text,
            });
        }
        let invalid = |field: String, reason: String| SpecError::Invalid {
            path: path.to_path_buf(),
            field,
            reason,
        };
        let mut value: Value = serde_json::from_slice(&text)
            .map_err(|error| invalid("not JSON".to_owned(), error.to_string()))?;
        let mut warnings = drop_unknown_capabilities(&mut value);
        if let Some(process) = value.get_mut("process") {
            correct_process(process);
        }
        let mut spec = location::read(&value).map_err(|misfit| {
            let reason = policy_words(&misfit.field) + &misfit.reason;
            let whole = misfit.field.is_empty().then(|| "the whole".to_owned());
            invalid(whole.unwrap_or(misfit.field), reason)
        })?;
        if let Some(resources) = resources_of(&mut spec) {
            drop_missing_pids_limit(resources, value.pointer(RESOURCES));
        }
        warnings.extend(ambient_in_vain(&spec));
        Ok(Self {
            spec,
            text,
            warnings,
        })
    }
}

/// Where the limits are in a configuration.
const RESOURCES: &str = "/linux/resources";

fn resources_of(spec: &mut Spec) -> Option<&mut LinuxResources> {
    spec.linux_mut().as_mut()?.resources_mut().as_mut()
}

/// oci-spec has 0 for a limit of tasks that is not given. But 0 is one that may be given.
fn may_lack_pids_limit(resources: &LinuxResources) -> bool {
    let pids = resources.pids().as_ref();
    pids.is_some_and(|pids| pids.limit() == 0)
}

/// Without a limit the section asks for nothing.
fn drop_missing_pids_limit(resources: &mut LinuxResources, given: Option<&Value>) {
    let limit = given.and_then(|given| given.pointer("/pids/limit"));
    if may_lack_pids_limit(resources) && limit.is_none() {
        resources.set_pids(None);
    }
}

/// Takes out the capabilities that this program does not know, as the specification asks: they are
/// warned of, and not an error.
pub(crate) fn drop_unknown_capabilities(config: &mut Value) -> Vec<String> {
    let mut warnings = Vec::new();
    let sets = config
        .pointer_mut("/process/capabilities")
        .and_then(Value::as_object_mut)
        .into_iter()
        .flatten();
    for (set, names) in sets {
        let Some(names) = names.as_array_mut() else {
            continue;
        };
        names.retain(|name| {
            let known =
                !name.is_string() || serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !known {
                warnings.push(format!(
                    "config.json: process.capabilities.{set}: unknown capability {name} is ignored"
                ));
            }
            known
        });
    }
    warnings
}

/// Ambient capabilities that the kernel will not give, in the words of runc, which warns of them too.
fn ambient_in_vain(spec: &Spec) -> Vec<String> {
    let sets = spec.process().as_ref();
    let Some(sets) = sets.and_then(|process| process.capabilities().as_ref()) else {
        return Vec::new();
    };
    let has = |set: &Option<Capabilities>, name: &Capability| {
        set.as_ref().is_some_and(|set| set.contains(name))
    };
    let vain = |name: &&Capability| !has(sets.inheritable(), name) || !has(sets.permitted(), name);
    let mut names: Vec<String> = sets
        .ambient()
        .iter()
        .flatten()
        .filter(vain)
        .map(Capability::to_string)
        .collect();
    names.sort_unstable();
    let warn = |name| {
        format!(
            "can't raise ambient capability CAP_{name}: it is not permitted and inheritable as well"
        )
    };
    names.into_iter().map(warn).collect()
}

/// Words that tell a wrong memory policy from other errors, as runc's do.
fn policy_words(field: &str) -> String {
    let part = match field.strip_prefix("linux.memoryPolicy") {
        Some(part) if part.starts_with(".flags") => "flag",
        Some(part) if part.starts_with(".nodes") => "nodes",
        Some(_) => "mode",
        None => return String::new(),
    };
    format!("invalid memory policy {part}: ")
}

/// Puts what the specification allows in the form that oci-spec expects: a user that is not given is root,
/// and scheduler flags have other names.
fn correct_process(process: &mut Value) {
    if let Some(process) = process.as_object_mut() {
        let root = || serde_json::json!({"uid": 0, "gid": 0});
        process.entry("user").or_insert_with(root);
    }
    let flags = process.pointer_mut("/scheduler/flags");
    for flag in flags.and_then(Value::as_array_mut).into_iter().flatten() {
        let expected = match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
            Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
            _ => continue,
        };
        *flag = expected.into();
    }
}

/// Reads a file with a `process` object, as `exec --process` takes it.
///
/// # Errors
/// Those of [`SpecError`].
pub fn load_process(path: &Path) -> Result<Process, SpecError> {
    let text = std::fs::read(path).map_err(|source| SpecError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    parse_process(&text, path)
}

/// Reads a `process` object that came from `path`.
pub(crate) fn parse_process(text: &[u8], path: &Path) -> Result<Process, SpecError> {
    let invalid = |field: String, reason: String| SpecError::Invalid {
        path: path.to_path_buf(),
        field,
        reason,
    };
    let process: Value = serde_json::from_slice(text)
        .map_err(|error| invalid("not JSON".to_owned(), error.to_string()))?;
    let mut config = serde_json::json!({"process": process});
    // What is unknown can be given to nobody; the container's own configuration was warned of.
    drop_unknown_capabilities(&mut config);
    correct_process(&mut config["process"]);
    location::read(&config["process"]).map_err(|misfit| {
        let field = format!("process.{}", misfit.field);
        invalid(field.trim_end_matches('.').to_owned(), misfit.reason)
    })
}

/// Reads the limits that `update` is given, in the form of `linux.resources`.
///
/// # Errors
/// [`SpecError::Resources`]
pub fn parse_resources(resources: &Value) -> Result<LinuxResources, SpecError> {
    // Nothing is asked for.
    if resources.is_null() {
        return Ok(LinuxResources::default());
    }
    let mut read: LinuxResources = location::read(resources).map_err(|misfit| {
        let field = format!("linux.resources.{}", misfit.field);
        SpecError::Resources {
            field: field.trim_end_matches('.').to_owned(),
            reason: misfit.reason,
        }
    })?;
    drop_missing_pids_limit(&mut read, Some(resources));
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, SpecError> {
        Config::parse(text.as_bytes().to_vec(), Path::new("config.json"))
    }

    #[test]
    fn an_error_names_the_json_path() {
        for (text, part) in [
            ("{", "not JSON"),
            (
                r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"pid"},{"type":"pit"}]}}"#,
                "linux.namespaces[1].type",
            ),
            (
                r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"cwd":7}}"#,
                "process.cwd",
            ),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_limit_of_tasks_that_is_not_given_is_none_and_one_of_zero_is_one() {
        for (pids, limit) in [
            ("{}", None),
            (r#"{"limit":0}"#, Some(0)),
            (r#"{"limit":5}"#, Some(5)),
        ] {
            let resources = format!(r#"{{"pids":{pids}}}"#);
            // The capability makes it take the slow way.
            for process in [
                "",
                r#","process":{"cwd":"/","capabilities":{"bounding":["CAP_FLY"]}}"#,
            ] {
                let text = format!(
                    r#"{{"ociVersion":"1.0.2","linux":{{"resources":{resources}}}{process}}}"#
                );
                let mut config = parse(&text).unwrap();
                let read = resources_of(&mut config.spec).unwrap();
                assert_eq!(read.pids().map(|pids| pids.limit()), limit, "{text}");
            }
            let value = serde_json::from_str(&resources).unwrap();
            let read = parse_resources(&value).unwrap();
            assert_eq!(read.pids().map(|pids| pids.limit()), limit, "{resources}");
        }
    }

    #[test]
    fn an_unknown_capability_is_warned_of_and_left_out() {
        let text = r#"{"ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"cwd":"/",
            "capabilities":{"bounding":["CAP_KILL","CAP_FLY"]}}}"#;
        let config = parse(text).unwrap();
        assert_eq!(config.warnings.len(), 1);
        assert!(config.warnings[0].contains("CAP_FLY"));
        let process = config.spec.process().as_ref().unwrap();
        let bounding = process
            .capabilities()
            .as_ref()
            .unwrap()
            .bounding()
            .as_ref()
            .unwrap();
        assert_eq!(bounding.iter().collect::<Vec<_>>(), [&Capability::Kill]);
    }
}
