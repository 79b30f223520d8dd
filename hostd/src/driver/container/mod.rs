//! The driver for containers: image layers under an overlay, namespaces, cgroup, seccomp.

mod config;
mod exec;
mod root;
mod snapshots;
mod user;
mod users;

use std::convert;
use std::fs;
use std::future;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;

use self::config::Parts;
use self::root::Root;
use self::users::Users;
use super::confined::{End, Engine, Launch, Phases, blocking};
use super::workload::{Workload, stop_signal};
use super::{
    Channel, Control, Driver, DriverError, Extent, Recovered, Running, Session, chain, machine_id,
};
use crate::api::types::{Effect, Limits, Stats};
use crate::image::ImageError;
use crate::limits::{self, MIB, Overhead, Rules};
use crate::network::Attachment;
use crate::store::Record;
use crate::validate::FieldError;
use crate::volume;

const NO_CONSOLE: &str = "a container has no console";

/// What is fixed about containers.
pub const RULES: Rules = Rules {
    // Less is not enough for the runtime's own first steps.
    memory_min_bytes: 6 * MIB,
    memory_overhead: Overhead::NONE,
    memory_default_bytes: None,
    mounts: true,
    user_namespace: true,
    disk_size: false,
    memory_snapshots: false,
    no_console: Some(NO_CONSOLE),
    effect: |pointer, _, _| match pointer {
        "/limits/disk/size" => Err("the writable layer of a container cannot be bounded"),
        _ => Ok(Effect::Live),
    },
};

/// Containers of this host.
#[derive(Clone, Debug)]
pub struct ContainerDriver {
    engine: Arc<Engine>,
}

impl ContainerDriver {
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    async fn try_start(&self, record: &Record, await_client: bool) -> Result<Running, DriverError> {
        let engine = &self.engine;
        let mut phases = Phases::begin();
        let spec = &record.instance.spec;
        check_disk(&spec.limits, engine)?;
        let run = engine.prepare_directories(record)?;
        let image = engine
            .images
            .unpacked(&record.instance.image_digest)
            .map_err(|error| from_image(&error))?;
        let workload = Workload::new(spec, &image.config)?;
        let sources =
            volume::sources(&engine.paths.volumes(), &spec.mounts).map_err(DriverError::Field)?;
        phases.mark("image");

        let (asked, index, to_mount) = (spec.clone(), record.index, sources.clone());
        let (users, namespace) = blocking(move || Users::make(&asked, index, &to_mount)).await?;
        let users = users.map(Arc::new);
        phases.mark("users");

        let root = Root {
            layers: image.layers,
            state: engine.paths.instance_state(&record.instance.name),
            run: run.clone(),
            short: engine.paths.run.clone(),
            machine_id: machine_id::of_clone(&record.instance),
            user: workload.user.clone(),
        };
        let for_root = users.clone();
        // Neither needs the other, and both wait for the kernel.
        let ((attachment, network_us), (user, rootfs_us)) = tokio::join!(
            Phases::span(engine.attach(record, End::Namespace(namespace))),
            Phases::span(blocking(move || root.mount(for_root.as_deref()))),
        );
        let (attachment, user) = (attachment?, user?);
        phases.mark_spans(&[("network", network_us), ("rootfs", rootfs_us)]);

        let etc = run.join("etc");
        let root = users.as_ref().map_or(0, |users| users.range().first);
        write_etc(&etc, root, record, attachment.as_ref())
            .map_err(DriverError::io("writing the files of /etc"))?;
        let resources = to_resources(&spec.limits, engine)?;
        let config = config::config(&Parts {
            spec,
            name: &record.instance.name,
            workload: &workload,
            user: &user,
            users: users.as_deref(),
            cgroup_path: &engine.cgroup_path(&record.instance.name),
            resources: &resources,
            netns: attachment
                .as_ref()
                .and_then(|attachment| attachment.netns.as_deref()),
            etc: &etc,
            sources: &sources,
        });
        let launch = Launch {
            spec: config,
            executable: None,
            descriptors: Vec::new(),
            stdin: spec.stdin,
            await_client,
        };
        engine
            .launch(record, launch, phases, future::ready(Ok(())).boxed())
            .await
    }

    async fn steer(&self, record: &Record, control: Control) -> Result<(), DriverError> {
        let engine = &self.engine;
        match control {
            Control::AskToStop => {
                let image = engine
                    .images
                    .unpacked(&record.instance.image_digest)
                    .map_err(|error| from_image(&error))?;
                engine.signal(record, stop_signal(&image.config)).await
            }
            Control::Signal(signal) => engine.signal(record, signal).await,
            Control::Kill => engine.kill(record).await,
            Control::Pause => engine.freeze(record).await,
            Control::Resume => engine.thaw(record).await,
            Control::Apply(limits) => {
                check_disk(&limits, engine)?;
                let resources = to_resources(&limits, engine)?;
                engine.apply(record, resources).await
            }
        }
    }
}

impl Driver for ContainerDriver {
    fn start<'a>(
        &'a self,
        record: &'a Record,
        await_client: bool,
    ) -> BoxFuture<'a, Result<Running, DriverError>> {
        async move {
            let started = self.try_start(record, await_client).await;
            if started.is_err()
                && let Err(error) = self.engine.destroy(record, Extent::Run).await
            {
                // The first error is the one that explains.
                tracing::warn!(
                    error = chain(&error),
                    "a failed start left something behind"
                );
            }
            started
        }
        .boxed()
    }

    fn recover<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Recovered, DriverError>> {
        self.engine
            .recover(record, future::ready(Ok(())).boxed())
            .boxed()
    }

    fn control<'a>(
        &'a self,
        record: &'a Record,
        control: Control,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.steer(record, control).boxed()
    }

    fn open<'a>(
        &'a self,
        record: &'a Record,
        channel: Channel,
    ) -> BoxFuture<'a, Result<Session, DriverError>> {
        async move {
            match channel {
                Channel::Exec(request) => {
                    exec::open(&self.engine.paths, &record.instance.name, &request)
                }
                Channel::Attach { stdin } => {
                    self.engine
                        .attach_streams(record, stdin, convert::identity)
                        .await
                }
                Channel::Console { .. } => Err(DriverError::NoConsole(NO_CONSOLE)),
            }
        }
        .boxed()
    }

    fn stats<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Stats, DriverError>> {
        self.engine.stats(record).boxed()
    }

    fn destroy<'a>(
        &'a self,
        record: &'a Record,
        extent: Extent,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.engine.destroy(record, extent).boxed()
    }
}

fn to_resources(
    limits: &Limits,
    engine: &Engine,
) -> Result<oci_spec::runtime::LinuxResources, DriverError> {
    limits::to_oci(limits, Overhead::NONE, engine.disk, &engine.capacity).map_err(|error| {
        DriverError::Helper {
            action: "putting limits into OCI terms".to_owned(),
            message: error.to_string(),
        }
    })
}

/// A limit that cannot be kept is refused, not ignored.
fn check_disk(limits: &Limits, engine: &Engine) -> Result<(), DriverError> {
    let disk = &limits.disk;
    let rates = [
        ("/limits/disk/read_bps", disk.read_bps),
        ("/limits/disk/write_bps", disk.write_bps),
        ("/limits/disk/read_iops", disk.read_iops),
        ("/limits/disk/write_iops", disk.write_iops),
    ];
    match rates.iter().find(|(_, rate)| rate.is_some()) {
        Some((field, _)) if engine.disk.is_none() => Err(DriverError::Field(
            FieldError::new(
                *field,
                "hostd's state directory is not on a disk that can be limited",
            )
            .hint("put --state-dir on a block device, or use isolation `vm`"),
        )),
        _ => Ok(()),
    }
}

/// Writes the files for /etc, which are the user `root`'s.
fn write_etc(
    etc: &Path,
    root: u32,
    record: &Record,
    attachment: Option<&Attachment>,
) -> std::io::Result<()> {
    fs::create_dir_all(etc)?;
    let instance = &record.instance;
    let hostname = instance.spec.hostname.as_deref().unwrap_or(&instance.name);
    let address = attachment.map_or(Ipv4Addr::LOCALHOST, |attachment| attachment.address);
    let hosts = format!("127.0.0.1\tlocalhost\n::1\tlocalhost\n{address}\t{hostname}\n");
    let resolvers = attachment
        .map(|attachment| attachment.dns.as_slice())
        .unwrap_or_default();
    let resolv: String = resolvers
        .iter()
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    let hostname = format!("{hostname}\n");
    for (name, text) in [
        ("hostname", hostname),
        ("hosts", hosts),
        ("resolv.conf", resolv),
    ] {
        let path = etc.join(name);
        fs::write(&path, text)?;
        std::os::unix::fs::chown(&path, Some(root), Some(root))?;
    }
    Ok(())
}

/// The image store's errors, as far as a start can meet them.
pub(super) fn from_image(error: &ImageError) -> DriverError {
    if matches!(error, ImageError::NotFound { .. }) {
        return DriverError::Field(
            FieldError::new("/image", chain(error)).hint("the image was removed; pull it again"),
        );
    }
    DriverError::Helper {
        action: "reading the image".to_owned(),
        message: chain(error),
    }
}
