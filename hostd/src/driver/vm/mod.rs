//! The driver for virtual machines: a container whose one process is a VMM, with an agent in the
//! guest.

mod apply;
mod console;
mod control;
mod disk;
mod end;
mod guest;
mod machine;
mod resumed;
mod snapshots;
mod stats;
mod stop;

use std::convert;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent::initramfs;
use agent::protocol::{self, Request as GuestRequest};
use futures::FutureExt;
use futures::future::BoxFuture;
use jiff::Timestamp;
use nix::sys::signal::Signal;
use tokio::time;
use vmm::control::{MachineState, Request as MachineRequest, Response as MachineResponse};

use self::console::Consoles;
use self::machine::Parts;
use super::confined::{End, Engine, Launch, Phases, blocking};
use super::container::from_image;
use super::monitor::Monitor;
use super::workload::{Workload, stop_signal};
use super::{
    Channel, Control, Driver, DriverError, Extent, Recovered, Running, Session, chain, machine_id,
    session,
};
use crate::api::types::{Effect, Limits, Stats};
use crate::limits::{self, MIB, Overhead, Rules};
use crate::network::{Attachment, format_mac};
use crate::store::Record;

/// What a VM without `memory.max` has.
const MEMORY_DEFAULT_BYTES: u64 = 512 * MIB;
/// What a VM without `disk.size` has; sparse, so that it costs what is used.
const DISK_DEFAULT_BYTES: u64 = 10 << 30;
/// What a VMM takes beside its guest's memory: itself and its buffers; and the tables that map the
/// guest, the process's and KVM's, which take 8 bytes each for a page of 4 KiB where there are no
/// larger ones.
const VMM_OVERHEAD: Overhead = Overhead {
    fixed_bytes: 64 * MIB,
    per_256_bytes: 1,
};
/// A machine that has hung up ends within milliseconds; then its monitor takes its container down.
const END_DEADLINE: Duration = Duration::from_secs(5);

/// A guest that does not stop its workload within this time is paused all the same.
const PAUSE_DEADLINE: Duration = Duration::from_secs(5);

/// What is fixed about virtual machines.
pub const RULES: Rules = Rules {
    memory_min_bytes: 64 * MIB,
    memory_overhead: VMM_OVERHEAD,
    memory_default_bytes: Some(MEMORY_DEFAULT_BYTES),
    mounts: false,
    user_namespace: false,
    disk_size: true,
    memory_snapshots: true,
    no_console: None,
    effect,
};

fn effect(pointer: &str, before: &Limits, after: &Limits) -> Result<Effect, &'static str> {
    match pointer {
        "/limits/disk/size" => Err("the size of a disk is fixed at creation"),
        // The time of the processors that it has can change, their number cannot.
        "/limits/cpu/cores" if limits::vcpu_count(after) != limits::vcpu_count(before) => {
            Ok(Effect::AtRestart)
        }
        _ => Ok(Effect::Live),
    }
}

/// Virtual machines of this host.
#[derive(Clone, Debug)]
pub struct VmDriver {
    engine: Arc<Engine>,
    consoles: Consoles,
}

impl VmDriver {
    pub fn new(engine: Arc<Engine>) -> Self {
        Self {
            engine,
            consoles: Consoles::default(),
        }
    }

    async fn try_start(&self, record: &Record, await_client: bool) -> Result<Running, DriverError> {
        let engine = &self.engine;
        let mut phases = Phases::begin();
        check_host(engine)?;
        let spec = &record.instance.spec;
        let run = engine.prepare_directories(record)?;
        let image = engine
            .images
            .unpacked(&record.instance.image_digest)
            .map_err(|error| from_image(&error))?;
        let workload = Workload::new(spec, &image.config)?;
        let image_disk = engine
            .images
            .disk(&record.instance.image_digest)
            .await
            .map_err(|error| from_image(&error))?;
        phases.mark("image");

        let writable = engine
            .paths
            .instance_state(&record.instance.name)
            .join("disk");
        let size = spec.limits.disk.size.unwrap_or(DISK_DEFAULT_BYTES);
        let (templates, path) = (engine.paths.disk_templates(), writable.clone());
        blocking(move || disk::ensure(&templates, &path, size)).await?;
        phases.mark("disk");

        let uid = machine::uid(record.index);
        let attachment = engine.attach(record, End::Tap { owner_uid: uid }).await?;
        phases.mark("network");

        let segment = run.join("segment.cpio");
        let signal = stop_signal(&image.config);
        let config = agent_config(
            record,
            &workload,
            signal,
            image_disk.fs,
            attachment.as_ref(),
        );
        write_segment(&segment, &config)?;
        let parts = Parts {
            kernel: engine.paths.guest_kernel(),
            initramfs: engine.paths.guest_initramfs(),
            segment,
            image: image_disk.path,
            writable,
            net: attachment
                .and_then(|attachment| Some((attachment.tap?, format_mac(attachment.mac)))),
            run: run.clone(),
        };
        let mut launch = self.to_launch(record, parts, &config)?;
        launch.await_client = await_client;
        engine.launch(record, launch, phases, ready(run)).await
    }

    /// The VMM in its container; it boots, or goes on from a machine that was kept. `config` is what
    /// the guest is to know.
    fn to_launch(
        &self,
        record: &Record,
        parts: Parts,
        config: &protocol::Config,
    ) -> Result<Launch, DriverError> {
        let engine = &self.engine;
        let (spec, run) = (&record.instance.spec, self.run(record));
        let (mut machine, mut descriptors) =
            machine::machine(parts, &spec.limits, engine.capacity.memory_bytes);
        let kept = self.take_machine(record)?;
        if let Some(kept) = &kept {
            machine = resumed::prepare(&run, kept, &machine, &mut descriptors)?;
            resumed::prepare_welcome(&run, record, config)?;
        }
        let text = serde_json::to_vec(&machine).expect("paths of ours are UTF-8");
        fs::write(machine::machine_file(&run), text)
            .map_err(DriverError::io("writing the machine's description"))?;
        let memory = machine::reachable_memory_bytes(&machine, &spec.limits);
        let resources = self.to_resources(&spec.limits, machine.cpus.count, memory)?;
        let cgroup_path = engine.cgroup_path(&record.instance.name);
        let mut config = machine::config(machine::uid(record.index), &cgroup_path, &resources);
        if kept.is_some() {
            config = resumed::with_restore(config);
        }
        Ok(Launch {
            spec: config,
            executable: Some(engine.paths.vmm_program()),
            descriptors: descriptors.into_inner(),
            stdin: spec.stdin,
            await_client: false,
        })
    }

    fn run(&self, record: &Record) -> PathBuf {
        self.engine.paths.instance_run(&record.instance.name)
    }

    fn to_resources(
        &self,
        limits: &Limits,
        vcpus: u8,
        memory: u64,
    ) -> Result<oci_spec::runtime::LinuxResources, DriverError> {
        let limits = machine::cgroup_limits(limits, vcpus, memory);
        limits::to_oci(&limits, VMM_OVERHEAD, None, &self.engine.capacity).map_err(|error| {
            DriverError::Helper {
                action: "putting limits into OCI terms".to_owned(),
                message: error.to_string(),
            }
        })
    }

    async fn steer(&self, record: &Record, control: Control) -> Result<(), DriverError> {
        let engine = &self.engine;
        match control {
            Control::AskToStop => {
                let image = engine
                    .images
                    .unpacked(&record.instance.image_digest)
                    .map_err(|error| from_image(&error))?;
                stop::ask(&self.run(record), stop_signal(&image.config)).await
            }
            Control::Signal(signal) => self.signal(record, signal).await,
            Control::Kill => engine.kill(record).await,
            Control::Pause => self.pause(record).await,
            Control::Resume => self.resume(record).await,
            Control::Apply(limits) => self.apply(record, &limits).await,
        }
    }

    async fn signal(&self, record: &Record, signal: Signal) -> Result<(), DriverError> {
        let request = GuestRequest::Signal {
            signal: signal as i32,
        };
        self.ask_guest(record, &request).await.map(|_| ())
    }

    async fn ask_guest(
        &self,
        record: &Record,
        request: &GuestRequest,
    ) -> Result<protocol::Response, DriverError> {
        let run = self.engine.paths.instance_run(&record.instance.name);
        guest::ask(&machine::agent_socket(&run), request).await
    }

    async fn ask_machine(
        &self,
        record: &Record,
        request: &MachineRequest,
    ) -> Result<(), DriverError> {
        let run = self.engine.paths.instance_run(&record.instance.name);
        control::ask(&machine::control_socket(&run), request)
            .await
            .map(|_| ())
    }

    /// Whether the machine's processors are held. The machine is asked, and not its control group,
    /// which is never frozen: KVM of Linux before 6.14 keeps a kernel thread in it that does not
    /// freeze, and a machine whose processors are held does nothing that a freezer could stop.
    async fn is_paused(&self, record: &Record) -> Result<bool, DriverError> {
        let run = self.engine.paths.instance_run(&record.instance.name);
        let state = control::ask(&machine::control_socket(&run), &MachineRequest::State {}).await?;
        Ok(matches!(
            state,
            MachineResponse::State {
                state: MachineState::Paused,
                ..
            }
        ))
    }

    /// Stops the guest's workload and then the machine: whoever goes on from the memory of the paused
    /// machine is told who it is before its workload goes on.
    async fn pause(&self, record: &Record) -> Result<(), DriverError> {
        let socket = machine::agent_socket(&self.run(record));
        let hold = GuestRequest::Hold { sync: false };
        // A guest that does not answer is paused all the same.
        if let Err(error) = guest::ask_patiently(&socket, &hold, PAUSE_DEADLINE).await {
            tracing::warn!(
                name = record.instance.name,
                error = chain(&error),
                "the guest was paused and did not stop its workload before"
            );
        }
        let paused = self.ask_machine(record, &MachineRequest::Pause {}).await;
        if paused.is_err() {
            self.release(record).await;
        }
        paused
    }

    /// Lets the machine go on, and tells the guest what could not be told while it was paused.
    async fn resume(&self, record: &Record) -> Result<(), DriverError> {
        self.ask_machine(record, &MachineRequest::Resume {}).await?;
        let request = GuestRequest::SetPidsMax {
            max: record.instance.spec.limits.pids.max,
        };
        // It runs on in any case.
        if let Err(error) = self.ask_guest(record, &request).await {
            tracing::warn!(
                name = record.instance.name,
                error = chain(&error),
                "the guest was resumed and did not take its limit of processes"
            );
        }
        // A pause has held it, or a snapshot that was cut off.
        self.release(record).await;
        Ok(())
    }
}

impl Driver for VmDriver {
    fn start<'a>(
        &'a self,
        record: &'a Record,
        await_client: bool,
    ) -> BoxFuture<'a, Result<Running, DriverError>> {
        async move {
            let started = self.try_start(record, await_client).await;
            self.forget_machine(record);
            if started.is_err()
                && let Err(error) = self.engine.destroy(record, Extent::Run).await
            {
                // The first error is the one that explains.
                tracing::warn!(
                    error = chain(&error),
                    "a failed start left something behind"
                );
            }
            started.map(|running| end::with_exit_status(running, self.run(record)))
        }
        .boxed()
    }

    fn recover<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Recovered, DriverError>> {
        async move {
            let run = self.run(record);
            Ok(
                match self.engine.recover(record, ready(run.clone())).await? {
                    Recovered::Live(mut running) => {
                        running.paused = self.is_paused(record).await?;
                        Recovered::Live(end::with_exit_status(running, run))
                    }
                    Recovered::Ended(ended) => Recovered::Ended(end::of_workload(ended, &run)),
                },
            )
        }
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
                    let run = self.engine.paths.instance_run(&record.instance.name);
                    let socket = machine::agent_socket(&run);
                    let connection = guest::exec(&socket, *request).await?;
                    Ok(session::over_lines(connection, convert::identity))
                }
                Channel::Attach { stdin } => {
                    let run = self.engine.paths.instance_run(&record.instance.name);
                    let amend = move |frame| end::of_stream(frame, &run);
                    self.engine.attach_streams(record, stdin, amend).await
                }
                Channel::Console { input } => {
                    let name = &record.instance.name;
                    let socket = machine::control_socket(&self.run(record));
                    console::open(&self.consoles, name, &socket, input).await
                }
            }
        }
        .boxed()
    }

    fn stats<'a>(&'a self, record: &'a Record) -> BoxFuture<'a, Result<Stats, DriverError>> {
        self.count(record).boxed()
    }

    fn destroy<'a>(
        &'a self,
        record: &'a Record,
        extent: Extent,
    ) -> BoxFuture<'a, Result<(), DriverError>> {
        self.engine.destroy(record, extent).boxed()
    }
}

/// A host without KVM, or without a guest kernel, is told of before anything is made.
fn check_host(engine: &Engine) -> Result<(), DriverError> {
    if !Path::new("/dev/kvm").exists() {
        return Err(DriverError::Unavailable {
            message: "there is no /dev/kvm".to_owned(),
            hint: "load kvm_intel or kvm_amd, and see `hostctl doctor`",
        });
    }
    for file in [engine.paths.guest_kernel(), engine.paths.guest_initramfs()] {
        if !file.exists() {
            return Err(DriverError::Unavailable {
                message: format!("there is no {}", file.display()),
                hint: "install the guest's kernel and initramfs, or name their place with --guest-dir",
            });
        }
    }
    Ok(())
}

fn agent_config(
    record: &Record,
    workload: &Workload,
    stop_signal: Signal,
    image_fs: &str,
    attachment: Option<&Attachment>,
) -> protocol::Config {
    let spec = &record.instance.spec;
    let hostname = spec
        .hostname
        .clone()
        .unwrap_or_else(|| record.instance.name.clone());
    protocol::Config {
        process: protocol::Process {
            args: workload.args.clone(),
            env: workload.environment(),
            user: workload.user.clone(),
            working_dir: Some(workload.working_dir.clone()),
            tty: spec.tty,
            stdin: spec.stdin,
        },
        image_serial: machine::IMAGE_SERIAL.to_owned(),
        image_fs: image_fs.to_owned(),
        writable_serial: machine::WRITABLE_SERIAL.to_owned(),
        network: attachment.map(|attachment| protocol::Network {
            mac: format_mac(attachment.mac),
            address: attachment.address,
            prefix_len: attachment.prefix_len,
            gateway: attachment.gateway,
            dns: attachment.dns.clone(),
            hosts: vec![(attachment.address.into(), hostname.clone())],
        }),
        hostname,
        pids_max: spec.limits.pids.max,
        clock_ns: i64::try_from(Timestamp::now().as_nanosecond()).ok(),
        stop_signal: Some(stop_signal as i32),
        machine_id: machine_id::of_clone(&record.instance),
    }
}

fn write_segment(path: &Path, config: &protocol::Config) -> Result<(), DriverError> {
    let written = initramfs::write_config_segment(config, Vec::new());
    let bytes = written.map_err(|error| DriverError::Helper {
        action: "writing the agent's configuration".to_owned(),
        message: chain(&error),
    })?;
    fs::write(path, bytes).map_err(DriverError::io("writing the agent's configuration"))
}

/// Done once the guest says that its workload runs; an error quotes the console.
fn ready(run: PathBuf) -> BoxFuture<'static, Result<(), DriverError>> {
    async move {
        let told = match control::wait_ready(&machine::control_socket(&run)).await {
            Ok(()) => resumed::welcome(&run).await,
            Err(error) => Err(error),
        };
        match told {
            Ok(()) => Ok(()),
            Err(error) => {
                // Its last act is to write down why it ended. One that hangs is explained as it is.
                let ended = Monitor::of(run.clone()).ended();
                let ended = time::timeout(END_DEADLINE, ended).await.ok();
                Err(end::explain(&run, &error, ended.as_ref()))
            }
        }
    }
    .boxed()
}
