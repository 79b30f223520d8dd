//! What a change of a running instance's limits and labels comes to. Pure.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::create::FIXED_BY_MEMORY;
use crate::api::types::{Effect, InstancePatch, InstanceSpec};
use crate::limits::{self, Capacity, Rules};
use crate::pointer;
use crate::validate::{self, FieldError};

/// A change that may be made.
#[derive(Debug)]
pub(super) struct Plan {
    /// The spec after the change.
    pub(super) spec: InstanceSpec,
    /// When each changed field takes effect, by its pointer.
    pub(super) effects: BTreeMap<String, Effect>,
}

impl Plan {
    /// Whether limits in force must change.
    pub(super) fn acts(&self) -> bool {
        self.effects
            .iter()
            .any(|(field, effect)| *effect == Effect::Live && field.starts_with("/limits"))
    }

    /// Checks that an instance whose next start goes on from memory may be changed so.
    pub(super) fn check_goes_on(&self) -> Result<(), FieldError> {
        let fixed = |field: &&String| FIXED_BY_MEMORY.contains(&field.as_str());
        match self.effects.keys().find(fixed) {
            None => Ok(()),
            Some(field) => {
                let why = "its next start goes on from memory, and with what the snapshot has";
                Err(FieldError::new(field, why).hint("change it once the instance runs"))
            }
        }
    }
}

/// Merges the patch (RFC 7396) into `spec` and says what each change comes to.
///
/// # Errors
/// A field is unknown, out of range, or cannot be changed; then nothing is.
pub(super) fn plan(
    spec: &InstanceSpec,
    patch: &InstancePatch,
    live: bool,
    rules: &Rules,
    host: &Capacity,
) -> Result<Plan, FieldError> {
    let mut after = spec.clone();
    let mut effects = BTreeMap::new();
    if let Some(change) = &patch.limits {
        after.limits = merged(&spec.limits, change, "/limits")?;
        limits::check(&after.limits, rules, host)?;
        for field in changed(&spec.limits, &after.limits, "/limits") {
            let effect = (rules.effect)(&field, &spec.limits, &after.limits)
                .map_err(|why| FieldError::new(&field, why))?;
            let effect = if live { effect } else { Effect::AtRestart };
            effects.insert(field, effect);
        }
    }
    if let Some(change) = &patch.labels {
        after.labels = merged(&spec.labels, change, "/labels")?;
        validate::check_labels(after.labels.iter())?;
        for field in changed(&spec.labels, &after.labels, "/labels") {
            effects.insert(field, Effect::Live);
        }
    }
    Ok(Plan {
        spec: after,
        effects,
    })
}

fn merged<T: serde::Serialize + DeserializeOwned>(
    before: &T,
    change: &Value,
    at: &str,
) -> Result<T, FieldError> {
    if !change.is_object() {
        return Err(FieldError::new(at, "must be an object"));
    }
    let mut value = to_value(before);
    merge(&mut value, change);
    pointer::deserialize(value).map_err(|error| FieldError {
        field: format!("{at}{}", error.field),
        ..error
    })
}

/// RFC 7396, section 2.
pub(super) fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else {
        return;
    };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

fn changed<T: serde::Serialize>(before: &T, after: &T, at: &str) -> Vec<String> {
    let (mut old, mut new) = (BTreeMap::new(), BTreeMap::new());
    collect_leaves(&to_value(before), at, &mut old);
    collect_leaves(&to_value(after), at, &mut new);
    let mut fields: Vec<String> = old.keys().chain(new.keys()).cloned().collect();
    fields.sort();
    fields.dedup();
    fields.retain(|field| old.get(field) != new.get(field));
    fields
}

fn collect_leaves(value: &Value, at: &str, leaves: &mut BTreeMap<String, Value>) {
    let Value::Object(members) = value else {
        leaves.insert(at.to_owned(), value.clone());
        return;
    };
    for (key, value) in members {
        collect_leaves(value, &validate::pointer(at, key), leaves);
    }
}

fn to_value<T: serde::Serialize>(value: &T) -> Value {
    serde_json::to_value(value).expect("limits and labels have only string keys and plain values")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::driver::fake;

    fn try_plan(patch: Value, live: bool) -> Result<Plan, FieldError> {
        let spec = serde_json::from_value(json!({
            "image": "a",
            "limits": {"cpu": {"cores": 1.0, "weight": 5}, "memory": {"max": 65536}},
            "labels": {"keep": "1", "drop": "2"},
        }))
        .unwrap();
        let host = Capacity {
            cpus: [0, 1].into(),
            memory_bytes: 1 << 30,
            cgroup_v2: false,
        };
        let patch = serde_json::from_value(patch).unwrap();
        plan(&spec, &patch, live, &fake::RULES, &host)
    }

    #[test]
    fn an_absent_field_stays_and_null_takes_the_limit_away() {
        let plan = try_plan(
            json!({"limits": {"cpu": {"cores": 0.5, "weight": null}}, "labels": {"drop": null}}),
            true,
        )
        .unwrap();
        assert_eq!(plan.spec.limits.cpu.cores, Some(0.5));
        assert_eq!(plan.spec.limits.cpu.weight, None);
        assert_eq!(plan.spec.limits.memory.max, Some(65536));
        assert_eq!(
            plan.spec.labels,
            [("keep".to_owned(), "1".to_owned())].into()
        );
        let fields: Vec<&str> = plan.effects.keys().map(String::as_str).collect();
        assert_eq!(
            fields,
            ["/labels/drop", "/limits/cpu/cores", "/limits/cpu/weight"]
        );
    }

    #[test]
    fn what_does_not_change_is_not_in_the_plan() {
        let plan = try_plan(json!({"limits": {"cpu": {"cores": 1.0}}}), true).unwrap();
        assert!(plan.effects.is_empty() && !plan.acts());
    }

    #[test]
    fn a_stopped_instance_changes_at_its_next_start() {
        let patch = json!({"limits": {"cpu": {"cores": 0.5}}});
        let live = try_plan(patch.clone(), true).unwrap();
        assert_eq!(live.effects["/limits/cpu/cores"], Effect::Live);
        let stopped = try_plan(patch, false).unwrap();
        assert_eq!(stopped.effects["/limits/cpu/cores"], Effect::AtRestart);
    }

    #[test]
    fn a_bad_change_is_refused_by_its_pointer() {
        for (patch, field) in [
            (json!({"limits": 1}), "/limits"),
            (
                json!({"limits": {"cpu": {"cores": 9.0}}}),
                "/limits/cpu/cores",
            ),
            (
                json!({"limits": {"cpu": {"cores": "1"}}}),
                "/limits/cpu/cores",
            ),
            (
                json!({"limits": {"cpu": {"speed": 1}}}),
                "/limits/cpu/speed",
            ),
            (
                json!({"limits": {"disk": {"size": 1_u64 << 30}}}),
                "/limits/disk/size",
            ),
            (json!({"labels": {"a": 1}}), "/labels/a"),
        ] {
            let error = try_plan(patch.clone(), true).expect_err(&patch.to_string());
            assert_eq!(error.field, field, "{patch}");
        }
    }
}
