//! What the agent says to people: lines on the console.

use std::error::Error;
use std::io::{self, Write};

/// Prints a line. There is nobody to tell if that fails.
pub fn say(message: &str) {
    let _ = writeln!(io::stderr(), "hostd-agent: {message}");
}

/// An error with all its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
