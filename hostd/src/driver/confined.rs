//! What both kinds share: a confined process under a monitor, in a cgroup, on the network.
//!
//! A VM is a container whose one process is a VMM, so starting, finding again, pausing, counting
//! and removing are here, once.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent::protocol::Frame;
use container::cgroup::{Cgroup, CgroupError};
use container::monitor::protocol::{Descriptor, LogSpec, MonitorSpec, Request, Response};
use futures::FutureExt;
use futures::future::BoxFuture;
use nix::sys::signal::Signal;
use oci_spec::runtime::LinuxResources;
use serde_json::Value;
use tokio::process::Command;
use tokio::task;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::monitor::Monitor;
use super::{DriverError, Ended, Extent, Recovered, Running, Session, mounts, session};
use crate::api::types::{InstanceState, NetworkMode, Stats};
use crate::image::ImageStore;
use crate::limits::{BlockDevice, Capacity};
use crate::network::{AttachRequest, Attachment, Endpoint, Network, NetworkError, mac_for};
use crate::paths::Paths;
use crate::store::Record;
use crate::validate::FieldError;

/// A log of this size is turned over; with its predecessor an instance keeps twice as much.
const LOG_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// What drivers work with.
#[derive(Debug)]
pub struct Engine {
    pub paths: Arc<Paths>,
    pub images: ImageStore,
    pub network: Arc<Network>,
    /// The cgroup that holds those of the instances, e.g. `/hostd`.
    pub cgroup_parent: String,
    /// What the host has to give.
    pub capacity: Capacity,
    /// The disk that the state directory is on, if it is on one.
    pub disk: Option<BlockDevice>,
    /// Cancelled when hostd is to go.
    pub stopping: CancellationToken,
}

/// What is to be run confined.
pub(super) struct Launch {
    /// The bundle's `config.json`.
    pub(super) spec: Value,
    pub(super) executable: Option<PathBuf>,
    pub(super) descriptors: Vec<Descriptor>,
    /// Whether the process's input is kept open for `attach`.
    pub(super) stdin: bool,
    /// Whether a client will attach as soon as it runs.
    pub(super) await_client: bool,
}

/// An instance's end of its interface.
pub(super) enum End {
    /// In a network namespace: this one, which is new, or one that is made for it.
    Namespace(Option<OwnedFd>),
    /// A tap that this user may open.
    Tap { owner_uid: u32 },
}

/// How long each step of a start takes.
pub(super) struct Phases {
    begun: Instant,
    us: BTreeMap<String, u64>,
}

impl Phases {
    pub(super) fn begin() -> Self {
        Self {
            begun: Instant::now(),
            us: BTreeMap::new(),
        }
    }

    /// The phase that has just ended.
    pub(super) fn mark(&mut self, phase: &str) {
        self.mark_spans(&[(phase, microseconds_since(self.begun))]);
    }

    /// Phases that ran side by side and have all ended, each with how long it took in microseconds.
    pub(super) fn mark_spans(&mut self, spans: &[(&str, u64)]) {
        let spans = spans.iter().map(|(phase, us)| ((*phase).to_owned(), *us));
        self.us.extend(spans);
        self.begun = Instant::now();
    }

    /// Does `work`, which begins now, and says how long it took in microseconds.
    pub(super) async fn span<T>(work: impl Future<Output = T>) -> (T, u64) {
        let begun = Instant::now();
        let outcome = work.await;
        (outcome, microseconds_since(begun))
    }
}

fn microseconds_since(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Engine {
    pub(super) fn monitor(&self, record: &Record) -> Monitor {
        Monitor::of(self.paths.instance_run(&record.instance.name))
    }

    /// The path of an instance's cgroup below the root of every hierarchy.
    pub(super) fn cgroup_path(&self, name: &str) -> String {
        format!("{}/{name}", self.cgroup_parent)
    }

    /// Runs `work` on the instance's cgroup, on a thread that may block.
    pub(super) async fn with_cgroup<T: Send + 'static>(
        &self,
        name: &str,
        action: &str,
        work: impl FnOnce(&Cgroup) -> Result<T, CgroupError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let path = self.cgroup_path(name);
        let done = blocking(move || Cgroup::open(&path).and_then(|cgroup| work(&cgroup))).await;
        done.map_err(|error| DriverError::Helper {
            action: action.to_owned(),
            message: super::chain(&error),
        })
    }

    /// Makes the directories of a run anew, and that of the instance if it is its first.
    pub(super) fn prepare_directories(&self, record: &Record) -> Result<PathBuf, DriverError> {
        let name = &record.instance.name;
        let run = self.paths.instance_run(name);
        for directory in [&self.paths.instance_state(name), &run.join("bundle/rootfs")] {
            fs::create_dir_all(directory)
                .map_err(DriverError::io(format!("making {}", directory.display())))?;
        }
        Ok(run)
    }

    /// Puts the instance on the bridge; `None` if it wants no network.
    pub(super) async fn attach(
        &self,
        record: &Record,
        end: End,
    ) -> Result<Option<Attachment>, DriverError> {
        let (endpoint, owner_uid, namespace) = match end {
            End::Namespace(made) => (Endpoint::Namespace, None, made),
            End::Tap { owner_uid } => (Endpoint::Tap, Some(owner_uid), None),
        };
        let Some(mut request) = attach_request(record, endpoint) else {
            return Ok(None);
        };
        request.owner_uid = owner_uid;
        match self.network.attach_to(&request, namespace).await {
            Ok(attachment) => Ok(Some(attachment)),
            Err(error) => Err(from_network(&error)),
        }
    }

    /// Writes the bundle's configuration and starts the monitor.
    pub(super) async fn launch(
        &self,
        record: &Record,
        launch: Launch,
        mut phases: Phases,
        ready: BoxFuture<'static, Result<(), DriverError>>,
    ) -> Result<Running, DriverError> {
        let name = &record.instance.name;
        let bundle = self.paths.instance_run(name).join("bundle");
        fs::write(bundle.join("config.json"), launch.spec.to_string())
            .map_err(DriverError::io("writing config.json"))?;
        let spec = MonitorSpec {
            id: name.clone(),
            root: self.paths.runtime_root(),
            bundle,
            log: LogSpec {
                path: self.paths.log(name),
                bytes_max: LOG_BYTES_MAX,
            },
            stdin: launch.stdin,
            await_client: launch.await_client,
            executable: launch.executable,
            descriptors: launch.descriptors,
        };
        phases.mark("bundle");
        let monitor = self.monitor(record);
        let pid = monitor.launch(&self.paths.runtime_program(), &spec).await?;
        phases.mark("launch");
        Ok(Running {
            pid,
            paused: false,
            start_us: phases.us,
            ready,
            ended: monitor.ended().boxed(),
        })
    }

    /// Finds out what became of a run that another hostd started.
    pub(super) async fn recover(
        &self,
        record: &Record,
        ready: BoxFuture<'static, Result<(), DriverError>>,
    ) -> Result<Recovered, DriverError> {
        let monitor = self.monitor(record);
        if !self.paths.instance_run(&record.instance.name).exists() {
            return Ok(Recovered::Ended(Ended::Lost));
        }
        if let Some(ended) = monitor.record() {
            return Ok(Recovered::Ended(ended));
        }
        match monitor.ask(&Request::State {}).await {
            Ok(Response::Running { pid, .. }) => {
                let paused = self
                    .with_cgroup(
                        &record.instance.name,
                        "looking at the freezer",
                        Cgroup::is_frozen,
                    )
                    .await?;
                Ok(Recovered::Live(Running {
                    pid,
                    paused,
                    start_us: BTreeMap::new(),
                    ready,
                    ended: monitor.ended().boxed(),
                }))
            }
            Err(DriverError::NotRunning)
                if monitor.is_alive() && record.instance.state != InstanceState::Starting =>
            {
                Err(DriverError::Helper {
                    action: "finding the instance again".to_owned(),
                    message: "its monitor lives and does not listen".to_owned(),
                })
            }
            // It has just gone, was killed, or had not got so far as to listen. What is left of it
            // is torn down.
            Ok(Response::Exited(_) | Response::Done {} | Response::Error { .. })
            | Err(DriverError::NotRunning) => {
                Ok(Recovered::Ended(monitor.record().unwrap_or(Ended::Lost)))
            }
            Err(error) => Err(error),
        }
    }

    /// Signals the first process.
    pub(super) async fn signal(&self, record: &Record, signal: Signal) -> Result<(), DriverError> {
        let signal = signal as i32;
        match self.monitor(record).ask(&Request::Kill { signal }).await? {
            Response::Done {} => Ok(()),
            Response::Exited(_) | Response::Running { .. } | Response::Error { .. } => {
                Err(DriverError::NotRunning)
            }
        }
    }

    /// Kills every process of the instance, frozen ones as well.
    pub(super) async fn kill(&self, record: &Record) -> Result<(), DriverError> {
        self.with_cgroup(&record.instance.name, "killing", Cgroup::kill_all)
            .await
    }

    pub(super) async fn freeze(&self, record: &Record) -> Result<(), DriverError> {
        self.with_cgroup(&record.instance.name, "pausing", Cgroup::freeze)
            .await
    }

    pub(super) async fn thaw(&self, record: &Record) -> Result<(), DriverError> {
        self.with_cgroup(&record.instance.name, "resuming", Cgroup::thaw)
            .await
    }

    /// Puts limits in force on the cgroup and the interface.
    pub(super) async fn apply(
        &self,
        record: &Record,
        resources: LinuxResources,
    ) -> Result<(), DriverError> {
        self.with_cgroup(&record.instance.name, "setting limits", move |cgroup| {
            cgroup.update(&resources)
        })
        .await?;
        if record.instance.spec.network.mode == NetworkMode::None {
            return Ok(());
        }
        let limits = &record.instance.spec.limits.network;
        let set = self.network.set_limits(&record.instance.name, limits).await;
        set.map_err(|error| from_network(&error))
    }

    pub(super) async fn attach_streams(
        &self,
        record: &Record,
        stdin: bool,
        amend: impl Fn(Frame) -> Frame + Send + 'static,
    ) -> Result<Session, DriverError> {
        let connection = self
            .monitor(record)
            .converse(&Request::Attach { stdin })
            .await?;
        Ok(session::over_lines(connection, amend))
    }

    pub(super) async fn stats(&self, record: &Record) -> Result<Stats, DriverError> {
        let used = self
            .with_cgroup(&record.instance.name, "reading the cgroup", |cgroup| {
                if cgroup.exists() {
                    cgroup.stats().map(Some)
                } else {
                    Ok(None)
                }
            })
            .await?
            .ok_or(DriverError::NotRunning)?;
        let passed = match record.instance.spec.network.mode {
            NetworkMode::Bridge => self.network.stats(&record.instance.name).await,
            NetworkMode::None => Ok(crate::network::NetworkStats::default()),
        }
        .unwrap_or_default();
        Ok(Stats {
            cpu_usage_us: used.cpu.usage_us,
            cpu_throttled_us: used.cpu.throttled_us,
            memory_bytes: used.memory.current,
            memory_peak_bytes: used.memory.peak.unwrap_or_default(),
            memory_limit_bytes: used.memory.limit,
            oom_kills: used.memory.oom_kills,
            pids: used.pids.current,
            pids_limit: used.pids.limit,
            disk_read_bytes: used.io.read_bytes,
            disk_write_bytes: used.io.write_bytes,
            disk_read_ops: used.io.read_operations,
            disk_write_ops: used.io.write_operations,
            network_ingress_bytes: passed.ingress_bytes,
            network_egress_bytes: passed.egress_bytes,
            network_ingress_packets: passed.ingress_packets,
            network_egress_packets: passed.egress_packets,
            network_ingress_dropped: passed.ingress_dropped,
            network_egress_dropped: passed.egress_dropped,
            vm: None,
        })
    }

    /// Ends and removes everything of a run, and with `Extent::Everything` the instance's state.
    /// Goes on after a failure, and then fails with the first.
    pub(super) async fn destroy(&self, record: &Record, extent: Extent) -> Result<(), DriverError> {
        let name = &record.instance.name;
        self.destroy_stranger(name).await?;
        match extent {
            Extent::Run => Ok(()),
            Extent::Everything => {
                self.discard_all(name).await?;
                remove_tree(self.paths.instance_state(name)).await
            }
        }
    }

    /// Ends and removes everything of a run that perhaps no instance explains any more.
    pub(crate) async fn destroy_stranger(&self, name: &str) -> Result<(), DriverError> {
        let run = self.paths.instance_run(name);
        if !run.exists() {
            return Ok(());
        }
        let mut results = vec![
            self.end_processes(name).await,
            self.delete_from_runtime(name).await,
            self.network
                .detach(name)
                .await
                .map_err(|error| from_network(&error)),
            self.with_cgroup(name, "removing the cgroup", remove_cgroup)
                .await,
        ];
        let below = run.clone();
        match blocking(move || mounts::unmount_below(&below)).await {
            // Last, since it is what tells that there is something to remove.
            Ok(()) if results.iter().all(Result::is_ok) => results.push(remove_tree(run).await),
            Ok(()) => {}
            // What is mounted there must not be removed with the directory.
            Err(source) => results.push(Err(DriverError::Io {
                action: "unmounting".to_owned(),
                source,
            })),
        }
        results.into_iter().collect()
    }

    async fn end_processes(&self, name: &str) -> Result<(), DriverError> {
        // The monitor first: it could still make what is being removed.
        let monitor = Monitor::of(self.paths.instance_run(name));
        if monitor.is_alive()
            && let Some(identity) = blocking(move || monitor.find()).await
        {
            identity.kill();
        }
        self.with_cgroup(name, "killing", |cgroup| {
            if cgroup.exists() {
                cgroup.kill_all()
            } else {
                Ok(())
            }
        })
        .await
    }

    /// Makes the runtime forget the container, if it still knows it.
    async fn delete_from_runtime(&self, name: &str) -> Result<(), DriverError> {
        let root = self.paths.runtime_root();
        if !root.join(name).exists() {
            return Ok(());
        }
        let program = self.paths.runtime_program();
        let output = Command::new(&program)
            .arg("--root")
            .arg(root)
            .args(["delete", "--force", name])
            .output()
            .await
            .map_err(DriverError::io(format!("starting {}", program.display())))?;
        if output.status.success() {
            return Ok(());
        }
        Err(DriverError::Helper {
            action: "deleting the container".to_owned(),
            message: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }
}

/// What the network is to know of an instance; `None` if it wants no network.
pub(crate) fn attach_request(record: &Record, endpoint: Endpoint) -> Option<AttachRequest> {
    let instance = &record.instance;
    let address = instance.address?;
    Some(AttachRequest {
        name: instance.name.clone(),
        endpoint,
        address,
        mac: mac_for(address),
        ports: instance.spec.network.ports.clone(),
        limits: instance.spec.limits.network.clone(),
        owner_uid: None,
    })
}

fn from_network(error: &NetworkError) -> DriverError {
    if error.is_callers_fault() {
        let field = match error.port_index() {
            Some(index) => format!("/network/ports/{index}/host"),
            None => "/network".to_owned(),
        };
        return DriverError::Field(FieldError::new(field, super::chain(error)));
    }
    DriverError::Helper {
        action: "setting up the network".to_owned(),
        message: super::chain(error),
    }
}

fn remove_cgroup(cgroup: &Cgroup) -> Result<(), CgroupError> {
    if cgroup.exists() {
        cgroup.remove()
    } else {
        Ok(())
    }
}

async fn remove_tree(path: PathBuf) -> Result<(), DriverError> {
    let action = format!("removing {}", path.display());
    blocking(move || remove_if_there(&path))
        .await
        .map_err(DriverError::io(action))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Runs what may block on a thread for it.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    task::spawn_blocking(work)
        .await
        .expect("the work does not panic")
}
