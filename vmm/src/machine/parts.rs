//! A machine while it is put together: its buses, its interrupt lines, and what is behind them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::{MachineError, host, unrestorable};
use crate::bus::BusDevice;
use crate::devices::boot_timer::{BootTimer, Start};
use crate::devices::guest_status::{GuestStatus, Reports};
use crate::devices::ioapic::IoApic;
use crate::devices::keyboard::KeyboardController;
use crate::devices::power::PowerRegisters;
use crate::devices::serial::{SerialPort, SerialPortState};
use crate::events::{EventLoop, event};
use crate::exit::ExitSwitch;
use crate::guest_status;
use crate::kvm::{KernelRoutes, Vm};
use crate::layout;
use crate::pci::bus::PciBus;
use crate::plan::ConsolePlan;
use crate::platform::{DevicePlatform, Wiring};
use crate::signals;
use crate::spec;
use crate::terminal::RawTerminal;
use crate::vcpu::Buses;
use crate::virtio::VirtioDevice;
use crate::virtio::counters::Counters;
use crate::virtio::pci::interrupts::Interrupts;
use crate::virtio::pci::{Place, VirtioFunction};
use crate::virtio::transport::{Transport, Window};

/// What a function on PCI shares with its device's platform.
type FunctionParts = (Arc<Mutex<Interrupts>>, Place);

/// The machine while it is put together.
pub(super) struct Parts {
    vm: Arc<Vm>,
    pub(super) exit: ExitSwitch,
    pub(super) reports: Reports,
    pub(super) events: EventLoop,
    pub(super) buses: Buses,
    /// The devices' ends of the interrupt lines.
    lines: BTreeMap<u32, EventFd>,
    pub(super) transports: Vec<Arc<Mutex<Transport>>>,
    /// There until [`finish`](Self::finish), if the machine has one.
    pci: Option<PciBus>,
    /// In the order of the transports, if the machine has PCI.
    pub(super) functions: Vec<Arc<Mutex<VirtioFunction>>>,
}

impl Parts {
    /// With devices that are found in this way.
    pub(super) fn new(
        vm: Arc<Vm>,
        exit: ExitSwitch,
        reports: Reports,
        transport: spec::Transport,
    ) -> Result<Self, MachineError> {
        let mut events = EventLoop::new(exit.clone()).map_err(host("make an event loop"))?;
        signals::end_machine(&mut events, &exit)?;
        Ok(Self {
            vm,
            events,
            exit,
            reports,
            buses: Buses::default(),
            lines: BTreeMap::new(),
            transports: Vec::new(),
            pci: match transport {
                spec::Transport::Mmio => None,
                spec::Transport::Pci => Some(PciBus::new()),
            },
            functions: Vec::new(),
        })
    }

    /// A new interrupt line: the device's end of it.
    pub(super) fn line(&mut self, gsi: u32) -> Result<EventFd, MachineError> {
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

    pub(super) fn add_serial_port(
        &mut self,
        console: ConsolePlan,
        saved: Option<&SerialPortState>,
    ) -> Result<(Arc<Mutex<SerialPort>>, Option<RawTerminal>), MachineError> {
        let line = self.line(layout::SERIAL_GSI)?;
        let mut port = match saved {
            None => SerialPort::new(line, console.output),
            Some(state) => {
                let port = SerialPort::restored(line, console.output, state);
                port.map_err(unrestorable("serial port"))?
            }
        };
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
        self.buses.ports.insert(ports, port.clone());
        Ok((port, terminal))
    }

    /// All ways in which a guest ends or is asked to end. Returns the power button's line.
    pub(super) fn add_power(&mut self) -> Result<EventFd, MachineError> {
        let power_button = self.line(layout::POWER_BUTTON_GSI)?;
        let exit = self.exit.clone();
        let ports = layout::POWER_PORT..layout::POWER_PORT + layout::POWER_PORTS;
        self.add_port(ports, PowerRegisters::new(exit.clone()));
        let ports = layout::KEYBOARD_PORT..layout::KEYBOARD_PORT + 1;
        self.add_port(ports, KeyboardController::new(exit));
        let ports = u64::from(guest_status::PORT)..u64::from(guest_status::PORT) + 4;
        self.add_port(ports, GuestStatus::new(self.reports.clone()));
        Ok(power_button)
    }

    pub(super) fn add_boot_timer(&mut self, start: Option<Start>) {
        if let Some(start) = start {
            self.add_page(layout::BOOT_TIMER, BootTimer::new(start));
        }
    }

    /// Puts devices, each with its name, at their places.
    pub(super) fn add_all_virtio(
        &mut self,
        devices: Vec<(String, Box<dyn VirtioDevice>)>,
        windows: &[Window],
    ) -> Result<(), MachineError> {
        for ((name, device), window) in devices.into_iter().zip(windows) {
            self.add_virtio(name, device, *window)?;
        }
        Ok(())
    }

    fn add_virtio(
        &mut self,
        name: String,
        device: Box<dyn VirtioDevice>,
        window: Window,
    ) -> Result<(), MachineError> {
        let (wiring, pci) = self.wiring(&*device, window)?;
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
            wiring,
            source,
        );
        let memory = self.vm.memory().clone();
        let transport = Transport::new(name.clone(), device, memory, Box::new(platform))
            .map_err(|source| MachineError::Queues { name, source })?;
        let transport = Arc::new(Mutex::new(transport));
        events.attach(source, transport.clone());
        self.transports.push(transport.clone());
        let Some((interrupts, place)) = pci else {
            let registers = window.address..window.address + layout::VIRTIO_BYTES;
            self.buses.memory.insert(registers, transport);
            return Ok(());
        };
        let function = VirtioFunction::new(window.address, transport, interrupts, place);
        let function = Arc::new(Mutex::new(function));
        self.functions.push(function.clone());
        if let Some(bus) = &mut self.pci {
            bus.insert(window.gsi, function);
        }
        Ok(())
    }

    /// How a device is to reach its driver, and what its function on PCI, if it is one, has of that.
    fn wiring(
        &mut self,
        device: &dyn VirtioDevice,
        window: Window,
    ) -> Result<(Wiring, Option<FunctionParts>), MachineError> {
        if self.pci.is_none() {
            let line = self.line(window.gsi)?;
            return Ok((Wiring::Registers { window, line }, None));
        }
        let queues = device.info().queue_sizes.len();
        let interrupts = Interrupts::new(queues, Box::new(self.vm.clone()));
        let (interrupts, place) = (Arc::new(Mutex::new(interrupts)), Place::default());
        let wiring = Wiring::Function {
            interrupts: interrupts.clone(),
            place: place.clone(),
        };
        Ok((wiring, Some((interrupts, place))))
    }

    /// What all virtio devices count, in the order of their addresses.
    pub(super) fn counters(&self) -> Vec<Arc<Counters>> {
        let transports = self.transports.iter();
        transports
            .map(|transport| {
                transport
                    .lock()
                    .expect("no device panics")
                    .counters()
                    .clone()
            })
            .collect()
    }

    /// Joins all lines to the I/O APIC: the last part.
    pub(super) fn finish(&mut self) -> Arc<Mutex<IoApic<KernelRoutes>>> {
        let lines = std::mem::take(&mut self.lines);
        let routes = KernelRoutes::new(self.vm.clone(), lines, self.exit.clone());
        let chip = Arc::new(Mutex::new(IoApic::new(routes)));
        if let Some(bus) = self.pci.take() {
            let bus = Arc::new(Mutex::new(bus));
            self.buses.memory.insert(PciBus::range(), bus);
        }
        let page = layout::IOAPIC..layout::IOAPIC + layout::PAGE_BYTES;
        self.buses.memory.insert(page, chip.clone());
        chip
    }
}
