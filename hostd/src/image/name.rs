//! Image references: which texts are one, and under which name an image is kept and found.

use oci_spec::distribution::Reference;

use super::error::ImageError;
use super::layout::Digest;

/// A reference is at most this long: more than any registry accepts.
const REFERENCE_BYTES_MAX: usize = 512;

/// Parses what a user wrote, completing it as Docker does: `busybox` is
/// `docker.io/library/busybox:latest`.
pub(super) fn parse(text: &str) -> Result<Reference, ImageError> {
    let invalid = |reason: String| ImageError::InvalidReference {
        reference: text.chars().take(REFERENCE_BYTES_MAX).collect(),
        reason,
    };
    if text.len() > REFERENCE_BYTES_MAX {
        return Err(invalid(format!(
            "it is longer than {REFERENCE_BYTES_MAX} bytes"
        )));
    }
    let reference: Reference = text.parse().map_err(|error| invalid(format!("{error}")))?;
    if let Some(digest) = reference.digest() {
        Digest::parse(digest)
            .ok_or_else(|| invalid("only sha256 digests are supported".to_owned()))?;
    }
    Ok(reference)
}

/// The name under which an imported image is kept: what the user wrote, with `:latest` if it has
/// neither tag nor digest.
pub(super) fn local(text: &str) -> Result<String, ImageError> {
    parse(text)?;
    Ok(if has_tag(text) || text.contains('@') {
        text.to_owned()
    } else {
        format!("{text}:latest")
    })
}

/// The names that a user may mean by `text`, most literal first.
pub(super) fn candidates(text: &str) -> Vec<String> {
    let mut names = vec![text.to_owned()];
    if !has_tag(text) && !text.contains('@') {
        names.push(format!("{text}:latest"));
    }
    if let Ok(reference) = parse(text) {
        names.push(reference.whole());
    }
    names
}

/// Whether `name` is `repository` with some tag.
pub(super) fn is_tag_of(name: &str, repository: &str) -> bool {
    name.strip_prefix(repository)
        .is_some_and(|rest| rest.starts_with(':') && !rest.contains('/'))
}

fn has_tag(text: &str) -> bool {
    let last = text.rsplit('/').next().unwrap_or(text);
    last.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_completed_as_docker_does() {
        for (text, whole) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("user/app:1", "docker.io/user/app:1"),
            ("localhost:5000/busybox", "localhost:5000/busybox:latest"),
            ("127.0.0.1:5000/a/b:v2", "127.0.0.1:5000/a/b:v2"),
        ] {
            assert_eq!(parse(text).unwrap().whole(), whole, "{text}");
        }
    }

    #[test]
    fn what_is_not_a_reference_is_refused() {
        let long = "a/".repeat(REFERENCE_BYTES_MAX);
        for text in [
            "",
            "localhost/UPPER",
            "a b",
            "../x",
            "a:b:c",
            "a@sha256:12",
            "a@sha512:0",
            &long,
        ] {
            assert!(
                matches!(parse(text), Err(ImageError::InvalidReference { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn an_imported_name_is_kept_as_written_and_gets_a_tag() {
        for (text, name) in [
            ("demo", "demo:latest"),
            ("demo:1", "demo:1"),
            ("host:5000/demo", "host:5000/demo:latest"),
        ] {
            assert_eq!(local(text).unwrap(), name);
        }
    }

    #[test]
    fn a_name_without_tag_matches_its_tags_only() {
        assert!(is_tag_of("demo:1", "demo"));
        assert!(is_tag_of("host:5000/demo:1", "host:5000/demo"));
        assert!(!is_tag_of("host:5000/demo:1", "host"));
        assert!(!is_tag_of("demolition:1", "demo"));
    }
}
