//! The daemon put together: what is opened in which order, and what is mended before it serves.
//!
//! Ending is the opposite of nothing: the API closes, and everything that runs runs on.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::container::cgroup::Cgroup;
use futures::FutureExt;
use futures::future::BoxFuture;
use nix::fcntl::{Flock, FlockArg};
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::api::{self, Context};
use crate::driver::container::{self, ContainerDriver};
use crate::driver::vm::{self, VmDriver};
use crate::driver::{self, Engine, Kind, Kinds};
use crate::events::Events;
use crate::host::{self, HostError};
use crate::image::{ImageError, ImageStore};
use crate::instance::{Instances, Supplies, SupplyError};
use crate::lifecycle;
use crate::network::{Network, NetworkConfig, NetworkError};
use crate::paths::Paths;
use crate::store::{self, Record, Store, StoreError};

/// Members of this group may use the API.
const GROUP: &str = "hostd";

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    pub paths: Paths,
    pub socket: PathBuf,
    pub network: NetworkConfig,
    /// The cgroup that holds those of the instances, e.g. `/hostd`.
    pub cgroup_parent: String,
}

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("another hostd uses {}", path.display())]
    Locked { path: PathBuf },
    #[error("{action} failed")]
    Io { action: String, source: io::Error },
    #[error("this host cannot be looked at")]
    Host(#[from] HostError),
    #[error("the store cannot be used")]
    Store(#[from] StoreError),
    #[error("the image store cannot be used")]
    Image(#[from] ImageError),
    #[error("the network cannot be set up")]
    Network(#[from] NetworkError),
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> DaemonError {
    let action = action.into();
    move |source| DaemonError::Io { action, source }
}

/// Runs the daemon until `stopping` is cancelled.
///
/// # Errors
/// It cannot be started; instances that run are left alone.
pub async fn run(options: Options, stopping: CancellationToken) -> Result<(), DaemonError> {
    let paths = Arc::new(options.paths);
    make_directories(&paths)?;
    let _lock = lock(&paths.lock())?;
    let store = Store::open(&paths.database())?;
    let events = Events::open(store.clone()).await?;
    let images = ImageStore::open(&paths.images())?;
    let network = Arc::new(Network::ensure(options.network).await?);
    let capacity = host::capacity()?;
    let engine = Arc::new(Engine {
        paths: Arc::clone(&paths),
        images: images.clone(),
        network: Arc::clone(&network),
        cgroup_parent: options.cgroup_parent.clone(),
        capacity: capacity.clone(),
        disk: host::disk_of(&paths.state),
        stopping: stopping.clone(),
    });
    let records = store.run(|connection| store::instances(connection)).await?;
    mend(&engine, &records).await;
    let kinds = Kinds {
        container: Kind {
            rules: &container::RULES,
            driver: Arc::new(ContainerDriver::new(Arc::clone(&engine))),
        },
        vm: Kind {
            rules: &vm::RULES,
            driver: Arc::new(VmDriver::new(engine)),
        },
    };
    let shelf = Arc::new(Shelf {
        images: images.clone(),
        network,
    });
    let instances = Instances::open(store, events.clone(), kinds, capacity, shelf).await?;
    let listener = listen(&options.socket)?;
    tracing::info!(socket = %options.socket.display(), instances = records.len(), "hostd serves");
    let context = Context {
        instances: instances.clone(),
        events,
        images,
        paths: Arc::clone(&paths),
        stopping,
    };
    api::serve(listener, context)
        .await
        .map_err(io_error("serving the API"))?;
    instances.close().await;
    remove_unused_group(&paths, &options.cgroup_parent);
    // The socket file stays: the next hostd replaces it, and clients get a clear refusal meanwhile.
    tracing::info!("hostd goes; the instances stay");
    Ok(())
}

fn make_directories(paths: &Paths) -> Result<(), DaemonError> {
    for directory in [
        &paths.state,
        &paths.run,
        &paths.instance_runs(),
        &paths.runtime_root(),
    ] {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(directory)
            .map_err(io_error(format!("making {}", directory.display())))?;
    }
    Ok(())
}

/// Makes sure that this is the only daemon of its state directory.
fn lock(path: &Path) -> Result<Flock<File>, DaemonError> {
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(io_error(format!("opening {}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        if error == nix::Error::EWOULDBLOCK {
            DaemonError::Locked {
                path: path.to_owned(),
            }
        } else {
            io_error("locking")(error.into())
        }
    })
}

/// Removes what no instance of the store explains: runs of forgotten instances, interfaces and
/// packet filter rules that a crash left. What runs of known instances is left to their tasks.
async fn mend(engine: &Engine, records: &[Record]) {
    let known: HashSet<&str> = records
        .iter()
        .map(|record| record.instance.name.as_str())
        .collect();
    let runs = fs::read_dir(engine.paths.instance_runs())
        .into_iter()
        .flatten();
    for name in runs.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        if known.contains(name.as_str()) {
            continue;
        }
        tracing::warn!(name, "no instance explains this run; it is removed");
        if let Err(error) = engine.destroy_stranger(&name).await {
            tracing::error!(
                name,
                error = driver::chain(&error),
                "it could not be removed"
            );
        }
    }
    let expected: Vec<_> = records
        .iter()
        .filter(|record| lifecycle::is_live(record.instance.state))
        .filter(|record| engine.paths.instance_run(&record.instance.name).exists())
        .filter_map(driver::attach_request)
        .collect();
    match engine.network.reconcile(&expected).await {
        Ok(found) => {
            for interface in found.removed {
                tracing::warn!(interface, "belonged to no instance and is removed");
            }
        }
        Err(error) => {
            tracing::error!(
                error = driver::chain(&error),
                "the network could not be mended"
            );
        }
    }
}

/// Removes the instances' common cgroup when there are none to hold. As long as something runs, the
/// groups below it are its own, those without processes too.
fn remove_unused_group(paths: &Paths, parent: &str) {
    let runs = fs::read_dir(paths.instance_runs());
    if runs.is_ok_and(|mut runs| runs.next().is_none())
        && let Err(error) = Cgroup::open(parent).and_then(|group| group.remove_if_empty())
    {
        tracing::warn!(parent, error = driver::chain(&error), "the cgroup stays");
    }
}

fn listen(socket: &Path) -> Result<UnixListener, DaemonError> {
    let action = format!("listening on {}", socket.display());
    let bound = || {
        if let Some(parent) = socket.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        chown(socket, None, group_id(GROUP))?;
        fs::set_permissions(socket, fs::Permissions::from_mode(0o660))?;
        Ok(listener)
    };
    bound().map_err(io_error(action))
}

/// The id of a group of the host. Read here because the C library's way needs its shared modules,
/// which a static program cannot count on.
fn group_id(name: &str) -> Option<u32> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    let entry = groups
        .lines()
        .find(|line| line.split(':').next() == Some(name))?;
    entry.split(':').nth(2)?.parse().ok()
}

/// What creating an instance takes from the image store and the network.
struct Shelf {
    images: ImageStore,
    network: Arc<Network>,
}

impl Supplies for Shelf {
    fn digest<'a>(
        &'a self,
        reference: &'a str,
    ) -> BoxFuture<'a, Result<Option<String>, SupplyError>> {
        let found = match self.images.get(reference) {
            Ok(image) => Ok(Some(image.digest)),
            Err(ImageError::NotFound { .. } | ImageError::InvalidReference { .. }) => Ok(None),
            Err(error) => Err(SupplyError::Image(Box::new(error))),
        };
        std::future::ready(found).boxed()
    }

    fn address(&self, used: &HashSet<Ipv4Addr>) -> Result<Ipv4Addr, SupplyError> {
        self.network
            .allocate(used)
            .map_err(|_| SupplyError::NoAddress)
    }
}
