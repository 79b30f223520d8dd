//! Reads typed values from JSON, and says where in it an error is.
//!
//! serde_json knows the byte at which it gave up; from that byte the path of the value follows. Types that
//! keep track of the path while they are read would be all of the specification's once more, in a program
//! whose size is the memory that it takes.

use serde::de::DeserializeOwned;
use serde_json::{Error, Value};

/// An error in a value.
#[derive(Debug)]
pub(super) struct Misfit {
    /// The JSON path, as `linux.namespaces[2].type`; empty for the value itself.
    pub(super) field: String,
    /// What was found, and what is allowed.
    pub(super) reason: String,
}

pub(super) fn read<T: DeserializeOwned>(value: &Value) -> Result<T, Misfit> {
    let text = value.to_string();
    serde_json::from_str(&text).map_err(|error| {
        let reason = reason(&error);
        // All is in one line.
        let mut steps = steps_to(value, error.column());
        steps.extend(culprit::<T>(value, &steps, &reason));
        Misfit {
            field: path(&steps),
            reason,
        }
    })
}

/// The message without the place, which is none of the file's.
fn reason(error: &Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    text.strip_suffix(&place).unwrap_or(&text).to_owned()
}

/// From a value to one of its members.
#[derive(Clone, Debug)]
enum Step {
    Key(String),
    Index(usize),
}

fn path(steps: &[Step]) -> String {
    let mut path = String::new();
    for step in steps {
        match step {
            Step::Key(key) if path.is_empty() => path.push_str(key),
            Step::Key(key) => path += &format!(".{key}"),
            Step::Index(index) => path += &format!("[{index}]"),
        }
    }
    path
}

/// The way to the innermost value that is at the byte `offset` of the text, or ends there: at the error
/// the reader has either looked at a value, or just read it.
fn steps_to(mut value: &Value, mut offset: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some((step, inner, start)) = member_at(value, offset) {
        steps.push(step);
        value = inner;
        offset -= start;
    }
    steps
}

/// The member of an object or array at the byte, and where it begins.
fn member_at(value: &Value, offset: usize) -> Option<(Step, &Value, usize)> {
    let members: Vec<(Step, usize, &Value)> = match value {
        Value::Object(map) => {
            let with_key = |(key, inner)| {
                let key: &String = key;
                let key_bytes = Value::from(key.as_str()).to_string().len() + 1;
                (Step::Key(key.clone()), key_bytes, inner)
            };
            map.iter().map(with_key).collect()
        }
        Value::Array(list) => {
            let with_index = |(index, inner)| (Step::Index(index), 0, inner);
            list.iter().enumerate().map(with_index).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => return None,
    };
    // Behind the opening bracket, and then behind each comma.
    let mut at = 1;
    for (step, key_bytes, inner) in members {
        let start = at + key_bytes;
        let end = start + inner.to_string().len();
        if (start..=end).contains(&offset) {
            return Some((step, inner, start));
        }
        at = end + 1;
    }
    None
}

/// What is wrong with a member is sometimes only said of the whole object. It is then that member without
/// which the object would be well, or wrong in another way.
fn culprit<T: DeserializeOwned>(value: &Value, steps: &[Step], misfit: &str) -> Option<Step> {
    // Nobody is to blame for who is not there.
    if misfit.starts_with("missing field") {
        return None;
    }
    let mut copy = value.clone();
    let object = member_of(&mut copy, steps)?.as_object()?;
    let keys: Vec<String> = object.keys().cloned().collect();
    keys.into_iter().find_map(|key| {
        let mut copy = value.clone();
        member_of(&mut copy, steps)?.as_object_mut()?.remove(&key);
        let error = serde_json::from_str::<T>(&copy.to_string()).err();
        let same = error.is_some_and(|error| reason(&error) == misfit);
        (!same).then_some(Step::Key(key))
    })
}

fn member_of<'a>(value: &'a mut Value, steps: &[Step]) -> Option<&'a mut Value> {
    steps.iter().try_fold(value, |value, step| match step {
        Step::Key(key) => value.get_mut(key),
        Step::Index(index) => value.get_mut(*index),
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Spec;
    use serde_json::json;

    use super::*;

    fn assert_misfit(config: &Value, field: &str, reason: &str) {
        let misfit = read::<Spec>(config).unwrap_err();
        assert_eq!(misfit.field, field, "{config}: {misfit:?}");
        assert!(misfit.reason.contains(reason), "{config}: {misfit:?}");
        assert!(!misfit.reason.contains("line 1"), "{misfit:?}");
    }

    #[test]
    fn a_misfit_of_the_process_is_at_its_value() {
        for (changes, field, reason) in [
            (json!({"cwd": 7}), "cwd", "invalid type: integer `7`"),
            (json!({"cwd": null}), "cwd", "invalid type: null"),
            (json!({"cwd": ["a"]}), "cwd", "invalid type: sequence"),
            (
                json!({"args": ["a", {"b": 1}]}),
                "args[1]",
                "invalid type: map",
            ),
            (
                json!({"user": {"uid": -1, "gid": 0}}),
                "user.uid",
                "invalid value",
            ),
            (
                json!({"terminal": "yes"}),
                "terminal",
                "invalid type: string \"yes\"",
            ),
            (
                json!({"rlimits": [{"type": "RLIMIT_MOON", "soft": 1, "hard": 1}]}),
                "rlimits[0].type",
                "unknown variant `RLIMIT_MOON`, expected one of",
            ),
            (
                json!({"execCPUAffinity": {"initial": "0", "final": "a-b"}}),
                "execCPUAffinity.final",
                "a-b",
            ),
        ] {
            let mut process = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sh"]});
            for (key, value) in changes.as_object().unwrap() {
                process[key] = value.clone();
            }
            let config = json!({"ociVersion": "1.0.2", "process": process});
            assert_misfit(&config, &format!("process.{field}"), reason);
        }
    }

    #[test]
    fn a_misfit_of_the_rest_is_at_its_value() {
        for (key, value, field, reason) in [
            (
                "process",
                json!({"user": {"uid": 0, "gid": 0}}),
                "process",
                "missing field `cwd`",
            ),
            (
                "linux",
                json!({"namespaces": [{"type": "pid"}, {"type": "a\"b"}]}),
                "linux.namespaces[1].type",
                "unknown variant",
            ),
            ("linux", json!(5), "linux", "invalid"),
            (
                "annotations",
                json!({"a.b": 1}),
                "annotations.a.b",
                "invalid type",
            ),
        ] {
            assert_misfit(&json!({"ociVersion": "1.0.2", key: value}), field, reason);
        }
        assert_misfit(&json!(5), "", "invalid");
    }
}
