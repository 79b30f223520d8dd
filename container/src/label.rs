//! Gives a process the label of a mandatory access control system that its program will have.

use std::fs::File;
use std::io::{self, Write};

use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::launch::{LaunchError, step};
use crate::plan::process::Label;

/// The file that the kernel reads the label from. It is opened as long as /proc is the host's: in the
/// container, anything may be mounted there, also another file of a procfs, which would get what is
/// written (CVE-2019-16884, CVE-2025-52881).
#[derive(Debug)]
pub(crate) struct LabelFile<'a> {
    file: File,
    text: &'a str,
    is_apparmor: bool,
}

impl<'a> LabelFile<'a> {
    /// For this process; another one, also a child, may not write to them.
    pub(crate) fn open_all(labels: &'a [Label]) -> Result<Vec<Self>, LaunchError> {
        labels.iter().map(Self::open).collect()
    }

    fn open(label: &'a Label) -> Result<Self, LaunchError> {
        let open = |path: &str| {
            let file = openat(CWD, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            Ok::<_, io::Error>(File::from(file))
        };
        let shared = "/proc/self/attr/exec";
        let (file, text, is_apparmor) = match label {
            // Older kernels have only the file that all systems share.
            Label::AppArmor(profile) => {
                let own = open("/proc/self/attr/apparmor/exec");
                (own.or_else(|_| open(shared)), profile, true)
            }
            Label::Selinux(label) => (open(shared), label, false),
        };
        Ok(Self {
            file: step("open the file for the security label", file)?,
            text,
            is_apparmor,
        })
    }

    /// Sets the label that exec gives.
    pub(crate) fn write(mut self) -> Result<(), LaunchError> {
        let written = if self.is_apparmor {
            self.file
                .write_all(format!("exec {}", self.text).as_bytes())
        } else {
            self.file.write_all(self.text.as_bytes())
        };
        step("set the security label", written)
    }
}
