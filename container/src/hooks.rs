//! Runs the hooks of the specification: programs that get the container's state on standard input.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use oci_spec::runtime::{Hook, Hooks};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::process::Process;

/// Why a hook stops what it belongs to.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("cannot run the {name} hook `{path}`")]
    Run {
        name: &'static str,
        path: String,
        source: io::Error,
    },
    #[error("the {name} hook `{path}` ended with {status}")]
    Status {
        name: &'static str,
        path: String,
        status: std::process::ExitStatus,
    },
    #[error("the {name} hook `{path}` took longer than {seconds} s")]
    Timeout {
        name: &'static str,
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

/// Runs hooks in their order; the first that fails ends it.
pub(crate) fn run(hooks: &[Hook], name: &'static str, state: &str) -> Result<(), HookError> {
    hooks.iter().try_for_each(|hook| run_one(hook, name, state))
}

fn run_one(hook: &Hook, name: &'static str, state: &str) -> Result<(), HookError> {
    let path = hook.path().display().to_string();
    let failed = |source| HookError::Run {
        name,
        path: path.clone(),
        source,
    };
    let mut child = command(hook).spawn().map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read its state.
        let _ = stdin.write_all(state.as_bytes());
    }
    if let Some(seconds) = hook.timeout() {
        let pid = child.id().cast_signed();
        let ended = || -> io::Result<bool> {
            let raw = Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH)?;
            let pidfd = pidfd_open(raw, PidfdFlags::empty())?;
            let milliseconds = u32::try_from(seconds.saturating_mul(1000)).unwrap_or(u32::MAX);
            Process::from_child(pid, pidfd)?.ended_within(milliseconds)
        };
        // It is our child and not reaped: an error can only mean that it has ended.
        if !ended().unwrap_or(true) {
            child.kill().map_err(failed)?;
            child.wait().map_err(failed)?;
            return Err(HookError::Timeout {
                name,
                path,
                seconds,
            });
        }
    }
    let status = child.wait().map_err(failed)?;
    if status.success() {
        Ok(())
    } else {
        Err(HookError::Status { name, path, status })
    }
}

fn command(hook: &Hook) -> Command {
    let mut command = Command::new(hook.path());
    let mut args = hook.args().iter().flatten();
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env_clear();
    for entry in hook.env().iter().flatten() {
        let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
        command.env(key, value);
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
        run(&hooks(&json.to_string()), "prestart", "{}\n").unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "{}\nname b \n");
    }

    #[test]
    fn a_hook_that_fails_or_hangs_is_an_error() {
        let run = |json: &str| run(&hooks(json), "poststart", "").unwrap_err().to_string();
        let message = run(r#"[{"path":"/bin/false"},{"path":"/bin/true"}]"#);
        assert!(
            message.contains("the poststart hook `/bin/false` ended with"),
            "{message}"
        );
        let message = run(r#"[{"path":"/bin/sleep","args":["sleep","60"],"timeout":1}]"#);
        assert!(message.contains("took longer than 1 s"), "{message}");
        assert!(run(r#"[{"path":"/nowhere"}]"#).contains("cannot run"));
    }
}
