//! Runs the hooks of the specification: programs that get the container's state on standard input.

use std::ffi::{CString, OsStr};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use oci_spec::runtime::{Hook, Hooks};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Why a hook stops what it belongs to.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The words are those that users of the other runtimes look for.
    #[error("error running {name} hook #{index}: cannot run `{path}`")]
    Run {
        name: &'static str,
        index: usize,
        path: String,
        source: io::Error,
    },
    #[error("error running {name} hook #{index}: `{path}` ended with {}", describe(*status))]
    Status {
        name: &'static str,
        index: usize,
        path: String,
        status: ExitStatus,
    },
    #[error("error running {name} hook #{index}: `{path}` took longer than {seconds} s")]
    Timeout {
        name: &'static str,
        index: usize,
        path: String,
        seconds: i64,
    },
}

/// The six lists, by their names in the configuration.
pub(crate) fn lists(hooks: &Hooks) -> [(&[Hook], &'static str); 6] {
    [
        (hooks.prestart().as_deref().unwrap_or_default(), "prestart"),
        (
            hooks.create_runtime().as_deref().unwrap_or_default(),
            "createRuntime",
        ),
        (
            hooks.create_container().as_deref().unwrap_or_default(),
            "createContainer",
        ),
        (
            hooks.start_container().as_deref().unwrap_or_default(),
            "startContainer",
        ),
        (
            hooks.poststart().as_deref().unwrap_or_default(),
            "poststart",
        ),
        (hooks.poststop().as_deref().unwrap_or_default(), "poststop"),
    ]
}

/// What hooks find around them. What the specification leaves open is as with runc.
#[derive(Debug, Default)]
pub(crate) struct Surroundings<'a> {
    /// The OCI state, for standard input.
    pub(crate) state: &'a str,
    /// The working directory; this process's own if none is given.
    pub(crate) directory: Option<PathBuf>,
    /// What a hook without an environment of its own gets; this process's own if none is given.
    pub(crate) env: Option<&'a [CString]>,
}

impl<'a> Surroundings<'a> {
    pub(crate) fn of_state(state: &'a str) -> Self {
        Self {
            state,
            ..Self::default()
        }
    }
}

/// Runs hooks in their order; the first that fails ends it.
pub(crate) fn run(
    hooks: &[Hook],
    name: &'static str,
    around: &Surroundings<'_>,
) -> Result<(), HookError> {
    let mut numbered = hooks.iter().enumerate();
    numbered.try_for_each(|(index, hook)| run_one(hook, name, index, around))
}

/// Runs one hook, which errors call by its place in the list.
pub(crate) fn run_one(
    hook: &Hook,
    name: &'static str,
    index: usize,
    around: &Surroundings<'_>,
) -> Result<(), HookError> {
    let path = hook.path().display().to_string();
    let failed = |source| HookError::Run {
        name,
        index,
        path: path.clone(),
        source,
    };
    let mut child = command(hook, around).spawn().map_err(failed)?;
    let stdin = child.stdin.take();
    if let Some(seconds) = hook.timeout() {
        let ended = ended_within(&child, stdin, around.state.as_bytes(), seconds);
        if !matches!(ended, Ok(true)) {
            child.kill().map_err(failed)?;
            child.wait().map_err(failed)?;
            ended.map_err(failed)?;
            return Err(HookError::Timeout {
                name,
                index,
                path,
                seconds,
            });
        }
    } else if let Some(mut stdin) = stdin {
        // A hook need not read its state.
        let _ = stdin.write_all(around.state.as_bytes());
    }
    let status = child.wait().map_err(failed)?;
    if status.success() {
        Ok(())
    } else {
        Err(HookError::Status {
            name,
            index,
            path,
            status,
        })
    }
}

/// Writes the state to a hook, as far as it reads it, and waits for its end; false if the time is over first.
/// A descriptor of the process is needed for that, and no /proc: where hooks run, there may be none, or one
/// of another pid namespace.
fn ended_within(
    child: &Child,
    mut stdin: Option<ChildStdin>,
    mut state: &[u8],
    seconds: i64,
) -> io::Result<bool> {
    let pid = Pid::from_raw(child.id().cast_signed()).ok_or(Errno::SRCH)?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    if let Some(pipe) = &stdin {
        fcntl_setfl(pipe, OFlags::WRONLY | OFlags::NONBLOCK)?;
    }
    let start = Instant::now();
    let allowed = Duration::from_secs(seconds.unsigned_abs());
    loop {
        // A hook need not read its state.
        while let Some(pipe) = &mut stdin {
            match pipe.write(state) {
                Ok(written) if written < state.len() => state = &state[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => stdin = None,
            }
        }
        let left = allowed.saturating_sub(start.elapsed());
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
        fds.extend(stdin.iter().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) if !fds[0].revents().is_empty() => return Ok(true),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// As C libraries describe signals: those that a hook is likely to end by.
fn describe(status: ExitStatus) -> String {
    let words = match status.signal() {
        Some(libc::SIGSYS) => "bad system call",
        Some(libc::SIGKILL) => "killed",
        Some(libc::SIGTERM) => "terminated",
        Some(libc::SIGSEGV) => "segmentation fault",
        Some(libc::SIGABRT) => "aborted",
        _ => return status.to_string(),
    };
    format!("signal: {words}")
}

fn command(hook: &Hook, around: &Surroundings<'_>) -> Command {
    let mut command = Command::new(hook.path());
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args);
    let own = hook.env().as_ref();
    if own.is_some() || around.env.is_some() {
        command.env_clear();
    }
    let given = around.env.filter(|_| own.is_none()).unwrap_or_default();
    let own = own.into_iter().flatten().map(String::as_bytes);
    for entry in own.chain(given.iter().map(|entry| entry.to_bytes())) {
        let mut halves = entry.splitn(2, |byte| *byte == b'=').map(OsStr::from_bytes);
        let name = halves.next().unwrap_or_default();
        command.env(name, halves.next().unwrap_or_default());
    }
    if let Some(directory) = &around.directory {
        command.current_dir(directory);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: &str) -> Vec<Hook> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_hook_reads_the_state_and_has_only_its_environment() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let script = format!("{{ cat; echo \"$0 $A $HOME\"; }} > {}", out.display());
        let json = serde_json::json!([
            {"path": "/bin/sh", "args": ["hook", "-c", script, "name"], "env": ["A=b"]}
        ]);
        let around = Surroundings::of_state("{}\n");
        run(&hooks(&json.to_string()), "prestart", &around).unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "{}\nname b \n");
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_an_error() {
        let around = Surroundings::default();
        let run = |json: &str| {
            let result = run(&hooks(json), "poststart", &around);
            result.unwrap_err().to_string()
        };
        let message = run(r#"[{"path":"/bin/false"},{"path":"/bin/true"}]"#);
        assert!(
            message.contains("error running poststart hook #0: `/bin/false` ended with"),
            "{message}"
        );
        let message = run(r#"[{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}]"#);
        assert!(message.contains("took longer than 1 s"), "{message}");
        assert!(run(r#"[{"path":"/nowhere"}]"#).contains("cannot run"));
    }
}
