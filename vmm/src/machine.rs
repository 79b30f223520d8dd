//! The machine: the list of its parts, put together in the order that the kernel likes best, and
//! run.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::{self, ArchError, acpi};
use crate::boot::{self, BootError};
use crate::bus::BusDevice;
use crate::control::ExitStatus;
use crate::control::controls::Controls;
use crate::control::memory::MemoryControls;
use crate::control::server::Server;
use crate::devices::boot_timer::{BootTimer, Start};
use crate::devices::guest_status::{GuestStatus, Readiness as GuestReadiness};
use crate::devices::ioapic::IoApic;
use crate::devices::keyboard::KeyboardController;
use crate::devices::power::PowerRegisters;
use crate::devices::serial::SerialPort;
use crate::events::{EventLoop, event};
use crate::exit::ExitSwitch;
use crate::guest_status;
use crate::kvm::{self, KernelRoutes, KvmError, Vm};
use crate::layout;
use crate::listen::Listener;
use crate::memory::{Memory, MemoryError};
use crate::plan::{ConsolePlan, DiskPlan, ListenPlan, NetPlan, Plan, TapPlan, VsockPlan};
use crate::platform::DevicePlatform;
use crate::seccomp::{self, Filter, SeccompError, Thread};
use crate::signals::{self, SignalError};
use crate::terminal::RawTerminal;
use crate::vcpu::{Buses, VcpuError, Vcpus};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::block::{Block, BlockError, BlockHandle, BlockOptions};
use crate::virtio::mem::{Mem, MemHandle};
use crate::virtio::mmio::{MmioTransport, Window};
use crate::virtio::net::{Net, NetHandle};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
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

/// A machine that is ready to run.
pub struct Machine {
    // Field order is drop order: processors stop before what they use goes.
    vcpus: Arc<Vcpus>,
    events: EventLoop,
    exit: ExitSwitch,
    filters: Filters,
    missing_features: Vec<&'static str>,
    /// Put back to what it was when the machine is gone.
    _terminal: Option<RawTerminal>,
}

opaque_debug!(Machine);

impl Machine {
    /// Puts the machine of `plan` together. Its processors wait for [`run`](Self::run).
    pub fn build(mut plan: Plan, options: Options) -> Result<Machine, MachineError> {
        kvm::prepare_interrupts()?;
        let kvm = kvm::open(&plan.kvm)?;
        let memory = Memory::new(&plan.memory, &plan.images)?;
        let vm = Arc::new(Vm::new(&kvm, memory.all)?);
        let memory = memory.boot;
        let entry = boot::load(
            &memory,
            &mut plan.kernel,
            &mut plan.initramfs,
            &plan.cmdline,
        )?;
        acpi::write(&memory, plan.cpus, &plan.windows)?;

        let virtio = VirtioDevices::new(&mut plan)?;
        let mut parts = Parts::new(vm.clone())?;
        let terminal = parts.add_serial_port(plan.console)?;
        let power_button = parts.add_power()?;
        parts.add_boot_timer(options.boot_timer);
        for ((name, device), window) in virtio.devices.into_iter().zip(&plan.windows) {
            parts.add_virtio(name, device, *window)?;
        }
        parts.finish();

        let mut fds = Vec::new();
        for id in 0..plan.cpus {
            fds.push(vm.create_vcpu(id)?);
        }
        x86_64::configure(&kvm, &fds, &memory, entry, plan.cpu_template)?;
        seccomp::prepare_allocator();
        let filters = Filters::new(options);
        let enter = Filters::enter(&filters.device, &parts.exit);
        parts
            .events
            .start_branches(&enter)
            .map_err(host("start a device's thread"))?;
        let enter = Filters::enter(&filters.vcpu, &parts.exit);
        let buses = Arc::new(parts.buses);
        let vcpus = Arc::new(Vcpus::start(fds, &buses, &parts.exit, &enter)?);
        if let Some(listen) = plan.control {
            let controls = Controls {
                vcpus: vcpus.clone(),
                exit: parts.exit.clone(),
                readiness: parts.readiness,
                power_button,
                transports: parts.transports,
                disks: virtio.disks,
                nets: virtio.nets,
                memory: MemoryControls {
                    boot_bytes: plan.memory.boot_bytes,
                    balloon: virtio.balloon,
                    mem: virtio.mem,
                },
            };
            serve(&mut parts.events, control_listener(listen)?, controls)?;
        }
        Ok(Machine {
            vcpus,
            events: parts.events,
            exit: parts.exit,
            filters,
            missing_features: x86_64::missing_features(&kvm, plan.cpu_template)?,
            _terminal: terminal,
        })
    }

    /// What the host lacks of the processor that was asked for.
    pub fn missing_features(&self) -> &[&'static str] {
        &self.missing_features
    }

    /// Runs the machine to its end, and says why it ended.
    pub fn run(mut self) -> ExitStatus {
        // From here on there are guests, and no way back out of the filters.
        match self.filters.lock_event_loop() {
            Ok(()) => self.vcpus.resume(),
            Err(error) => self.exit.fail(&error),
        }
        if let Err(error) = self.events.run() {
            self.exit.fail(&error);
        }
        self.vcpus.finish();
        let status = self.exit.status();
        status.expect("the event loop ends with the machine")
    }
}

/// What threads may do. Absent filters allow everything.
struct Filters {
    event_loop: Option<Filter>,
    vcpu: Option<Filter>,
    device: Option<Filter>,
}

impl Filters {
    fn new(options: Options) -> Self {
        let filter = |thread| (!options.no_seccomp).then(|| Filter::new(thread));
        Self {
            event_loop: filter(Thread::EventLoop),
            vcpu: filter(Thread::Vcpu),
            device: filter(Thread::Device),
        }
    }

    fn lock_event_loop(&self) -> Result<(), SeccompError> {
        self.event_loop.as_ref().map_or(Ok(()), Filter::install)
    }

    /// What a thread that `filter` is for does first.
    fn enter(filter: &Option<Filter>, exit: &ExitSwitch) -> Arc<dyn Fn() + Send + Sync> {
        let (filter, exit) = (filter.clone(), exit.clone());
        Arc::new(move || {
            if let Some(Err(error)) = filter.as_ref().map(Filter::install) {
                exit.fail(&error);
            }
        })
    }
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
    fn new(plan: &mut Plan) -> Result<Self, MachineError> {
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
            list.add("vsock".to_owned(), vsock(plan), |_, _| ())?;
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
    Ok(Block::new(plan.file, options)?)
}

fn network(plan: NetPlan) -> Result<Net, DeviceSetupError> {
    let tap = match plan.tap {
        TapPlan::Name(name) => Tap::open(&name)?,
        TapPlan::Open(descriptor) => Tap::from_fd(descriptor)?,
    };
    Ok(Net::new(tap, plan.mac))
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

/// The machine while it is put together.
struct Parts {
    vm: Arc<Vm>,
    exit: ExitSwitch,
    readiness: GuestReadiness,
    events: EventLoop,
    buses: Buses,
    /// The devices' ends of the interrupt lines.
    lines: BTreeMap<u32, EventFd>,
    transports: Vec<Arc<Mutex<MmioTransport>>>,
}

impl Parts {
    fn new(vm: Arc<Vm>) -> Result<Self, MachineError> {
        let exit = ExitSwitch::new().map_err(host("make an event"))?;
        let mut events = EventLoop::new(exit.clone()).map_err(host("make an event loop"))?;
        signals::end_machine(&mut events, &exit)?;
        Ok(Self {
            vm,
            events,
            exit,
            readiness: GuestReadiness::new().map_err(host("make an event"))?,
            buses: Buses::default(),
            lines: BTreeMap::new(),
            transports: Vec::new(),
        })
    }

    /// A new interrupt line: the device's end of it.
    fn line(&mut self, gsi: u32) -> Result<EventFd, MachineError> {
        let ours = event().map_err(host("make an interrupt line"))?;
        let line = ours.try_clone().map_err(host("make an interrupt line"))?;
        self.lines.insert(gsi, ours);
        Ok(line)
    }

    fn add_port(&mut self, ports: Range<u64>, device: impl BusDevice + 'static) {
        self.buses.ports.insert(ports, Arc::new(Mutex::new(device)));
    }

    fn add_page(&mut self, address: u64, device: impl BusDevice + 'static) {
        let pages = address..address + layout::PAGE_BYTES;
        self.buses
            .memory
            .insert(pages, Arc::new(Mutex::new(device)));
    }

    fn add_serial_port(
        &mut self,
        console: ConsolePlan,
    ) -> Result<Option<RawTerminal>, MachineError> {
        let line = self.line(layout::SERIAL_GSI)?;
        let mut port = SerialPort::new(line, console.output);
        let source = self.events.reserve();
        let mut terminal = None;
        if let Some(input) = console.input {
            terminal = RawTerminal::new(&input).map_err(host("set the terminal up"))?;
            port.connect(input, self.events.poller(), source)
                .map_err(host("wait for input"))?;
        }
        let port = Arc::new(Mutex::new(port));
        self.events.attach(source, port.clone());
        let ports = layout::SERIAL_PORT..layout::SERIAL_PORT + layout::SERIAL_PORTS;
        self.buses.ports.insert(ports, port);
        Ok(terminal)
    }

    /// All ways in which a guest ends or is asked to end. Returns the power button's line.
    fn add_power(&mut self) -> Result<EventFd, MachineError> {
        let power_button = self.line(layout::POWER_BUTTON_GSI)?;
        let exit = self.exit.clone();
        let ports = layout::POWER_PORT..layout::POWER_PORT + layout::POWER_PORTS;
        self.add_port(ports, PowerRegisters::new(exit.clone()));
        let ports = layout::KEYBOARD_PORT..layout::KEYBOARD_PORT + 1;
        self.add_port(ports, KeyboardController::new(exit.clone()));
        let ports = u64::from(guest_status::PORT)..u64::from(guest_status::PORT) + 4;
        self.add_port(ports, GuestStatus::new(exit, self.readiness.clone()));
        Ok(power_button)
    }

    fn add_boot_timer(&mut self, start: Option<Start>) {
        if let Some(start) = start {
            self.add_page(layout::BOOT_TIMER, BootTimer::new(start));
        }
    }

    fn add_virtio(
        &mut self,
        name: String,
        device: Box<dyn VirtioDevice>,
        window: Window,
    ) -> Result<(), MachineError> {
        let line = self.line(window.gsi)?;
        let events = if device.is_fast() {
            let branch = self.events.branch(&name);
            branch.map_err(host("make an event loop"))?
        } else {
            &mut self.events
        };
        let source = events.reserve();
        let platform = DevicePlatform::new(
            self.vm.clone(),
            events.poller(),
            self.exit.clone(),
            window,
            source,
            line,
        );
        let memory = self.vm.memory().clone();
        let transport = MmioTransport::new(name.clone(), device, memory, Box::new(platform))
            .map_err(|source| MachineError::Queues { name, source })?;
        let transport = Arc::new(Mutex::new(transport));
        events.attach(source, transport.clone());
        self.transports.push(transport.clone());
        let registers = window.address..window.address + layout::VIRTIO_BYTES;
        self.buses.memory.insert(registers, transport);
        Ok(())
    }

    /// Joins all lines to the I/O APIC: the last part.
    fn finish(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let routes = KernelRoutes::new(self.vm.clone(), lines, self.exit.clone());
        self.add_page(layout::IOAPIC, IoApic::new(routes));
    }
}
