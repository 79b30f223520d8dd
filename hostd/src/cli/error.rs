//! What can go wrong for a user of the command line, how it is told and what the exit status is.

use std::io;
use std::path::PathBuf;

use console::style;
use tokio_tungstenite::tungstenite;

use crate::api::types::Problem;

/// As Docker has it: the command line or the daemon failed, not the workload.
const FAILED: u8 = 125;

#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    /// hostd refused, or failed.
    #[error("{}", .0.detail)]
    Api(Box<Problem>),

    #[error("hostd does not answer at {}", .socket.display())]
    Connect { socket: PathBuf, source: io::Error },

    #[error("the connection to hostd broke")]
    Connection(#[source] hyper::Error),

    #[error("the connection to hostd broke")]
    Socket(#[source] Box<tungstenite::Error>),

    #[error("hostd's answer is not understood")]
    Answer(#[source] serde_json::Error),

    #[error("a line of hostd's answer is too long")]
    LongLine,

    #[error("the address {path:?} cannot be asked for")]
    Address {
        path: String,
        source: hyper::http::Error,
    },

    /// The arguments contradict each other, or the place that the command runs in.
    #[error("{message}")]
    Usage { message: String, hint: &'static str },

    #[error("cannot read {}", .path.display())]
    File { path: PathBuf, source: io::Error },

    #[error("cannot write the output")]
    Output(#[source] io::Error),

    #[error("cannot {action}")]
    Terminal {
        action: &'static str,
        source: io::Error,
    },

    /// A process could not be run in the instance; `code` is 125, 126 or 127.
    #[error("{message}")]
    Command { code: u8, message: String },

    /// `again` is the verb that joins it once more.
    #[error("the connection to hostd was lost; `{name}` goes on without it")]
    Lost { name: String, again: &'static str },

    #[error("`{name}` ended and left no exit status")]
    NoExit { name: String },

    /// Some of several; each has been told of already.
    #[error("{failed} of {all} failed")]
    Several { failed: usize, all: usize },
}

impl CliError {
    pub(super) fn exit_code(&self) -> u8 {
        if let CliError::Command { code, .. } = self {
            *code
        } else if self.has_code("no_such_program") {
            127 // As a shell says it.
        } else if self.has_code("not_executable") {
            126
        } else {
            FAILED
        }
    }

    /// Whether the reader of our output has gone, as `head` does: no reason to complain.
    pub(super) fn is_broken_pipe(&self) -> bool {
        matches!(self, CliError::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Whether hostd refused what was asked for, as opposed to having failed at it.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, CliError::Api(problem) if (400..500).contains(&problem.status))
    }

    /// Whether hostd's answer has this code.
    pub(super) fn has_code(&self, code: &str) -> bool {
        matches!(self, CliError::Api(problem) if problem.code == code)
    }

    fn hint(&self) -> Option<String> {
        #[expect(clippy::wildcard_enum_match_arm, reason = "most errors need no hint")]
        match self {
            CliError::Api(problem) => problem.hint.clone(),
            CliError::Connect { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Some("Be root, or a member of the group `hostd`.".into())
            }
            CliError::Connect { .. } => {
                Some("Start hostd, or say where it listens with --socket or HOSTD_SOCKET.".into())
            }
            CliError::Usage { hint, .. } => Some((*hint).into()),
            CliError::Lost { name, again } => {
                Some(format!("Join it again with `hostctl {again} {name}`."))
            }
            _ => None,
        }
    }

    /// What a person is told, in colour where standard error is a terminal.
    pub(super) fn text(&self) -> String {
        let mut text = format!("{} {self}", style("error:").red().bold().for_stderr());
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            text.push_str(&format!(": {error}"));
            source = error.source();
        }
        if let CliError::Api(problem) = self
            && let Some(field) = &problem.field
            && !problem.detail.contains(field.as_str())
        {
            let place = option_for(field).unwrap_or(field);
            text.push_str(&format!(" (at {place})"));
        }
        if let Some(hint) = self.hint() {
            text.push_str(&format!(
                "\n{} {hint}",
                style("hint:").cyan().bold().for_stderr()
            ));
        }
        text
    }
}

/// The argument that sets this field of a request, or some part of it.
fn option_for(field: &str) -> Option<&'static str> {
    const OPTIONS: [(&str, &str); 25] = [
        ("/name", "--name"),
        ("/image", "IMAGE"),
        ("/command", "COMMAND"),
        ("/entrypoint", "--entrypoint"),
        ("/env", "--env"),
        ("/user", "--user"),
        ("/working_dir", "--workdir"),
        ("/hostname", "--hostname"),
        ("/labels", "--label"),
        ("/stop_timeout_s", "--stop-timeout"),
        ("/auto_remove", "--rm"),
        ("/network/ports", "--publish"),
        ("/mounts", "--volume"),
        ("/limits/cpu/cores", "--cpus"),
        ("/limits/cpu/weight", "--cpu-weight"),
        ("/limits/cpu/set", "--cpu-set"),
        ("/limits/memory/max", "--memory"),
        ("/limits/pids/max", "--pids"),
        ("/limits/disk/size", "--disk-size"),
        ("/limits/disk/read_bps", "--disk-read-bps"),
        ("/limits/disk/write_bps", "--disk-write-bps"),
        ("/limits/disk/read_iops", "--disk-read-iops"),
        ("/limits/disk/write_iops", "--disk-write-iops"),
        ("/limits/network/ingress_bps", "--net-ingress"),
        ("/limits/network/egress_bps", "--net-egress"),
    ];
    let is_part = |of: &str| {
        field
            .strip_prefix(of)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let found = OPTIONS.iter().find(|(pointer, _)| is_part(pointer));
    found.map(|(_, option)| *option)
}

impl From<Problem> for CliError {
    fn from(problem: Problem) -> Self {
        CliError::Api(Box::new(problem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(detail: &str, field: Option<&str>, hint: Option<&str>) -> CliError {
        CliError::from(Problem {
            code: "invalid_field".into(),
            status: 400,
            detail: detail.into(),
            field: field.map(Into::into),
            hint: hint.map(Into::into),
            retryable: false,
            request_id: "1".into(),
        })
    }

    #[test]
    fn an_error_tells_the_field_and_the_remedy() {
        let pointer = Some("/limits/cpu/cores");
        let table = [
            (problem("no", None, None), "error: no"),
            (
                problem("too many", pointer, None),
                "error: too many (at --cpus)",
            ),
            (
                problem("no", Some("/mounts/0/target"), None),
                "error: no (at --volume)",
            ),
            (problem("no", Some("/names"), None), "error: no (at /names)"),
            (
                problem("/limits/cpu/cores: no", pointer, None),
                "error: /limits/cpu/cores: no",
            ),
            (
                problem("no", None, Some("Ask less.")),
                "error: no\nhint: Ask less.",
            ),
        ];
        for (error, expected) in table {
            let text = console::strip_ansi_codes(&error.text()).into_owned();
            assert_eq!(text, expected);
            assert_eq!(error.exit_code(), 125);
        }
    }
}
