//! Snapshots of the instance that the task owns, and its own beginning as a clone of one.
//!
//! The files are first, the database second: what the database knows is whole, and files that it does
//! not know are removed by the next hostd.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::json;
use tokio::time::Instant;

use super::{After, Task, answer};
use crate::api::types::{Instance, InstanceState, RestoreRequest, Snapshot, SnapshotRequest};
use crate::driver::{self, Control, SnapshotName};
use crate::instance::InstanceError;
use crate::instance::handle::Reply;
use crate::lifecycle::{self, Request};
use crate::store;
use crate::validate::{self, FieldError};

/// Snapshots of one instance: each may be as large as what the instance has written, and its memory.
pub const SNAPSHOTS_MAX: usize = 64;

/// A restore whose files are staged.
pub(super) struct Restoring {
    snapshot: Snapshot,
    memory: bool,
    /// Whether the instance is to run afterwards.
    start: bool,
    reply: Reply<Instance>,
}

impl Restoring {
    pub(super) fn call_off(self) {
        answer(self.reply, Err(InstanceError::CalledOff));
    }
}

impl Task {
    pub(super) async fn snapshot(
        &mut self,
        request: SnapshotRequest,
    ) -> Result<Snapshot, InstanceError> {
        self.check_asked(Request::Snapshot)?;
        let name = self.snapshot_name(request.name)?;
        if request.stateful {
            self.check_memory()?;
        }
        let runs = self.state() == InstanceState::Running;
        if runs {
            self.record.held = true;
            self.save(None).await?;
        }
        let driver = Arc::clone(&self.kind.driver);
        let taken = driver.capture(&self.record, &name, request.stateful).await;
        self.record.held = false;
        let size_bytes = match taken {
            Ok(size_bytes) => size_bytes,
            Err(error) => {
                // It runs on; should it not, it is told so once more.
                if runs {
                    self.act(Control::Resume).await;
                    self.save_or_log(None).await;
                }
                return Err(Arc::new(error).into());
            }
        };
        let snapshot = Snapshot {
            instance: self.name().to_owned(),
            name: name.clone(),
            created_at: Timestamp::now(),
            stateful: request.stateful,
            size_bytes,
            image_digest: self.record.instance.image_digest.clone(),
            spec: self.record.instance.spec.clone(),
        };
        if let Err(error) = self.add(&snapshot).await {
            if let Err(error) = driver.discard(&self.record, &name).await {
                self.warn(&error, "a snapshot that was not stored is left behind");
            }
            return Err(error);
        }
        Ok(snapshot)
    }

    async fn add(&mut self, snapshot: &Snapshot) -> Result<(), InstanceError> {
        self.record.instance.generation += 1;
        let (record, added) = (self.record.clone(), snapshot.clone());
        let sequence = self
            .shared
            .store
            .run(move |connection| store::add_snapshot(connection, &record, &added))
            .await?;
        self.record.instance.snapshots.push(snapshot.name.clone());
        self.publish();
        self.shared.events.announce(sequence);
        Ok(())
    }

    pub(super) async fn on_restore(
        &mut self,
        snapshot: &str,
        request: RestoreRequest,
        reply: Reply<Instance>,
    ) {
        let (snapshot, memory) = match self.prepare_restore(snapshot, request).await {
            Ok(prepared) => prepared,
            Err(error) => return answer(reply, Err(error)),
        };
        let live = lifecycle::is_live(self.state());
        let restoring = Restoring {
            snapshot,
            memory,
            start: live || memory,
            reply,
        };
        if live {
            self.after = After::Restore;
            self.restoring = Some(restoring);
            self.kill().await;
        } else {
            self.restore(restoring).await;
        }
    }

    /// Copies what the snapshot holds, while the instance is what it is.
    async fn prepare_restore(
        &mut self,
        name: &str,
        request: RestoreRequest,
    ) -> Result<(Snapshot, bool), InstanceError> {
        self.check_asked(Request::Restore)?;
        let source = SnapshotName {
            instance: self.name().to_owned(),
            snapshot: name.to_owned(),
        };
        let shared = Arc::clone(&self.shared);
        let snapshot = shared.snapshot(&source.instance, name).await?;
        if request.stateful == Some(true) && !snapshot.stateful {
            return Err(FieldError::new("/stateful", "the snapshot holds no memory")
                .hint("leave `stateful` out: the instance is started from the snapshot's files")
                .into());
        }
        let memory = request.stateful.unwrap_or(snapshot.stateful);
        let staged = self.kind.driver.stage(&self.record, &source, memory).await;
        staged.map_err(Arc::new)?;
        Ok((snapshot, memory))
    }

    /// Puts the staged files in place. Nothing of the instance runs.
    pub(super) async fn restore(&mut self, restoring: Restoring) {
        self.after = After::Stay;
        // Whatever comes of it, what ran runs again.
        self.restart_due = restoring.start.then(Instant::now);
        if let Err(error) = self.kind.driver.install(&self.record).await {
            return answer(restoring.reply, Err(Arc::new(error).into()));
        }
        let instance = &mut self.record.instance;
        instance.spec = restoring.snapshot.spec;
        self.record.goes_on = restoring.memory;
        let data = json!({"snapshot": restoring.snapshot.name, "stateful": restoring.memory});
        match self.save(Some(("instance.restored", data))).await {
            Err(error) => answer(restoring.reply, Err(error)),
            Ok(()) if restoring.start => self.starters.push(restoring.reply),
            Ok(()) => answer(restoring.reply, Ok(self.instance())),
        }
    }

    pub(super) async fn remove_snapshot(&mut self, name: &str) -> Result<(), InstanceError> {
        let (instance, snapshot) = (self.name().to_owned(), name.to_owned());
        let removed = self
            .shared
            .store
            .run(move |connection| store::remove_snapshot(connection, &instance, &snapshot))
            .await?;
        let sequence = removed.ok_or_else(|| InstanceError::NoSnapshot {
            instance: self.name().to_owned(),
            snapshot: name.to_owned(),
        })?;
        self.record.instance.snapshots.retain(|kept| kept != name);
        self.publish();
        self.shared.events.announce(sequence);
        // From here on it is litter, which the next hostd removes if this one cannot.
        if let Err(error) = self.kind.driver.discard(&self.record, name).await {
            self.warn(&error, "something of a removed snapshot is left behind");
        }
        Ok(())
    }

    /// Gives a clone its files. Without them it is removed again, now or by the next hostd.
    pub(super) async fn fill(
        &mut self,
        source: &SnapshotName,
        memory: bool,
        reply: Reply<Instance>,
    ) {
        let driver = Arc::clone(&self.kind.driver);
        let filled = match driver.stage(&self.record, source, memory).await {
            Ok(()) => driver.install(&self.record).await,
            Err(error) => Err(error),
        };
        let result = match filled {
            Ok(()) => {
                self.record.removing = false;
                self.record.goes_on = memory;
                self.save(None).await.map(|()| self.instance())
            }
            Err(error) => Err(Arc::new(error).into()),
        };
        if result.is_err() {
            self.remove().await;
        }
        answer(reply, result);
    }

    /// Removes what an earlier hostd has left of snapshots that it did not finish.
    pub(super) async fn tidy(&mut self) {
        if self.removed {
            return;
        }
        let known = self.record.instance.snapshots.clone();
        if let Err(error) = self.kind.driver.tidy(&self.record, &known).await {
            self.warn(&error, "something of an unfinished snapshot is left behind");
        }
    }

    fn check_asked(&self, request: Request) -> Result<(), InstanceError> {
        if self.recover_due.is_some() {
            return Err(InstanceError::Unreachable);
        }
        lifecycle::request(self.state(), request)?;
        Ok(())
    }

    /// Checks that the instance has memory that can be kept.
    fn check_memory(&self) -> Result<(), InstanceError> {
        if !self.kind.rules.memory_snapshots {
            let why = "the memory of this kind of isolation cannot be kept";
            let hint = "leave `stateful` out: the snapshot then holds what was written to files";
            return Err(FieldError::new("/stateful", why).hint(hint).into());
        }
        let state = self.state();
        if matches!(state, InstanceState::Running | InstanceState::Paused) {
            Ok(())
        } else {
            Err(InstanceError::NotRunning(state))
        }
    }

    /// The name that was asked for, or one that is free.
    fn snapshot_name(&self, asked: Option<String>) -> Result<String, InstanceError> {
        let taken = &self.record.instance.snapshots;
        if taken.len() >= SNAPSHOTS_MAX {
            return Err(InstanceError::SnapshotsFull);
        }
        let Some(name) = asked else {
            let mut free = (taken.len()..).map(|number| format!("snap{number}"));
            return Ok(free
                .find(|name| !taken.contains(name))
                .expect("there are more numbers than snapshots"));
        };
        validate::check_name("/name", &name)?;
        if taken.contains(&name) {
            return Err(InstanceError::SnapshotTaken(name));
        }
        Ok(name)
    }

    fn warn(&self, error: &driver::DriverError, what: &'static str) {
        tracing::warn!(name = self.name(), error = driver::chain(error), "{what}");
    }
}
