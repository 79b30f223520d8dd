//! Which control group a container gets, and whether it needs one.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime::Linux;

use super::{PlanError, Setting};
use crate::cgroup::{Cgroup, first_limit};
use crate::create::Grouping;
use crate::rights::is_host_root;
use crate::systemd::{ScopePlan, annotation};

/// The words are those that users of the other runtimes look for.
const DENIED_PATH: &str = "this user may not make control groups there: unable to apply cgroup configuration: permission denied";
const DENIED_LIMIT: &str = "this user may not make control groups: rootless needs no limits + no cgrouppath \
                            when no permission is granted for cgroups";

/// Where a user's scopes are, if nothing is asked for.
const USER_SLICE: &str = "user.slice";

/// Where the group is.
#[derive(Debug)]
pub(super) struct GroupPlan {
    /// In every hierarchy. Empty for no group at all, if this user may not make groups and nothing that
    /// is asked for needs one; and where systemd will say which it is.
    pub(super) path: String,
    pub(super) scope: Option<ScopePlan>,
}

impl GroupPlan {
    pub(super) fn new(
        linux: &Linux,
        annotations: Option<&HashMap<String, String>>,
        setting: &Setting<'_>,
    ) -> Result<Self, PlanError> {
        let alone = |path| Self { path, scope: None };
        let limit = || linux.resources().as_ref().and_then(first_limit);
        match setting.grouping {
            Grouping::Files => {}
            Grouping::Systemd => {
                let scope = Some(scope(linux, annotations, setting.id)?);
                return Ok(Self {
                    scope,
                    ..alone(String::new())
                });
            }
            Grouping::None => {
                return match limit() {
                    Some(field) => Err(PlanError::invalid(field, "control groups are disabled")),
                    None => Ok(alone(String::new())),
                };
            }
        }
        let given = given_path(linux)?;
        if is_host_root() {
            return Ok(alone(given.unwrap_or_else(|| format!("/{}", setting.id))));
        }
        let path = given.clone().or_else(|| Cgroup::beside_own(setting.id));
        match path.filter(|path| Cgroup::may_make(path)) {
            Some(path) => Ok(alone(path)),
            None if given.is_some() => Err(PlanError::invalid("linux.cgroupsPath", DENIED_PATH)),
            None => match limit() {
                Some(field) => Err(PlanError::invalid(field, DENIED_LIMIT)),
                None => Ok(alone(String::new())),
            },
        }
    }
}

fn scope(
    linux: &Linux,
    annotations: Option<&HashMap<String, String>>,
    id: &str,
) -> Result<ScopePlan, PlanError> {
    let path = linux.cgroups_path().as_deref().map(Path::to_string_lossy);
    let path = path.unwrap_or_default();
    let mut scope = ScopePlan::new(&path, id)
        .map_err(|allowed| PlanError::value("linux.cgroupsPath", &path, &allowed))?;
    if scope.slice.is_empty() && !is_host_root() {
        // As runc: that of the user's own systemd, not the one of all users.
        USER_SLICE.clone_into(&mut scope.slice);
    }
    if let Some(annotations) = annotations {
        scope.properties = annotation::properties(annotations).map_err(|key| {
            PlanError::value(
                format!("annotations.{key}"),
                &annotations[key],
                annotation::ALLOWED,
            )
        })?;
    }
    Ok(scope)
}

/// The path that is asked for, if one is.
fn given_path(linux: &Linux) -> Result<Option<String>, PlanError> {
    let field = "linux.cgroupsPath";
    let Some(path) = linux
        .cgroups_path()
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty())
    else {
        return Ok(None);
    };
    let path = path
        .to_str()
        .ok_or_else(|| PlanError::invalid(field, "it is not UTF-8"))?;
    if path.split('/').any(|part| part == "..") {
        return Err(PlanError::value(field, path, "it must not contain `..`"));
    }
    let given = path;
    let path = path.trim_matches('/');
    if path.is_empty() {
        return Err(PlanError::value(field, given, "it must not be the root"));
    }
    Ok(Some(format!("/{path}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_is_never_the_root_or_outside() {
        let path = |json: &str| given_path(&serde_json::from_str(json).unwrap());
        assert_eq!(path("{}").unwrap(), None);
        let given = path(r#"{"cgroupsPath":"x/y/"}"#).unwrap();
        assert_eq!(given.as_deref(), Some("/x/y"));
        path(r#"{"cgroupsPath":"/"}"#).unwrap_err();
        path(r#"{"cgroupsPath":"/a/../../b"}"#).unwrap_err();
    }
}
