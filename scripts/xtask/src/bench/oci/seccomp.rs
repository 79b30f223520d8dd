//! The seccomp profile that podman writes: the one of containers-common, as it is for a machine of
//! this kind and a container with these capabilities.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Where the package golang-github-containers-common puts it.
const PROFILE: &str = "/usr/share/containers/seccomp.json";

/// Names of this machine's architecture in the profile.
const ARCHITECTURE: (&str, &str) = ("amd64", "SCMP_ARCH_X86_64");

/// `linux.seccomp` for a container that has `capabilities`.
pub(super) fn profile(capabilities: &[&str]) -> Result<Value> {
    let text =
        fs::read_to_string(Path::new(PROFILE)).with_context(|| format!("Cannot read {PROFILE}"))?;
    let profile = serde_json::from_str(&text).with_context(|| format!("{PROFILE} is malformed"))?;
    Ok(resolve(&profile, capabilities))
}

fn resolve(profile: &Value, capabilities: &[&str]) -> Value {
    let rules = profile["syscalls"].as_array().into_iter().flatten();
    let rules: Vec<Value> = rules
        .filter(|rule| applies(rule, capabilities))
        .map(without_conditions)
        .collect();
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": architectures(profile),
        "syscalls": rules,
    })
}

/// A condition that is not there holds.
fn applies(rule: &Value, capabilities: &[&str]) -> bool {
    let names = |of: &Value| -> Vec<String> {
        let names = of.as_array().into_iter().flatten();
        names.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let has = |name: &String| capabilities.contains(&name.as_str());
    let (include, exclude) = (&rule["includes"], &rule["excludes"]);
    let architectures = names(&include["arches"]);
    let ours = |name: &String| name == ARCHITECTURE.0;
    names(&include["caps"]).iter().all(has)
        && !names(&exclude["caps"]).iter().any(has)
        && (architectures.is_empty() || architectures.iter().any(ours))
        && !names(&exclude["arches"]).iter().any(ours)
}

fn without_conditions(rule: &Value) -> Value {
    let mut plain = json!({ "names": rule["names"], "action": rule["action"] });
    for optional in ["errnoRet", "args"] {
        let value = &rule[optional];
        let empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        if !empty {
            plain[optional] = value.clone();
        }
    }
    plain
}

/// This machine's, with those whose programs it runs too.
fn architectures(profile: &Value) -> Vec<Value> {
    let map = profile["archMap"].as_array().into_iter().flatten();
    let ours = map.filter(|entry| entry["architecture"] == ARCHITECTURE.1);
    ours.flat_map(|entry| {
        let others = entry["subArchitectures"].as_array().into_iter().flatten();
        std::iter::once(&entry["architecture"])
            .chain(others)
            .cloned()
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_apply_by_architecture_and_capability() {
        let rule = |includes: Value, excludes: Value| {
            json!({ "names": ["x"], "action": "SCMP_ACT_ALLOW", "args": null,
                    "includes": includes, "excludes": excludes, "comment": "" })
        };
        for (includes, excludes, expected) in [
            (json!({}), json!({}), true),
            (json!({ "arches": ["amd64", "x32"] }), json!({}), true),
            (json!({ "arches": ["s390x"] }), json!({}), false),
            (json!({ "caps": ["CAP_KILL"] }), json!({}), true),
            (json!({ "caps": ["CAP_SYS_TIME"] }), json!({}), false),
            (json!({}), json!({ "caps": ["CAP_KILL"] }), false),
            (json!({}), json!({ "caps": ["CAP_SYS_TIME"] }), true),
        ] {
            let rule = rule(includes, excludes);
            assert_eq!(applies(&rule, &["CAP_KILL"]), expected, "{rule}");
        }
        let profile = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 38,
            "archMap": [{ "architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"] }],
            "syscalls": [rule(json!({}), json!({}))],
        });
        assert_eq!(
            resolve(&profile, &[]),
            json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "defaultErrnoRet": 38,
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{ "names": ["x"], "action": "SCMP_ACT_ALLOW" }],
            })
        );
    }
}
