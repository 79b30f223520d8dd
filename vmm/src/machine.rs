//! The machine: the list of its parts, put together in the order that the kernel likes best, and
//! run.

mod bare;
mod parts;

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::VcpuFd;

use self::bare::Bare;
use self::parts::Parts;
use crate::arch::x86_64::state::Saver;
use crate::arch::x86_64::{ArchError, acpi};
use crate::assembly::{self, AssemblyError, DeviceSetupError, NewDevice};
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
use crate::hotplug::{Hotplug, Worker};
use crate::inventory::Handle;
use crate::kvm::{self, KvmError, Vm};
use crate::layout;
use crate::listen::Listener;
use crate::memory::{Memory, MemoryError, MemoryPlan};
use crate::plan::{ListenPlan, Origin, Plan};
use crate::seccomp::{self, Filter, SeccompError, Thread};
use crate::signals::{self, SignalError};
use crate::snapshot::memory::{MemoryFileError, Region};
use crate::snapshot::take::Snapshotter;
use crate::snapshot::thread::SnapshotThread;
use crate::snapshot::written::Written;
use crate::terminal::RawTerminal;
use crate::vcpu::{VcpuError, VcpuThreads, Vcpus};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::mem::{Mem, MemHandle};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::state::StateError;

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
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
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
        let early = Early::new(plan.cpus.count, options)?;
        let kvm = kvm::open(&plan.kvm)?;
        let memory = memory(&plan)?;
        generation::renew(&memory.all)?;
        let written = written(&plan, &memory);
        let vm = Arc::new(Vm::new(&kvm, memory.all, &written.tracked)?);
        let virtio = VirtioDevices::new(&mut plan, &early.reports)?;
        let saved_port = plan.saved().map(|state| state.devices.serial.clone());
        let transport = plan.spec.transport;
        let mut parts = Parts::new(vm.clone(), early.exit, early.reports, plan.spec)?;
        let (console, terminal) = parts.add_serial_port(plan.console, saved_port.as_ref())?;
        let power_button = parts.add_power()?;
        let generation = parts.line(layout::GENERATION_GSI)?;
        parts.add_boot_timer(options.boot_timer);
        parts.add_all_virtio(virtio.devices, &plan.windows)?;
        let io_apic = parts.finish();

        let fds = create_vcpus(&vm, plan.cpus.count)?;
        let bare = Bare {
            kvm: &kvm,
            vm: &vm,
            boot_memory: &memory.boot,
            vcpus: &fds,
            cpus: &plan.cpus,
            transport,
            windows: &plan.windows,
            parts: &parts,
            io_apic: &io_apic,
            generation: &generation,
        };
        let begun = bare.begin(plan.origin)?;
        let filters = early.filters;
        let vcpus = start_threads(early.vcpus, fds, &mut parts, filters)?;
        if let Some(listen) = plan.control {
            let snapshotter = Snapshotter {
                exit: parts.exit.clone(),
                vm: vm.clone(),
                vcpus: vcpus.clone(),
                saver: Saver::new(&kvm, begun.features)?,
                io_apic,
                serial: console.port.clone(),
                readiness: parts.reports.readiness().clone(),
                inventory: parts.inventory.clone(),
                slots: begun.hears.then(|| parts.slots()).flatten(),
                origins: memory.origins,
                written,
                last: Mutex::new(begun.from),
            };
            let snapshots = start_snapshots(snapshotter, filters)?;
            let controls = Controls {
                hotplug: start_hotplug(&mut parts, vm, begun.hears, filters)?,
                inventory: parts.inventory,
                vcpus: vcpus.clone(),
                exit: parts.exit.clone(),
                readiness: parts.reports.readiness().clone(),
                power_button,
                memory: memory_controls(&plan.memory, virtio.balloon, virtio.mem),
                snapshots: Some(snapshots),
                console: Some(console.shown()),
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

/// Starts the thread that makes devices while the machine runs, which waits, if there is PCI.
fn start_hotplug(
    parts: &mut Parts,
    vm: Arc<Vm>,
    guest_hears: bool,
    filters: Filters,
) -> Result<Option<Hotplug>, MachineError> {
    let Some(pci) = parts.pci.take() else {
        return Ok(None);
    };
    let worker = Worker {
        vm,
        exit: parts.exit.clone(),
        bus: pci.bus,
        inventory: parts.inventory.clone(),
        slots: pci.slots,
        guest_hears,
        enter: filters.enter(Thread::Device, &parts.exit),
    };
    let enter = filters.enter(Thread::Hotplug, &parts.exit);
    let thread = Hotplug::start(worker, pci.departures, enter);
    thread
        .map(Some)
        .map_err(host("start the thread of devices"))
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
    devices: Vec<NewDevice>,
    balloon: Option<BalloonHandle>,
    mem: Option<MemHandle>,
}

impl VirtioDevices {
    /// The list, in the order of the plan's windows.
    fn new(plan: &mut Plan, reports: &Reports) -> Result<Self, MachineError> {
        let mut list = Self::default();
        for disk in plan.disks.drain(..) {
            let name = disk.name.clone();
            list.push(name, assembly::disk(disk))?;
        }
        for net in plan.nets.drain(..) {
            let name = net.name.clone();
            list.push(name, assembly::net(net))?;
        }
        if let Some(plan) = plan.vsock.take() {
            let vsock = assembly::vsock(plan).map(|vsock| vsock.with_reports(reports.clone()));
            list.add("vsock".to_owned(), vsock, |_, device| {
                Handle::Vsock(device.counters())
            })?;
        }
        if plan.rng {
            list.add("rng".to_owned(), Ok(Rng::new()), |_, device| {
                Handle::Rng(device.counters())
            })?;
        }
        if let Some(spec) = plan.balloon {
            let balloon = Balloon::new(spec, &plan.memory).map_err(DeviceSetupError::Event);
            list.add("balloon".to_owned(), balloon, |list, device| {
                list.balloon = Some(device.handle());
                Handle::Other
            })?;
        }
        if let Some(range) = plan.memory.hotplug() {
            let mem = Mem::new(range).map_err(DeviceSetupError::Event);
            list.add("mem".to_owned(), mem, |list, device| {
                list.mem = Some(device.handle());
                Handle::Other
            })?;
        }
        for (index, image) in plan.images.drain(..).enumerate() {
            list.add(
                format!("pmem{index}"),
                Ok(Pmem::new(image.range)),
                |_, _| Handle::Other,
            )?;
        }
        Ok(list)
    }

    fn add<D: VirtioDevice + 'static>(
        &mut self,
        name: String,
        device: Result<D, DeviceSetupError>,
        keep: impl FnOnce(&mut Self, &D) -> Handle,
    ) -> Result<(), MachineError> {
        let device = device.map(|device| NewDevice {
            name: name.clone(),
            handle: keep(self, &device),
            device: Box::new(device),
        });
        self.push(name, device)
    }

    fn push(
        &mut self,
        name: String,
        device: Result<NewDevice, DeviceSetupError>,
    ) -> Result<(), MachineError> {
        let device = device.map_err(|source| AssemblyError::Device { name, source })?;
        self.devices.push(device);
        Ok(())
    }
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
    ranges.extend(plan.images.iter().map(|image| image.range.clone()));
    let regions: Vec<_> = ranges.into_iter().map(Region::from).collect();
    let (all, origins) =
        snapshot
            .loaded
            .map_memory(&regions, plan.memory.huge_pages, &plan.images)?;
    Ok(Memory {
        boot: all.clone(),
        all,
        origins,
    })
}

/// What snapshots are to know of what guest and devices write.
fn written(plan: &Plan, memory: &Memory) -> Written {
    let runs = match &plan.origin {
        Origin::Kernel(_) => None,
        Origin::Snapshot(snapshot) => Some(snapshot.loaded.written()),
    };
    let all = plan.spec.memory.track_dirty;
    Written::new(memory, all, runs.into_iter().flatten())
}
