//! The machine: the list of its parts, put together in the order that the kernel likes best, and
//! run.

mod bare;
mod parts;

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;
use nix::errno::Errno;

use self::bare::Bare;
use self::parts::Parts;
use crate::arch::x86_64::state::Saver;
use crate::arch::x86_64::{ArchError, acpi};
use crate::boot::BootError;
use crate::control::ExitStatus;
use crate::control::controls::Controls;
use crate::control::memory::MemoryControls;
use crate::control::server::Server;
use crate::devices::boot_timer::Start;
use crate::devices::generation::{self, GenerationError};
use crate::devices::guest_status::{Readiness, Reports};
use crate::events::EventLoop;
use crate::exit::ExitSwitch;
use crate::footprint;
use crate::kvm::{self, KvmError, Vm};
use crate::layout;
use crate::listen::Listener;
use crate::memory::{Memory, MemoryError, MemoryPlan};
use crate::plan::{DiskPlan, ListenPlan, NetPlan, Origin, Plan, TapPlan, VsockPlan};
use crate::seccomp::{self, Filter, SeccompError, Thread};
use crate::signals::{self, SignalError};
use crate::snapshot::memory::{MemoryFileError, Region};
use crate::snapshot::take::Snapshotter;
use crate::snapshot::thread::SnapshotThread;
use crate::terminal::RawTerminal;
use crate::vcpu::{VcpuError, VcpuThreads, Vcpus};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::block::{Block, BlockError, BlockHandle, BlockOptions};
use crate::virtio::mem::{Mem, MemHandle};
use crate::virtio::net::{Net, NetHandle};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::state::StateError;
use crate::virtio::tap::{Tap, TapError};
use crate::virtio::vsock::{Vsock, VsockError, VsockHost};

/// What the command line decides, apart from the specification.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Print how long the guest took to boot since then.
    pub boot_timer: Option<Start>,
    /// Let every thread make every system call, which is for finding out what it needs.
    pub no_seccomp: bool,
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("cannot {action}")]
    Host {
        /// What was attempted.
        action: &'static str,
        source: io::Error,
    },
    #[error("`/control`: cannot listen on {path}; name a path that nobody uses")]
    Listen { path: String, source: io::Error },
    #[error("device `{name}` cannot be made")]
    Device {
        name: String,
        source: DeviceSetupError,
    },
    #[error("device `{name}` asks for queues that cannot be")]
    Queues {
        name: String,
        source: virtio_queue::Error,
    },
    #[error("{part} cannot become what was saved")]
    Restore { part: String, source: StateError },
    #[error("the guest's memory cannot become what was saved")]
    RestoreMemory(#[from] MemoryFileError),
    #[error(transparent)]
    Generation(#[from] GenerationError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Arch(#[from] ArchError),
    #[error(transparent)]
    Acpi(#[from] acpi::AcpiError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Signal(#[from] SignalError),
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
}

/// Why a virtio device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeviceSetupError {
    #[error(transparent)]
    Block(#[from] BlockError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error("its socket cannot be listened on")]
    Listen(#[source] io::Error),
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error("its event cannot be made")]
    Event(#[source] Errno),
}

fn host(action: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Host { action, source }
}

fn unrestorable(part: impl Into<String>) -> impl FnOnce(StateError) -> MachineError {
    let part = part.into();
    move |source| MachineError::Restore { part, source }
}

/// A machine that is ready to run.
pub struct Machine {
    // Field order is drop order: processors stop before what they use goes.
    vcpus: Arc<Vcpus>,
    events: EventLoop,
    exit: ExitSwitch,
    filters: Filters,
    missing_features: Vec<&'static str>,
    /// It waits for somebody to resume it.
    paused: bool,
    /// Put back to what it was when the machine is gone.
    _terminal: Option<RawTerminal>,
}

opaque_debug!(Machine);

impl Machine {
    /// Puts the machine of `plan` together. Its processors wait for [`run`](Self::run).
    pub fn build(mut plan: Plan, options: Options) -> Result<Machine, MachineError> {
        let early = Early::new(plan.cpus, options)?;
        let kvm = kvm::open(&plan.kvm)?;
        let memory = memory(&plan)?;
        generation::renew(&memory.all)?;
        let vm = Arc::new(Vm::new(&kvm, memory.all, plan.spec.memory.track_dirty)?);
        let virtio = VirtioDevices::new(&mut plan, &early.reports)?;
        let mut parts = Parts::new(vm.clone(), early.exit, early.reports, plan.spec.transport)?;
        let saved_port = plan.saved().map(|state| state.devices.serial.clone());
        let (serial, terminal) = parts.add_serial_port(plan.console, saved_port.as_ref())?;
        let power_button = parts.add_power()?;
        let generation = parts.line(layout::GENERATION_GSI)?;
        parts.add_boot_timer(options.boot_timer);
        parts.add_all_virtio(virtio.devices, &plan.windows)?;
        let io_apic = parts.finish();

        let fds = create_vcpus(&vm, plan.cpus)?;
        let bare = Bare {
            kvm: &kvm,
            vm: &vm,
            boot_memory: &memory.boot,
            vcpus: &fds,
            template: plan.cpu_template,
            transport: plan.spec.transport,
            windows: &plan.windows,
            parts: &parts,
            io_apic: &io_apic,
            generation: &generation,
        };
        let begun = bare.begin(plan.origin)?;
        let filters = early.filters;
        let vcpus = start_threads(early.vcpus, fds, &mut parts, filters)?;
        if let Some(listen) = plan.control {
            let counters = parts.counters();
            let snapshotter = Snapshotter {
                exit: parts.exit.clone(),
                vm,
                vcpus: vcpus.clone(),
                saver: Saver::new(&kvm, begun.features)?,
                io_apic,
                serial,
                readiness: parts.reports.readiness().clone(),
                transports: parts.transports,
                functions: parts.functions,
                windows: plan.windows,
                spec: plan.spec,
                anonymous: memory.anonymous,
                last: Mutex::new(begun.from),
            };
            let snapshots = start_snapshots(snapshotter, filters)?;
            let controls = Controls {
                counters,
                vcpus: vcpus.clone(),
                exit: parts.exit.clone(),
                readiness: parts.reports.readiness().clone(),
                power_button,
                disks: virtio.disks,
                nets: virtio.nets,
                memory: memory_controls(&plan.memory, virtio.balloon, virtio.mem),
                snapshots: Some(snapshots),
            };
            serve(&mut parts.events, control_listener(listen)?, controls)?;
        }
        Ok(Machine {
            vcpus,
            events: parts.events,
            exit: parts.exit,
            filters,
            missing_features: begun.missing_features,
            paused: begun.paused,
            _terminal: terminal,
        })
    }

    /// What the host lacks of the processor that was asked for.
    pub fn missing_features(&self) -> &[&'static str] {
        &self.missing_features
    }

    /// Runs the machine to its end, and says why it ended.
    pub fn run(mut self) -> ExitStatus {
        if !self.paused {
            self.vcpus.resume();
        }
        // Memory that is not given back is no reason not to run.
        let _ = footprint::forget_start(&mut self.events);
        // Nothing that guests or clients do is looked at before, and there is no way back.
        if let Err(error) = self.filters.lock_event_loop() {
            self.exit.fail(&error);
        }
        if let Err(error) = self.events.run() {
            self.exit.fail(&error);
        }
        self.vcpus.finish();
        let status = self.exit.status();
        status.expect("the event loop ends with the machine")
    }
}

/// What comes before all else: processors' threads, which take a while to start, and what must be
/// there before they are.
struct Early {
    exit: ExitSwitch,
    reports: Reports,
    filters: Filters,
    vcpus: VcpuThreads,
}

impl Early {
    fn new(cpus: u8, options: Options) -> Result<Self, MachineError> {
        seccomp::prepare_allocator();
        kvm::prepare_interrupts()?;
        signals::hold_back()?;
        let exit = ExitSwitch::new().map_err(host("make an event"))?;
        let readiness = Readiness::new().map_err(host("make an event"))?;
        let filters = Filters {
            absent: options.no_seccomp,
        };
        let vcpus = VcpuThreads::start(cpus, &filters.enter(Thread::Vcpu, &exit))?;
        Ok(Self {
            reports: Reports::new(exit.clone(), readiness),
            exit,
            filters,
            vcpus,
        })
    }
}

/// What threads may do: everything, if there are none.
#[derive(Clone, Copy)]
struct Filters {
    absent: bool,
}

impl Filters {
    fn of(self, thread: Thread) -> Option<Filter> {
        (!self.absent).then(|| Filter::new(thread))
    }

    fn lock_event_loop(self) -> Result<(), SeccompError> {
        let filter = self.of(Thread::EventLoop);
        filter.as_ref().map_or(Ok(()), Filter::install)
    }

    /// What such a thread does first.
    fn enter(self, thread: Thread, exit: &ExitSwitch) -> Arc<dyn Fn() + Send + Sync> {
        let (filter, exit) = (self.of(thread), exit.clone());
        Arc::new(move || {
            if let Some(Err(error)) = filter.as_ref().map(Filter::install) {
                exit.fail(&error);
            }
        })
    }
}

fn create_vcpus(vm: &Vm, count: u8) -> Result<Vec<VcpuFd>, KvmError> {
    (0..count).map(|id| vm.create_vcpu(id)).collect()
}

fn memory_controls(
    memory: &MemoryPlan,
    balloon: Option<BalloonHandle>,
    mem: Option<MemHandle>,
) -> MemoryControls {
    MemoryControls {
        boot_bytes: memory.boot_bytes,
        balloon,
        mem,
    }
}

/// Starts the thread that writes snapshots, which waits.
fn start_snapshots(
    snapshotter: Snapshotter,
    filters: Filters,
) -> Result<SnapshotThread, MachineError> {
    let enter = filters.enter(Thread::Snapshot, &snapshotter.exit);
    SnapshotThread::start(snapshotter, enter).map_err(host("start the thread of snapshots"))
}

/// Starts the devices' threads, and gives the processors to theirs, where they wait.
fn start_threads(
    threads: VcpuThreads,
    vcpus: Vec<VcpuFd>,
    parts: &mut Parts,
    filters: Filters,
) -> Result<Arc<Vcpus>, MachineError> {
    if parts.events.has_branches() {
        let enter = filters.enter(Thread::Device, &parts.exit);
        parts
            .events
            .start_branches(&enter)
            .map_err(host("start a device's thread"))?;
    }
    let buses = Arc::new(std::mem::take(&mut parts.buses));
    Ok(Arc::new(Vcpus::new(threads, vcpus, &buses, &parts.exit)))
}

/// Puts the control socket on the event loop.
fn serve(
    events: &mut EventLoop,
    listener: Listener,
    controls: Controls,
) -> Result<(), MachineError> {
    let source = events.reserve();
    let server = Server::new(listener, controls, events.poller(), source)
        .map_err(host("serve the control socket"))?;
    events.attach(source, Arc::new(server));
    Ok(())
}

/// Virtio devices, each with its name, and what the control socket keeps of them.
#[derive(Default)]
struct VirtioDevices {
    devices: Vec<(String, Box<dyn VirtioDevice>)>,
    disks: Vec<BlockHandle>,
    nets: Vec<NetHandle>,
    balloon: Option<BalloonHandle>,
    mem: Option<MemHandle>,
}

impl VirtioDevices {
    /// The list, in the order of the plan's windows.
    fn new(plan: &mut Plan, reports: &Reports) -> Result<Self, MachineError> {
        let mut list = Self::default();
        for (index, disk) in plan.disks.drain(..).enumerate() {
            list.add(format!("disk{index}"), block(disk), |list, device| {
                list.disks.push(device.handle());
            })?;
        }
        for (index, net) in plan.nets.drain(..).enumerate() {
            list.add(format!("net{index}"), network(net), |list, device| {
                list.nets.push(device.handle());
            })?;
        }
        if let Some(plan) = plan.vsock.take() {
            let vsock = vsock(plan).map(|vsock| vsock.with_reports(reports.clone()));
            list.add("vsock".to_owned(), vsock, |_, _| ())?;
        }
        if plan.rng {
            list.add("rng".to_owned(), Ok(Rng::new()), |_, _| ())?;
        }
        if let Some(spec) = plan.balloon {
            let balloon = Balloon::new(spec, &plan.memory).map_err(DeviceSetupError::Event);
            list.add("balloon".to_owned(), balloon, |list, device| {
                list.balloon = Some(device.handle());
            })?;
        }
        if let Some(range) = plan.memory.hotplug() {
            let mem = Mem::new(range).map_err(DeviceSetupError::Event);
            list.add("mem".to_owned(), mem, |list, device| {
                list.mem = Some(device.handle());
            })?;
        }
        for (index, image) in plan.images.drain(..).enumerate() {
            list.add(
                format!("pmem{index}"),
                Ok(Pmem::new(image.range)),
                |_, _| (),
            )?;
        }
        Ok(list)
    }

    fn add<D: VirtioDevice + 'static>(
        &mut self,
        name: String,
        device: Result<D, DeviceSetupError>,
        keep: impl FnOnce(&mut Self, &D),
    ) -> Result<(), MachineError> {
        match device {
            Ok(device) => {
                keep(self, &device);
                self.devices.push((name, Box::new(device)));
                Ok(())
            }
            Err(source) => Err(MachineError::Device { name, source }),
        }
    }
}

fn block(plan: DiskPlan) -> Result<Block, DeviceSetupError> {
    let options = BlockOptions {
        read_only: plan.read_only,
        serial: plan.serial,
        limits: plan.limits,
    };
    Ok(Block::open(plan.top, plan.backing, options)?)
}

fn network(plan: NetPlan) -> Result<Net, DeviceSetupError> {
    let tap = match plan.tap {
        TapPlan::Name(name) => Tap::open(&name)?,
        TapPlan::Open(descriptor) => Tap::from_fd(descriptor)?,
    };
    Ok(Net::new(tap, plan.mac).with_mtu(plan.mtu))
}

fn vsock(plan: VsockPlan) -> Result<Vsock, DeviceSetupError> {
    let host = match plan.listen {
        ListenPlan::Path(path) => VsockHost::bind(&path),
        ListenPlan::Open(listener) => VsockHost::inherited(listener),
    };
    let host = host.map_err(DeviceSetupError::Listen)?;
    Ok(Vsock::new(plan.cid, host, plan.streams)?)
}

/// Where clients of the control socket come from.
fn control_listener(plan: ListenPlan) -> Result<Listener, MachineError> {
    match plan {
        ListenPlan::Open(socket) => Ok(Listener::inherited(socket)),
        ListenPlan::Path(path) => Listener::bind(&path).map_err(|source| MachineError::Listen {
            path: path.display().to_string(),
            source,
        }),
    }
}

/// The guest's memory: empty, or that of a snapshot.
fn memory(plan: &Plan) -> Result<Memory, MachineError> {
    let Origin::Snapshot(snapshot) = &plan.origin else {
        return Ok(Memory::new(&plan.memory, &plan.images)?);
    };
    let mut ranges = plan.memory.boot();
    ranges.extend(plan.memory.hotplug());
    // What the guest has written to an image is its own, so all of it is in the snapshot.
    ranges.extend(plan.images.iter().map(|image| image.range.clone()));
    let regions: Vec<_> = ranges.into_iter().map(Region::from).collect();
    let all = snapshot
        .loaded
        .map_memory(&regions, plan.memory.huge_pages)?;
    Ok(Memory {
        boot: all.clone(),
        all,
        // Pages that were not touched are the file's.
        anonymous: Vec::new(),
    })
}
