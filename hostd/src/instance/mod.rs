//! The instances of this host: who there is, and how to talk to each.
//!
//! Each instance is owned by one task (`task`), which alone changes it. Others send the task a
//! letter and watch what it publishes. The one lock here guards the map of names and is never held
//! across an await.

mod create;
mod handle;
mod patch;
mod task;

use std::collections::{BTreeMap, HashSet};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex as StdMutex, PoisonError, RwLock};
use std::time::Duration;

use futures::future::BoxFuture;
use nix::sys::signal::Signal;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;

use crate::api::types::{Instance, InstanceState, Snapshot, Stats};
use crate::driver::{Channel, Control, DriverError, Kinds, Session};
use crate::events::Events;
use crate::lifecycle::Refused;
use crate::limits::Capacity;
use crate::store::{self, Record, Store, StoreError};
use crate::validate::FieldError;

pub use self::create::{Made, Order};
pub use self::handle::Handle;
pub use self::task::SNAPSHOTS_MAX;

use self::handle::Audience;
use self::task::{Beginning, Task};

/// More than a /16 has addresses for would be no use; this many fit in memory easily.
pub const INSTANCES_MAX: usize = 4096;

/// Letters that wait for one instance; one more is refused as busy.
const MAILBOX_LEN: usize = 64;

/// How long the daemon waits at its start for the instances to be found again before it serves.
const RECOVER_DEADLINE: Duration = Duration::from_secs(10);

/// When hostd goes, what is under way for an instance gets this long to finish.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// What creating an instance takes from the rest of the host.
pub trait Supplies: Send + Sync + 'static {
    /// The digest of the image's manifest; `None` if the store has no such image.
    fn digest<'a>(
        &'a self,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Option<String>, SupplyError>>;

    /// An address that is not among `used`.
    fn address(&self, used: &HashSet<Ipv4Addr>) -> Result<Ipv4Addr, SupplyError>;
}

/// Why something that an instance takes could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SupplyError {
    #[error("no address is free on the bridge")]
    NoAddress,
    #[error("the image store failed")]
    Image(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Why an instance could not be made, changed or asked.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("there is no instance `{0}`")]
    NotFound(String),
    #[error("there is no image `{0}` on this host")]
    NoImage(String),
    #[error("the instance `{instance}` has no snapshot `{snapshot}`")]
    NoSnapshot { instance: String, snapshot: String },
    #[error("the instance has a snapshot `{0}` already")]
    SnapshotTaken(String),
    #[error("the instance has as many snapshots as it can keep, {SNAPSHOTS_MAX}")]
    SnapshotsFull,
    #[error("an instance `{0}` exists with another spec")]
    Different(String),
    #[error("this host has as many instances as it can keep, {INSTANCES_MAX}")]
    Full,
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("the instance is {}, not running", crate::lifecycle::name(*.0))]
    NotRunning(InstanceState),
    #[error(transparent)]
    Field(#[from] FieldError),
    #[error("the instance is at generation {found}, not {wanted}")]
    Stale { wanted: u64, found: u64 },
    #[error("the start was called off by another request")]
    CalledOff,
    #[error("the instance has more requests than it can answer")]
    Busy,
    #[error("what runs the instance does not answer")]
    Unreachable,
    #[error(transparent)]
    Supply(#[from] SupplyError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Driver(#[from] Arc<DriverError>),
}

/// What all instances share.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) events: Events,
    pub(crate) kinds: Kinds,
    pub(crate) capacity: Capacity,
    handles: RwLock<BTreeMap<String, Handle>>,
    tasks: StdMutex<JoinSet<()>>,
}

impl Shared {
    pub(crate) async fn snapshot(
        &self,
        instance: &str,
        name: &str,
    ) -> Result<Snapshot, InstanceError> {
        let (of, wanted) = (instance.to_owned(), name.to_owned());
        let found = self
            .store
            .run(move |connection| store::snapshot(connection, &of, &wanted))
            .await?;
        found.ok_or_else(|| InstanceError::NoSnapshot {
            instance: instance.to_owned(),
            snapshot: name.to_owned(),
        })
    }

    pub(crate) fn forget(&self, name: &str) {
        self.handles
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
    }
}

/// All instances. Clones are the same.
#[derive(Clone)]
pub struct Instances {
    shared: Arc<Shared>,
    supplies: Arc<dyn Supplies>,
    /// Held while an instance is made, so that no two get the same address.
    creating: Arc<Mutex<()>>,
}

impl std::fmt::Debug for Instances {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Instances").finish_non_exhaustive()
    }
}

impl Instances {
    /// Takes charge of every stored instance: finds what runs, cleans up after what does not.
    ///
    /// # Errors
    /// The store fails.
    pub async fn open(
        store: Store,
        events: Events,
        kinds: Kinds,
        capacity: Capacity,
        supplies: Arc<dyn Supplies>,
    ) -> Result<Self, StoreError> {
        let records = store.run(|connection| store::instances(connection)).await?;
        let shared = Arc::new(Shared {
            store,
            events,
            kinds,
            capacity,
            handles: RwLock::default(),
            tasks: StdMutex::default(),
        });
        let instances = Self {
            shared,
            supplies,
            creating: Arc::default(),
        };
        let (found, mut all_found) = mpsc::channel(1);
        for record in records {
            instances.adopt(record, Beginning::Found(found.clone()));
        }
        drop(found);
        // Each task drops its sender once it knows; nothing is ever sent.
        if tokio::time::timeout(RECOVER_DEADLINE, all_found.recv())
            .await
            .is_err()
        {
            tracing::warn!("some instances are still being found; serving without them");
        }
        Ok(instances)
    }

    /// Lets go of every instance, whatever it does. Returns once what was under way for them is done,
    /// so that nothing is cut off in the middle.
    pub async fn close(&self) {
        let tasks = {
            // With its last handle gone a task ends.
            self.shared
                .handles
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .clear();
            std::mem::take(
                &mut *self
                    .shared
                    .tasks
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner),
            )
        };
        if tokio::time::timeout(CLOSE_DEADLINE, tasks.join_all())
            .await
            .is_err()
        {
            tracing::warn!("some instances are busy; what is under way for them is cut off");
        }
    }

    /// What the host has to give.
    pub fn capacity(&self) -> &Capacity {
        &self.shared.capacity
    }

    /// The rules and driver of each kind.
    pub fn kinds(&self) -> &Kinds {
        &self.shared.kinds
    }

    /// All instances, by name.
    pub fn list(&self) -> Vec<Instance> {
        self.handles().map(|handle| handle.instance()).collect()
    }

    /// All records, by name.
    pub fn records(&self) -> Vec<Arc<Record>> {
        self.handles().map(|handle| handle.record()).collect()
    }

    fn handles(&self) -> impl Iterator<Item = Handle> + use<> {
        let handles = self
            .shared
            .handles
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        handles.values().cloned().collect::<Vec<_>>().into_iter()
    }

    /// # Errors
    /// There is none of that name.
    pub fn find(&self, name: &str) -> Result<Handle, InstanceError> {
        self.shared
            .handles
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
            .ok_or_else(|| InstanceError::NotFound(name.to_owned()))
    }

    /// The snapshots of an instance, the oldest first.
    ///
    /// # Errors
    /// There is no such instance, or the store fails.
    pub async fn snapshots(&self, name: &str) -> Result<Vec<Snapshot>, InstanceError> {
        self.find(name)?;
        let name = name.to_owned();
        let found = self
            .shared
            .store
            .run(move |connection| store::snapshots(connection, &name));
        Ok(found.await?)
    }

    /// One snapshot.
    ///
    /// # Errors
    /// There is no such instance or snapshot, or the store fails.
    pub async fn snapshot(&self, name: &str, snapshot: &str) -> Result<Snapshot, InstanceError> {
        self.find(name)?;
        self.shared.snapshot(name, snapshot).await
    }

    /// Opens a conversation with a running instance.
    ///
    /// # Errors
    /// There is no such instance, it does not run, or its driver fails.
    pub async fn talk(&self, name: &str, channel: Channel) -> Result<Session, InstanceError> {
        let record = self.running(name)?;
        let driver = &self.shared.kinds.of(record.instance.spec.isolation).driver;
        Ok(driver.open(&record, channel).await.map_err(Arc::new)?)
    }

    /// Goes to the console of an instance's machine, also of one that is only just starting, or is paused.
    ///
    /// # Errors
    /// There is no such instance, its kind has no console, it does not run, or its driver fails.
    pub async fn console(&self, name: &str, input: bool) -> Result<Session, InstanceError> {
        let record = self.find(name)?.record();
        let kind = self.shared.kinds.of(record.instance.spec.isolation);
        if let Some(why) = kind.rules.no_console {
            return Err(Arc::new(DriverError::NoConsole(why)).into());
        }
        if record.instance.pid.is_none() {
            return Err(InstanceError::NotRunning(record.instance.state));
        }
        let channel = Channel::Console { input };
        Ok(kind.driver.open(&record, channel).await.map_err(Arc::new)?)
    }

    /// Joins an instance's streams, now or as soon as it runs. The workload of a start that comes
    /// after this call is held until the client is there, so that it misses nothing.
    ///
    /// # Errors
    /// There is no such instance, it is removed meanwhile, or its driver fails.
    pub async fn join(&self, name: &str, stdin: bool) -> Result<Session, InstanceError> {
        let handle = self.find(name)?;
        let _seat = handle.audience.join();
        let mut published = handle.published.clone();
        let record = match published
            .wait_for(|record| record.instance.pid.is_some())
            .await
        {
            Ok(record) => Arc::clone(&record),
            Err(_) => return Err(handle.gone()),
        };
        let driver = &self.shared.kinds.of(record.instance.spec.isolation).driver;
        let channel = Channel::Attach { stdin };
        let session = driver.open(&record, channel).await.map_err(Arc::new)?;
        Ok(handle.settled(session))
    }

    /// Delivers a signal to a running workload, whatever it makes of it.
    ///
    /// # Errors
    /// There is no such instance, it does not run, or its driver fails.
    pub async fn signal(&self, name: &str, signal: Signal) -> Result<Instance, InstanceError> {
        let record = self.running(name)?;
        let driver = &self.shared.kinds.of(record.instance.spec.isolation).driver;
        driver
            .control(&record, Control::Signal(signal))
            .await
            .map_err(Arc::new)?;
        Ok(record.instance.clone())
    }

    /// What a running instance uses; zeros for one that does not run.
    ///
    /// # Errors
    /// There is no such instance, or its driver fails.
    pub async fn stats(&self, name: &str) -> Result<Stats, InstanceError> {
        let record = self.find(name)?.record();
        let instance = &record.instance;
        if !matches!(
            instance.state,
            InstanceState::Running | InstanceState::Paused | InstanceState::Stopping
        ) {
            return Ok(Stats::default());
        }
        let driver = &self.shared.kinds.of(instance.spec.isolation).driver;
        match driver.stats(&record).await {
            // It ended meanwhile.
            Err(DriverError::NotRunning) => Ok(Stats::default()),
            other => Ok(other.map_err(Arc::new)?),
        }
    }

    fn running(&self, name: &str) -> Result<Arc<Record>, InstanceError> {
        let record = self.find(name)?.record();
        if record.instance.state == InstanceState::Running {
            Ok(record)
        } else {
            Err(InstanceError::NotRunning(record.instance.state))
        }
    }

    /// Starts the task that owns the instance.
    fn adopt(&self, record: Record, beginning: Beginning) {
        let name = record.instance.name.clone();
        let (mailbox, letters) = mpsc::channel(MAILBOX_LEN);
        let audience = Audience::default();
        let shared = Arc::clone(&self.shared);
        let (task, published) = Task::new(shared, record, letters, audience.clone());
        let handle = Handle {
            mailbox,
            published,
            audience,
        };
        self.shared
            .handles
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name, handle);
        let mut tasks = self
            .shared
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Those of removed instances.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task.run(beginning));
    }
}
