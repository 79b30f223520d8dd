//! What the end of a machine means for its workload.
//!
//! The monitor sees how the VMM ended. What the guest said of its workload, and that it was reset
//! without a word, only the VMM has seen, and it wrote that down as its last act.

use std::fs;
use std::path::{Path, PathBuf};

use agent::protocol::Frame;
use futures::FutureExt;
use vmm::control::{ExitReason, ExitStatus};

use super::machine;
use crate::api::types::Exit;
use crate::driver::{DriverError, Ended, Running, chain};

/// Of the console, what an error message quotes.
const CONSOLE_QUOTED_BYTES: usize = 400;

/// The end of `running` as that of its workload, once it comes.
pub(super) fn with_exit_status(running: Running, run: PathBuf) -> Running {
    let ended = running.ended.map(move |ended| of_workload(ended, &run));
    Running {
        ended: ended.boxed(),
        ..running
    }
}

/// The end of a VMM as that of its workload.
pub(super) fn of_workload(ended: Ended, run: &Path) -> Ended {
    let (Ended::Exited { exit, at, .. }, Some(status)) = (&ended, exit_status(run)) else {
        return ended;
    };
    let error = crash(&status);
    let code = match error {
        Some(_) => Some(ExitStatus::FAILURE_CODE.into()),
        None => exit.code,
    };
    let oom = exit.oom || status.oom;
    Ended::Exited {
        exit: Exit { code, oom, ..*exit },
        at: *at,
        error,
    }
}

/// The last frame of a workload's streams, of which the monitor knows the VMM's end.
pub(super) fn of_stream(mut frame: Frame, run: &Path) -> Frame {
    let Frame::Exit { oom, .. } = &mut frame else {
        return frame;
    };
    let Some(status) = exit_status(run) else {
        return frame;
    };
    *oom |= status.oom;
    match crash(&status) {
        Some(message) => Frame::Error {
            code: ExitStatus::FAILURE_CODE.into(),
            message,
        },
        None => frame,
    }
}

/// Why a machine ended without its workload's doing, if it did. A guest that switches itself off ends
/// as machines do; one that is reset has crashed, since the agent never asks for that.
fn crash(status: &ExitStatus) -> Option<String> {
    match (status.code, status.reason, &status.error) {
        (Some(_), ..) => None,
        (None, _, Some(error)) => Some(format!("the machine {error}")),
        (None, ExitReason::Reset, None) => {
            Some("the machine was reset by its guest before the workload ended".to_owned())
        }
        (None, ..) => None,
    }
}

/// Why a guest did not come up: what its VMM says, or else what can be told of its end and its console.
pub(super) fn explain(run: &Path, error: &DriverError, ended: Option<&Ended>) -> DriverError {
    let status = exit_status(run);
    let code = status.as_ref().and_then(|status| status.code);
    let console = fs::read(machine::console_file(run)).unwrap_or_default();
    let quoted = &console[console.len().saturating_sub(CONSOLE_QUOTED_BYTES)..];
    let quoted = String::from_utf8_lossy(quoted);
    let quoted = quoted.trim();
    let crash = status.as_ref().and_then(crash);
    let message = match crash.unwrap_or_else(|| told(error, status.as_ref(), ended)) {
        // A word before the workload runs is about why it does not.
        _ if code.is_some() && !quoted.is_empty() => quoted.to_owned(),
        message if quoted.is_empty() => message,
        message => format!("{message}; its console ends: {quoted}"),
    };
    DriverError::of_workload(code, message)
}

/// What is known without a word of the VMM about what went wrong.
fn told(error: &DriverError, status: Option<&ExitStatus>, ended: Option<&Ended>) -> String {
    let how = match (status, ended) {
        (Some(status), _) => match status.reason {
            ExitReason::PowerOff => "the guest switched itself off",
            ExitReason::Killed => "the machine was told to end",
            ExitReason::Reset | ExitReason::GuestExit | ExitReason::Error => "the machine ended",
        }
        .to_owned(),
        (None, Some(Ended::Exited { exit, .. })) => match (exit.signal, exit.code) {
            _ if exit.oom => "the VMM was killed for want of memory".to_owned(),
            (Some(signal), _) => format!("the VMM was killed by signal {signal}"),
            (None, code) => format!(
                "the VMM ended with {} and left no word",
                code.unwrap_or_default()
            ),
        },
        (None, Some(Ended::Lost)) => "the VMM and its monitor are gone".to_owned(),
        (None, None) => return chain(error),
    };
    format!("{how} before its workload ran")
}

fn exit_status(run: &Path) -> Option<ExitStatus> {
    serde_json::from_slice(&fs::read(machine::exit_file(run)).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use tempfile::TempDir;

    use super::*;

    /// A run directory with what the VMM wrote down.
    fn run_of(status: Option<&ExitStatus>) -> TempDir {
        let dir = TempDir::new().unwrap();
        if let Some(status) = status {
            let text = serde_json::to_vec(status).unwrap();
            fs::write(machine::exit_file(dir.path()), text).unwrap();
        }
        dir
    }

    fn exited(code: Option<i32>, signal: Option<i32>) -> Ended {
        Ended::Exited {
            exit: Exit {
                code,
                signal,
                oom: false,
            },
            at: Timestamp::UNIX_EPOCH,
            error: None,
        }
    }

    #[test]
    fn only_an_end_without_the_workloads_doing_is_an_error() {
        let reset = ExitStatus::new(ExitReason::Reset);
        let fault = ExitStatus {
            error: Some("was reset: a triple fault".to_owned()),
            ..reset.clone()
        };
        let reported = ExitStatus {
            code: Some(7),
            oom: true,
            ..ExitStatus::new(ExitReason::GuestExit)
        };
        let off = ExitStatus::new(ExitReason::PowerOff);
        let table = [
            (Some(&reset), 0, 125, Some("reset by its guest"), false),
            (Some(&fault), 0, 125, Some("a triple fault"), false),
            (Some(&reported), 7, 7, None, true),
            (Some(&off), 0, 0, None, false),
            (None, 3, 3, None, false),
        ];
        for (status, code, want, words, starved) in table {
            let run = run_of(status);
            let ended = of_workload(exited(Some(code), None), run.path());
            let Ended::Exited { exit, error, .. } = ended else {
                panic!("{status:?} is lost");
            };
            assert_eq!((exit.code, exit.oom), (Some(want), starved), "{status:?}");
            assert_eq!(error.is_some(), words.is_some(), "{status:?}");
            let text = error.unwrap_or_default();
            assert!(text.contains(words.unwrap_or_default()), "{text}");

            let frame = Frame::Exit {
                code: Some(code),
                signal: None,
                oom: false,
            };
            let last = match words {
                Some(_) => Frame::Error {
                    code: 125,
                    message: text,
                },
                None => Frame::Exit {
                    code: Some(want),
                    signal: None,
                    oom: starved,
                },
            };
            assert_eq!(of_stream(frame, run.path()), last, "{status:?}");
        }
    }

    #[test]
    fn a_guest_that_does_not_come_up_is_explained_by_what_is_known() {
        let lost = DriverError::NotRunning;
        let told_off = ExitStatus::new(ExitReason::PowerOff);
        let table = [
            (Some(&told_off), None, "the guest switched itself off"),
            (None, Some(exited(None, Some(9))), "killed by signal 9"),
            (None, Some(exited(Some(1), None)), "ended with 1"),
            (None, Some(Ended::Lost), "and its monitor are gone"),
            (None, None, "nothing of that name runs"),
        ];
        for (status, ended, words) in table {
            let run = run_of(status);
            fs::write(machine::console_file(run.path()), "Oops\n").unwrap();
            let error = explain(run.path(), &lost, ended.as_ref()).to_string();
            assert!(error.contains(words), "{error}");
            assert!(error.ends_with("its console ends: Oops"), "{error}");
        }
    }
}
