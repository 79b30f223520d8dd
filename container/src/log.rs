//! Where the binary's errors and warnings go: standard error, and the file that `--log` names, which
//! engines read to learn why something failed.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;

use jiff::Timestamp;

/// How a line of the log file looks.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Format {
    #[default]
    Text,
    Json,
}

/// Where lines go beside standard error.
#[derive(Clone, Debug, Default)]
pub struct Log {
    pub file: Option<PathBuf>,
    pub format: Format,
    /// Whether details are written too.
    pub debug: bool,
}

static LOG: OnceLock<Log> = OnceLock::new();

/// Sets where lines go, once.
pub fn set(log: Log) {
    // The first call wins: main's.
    let _ = LOG.set(log);
}

pub fn error(message: &str) {
    write("error", message);
}

pub fn warn(message: &str) {
    write("warning", message);
}

pub fn debug(message: &str) {
    if LOG.get().is_some_and(|log| log.debug) {
        write("debug", message);
    }
}

fn write(level: &str, message: &str) {
    let log = LOG.get().cloned().unwrap_or_default();
    // One write a line, so that lines of several processes do not mix. Nobody can be told of a failure.
    let _ = std::io::stderr().write_all(format!("hostd-oci: {level}: {message}\n").as_bytes());
    let Some(path) = log.file else { return };
    let line = match log.format {
        Format::Text => format!(
            "time=\"{}\" level={level} msg={message:?}\n",
            Timestamp::now()
        ),
        Format::Json => {
            let time = Timestamp::now().to_string();
            let line = serde_json::json!({"level": level, "msg": message, "time": time});
            format!("{line}\n")
        }
    };
    let file = OpenOptions::new().append(true).create(true).open(path);
    let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
}
