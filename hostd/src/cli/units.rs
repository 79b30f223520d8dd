//! Sizes and times, as people write and read them.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// The bytes of a text such as `1024`, `256M` or `1.5GiB`. Units are powers of 1024, as Docker's.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is not a size such as 512K, 256M or 1.5G");
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(wrong()),
    };
    let scale = 1_u64 << shift;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale).ok_or_else(wrong);
    }
    let (whole, fraction) = number.split_once('.').ok_or_else(wrong)?;
    // A hundredth of a byte is nobody's wish, and exact arithmetic nobody's surprise.
    let digits = fraction.get(..fraction.len().min(9)).ok_or_else(wrong)?;
    let whole: u64 = whole.parse().map_err(|_| wrong())?;
    let part: u64 = digits.parse().map_err(|_| wrong())?;
    let tens = 10_u64.pow(u32::try_from(digits.len()).map_err(|_| wrong())?);
    let part = u128::from(part) * u128::from(scale) / u128::from(tens);
    let part = u64::try_from(part).map_err(|_| wrong())?;
    whole
        .checked_mul(scale)
        .and_then(|bytes| bytes.checked_add(part))
        .ok_or_else(wrong)
}

/// Bytes with three digits and a unit, e.g. `1.50 GiB`.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // Tenths and hundredths are all that is shown, so nothing is lost that would be seen.
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = if value < 10.0 {
        2
    } else {
        usize::from(value < 100.0)
    };
    let number = format!("{value:.decimals$}");
    let number = if number.contains('.') {
        number.trim_end_matches('0').trim_end_matches('.')
    } else {
        &number
    };
    format!("{number} {}", UNITS[unit])
}

/// A time such as `500ms`, `10s`, `5m`, `1h30m` or, in seconds, `10`.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time such as 10s, 5m or 1h30m");
    if let Ok(seconds) = text.parse::<u64>() {
        return Ok(Duration::from_secs(seconds));
    }
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let milliseconds = match &rest[..letters] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let part = number.checked_mul(milliseconds).ok_or_else(wrong)?;
        total = total
            .checked_add(Duration::from_millis(part))
            .ok_or_else(wrong)?;
        rest = &rest[letters..];
    }
    if text.is_empty() {
        Err(wrong())
    } else {
        Ok(total)
    }
}

/// A moment: RFC 3339, or a time before `now` such as `10m`.
pub(super) fn parse_moment(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(moment) = text.parse::<Timestamp>() {
        return Ok(moment);
    }
    let wrong = || format!("`{text}` is neither a time such as 10m nor a moment in RFC 3339");
    let ago = parse_duration(text).map_err(|_| wrong())?;
    let ago = SignedDuration::try_from(ago).map_err(|_| wrong())?;
    now.checked_sub(ago).map_err(|_| wrong())
}

/// A moment in UTC, always equally wide.
pub(super) fn moment(moment: Timestamp) -> String {
    moment.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string()
}

/// How long it is from `then` to `now`, in its two largest units.
pub(super) fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(then).as_secs().max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m {}s", seconds % 60),
        3600..86_400 => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let table = [
            ("0", Some(0)),
            ("1024", Some(1024)),
            ("1k", Some(1024)),
            ("256M", Some(256 << 20)),
            ("256MB", Some(256 << 20)),
            ("256MiB", Some(256 << 20)),
            ("2 G", Some(2 << 30)),
            ("1.5G", Some(3 << 29)),
            ("0.1k", Some(102)),
            ("1T", Some(1 << 40)),
            ("", None),
            ("M", None),
            ("1.M", None),
            ("-1", None),
            ("1X", None),
            ("1e3", None),
            ("16777216T", None),
            ("99999999999999999999", None),
        ];
        for (text, expected) in table {
            assert_eq!(parse_size(text).ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn sizes_are_shown_with_three_digits() {
        let table = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (256 << 20, "256 MiB"),
            (1_000_000, "977 KiB"),
            (1023 << 10, "1 MiB"),
            (12_345_678, "11.8 MiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, expected) in table {
            assert_eq!(size(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn times_are_read_as_people_write_them() {
        let table = [
            ("10", Some(10_000)),
            ("10s", Some(10_000)),
            ("500ms", Some(500)),
            ("1h30m", Some(5_400_000)),
            ("1d", Some(86_400_000)),
            ("", None),
            ("s", None),
            ("5x", None),
            ("5m3", None),
            ("99999999999999999d", None),
        ];
        for (text, expected) in table {
            let found = parse_duration(text).ok().map(|time| time.as_millis());
            assert_eq!(found, expected, "{text:?}");
        }
    }

    #[test]
    fn a_moment_is_absolute_or_ago() {
        let now: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
        let table = [
            ("2025-12-31T00:00:00Z", Some("2025-12-31T00:00:00Z")),
            ("10m", Some("2026-01-01T11:50:00Z")),
            ("yesterday", None),
        ];
        for (text, expected) in table {
            let found = parse_moment(text, now)
                .ok()
                .map(|moment| moment.to_string());
            assert_eq!(found.as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn moments_are_equally_wide() {
        for (text, expected) in [
            ("2026-01-01T12:00:00Z", "2026-01-01T12:00:00.000Z"),
            ("2026-01-01T12:00:00.12345678Z", "2026-01-01T12:00:00.123Z"),
        ] {
            assert_eq!(moment(text.parse().unwrap()), expected);
        }
    }

    #[test]
    fn an_age_has_its_two_largest_units() {
        let then: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let table = [
            (0, "0s"),
            (59, "59s"),
            (61, "1m 1s"),
            (7500, "2h 5m"),
            (100_000, "1d 3h"),
        ];
        for (seconds, expected) in table {
            let now = then + SignedDuration::from_secs(seconds);
            assert_eq!(age(then, now), expected);
        }
        assert_eq!(
            age(then + SignedDuration::from_secs(5), then),
            "0s",
            "clocks differ"
        );
    }
}
