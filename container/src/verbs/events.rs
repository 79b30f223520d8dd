//! `events`: what a container uses, now and then, and when it runs out of memory.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;
use serde_json::Value;

use crate::cgroup::{Cgroup, CgroupError};
use crate::process::Process;
use crate::state::{Home, StateError, Status};

/// Why there are no events.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    #[error(transparent)]
    State(#[from] StateError),
    /// The text is the one that engines look for.
    #[error("container not running: `{id}` is {status}")]
    NotRunning { id: String, status: Status },
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot wait for events")]
    Wait(#[source] io::Error),
    #[error("cannot write an event")]
    Write(#[source] io::Error),
}

/// Something to tell of a container. Its members are in runc's order: there are readers that take the
/// text for what it looks like.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

/// A container whose events are wanted.
#[derive(Debug)]
pub struct Events {
    id: String,
    process: Process,
    cgroup: Cgroup,
}

impl Events {
    /// # Errors
    /// [`EventsError::NotRunning`] if the container has no process.
    pub fn open(root: &Path, id: &str) -> Result<Self, EventsError> {
        let home = Home::open(root, id)?;
        let record = home.record()?;
        let (status, process) = home.observe(&record)?;
        let process = process.ok_or_else(|| EventsError::NotRunning {
            id: id.to_owned(),
            status,
        })?;
        Ok(Self {
            id: id.to_owned(),
            process,
            cgroup: Cgroup::open(&record.cgroup)?,
        })
    }

    /// What the container uses now, as runc's `stats` event.
    ///
    /// # Errors
    /// If the container is gone.
    pub fn stats(&self) -> Result<Event, EventsError> {
        Ok(Event {
            kind: "stats",
            id: self.id.clone(),
            data: Some(self.cgroup.usage()?),
        })
    }

    /// Hands every event to `write` until the container has ended: its usage at every interval, and
    /// `oom` when it was short of memory.
    ///
    /// # Errors
    /// Those of [`EventsError`].
    pub fn follow(
        &self,
        interval: Duration,
        mut write: impl FnMut(&Event) -> io::Result<()>,
    ) -> Result<(), EventsError> {
        let watch = self.cgroup.watch_memory()?;
        let mut next = Instant::now() + interval;
        loop {
            let mut fds = vec![PollFd::new(&self.process, PollFlags::IN)];
            fds.extend(
                watch
                    .as_ref()
                    .map(|watch| PollFd::from_borrowed_fd(watch.as_fd(), PollFlags::IN)),
            );
            let left = next.saturating_duration_since(Instant::now());
            // An interval that is too long for the kernel is for ever.
            let left = Timespec::try_from(left).ok();
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(EventsError::Wait(error.into())),
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            if let (Some(true), Some(watch)) = (ready.get(1), &watch)
                && watch.short_of_memory().map_err(EventsError::Wait)?
            {
                let shortage = Event {
                    kind: "oom",
                    id: self.id.clone(),
                    data: None,
                };
                write(&shortage).map_err(EventsError::Write)?;
            }
            if ready[0] {
                return Ok(());
            }
            if Instant::now() >= next {
                next += interval;
                write(&self.stats()?).map_err(EventsError::Write)?;
            }
        }
    }
}
