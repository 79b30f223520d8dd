//! The container's share of caches and memory bandwidth (config-linux.md, "IntelRdt").

use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxIntelRdt};
use serde_json::Value;

use super::PlanError;
use crate::resctrl::{Class, ResctrlPlan, mount_point};
use crate::rights::is_host_root;

/// Names that the file system has for itself, at its root and in each class.
const RESERVED: [&str; 7] = [
    ".",
    "..",
    "info",
    "mon_data",
    "mon_groups",
    "schemata",
    "tasks",
];

/// # Errors
/// The field that is wrong, and why; all of it where the host has no such file system.
pub(super) fn plan(
    linux: &Linux,
    config: &[u8],
    id: &str,
) -> Result<Option<ResctrlPlan>, PlanError> {
    let Some(rdt) = linux.intel_rdt() else {
        return Ok(None);
    };
    let field = "linux.intelRdt";
    if !is_host_root() {
        return Err(PlanError::invalid(
            field,
            "it needs the rights of the host's root",
        ));
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let root = mount_point(&table).ok_or_else(|| {
        let reason = "no resctrl file system is mounted: the processor has no such shares, or \
                      `mount -t resctrl resctrl /sys/fs/resctrl` was not done";
        PlanError::invalid(field, reason)
    })?;
    plan_in(root, rdt, config, id).map(Some)
}

fn plan_in(
    root: PathBuf,
    rdt: &LinuxIntelRdt,
    text: &[u8],
    id: &str,
) -> Result<ResctrlPlan, PlanError> {
    let class = match rdt.clos_id().as_deref().filter(|name| !name.is_empty()) {
        None => Class::Own(id.to_owned()),
        Some("/") => Class::Default,
        Some(name) => Class::Named(checked_name(name)?),
    };
    let is_measured = rdt.enable_monitoring().unwrap_or(false) || was_measured(text);
    Ok(ResctrlPlan {
        root,
        class,
        schemata: schemata(rdt)?,
        monitor: is_measured.then(|| id.to_owned()),
    })
}

/// Before 1.3 there was a flag for each of two things that are measured, for which the typed form has other
/// names than the specification.
fn was_measured(config: &[u8]) -> bool {
    // It is no JSON only if it is no configuration either.
    let config: Value = serde_json::from_slice(config).unwrap_or_default();
    let rdt = &config["linux"]["intelRdt"];
    rdt["enableCMT"] == true || rdt["enableMBM"] == true
}

fn checked_name(name: &str) -> Result<String, PlanError> {
    let allowed = "it must be `/`, or the name of one directory";
    let is_name = !RESERVED.contains(&name) && !name.contains(['/', '\n', '\0']);
    let refused = || PlanError::value("linux.intelRdt.closID", name, allowed);
    is_name.then(|| name.to_owned()).ok_or_else(refused)
}

/// The lines to write. What says `MB:` is memBwSchema's, where that is given.
fn schemata(rdt: &LinuxIntelRdt) -> Result<Vec<String>, PlanError> {
    let cache = rdt.l3_cache_schema().as_deref().unwrap_or_default();
    let memory = rdt.mem_bw_schema().as_deref().unwrap_or_default();
    let cache = cache
        .lines()
        .filter(|line| memory.is_empty() || !line.trim_start().starts_with("MB:"));
    let cache = cache.map(|line| ("l3CacheSchema".to_owned(), line));
    let memory = memory.lines().map(|line| ("memBwSchema".to_owned(), line));
    let given = rdt.schemata().iter().flatten().enumerate();
    let given = given.map(|(index, line)| (format!("schemata[{index}]"), line.as_str()));
    let lines = cache.chain(memory).chain(given);
    let check = |(field, line): (String, &str)| {
        let text = line.trim();
        let (resource, values) = text.split_once(':').unwrap_or_default();
        let is_line = !resource.is_empty() && values.contains('=') && !text.contains('\n');
        if is_line {
            return Ok(text.to_owned());
        }
        let allowed = "it must be a line as `L3:0=7f0;1=1f` or `MB:0=20;1=70`";
        Err(PlanError::value(
            format!("linux.intelRdt.{field}"),
            line,
            allowed,
        ))
    };
    lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(check)
        .collect()
}

/// Lines for a class that exists, as `update` is given them.
///
/// # Errors
/// The field that is wrong, and why.
pub(crate) fn changed(
    cache: Option<String>,
    memory: Option<String>,
) -> Result<Vec<String>, PlanError> {
    let mut rdt = LinuxIntelRdt::default();
    rdt.set_l3_cache_schema(cache).set_mem_bw_schema(memory);
    schemata(&rdt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(text: &str) -> Result<ResctrlPlan, String> {
        let rdt: LinuxIntelRdt = serde_json::from_str(text).unwrap();
        let config = format!(r#"{{"linux": {{"intelRdt": {text}}}}}"#);
        let planned = plan_in(PathBuf::from("/r"), &rdt, config.as_bytes(), "id");
        planned.map_err(|error| error.to_string())
    }

    #[test]
    fn a_class_is_the_containers_own_unless_it_is_named() {
        for (text, class) in [
            ("{}", Class::Own("id".into())),
            (r#"{"closID": ""}"#, Class::Own("id".into())),
            (r#"{"closID": "/"}"#, Class::Default),
            (r#"{"closID": "gold"}"#, Class::Named("gold".into())),
        ] {
            assert_eq!(planned(text).unwrap().class, class, "{text}");
        }
        for bad in ["a/b", "..", "info", "tasks", "a\\n"] {
            let error = planned(&format!(r#"{{"closID": "{bad}"}}"#)).unwrap_err();
            assert!(error.contains("linux.intelRdt.closID: "), "{error}");
        }
    }

    #[test]
    fn lines_are_put_together_and_bandwidth_is_taken_from_its_own_field() {
        let both = planned(r#"{"l3CacheSchema": "L3:0=f\nMB:0=10\n", "memBwSchema": "MB:0=20"}"#);
        assert_eq!(both.unwrap().schemata, ["L3:0=f", "MB:0=20"]);
        let cache = planned(r#"{"l3CacheSchema": "L3:0=f\nMB:0=10"}"#);
        assert_eq!(cache.unwrap().schemata, ["L3:0=f", "MB:0=10"]);
        let lines = planned(r#"{"schemata": ["L2:0=3", "L3CODE:0=1"]}"#);
        assert_eq!(lines.unwrap().schemata, ["L2:0=3", "L3CODE:0=1"]);
        for (bad, field) in [
            (r#"{"schemata": ["L2:0=3", "x"]}"#, "schemata[1]"),
            (r#"{"schemata": ["L2:0=3\nL3:0=1"]}"#, "schemata[0]"),
            (r#"{"l3CacheSchema": "7ff"}"#, "l3CacheSchema"),
            (r#"{"memBwSchema": ":0=1"}"#, "memBwSchema"),
        ] {
            let error = planned(bad).unwrap_err();
            assert!(
                error.contains(&format!("linux.intelRdt.{field}: ")),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_measured_has_the_containers_name() {
        for text in [
            r#"{"enableMonitoring": true}"#,
            r#"{"enableCMT": true}"#,
            r#"{"enableMBM": true}"#,
        ] {
            assert_eq!(planned(text).unwrap().monitor.as_deref(), Some("id"));
        }
        assert_eq!(
            planned(r#"{"enableMonitoring": false}"#).unwrap().monitor,
            None
        );
    }
}
