//! A configuration that uses everything, with some values replaced: what is wrong is then deeper than
//! in the JSON. The answer is a plan or an error, and never a panic. Carries nothing out.
#![no_main]

use std::path::Path;

use container::verbs::check::check;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value, json};

/// What is edited. Its own plan is made.
const EVERYTHING: &str = include_str!("../corpus/oci_config/everything.json");

/// The most edits of one run.
const EDITS_MAX: usize = 8;

/// One edit: which value, counted through the whole tree, and what becomes of it.
#[derive(Arbitrary, Debug)]
struct Edit {
    place: u16,
    change: Change,
}

#[derive(Arbitrary, Debug)]
enum Change {
    Null,
    Flag(bool),
    Number(i64),
    Large(u64),
    Text(String),
    /// The text that is there, with more behind it.
    Longer(String),
    List(Vec<String>),
    /// A list becomes itself twice.
    Twice,
    Remove,
    Add(String, String),
}

fuzz_target!(|edits: Vec<Edit>| {
    let mut config: Value = serde_json::from_str(EVERYTHING).expect("it is in the tree");
    for edit in edits.into_iter().take(EDITS_MAX) {
        let count = count(&config);
        let place = usize::from(edit.place) % count;
        change(&mut config, &mut { place }, edit.change);
    }
    if let Err(error) = check(config.to_string().into_bytes(), Path::new("/"), "fuzzed") {
        assert!(!error.to_string().is_empty());
    }
});

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Object(map) => map.values().map(count).sum(),
        Value::Array(list) => list.iter().map(count).sum(),
        _ => 0,
    }
}

/// Changes the value that is `place` further on in the tree; hands the change back if it is none of
/// this one's.
fn change(value: &mut Value, place: &mut usize, what: Change) -> Option<Change> {
    if *place == 0 {
        apply(value, what);
        return None;
    }
    *place -= 1;
    let mut what = Some(what);
    match value {
        Value::Object(map) => {
            for value in map.values_mut() {
                what = change(value, place, what?);
            }
        }
        Value::Array(list) => {
            for value in list {
                what = change(value, place, what?);
            }
        }
        _ => {}
    }
    what
}

fn apply(value: &mut Value, change: Change) {
    *value = match (change, value.take()) {
        (Change::Null | Change::Remove, _) => Value::Null,
        (Change::Flag(flag), _) => json!(flag),
        (Change::Number(number), _) => json!(number),
        (Change::Large(number), _) => json!(number),
        (Change::Text(text), _) => json!(text),
        (Change::Longer(more), Value::String(text)) => json!(text + &more),
        (Change::List(list), _) => json!(list),
        (Change::Twice, Value::Array(list)) => {
            let twice: Vec<Value> = list.iter().chain(&list).cloned().collect();
            json!(twice)
        }
        (Change::Add(key, text), Value::Object(mut map)) => {
            map.insert(key, json!(text));
            Value::Object(map)
        }
        (Change::Add(key, text), _) => json!(Map::from_iter([(key, json!(text))])),
        (Change::Longer(_) | Change::Twice, other) => other,
    };
}
