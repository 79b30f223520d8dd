//! The names of containers, which are names of directories too.

use std::io;
use std::path::Path;

use super::StateError;

/// The longest id, so that it fits in a file name beside a suffix.
pub const ID_BYTES_MAX: usize = 240;

/// Everything under the directory that holds the containers, by id.
///
/// # Errors
/// When the directory exists and cannot be read.
pub fn ids(root: &Path) -> Result<Vec<String>, StateError> {
    let failed = |source| StateError::Io {
        act: "read",
        path: root.to_path_buf(),
        source,
    };
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut ids = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
            ids.push(name);
        }
    }
    ids.retain(|id| check_id(id).is_ok());
    ids.sort();
    Ok(ids)
}

pub(super) fn check_id(id: &str) -> Result<(), StateError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte);
    let good = (1..=ID_BYTES_MAX).contains(&id.len())
        && id.bytes().all(allowed)
        && !matches!(id, "." | "..");
    if good {
        Ok(())
    } else {
        Err(StateError::Id { id: id.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_plain_name() {
        for good in ["a", "a.b", "libpod-0_1+x", "..."] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a b",
            "ä",
            &"x".repeat(ID_BYTES_MAX + 1),
        ] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }
}
