//! Parts of a state file that are much larger in memory than as text, and so may not be long.

use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// The most bytes of JSON of such a part. A device with a bit for each 2 MiB of 4 TiB takes half of it.
pub const PART_BYTES_MAX: usize = 1 << 20;

/// For `deserialize_with`: refuses a part that is longer than [`PART_BYTES_MAX`] before anything is
/// made of it.
pub(crate) fn part<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let text = Box::<RawValue>::deserialize(deserializer)?;
    let bytes = text.get().len();
    if bytes > PART_BYTES_MAX {
        let message = format!("a part has {bytes} bytes; at most {PART_BYTES_MAX} are possible");
        return Err(Error::custom(message));
    }
    serde_json::from_str(text.get()).map_err(Error::custom)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Whole {
        #[serde(deserialize_with = "part")]
        part: Value,
    }

    #[test]
    fn a_long_part_is_refused_and_a_short_one_is_read() {
        let read = |length: usize| {
            let part = "0".repeat(length - 2);
            serde_json::from_str::<Whole>(&format!(r#"{{"part":"{part}"}}"#))
        };
        let whole = read(PART_BYTES_MAX).unwrap();
        assert_eq!(whole.part.as_str().unwrap().len(), PART_BYTES_MAX - 2);
        let error = read(PART_BYTES_MAX + 1).unwrap_err().to_string();
        assert!(error.contains("a part has 1048577 bytes"), "{error}");
        serde_json::from_str::<Whole>(r#"{"part":}"#).unwrap_err();
        // What was a value before is none the worse.
        let value: Value = serde_json::from_str(r#"{"part":[1]}"#).unwrap();
        assert_eq!(
            Whole::deserialize(value).unwrap().part,
            serde_json::json!([1])
        );
    }
}
