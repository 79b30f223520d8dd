//! The way to one instance: letters to its task, and what the task publishes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agent::protocol::Frame;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time;

use super::InstanceError;
use crate::api::types::{
    Instance, InstancePatch, InstanceState, PatchResult, RestoreRequest, Snapshot, SnapshotRequest,
};
use crate::driver::Session;
use crate::lifecycle::{self, Request};
use crate::store::Record;

/// Removing mounts, interfaces and cgroups takes no longer on a healthy host.
const SETTLE_DEADLINE: Duration = Duration::from_secs(15);

/// The way to one instance.
#[derive(Clone, Debug)]
pub struct Handle {
    pub(super) mailbox: mpsc::Sender<Letter>,
    pub(super) published: watch::Receiver<Arc<Record>>,
    pub(super) audience: Audience,
}

/// How many clients wait for an instance to run, to attach to it.
#[derive(Clone, Debug, Default)]
pub(super) struct Audience(Arc<AtomicUsize>);

/// One of an audience, as long as it is held.
#[derive(Debug)]
pub(super) struct Seat(Audience);

impl Audience {
    pub(super) fn is_there(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    pub(super) fn join(&self) -> Seat {
        self.0.fetch_add(1, Ordering::Relaxed);
        Seat(self.clone())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) type Reply<T> = oneshot::Sender<Result<T, InstanceError>>;

#[derive(Debug)]
pub(super) enum Letter {
    Request {
        request: Request,
        /// For stop and restart: how long to wait before the kill.
        patience: Option<Duration>,
        reply: Reply<Instance>,
    },
    Patch {
        patch: InstancePatch,
        generation: Option<u64>,
        dry_run: bool,
        reply: Reply<PatchResult>,
    },
    Remove {
        force: bool,
        reply: Reply<()>,
    },
    Snapshot {
        request: SnapshotRequest,
        reply: Reply<Snapshot>,
    },
    Restore {
        snapshot: String,
        request: RestoreRequest,
        reply: Reply<Instance>,
    },
    RemoveSnapshot {
        snapshot: String,
        reply: Reply<()>,
    },
}

impl Handle {
    /// The instance as it is now.
    pub fn instance(&self) -> Instance {
        self.published.borrow().instance.clone()
    }

    /// The record as it is now.
    pub fn record(&self) -> Arc<Record> {
        Arc::clone(&self.published.borrow())
    }

    /// Asks for a change of state; answered once it has come about.
    ///
    /// # Errors
    /// It is refused, or fails.
    pub async fn request(
        &self,
        request: Request,
        patience: Option<Duration>,
    ) -> Result<Instance, InstanceError> {
        self.send(|reply| Letter::Request {
            request,
            patience,
            reply,
        })
        .await
    }

    /// Changes limits and labels, all or nothing.
    ///
    /// # Errors
    /// The patch is at fault, or the change cannot be made.
    pub async fn patch(
        &self,
        patch: InstancePatch,
        generation: Option<u64>,
        dry_run: bool,
    ) -> Result<PatchResult, InstanceError> {
        self.send(|reply| Letter::Patch {
            patch,
            generation,
            dry_run,
            reply,
        })
        .await
    }

    /// Removes the instance and all it has; with `force` also if it runs.
    ///
    /// # Errors
    /// It runs, or removing it fails.
    pub async fn remove(&self, force: bool) -> Result<(), InstanceError> {
        match self.send(|reply| Letter::Remove { force, reply }).await {
            Err(InstanceError::NotFound(_)) => Ok(()),
            other => other,
        }
    }

    /// Keeps what the instance is now as a snapshot.
    ///
    /// # Errors
    /// It is refused, or fails; the instance is as it was then.
    pub async fn snapshot(&self, request: SnapshotRequest) -> Result<Snapshot, InstanceError> {
        self.send(|reply| Letter::Snapshot { request, reply }).await
    }

    /// Makes the instance what it was; one that runs is ended for that, and runs again afterwards.
    ///
    /// # Errors
    /// There is no such snapshot, it is refused, or fails.
    pub async fn restore(
        &self,
        snapshot: String,
        request: RestoreRequest,
    ) -> Result<Instance, InstanceError> {
        self.send(|reply| Letter::Restore {
            snapshot,
            request,
            reply,
        })
        .await
    }

    /// Removes a snapshot.
    ///
    /// # Errors
    /// There is no such snapshot.
    pub async fn remove_snapshot(&self, snapshot: String) -> Result<(), InstanceError> {
        self.send(|reply| Letter::RemoveSnapshot { snapshot, reply })
            .await
    }

    /// Waits until the instance is in one of `states`.
    ///
    /// # Errors
    /// It is removed before.
    pub async fn wait(&self, states: &[InstanceState]) -> Result<Instance, InstanceError> {
        let mut published = self.published.clone();
        match published
            .wait_for(|record| states.contains(&record.instance.state))
            .await
        {
            Ok(record) => Ok(record.instance.clone()),
            Err(_) => Err(self.gone()),
        }
    }

    /// The session, whose end is told only when the instance is at rest, or removed if it is to
    /// be: who hears of the end finds it everywhere else.
    pub(super) fn settled(self, session: Session) -> Session {
        let Session { input, mut output } = session;
        let (sender, settled) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let frame = tokio::select! {
                    frame = output.recv() => frame,
                    () = sender.closed() => return,
                };
                let Some(frame) = frame else { return };
                if matches!(frame, Frame::Exit { .. } | Frame::Error { .. }) {
                    // It is told all the same if the tidying up takes too long.
                    let _ = time::timeout(SETTLE_DEADLINE, self.rest()).await;
                }
                if sender.send(frame).await.is_err() {
                    return;
                }
            }
        });
        Session {
            input,
            output: settled,
        }
    }

    async fn rest(&self) {
        let mut published = self.published.clone();
        let rested = published
            .wait_for(|record| !lifecycle::is_live(record.instance.state))
            .await
            .map(|record| record.instance.spec.auto_remove);
        if rested.unwrap_or(false) {
            self.closed().await;
        }
    }

    /// Done once the task that owns the instance has ended: it is removed, or hostd goes.
    pub async fn closed(&self) {
        self.mailbox.closed().await;
    }

    async fn send<T>(&self, letter: impl FnOnce(Reply<T>) -> Letter) -> Result<T, InstanceError> {
        let (reply, answer) = oneshot::channel();
        self.mailbox
            .try_send(letter(reply))
            .map_err(|error| match error {
                mpsc::error::TrySendError::Full(_) => InstanceError::Busy,
                mpsc::error::TrySendError::Closed(_) => self.gone(),
            })?;
        answer.await.unwrap_or_else(|_| Err(self.gone()))
    }

    pub(super) fn gone(&self) -> InstanceError {
        InstanceError::NotFound(self.published.borrow().instance.name.clone())
    }
}
