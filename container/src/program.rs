//! Finds a container's program, and executes it.

use std::convert::Infallible;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::unistd::{execve, execveat};

use crate::environment::variable;
use crate::launch::LaunchError;
use crate::plan::process::ProcessPlan;
use crate::sys;

/// Where programs are looked for if the environment has no PATH.
pub(crate) const PATH_DEFAULT: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is executed.
#[derive(Debug)]
pub(crate) enum Program {
    /// The first of these that the user may execute; there is one.
    Paths(Vec<CString>),
    Descriptor(OwnedFd),
}

impl Program {
    /// What must stay open until it is executed.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Paths(_) => None,
            Self::Descriptor(file) => Some(file.as_fd()),
        }
    }

    /// Finds the program that `args[0]` names, as the container sees its file tree. The user is not taken
    /// on yet, and may have less rights, or others: what is not certain is left to [`Program::execute`].
    pub(crate) fn find(process: &ProcessPlan) -> Result<Self, LaunchError> {
        let name = process.args[0].as_c_str();
        let text = || name.to_string_lossy().into_owned();
        let mut paths = Vec::new();
        let mut denied = None;
        for path in candidates(name, &process.env) {
            match check_executable(&path) {
                Ok(()) => paths.extend(CString::new(path.into_os_string().into_encoded_bytes())),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    denied = Some(error);
                }
                Err(source) if name.to_bytes().contains(&b'/') => {
                    return Err(LaunchError::Execute {
                        name: text(),
                        source,
                    });
                }
                Err(_) => {}
            }
        }
        match denied {
            _ if !paths.is_empty() => Ok(Self::Paths(paths)),
            Some(source) => Err(LaunchError::Execute {
                name: text(),
                source,
            }),
            None => Err(LaunchError::NotInPath {
                name: text(),
                source: io::Error::from_raw_os_error(libc::ENOENT),
            }),
        }
    }

    /// Becomes the program.
    pub(crate) fn execute(
        &self,
        args: &[CString],
        env: &[CString],
    ) -> Result<Infallible, LaunchError> {
        sys::reset_broken_pipe();
        let error = match self {
            Program::Paths(paths) => first_allowed(paths, args, env),
            Program::Descriptor(file) => {
                let empty: &CStr = c"";
                match execveat(file, empty, args, env, AtFlags::AT_EMPTY_PATH) {
                    Ok(never) => match never {},
                    Err(error) => error.into(),
                }
            }
        };
        Err(LaunchError::Execute {
            name: args[0].to_string_lossy().into_owned(),
            source: error,
        })
    }
}

/// As execvp(3): what the user may not execute does not hide what comes later in PATH.
fn first_allowed(paths: &[CString], args: &[CString], env: &[CString]) -> io::Error {
    let mut denied = nix::errno::Errno::ENOENT;
    for path in paths {
        match execve(path, args, env) {
            Ok(never) => match never {},
            Err(error @ nix::errno::Errno::EACCES) => denied = error,
            Err(error) => return error.into(),
        }
    }
    denied.into()
}

/// The paths that a name may stand for.
fn candidates(name: &CStr, env: &[CString]) -> Vec<PathBuf> {
    let name = OsStr::from_bytes(name.to_bytes());
    if name.as_bytes().contains(&b'/') {
        return vec![PathBuf::from(name)];
    }
    let path = variable(env, b"PATH").unwrap_or(PATH_DEFAULT.as_bytes());
    let join = |directory: &[u8]| match directory {
        b"" => Path::new(".").join(name),
        directory => Path::new(OsStr::from_bytes(directory)).join(name),
    };
    path.split(|byte| *byte == b':').map(join).collect()
}

fn check_executable(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_file() && metadata.mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(io::Error::from_raw_os_error(libc::EACCES))
}
