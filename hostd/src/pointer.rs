//! JSON that does not fit, told by the JSON pointer (RFC 6901) of what does not fit.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_path_to_error::{Path, Segment};

use crate::validate::{self, FieldError};

/// Reads a value from JSON text.
///
/// # Errors
/// It is not JSON (`field` is empty), or a field is missing, unknown or of the wrong type.
pub fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, FieldError> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = read(&mut json)?;
    json.end()
        .map_err(|error| FieldError::new("", error.to_string()))?;
    Ok(value)
}

/// Reads a value from a JSON value.
///
/// # Errors
/// As [`parse`].
pub fn deserialize<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, FieldError> {
    read(value)
}

fn read<'de, T: Deserialize<'de>, D>(json: D) -> Result<T, FieldError>
where
    D: serde::Deserializer<'de>,
    D::Error: std::fmt::Display,
{
    serde_path_to_error::deserialize(json).map_err(|error| {
        let mut field = to_pointer(error.path());
        let detail = error.into_inner().to_string();
        // For a name that is unknown or absent the path is that of the object around it.
        for (prefix, name_ends_at) in [("unknown field `", '`'), ("missing field `", '`')] {
            if let Some(name) = detail
                .strip_prefix(prefix)
                .and_then(|rest| rest.split(name_ends_at).next())
            {
                let suffix = validate::pointer("", name);
                if !field.ends_with(&suffix) || prefix.starts_with("missing") {
                    field.push_str(&suffix);
                }
            }
        }
        FieldError::new(field, detail)
    })
}

fn to_pointer(path: &Path) -> String {
    path.iter()
        .fold(String::new(), |pointer, segment| match segment {
            Segment::Map { key } => validate::pointer(&pointer, key),
            Segment::Enum { variant } => validate::pointer(&pointer, variant),
            Segment::Seq { index } => format!("{pointer}/{index}"),
            Segment::Unknown => pointer,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::types::InstanceSpec;

    #[test]
    fn what_does_not_fit_is_named() {
        for (text, field) in [
            (r#"{"image":"a","colour":1}"#, "/colour"),
            (
                r#"{"image":"a","limits":{"cpu":{"speed":1}}}"#,
                "/limits/cpu/speed",
            ),
            (
                r#"{"image":"a","limits":{"cpu":{"cpu":1}}}"#,
                "/limits/cpu/cpu",
            ),
            (
                r#"{"image":"a","limits":{"memory":{"max":"1G"}}}"#,
                "/limits/memory/max",
            ),
            (
                r#"{"image":"a","network":{"ports":[{"host":80}]}}"#,
                "/network/ports/0/instance",
            ),
            (
                r#"{"image":"a","network":{"ports":[{"host":99999}]}}"#,
                "/network/ports/0/host",
            ),
            (r#"{"image":"a","isolation":"jail"}"#, "/isolation"),
            (r#"{"isolation":"vm"}"#, "/image"),
            ("[]", ""),
            ("{", ""),
            (r#"{"image":"a"} x"#, ""),
        ] {
            let error = parse::<InstanceSpec>(text.as_bytes()).expect_err(text);
            assert_eq!(error.field, field, "{text}: {}", error.detail);
        }
    }
}
