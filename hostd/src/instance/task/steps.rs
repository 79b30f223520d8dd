//! What the owner of an instance does to it and does about what happens to it.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::{self, Instant};

use super::{After, KILL_DEADLINE, Live, RESTART_SOUND_RUN, Task, answer};
use crate::api::types::{Instance, InstanceState, StateReason};
use crate::driver::{self, Control, DriverError, Ended, Extent, Recovered, Running};
use crate::instance::InstanceError;
use crate::lifecycle::{self, Fact};
use crate::store::{self, Happening};

/// Mounting layers, making interfaces and waiting for the monitor's word takes no longer.
const START_DEADLINE: Duration = Duration::from_secs(60);
const CONTROL_DEADLINE: Duration = Duration::from_secs(15);
const DESTROY_DEADLINE: Duration = Duration::from_secs(60);
/// Between attempts to find out what an earlier hostd left behind.
const RECOVER_INTERVAL: Duration = Duration::from_secs(5);

impl Task {
    /// Finds out what an earlier hostd left behind, and mends it.
    pub(super) async fn recover(&mut self) {
        self.recover_due = None;
        if self.record.removing {
            return self.remove().await;
        }
        let found = self.kind.driver.recover(&self.record);
        match within(CONTROL_DEADLINE, found).await {
            Ok(Recovered::Live(running)) => self.adopt(running).await,
            Ok(Recovered::Ended(ended)) if lifecycle::is_live(self.state()) => {
                self.on_ended(ended).await;
            }
            Ok(Recovered::Ended(_)) => {
                self.destroy(Extent::Run).await;
                self.restart_due = self.next_restart();
            }
            Err(error) => {
                tracing::warn!(
                    name = self.name(),
                    error = driver::chain(&error),
                    "unreachable"
                );
                self.record.instance.error = Some(driver::chain(&error));
                self.publish();
                self.recover_due = Some(Instant::now() + RECOVER_INTERVAL);
            }
        }
    }

    /// Takes charge of an instance that runs already.
    async fn adopt(&mut self, running: Running) {
        let state = self.state();
        if !lifecycle::is_live(state) {
            // Its end was stored, so nothing of it can be meant to run.
            return self.destroy(Extent::Run).await;
        }
        let mut paused = running.paused;
        self.take_on(running);
        if std::mem::take(&mut self.record.held) && state == InstanceState::Running {
            // A snapshot or a pause was cut off; its workload may be held even if it is not paused.
            let resumed = self.act(Control::Resume).await;
            paused = paused && !resumed;
        } else if !paused && state == InstanceState::Paused {
            // Nor may it have been let go by whoever resumed it.
            self.act(Control::Resume).await;
        }
        let state_now = &mut self.record.instance.state;
        if paused && *state_now == InstanceState::Running {
            *state_now = InstanceState::Paused;
        } else if !paused && *state_now == InstanceState::Paused {
            *state_now = InstanceState::Running;
        }
        if self.record.unapplied {
            match self.apply_limits().await {
                Ok(()) => self.record.unapplied = false,
                Err(error) => self.record.instance.error = Some(driver::chain(&error)),
            }
        }
        self.save_or_log(None).await;
        if state == InstanceState::Stopping {
            // Whoever was stopping it may not have got as far as to let it go on.
            if paused {
                self.act(Control::Resume).await;
            }
            self.stop(None).await;
        }
    }

    fn take_on(&mut self, running: Running) {
        self.record.instance.pid = Some(running.pid);
        let ready = (self.state() == InstanceState::Starting).then_some(running.ready);
        self.live = Some(Live {
            ready,
            ended: running.ended,
            since: Instant::now(),
        });
    }

    /// Starts the instance. Who waits for it is answered once it runs or has failed.
    pub(super) async fn start(&mut self) {
        self.restart_due = None;
        self.after = After::Stay;
        let instance = &mut self.record.instance;
        instance.state = InstanceState::Starting;
        instance.reason = None;
        instance.exit = None;
        instance.error = None;
        instance.pid = None;
        instance.started_at = None;
        instance.finished_at = None;
        instance.start_us.clear();
        self.record.unapplied = false;
        self.record.goes_on = false;
        if let Err(error) = self.save(Some(("instance.starting", json!({})))).await {
            self.record.instance.state = InstanceState::Failed;
            self.record.instance.error = Some(driver::chain(&error));
            self.publish();
            return self.answer_starters(Err(error));
        }
        let begun = Instant::now();
        let started = self
            .kind
            .driver
            .start(&self.record, self.audience.is_there());
        match within(START_DEADLINE, started).await {
            Ok(running) => {
                self.record.instance.start_us = running.start_us.clone();
                self.take_on(running);
                if let Some(live) = &mut self.live {
                    live.since = begun;
                }
                self.publish();
            }
            Err(error) => self.fail(error).await,
        }
    }

    pub(super) async fn on_ready(&mut self, result: Result<(), DriverError>) {
        let Some(live) = &mut self.live else { return };
        live.ready = None;
        let since = live.since;
        let before = self.state();
        match result {
            // Who is being stopped does not get ready; its end is about to be seen.
            Err(_) if before == InstanceState::Stopping => return,
            Err(error) => return self.fail(error).await,
            Ok(()) => {}
        }
        let instance = &mut self.record.instance;
        instance.state = lifecycle::observe(before, Fact::Ready);
        if instance.state == before {
            return;
        }
        instance.started_at = Some(Timestamp::now());
        let total = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        instance.start_us.insert("total".to_owned(), total);
        let data = json!({"pid": instance.pid});
        let result = self.save(Some(("instance.running", data))).await;
        let result = result.map(|()| self.instance());
        self.answer_starters(result);
    }

    /// The start has failed: nothing of it may stay.
    async fn fail(&mut self, error: DriverError) {
        self.live = None;
        self.stop_due = None;
        self.destroy(Extent::Run).await;
        let instance = &mut self.record.instance;
        instance.state = lifecycle::observe(instance.state, Fact::StartFailed);
        instance.reason = Some(StateReason::StartFailed);
        instance.error = Some(driver::chain(&error));
        instance.pid = None;
        instance.finished_at = Some(Timestamp::now());
        let data = json!({"error": instance.error});
        self.save_or_log(Some(("instance.failed", data))).await;
        self.answer_starters(Err(Arc::new(error).into()));
        self.short_runs = self.short_runs.saturating_add(1);
        self.come_to_rest().await;
    }

    /// Everything has ended, by whatever cause.
    pub(super) async fn on_ended(&mut self, ended: Ended) {
        let ran = self.live.take().map(|live| live.since.elapsed());
        self.stop_due = None;
        self.killed = false;
        self.destroy(Extent::Run).await;
        let before = self.state();
        let instance = &mut self.record.instance;
        instance.pid = None;
        let (fact, exit, at, error) = match ended {
            Ended::Exited { exit, at, error } => (Fact::Ended, Some(exit), at, error),
            Ended::Lost => {
                let error = "what ran the instance is gone and left no record";
                (Fact::Lost, None, Timestamp::now(), Some(error.to_owned()))
            }
        };
        instance.state = lifecycle::observe(before, fact);
        instance.exit = exit;
        instance.finished_at = Some(at);
        instance.reason = Some(match exit {
            _ if before == InstanceState::Stopping => StateReason::Requested,
            Some(exit) if exit.oom => StateReason::OutOfMemory,
            Some(_) if error.is_some() => StateReason::Crashed,
            Some(_) => StateReason::Exited,
            None => StateReason::Lost,
        });
        if before != InstanceState::Stopping && error.is_some() {
            instance.error = error;
        }
        let kind = if instance.state == InstanceState::Failed {
            "instance.failed"
        } else {
            "instance.stopped"
        };
        let data = json!({"reason": instance.reason, "exit": exit, "error": instance.error});
        self.save_or_log(Some((kind, data))).await;
        self.short_runs = match ran {
            Some(ran) if ran < RESTART_SOUND_RUN => self.short_runs.saturating_add(1),
            _ => 0,
        };
        self.come_to_rest().await;
    }

    /// Answers who waited for the end, and does what is to follow it.
    async fn come_to_rest(&mut self) {
        for stopper in std::mem::take(&mut self.stoppers) {
            answer(stopper, Ok(self.instance()));
        }
        if let Some(restoring) = self.restoring.take() {
            if self.after == After::Restore {
                return self.restore(restoring).await;
            }
            restoring.call_off();
        }
        match self.after {
            After::Start => {
                self.restart_due = Some(Instant::now());
                return;
            }
            After::Remove => return self.remove().await,
            After::Stay | After::Restore => {}
        }
        self.answer_starters(Err(InstanceError::CalledOff));
        if self.record.instance.spec.auto_remove {
            return self.remove().await;
        }
        self.restart_due = self.next_restart();
    }

    /// Asks the workload to stop; what does not is killed after `patience`.
    pub(super) async fn stop(&mut self, patience: Option<Duration>) {
        let paused = self.state() == InstanceState::Paused;
        self.become_stopping().await;
        let mut patience = self.patience(patience);
        if paused {
            self.act(Control::Resume).await;
        }
        if patience.is_zero() || !self.act(Control::AskToStop).await {
            patience = Duration::ZERO;
        }
        // From when it was asked on, which may take a while if the first way to do so fails.
        self.stop_due = Some(Instant::now() + patience);
    }

    pub(super) async fn kill(&mut self) {
        self.become_stopping().await;
        self.stop_harder().await;
    }

    /// Kills; and if that has been tried, tears down what there is.
    pub(super) async fn stop_harder(&mut self) {
        if self.killed {
            tracing::warn!(name = self.name(), "its end was not seen; it is torn down");
            return self.on_ended(Ended::Lost).await;
        }
        self.killed = true;
        self.act(Control::Kill).await;
        self.stop_due = Some(Instant::now() + KILL_DEADLINE);
    }

    async fn become_stopping(&mut self) {
        if self.state() != InstanceState::Stopping {
            self.record.instance.state = InstanceState::Stopping;
            self.record.instance.reason = Some(StateReason::Requested);
            self.save_or_log(Some(("instance.stopping", json!({}))))
                .await;
        }
        if self.after != After::Start {
            self.answer_starters(Err(InstanceError::CalledOff));
        }
    }

    pub(super) async fn freeze(
        &mut self,
        control: Control,
        state: InstanceState,
    ) -> Result<Instance, InstanceError> {
        let kind = if state == InstanceState::Paused {
            "instance.paused"
        } else {
            "instance.resumed"
        };
        // A driver may have to hold the workload first.
        self.record.held = state == InstanceState::Paused;
        if self.record.held {
            self.save(None).await?;
        }
        let done = self.control(control).await;
        self.record.held = false;
        done.map_err(Arc::new)?;
        self.record.instance.state = state;
        self.save(Some((kind, json!({})))).await?;
        Ok(self.instance())
    }

    pub(super) async fn apply_limits(&mut self) -> Result<(), DriverError> {
        let limits = self.record.instance.spec.limits.clone();
        self.control(Control::Apply(Box::new(limits))).await
    }

    /// Removes the instance and everything it has. If that fails it stays, to be removed again.
    pub(super) async fn remove(&mut self) {
        self.record.removing = true;
        self.restart_due = None;
        let removed = self.try_remove().await;
        if let Err(error) = &removed {
            tracing::error!(
                name = self.name(),
                error = driver::chain(error),
                "cannot remove"
            );
            self.record.instance.error = Some(driver::chain(error));
            self.publish();
        }
        self.removed = removed.is_ok();
        let mut removers = std::mem::take(&mut self.removers);
        let first = removers.pop();
        if self.removed {
            // Before the answer, so that the name is free when the client hears of it.
            self.shared.forget(&self.record.instance.name);
        }
        for remover in removers {
            let result = if self.removed {
                Ok(())
            } else {
                Err(InstanceError::Unreachable)
            };
            answer(remover, result);
        }
        if let Some(first) = first {
            answer(first, removed);
        }
        self.after = After::Stay;
    }

    async fn try_remove(&mut self) -> Result<(), InstanceError> {
        self.save(None).await?;
        let destroyed = self.kind.driver.destroy(&self.record, Extent::Everything);
        within(DESTROY_DEADLINE, destroyed)
            .await
            .map_err(Arc::new)?;
        let name = self.record.instance.name.clone();
        let sequence = self
            .shared
            .store
            .run(move |connection| store::remove(connection, &name))
            .await?;
        if let Some(sequence) = sequence {
            self.shared.events.announce(sequence);
        }
        Ok(())
    }

    async fn control(&mut self, control: Control) -> Result<(), DriverError> {
        within(
            CONTROL_DEADLINE,
            self.kind.driver.control(&self.record, control),
        )
        .await
    }

    /// Whether the act succeeded; the log says why not.
    pub(super) async fn act(&mut self, control: Control) -> bool {
        let result = self.control(control.clone()).await;
        if let Err(error) = &result {
            tracing::warn!(
                name = self.name(),
                error = driver::chain(error),
                "{control:?} failed"
            );
        }
        result.is_ok()
    }

    async fn destroy(&mut self, extent: Extent) {
        let destroyed = self.kind.driver.destroy(&self.record, extent);
        if let Err(error) = within(DESTROY_DEADLINE, destroyed).await {
            let error = driver::chain(&error);
            tracing::error!(
                name = self.name(),
                error,
                "something of its run was left behind"
            );
        }
    }

    pub(super) fn answer_starters(&mut self, result: Result<Instance, InstanceError>) {
        let mut starters = std::mem::take(&mut self.starters);
        let last = starters.pop();
        for starter in starters {
            let result = match &result {
                Ok(instance) => Ok(instance.clone()),
                Err(InstanceError::Driver(error)) => Err(InstanceError::Driver(Arc::clone(error))),
                Err(_) => Err(InstanceError::CalledOff),
            };
            answer(starter, result);
        }
        if let Some(last) = last {
            answer(last, result);
        }
    }

    /// Stores the record as a new generation, with the event that tells of it, and publishes it.
    pub(super) async fn save(
        &mut self,
        event: Option<(&'static str, Value)>,
    ) -> Result<(), InstanceError> {
        self.record.instance.generation += 1;
        let record = self.record.clone();
        let happening = event.map(|(kind, data)| Happening {
            kind,
            subject: record.instance.name.clone(),
            data,
        });
        let sequence = self
            .shared
            .store
            .run(move |connection| store::update(connection, &record, happening.as_ref()))
            .await?;
        self.publish();
        if let Some(sequence) = sequence {
            self.shared.events.announce(sequence);
        }
        Ok(())
    }

    /// Stores a fact. It stays one if the store fails: the next start of hostd sees it again.
    pub(super) async fn save_or_log(&mut self, event: Option<(&'static str, Value)>) {
        if let Err(error) = self.save(event).await {
            tracing::error!(
                name = self.name(),
                error = driver::chain(&error),
                "not stored"
            );
            self.publish();
        }
    }

    pub(super) fn publish(&self) {
        self.published.send_replace(Arc::new(self.record.clone()));
    }
}

async fn within<T>(
    deadline: Duration,
    work: impl Future<Output = Result<T, DriverError>>,
) -> Result<T, DriverError> {
    time::timeout(deadline, work)
        .await
        .unwrap_or(Err(DriverError::Timeout {
            seconds: deadline.as_secs(),
        }))
}
