//! Properties of a scope that annotations ask for, as runc and crun take them:
//! `org.systemd.property.NAME`, with the value in the text format of GVariant.

use std::collections::HashMap;

use super::Value;

pub(crate) const PREFIX: &str = "org.systemd.property.";
const MICROSECONDS_PER_SECOND: f64 = 1_000_000.0;
/// Later numbers are not exact as floating point; it is 285 years.
const SECONDS_MAX: f64 = 9_007_199_254.0;

/// What a value may be, for the error.
pub(crate) const ALLOWED: &str = "true, false, a number, `uint64 1`, `uint32 1`, 'text' or ['text', …] is allowed, \
                                  and seconds for …Sec";

/// The properties, by name.
///
/// # Errors
/// The annotation that cannot be read.
pub(crate) fn properties(
    annotations: &HashMap<String, String>,
) -> Result<Vec<(String, Value)>, &str> {
    let mut found = Vec::new();
    for (key, text) in annotations {
        let Some(name) = key.strip_prefix(PREFIX) else {
            continue;
        };
        let is_name = !name.is_empty() && name.chars().all(|letter| letter.is_ascii_alphanumeric());
        let property = is_name.then(|| property(name, text.trim())).flatten();
        found.push(property.ok_or(key.as_str())?);
    }
    found.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(found)
}

fn property(name: &str, text: &str) -> Option<(String, Value)> {
    // The bus knows times in microseconds only, under another name.
    match name.strip_suffix("Sec") {
        Some(stem) if !stem.ends_with('U') => Some((format!("{stem}USec"), seconds(text)?)),
        _ => Some((name.to_owned(), value(text)?)),
    }
}

fn seconds(text: &str) -> Option<Value> {
    let number = text.rsplit(' ').next()?;
    let seconds: f64 = number.parse().ok()?;
    if !(0.0..=SECONDS_MAX).contains(&seconds) {
        return None;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it was just seen to be in the range"
    )]
    let microseconds = (seconds * MICROSECONDS_PER_SECOND).round() as u64;
    Some(Value::Large(microseconds))
}

fn value(text: &str) -> Option<Value> {
    match text {
        "true" => return Some(Value::Flag(true)),
        "false" => return Some(Value::Flag(false)),
        _ => {}
    }
    if let Some((kind, number)) = text.split_once(' ') {
        match kind {
            "uint64" => return number.trim().parse().ok().map(Value::Large),
            "uint32" => return number.trim().parse().ok().map(Value::Number),
            "int32" => return number.trim().parse().ok().map(Value::Signed),
            _ => {}
        }
    }
    if let Some(list) = text.strip_prefix('[') {
        return texts(list.strip_suffix(']')?).map(Value::Texts);
    }
    match quoted(text) {
        Some((text, "")) => Some(Value::Text(text)),
        Some(_) => None,
        // As GVariant takes a number without a type.
        None => text.parse().ok().map(Value::Signed),
    }
}

fn texts(list: &str) -> Option<Vec<String>> {
    let mut texts = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() {
        let (text, after) = quoted(rest)?;
        texts.push(text);
        rest = match after.trim_start() {
            "" => "",
            more => more.strip_prefix(',')?.trim_start(),
        };
    }
    Some(texts)
}

/// A text in quotes of either kind, and what follows it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let quote = text
        .chars()
        .next()
        .filter(|letter| matches!(letter, '\'' | '"'))?;
    let mut inside = String::new();
    let mut letters = text[1..].char_indices();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\\' => inside.push(letters.next()?.1),
            letter if letter == quote => return Some((inside, &text[at + 2..])),
            letter => inside.push(letter),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_form_of_gvariant() {
        let text = |text: &str| Value::Text(text.to_owned());
        for (name, given, property, expected) in [
            (
                "CollectMode",
                "'inactive-or-failed'",
                "CollectMode",
                text("inactive-or-failed"),
            ),
            (
                "Description",
                r#""it's \"here\"""#,
                "Description",
                text("it's \"here\""),
            ),
            ("SendSIGHUP", "true", "SendSIGHUP", Value::Flag(true)),
            ("TasksMax", "uint64 7", "TasksMax", Value::Large(7)),
            ("KillSignal", "int32 9", "KillSignal", Value::Signed(9)),
            ("KillSignal", "9", "KillSignal", Value::Signed(9)),
            (
                "TimeoutStopSec",
                "2",
                "TimeoutStopUSec",
                Value::Large(2_000_000),
            ),
            (
                "TimeoutStopSec",
                "uint64 2",
                "TimeoutStopUSec",
                Value::Large(2_000_000),
            ),
            (
                "TimeoutStopSec",
                "0.5",
                "TimeoutStopUSec",
                Value::Large(500_000),
            ),
            (
                "TimeoutStopUSec",
                "uint64 5",
                "TimeoutStopUSec",
                Value::Large(5),
            ),
            (
                "After",
                "['a.service', 'b.service']",
                "After",
                Value::Texts(vec!["a.service".to_owned(), "b.service".to_owned()]),
            ),
        ] {
            let annotations = HashMap::from([(format!("{PREFIX}{name}"), given.to_owned())]);
            let found = properties(&annotations).unwrap();
            assert_eq!(found, [(property.to_owned(), expected)], "{given}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named_and_other_annotations_are_not_looked_at() {
        for (name, given) in [
            ("After", "['a.service'"),
            ("After", "[a]"),
            ("Description", "'a"),
            ("Description", "'a' b"),
            ("Description", "a"),
            ("TasksMax", "uint64 -1"),
            ("TimeoutStopSec", "'1'"),
            ("TimeoutStopSec", "-1"),
            ("TimeoutStopSec", "1e300"),
            ("", "1"),
            ("A b", "1"),
        ] {
            let key = format!("{PREFIX}{name}");
            let annotations = HashMap::from([(key.clone(), given.to_owned())]);
            assert_eq!(properties(&annotations), Err(key.as_str()), "{given}");
        }
        let other = HashMap::from([("org.systemd".to_owned(), "a".to_owned())]);
        assert_eq!(properties(&other), Ok(Vec::new()));
    }
}
