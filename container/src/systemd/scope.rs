//! Which scope a container gets: `linux.cgroupsPath` as engines write it for systemd, `SLICE:PREFIX:NAME`.

use super::Value;

/// What a unit's name may be made of (systemd.unit(5)).
const PUNCTUATION: &str = ":-_.\\@";

/// `UNIT_NAME_MAX` of systemd, with the NUL byte that it counts.
const NAME_BYTES_MAX: usize = 255;

/// The scope to start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ScopePlan {
    /// As `libpod-web.scope`.
    pub(crate) unit: String,
    /// As `machine.slice`; empty for that which systemd chooses.
    pub(crate) slice: String,
    /// What annotations ask for, by name.
    pub(crate) properties: Vec<(String, Value)>,
}

impl ScopePlan {
    /// The scope that a path names, or that of a container without one.
    ///
    /// # Errors
    /// What is allowed.
    pub(crate) fn new(path: &str, id: &str) -> Result<ScopePlan, String> {
        let parts: Vec<&str> = match path {
            "" => vec!["", "hostd-oci", id],
            path => path.split(':').collect(),
        };
        let [slice, prefix, name] = parts.as_slice() else {
            return Err("with systemd it must be SLICE:PREFIX:NAME".to_owned());
        };
        let unit = match *prefix {
            "" => format!("{name}.scope"),
            prefix => format!("{prefix}-{name}.scope"),
        };
        for (what, text) in [("SLICE", *slice), ("PREFIX-NAME.scope", unit.as_str())] {
            let allowed =
                |letter: char| letter.is_ascii_alphanumeric() || PUNCTUATION.contains(letter);
            if !text.chars().all(allowed) || text.len() > NAME_BYTES_MAX {
                return Err(format!(
                    "{what} may have {NAME_BYTES_MAX} letters, digits and `:-_.\\@`"
                ));
            }
        }
        if !slice.is_empty() && !slice.ends_with(".slice") {
            return Err("SLICE must end with `.slice`".to_owned());
        }
        if name.is_empty() || name.ends_with(".slice") {
            return Err("NAME must name a scope".to_owned());
        }
        Ok(ScopePlan {
            unit,
            slice: (*slice).to_owned(),
            properties: Vec::new(),
        })
    }
}

/// The path of a unit's object: all but letters and digits is written as `_` and two digits.
pub(super) fn object_path(unit: &str) -> String {
    let mut path = "/org/freedesktop/systemd1/unit/".to_owned();
    for (index, byte) in unit.bytes().enumerate() {
        if byte.is_ascii_alphabetic() || (byte.is_ascii_digit() && index > 0) {
            path.push(char::from(byte));
        } else {
            path.push_str(&format!("_{byte:02x}"));
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_a_slice_a_prefix_and_a_name() {
        let plan = |path: &str| {
            let plan = ScopePlan::new(path, "a")?;
            Ok::<_, String>((plan.unit, plan.slice))
        };
        let is = |unit: &str, slice: &str| Ok((unit.to_owned(), slice.to_owned()));
        assert_eq!(
            plan("machine.slice:libpod:0f"),
            is("libpod-0f.scope", "machine.slice")
        );
        assert_eq!(plan(":docker:x"), is("docker-x.scope", ""));
        assert_eq!(plan("a-b.slice::x"), is("x.scope", "a-b.slice"));
        assert_eq!(plan(""), is("hostd-oci-a.scope", ""));
        for bad in [
            "/a/b",
            "a:b",
            "a:b:c:d",
            "a:b:c",
            "a.slice:b:",
            "a.slice:b:c.slice",
            "a.slice:b:c/d",
            "../a.slice:b:c",
        ] {
            assert!(plan(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_units_object_has_an_escaped_name() {
        assert_eq!(
            object_path("0a-b.scope"),
            "/org/freedesktop/systemd1/unit/_30a_2db_2escope"
        );
    }
}
