//! PAX extension records (POSIX pax, "pax Extended Header"; GNU tar manual, "PAX Format").

use std::io;

use super::archive::{Segment, Time};

/// Pieces of data in one sparse file.
pub(super) const SPARSE_SEGMENTS_MAX: usize = 64 * 1024;

/// The `GNU.sparse.*` records of an entry.
#[derive(Default)]
pub(super) struct Sparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) map_in_data: bool,
    numbers: Option<Vec<u64>>,
}

impl Sparse {
    pub(super) fn is_present(&self) -> bool {
        self.map_in_data || self.numbers.is_some()
    }

    pub(super) fn record(&mut self, name: &str, value: Vec<u8>) -> io::Result<()> {
        match name {
            "name" => self.name = Some(without_nul(value)),
            "size" | "realsize" => self.size = Some(number(&value)?),
            "major" => self.map_in_data = number(&value)? == 1,
            "offset" | "numbytes" => self.push(number(&value)?)?,
            "map" => {
                for part in value.split(|&byte| byte == b',') {
                    self.push(number(part)?)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn push(&mut self, number: u64) -> io::Result<()> {
        let numbers = self.numbers.get_or_insert_default();
        if numbers.len() == 2 * SPARSE_SEGMENTS_MAX {
            return Err(too_many_segments());
        }
        numbers.push(number);
        Ok(())
    }

    pub(super) fn segments(self) -> io::Result<Vec<Segment>> {
        let numbers = self.numbers.unwrap_or_default();
        if !numbers.len().is_multiple_of(2) {
            return Err(invalid("a sparse map is malformed"));
        }
        let pairs = numbers.chunks_exact(2);
        Ok(pairs
            .map(|pair| Segment {
                offset: pair[0],
                length: pair[1],
            })
            .collect())
    }
}

/// Records of the form `LENGTH KEY=VALUE\n`, where a value may hold any byte (POSIX pax, "pax
/// Extended Header").
pub(super) fn records(mut bytes: &[u8]) -> io::Result<Vec<(String, Vec<u8>)>> {
    let malformed = || invalid("a PAX record is malformed");
    let mut found = Vec::new();
    while !bytes.is_empty() && bytes[0] != 0 {
        let space = bytes
            .iter()
            .position(|&byte| byte == b' ')
            .ok_or_else(malformed)?;
        let length = usize::try_from(number(&bytes[..space])?).map_err(|_| malformed())?;
        let record = bytes.get(space + 1..length).ok_or_else(malformed)?;
        let record = record.strip_suffix(b"\n").ok_or_else(malformed)?;
        let equals = record
            .iter()
            .position(|&byte| byte == b'=')
            .ok_or_else(malformed)?;
        let key = String::from_utf8(record[..equals].to_vec()).map_err(|_| malformed())?;
        found.push((key, record[equals + 1..].to_vec()));
        bytes = &bytes[length..];
    }
    Ok(found)
}

pub(super) fn number(text: &[u8]) -> io::Result<u64> {
    let text = str::from_utf8(text).ok();
    text.and_then(|text| text.parse().ok())
        .ok_or_else(|| invalid("a number is malformed"))
}

/// Decimal seconds, perhaps negative, perhaps with a fraction.
pub(super) fn time(text: &[u8]) -> io::Result<Time> {
    let malformed = || invalid("a time is malformed");
    let text = str::from_utf8(text).map_err(|_| malformed())?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i64 = seconds.parse().map_err(|_| malformed())?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(malformed());
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().map_err(|_| malformed())?;
    if seconds.starts_with('-') && nanoseconds > 0 {
        // Nanoseconds count upwards, also before the epoch.
        let seconds = whole.checked_sub(1).ok_or_else(malformed)?;
        return Ok(Time {
            seconds,
            nanoseconds: 1_000_000_000 - nanoseconds,
        });
    }
    Ok(Time {
        seconds: whole,
        nanoseconds,
    })
}

pub(super) fn without_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|&byte| byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

pub(super) fn invalid(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

pub(super) fn too_many_segments() -> io::Error {
    invalid(format!(
        "a sparse file has over {SPARSE_SEGMENTS_MAX} pieces"
    ))
}
