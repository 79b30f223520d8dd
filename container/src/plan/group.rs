//! Which control group a container gets, and whether it needs one.

use std::collections::HashMap;
use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDeviceCgroup, LinuxResources};

use super::{PlanError, Setting};
use crate::cgroup::Cgroup;
use crate::systemd::{ScopePlan, annotation};

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
        let resources = linux.resources().as_ref();
        let root = rustix::process::geteuid().is_root();
        if let Some(field) = resources.and_then(device_rule).filter(|_| !root) {
            let reason = "without the rights of root, a rule can only deny everything";
            return Err(PlanError::invalid(field, reason));
        }
        if setting.systemd {
            return Ok(Self {
                path: String::new(),
                scope: Some(scope(linux, annotations, setting.id)?),
            });
        }
        let path = cgroup_path(linux, setting.id)?;
        let alone = |path| Self { path, scope: None };
        if root || Cgroup::may_make(&path) {
            return Ok(alone(path));
        }
        let given = linux
            .cgroups_path()
            .is_some()
            .then_some("linux.cgroupsPath");
        match given.or_else(|| resources.and_then(limit)) {
            Some(field) => {
                let reason = "this user may not make control groups";
                Err(PlanError::invalid(field, reason))
            }
            None => Ok(alone(String::new())),
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

/// The first device rule that is more than a denial of everything.
fn device_rule(resources: &LinuxResources) -> Option<String> {
    let denies_all = |rule: &LinuxDeviceCgroup| {
        let (major, minor) = (rule.major().unwrap_or(-1), rule.minor().unwrap_or(-1));
        !rule.allow() && major < 0 && minor < 0
    };
    let rules = resources.devices().iter().flatten();
    let index = rules.into_iter().position(|rule| !denies_all(rule))?;
    Some(format!("linux.resources.devices[{index}]"))
}

/// The first limit that is asked for.
fn limit(resources: &LinuxResources) -> Option<&'static str> {
    [
        ("linux.resources.memory", resources.memory().is_some()),
        ("linux.resources.cpu", resources.cpu().is_some()),
        ("linux.resources.pids", resources.pids().is_some()),
        ("linux.resources.blockIO", resources.block_io().is_some()),
        (
            "linux.resources.hugepageLimits",
            resources.hugepage_limits().is_some(),
        ),
        ("linux.resources.network", resources.network().is_some()),
        ("linux.resources.rdma", resources.rdma().is_some()),
        ("linux.resources.unified", resources.unified().is_some()),
    ]
    .into_iter()
    .find_map(|(field, given)| given.then_some(field))
}

fn cgroup_path(linux: &Linux, id: &str) -> Result<String, PlanError> {
    let field = "linux.cgroupsPath";
    let Some(path) = linux
        .cgroups_path()
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty())
    else {
        return Ok(format!("/{id}"));
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
    Ok(format!("/{path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_is_never_the_root_or_outside() {
        let path = |json: &str| cgroup_path(&serde_json::from_str(json).unwrap(), "a");
        assert_eq!(path("{}").unwrap(), "/a");
        assert_eq!(path(r#"{"cgroupsPath":"x/y/"}"#).unwrap(), "/x/y");
        path(r#"{"cgroupsPath":"/"}"#).unwrap_err();
        path(r#"{"cgroupsPath":"/a/../../b"}"#).unwrap_err();
    }

    #[test]
    fn a_limit_is_named_and_so_is_a_device_that_is_allowed() {
        let resources = |json: &str| serde_json::from_str::<LinuxResources>(json).unwrap();
        assert_eq!(
            limit(&resources(r#"{"pids":{"limit":5}}"#)),
            Some("linux.resources.pids")
        );
        assert_eq!(limit(&resources("{}")), None);
        let denied = r#"{"devices":[{"allow":false,"access":"rwm"}]}"#;
        assert_eq!(device_rule(&resources(denied)), None);
        let allowed = r#"{"devices":[{"allow":false,"access":"rwm"},
            {"allow":true,"type":"c","major":1,"minor":1,"access":"r"}]}"#;
        assert_eq!(
            device_rule(&resources(allowed)).as_deref(),
            Some("linux.resources.devices[1]")
        );
    }
}
