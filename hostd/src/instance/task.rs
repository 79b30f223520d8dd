//! The task that owns one instance: it takes letters, carries out what is granted, sees what
//! happens, and publishes the result.
//!
//! Every change is: the intent stored, the act, the outcome stored with its event. A crash of hostd
//! between any two is repaired by `recover`. What is decided is in [`lifecycle`]; how the driver's
//! steps are strung together is in `steps`.

mod snapshots;
mod steps;

use std::future;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio::time::{self, Instant};

pub use self::snapshots::SNAPSHOTS_MAX;

use self::snapshots::Restoring;
use super::handle::{Audience, Letter, Reply};
use super::{InstanceError, Shared, patch};
use crate::api::types::{
    Instance, InstancePatch, InstanceState, PatchResult, RestartPolicy, StateReason,
};
use crate::driver::{Control, DriverError, Ended, Kind, SnapshotName};
use crate::lifecycle::{self, Grant, Request};
use crate::store::Record;

/// Between the polite signal and the kill, unless the spec or the request says otherwise.
const STOP_TIMEOUT_DEFAULT_S: u32 = 10;
/// After a kill the end must be seen within this, or the traces are removed by force.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// The pause before a restart by policy, doubled with each run shorter than `RESTART_SOUND_RUN`.
const RESTART_DELAY_MIN: Duration = Duration::from_millis(100);
const RESTART_DELAY_MAX: Duration = Duration::from_secs(60);
const RESTART_SOUND_RUN: Duration = Duration::from_secs(10);

/// What is to follow once the instance has stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum After {
    Stay,
    Start,
    Remove,
    Restore,
}

/// How the task of an instance begins.
pub(super) enum Beginning {
    /// Nothing of the instance can be there yet.
    New,
    /// The instance is a clone, and gets its files first.
    Clone {
        source: SnapshotName,
        memory: bool,
        reply: Reply<Instance>,
    },
    /// An earlier hostd may have left something; the sender is dropped once it is known what.
    Found(mpsc::Sender<()>),
}

/// What of a running instance is waited for.
struct Live {
    ready: Option<BoxFuture<'static, Result<(), DriverError>>>,
    ended: BoxFuture<'static, Ended>,
    since: Instant,
}

pub(super) struct Task {
    shared: Arc<Shared>,
    kind: Kind,
    record: Record,
    letters: mpsc::Receiver<Letter>,
    audience: Audience,
    published: watch::Sender<Arc<Record>>,
    live: Option<Live>,
    after: After,
    /// When the next harder means of stopping is due.
    stop_due: Option<Instant>,
    killed: bool,
    /// When the policy starts it again.
    restart_due: Option<Instant>,
    short_runs: u32,
    /// An earlier hostd's instance could not be asked; it is asked again then, and nothing else is
    /// done meanwhile.
    recover_due: Option<Instant>,
    /// Who waits for the start that is under way, or for the one after the stop.
    starters: Vec<Reply<Instance>>,
    stoppers: Vec<Reply<Instance>>,
    removers: Vec<Reply<()>>,
    /// What is to follow the stop, with `After::Restore`.
    restoring: Option<Restoring>,
    removed: bool,
}

/// What woke the task.
enum Wake {
    Letter(Option<Letter>),
    Ready(Result<(), DriverError>),
    Ended(Ended),
    StopDue,
    RestartDue,
    RecoverDue,
}

impl Task {
    pub(super) fn new(
        shared: Arc<Shared>,
        record: Record,
        letters: mpsc::Receiver<Letter>,
        audience: Audience,
    ) -> (Self, watch::Receiver<Arc<Record>>) {
        let (published, watcher) = watch::channel(Arc::new(record.clone()));
        let kind = shared.kinds.of(record.instance.spec.isolation).clone();
        let task = Self {
            shared,
            kind,
            record,
            letters,
            audience,
            published,
            live: None,
            after: After::Stay,
            stop_due: None,
            killed: false,
            restart_due: None,
            short_runs: 0,
            recover_due: None,
            starters: Vec::new(),
            stoppers: Vec::new(),
            removers: Vec::new(),
            restoring: None,
            removed: false,
        };
        (task, watcher)
    }

    /// Owns the instance until it is removed or hostd goes.
    pub(super) async fn run(mut self, beginning: Beginning) {
        match beginning {
            Beginning::New => {}
            Beginning::Clone {
                source,
                memory,
                reply,
            } => self.fill(&source, memory, reply).await,
            Beginning::Found(found) => {
                self.recover().await;
                drop(found);
                self.tidy().await;
            }
        }
        while !self.removed {
            match self.wake().await {
                Wake::Letter(None) => return,
                Wake::Letter(Some(letter)) => self.read(letter).await,
                Wake::Ready(result) => self.on_ready(result).await,
                Wake::Ended(ended) => self.on_ended(ended).await,
                Wake::StopDue => self.stop_harder().await,
                Wake::RestartDue => {
                    self.restart_due = None;
                    self.start().await;
                }
                Wake::RecoverDue => self.recover().await,
            }
        }
        self.shared.forget(&self.record.instance.name);
    }

    async fn wake(&mut self) -> Wake {
        let (ready, ended) = match &mut self.live {
            Some(live) => (live.ready.as_mut(), Some(&mut live.ended)),
            None => (None, None),
        };
        let settled = ready.is_none();
        tokio::select! {
            // Whether a workload was ready is settled before its end counts: what never was ready has
            // failed to start, and the driver says why.
            biased;
            result = or_never(ready) => Wake::Ready(result),
            ended = or_never(ended), if settled => Wake::Ended(ended),
            letter = self.letters.recv() => Wake::Letter(letter),
            () = at(self.stop_due) => Wake::StopDue,
            () = at(self.restart_due) => Wake::RestartDue,
            () = at(self.recover_due) => Wake::RecoverDue,
        }
    }

    async fn read(&mut self, letter: Letter) {
        match letter {
            Letter::Request {
                request,
                patience,
                reply,
            } => self.on_request(request, patience, reply).await,
            Letter::Patch {
                patch,
                generation,
                dry_run,
                reply,
            } => {
                let result = self.on_patch(&patch, generation, dry_run).await;
                answer(reply, result);
            }
            Letter::Remove { force, reply } => self.on_remove(force, reply).await,
            Letter::Snapshot { request, reply } => {
                let result = self.snapshot(request).await;
                answer(reply, result);
            }
            Letter::Restore {
                snapshot,
                request,
                reply,
            } => self.on_restore(&snapshot, request, reply).await,
            Letter::RemoveSnapshot { snapshot, reply } => {
                let result = self.remove_snapshot(&snapshot).await;
                answer(reply, result);
            }
        }
    }

    async fn on_request(
        &mut self,
        request: Request,
        patience: Option<Duration>,
        reply: Reply<Instance>,
    ) {
        if self.recover_due.is_some() {
            return answer(reply, Err(InstanceError::Unreachable));
        }
        let grant = match lifecycle::request(self.state(), request) {
            Ok(grant) => grant,
            Err(refused) => return answer(reply, Err(refused.into())),
        };
        match (request, grant) {
            (_, Grant::AlreadySo) => self.on_repeated(request, reply).await,
            (Request::Start, _) => {
                self.starters.push(reply);
                self.start().await;
            }
            (Request::Restart, Grant::Become(InstanceState::Starting)) => {
                self.starters.push(reply);
                self.start().await;
            }
            (Request::Restart, _) => {
                self.after = After::Start;
                self.starters.push(reply);
                self.stop(patience).await;
            }
            (Request::Stop, _) => {
                self.stoppers.push(reply);
                self.stop(patience).await;
            }
            (Request::Kill, _) => {
                self.stoppers.push(reply);
                self.kill().await;
            }
            (Request::Pause, _) => {
                let result = self.freeze(Control::Pause, InstanceState::Paused).await;
                answer(reply, result);
            }
            (Request::Resume, _) => {
                let result = self.freeze(Control::Resume, InstanceState::Running).await;
                answer(reply, result);
            }
            // They have letters of their own.
            (Request::Remove | Request::Snapshot | Request::Restore, _) => {
                answer(reply, Ok(self.instance()));
            }
        }
    }

    /// What was asked for holds or is under way: the answer is the same as to the first who asked.
    async fn on_repeated(&mut self, request: Request, reply: Reply<Instance>) {
        match (self.state(), request) {
            (InstanceState::Starting, Request::Start) => self.starters.push(reply),
            (InstanceState::Stopping, Request::Stop) => self.stoppers.push(reply),
            (_, Request::Stop | Request::Kill) if self.restart_due.take().is_some() => {
                self.answer_starters(Err(InstanceError::CalledOff));
                self.record.instance.reason = Some(StateReason::Requested);
                let result = self.save(None).await.map(|()| self.instance());
                answer(reply, result);
            }
            _ => answer(reply, Ok(self.instance())),
        }
    }

    async fn on_remove(&mut self, force: bool, reply: Reply<()>) {
        let refused = lifecycle::request(self.state(), Request::Remove).err();
        match refused {
            Some(refused) if !force => answer(reply, Err(refused.into())),
            Some(_) => {
                self.after = After::Remove;
                self.removers.push(reply);
                self.kill().await;
            }
            None => {
                self.removers.push(reply);
                self.remove().await;
            }
        }
    }

    async fn on_patch(
        &mut self,
        patch: &InstancePatch,
        generation: Option<u64>,
        dry_run: bool,
    ) -> Result<PatchResult, InstanceError> {
        let found = self.record.instance.generation;
        if let Some(wanted) = generation
            && wanted != found
        {
            return Err(InstanceError::Stale { wanted, found });
        }
        if self.recover_due.is_some() {
            return Err(InstanceError::Unreachable);
        }
        let live = lifecycle::is_live(self.state());
        let before = self.record.instance.spec.clone();
        let rules = self.kind.rules;
        let plan = patch::plan(&before, patch, live, rules, &self.shared.capacity)?;
        if self.record.goes_on {
            plan.check_goes_on()?;
        }
        if dry_run || plan.effects.is_empty() {
            let mut instance = self.instance();
            instance.spec = plan.spec;
            return Ok(PatchResult {
                plan: plan.effects,
                instance,
            });
        }
        let acts = live && plan.acts();
        self.record.instance.spec = plan.spec;
        self.record.unapplied = acts;
        self.save(None).await?;
        if acts && let Err(error) = self.apply_limits().await {
            self.record.instance.spec = before;
            // Some of the new limits may have been set.
            if let Err(error) = self.apply_limits().await {
                tracing::warn!(
                    name = self.name(),
                    error = &error as &dyn std::error::Error,
                    "the limits as they were could not be put back"
                );
            }
            self.record.unapplied = false;
            self.save(None).await?;
            return Err(Arc::new(error).into());
        }
        self.record.unapplied = false;
        let fields: Vec<&String> = plan.effects.keys().collect();
        self.save(Some((
            "instance.updated",
            serde_json::json!({"fields": fields}),
        )))
        .await?;
        Ok(PatchResult {
            plan: plan.effects,
            instance: self.instance(),
        })
    }

    fn state(&self) -> InstanceState {
        self.record.instance.state
    }

    fn instance(&self) -> Instance {
        self.record.instance.clone()
    }

    fn name(&self) -> &str {
        &self.record.instance.name
    }

    /// When the policy wants the instance started again, if it does.
    fn next_restart(&self) -> Option<Instant> {
        let instance = &self.record.instance;
        let failed = instance.exit.is_none_or(|exit| exit.code != Some(0));
        let wanted = match instance.spec.restart {
            RestartPolicy::No => false,
            RestartPolicy::OnFailure => failed,
            RestartPolicy::Always => true,
        };
        (wanted && instance.reason != Some(StateReason::Requested)).then(|| {
            let delay = RESTART_DELAY_MIN.saturating_mul(1 << self.short_runs.min(16));
            Instant::now() + delay.min(RESTART_DELAY_MAX)
        })
    }

    fn patience(&self, asked: Option<Duration>) -> Duration {
        let seconds = self
            .record
            .instance
            .spec
            .stop_timeout_s
            .unwrap_or(STOP_TIMEOUT_DEFAULT_S);
        asked.unwrap_or_else(|| Duration::from_secs(u64::from(seconds)))
    }
}

/// A client that has gone needs no answer.
fn answer<T>(reply: Reply<T>, result: Result<T, InstanceError>) {
    let _ = reply.send(result);
}

async fn or_never<T>(future: Option<&mut BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => future::pending().await,
    }
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => time::sleep_until(due).await,
        None => future::pending().await,
    }
}
