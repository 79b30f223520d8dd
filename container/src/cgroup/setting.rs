//! Values on their way into the files of a control group.
//!
//! What to write is planned first, by pure functions (`v1`, `v2`), and written here.

use std::{
    borrow::Cow,
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use nix::errno::Errno;

use super::CgroupError;

/// One write into one file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Setting {
    /// The field of the configuration that asks for it, as `memory.limit`.
    pub(super) field: Cow<'static, str>,
    pub(super) file: PathBuf,
    pub(super) value: String,
    pub(super) absent: Absent,
}

/// What it means that the kernel does not have the file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Absent {
    /// The request cannot be honoured.
    Refused,
    /// The request holds anyway.
    Satisfied,
}

impl Setting {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "the values are numbers and strings made for the call"
    )]
    pub(super) fn new(
        field: impl Into<Cow<'static, str>>,
        directory: &Path,
        file: &str,
        value: impl ToString,
    ) -> Setting {
        Setting {
            field: field.into(),
            file: directory.join(file),
            value: value.to_string(),
            absent: Absent::Refused,
        }
    }

    pub(super) fn satisfied_if_absent(self) -> Setting {
        Setting {
            absent: Absent::Satisfied,
            ..self
        }
    }

    fn write(&self) -> io::Result<()> {
        match write(&self.file, &self.value) {
            Err(error)
                if error.kind() == io::ErrorKind::NotFound && self.absent == Absent::Satisfied =>
            {
                Ok(())
            }
            result => result,
        }
    }

    fn error(&self, source: io::Error) -> CgroupError {
        // A missing file, or one that the kernel no longer supports, is a feature that is missing.
        let unsupported = source.kind() == io::ErrorKind::NotFound
            || source.raw_os_error() == Some(Errno::EOPNOTSUPP as i32);
        if unsupported {
            let name = self.file.file_name().unwrap_or_default();
            return CgroupError::invalid(
                self.field.to_string(),
                &self.value,
                format!("the kernel has no {} here", name.display()),
            );
        }
        CgroupError::Set {
            field: self.field.to_string(),
            value: self.value.clone(),
            file: self.file.clone(),
            source,
        }
    }

    /// The same setting with what is in the file now; nothing where that cannot be told.
    fn previous(&self) -> Option<Setting> {
        let text = fs::read_to_string(&self.file).ok()?;
        let value = match device_of(&self.value) {
            None => text.trim_end().to_owned(),
            Some((device, rest)) => {
                let line = text
                    .lines()
                    .find(|line| device_of(line).is_some_and(|d| d.0 == device));
                line.map_or_else(
                    || format!("{device} {}", without_limits(rest)),
                    str::to_owned,
                )
            }
        };
        Some(Setting {
            value,
            ..self.clone()
        })
    }
}

/// Splits `8:0 rest` in the device and the rest.
fn device_of(value: &str) -> Option<(&str, &str)> {
    let (device, rest) = value.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    (major.parse::<u32>().is_ok() && minor.parse::<u32>().is_ok()).then_some((device, rest))
}

/// The value that takes away the limits that `rest` sets: `rbps=1 wbps=2` or a plain number.
fn without_limits(rest: &str) -> String {
    let words = rest.split(' ').map(|word| match word.split_once('=') {
        Some((key, _)) => format!("{key}=max"),
        None => "0".to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Writes all settings, or gives up at the first that the kernel refuses.
///
/// Whether a value is valid may depend on another one: a quota on the period and on what the
/// parent has, memory and swap on each other. One order is right for raising them and the other
/// for lowering. So what is refused as invalid gets a second chance when the rest is written.
pub(super) fn apply(settings: &[Setting]) -> Result<(), CgroupError> {
    let mut again = Vec::new();
    for setting in settings {
        match setting.write() {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => again.push(setting),
            Err(error) => return Err(setting.error(error)),
        }
    }
    for setting in again {
        setting.write().map_err(|source| setting.error(source))?;
    }
    Ok(())
}

/// As [`apply`], but a refusal leaves the values as they were.
pub(super) fn apply_all_or_nothing(settings: &[Setting]) -> Result<(), CgroupError> {
    let previous: Vec<Setting> = settings.iter().filter_map(Setting::previous).collect();
    apply(settings).inspect_err(|_| {
        // What does not go back was not changed either, or the kernel itself moved it; the first
        // error is the one to tell.
        for setting in previous.iter().chain(&previous) {
            setting.write().ok();
        }
    })
}

/// Writes `value` with one call, as control files want it.
pub(super) fn write(file: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(file)?
        .write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_line_goes_back_to_what_was_there_or_to_no_limit() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("io.max");
        let old = "8:0 rbps=100 wbps=max riops=max wiops=max\n8:16 rbps=5 wbps=max\n";
        fs::write(&file, old).unwrap();
        let previous = |value: &str| {
            let setting = Setting::new("x", directory.path(), "io.max", value);
            setting.previous().unwrap().value
        };
        assert_eq!(
            previous("8:0 rbps=200"),
            "8:0 rbps=100 wbps=max riops=max wiops=max"
        );
        assert_eq!(previous("8:32 wbps=7 riops=9"), "8:32 wbps=max riops=max");
        assert_eq!(previous("8:32 1048576"), "8:32 0");
    }

    #[test]
    fn a_missing_file_is_told_by_the_field_that_needs_it() {
        let directory = tempfile::tempdir().unwrap();
        let setting = Setting::new("memory.swap", directory.path(), "memory.swap.max", 5);
        let error = apply(std::slice::from_ref(&setting)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("memory.swap") && text.contains("memory.swap.max"),
            "{text}"
        );
        apply(&[setting.satisfied_if_absent()]).unwrap();
    }
}
