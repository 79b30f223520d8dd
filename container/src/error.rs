//! Writes an error with what caused it.

use std::error::Error;
use std::fmt::Write;
use std::io;

/// The error and its sources, joined by `: `.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        // Writing to a string cannot fail.
        let _ = write!(text, ": {error}");
        source = error.source();
    }
    in_small_letters(&text)
}

/// Engines look for the words that a runtime in Go has for errors of the system: in small letters, and
/// without a number.
fn in_small_letters(text: &str) -> String {
    const NUMBER: &str = " (os error ";
    let mut written = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(NUMBER) {
        let number = after.split_once(')');
        let parsed = number.and_then(|(number, behind)| Some((number.parse().ok()?, behind)));
        let Some((number, behind)) = parsed else {
            break;
        };
        let whole = io::Error::from_raw_os_error(number).to_string();
        let words = whole.split_once(NUMBER).map_or("", |(words, _)| words);
        match before.strip_suffix(words) {
            Some(before) => {
                let first = words.chars().take(1).flat_map(char::to_lowercase);
                written.push_str(before);
                written.extend(first.chain(words.chars().skip(1)));
            }
            // Not the system's words after all.
            None => written.push_str(&rest[..rest.len() - behind.len()]),
        }
        rest = behind;
    }
    written + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_system_are_in_the_words_that_engines_look_for() {
        let error = |number| io::Error::from_raw_os_error(number);
        let open = io::Error::other(format!("cannot open `/a`: {}", error(libc::ENOENT)));
        assert_eq!(chain(&open), "cannot open `/a`: no such file or directory");
        for (number, words) in [
            (libc::EPERM, "operation not permitted"),
            (libc::EACCES, "permission denied"),
            (libc::EBUSY, "device or resource busy"),
            (libc::EXDEV, "invalid cross-device link"),
        ] {
            assert_eq!(chain(&error(number)), words);
        }
        let two = format!("{}; then {} again", error(libc::ENOENT), error(libc::EPERM));
        let two = in_small_letters(&two);
        assert_eq!(
            two,
            "no such file or directory; then operation not permitted again"
        );
        for other in [
            "Nothing (os error 2)",
            "A (os error x)",
            "A (os error 2",
            "It failed",
        ] {
            assert_eq!(in_small_letters(other), other);
        }
    }
}
