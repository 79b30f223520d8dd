//! Bytes in JSON: two lower-case digits each.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The digits of `bytes`.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)].into());
        text.push(DIGITS[usize::from(byte & 0xf)].into());
    }
    text
}

/// The bytes of `text`, if it is digits throughout.
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let value = |digit: u8| char::from(digit).to_digit(16);
    let byte = |high, low| u8::try_from(value(high)? << 4 | value(low)?).ok();
    let (pairs, rest) = digits.as_chunks();
    let bytes = pairs.iter().map(|[high, low]| byte(*high, *low));
    bytes.collect::<Option<_>>().filter(|_| rest.is_empty())
}

/// Any number of bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = decode(&text).ok_or_else(|| D::Error::custom("not hexadecimal"))?;
        Ok(Bytes(bytes))
    }
}

/// A structure of the kernel's interface, which is for ever, as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Raw<T>(pub T);

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(self.0.as_bytes()))
    }
}

impl<'de, T: FromBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Bytes(bytes) = Bytes::deserialize(deserializer)?;
        match T::read_from_bytes(&bytes) {
            Ok(value) => Ok(Raw(value)),
            Err(_) => Err(D::Error::custom("not as long as the structure that it is")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_as_digits_and_read_back() {
        let bytes = vec![0x00, 0x7f, 0xa5, 0xff];
        assert_eq!(encode(&bytes), "007fa5ff");
        assert_eq!(decode("007fa5ff"), Some(bytes));
        for wrong in ["0", "0g", "+1", "00 0", "é"] {
            assert_eq!(decode(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_structure_of_another_length_is_refused() {
        let text = serde_json::to_string(&Raw(0x0102_0304_u32)).unwrap();
        assert_eq!(text, r#""04030201""#);
        let Raw(back): Raw<u32> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, 0x0102_0304);
        serde_json::from_str::<Raw<u64>>(&text).unwrap_err();
    }
}
