//! Configurations that were made to break the plan: every value of an ordinary one, replaced by every
//! value of a list of awkward ones; and several values at once, replaced by any. The answer may be an
//! error, and is never a panic.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Plan, Setting};
use crate::create::Grouping;
use crate::spec::Config;
use crate::verbs::spec::spec;

fn awkward() -> Vec<Value> {
    vec![
        Value::Null,
        json!(true),
        json!(-1),
        json!(u64::MAX),
        json!(1.5),
        json!(""),
        json!("\u{0}"),
        json!("/"),
        json!("/../.."),
        json!("=.=/"),
        json!("a".repeat(5000)),
        json!([]),
        json!([null]),
        json!([""]),
        json!({}),
        json!({"": ""}),
    ]
}

/// The JSON pointers of all values below one.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                pointers(value, &format!("{at}/{key}"), found);
            }
        }
        Value::Array(list) => {
            for (index, value) in list.iter().enumerate() {
                pointers(value, &format!("{at}/{index}"), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// A configuration with a value in as many fields as the ordinary one has not.
fn rich() -> Value {
    let mut config = spec(None);
    config["process"]["args"] = json!(["sh", "-c", "true"]);
    config["process"]["consoleSize"] = json!({"height": 1, "width": 2});
    config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 1, "priority": 0});
    config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 4});
    config["process"]["oomScoreAdj"] = json!(1);
    config["root"] = json!({"path": "/"});
    config["domainname"] = json!("d");
    config["annotations"] = json!({"a": "b"});
    config["hooks"] =
        json!({"poststop": [{"path": "/x", "args": ["x"], "env": ["A=b"], "timeout": 1}]});
    let mounts = config["mounts"].as_array_mut().unwrap();
    mounts.drain(2..6);
    mounts.push(json!({"destination": "/x", "source": "/", "options": ["rbind", "ro"]}));
    mounts.push(json!({"destination": "/y", "type": "tmpfs", "options": ["size=1k"]}));
    let linux = &mut config["linux"];
    linux["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "user"}));
    linux["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "time"}));
    linux["uidMappings"] = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    linux["gidMappings"] = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    linux["timeOffsets"] = json!({"boottime": {"secs": 1, "nanosecs": 2}});
    linux["devices"] =
        json!([{"path": "/dev/x", "type": "c", "major": 1, "minor": 2, "fileMode": 3}]);
    // One of each is enough.
    linux["maskedPaths"] = json!(["/proc/keys"]);
    linux["readonlyPaths"] = json!(["/proc/sys"]);
    linux["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
    linux["cgroupsPath"] = json!("/x");
    linux["rootfsPropagation"] = json!("rslave");
    linux["personality"] = json!({"domain": "LINUX"});
    linux["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{
            "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1,
            "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}]
        }]
    });
    config
}

fn try_plan(config: &Value) -> Result<Plan, String> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let config = Config::load(directory.path()).map_err(|error| error.to_string())?;
    let setting = Setting {
        id: "a",
        bundle: Path::new("/"),
        bare: false,
        grouping: Grouping::Files,
        check: true,
    };
    Plan::new(&config, &setting).map_err(|error| error.to_string())
}

#[test]
fn any_value_may_be_replaced_by_any_other() {
    let config = rich();
    try_plan(&config).unwrap();
    let mut all = Vec::new();
    pointers(&config, "", &mut all);
    let mut refused = 0;
    for pointer in &all {
        for value in awkward() {
            let mut changed = config.clone();
            *changed.pointer_mut(pointer).unwrap() = value;
            if let Err(message) = try_plan(&changed) {
                assert!(!message.is_empty());
                refused += 1;
            }
        }
    }
    // Most replacements are of the wrong type.
    assert!(
        refused > all.len() * 5,
        "{refused} of {} pointers",
        all.len()
    );
}

/// What becomes of a value.
#[derive(Clone, Debug)]
enum Change {
    Replace(Value),
    /// A text becomes longer, a list becomes itself twice, an object gets one member more.
    Grow(String),
}

fn changes() -> impl Strategy<Value = Change> {
    prop_oneof![
        any::<i64>().prop_map(|number| Change::Replace(json!(number))),
        any::<u64>().prop_map(|number| Change::Replace(json!(number))),
        any::<f64>().prop_map(|number| Change::Replace(json!(number))),
        ".{0,20}".prop_map(|text| Change::Replace(json!(text))),
        prop::collection::vec("[a-z0-9,./:%-]{0,9}", 0..4)
            .prop_map(|list| Change::Replace(json!(list))),
        prop::sample::select(awkward()).prop_map(Change::Replace),
        "[a-zA-Z0-9,./:%=-]{0,9}".prop_map(Change::Grow),
    ]
}

fn apply(value: &mut Value, change: &Change) {
    match (change, &mut *value) {
        (Change::Replace(new), _) => *value = new.clone(),
        (Change::Grow(more), Value::String(text)) => text.push_str(more),
        (Change::Grow(_), Value::Array(list)) => list.extend(list.clone()),
        (Change::Grow(more), Value::Object(map)) => {
            map.insert(more.clone(), json!(more));
        }
        (Change::Grow(_), _) => {}
    }
}

proptest! {
    #[test]
    fn several_values_may_be_replaced_by_any(
        edits in prop::collection::vec((any::<prop::sample::Index>(), changes()), 1..6)
    ) {
        let mut config = rich();
        for (place, change) in &edits {
            let mut all = Vec::new();
            pointers(&config, "", &mut all);
            let pointer: &String = place.get(&all);
            if let Some(value) = config.pointer_mut(pointer) {
                apply(value, change);
            }
        }
        if let Err(message) = try_plan(&config) {
            prop_assert!(!message.is_empty());
        }
    }

    #[test]
    fn any_text_may_be_the_configuration(text in "[\\[\\]{}\",:a-z0-9 ]{0,60}") {
        let config = Config::parse(text.into_bytes(), Path::new("config.json"));
        if let Err(error) = config {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
