//! Turns a process as the image describes it into a command that can be started: finds the program,
//! the account and the working directory in the root file system.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::account::{self, Account, AccountError};
use crate::cgroup::CgroupError;
use crate::protocol::{NOT_EXECUTABLE, NOT_FOUND, Process};

/// What an image that sets no PATH gets, as with Docker.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// /etc/passwd and /etc/group are read up to here.
const ACCOUNT_FILE_BYTES_MAX: u64 = 4 << 20;

/// The exit code of a process that never ran for another reason than its program, as Docker uses it.
pub(crate) const FAILED: u8 = 125;

#[derive(Debug, thiserror::Error)]
pub(crate) enum LaunchError {
    #[error("There is no program to run")]
    NoProgram,
    #[error("`{program}` was not found")]
    NotFound { program: String },
    #[error("`{program}` cannot be executed")]
    NotExecutable { program: String },
    #[error("The environment entry `{entry}` is not of the form NAME=value")]
    Environment { entry: String },
    #[error("The working directory `{path}` is not an absolute path")]
    RelativeDirectory { path: String },
    #[error("The working directory `{path}` cannot be used")]
    Directory { path: String, source: io::Error },
    #[error("Failed to find the user to run as")]
    Account(#[from] AccountError),
    #[error("Failed to put the process into a control group")]
    Cgroup(#[from] CgroupError),
    #[error("Failed to start `{program}`")]
    Start { program: String, source: io::Error },
}

impl LaunchError {
    /// What the start of `program` failed of.
    pub(crate) fn start(program: &str, source: io::Error) -> Self {
        let program = program.to_owned();
        match source.raw_os_error() {
            // The program is there, so its interpreter is what is missing.
            Some(libc::ENOENT) => Self::NotFound { program },
            Some(libc::EACCES | libc::ENOEXEC | libc::EISDIR) => Self::NotExecutable { program },
            _ => Self::Start { program, source },
        }
    }

    /// The exit code that stands for the error.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => NOT_FOUND,
            Self::NotExecutable { .. } => NOT_EXECUTABLE,
            Self::NoProgram
            | Self::Environment { .. }
            | Self::RelativeDirectory { .. }
            | Self::Directory { .. }
            | Self::Account(_)
            | Self::Cgroup(_)
            | Self::Start { .. } => FAILED,
        }
    }
}

/// A command without its streams, and the account that it is to run as.
#[derive(Debug)]
pub(crate) struct Launch {
    pub(crate) command: Command,
    pub(crate) account: Account,
    /// The first argument, for messages.
    pub(crate) program: String,
}

/// Looks up all that `process` names. The working directory is made if it is missing.
pub(crate) fn launch(process: &Process) -> Result<Launch, LaunchError> {
    let program = process.args.first().ok_or(LaunchError::NoProgram)?.clone();
    let account = account::resolve(
        process.user.as_deref().unwrap_or_default(),
        &read_text("/etc/passwd"),
        &read_text("/etc/group"),
    )?;
    let environment = environment(process, &account)?;
    let directory = working_directory(process)?;
    let path = value(&environment, "PATH").unwrap_or(DEFAULT_PATH);
    let mut command = Command::new(find(&program, path, &directory)?);
    command
        .arg0(&program)
        .args(&process.args[1..])
        .env_clear()
        .envs(environment)
        .current_dir(directory);
    Ok(Launch {
        command,
        account,
        program,
    })
}

/// The entries of `process` in order, the last of a name winning, after the defaults.
fn environment(process: &Process, account: &Account) -> Result<Vec<(String, String)>, LaunchError> {
    let mut environment = vec![
        ("PATH".to_owned(), DEFAULT_PATH.to_owned()),
        ("HOME".to_owned(), account.home.clone()),
    ];
    if process.tty {
        environment.push(("TERM".to_owned(), "xterm".to_owned()));
    }
    for entry in &process.env {
        let pair = entry
            .split_once('=')
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| LaunchError::Environment {
                entry: entry.clone(),
            })?;
        environment.push((pair.0.to_owned(), pair.1.to_owned()));
    }
    Ok(environment)
}

fn value<'a>(environment: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let mut backwards = environment.iter().rev();
    backwards
        .find(|entry| entry.0 == name)
        .map(|entry| entry.1.as_str())
}

fn working_directory(process: &Process) -> Result<PathBuf, LaunchError> {
    let path = process.working_dir.as_deref().unwrap_or_default();
    if path.is_empty() {
        return Ok("/".into());
    }
    if !path.starts_with('/') {
        return Err(LaunchError::RelativeDirectory { path: path.into() });
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(|source| LaunchError::Directory {
            path: path.into(),
            source,
        })?;
    Ok(path.into())
}

/// The file of `program`: in `directory` if the name has a slash, else in the first directory of
/// `path` that holds an executable of the name.
fn find(program: &str, path: &str, directory: &Path) -> Result<PathBuf, LaunchError> {
    let mut found_other = false;
    let mut candidates: Box<dyn Iterator<Item = PathBuf>> = if program.contains('/') {
        Box::new(std::iter::once(directory.join(program)))
    } else {
        let folders = path.split(':').filter(|_| !program.is_empty());
        Box::new(folders.map(|folder| directory.join(folder).join(program)))
    };
    let executable = candidates.find(|candidate| match fs::metadata(candidate) {
        Ok(metadata) => {
            let usable = metadata.is_file() && metadata.permissions().mode() & 0o111 != 0;
            found_other |= !usable;
            usable
        }
        Err(_) => false,
    });
    let program = program.to_owned();
    match executable {
        Some(path) => Ok(path),
        None if found_other => Err(LaunchError::NotExecutable { program }),
        None => Err(LaunchError::NotFound { program }),
    }
}

/// The text of a file, empty if there is none.
fn read_text(path: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        // What cannot be read holds no entries.
        let _ = file.take(ACCOUNT_FILE_BYTES_MAX).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn process(args: &[&str]) -> Process {
        Process {
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            ..Process::default()
        }
    }

    #[test]
    fn a_program_is_found_as_a_shell_finds_it() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        for folder in ["one", "two", "two/folder"] {
            fs::create_dir(at(folder)).unwrap();
        }
        for (name, mode) in [
            ("one/data", 0o644),
            ("two/data", 0o755),
            ("one/text", 0o644),
        ] {
            fs::write(at(name), "").unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        symlink("nowhere", at("one/dangling")).unwrap();

        let path = format!("{}:{}", at("one").display(), at("two").display());
        let code = |program: &str| find(program, &path, root.path()).map_err(|error| error.code());
        let table = [
            ("data", Ok(at("two/data"))),
            ("two/data", Ok(at("two/data"))),
            ("./two/data", Ok(at("./two/data"))),
            ("text", Err(NOT_EXECUTABLE)),
            ("one/text", Err(NOT_EXECUTABLE)),
            ("folder", Err(NOT_EXECUTABLE)),
            ("dangling", Err(NOT_FOUND)),
            ("absent", Err(NOT_FOUND)),
            ("one/absent", Err(NOT_FOUND)),
            ("", Err(NOT_FOUND)),
        ];
        for (program, want) in table {
            assert_eq!(code(program), want, "{program}");
        }
    }

    #[test]
    fn the_environment_has_defaults_that_the_image_overrides() {
        let account = account::resolve("0", "root:x:0:0::/root:", "").unwrap();
        let mut process = process(&["sh"]);
        process.tty = true;
        process.env = vec![
            "A=1".into(),
            "HOME=/else".into(),
            "A=2=2".into(),
            "E=".into(),
        ];
        let environment = environment(&process, &account).unwrap();
        let table = [
            ("A", Some("2=2")),
            ("E", Some("")),
            ("HOME", Some("/else")),
            ("PATH", Some(DEFAULT_PATH)),
            ("TERM", Some("xterm")),
            ("USER", None),
        ];
        for (name, want) in table {
            assert_eq!(value(&environment, name), want, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_run_is_said_with_the_exit_code_of_a_shell() {
        let mut bad_entry = process(&["true"]);
        bad_entry.env = vec!["=x".into()];
        let mut bad_folder = process(&["true"]);
        bad_folder.working_dir = Some("tmp".into());
        let mut no_folder = process(&["true"]);
        no_folder.working_dir = Some("/dev/null/x".into());
        let mut bad_user = process(&["true"]);
        bad_user.user = Some("no such user".into());
        let table = [
            (process(&[]), FAILED),
            (process(&["no-such-program"]), NOT_FOUND),
            (process(&["/etc/passwd"]), NOT_EXECUTABLE),
            (bad_entry, FAILED),
            (bad_folder, FAILED),
            (no_folder, FAILED),
            (bad_user, FAILED),
        ];
        for (process, want) in table {
            let error = launch(&process).unwrap_err();
            assert_eq!(error.code(), want, "{error}");
        }
    }
}
