//! What a monitor stays with, and what can be done to it at any time.

use super::streams::Streams;
use crate::{cgroup::Cgroup, process::Process, verbs::delete::DeleteOptions};

/// What runs, and all that is needed to remove it.
#[derive(Debug)]
pub(super) struct Workload {
    pub(super) process: Process,
    pub(super) streams: Streams,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) delete: DeleteOptions,
}

impl Workload {
    pub(super) fn kill(&self, signal: i32) -> Result<(), String> {
        let killed = self.process.signal(signal);
        killed.map_err(|error| format!("cannot send signal {signal}: {error}"))
    }

    pub(super) fn resize(&self, rows: u16, cols: u16) -> Result<(), String> {
        match self.streams.resize(rows, cols) {
            Ok(true) => Ok(()),
            Ok(false) => Err("the process has no terminal".to_owned()),
            Err(error) => Err(format!("cannot resize the terminal: {error}")),
        }
    }
}
